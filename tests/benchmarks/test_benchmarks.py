"""The benchmarks run at a tiny size, and their instruments are correct; no times are asserted."""

from __future__ import annotations

import gc
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import carried, measure, published, shard_merge, solver, targets, troll, update
from benchmarks.inputs import make_batch, response_rows
from benchmarks.measure import Contender, Spread, bandwidth_contenders, peak_bytes, take_turns
from benchmarks.rows import Case, Floor, Row, ratio
from verl_troll.core.comparison import compare
from verl_troll.core.loss import token_terms
from verl_troll.core.projection import project
from verl_troll.core.support import Selection, select
from verl_troll.core.vocab import VocabLogits

MIB = 1 << 20
TINY = ["--vocab", "1200", "--tokens", "32", "--k", "8", "--hidden", "16", "--dtype", "float32", "--repeat", "1"]
SETTINGS: dict[str, Any] = dict(k=16, dropped_mass=troll.DROPPED_MASS)


@pytest.fixture(autouse=True, scope="module")
def as_in_a_process_of_its_own() -> Iterator[None]:
    """Undo what the command changes in the process, and keep garbage collection from walking everything imported."""
    threads = torch.get_num_threads()
    gc.freeze()
    with mock.patch.dict(os.environ), warnings.catch_warnings():
        yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def mib(count: float) -> Tensor:
    return torch.empty(int(count * MIB), dtype=torch.uint8)


def test_memory_meter_on_known_allocations() -> None:
    kept = mib(64)

    def first(_: object) -> Tensor:
        one, other = mib(8), mib(4)
        del one
        return other

    def second(other: Tensor) -> Tensor:
        # On top of the 4 that the first phase left.
        return mib(6)

    work = Contender("known", {"first": first, "second": second})
    assert peak_bytes(work, "cpu") == 12 * MIB
    assert peak_bytes(Contender("known", {"second": second}, prepare=lambda: kept), "cpu") == 6 * MIB
    assert peak_bytes(work, "cpu", phases=1) == 12 * MIB
    larger = Contender("known", {"first": first, "second": lambda other: (other, mib(30))})
    assert peak_bytes(larger, "cpu", phases=1) == 12 * MIB
    assert peak_bytes(larger, "cpu") == 34 * MIB


def test_memory_meter_sees_inside_operators_and_backward() -> None:
    logits = torch.randn(64, 4096, requires_grad=True)
    labels = torch.zeros(64, 1, dtype=torch.int64)
    steps = Contender(
        "log-softmax",
        {
            "forward": lambda _: torch.log_softmax(logits, -1).gather(-1, labels).sum(),
            "backward": lambda loss: torch.autograd.grad(loss, logits),
        },
    )
    size = logits.numel() * 4
    # Forward: the log-softmax. Backward: its gradient as well, then the logits' gradient on top of both.
    assert size <= peak_bytes(steps, "cpu", phases=1) < 1.01 * size
    assert 3 * size <= peak_bytes(steps, "cpu") < 3.01 * size


def test_turns_alternate_and_the_first_is_dropped() -> None:
    calls: list[str] = []

    def contender(name: str) -> Contender:
        def prepare() -> str:
            calls.append(f"prepare {name}")
            return name

        def one(value: str) -> str:
            calls.append(f"{value} 1")
            return value

        return Contender(name, {"one": one, "two": lambda value: calls.append(f"{value} 2")}, prepare)

    times = take_turns([contender("a"), contender("b")], 2, "cpu")
    assert calls == ["prepare a", "a 1", "a 2", "prepare b", "b 1", "b 2"] * 3
    assert {name: {phase: len(own) for phase, own in phases.items()} for name, phases in times.items()} == {
        "a": {"one": 2, "two": 2},
        "b": {"one": 2, "two": 2},
    }


