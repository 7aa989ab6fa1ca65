"""Old pass and update on a few logits, against dense float64 loops, without engine or model."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from tests import oracle
from tests.distributed.batches import VOCAB, as_v0, make_batch, with_old_policy
from tests.distributed.launch import run_ranks
from tests.plugin.test_metrics import SHARES, direct_ages
from verl_troll.core.lm_head import LinearHead
from verl_troll.core.vocab import VocabShard
from verl_troll.plugin import carry
from verl_troll.plugin.layout import TokenLayout
from verl_troll.plugin.passes import OldPolicyPass, UpdatePass
from verl_troll.plugin.settings import HostSettings, TrollConfig

aten = torch.ops.aten
DOUBLE = torch.float64
BOUND = 0.05
ALPHA = 0.7
K, DROPPED_MASS = 6, 1e-3
SETTINGS = TrollConfig(kl_bound=BOUND, alpha=ALPHA, k=K, dropped_mass=DROPPED_MASS)
by_layout = pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
by_rule = pytest.mark.parametrize("rule", ["union", "anchored"])


@dataclass
class Owner:
    """Stands in for an engine with a vocabulary of ``columns`` ids."""

    layout: TokenLayout
    columns: int = VOCAB

    def token_layout(self, shape: tuple[int, int], data: TensorDict, data_format: str) -> TokenLayout:
        assert shape == self.layout.shape
        return self.layout

    def vocab_shard(self, columns: int) -> VocabShard:
        assert columns == self.columns
        return VocabShard.whole(columns)


def batch_of() -> TensorDict:
    """Eight samples as a verl micro-batch, with the fields that its workers add."""
    batch = tu.index_select_tensor_dict(make_batch().exclude("ref_log_prob"), list(range(8)))
    tokens = int(batch["response_mask"].values().sum())
    tu.assign_non_tensor(batch, dp_size=1, batch_num_tokens=tokens, global_batch_size=8)
    return batch


def logits_of(batch: TensorDict) -> tuple[Tensor, Tensor]:
    """``[N, V]`` of the old and the new policy; some tokens leave the region, some do not."""
    tokens = batch["input_ids"].values().shape[0]
    generator = torch.Generator().manual_seed(3)
    # Neighbours in rank lie far apart, so rounding changes no selection.
    old = 0.35 * torch.rand(tokens, VOCAB, generator=generator).argsort(-1).to(DOUBLE)
    far = torch.rand(tokens, 1, generator=generator) < 0.5
    return old, old + torch.where(far, 1.0, 0.05) * torch.randn(tokens, VOCAB, generator=generator, dtype=DOUBLE)


def layout_of(batch: TensorDict, padded: bool) -> TokenLayout:
    offsets = batch["input_ids"].offsets().tolist()
    if not padded:
        return TokenLayout(torch.arange(offsets[-1]), (1, offsets[-1]), None)
    lengths = [stop - start for start, stop in itertools.pairwise(offsets)]
    # One column more than the longest sequence has.
    width = max(lengths) + 1
    place = [row * width + column for row, length in enumerate(lengths) for column in range(length)]
    return TokenLayout(torch.tensor(place), (len(lengths), width), None)


def show(packed: Tensor, layout: TokenLayout) -> Tensor:
    """``[b, s, V]``: the packed logits in the layout, poison in the padding."""
    flat = packed.new_full((layout.shape[0] * layout.shape[1], packed.shape[-1]), 77.0)
    return flat.index_copy(0, layout.row_of, packed).view(*layout.shape, -1)


def stored(tensors: dict[str, Tensor], layout: TokenLayout, batch: TensorDict) -> dict[str, Tensor]:
    """Per-token tensors ``[b, s]`` as verl passes them to the loss."""
    offsets = batch["input_ids"].offsets()
    return {
        name: torch.nested.nested_tensor_from_jagged(values.flatten(0, 1)[layout.row_of], offsets)
        for name, values in tensors.items()
    }


def of_responses(packed: Tensor, batch: TensorDict) -> list[Tensor]:
    """Values at the positions that predict response tokens, by sample."""
    offsets = batch["input_ids"].offsets().tolist()
    lengths = batch["responses"].offsets().diff().tolist()
    return [packed[stop - length - 1 : stop - 1] for stop, length in zip(offsets[1:], lengths, strict=True)]


def old_pass(
    batch: TensorDict, logits: Tensor, layout: TokenLayout, settings: TrollConfig = SETTINGS
) -> dict[str, Tensor]:
    """Nested model outputs of the old pass, by name."""
    reader = OldPolicyPass(settings, Owner(layout), entropy=True)
    output = stored(reader(data=batch, student_logits=show(logits, layout)), layout, batch)
    loss, metrics = reader(model_output=output, data=batch)
    assert (loss.item(), metrics) == (1, {})
    return output


def with_versions(batch: TensorDict, trained: int = 9) -> TensorDict:
    """A copy with versions of the weights that sampled, among them two in one response; masked tokens have others."""
    batch = batch.copy()
    mask = batch["response_mask"]
    versions = trained - torch.arange(mask.values().shape[0], dtype=torch.int32) % 5
    versions[~mask.values().bool()] = -1
    batch[carry.VERSIONS] = torch.nested.nested_tensor_from_jagged(versions, mask.offsets())
    tu.assign_non_tensor(batch, **{carry.TRAINED_VERSION: trained})
    return batch


def actor() -> ActorConfig:
    loss = PolicyLossConfig(loss_mode="troll")
    return ActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, policy_loss=loss)


def update(
    batch: TensorDict, logits: Tensor, layout: TokenLayout, settings: TrollConfig = SETTINGS
) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
    """Loss, metrics and per-token tensors of the update, through verl's own loss function."""
    writer = UpdatePass(settings, Owner(layout), functools.partial(ppo_loss, config=actor()), entropy=False)
    output = stored(writer(data=batch, student_logits=show(logits, layout)), layout, batch)
    seen = dict(output)
    loss, metrics = writer(model_output=output, data=batch)
    return loss, {name: metric.aggregate() for name, metric in metrics.items()}, seen


