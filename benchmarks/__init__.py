"""What TROLL costs beside verl's clipping: ``python -m benchmarks --help``.

Every method of a measurement takes its turn on the same inputs in one run. Whole trainer steps are a command of their
own, ``python -m benchmarks.trainer_steps``, as is the choice among two ways to merge, ``benchmarks.shard_merge``.
"""
