"""The attacks on the projection and the chain at a small scale, and that they notice faults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attack import __main__ as command
from benchmarks.attack import kernels
from benchmarks.attack.attack import Extent, Outcome
from verl_troll.core.loss import PolicyTerms, policy_terms
from verl_troll.core.projection import Projection, project
from verl_troll.core.support import SparsePolicy, select

ROWS = 500


def projection(path: Path) -> Outcome:
    return kernels.fuzz_projection(Extent(path), ROWS, 1 << 20, "torch")


def tokens(path: Path) -> Outcome:
    """In torch, which stands in for Triton too."""
    return kernels.fuzz_tokens(Extent(path), ROWS, 1 << 20, (2, 60))


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WIDTHS", (2, 5, 33))
    monkeypatch.setattr(kernels, "DTYPES", (torch.float32, torch.float64))
    monkeypatch.setattr(kernels, "K", (8,))


@pytest.mark.parametrize("fuzz", [projection, tokens])
def test_torch_holds(tmp_path: Path, fuzz: Callable[[Path], Outcome]) -> None:
    outcome = fuzz(tmp_path)
    assert (outcome.tried, outcome.fell) == (ROWS, 0), outcome.examples


def test_triton_holds_in_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="the extra dev brings Triton from Python 3.11 on")
    assert command.main(["--only", "projection_triton", "tokens_triton", "--scale", "0.005"]) == 0
    printed = capsys.readouterr().out
    assert "tried 20, held 20" in printed and "tried 8, held 8" in printed


def changed(found: Projection, **change: Callable[[Any], Any]) -> Projection:
    return dataclasses.replace(found, **{name: edit(getattr(found, name)) for name, edit in change.items()})


def faulty_projection(fault: str, new: Any, old: Any, bound: float, **options: Any) -> Projection:
    """:func:`project` with one fault."""
    if fault == "too far":
        return changed(project(new, old, 1.01 * bound, **options), kl=lambda kl: kl.clamp_max(bound))
    if fault == "too short":
        return changed(project(new, old, 0.9 * bound, **options), step_size=lambda t: t.clamp_max(0.999 * t))
    if fault == "step size as a constant":
        options["step_size_gradient"] = "detached"
    if fault == "no gradient":
        return changed(project(new, old, bound, **options), log_probs=lambda x: x.detach() + 0 * new)
    found = project(new, old, bound, **options)
    if fault == "a neighbour's NaN":
        return changed(found, log_probs=lambda x: x + 0 * x.nan_to_num(0.0).roll(1, 0) + 0 * x.roll(1, 0))
    if fault == "bits inside the region":
        return changed(found, log_probs=lambda x: x * (1 + 1e-6))
    if fault == "not normalised":
        return changed(found, log_probs=lambda x: x + 1e-3)
    if fault == "another evaluation":
        return changed(found, evaluations=lambda n: n + 18)
    return found


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize(
    "fault",
    [
        "too far",
        "too short",
        "step size as a constant",
        "no gradient",
        "a neighbour's NaN",
        "bits inside the region",
        "not normalised",
        "another evaluation",
    ],
)
def test_a_faulty_projection_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def one(*arguments: Any, **options: Any) -> Projection:
        return faulty_projection(fault, *arguments, **options)

    monkeypatch.setattr(kernels, "project", one)
    assert projection(tmp_path).fell > 0


def faulty_selection(fault: str, *arguments: Any, **options: Any) -> SparsePolicy:
    found = select(*arguments, **options)
    if fault == "an id too few":
        ids = found.ids.clone()
        ids[:, 0] = -1
        return dataclasses.replace(found, ids=ids)
    return dataclasses.replace(found, log_probs=found.log_probs - 1e-3)


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("fault", ["an id too few", "inexact"])
def test_a_faulty_selection_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def in_one_form(logits: Any, *arguments: Any) -> SparsePolicy:
        form = logits.source.form
        return select(logits, *arguments) if form == "torch" else faulty_selection(fault, logits, *arguments)

    monkeypatch.setattr(kernels, "select", in_one_form)
    assert tokens(tmp_path).fell > 0


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize(
    ("field", "edit"),
    [
        ("log_ratio", lambda x: x + 1e-2),
        ("log_ratio", lambda x: torch.where(x.isnan(), 0.0, x)),
        ("regression_kl", lambda x: x * 0.9),
        ("sampled_log_probs", lambda x: x - 1e-2),
        ("entropy", lambda x: x * 1.1),
        ("statistics", lambda x: x.index_fill(0, torch.tensor([1]), math.inf)),
        ("statistics", lambda x: x.index_fill(0, torch.tensor([6]), 0.0)),
    ],
)
def test_a_faulty_chain_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, edit: Any) -> None:
    def in_one_form(rule: str, logits: Any, *arguments: Any, **options: Any) -> PolicyTerms:
        terms = policy_terms(rule, logits, *arguments, **options)
        if logits.source.form == "torch":
            return terms
        return dataclasses.replace(terms, **{field: edit(getattr(terms, field))})

    monkeypatch.setattr(kernels, "policy_terms", in_one_form)
    assert tokens(tmp_path).fell > 0