# --- the old pass -----------------------------------------------------------------------------------------------------


@by_layout
def test_log_probs_and_entropy_are_those_of_the_dense_softmax_at_every_response_token(padded: bool) -> None:
    batch = batch_of()
    logits, _ = logits_of(batch)
    output = old_pass(batch, logits, layout_of(batch, padded))
    dense = logits.log_softmax(-1)
    # Masked tokens too, because verl logs both.
    for name, reference in (
        ("log_probs", [x.gather(-1, ids[:, None])[:, 0] for x, ids in pairs(dense, batch)]),
        ("entropy", [-(x.exp() * x).sum(-1) for x, _ in pairs(dense, batch)]),
    ):
        values = of_responses(output[name].values(), batch)
        for own, expected in zip(values, reference, strict=True):
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)
        assert int((output[name].values() != 0).sum()) == batch["responses"].values().shape[0]


def pairs(packed: Tensor, batch: TensorDict) -> list[tuple[Tensor, Tensor]]:
    return list(zip(of_responses(packed, batch), batch["responses"].unbind(), strict=True))


@by_layout
def test_the_support_is_that_of_the_loops_for_tokens_that_take_part(padded: bool) -> None:
    batch = batch_of()
    logits, _ = logits_of(batch)
    output = old_pass(batch, logits, layout_of(batch, padded))
    dense = logits.log_softmax(-1).float()
    supports, counts = output[carry.SUPPORT].unbind(), output[carry.COUNTS].unbind()
    sizes = set()
    for sample, (rows, sampled) in enumerate(pairs(logits, batch)):
        mask = batch["response_mask"].unbind()[sample].bool().tolist()
        kept = [
            oracle.keep(row, int(o), k=K, dropped_mass=DROPPED_MASS, vocab_size=VOCAB).ids if live else []
            for row, o, live in zip(rows, sampled, mask, strict=True)
        ]
        ids, log_probs = carry.unpack_row(supports[sample])
        assert counts[sample].tolist() == [len(x) for x in kept]
        assert ids.tolist() == [i for x in kept for i in x]
        (own,) = (x for j, (x, _) in enumerate(pairs(dense, batch)) if j == sample)
        expected = [own[t, i] for t, x in enumerate(kept) for i in x]
        # Passed through float32.
        torch.testing.assert_close(log_probs, torch.stack(expected) if expected else own[:0, 0], rtol=2e-7, atol=0)
        sizes |= set(counts[sample].tolist())
    assert {0, K + 1} < sizes


