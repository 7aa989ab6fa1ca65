"""TROLL on verl's real engines with the Triton kernels, in Triton's interpreter.

Run by ``tests/core/test_kernels.py``.

Each run is compared with the same run on the torch forms, and counts the calls of each kernel.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tensordict import TensorDict

from tests.core.kernels import interpreter
from tests.distributed import batches, fsdp_scenarios, megatron_scenarios, megatron_stock
from tests.distributed.fsdp_scenarios import Setup
from tests.distributed.launch import run_ranks
from tests.distributed.megatron_stock import Layout
from tests.distributed.test_fsdp_engine import METHODS
from tests.distributed.test_fsdp_engine import assert_same as assert_same_update
from tests.distributed.test_megatron_engine import LR
from tests.distributed.test_megatron_engine import assert_same as assert_same_training
from verl_troll.core.kernels import logits_triton, tokens_triton

FORMS = {
    "read_rows": logits_triton,
    "write_gradient": logits_triton,
    "keep": tokens_triton,
    "terms": tokens_triton,
    "combine": tokens_triton,
}
# Few ids, because the interpreter sorts slowly; with dropped_mass 0, rounding cannot change which ids are kept.
SUPPORT = {"k": 8, "dropped_mass": 0.0}


def counted(scenario: Callable[..., Any], *arguments: Any) -> tuple[Any, Counter[str]]:
    """The scenario's result on this rank, and the number of calls of each kernel."""
    interpreter.shrink()
    calls: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        own = getattr(FORMS[name], name)

        def call(*given: Any, **named: Any) -> Any:
            calls[name] += 1
            return own(*given, **named)

        return call

    with contextlib.ExitStack() as patched:
        for name, module in FORMS.items():
            patched.enter_context(mock.patch.object(module, name, counting(name)))
        result = scenario(*arguments)
    return result, calls


def run(scenario: Callable[..., Any], ranks: int, *arguments: Any, interpreted: bool) -> list[Any]:
    """Results by rank; asserts that the scenario used all kernels or none."""
    by_rank = run_ranks(counted, ranks, (scenario, *arguments))
    for _, calls in by_rank:
        assert set(calls) == (set(FORMS) if interpreted else set())
    return [result for result, _ in by_rank]


@pytest.fixture(scope="module")
def batch() -> TensorDict:
    return batches.make_batch()


@pytest.mark.parametrize(
    ("fused", "methods"), [(False, ("union", "detached")), (True, ("anchored",))], ids=["logits", "fused"]
)
def test_fsdp(tmp_path: Path, batch: TensorDict, fused: bool, methods: tuple[str, ...]) -> None:
    path = fsdp_scenarios.write_model(tmp_path)
    common: dict[str, Any] = {"use_kl_loss": True, "entropy_coeff": 0.01, "micro_batch_size": 4}
    chosen = [{**METHODS[name], **SUPPORT} for name in methods]
    torch_forms = [Setup(path, {**method, "kernels": "torch"}, **common) for method in chosen]
    (references,) = run(fsdp_scenarios.each, 1, torch_forms, batch, interpreted=False)
    setups = [Setup(path, method, use_fused_kernels=fused, **common) for method in chosen]
    for results in run(fsdp_scenarios.each, 2, setups, batch, interpreted=True):
        for result, reference in zip(results, references, strict=True):
            assert 0.05 < reference["metrics"]["troll/projected_share"] < 0.95
            assert_same_update(result, reference)


def test_fsdp_in_half_precision_stays_in_the_region(tmp_path: Path, batch: TensorDict) -> None:
    method = {"support": "union", **SUPPORT}
    setup = Setup(fsdp_scenarios.write_model(tmp_path), method, param_dtype="bf16", lr=1e-2)
    (history,) = run(fsdp_scenarios.train_steps, 1, setup, batch, 2, interpreted=True)
    assert all(torch.isfinite(torch.tensor(list(step.values()))).all() for step in history)
    assert history[-1]["troll/kl_before"] > 0.05
    assert history[-1]["troll/kl_after_max"] <= 0.05 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("fused", "support", "layouts"),
    [(False, "union", [{"tensor": 2}, {"context": 2}]), (True, "anchored", [{"tensor": 2}])],
    ids=["logits", "fused"],
)
def test_megatron(tmp_path: Path, batch: TensorDict, fused: bool, support: str, layouts: list[dict[str, Any]]) -> None:
    path = megatron_stock.write_model(tmp_path, "qwen3")
    batch = batch.exclude("rollout_is_weights")
    method = {"support": support, **SUPPORT}
    settings = {"entropy_coeff": 0.01}
    base = Layout(path, lr=LR[support])
    cases: list[Any] = [(base, {**method, "kernels": "torch"}, settings)]
    ((reference,),) = run(megatron_scenarios.each, 1, cases, batch, interpreted=False)
    assert 0.05 < reference["history"][-1]["troll/projected_share"] < 0.95
    cases = [(replace(base, use_fused_kernels=fused, **layout), method, settings) for layout in layouts]
    for results in run(megatron_scenarios.each, 2, cases, batch, interpreted=True):
        for layout, result in zip(layouts, results, strict=True):
            assert_same_training(result, reference, layout)