def test_spread_and_ratio() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)
    # Ratios are taken within a turn: a slow machine slows both sides.
    assert ratio([1.0, 10.0, 3.0], [2.0, 20.0, 3.0]) == 0.5
    row = Row("update", "x", {}, seconds=Spread.of([0.5]), floor=Floor(0.1, 8, "bytes"))
    assert row.ratio_to_floor == pytest.approx(5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bandwidth_probes_leave_every_value(dtype: str) -> None:
    logits = make_batch(Case(vocab=999, tokens=33, dtype=dtype), new=False).old
    before = logits.clone()
    for contender in bandwidth_contenders(logits):
        for call in contender.phases.values():
            call(None)
    assert torch.equal(logits, before)


def test_inputs_look_like_a_language_model_whatever_the_ranks() -> None:
    case = Case(vocab=30_000, tokens=256, k=64)
    whole = make_batch(case)
    parts = [make_batch(Case(vocab=30_000, tokens=256, k=64, ranks=3), rank) for rank in range(3)]
    joined = torch.cat([part.old for part in parts], -1)[:, :30_000]
    for one, other in zip(whole.old.topk(3), joined.topk(3), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(part.labels, whole.labels) for part in parts)
    old = select(VocabLogits.of(whole.old, whole.rows), whole.sampled_ids, Selection(64, troll.DROPPED_MASS))
    facts = troll.support_facts(old)
    assert 4 < facts["kept_ids"] < 12 and facts["kept_ids_max"] >= 64
    _, terms = troll.projected_loss("anchored", VocabLogits.of(whole.new, whole.rows), old, torch.ones(256), k=64)
    assert 0.02 < troll.projection_facts(terms)["projected_share"] < 0.3


def test_compacting_keeps_the_policy() -> None:
    batch = make_batch(Case(vocab=3000, tokens=128, k=16), new=False)
    policy = select(VocabLogits.of(batch.old, batch.rows), batch.sampled_ids, Selection(**SETTINGS))
    small = troll.compact(policy)
    assert small.ids.shape[-1] == int((policy.ids >= 0).sum(-1).max())
    assert torch.equal(small.ids.gather(-1, small.sampled.unsqueeze(-1)).squeeze(-1), batch.sampled_ids)
    for row in range(128):
        used = policy.ids[row] >= 0
        kept = small.ids[row] >= 0
        assert torch.equal(policy.ids[row][used], small.ids[row][kept])
        assert torch.equal(policy.log_probs[row][used], small.log_probs[row][kept])


def test_response_rows_end_each_sequence() -> None:
    assert response_rows(16, 0.5).tolist() == list(range(1, 16, 2))
    assert response_rows(16, 1.0).tolist() == list(range(16))


def test_published_method_agrees_with_the_union_rule() -> None:
    batch = make_batch(Case(vocab=3000, tokens=256, k=16))
    old = troll.compact(select(VocabLogits.of(batch.old, batch.rows), batch.sampled_ids, Selection(**SETTINGS)))
    logits = batch.new.clone().requires_grad_()
    comparison = compare("union", VocabLogits.of(logits, batch.rows), old, Selection(**SETTINGS))
    ours = token_terms(comparison, troll.KL_BOUND)

    own = batch.new.clone().requires_grad_()
    support = published.sparse_support(batch.old, batch.sampled_ids, **SETTINGS)
    terms, log_pi, log_p = published.update_terms(own, support, kl_bound=troll.KL_BOUND, **SETTINGS)
    assert torch.equal(terms.projected, ours.projected)
    projected = terms.projected
    assert 10 < int(projected.sum()) < 200
    # The bracket ends at eta = 100: beyond it the published method finds no feasible policy.
    feasible = ~projected | (ours.projection.step_size > 1 / (1 + published.ETA_MAX))
    assert feasible.float().mean() > 0.95
    # Both list the old policy's outcomes first, then those that only the new one keeps.
    # Where rounding moves the edge of a selection, one of them keeps an id more, whose mass is below the dropped one.
    edge = 2 * troll.DROPPED_MASS
    torch.testing.assert_close(log_p.exp(), comparison.new_log_probs.exp(), atol=edge, rtol=1e-4)
    found, expected = log_pi[feasible].exp(), ours.projection.log_probs[feasible].exp()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(terms.log_ratio[feasible], ours.log_ratio[feasible], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(
        terms.regression_kl[projected & feasible], ours.regression_kl[projected & feasible], atol=2e-3, rtol=2e-3
    )

    advantages = torch.where(feasible, batch.advantages, 0.0)
    gradients = []
    for leaf, log_ratio, regression in (
        (logits, ours.log_ratio, ours.regression_kl),
        (own, terms.log_ratio, terms.regression_kl),
    ):
        kept = torch.where(projected & feasible, regression, 0.0)
        gradients.append(torch.autograd.grad(troll.loss_from_terms(log_ratio, kept, advantages), leaf)[0])
    scale = gradients[0].norm(dim=-1, keepdim=True).clamp_min(1e-6)
    assert ((gradients[0] - gradients[1]).norm(dim=-1, keepdim=True) / scale)[feasible].max() < 2e-2


def test_published_bracketing_stops_as_soon_as_it_is_narrow_enough() -> None:
    width = (published.ETA_MAX - published.ETA_MIN) / (published.POINTS + 1) ** torch.arange(21, dtype=torch.float64)
    assert published.ROUNDS == int((width > published.ETA_TOLERANCE).sum()) < published.MAX_ROUNDS
    new, old = solver.outside_rows(64, 16, "overlapping")
    step_size = project(new.double(), old.double(), troll.KL_BOUND).step_size
    excess = published.bracket_eta(old, new - old, troll.KL_BOUND).double() - (1 / step_size - 1)
    # The bracket's width, and float32 rounding of the KL.
    assert excess.abs().max() < 2 * published.ETA_TOLERANCE


def test_published_bracketing_meets_the_bound() -> None:
    new, old = solver.outside_rows(64, 16, "overlapping")
    eta = published.bracket_eta(old, new - old, troll.KL_BOUND)
    exact = project(new.double(), old.double(), troll.KL_BOUND)
    torch.testing.assert_close(1 / (1 + eta.double()), exact.step_size, atol=0, rtol=1e-4)
    for family in ("overlapping", "missing ids"):
        new, old = solver.outside_rows(64, 16, family)
        assert new.shape == old.shape == (64, 16)
        assert (project(new, old, troll.KL_BOUND).kl_before > troll.KL_BOUND).all()


def test_carried_bytes_are_counted() -> None:
    rows = carried.run(Case(vocab=1200, tokens=40, k=8), 1)
    by_kept = {row.parameters["kept"]: row.facts for row in rows if row.method == "TROLL"}
    assert by_kept[10]["kept_ids"] == 10
    # A count of 2 bytes, 6 for each kept id, and 6 for each of the 8 samples of 5 tokens.
    for kept in (1, 10, 64):
        assert by_kept[kept]["bytes_per_token"] == pytest.approx(2 + 6 * kept + 6 / 5)


def test_every_measurement_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # verl compiles a helper of its sharded entropy in every rank's process, which takes longer than everything else.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    path = tmp_path / "rows.json"
    tiny = [*TINY, "--threads", "1", "--response-share", "1", "0.5"]
    assert command.main([*tiny, "--quick", "--ranks", "1", "2", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    rows = content["rows"]
    assert {row["measurement"] for row in rows} == set(command.NAMES)
    for row in rows:
        assert row["skipped"] is None and row["machine"]["torch"] == torch.__version__
        if row["measurement"] == "carried":
            continue
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["ratio"] > 0 and row["ratio_to_floor"] > 0 and row["extra_bytes"] >= 0
    seen = {(row["measurement"], row["parameters"].get("ranks"), row["method"]) for row in rows}
    for ranks in (1, 2):
        assert {("old_pass", ranks, "TROLL, entropy"), ("update", ranks, "union, reused")} <= seen
        assert ("update", ranks, "vanilla") in seen
    assert ("update", 1, "published") in seen
    both = {
        (row["method"], row["parameters"]["response_share"]): row
        for row in rows
        if row["measurement"] == "update" and row["phase"] == update.BOTH and row["parameters"]["ranks"] == 1
    }
    size = 32 * 1200 * 4
    assert both["vanilla", 1.0]["floor"]["byte_count"] == 3 * size
    assert both["vanilla", 0.5]["floor"]["byte_count"] == 3 * size // 2
    # At least its own gradient; a gradient written over the logits does not need that.
    assert both["anchored", 1.0]["extra_bytes"] >= size
    assert both["vanilla", 1.0]["extra_bytes"] >= size
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("Targets", "Floor, forward + backward", "(solver)", "published"))
    assert all(target["verdict"] in ("met", "missed", "not measured") for target in content["targets"])


def test_fused_head_alone_beside_computed_bytes(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(command, "FUSED_ALONE", {"vocab": 800, "tokens": 64})
    assert command.main([*TINY, "--only", "head", "--threads", "1", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| V 800, tokens 64, float32, D 16, K 8 | unfused, computed: forward + backward |" in printed
    assert f"{(64 * 800 + (800 + 64) * 16) * 4 / MIB:.1f}" in printed
    assert "share_of_unfused_computed" in printed and "once, under the memory meter" in printed


def test_what_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(measure, "free_memory", lambda device: 1000)
    assert command.main([*TINY, "--only", "update", "--threads", "1", "--ranks", "1", "--response-share", "1"]) == 0
    assert "skipped: needs about 0.0 GiB, 0.0 GiB are free" in capsys.readouterr().out


def test_axes_are_walked_one_by_one() -> None:
    options = command.arguments(["--vocab", "10", "20", "--tokens", "1", "2", "3", "--dtype", "bfloat16", "--k", "4"])
    found = [
        (case.vocab, case.tokens, case.dtype) for case in command.cases(options, "update", ("vocab", "tokens", "dtype"))
    ]
    assert found == [(10, 1, "bfloat16"), (20, 1, "bfloat16"), (10, 2, "bfloat16"), (10, 3, "bfloat16")]
    options.full = True
    assert len(list(command.cases(options, "update", ("vocab", "tokens")))) == 6
    quick = command.arguments(["--quick"])
    assert {case.vocab for case in command.cases(quick, "head", ("vocab",))} == {32_000}
    assert {case.vocab for case in command.cases(quick, "update", ("vocab",))} == {151_936}
    with pytest.raises(SystemExit):
        command.arguments(["--repeat", "0"])


def test_targets_take_the_worst_row() -> None:
    def row(method: str, tokens: int, ratio: float, extra: int) -> Row:
        facts = {"logits_bytes": 100 * MIB}
        return Row("update", method, {"tokens": tokens}, update.BOTH, None, ratio, "vanilla", extra, None, facts)

    judged = {
        target.name: target
        for target in targets.judge(
            [
                row("vanilla", 1, 1.0, 5 * MIB),
                row("vanilla", 2, 1.0, 5 * MIB),
                row("anchored, reused", 1, 0.7, 3 * MIB),
                row("anchored, reused", 2, 1.5, 8 * MIB),
                row("union, reused", 2, 1.1, 8 * MIB),
            ]
        )
    }
    time = judged["update, anchored: time over vanilla's"]
    assert (time.measured, time.verdict, time.share_met, time.case) == (1.5, "missed", 0.5, "tokens 2")
    memory = judged["update, anchored: peak memory above vanilla's, MiB"]
    assert (memory.measured, memory.verdict) == (3.0, "missed")
    assert judged["update, union: time over vanilla's"].verdict == "met"
    assert judged["step size: mean evaluations"].verdict == "not measured"


def test_the_two_merges_still_run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--ranks", "2", "--tokens", "5", "--vocab", "100", "--k", "4", "--repeat", "1"]
    monkeypatch.setattr("sys.argv", ["shard_merge", *given])
    shard_merge.main()
    assert capfd.readouterr().out.splitlines()[-1].split()[:3] == ["2", "5", "4"]