def test_what_is_carried_is_to_the_bit_what_was_read() -> None:
    batch = batch_of()
    logits = logits_of(batch)[0].float()
    packed, padded = (old_pass(batch, logits, layout_of(batch, value)) for value in (False, True))
    for name in (carry.SUPPORT, carry.COUNTS):
        assert torch.equal(packed[name].values(), padded[name].values())
    batch.update({name: packed[name] for name in (carry.SUPPORT, carry.COUNTS)})
    mask = batch["response_mask"].values().bool()
    policy = carry.unpack(batch, carry.response_tokens(batch), k=K, vocab_size=VOCAB).policy
    carried = policy.log_probs.gather(-1, policy.sampled[:, None])[:, 0]
    read = torch.cat(of_responses(packed["log_probs"].values(), batch))[mask]
    assert torch.equal(carried.view(torch.int32), read.view(torch.int32))


# --- the update -------------------------------------------------------------------------------------------------------


@by_rule
@by_layout
def test_the_ratio_of_an_unchanged_policy_is_exactly_one(rule: str, padded: bool) -> None:
    batch, settings = batch_of(), replace(SETTINGS, support=rule)
    batch = batch.exclude("rollout_is_weights")
    logits = logits_of(batch)[0].float()
    layout = layout_of(batch, padded)
    batch = with_old_policy(batch, old_pass(batch, logits, layout, settings))
    _, metrics, seen = update(batch, logits, layout, settings)
    assert bool((seen["troll_log_ratio"].values() == 0).all())
    assert metrics["troll/kl_before_max"] == metrics["troll/projected_share"] == metrics["troll/regression_loss"] == 0
    assert metrics["troll/step_size"] == pytest.approx(1, rel=1e-6)
    assert metrics["actor/ppo_kl"] == 0
    mask = batch["response_mask"].values().bool()
    expected = -batch["advantages"].values()[mask].mean().item()
    assert metrics["actor/pg_loss"] == pytest.approx(expected, rel=1e-6)


class HostWaits(TorchDispatchMode):
    """Counts operations after which the host of an accelerator waits for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.equal)
        return func(*args, **(kwargs or {}))


@by_rule
def test_the_loss_waits_for_an_accelerator_only_in_verls_own_function(rule: str) -> None:
    """But for one transfer of all metrics, which is not such an operation. verl's own waits grow with the samples."""
    batch, settings = batch_of(), replace(SETTINGS, support=rule)
    old, new = logits_of(batch)
    layout = layout_of(batch, padded=False)
    batch = with_old_policy(batch, old_pass(batch, old, layout, settings))
    waits = HostWaits()
    verls: list[int] = []

    def watched(**arguments: Any) -> Any:
        before = waits.count
        result = ppo_loss(config=actor(), **arguments)
        verls.append(waits.count - before)
        return result

    writer = UpdatePass(settings, Owner(layout), watched, entropy=False)
    output = stored(writer(data=batch, student_logits=show(new, layout)), layout, batch)
    with waits:
        writer(model_output=output, data=batch)
    assert verls[0] > len(batch)
    assert waits.count == verls[0]


