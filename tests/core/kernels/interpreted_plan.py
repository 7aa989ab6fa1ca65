"""The plan's numbers for the Triton kernels, in Triton's interpreter (run by ``tests/tools/test_plan.py``).

The interpreter works on the same tensors, so memory and the other operations are those of a GPU.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from triton.runtime.interpreter import GridExecutor

from tests.distributed.launch import run_ranks
from tests.tools.test_plan import (
    DTYPES,
    Meter,
    Passes,
    close,
    handed_over,
    logits_of,
    loss_of,
    plan_of,
    terms_of,
    trolls_collectives,
)
from verl_troll.core import kernels, lm_head
from verl_troll.core.kernels import logits_triton as form
from verl_troll.core.lm_head import LinearHead
from verl_troll.core.support import Selection, select
from verl_troll.core.vocab import VocabLogits

by_rule = pytest.mark.parametrize("rule", ["union", "anchored"])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
_execute = GridExecutor.__call__
K = 24


def watch(meter: Meter) -> None:
    """Make ``meter`` count each launch as one operation and ignore the interpreter's own."""

    def launched(executor: Any, *arguments: Any, **options: Any) -> None:
        meter.operations += 1
        meter.active = False
        try:
            _execute(executor, *arguments, **options)
        finally:
            meter.active = True
        # The interpreter leaves reference cycles that hold its arguments.
        gc.collect()

    GridExecutor.__call__ = launched


@pytest.fixture(autouse=True)
def kernels_in_use() -> None:
    assert kernels.available(torch.device("cpu"))


def confirm(rule: str, **options: Any) -> None:
    passes = Passes(rule, 200, 2, 6, k=K, sharp=30, watch=watch, group=dist.group.WORLD if options else None)
    passes.run()
    options |= {"form": "triton", "support": rule, "k": K, "kept_ids": passes.kept_ids}
    # The rank with the first ids needs no offset, which takes less.
    if passes.group is None or dist.get_rank() > 0:
        passes.confirm(plan_of(passes.rows, 200, **options), kept=passes.backward)


@by_rule
def test_passes(rule: str) -> None:
    confirm(rule)


def on_rank(rows: int, vocab: int) -> dict[str, list[tuple[str, int]]]:
    for rule in ("union", "anchored"):
        confirm(rule, backend="megatron", tp=2)
    return trolls_collectives(rows, vocab)


def test_passes_and_collectives_on_two_ranks() -> None:
    rows, vocab = 2, 200
    for by_case in run_ranks(on_rank, 2, (rows, vocab)):
        assert len(by_case) == 5
        for case, sent in by_case.items():
            if case != "old":
                predicted = plan_of(rows, vocab, form="triton", backend="megatron", tp=2, support=case.split()[0])
                assert handed_over(sent, 2) == (predicted["troll_calls"], rows * predicted["troll_sent"]), case


@pytest.mark.parametrize("k", [1, 64, 65, 256, 257, kernels.MAX_K_OF_TERMS])
def test_groups(k: int) -> None:
    assert plan_of(8, 2000, form="triton", k=k)["group"] == form.group_columns(k)


@by_dtype
@by_rule
def test_memory_of_the_search(rule: str, dtype: torch.dtype) -> None:
    rows, vocab, k = 3, 12_000, 2
    predicted = plan_of(rows, vocab, form="triton", support=rule, k=k, dtype_bytes=DTYPES[dtype])
    old, new, sampled = logits_of(rows, vocab, dtype)
    everything = torch.arange(rows)
    watch(meter := Meter())
    with meter:
        policy = select(VocabLogits.of(old, everything), sampled, Selection(k, 1e-5), entropy=True)
    close("old pass", meter.peak, predicted["troll_old"])
    leaf = new.requires_grad_()
    watch(meter := Meter())
    with meter:
        loss_of(terms_of(rule, leaf, everything, policy, k=k, reuse_logits=True)).backward()
    if rule == "union":
        close("update", meter.peak, predicted["troll_update"])
    else:
        assert meter.peak <= predicted["small"] < predicted["read_block"]


@by_dtype
@pytest.mark.parametrize(("rows", "elements"), [(4, 1 << 20), (8, 512)], ids=["one block", "six blocks"])
def test_memory_of_fused_heads(rows: int, elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, units, k = 300, 512, 2
    monkeypatch.setitem(lm_head._READ_BLOCK, "cpu", (4, 200))
    monkeypatch.setitem(lm_head._GRADIENT_BLOCK, "cpu", (4, elements))
    predicted = plan_of(
        rows, vocab, hidden=units, form="triton", fused=True, k=k, support="anchored", dtype_bytes=DTYPES[dtype]
    )
    hidden = torch.randn(rows, units).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab, units)).to(dtype).requires_grad_()
    sampled, everything = torch.randint(vocab, (rows,)), torch.arange(rows)
    watch(meter := Meter())
    with meter:
        policy = select(
            VocabLogits.of(LinearHead(hidden.detach(), weight.detach()), everything), sampled, Selection(k, 1e-5)
        )
    close("old pass", meter.peak, predicted["troll_old"])
    watch(meter := Meter())
    with meter:
        loss_of(terms_of("anchored", LinearHead(hidden, weight), everything, policy, k=k)).backward()
    close("update", meter.peak, predicted["troll_update"])
