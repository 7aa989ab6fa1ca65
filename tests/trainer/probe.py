"""Loaded into verl's workers by the trainer tests: records what the side channel carries, without changing it.

Every sample that leaves the old pass or enters an update becomes one line: the pass, a bit-exact digest of its tokens
and its support, the versions of the weights that sampled its tokens in the loss and the version that is trained (both
null where they are not known), the Ray node and the engine where it was seen, and whether that engine has the Triton
kernels (on a CPU, in Triton's interpreter).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu

FOLDER = "TROLL_TEST_PROBE"


def _write(kind: str, engine: Any, data: Any, fields: dict[str, Tensor]) -> None:
    from verl_troll.core import kernels
    from verl_troll.plugin import carry

    trained = tu.get_non_tensor_data(data, key=carry.TRAINED_VERSION, default=None)
    place = {
        "node": ray.get_runtime_context().get_node_id(),
        "engine": type(engine).__name__,
        "kernels": kernels.available(data["input_ids"].device),
    }
    lines = []
    columns = [data["input_ids"], data["response_mask"], fields[carry.COUNTS], fields[carry.SUPPORT]]
    versions = fields[carry.VERSIONS].cpu().unbind() if carry.VERSIONS in fields else [None] * len(data)
    for parts, own in zip(_rows(columns), versions, strict=True):
        ages = {"trained": trained, "versions": None if own is None else own[parts[1].bool()].tolist()}
        digest = hashlib.sha256()
        for part in parts:
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.contiguous().numpy().tobytes())
        lines.append(
            json.dumps({"pass": kind, "digest": digest.hexdigest(), "kept": int(parts[2].sum()), **ages, **place})
        )
    with Path(os.environ[FOLDER], f"probe-{os.getpid()}.jsonl").open("a") as file:
        file.writelines(line + "\n" for line in lines)


def _rows(columns: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(column.cpu().unbind() for column in columns), strict=True)


def install() -> None:
    """Wrap the two ends of the side channel."""
    from tests.core.kernels import interpreter
    from verl_troll.core import kernels
    from verl_troll.plugin import passes

    if kernels.available(torch.device("cpu")):
        interpreter.shrink()
    old_loss = passes.OldPolicyPass._loss
    read_logits = passes.UpdatePass._read_logits

    @functools.wraps(old_loss)
    def watched_old_pass(self: Any, model_output: dict[str, Tensor], data: Any, dp_group: Any) -> Any:
        result = old_loss(self, model_output, data, dp_group)
        _write("old", self.owner, data, model_output)
        return result

    @functools.wraps(read_logits)
    def watched_update(self: Any, logits: Any, data: Any, layout: Any, shard: Any) -> Any:
        result = read_logits(self, logits, data, layout, shard)
        _write("update", self.owner, data, data)
        return result

    passes.OldPolicyPass._loss = watched_old_pass  # type: ignore[method-assign]
    passes.UpdatePass._read_logits = watched_update  # type: ignore[method-assign]