def oracle_batch(batch: TensorDict, new: Tensor, old: Tensor) -> oracle.Batch:
    """The response tokens, padded."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    names = ("responses", "advantages", "response_mask", "rollout_is_weights")
    sampled, advantages, mask, weights = (pad(list(batch[name].unbind())) for name in names)
    return oracle.Batch(
        pad(of_responses(new, batch)), pad(of_responses(old, batch)), sampled, advantages, mask.bool(), weights
    )


@by_rule
@by_layout
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_loss_and_gradient_are_those_of_the_objective(rule: str, padded: bool, ratio: str) -> None:
    batch = batch_of()
    settings = replace(SETTINGS, support=rule, importance_ratio=ratio)
    old, new = logits_of(batch)
    layout = layout_of(batch, padded)
    batch = with_old_policy(batch, old_pass(batch, old, layout, settings))
    ours, theirs = (new.clone().requires_grad_() for _ in range(2))
    loss, metrics, _ = update(batch, ours, layout, settings)
    expected = oracle.loss(
        oracle_batch(batch, theirs, old), oracle.Settings(rule, K, DROPPED_MASS, VOCAB, BOUND, ALPHA, ratio)
    )
    # The old policy is carried in float32.
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    (gradient,), (reference,) = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs)
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-7)
    assert float(reference.abs().max()) > 1e-3
    assert metrics["actor/pg_loss"] + metrics["troll/regression_loss"] == pytest.approx(loss.item(), rel=1e-12)


@by_rule
def test_the_padded_columns_of_v0_trainers_change_nothing(rule: str) -> None:
    batch, settings = batch_of(), replace(SETTINGS, support=rule)
    old, new = logits_of(batch)
    layout = layout_of(batch, False)
    output = old_pass(batch, old, layout, settings)
    for name, value in old_pass(as_v0(batch), old, layout, settings).items():
        assert torch.equal(value.values(), output[name].values())
    found = []
    whole = with_old_policy(batch, output)
    for data in (whole, as_v0(whole)):
        tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=batch["batch_num_tokens"], global_batch_size=8)
        logits = new.clone().requires_grad_()
        loss, metrics, _ = update(data, logits, layout, settings)
        found.append((loss, metrics, torch.autograd.grad(loss, logits)[0]))
    (loss, metrics, gradient), (v0_loss, v0_metrics, v0_gradient) = found
    torch.testing.assert_close(v0_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(v0_gradient, gradient, rtol=1e-12, atol=1e-15)
    assert v0_metrics == pytest.approx(metrics, rel=1e-12)


@by_rule
def test_metrics_are_those_of_the_tokens_that_take_part(rule: str) -> None:
    batch, settings = batch_of(), replace(SETTINGS, support=rule)
    old, new = logits_of(batch)
    layout = layout_of(batch, False)
    output = old_pass(batch, old, layout, settings)
    _, metrics, _ = update(with_old_policy(batch, output), new, layout, settings)
    found: dict[str, list[float]] = {name: [] for name in ("before", "after", "regression", "size", "shift")}
    for sample, mask in enumerate(batch["response_mask"].unbind()):
        sides = [of_responses(x, batch)[sample] for x in (new, old)]
        for t in mask.nonzero().flatten().tolist():
            sampled = int(batch["responses"].unbind()[sample][t])
            limits = {"k": K, "vocab_size": VOCAB}
            row = oracle.outcomes(rule, sides[0][t], sides[1][t], sampled, dropped_mass=DROPPED_MASS, **limits)
            log_p, log_q = row.log_p[None], row.log_q[None]
            log_pi = oracle.project(log_p, log_q, BOUND)
            found["before"].append(oracle.kl(log_p, log_q).item())
            found["after"].append(oracle.kl(log_pi, log_q).item())
            found["regression"].append(oracle.kl(log_p, log_pi).item())
            found["size"].append(len(row.old.ids))
            log_probs = [x[t].log_softmax(-1)[sampled].item() for x in sides]
            found["shift"].append(log_probs[1] - log_probs[0])
    count = len(found["before"])
    outside = sum(x > BOUND for x in found["before"]) / count
    assert 0.1 < outside < 0.9
    expected = {
        "troll/kl_before": sum(found["before"]) / count,
        "troll/kl_before_max": max(found["before"]),
        "troll/kl_after": sum(found["after"]) / count,
        "troll/kl_after_max": max(found["after"]),
        "troll/projected_share": outside,
        "troll/regression_kl": sum(found["regression"]) / count,
        "troll/regression_loss": ALPHA * sum(found["regression"]) / count,
        "troll/support_size": sum(found["size"]) / count,
        "troll/unconverged": 0,
        "actor/ppo_kl": sum(found["shift"]) / count,
        "actor/pg_clipfrac": outside,
        "actor/pg_clipfrac_lower": 0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-9)


AGES = {f"troll/{name}" for name in ("age", "age_max", *(f"age_{share}_share" for share in SHARES))}


@by_layout
def test_ages_are_those_of_the_tokens_that_take_part(padded: bool) -> None:
    batch = batch_of()
    old, new = logits_of(batch)
    layout = layout_of(batch, padded)
    batch = with_old_policy(batch, old_pass(batch, old, layout))
    _, plain, _ = update(batch, new, layout)
    _, seen, _ = update(with_versions(batch), new, layout)
    places = batch["response_mask"].values().nonzero().flatten().tolist()
    ages = torch.tensor([place % 5 for place in places], dtype=torch.float32)
    assert {name: seen.pop(name) for name in AGES} == pytest.approx(direct_ages(ages), rel=1e-6)
    assert seen == plain


@pytest.mark.parametrize("name", [carry.VERSIONS, carry.TRAINED_VERSION])
def test_without_either_version_there_are_no_ages(name: str) -> None:
    batch = batch_of()
    old, new = logits_of(batch)
    layout = layout_of(batch, False)
    batch = with_versions(with_old_policy(batch, old_pass(batch, old, layout)))
    _, seen, _ = update(batch.exclude(name), new, layout)
    assert not AGES & set(seen)


@by_rule
@pytest.mark.parametrize("log_q", [-30.0, -128.0, -1e4])
@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_a_token_that_the_old_policy_all_but_excludes_has_a_limited_ratio(
    rule: str, log_q: float, advantage: float
) -> None:
    """It is inside the region all the same."""
    batch, settings = batch_of(), replace(SETTINGS, support=rule, dropped_mass=0.0)
    layout = layout_of(batch, False)
    place = int(batch["input_ids"].offsets()[1]) - 2
    sampled = int(batch["responses"].unbind()[0][-1])
    old = torch.zeros(batch["input_ids"].values().shape[0], VOCAB, dtype=DOUBLE)
    old[:, :3] = 12.0
    new = old.clone()
    old[place, sampled] = log_q + old[place].logsumexp(-1)
    new[place, sampled] = -9 + new[place].logsumexp(-1)
    batch["advantages"].values()[batch["responses"].offsets()[1] - 1] = advantage
    leaf = new.requires_grad_()
    loss, metrics, _ = update(with_old_policy(batch, old_pass(batch, old, layout, settings)), leaf, layout, settings)
    assert 0 < metrics["troll/kl_before_max"] < BOUND
    assert (metrics["troll/ratio_limited"], metrics["troll/nonfinite"]) == (1, 0)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert bool(gradient.isfinite().all()) and bool((gradient[place] == 0).all())
    assert abs(loss.item()) < 2e4


def test_the_update_leaves_verls_log_probs_and_entropy_unprojected() -> None:
    batch = batch_of()
    old, new = logits_of(batch)
    layout = layout_of(batch, False)
    batch = with_old_policy(batch, old_pass(batch, old, layout))
    shown = {}

    def inner(model_output: dict[str, Tensor], data: TensorDict, dp_group: Any) -> Any:
        shown.update(model_output)
        return ppo_loss(actor(), model_output, data, dp_group)

    writer = UpdatePass(SETTINGS, Owner(layout), inner, entropy=True)
    writer(model_output=stored(writer(data=batch, student_logits=new[None]), layout, batch), data=batch)
    assert set(shown) == {"log_probs", "entropy"}
    mask = batch["response_mask"].values().bool()
    dense = torch.cat(of_responses(new.log_softmax(-1), batch))[mask]
    ids = batch["responses"].values()[mask]
    for name, expected in (
        ("log_probs", dense.gather(-1, ids[:, None])[:, 0]),
        ("entropy", -(dense.exp() * dense).sum(-1)),
    ):
        own = torch.cat(of_responses(shown[name].values(), batch))
        torch.testing.assert_close(own[mask], expected, rtol=0, atol=1e-12)
        assert not bool(own[~mask].any())


# --- tokens split over ranks ------------------------------------------------------------------------------------------


def shared(old: Tensor, new: Tensor) -> tuple[dict[str, Tensor], dict[str, float], Tensor]:
    """Old pass and update of a rank with every other token; sums over ranks what verl gathers."""
    batch, rank = batch_of(), dist.get_rank()
    total = old.shape[0]
    own = torch.arange(total) % 2 == rank
    # Each rank's logits end with a row of padding.
    rows = int(own.sum()) + 1
    place = torch.where(own, torch.arange(total) // 2, -1)
    layout = TokenLayout(place, (1, rows), dist.group.WORLD)

    def shown(logits: Tensor) -> Tensor:
        return torch.cat([logits[own], torch.full((1, VOCAB), 77.0, dtype=DOUBLE)])[None]

    def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, values in tensors.items():
            whole = torch.zeros(total, dtype=values.dtype)
            whole[own] = values[0, :-1].detach()
            dist.all_reduce(whole)
            result[name] = torch.nested.nested_tensor_from_jagged(whole, batch["input_ids"].offsets())
        return result

    reader = OldPolicyPass(SETTINGS, Owner(layout), entropy=True)
    output = gathered(reader(data=batch, student_logits=shown(old)))
    reader(model_output=output, data=batch)
    batch = with_versions(with_old_policy(batch, output))
    writer = UpdatePass(SETTINGS, Owner(layout), functools.partial(ppo_loss, config=actor()), entropy=False)
    loss, metrics = writer(model_output=gathered(writer(data=batch, student_logits=shown(new))), data=batch)
    fields = {name: value.values() for name, value in output.items()}
    return fields, {name: metric.aggregate() for name, metric in metrics.items()}, loss


def test_ranks_that_share_the_tokens_find_what_one_rank_finds() -> None:
    batch = batch_of()
    old, new = logits_of(batch)
    layout = layout_of(batch, False)
    output = old_pass(batch, old, layout)
    loss, metrics, _ = update(with_versions(with_old_policy(batch, output)), new, layout)
    assert set(metrics) > AGES
    for fields, seen, own_loss in run_ranks(shared, 2, (old, new)):
        assert set(fields) == set(output)
        for name, values in fields.items():
            assert torch.equal(values, output[name].values()), name
        assert seen == pytest.approx(metrics, rel=1e-12)
        torch.testing.assert_close(own_loss, loss.detach(), rtol=1e-12, atol=0)


# --- with fused kernels -----------------------------------------------------------------------------------------------


def test_a_head_in_the_place_of_logits_gives_the_same() -> None:
    """Its tensors are returned stacked, in place of verl's log-probs."""
    batch = batch_of()
    layout = layout_of(batch, False)
    generator = torch.Generator().manual_seed(5)
    total = layout.shape[1]
    hidden, weight = (torch.randn(n, 9, generator=generator, dtype=DOUBLE) for n in (total, VOCAB))
    moved = hidden + 0.2 * torch.randn(total, 9, generator=generator, dtype=DOUBLE)
    reader = OldPolicyPass(SETTINGS, Owner(layout), entropy=True)
    writer = UpdatePass(SETTINGS, Owner(layout), functools.partial(ppo_loss, config=actor()), entropy=True)

    def run(one: OldPolicyPass | UpdatePass, states: Tensor) -> tuple[Any, dict[str, Tensor]]:
        stacked = one.read_head(LinearHead(states, weight), layout.shape, batch, "thd")
        output = {"log_probs": torch.nested.nested_tensor_from_jagged(stacked[0], batch["input_ids"].offsets())}
        return one(model_output=output, data=batch), output

    _, output = run(reader, hidden)
    expected = old_pass(batch, hidden @ weight.T, layout)
    assert set(output) == set(expected)
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(output[name].values(), expected[name].values(), rtol=0, atol=1e-12)
    assert torch.equal(output[carry.COUNTS].values(), expected[carry.COUNTS].values())
    batch = with_old_policy(batch, expected)
    (loss, _), _ = run(writer, moved)
    torch.testing.assert_close(loss, update(batch, moved @ weight.T, layout)[0], rtol=0, atol=1e-9)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_an_engine_that_never_shows_its_logits_is_refused() -> None:
    """In either pass, also after a micro-batch in which it did show them."""
    batch = batch_of()
    old, new = logits_of(batch)
    layout = layout_of(batch, False)
    reader = OldPolicyPass(SETTINGS, Owner(layout), entropy=False)
    writer = UpdatePass(SETTINGS, Owner(layout), functools.partial(ppo_loss, config=actor()), entropy=False)
    for one, logits in ((reader, old), (writer, new)):
        with pytest.raises(RuntimeError, match="never showed its logits"):
            one(model_output={}, data=batch)
        output = stored(one(data=batch, student_logits=logits[None]), layout, batch)
        one(model_output=output, data=batch)
        with pytest.raises(RuntimeError, match="never showed its logits"):
            one(model_output=output, data=batch)
        batch = with_old_policy(batch, output) if one is reader else batch


