"""The old policy's support from the rollout engine, instead of an old-log-prob pass (verl's bypass mode).

While it samples, a rollout engine computes exactly the old policy's distribution. Under ``+troll=rollout_support`` its
most probable ids and their log-probabilities are kept, and travel in the same two fields as those of the
old-log-prob pass (:mod:`verl_troll.plugin.carry`)::

    engine -> server (vllm.py, sglang.py) -> agent loop (agent_loops.py) -> TransferQueue -> update

A third field has the version of the weights that sampled each token, for the metrics.

Importing this package registers replicas that record the support and agent loops that pass it on. All are subclasses
of verl's own.
"""

from __future__ import annotations

import sys
from typing import Any

from verl.workers.rollout import replica
from verl.workers.rollout.replica import RolloutReplicaRegistry


def _load_vllm() -> type[Any]:
    from verl_troll.plugin.rollout.vllm import VllmSupportReplica

    return VllmSupportReplica


def _load_sglang() -> type[Any]:
    # verl's loader also puts placeholders where SGLang's imports expect vLLM.
    replica._load_sglang()
    from verl_troll.plugin.rollout.sglang import SglangSupportReplica

    return SglangSupportReplica


RolloutReplicaRegistry.register("vllm", _load_vllm)
RolloutReplicaRegistry.register("sglang", _load_sglang)

from verl_troll.patches import registry, verl_trained_version  # noqa: E402
from verl_troll.plugin import carry  # noqa: E402
from verl_troll.plugin.rollout import agent_loops  # noqa: E402, F401

# The trainer's process has loaded its trainer by now; others have no use for one.
if verl_trained_version.TRAINER in sys.modules:
    registry.apply(verl_trained_version.PATCH, carry.TRAINED_VERSION)
