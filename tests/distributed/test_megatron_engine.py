"""TROLL on verl's real Megatron engine matches FSDP, however the model and its tokens are split over ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from tests.distributed import batches, fsdp_scenarios, megatron_scenarios, megatron_stock
from tests.distributed.fsdp_scenarios import Setup
from tests.distributed.launch import run_ranks
from tests.distributed.megatron_stock import Layout
from tests.model_families import VOCAB
from tests.rounding import last_place

# With no dropped mass, rounding cannot move an id across the edge of the support.
UNION: dict[str, Any] = {"support": "union", "k": 20, "dropped_mass": 0.0}
ANCHORED: dict[str, Any] = {"support": "anchored", "k": 20, "dropped_mass": 0.0}
STEPS = 3
# Large enough that some tokens leave the region in the second step, small enough that some do not.
LR = {"union": 0.003, "anchored": 0.01}
# verl averages these over micro-batches, so they depend on how a mini-batch is cut.
CUT_DEPENDENT = {"actor/ppo_kl", "actor/pg_clipfrac"}


@pytest.fixture(scope="module")
def batch() -> TensorDict:
    return batches.make_batch().exclude("rollout_is_weights")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    return megatron_stock.write_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


def run(
    layouts: list[Layout], troll: dict[str, Any], batch: TensorDict, ranks: int, **actor: Any
) -> list[dict[str, Any]]:
    """Results of :func:`megatron_scenarios.train` by layout, with the old passes of all data-parallel ranks merged."""
    cases = [(layout, troll, actor) for layout in layouts]
    by_rank = run_ranks(megatron_scenarios.each, ranks, (cases, batch))
    results = []
    for same in zip(*by_rank, strict=True):
        assert all(result["history"] == same[0]["history"] for result in same)
        results.append({**same[0], "old": {i: row for result in same for i, row in result["old"].items()}})
    return results


def assert_same(result: dict[str, Any], reference: dict[str, Any], layout: object) -> None:
    """Support, metrics of every step, gradient norms and weights after the last step are the same."""
    assert sorted(result["old"]) == sorted(reference["old"])
    for sample, row in reference["old"].items():
        own = result["old"][sample]
        for name in ("troll_old_counts", "troll_old_ids"):
            assert torch.equal(own[name], row[name]), (layout, sample, name)
        for name in ("troll_old_log_probs", "log_probs"):
            torch.testing.assert_close(own[name], row[name], rtol=0, atol=2e-5, msg=f"{layout} {sample} {name}")
    for step, (row, expected) in enumerate(zip(result["history"], reference["history"], strict=True)):
        assert row.keys() == expected.keys()
        for name in expected.keys() - CUT_DEPENDENT:
            assert row[name] == pytest.approx(expected[name], rel=5e-4, abs=1e-5), (layout, step, name)
    assert len(reference["weights"]) > 10
    if not result["exports"]:
        return
    assert result["weights"].keys() == reference["weights"].keys()
    for name, weight in reference["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=2e-6, msg=f"{layout} {name}")


def test_no_rank_takes_a_step_whose_loss_is_not_finite(dense: str, batch: TensorDict) -> None:
    """The last data-parallel rank alone sees the broken token."""
    layout = Layout(dense, tensor=2)
    for value in (float("nan"), float("inf"), 1.0):
        broken = batches.with_broken_advantage(batch, value)
        for row in run_ranks(megatron_scenarios.broken_step, 4, (layout, UNION, broken)):
            if value == 1:
                assert row["moved"] > 0 and row["troll/nonfinite"] == 0 and row["grad_norm"] > 0
            else:
                assert row["moved"] == 0 and row["troll/nonfinite"] == 1 and row["grad_norm"] != row["grad_norm"]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        # verl then passes the model's own tensor.
        (1, {"temperature": 1.0}),
        (2, {"tensor": 2}),
        (2, {"context": 2}),
        (2, {"tensor": 2, "use_remove_padding": False}),
    ],
    ids=["one", "temperature 1", "tensor", "context", "padded"],
)
def test_old_pass_gives_verls_log_probs_and_entropy(
    dense: str, batch: TensorDict, ranks: int, layout: dict[str, Any]
) -> None:
    by_rank = run_ranks(megatron_scenarios.old_passes, ranks, (Layout(dense, **layout), UNION, batch))
    ours, stock = by_rank[0]
    assert stock[0].keys() == {"log_probs", "entropy"}
    for sample, mask in enumerate(batch["response_mask"].unbind()):
        window = slice(-len(mask) - 1, -1)
        for name in ("log_probs", "entropy"):
            # Log-probabilities reach -12; both the normaliser and the difference to it are rounded.
            own, expected = ours[sample][name][window], stock[sample][name][window]
            torch.testing.assert_close(own, expected, rtol=0, atol=2 * last_place(8.0), msg=f"{sample} {name}")
        counts = ours[sample]["troll_old_counts"].long()
        assert torch.equal(counts > 0, mask.bool())
        assert int(counts.sum()) == len(ours[sample]["troll_old_ids"]) == len(ours[sample]["troll_old_log_probs"])


DENSE: dict[int, list[dict[str, Any]]] = {
    1: [
        *megatron_stock.DENSE[1],
        {"micro_batch_size": 8},
        {"micro_batch_size": 1},
        {"use_dynamic_bsz": True, "max_token_len": 24},
        # Megatron-Bridge sets this under context parallelism: it scales the loss differently.
        {"transformer": {"calculate_per_token_loss": True}},
    ],
    2: [*megatron_stock.DENSE[2], {"tensor": 2, "use_distributed_optimizer": False}],
    4: [
        *megatron_stock.DENSE[4],
        {"tensor": 2, "context": 2, "use_remove_padding": False},
        {"pipeline": 2, "context": 2},
    ],
}


@pytest.mark.parametrize(("kind", "method"), [("qwen2", UNION), ("qwen3", ANCHORED)], ids=["union", "anchored"])
def test_every_dense_layout_agrees_with_one_rank_and_with_fsdp(
    tmp_path: Path, batch: TensorDict, kind: str, method: dict[str, Any]
) -> None:
    path = megatron_stock.write_model(tmp_path, kind)
    common: dict[str, Any] = {"use_kl_loss": True, "kl_loss_coef": 0.1, "entropy_coeff": 0.01}
    settings = {**common, "kl_loss_type": "k2"}
    (reference,) = run([Layout(path, lr=LR[method["support"]])], method, batch, 1, **settings)
    assert reference["engine"] == "TrollMegatronEngine"
    assert reference["history"][0]["troll/kl_before_max"] == 0
    assert 0.05 < reference["history"][-1]["troll/projected_share"] < 0.95
    assert 0 < reference["history"][-1]["troll/kl_after_max"] <= 0.05 * (1 + 1e-5)
    for ranks, layouts in DENSE.items():
        chosen = [Layout(path, **{"lr": LR[method["support"]], **layout}) for layout in layouts]
        for layout, result in zip(layouts, run(chosen, method, batch, ranks, **settings), strict=True):
            assert_same(result, reference, (ranks, layout))

    setup = Setup(path, method, micro_batch_size=8, lr=LR[method["support"]], adam_eps=1.0, **common)
    (fsdp,) = run_ranks(fsdp_scenarios.old_policies, 1, ([setup], batch))[0]
    for sample, row in reference["old"].items():
        for name in ("troll_old_counts", "troll_old_ids"):
            assert torch.equal(row[name], fsdp[name][sample]), (sample, name)
        torch.testing.assert_close(
            row["troll_old_log_probs"], fsdp["troll_old_log_probs"][sample], rtol=0, atol=2e-5, msg=str(sample)
        )
    steps = run_ranks(fsdp_scenarios.train_steps, 1, (setup, batch, STEPS))[0]
    for row, expected in zip(reference["history"], steps, strict=True):
        for name in expected.keys() - CUT_DEPENDENT:
            assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


EXPERTS: dict[int, list[dict[str, Any]]] = {
    2: [{"expert": 2}, {"tensor": 2}, {"tensor": 2, "expert": 2, "expert_tensor": 1}],
    4: [{"tensor": 2, "expert": 2, "expert_tensor": 1}, {"pipeline": 2, "expert": 2}],
}


def test_every_expert_layout_agrees_with_one_rank_and_with_fsdp(tmp_path: Path, batch: TensorDict) -> None:
    path = megatron_stock.write_model(tmp_path, "qwen3_moe")
    (reference,) = run([Layout(path, lr=LR["anchored"])], ANCHORED, batch, 1)
    for ranks, layouts in EXPERTS.items():
        chosen = [Layout(path, **{"lr": LR["anchored"], **layout}) for layout in layouts]
        for layout, result in zip(layouts, run(chosen, ANCHORED, batch, ranks), strict=True):
            assert_same(result, reference, (ranks, layout))
    setup = Setup(path, ANCHORED, micro_batch_size=8, lr=LR["anchored"], adam_eps=1.0)
    steps = run_ranks(fsdp_scenarios.train_steps, 1, (setup, batch, STEPS))[0]
    for row, expected in zip(reference["history"], steps, strict=True):
        for name in expected.keys() - CUT_DEPENDENT:
            assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def test_router_replay_carries_the_routes_beside_the_support(tmp_path: Path, batch: TensorDict) -> None:
    """R2 replays in the update what the old pass recorded; R3 replays in both what came with the batch."""
    path = megatron_stock.write_model(tmp_path, "qwen3_moe")
    recording = Layout(path, lr=LR["anchored"], router_replay="R2")
    (reference,) = run([recording], ANCHORED, batch, 1)
    routes = torch.nested.as_nested_tensor(
        [reference["old"][i]["routed_experts"] for i in range(len(batch))], layout=torch.jagged
    )
    assert routes.shape[2:] == (4, 2), "layers, experts of a token"
    assert reference["history"][0]["troll/kl_before_max"] == 0
    assert reference["history"][-1]["troll/projected_share"] > 0.05
    (native,) = run([replace(recording, router_replay="disabled")], ANCHORED, batch, 1)
    assert native["history"][-1]["grad_norm"] != pytest.approx(reference["history"][-1]["grad_norm"], rel=1e-3)

    given = batch.clone()
    given["routed_experts"] = routes
    layouts: list[dict[str, Any]] = [{"expert": 2}, {"tensor": 2, "expert": 2, "expert_tensor": 1}]
    for layout in layouts:
        (recorded,) = run([replace(recording, **layout)], ANCHORED, batch, 2)
        assert_same(recorded, reference, layout)
        (replayed,) = run([replace(recording, router_replay="R3", **layout)], ANCHORED, given, 2)
        assert_same(replayed, reference, layout)


@pytest.mark.parametrize("method", [UNION, ANCHORED], ids=["union", "anchored"])
def test_padded_vocabulary_counts_for_nothing(dense: str, batch: TensorDict, method: dict[str, Any]) -> None:
    """Two or more columns are padding: log-probs are those of the model without them."""
    layouts = [
        Layout(dense, lr=LR[method["support"]]),
        Layout(dense, lr=LR[method["support"]], tensor=2),
        Layout(dense, lr=LR[method["support"]], tensor=4),
    ]
    by_ranks = {}
    for layout in layouts:
        by_ranks[layout.tensor] = run_ranks(
            megatron_scenarios.train_with_padding, layout.tensor, (layout, method, batch)
        )[0]
    expected = megatron_stock.transformers_log_probs(dense, batch)
    for tensor, result in by_ranks.items():
        for sample, row in result["old"].items():
            length = len(batch["responses"].unbind()[sample])
            own = row["log_probs"][-length - 1 : -1]
            torch.testing.assert_close(own, expected[sample][len(expected[sample]) - length :], rtol=0, atol=2e-5)
            assert (row["troll_old_ids"] < VOCAB).all()
        assert_same(result, by_ranks[1], tensor)
        assert result["padding_moved"] == 0