def test_a_model_that_never_shows_its_hidden_states_is_refused_as_such() -> None:
    batch = batch_of()
    tu.assign_non_tensor(batch, use_fused_kernels=True)
    reader = OldPolicyPass(SETTINGS, Owner(layout_of(batch, False)), entropy=False)
    with pytest.raises(RuntimeError, match=r"hidden states.*\.use_fused_kernels=False"):
        reader(model_output={}, data=batch)


def test_the_update_is_told_what_supplies_the_support() -> None:
    batch = batch_of()
    _, new = logits_of(batch)
    settings = replace(SETTINGS, host=HostSettings(bypass_mode=True))
    for given, word in ((SETTINGS, "old-log-prob pass"), (settings, "rollout engine")):
        with pytest.raises(carry.MissingSupportError, match=word):
            update(batch, new, layout_of(batch, False), given)


def test_a_loss_that_leaves_the_projection_unused_is_refused() -> None:
    batch = batch_of()
    old, new = logits_of(batch)
    layout = layout_of(batch, False)
    batch = with_old_policy(batch, old_pass(batch, old, layout))
    vanilla = ActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, clip_ratio=0.2)
    writer = UpdatePass(SETTINGS, Owner(layout), functools.partial(ppo_loss, config=vanilla), entropy=False)
    output = stored(writer(data=batch, student_logits=new[None]), layout, batch)
    with pytest.raises(RuntimeError, match=r"policy_loss\.loss_mode must be 'troll'"):
        writer(model_output=output, data=batch)


def test_missing_arguments_are_named() -> None:
    batch = batch_of()
    reader = OldPolicyPass(SETTINGS, Owner(layout_of(batch, False)), entropy=False)
    with pytest.raises(TypeError, match="data is missing"):
        reader(model_output={})
    with pytest.raises(TypeError, match="model_output is missing"):
        reader(data=batch)


@pytest.mark.parametrize("columns", [2**20, 2**20 + 1])
def test_a_vocabulary_whose_ids_do_not_fit_is_refused(columns: int) -> None:
    batch = make_batch(samples=1)
    layout = layout_of(batch, False)
    reader = OldPolicyPass(TrollConfig(k=2), Owner(layout, columns), entropy=False)
    logits = torch.zeros(1, 1, 1).expand(*layout.shape, columns)
    if columns > 2**20:
        with pytest.raises(ValueError, match=r"the model has 1048577 ids; .* at most 1048576"):
            reader(data=batch, student_logits=logits)
    else:
        assert "log_probs" in reader(data=batch, student_logits=logits)
