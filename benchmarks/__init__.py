"""What TROLL costs compared with verl's clipping: ``python -m benchmarks --help``.

All methods of a measurement alternate on the same inputs in one run. Separate commands measure whole trainer steps
(``python -m benchmarks.trainer_steps``) and two ways to merge shards (``benchmarks.shard_merge``).
"""
