"""Checks run by ranks that share one vocabulary: each function against a single process and dense float64 loops.

Every rank draws the same whole logits, keeps its own columns and runs the functions on them. Checks only record
failures, so a rank on which one fails still takes part in the next collectives.

Shapes: N packed tokens, R rows of interest, V real columns, P ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import oracle
from verl_troll.core import lm_head as head_module
from verl_troll.core.comparison import RULES, Comparison, compare
from verl_troll.core.kernels import logits_torch as logits_module
from verl_troll.core.lm_head import LinearHead
from verl_troll.core.logits import Normaliser
from verl_troll.core.loss import TokenTerms, token_terms
from verl_troll.core.projection import STEP_SIZE_GRADIENTS
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits, VocabShard

INF = math.inf
BOUND = 0.05
BONUS = 0.2
# Written to every padding column: a softmax that read it would see nothing else.
POISON = 1e4
TOKENS = 13
ROWS = (11, 0, 5, 3, 8, 12, 2)
VOCAB = 100
LARGE_VOCAB = 151_936

# Columns on each rank, by number of ranks; columns beyond VOCAB are padding.
LAYOUTS: dict[str, dict[int, tuple[int, ...]]] = {
    "even": {1: (100,), 2: (50, 50), 3: (34, 34, 34), 4: (25, 25, 25, 25)},
    "padded": {1: (128,), 2: (64, 64), 3: (43, 43, 43), 4: (32, 32, 32, 32)},
    "uneven": {1: (100,), 2: (90, 10), 3: (10, 53, 37), 4: (10, 53, 1, 36)},
    "only-padding": {1: (107,), 2: (100, 9), 3: (72, 30, 5), 4: (33, 70, 4, 5)},
    "empty-first": {1: (100,), 2: (0, 100), 3: (0, 45, 55), 4: (0, 30, 0, 70)},
    "empty-last": {1: (100,), 2: (104, 0), 3: (30, 74, 0), 4: (30, 30, 44, 0)},
}
KINDS = ("normal", "integer", "equal", "offset", "holes", "blind")
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}
# (K, dropped mass): K above most shards' size, a mass that ends the selection first, K beyond the vocabulary.
SETTINGS = ((60, 0.0), (24, 0.013), (128, 1e-3))


def everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


class Notes:
    """One case's failed checks, and a digest of everything that must have the same bits on every rank."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        # Watching every operation costs a third of the time, so not all cases do it.
        self.counting = True
        self._digest = hashlib.sha256()

    def true(self, what: str, condition: Any) -> None:
        if not bool(condition):
            self.failures.append(what)

    def same(self, what: str, actual: object, expected: object) -> None:
        if isinstance(actual, Tensor) and isinstance(expected, Tensor):
            if actual.shape == expected.shape and actual.dtype == expected.dtype:
                wrong = (actual != expected).nonzero().tolist()
                if wrong:
                    at = tuple(wrong[0])
                    pair = f"{actual[at].item()} in place of {expected[at].item()}"
                    self.failures.append(f"{what}: {len(wrong)} of {actual.numel()} differ, first at {at}: {pair}")
                return
        elif actual == expected:
            return
        self.failures.append(f"{what}: got {actual}, expected {expected}")

    def close(self, what: str, actual: Tensor, expected: Tensor, *, atol: float) -> None:
        """Absolute tolerance; infinities and NaN must be at the same positions."""
        try:
            actual, expected = actual.detach().double(), expected.detach().double()
            torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)
        except AssertionError as error:
            self.failures.append(f"{what}: {error}")

    def agree(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            own = tensor.detach().flatten().clone(memory_format=torch.contiguous_format)
            self._digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            self._digest.update(own.view(torch.uint8).numpy().tobytes())

    def outcome(self) -> tuple[list[str], str]:
        return self.failures, self._digest.hexdigest()


class Traffic(TorchDispatchMode):
    """Collectives issued while it is active: name and number of bytes that this rank passes in."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[-1]
            payload = args[1] if name in ("_allgather_base_", "alltoall_base_") else args[0]
            tensors = payload if isinstance(payload, list | tuple) else [payload]
            self.sent.append((name, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Split:
    """How the columns of ``vocab`` ids, and the padding after them, are split over the ranks of ``group``."""

    sizes: tuple[int, ...]
    vocab: int = VOCAB
    group: Any = None

    @property
    def shard(self) -> VocabShard:
        group = self.group or dist.group.WORLD
        rank = dist.get_rank(group)
        start = sum(self.sizes[:rank])
        return VocabShard(start, start + self.sizes[rank], self.vocab, group)

    @property
    def judge(self) -> bool:
        """Whether this rank computes the references; one is enough, since all ranks have the same bits."""
        return dist.get_rank(self.group or dist.group.WORLD) == 0

    @property
    def starts(self) -> list[int]:
        return [sum(self.sizes[:rank]) for rank in range(len(self.sizes))]

    def padded(self, full: Tensor) -> Tensor:
        padding = full.new_full((full.shape[0], sum(self.sizes) - self.vocab), POISON)
        return torch.cat([full, padding], dim=-1)

    def local(self, full: Tensor) -> Tensor:
        """This rank's own columns, copied so that the others are not next to them in memory."""
        shard = self.shard
        return self.padded(full)[:, shard.start : shard.stop].clone()

    def assemble(self, local: Tensor) -> Tensor:
        """The columns of all ranks side by side, ``[N, C]``."""
        message = local.new_zeros(local.shape[0], max(self.sizes))
        message[:, : local.shape[1]] = local
        parts = [torch.empty_like(message) for _ in self.sizes]
        dist.all_gather(parts, message, group=self.group or dist.group.WORLD)
        return torch.cat([part[:, :size] for part, size in zip(parts, self.sizes, strict=True)], dim=-1)


# --- data -------------------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(kind: str, split: Split, tokens: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Old and new logits ``[N, V]``."""
    vocab = split.vocab
    old = normal(tokens, vocab, seed=seed, scale=2.0)
    move = normal(tokens, vocab, seed=seed + 1, scale=0.6)
    if kind == "integer":
        old, move = old.round().clamp(-3, 3), move.round()
    elif kind == "equal":
        old, move = torch.full_like(old, 0.5), torch.zeros_like(move)
    elif kind == "offset":
        old = old + 1e3
    elif kind == "holes":
        lost = normal(tokens, vocab, seed=seed + 2) > 0.5
        lost[:, normal(vocab, seed=seed + 3).argmax()] = False
        old = old.masked_fill(lost, -INF)
    elif kind == "blind":
        # All columns of one rank are impossible, another rank's in each token, as long as some column is left.
        for token in range(tokens):
            rank = token % len(split.sizes)
            start, stop = split.starts[rank], min(split.starts[rank] + split.sizes[rank], vocab)
            if stop - start < vocab:
                old[token, start:stop] = -INF
    return old.to(dtype), (old + move).to(dtype)


def sample(logits: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(logits.double().softmax(-1), 1, generator=generator).squeeze(-1)


def clear_of_the_edge(logits: Tensor, rows: Tensor, k: int, dropped_mass: float) -> Tensor:
    """The rows where rounding cannot decide whether one more id is kept."""
    return torch.tensor(
        [
            dropped_mass == 0
            or oracle.keep(logits[row], 0, k=k, dropped_mass=dropped_mass, vocab_size=logits.shape[-1]).edge_gap > 2e-6
            for row in rows.tolist()
        ],
        dtype=torch.bool,
    )


def ids_of_every_sort(split: Split, rows: int, seed: int) -> Tensor:
    """``[R, W]``: the first and last id of every shard, unused ids, a repeated id and random ones."""
    vocab = split.vocab
    edges = [min(i, vocab - 1) for start in split.starts for i in (start, max(start - 1, 0))]
    fixed = torch.tensor([*edges, 0, vocab - 1, -1, vocab // 2, vocab // 2, -1]).expand(rows, -1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-2, vocab, (rows, 9), generator=generator)
    return torch.cat([fixed, drawn], dim=-1)


# --- references -------------------------------------------------------------------------------------------------------


def dense_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids by falling value, then rising id, with float64 log-probabilities, from whole rows ``[R, V]``."""
    ids = torch.sort(-logits.double(), dim=-1, stable=True).indices[:, :k]
    return ids, logits.double().log_softmax(-1).gather(-1, ids)


def dense_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    log_probs = logits.double().log_softmax(-1).gather(-1, ids.clamp_min(0))
    return torch.where(ids >= 0, log_probs, -INF)


def dense_entropy(logits: Tensor) -> Tensor:
    log_probs = logits.double().log_softmax(-1)
    live = log_probs > -INF
    return -torch.where(live, log_probs.exp() * torch.where(live, log_probs, 0.0), 0.0).sum(-1)


def oracle_losses(
    rule: str, new: Tensor, old: Tensor, sampled: Tensor, advantages: Tensor, options: dict[str, Any], implicit: bool
) -> Tensor:
    """Loss of each row of ``[R, V]`` in float64, one token at a time, without the entropy."""
    losses = []
    for row in range(new.shape[0]):
        pair = oracle.outcomes(rule, new[row], old[row], int(sampled[row]), vocab_size=new.shape[-1], **options)
        log_pi = oracle.project(pair.log_p[None], pair.log_q[None], BOUND, implicit=implicit)[0]
        ratio = (log_pi[pair.place] - pair.log_q[pair.place]).exp()
        losses.append(ratio * float(advantages[row]) + oracle.kl(pair.log_p, log_pi.detach()))
    return torch.stack(losses)


def losses_of(terms: TokenTerms, advantages: Tensor, entropy: Tensor | None) -> Tensor:
    losses = terms.log_ratio.exp() * advantages.to(terms.log_ratio.dtype) + terms.regression_kl
    return losses if entropy is None else losses - BONUS * entropy


def tolerance(dtype: torch.dtype) -> float:
    """Absolute tolerance of a log-probability."""
    return 1e-12 if dtype == torch.float64 else 2e-6


def gradient_tolerance(dtype: torch.dtype) -> float:
    """Tolerance relative to the largest entry; half precisions round the result."""
    return {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]


def largest(values: Tensor, *, least: float) -> float:
    return max(least, float(values.detach().abs().max())) if values.numel() > 0 else least


def loss_tolerance(dtype: torch.dtype) -> float:
    return 1e-10 if dtype == torch.float64 else 4e-6


# --- what is sent -----------------------------------------------------------------------------------------------------


def sent_by_merge(
    shard: VocabShard, rows: int, k: int, dtype: torch.dtype, *, entropy: bool = False
) -> list[tuple[str, int]]:
    if shard.ranks == 1 or rows == 0:
        return []
    width = min(k, shard.vocab_size)
    number = 8 if dtype == torch.float64 else 4
    row = (width + 3 + entropy) * number + 4 * width
    # Every rank merges the same number of rows; the last ones may be padding.
    share = math.ceil(rows / shard.ranks)
    return [("alltoall_base_", share * shard.ranks * row), ("_allgather_base_", share * row)]


def sent_by_reduce(
    shard: VocabShard, rows: int, width: int, dtype: torch.dtype, *, entropy: bool = False
) -> list[tuple[str, int]]:
    if shard.ranks == 1 or rows == 0:
        return []
    return [("allreduce_", rows * (8 if dtype == torch.float64 else 4) * (width + (2 + entropy) * shard.ranks))]


@contextmanager
def sends(notes: Notes, what: str, expected: list[tuple[str, int]]) -> Iterator[None]:
    """Calls inside must issue exactly these collectives."""
    if not notes.counting:
        yield
        return
    with Traffic() as traffic:
        yield
    notes.same(f"{what}: traffic", traffic.sent, expected)


class Top(NamedTuple):
    ids: Tensor
    log_probs: Tensor
    sampled_log_probs: Tensor
    normaliser: Normaliser


def top_log_probs(logits: Tensor, rows: Tensor, sampled: Tensor, k: int, shard: VocabShard) -> Top:
    """The ids that have mass, without gradient, as :func:`verl_troll.core.support.select` takes them."""
    with torch.no_grad():
        top = VocabLogits.of(logits, rows, shard).top(k, sampled)
        ids = torch.where(top.log_probs > -INF, top.ids, -1)
        return Top(ids, top.log_probs, top.sampled_log_probs, top.normaliser)


# --- checks -----------------------------------------------------------------------------------------------------------


def check_top(notes: Notes, split: Split, logits: Tensor, rows: Tensor, sampled: Tensor, k: int) -> None:
    shard, dtype = split.shard, logits.dtype
    with sends(notes, "top", sent_by_merge(shard, rows.shape[0], k, dtype)):
        top = top_log_probs(split.local(logits).requires_grad_(), rows, sampled, k, shard)
    notes.agree(*top[:3], *top.normaliser[:2])
    if not split.judge:
        return
    ids, log_probs = dense_top(logits[rows], k)
    # Ids without mass are checked separately.
    live = log_probs > -INF
    notes.same("top: possible ids", top.ids[live], ids[live])
    atol = tolerance(dtype)
    notes.close("top: log-probs, dense", top.log_probs, log_probs, atol=atol)
    expected = dense_log_probs(logits[rows], sampled.unsqueeze(-1)).squeeze(-1)
    notes.close("top: sampled, dense", top.sampled_log_probs, expected, atol=atol)
    single = top_log_probs(logits, rows, sampled, k, VocabShard.whole(split.vocab))
    notes.same("top: possible ids, single", top.ids[live], single.ids[live])
    notes.close("top: log-probs, single", top.log_probs, single.log_probs, atol=atol)
    notes.close("top: sampled, single", top.sampled_log_probs, single.sampled_log_probs, atol=atol)
    notes.same("top: max", top.normaliser.max, single.normaliser.max)
    notes.same("top: dtype", top.log_probs.dtype, torch.promote_types(dtype, torch.float32))
    notes.true("top: no gradient", not top.log_probs.requires_grad and not top.sampled_log_probs.requires_grad)


def check_log_probs_at(notes: Notes, split: Split, logits: Tensor, rows: Tensor, ids: Tensor, seed: int) -> None:
    shard, dtype = split.shard, logits.dtype
    local = split.local(logits).requires_grad_()
    with sends(notes, "at", sent_by_reduce(shard, rows.shape[0], ids.shape[-1], dtype)):
        plain = VocabLogits.of(local, rows, shard).log_probs_at(ids)
    with sends(notes, "at, entropy", sent_by_reduce(shard, rows.shape[0], ids.shape[-1], dtype, entropy=True)):
        result, entropy = VocabLogits.of(local, rows, shard).log_probs_at(ids, entropy=True)
    notes.true("at: no entropy unless asked for", plain.entropy is None)
    notes.same("at: the entropy changes no log-prob", plain.log_probs.detach(), result.detach())
    if entropy is None:
        notes.true("at: entropy", False)
        return
    notes.agree(result, entropy)
    dense = logits.double().requires_grad_()
    reference, dense_entropies = dense_log_probs(dense[rows], ids), dense_entropy(dense[rows])
    # Negative ids get weights too, which must not reach any logit. Impossible ids have no gradient to compare.
    weight = normal(*ids.shape, seed=seed)
    weight = torch.where((reference.detach() > -INF) | (ids < 0), weight, 0.0)
    bonus = normal(rows.shape[0], seed=seed + 1)
    with sends(notes, "at, backward", []):
        (grad,) = torch.autograd.grad((result, entropy), local, (weight.to(result.dtype), bonus.to(entropy.dtype)))
    grad = split.assemble(grad)
    if not split.judge:
        return
    whole = logits.clone().requires_grad_()
    single, single_entropy = VocabLogits.of(whole, rows, VocabShard.whole(split.vocab)).log_probs_at(ids, entropy=True)
    notes.close("at: single", result, single, atol=tolerance(dtype))
    notes.close("at: entropy, dense", entropy, dense_entropies, atol=5 * tolerance(dtype))
    notes.close("at: dense", result, reference, atol=tolerance(dtype))
    notes.true("at: no id, no mass", bool((result[ids < 0] == -INF).all()))
    weights = (weight.to(single.dtype), bonus.to(single.dtype))
    assert single_entropy is not None
    (single_grad,) = torch.autograd.grad((single, single_entropy), whole, weights)
    weights = (torch.where(ids >= 0, weight, 0.0), bonus)
    (dense_grad,) = torch.autograd.grad((reference, dense_entropies), dense, weights)
    dense_grad = dense_grad.nan_to_num(0.0)
    # With a vocabulary of one id the gradient is rounding only, and that is relative to the weights.
    rtol = gradient_tolerance(dtype)
    check_gradient(notes, "at, single", split, grad, single_grad, rows, rtol=rtol, least=1.0)
    check_gradient(notes, "at, dense", split, grad, dense_grad, rows, rtol=rtol, least=1.0)


def check_gradient(
    notes: Notes, what: str, split: Split, grad: Tensor, expected: Tensor, rows: Tensor, *, rtol: float, least: float
) -> None:
    """Compare ``grad`` of all columns with ``expected [N, V]``, relative to its largest entry or ``least``."""
    notes.close(f"{what}: gradient", grad[:, : split.vocab], expected, atol=rtol * largest(expected, least=least))
    notes.true(f"{what}: gradient of padding", bool((grad[:, split.vocab :] == 0).all()))
    others = torch.ones(grad.shape[0], dtype=torch.bool)
    others[rows] = False
    notes.true(f"{what}: gradient of other rows", bool((grad[others] == 0).all()))


def check_select(
    notes: Notes,
    split: Split,
    logits: Tensor,
    rows: Tensor,
    sampled: Tensor,
    options: dict[str, Any],
    *,
    loops: bool = True,
) -> SparsePolicy:
    """The selected policy, compared field by field with a single process's, and with the loops."""
    shard, dtype = split.shard, logits.dtype
    with sends(notes, "select", sent_by_merge(shard, rows.shape[0], options["k"], dtype, entropy=True)):
        policy = select(VocabLogits.of(split.local(logits), rows, shard), sampled, Selection(**options), entropy=True)
    if policy.entropy is None:
        notes.true("select: entropy", False)
        return policy
    notes.agree(policy.ids, policy.log_probs, policy.sampled, policy.entropy)
    if not split.judge:
        return policy
    notes.close("select: entropy, dense", policy.entropy, dense_entropy(logits[rows]), atol=5 * tolerance(dtype))
    single = select(VocabLogits.of(logits, rows), sampled, Selection(**options))
    notes.same("select: ids", policy.ids, single.ids)
    notes.same("select: sampled", policy.sampled, single.sampled)
    notes.close("select: log-probs", policy.log_probs, single.log_probs, atol=tolerance(dtype))
    for j, row in enumerate(rows.tolist() if loops else ()):
        expected = oracle.keep(logits[row], int(sampled[j]), vocab_size=split.vocab, **options)
        notes.same(f"select: ids of row {row}, loops", [i for i in policy.ids[j].tolist() if i >= 0], expected.ids)
    return policy


def check_loss(
    notes: Notes,
    split: Split,
    new: Tensor,
    old: Tensor,
    rows: Tensor,
    sampled: Tensor,
    policy: SparsePolicy,
    options: dict[str, Any],
    *,
    step_size_gradients: tuple[str, ...] = STEP_SIZE_GRADIENTS,
    loops: bool = False,
) -> None:
    """Comparison, projection, per-token loss and gradient, for both rules."""
    shard, dtype = split.shard, new.dtype
    count = rows.shape[0]
    advantages = normal(count, seed=7)
    for rule, step_size_gradient in itertools.product(RULES, step_size_gradients):
        what = f"{rule}, {step_size_gradient}, {options}"
        local = split.local(new).requires_grad_()
        implicit = step_size_gradient == "implicit"
        expected = (
            sent_by_merge(shard, count, options["k"], dtype, entropy=implicit)
            if rule == "union"
            else sent_by_reduce(shard, count, policy.ids.shape[-1], dtype, entropy=implicit)
        )
        with sends(notes, what, expected):
            comparison = compare(
                rule, VocabLogits.of(local, rows, shard), policy, Selection(**options), entropy=implicit
            )
        terms = token_terms(comparison, BOUND, step_size_gradient)  # type: ignore[arg-type]
        losses = losses_of(terms, advantages, comparison.entropy)
        with sends(notes, f"{what}, backward", []):
            (grad,) = torch.autograd.grad(losses.sum(), local)
        notes.same(f"{what}: entropy", comparison.entropy is not None, implicit)
        fields = (getattr(comparison, field.name) for field in dataclasses.fields(Comparison))
        notes.agree(*(field for field in fields if field is not None))
        notes.agree(terms.log_ratio, terms.regression_kl, terms.projected, losses)
        grad = split.assemble(grad)
        if not split.judge:
            continue

        whole = new.clone().requires_grad_()
        single_policy = select(VocabLogits.of(old, rows), sampled, Selection(**options))
        single = compare(rule, VocabLogits.of(whole, rows), single_policy, Selection(**options), entropy=implicit)
        single_terms = token_terms(single, BOUND, step_size_gradient)  # type: ignore[arg-type]
        single_losses = losses_of(single_terms, advantages, single.entropy)
        (single_grad,) = torch.autograd.grad(single_losses.sum(), whole)
        check_comparison(notes, what, comparison, single)
        notes.same(f"{what}: projected", terms.projected, single_terms.projected)
        notes.close(f"{what}: losses", losses, single_losses, atol=loss_tolerance(dtype) * largest(losses, least=1.0))
        # The projection doubles the log-probabilities' error; float64 step sizes are accurate to 1e-10 of the bound.
        rtol = max(2 * gradient_tolerance(dtype), 1e-10)
        check_gradient(notes, what, split, grad, single_grad, rows, rtol=rtol, least=0.05)
        if loops and count > 0:
            dense = new.double().requires_grad_()
            reference = oracle_losses(rule, dense[rows], old[rows], sampled, advantages, options, implicit)
            if implicit:
                reference = reference - BONUS * dense_entropy(dense[rows])
            (dense_grad,) = torch.autograd.grad(reference.sum(), dense)
            kept = [
                oracle.keep(old[row], int(o), vocab_size=split.vocab, **options)
                for row, o in zip(rows.tolist(), sampled.tolist(), strict=True)
            ]
            notes.same(f"{what}: cap, loops", comparison.cap_hit.tolist(), [row.capped for row in kept])
            notes.same(f"{what}: size, loops", comparison.support_size.tolist(), [len(row.ids) for row in kept])
            # Step sizes are accurate to 1e-3 of the bound in float32 and to 1e-10 in float64.
            rtol = 1e-8 if dtype == torch.float64 else 2e-3
            notes.close(f"{what}: losses, loops", losses, reference, atol=rtol)
            check_gradient(notes, f"{what}, loops", split, grad, dense_grad, rows, rtol=rtol, least=0.05)


def check_comparison(notes: Notes, what: str, actual: Comparison, expected: Comparison) -> None:
    for field in dataclasses.fields(Comparison):
        mine, theirs = getattr(actual, field.name), getattr(expected, field.name)
        if mine is None or theirs is None:
            notes.true(f"{what}: {field.name}", mine is theirs)
        elif not mine.is_floating_point():
            notes.same(f"{what}: {field.name}", mine, theirs)
        elif field.name in ("new_log_probs", "old_log_probs"):
            # The rest is a difference of masses, so its rounding is absolute: compare masses.
            notes.same(f"{what}: shape of {field.name}", tuple(mine.shape), tuple(theirs.shape))
            notes.close(f"{what}: mass of {field.name}", mine.exp(), theirs.exp(), atol=tolerance(mine.dtype))
            notes.close(f"{what}: {field.name}", mine[..., :-1], theirs[..., :-1], atol=tolerance(mine.dtype))
        else:
            notes.close(
                f"{what}: {field.name}",
                mine,
                theirs,
                atol=(2.5 if field.name == "entropy" else 1) * tolerance(mine.dtype),
            )


# --- cases ------------------------------------------------------------------------------------------------------------

Case = Callable[[Notes], None]
CASES: dict[str, Case] = {}
# Cases that are neither a combination of layout, kind and precision, nor drawn.
SINGLE_CASES: list[str] = []


def case(name: str) -> Callable[[Case], Case]:
    def register(function: Case) -> Case:
        CASES[name] = function
        SINGLE_CASES.append(name)
        return function

    return register


def split_of(layout: str) -> Split:
    return Split(LAYOUTS[layout][dist.get_world_size()])


@contextmanager
def small_blocks(elements: int) -> Iterator[None]:
    """Many blocks of rows; ranks with different numbers of columns cut them differently."""
    before = logits_module._HOST_BLOCK
    logits_module._HOST_BLOCK = elements
    try:
        yield
    finally:
        logits_module._HOST_BLOCK = before


def everything(notes: Notes, layout: str, kind: str, dtype: torch.dtype) -> None:
    split = split_of(layout)
    notes.counting = kind == "normal"
    old, new = draw(kind, split, TOKENS, dtype, seed=100)
    rows = torch.tensor(ROWS)
    sampled = sample(old[rows], seed=101)
    # Where possible, also sample the least probable id, the most probable one and the first of the last shard.
    sampled[0] = torch.where(old[rows[0]] > -INF, old[rows[0]], INF).argmin()
    sampled[1] = old[rows[1]].argmax()
    sampled[2] = min(split.starts[-1], split.vocab - 1)
    possible = old[rows, sampled] > -INF
    check_log_probs_at(notes, split, new, rows, ids_of_every_sort(split, rows.shape[0], seed=102), seed=103)
    thorough = kind == "normal" and dtype != torch.bfloat16 and layout in ("uneven", "padded")
    for index, (k, dropped_mass) in enumerate(SETTINGS):
        options = {"k": k, "dropped_mass": dropped_mass}
        check_top(notes, split, old, rows, sampled, k)
        clear = clear_of_the_edge(old, rows, k, dropped_mass) & clear_of_the_edge(new, rows, k, dropped_mass)
        notes.true("few rows lie at the edge", int(clear.sum()) >= 5)
        chosen, at = rows[clear & possible], sampled[clear & possible]
        policy = check_select(notes, split, old, chosen, at, options)
        gradients = STEP_SIZE_GRADIENTS if thorough else (STEP_SIZE_GRADIENTS[index % 2],)
        check_loss(notes, split, new, old, chosen, at, policy, options, step_size_gradients=gradients, loops=thorough)


for _layout in LAYOUTS:
    for _kind in KINDS:
        for _name, _dtype in DTYPES.items():
            # All kinds depend on the columns' layout in the same way, so two layouts are enough for them.
            if _kind == "normal" or (_layout in ("uneven", "only-padding") and _name == "f32"):
                CASES[f"{_layout}-{_kind}-{_name}"] = functools.partial(
                    everything, layout=_layout, kind=_kind, dtype=_dtype
                )


@case("blocks")
def blocks(notes: Notes) -> None:
    with small_blocks(150):
        for layout in ("uneven", "only-padding"):
            everything(notes, layout, "normal", torch.float32)


@case("ties-across-the-cap")
def ties_across_the_cap(notes: Notes) -> None:
    """More equal logits than candidates, on one rank and on several, and bfloat16 ties across the K-th id."""
    world = dist.get_world_size()
    sizes = {1: (2000,), 2: (1990, 10), 3: (10, 1090, 900), 4: (500, 10, 1490, 0)}[world]
    split = Split(sizes, 2000)
    rows = torch.arange(6)
    levels = torch.randint(0, 3, (6, 2000), generator=torch.Generator().manual_seed(5)).float()
    rounded = normal(6, 2000, seed=6).bfloat16()
    ranked = rounded.float().sort(-1, descending=True).values
    notes.true("the drawn rows have a tie at the cap", bool((ranked[:, 63] == ranked[:, 64]).any()))
    sampled = torch.randint(0, 2000, (6,), generator=torch.Generator().manual_seed(8))
    for logits in (levels, levels.bfloat16(), levels.double(), torch.zeros(6, 2000), rounded):
        for k in (1, 64, 100):
            check_top(notes, split, logits, rows, sampled, k)
            check_select(notes, split, logits, rows, sampled, {"k": k, "dropped_mass": 1e-5})


@case("ids-without-mass-are-none")
def ids_without_mass_are_none(notes: Notes) -> None:
    """With K above the number of possible ids, the last entries are unused."""
    for layout in ("even", "uneven", "empty-first", "only-padding"):
        split = split_of(layout)
        for kind in ("holes", "blind"):
            logits, _ = draw(kind, split, TOKENS, torch.float32, seed=110)
            rows = torch.tensor(ROWS)
            top = top_log_probs(split.local(logits), rows, rows, 90, split.shard)
            notes.agree(*top[:3])
            ids, log_probs = dense_top(logits[rows], 90)
            notes.same(f"{layout}, {kind}: ids", top.ids, torch.where(log_probs > -INF, ids, -1))


@case("local-column-0")
def local_column_0(notes: Notes) -> None:
    """Ids owned by another rank are clamped to column 0, which must not disturb the rank's own column 0."""
    for layout in LAYOUTS:
        split = split_of(layout)
        logits, _ = draw("normal", split, TOKENS, torch.float32, seed=120)
        rows = torch.tensor(ROWS)
        firsts = torch.tensor([[min(start, VOCAB - 1) for start in split.starts]]).expand(len(ROWS), -1)
        check_log_probs_at(notes, split, logits, rows, firsts, seed=121)
        for start in split.starts:
            others = [i for i in range(VOCAB) if i != start][::9]
            check_log_probs_at(notes, split, logits, rows, torch.tensor([others]).expand(len(ROWS), -1), seed=122)
        check_log_probs_at(notes, split, logits, rows, torch.full((len(ROWS), 3), -1), seed=123)


@contextmanager
def small_head_blocks(elements: int, read: int, gradient: int) -> Iterator[None]:
    """Many blocks of the vocabulary and of the tokens."""
    before = head_module._READ_BLOCK, head_module._GRADIENT_BLOCK
    head_module._READ_BLOCK = {"cpu": (read, max(1, elements // read))}
    head_module._GRADIENT_BLOCK = {"cpu": (gradient, elements)}
    try:
        with small_blocks(elements):
            yield
    finally:
        head_module._READ_BLOCK, head_module._GRADIENT_BLOCK = before


def check_head(notes: Notes, split: Split, dtype: torch.dtype, temperature: float) -> None:
    """The fused head on each rank's part of the weight: values match whole logits, gradients are complete."""
    shard, units, group = split.shard, 6, split.group or dist.group.WORLD
    # Multiples of 1/8: products are exact, so ties are the same wherever they are computed.
    hidden = (8 * normal(TOKENS, units, seed=180)).round().div(8).to(dtype)
    weight = (8 * normal(split.vocab, units, seed=181)).round().div(8).to(dtype)
    padded = torch.cat([weight, weight.new_full((sum(split.sizes) - split.vocab, units), POISON)])
    rows = torch.tensor(ROWS)
    old = (hidden @ weight.T).double() / temperature + normal(TOKENS, split.vocab, seed=182, scale=0.6)
    sampled = sample(old[rows], seed=183)
    options: dict[str, Any] = {"k": 24, "dropped_mass": 0.0}
    leaves = hidden.clone().requires_grad_(), padded[shard.start : shard.stop].clone().requires_grad_()
    head = LinearHead(*leaves, temperature)
    count, atol = rows.shape[0], 4 * tolerance(dtype)

    with sends(notes, "head, select", sent_by_merge(shard, count, options["k"], dtype, entropy=True)):
        policy = select(VocabLogits.of(head, rows, shard), sampled, Selection(**options), entropy=True)
    if policy.entropy is None:
        notes.true("head, select: entropy", False)
        return
    notes.agree(policy.ids, policy.log_probs, policy.sampled, policy.entropy)
    logits = hidden.double() @ weight.double().T / temperature
    log_probs = logits.log_softmax(-1)
    for j, row in enumerate(rows.tolist()):
        expected = oracle.keep(logits[row], int(sampled[j]), vocab_size=split.vocab, **options)
        used = policy.ids[j] >= 0
        notes.same(f"head, select: ids of row {row}", policy.ids[j][used].tolist(), expected.ids)
        notes.close("head, select: log-probs", policy.log_probs[j][used], log_probs[row, expected.ids], atol=atol)
    notes.close("head, select: entropy", policy.entropy, dense_entropy(logits[rows]), atol=5 * atol)

    before = select(VocabLogits.of(old.to(dtype), rows), sampled, Selection(**options))
    advantages = normal(count, seed=184)
    for rule in RULES:
        what = f"head, {rule}, {dtype}, {temperature}"
        traffic = (
            sent_by_merge(shard, count, options["k"], dtype, entropy=True)
            if rule == "union"
            else sent_by_reduce(shard, count, before.ids.shape[-1], dtype, entropy=True)
        )
        with sends(notes, what, traffic):
            comparison = compare(rule, VocabLogits.of(head, rows, shard), before, Selection(**options), entropy=True)
        losses = losses_of(token_terms(comparison, BOUND), advantages, comparison.entropy)
        notes.agree(losses)
        with sends(notes, f"{what}, backward", []):
            grad_hidden, grad_weight = torch.autograd.grad(losses.sum(), leaves)
        # Each rank's columns contribute a part, as after Megatron's output layer.
        grad_hidden = grad_hidden.double()
        dist.all_reduce(grad_hidden, group=group)
        grad_weight = split.assemble(grad_weight.T.contiguous()).T
        if not split.judge:
            continue
        dense = hidden.double().requires_grad_(), weight.double().requires_grad_()
        new = dense[0] @ dense[1].T / temperature
        reference = oracle_losses(rule, new[rows], old[rows], sampled, advantages, options, True)
        reference = reference - BONUS * dense_entropy(new[rows])
        expected_hidden, expected_weight = torch.autograd.grad(reference.sum(), dense)
        rtol = 1e-8 if dtype == torch.float64 else 2e-3
        notes.close(f"{what}: losses", losses, reference, atol=rtol)
        for name, own, theirs in (
            ("hidden", grad_hidden, expected_hidden),
            ("weight", grad_weight[: split.vocab], expected_weight),
        ):
            notes.close(f"{what}: gradient of {name}", own, theirs, atol=rtol * largest(theirs, least=0.05))
        notes.true(f"{what}: gradient of padding", bool((grad_weight[split.vocab :] == 0).all()))
        others = torch.ones(TOKENS, dtype=torch.bool)
        others[rows] = False
        notes.true(f"{what}: gradient of other rows", bool((grad_hidden[others] == 0).all()))


@case("head")
def head(notes: Notes) -> None:
    for layout in LAYOUTS:
        check_head(notes, split_of(layout), torch.float64, 0.7)
    for dtype in (torch.float32, torch.float64):
        for blocks in ((1, 1, 1), (37, 3, 5)):
            with small_head_blocks(*blocks):
                check_head(notes, split_of("uneven"), dtype, 1.0)


@case("no-rows")
def no_rows(notes: Notes) -> None:
    rows = torch.zeros(0, dtype=torch.int64)
    options = {"k": 5, "dropped_mass": 1e-5}
    for layout in LAYOUTS:
        split = split_of(layout)
        logits, _ = draw("normal", split, TOKENS, torch.float32, seed=130)
        check_top(notes, split, logits, rows, rows, 5)
        check_log_probs_at(notes, split, logits, rows, rows.reshape(0, 4), seed=131)
        policy = check_select(notes, split, logits, rows, rows, options)
        check_loss(notes, split, logits, logits, rows, rows, policy, options)


@case("one-row")
def one_row(notes: Notes) -> None:
    """A single row: no second one fixes the stride of its message in memory."""
    for (name, dtype), layout in itertools.product(DTYPES.items(), ("uneven", "empty-first")):
        split = split_of(layout)
        old, new = draw("normal", split, 2, dtype, seed=135)
        row = torch.tensor([1])
        sampled = sample(old[row], seed=136)
        for k in (1, 2, 3, 16):
            options = {"k": k, "dropped_mass": 0.0}
            try:
                check_top(notes, split, old, row, sampled, k)
                policy = check_select(notes, split, old, row, sampled, options)
                check_loss(notes, split, new, old, row, sampled, policy, options, step_size_gradients=("implicit",))
            except RuntimeError as error:
                if not raised_everywhere(f"one-row {name} {layout} {k}"):
                    raise
                notes.true(f"{name}, {layout}, K = {k}: {error}", False)


@case("large-vocabulary")
def large_vocabulary(notes: Notes) -> None:
    """Padded as Megatron does, to a multiple of 128 columns per rank, and beyond."""
    world = dist.get_world_size()
    columns = 128 * math.ceil(LARGE_VOCAB / (128 * world)) + 128
    split = Split((columns,) * world, LARGE_VOCAB)
    notes.same("even", VocabShard.even(columns, LARGE_VOCAB, everyone()), split.shard)
    old = normal(4, LARGE_VOCAB, seed=140, scale=3.0)
    old[:, torch.arange(0, LARGE_VOCAB, 3001)] += 9
    new = old + normal(4, LARGE_VOCAB, seed=141, scale=0.5)
    rows = torch.tensor([3, 0, 2])
    sampled = sample(old[rows], seed=142)
    sampled[0] = LARGE_VOCAB - 1
    ids = ids_of_every_sort(split, 3, seed=143)
    options = {"k": 64, "dropped_mass": 1e-5}
    for dtype in (torch.float32, torch.bfloat16):
        before, after = old.to(dtype), new.to(dtype)
        check_top(notes, split, before, rows, sampled, 64)
        check_log_probs_at(notes, split, after, rows, ids, seed=144)
        # The cap ends the selection long before its mass is reached, so no row is at the edge.
        policy = check_select(notes, split, before, rows, sampled, options, loops=False)
        check_loss(notes, split, after, before, rows, sampled, policy, options, step_size_gradients=("implicit",))


@case("equal-policies")
def equal_policies(notes: Notes) -> None:
    """A policy's ratio to itself is exactly 1, however its rows are packed the second time."""
    sizes = tuple(40 - 3 * rank for rank in range(dist.get_world_size()))
    split = Split(sizes, sum(sizes) - 5)
    shard = split.shard
    rows, few = torch.arange(64), torch.tensor([61, 2, 17, 5, 6])
    for dtype in DTYPES.values():
        for kind in ("normal", "offset", "blind"):
            logits, _ = draw(kind, split, 64, dtype, seed=150)
            sampled = sample(logits, seed=151)
            for k, dropped_mass in ((8, 1e-5), (16, 1e-2), (400, 0.0)):
                options = {"k": k, "dropped_mass": dropped_mass}
                policy = select(VocabLogits.of(split.local(logits), rows, shard), sampled, Selection(**options))  # type: ignore[arg-type]
                for chosen in (rows, few) if kind == "normal" else (few,):
                    packed = SparsePolicy(policy.ids[chosen], policy.log_probs[chosen], policy.sampled[chosen])
                    for rule in RULES:
                        local = split.local(logits).requires_grad_()
                        comparison = compare(rule, VocabLogits.of(local, chosen, shard), packed, Selection(**options))  # type: ignore[arg-type]
                        terms = token_terms(comparison, 1e-6)
                        notes.agree(terms.log_ratio, terms.regression_kl, comparison.new_log_probs)
                        what = f"{dtype}, {kind}, {k}, {dropped_mass}, {rule}, {len(chosen)} rows"
                        notes.true(f"{what}: ratio", bool((terms.log_ratio == 0).all()))
                        notes.true(f"{what}: regression", bool((terms.regression_kl == 0).all()))
                        notes.true(f"{what}: region", not bool(terms.projected.any()))


@case("numerical-differences")
def numerical_differences(notes: Notes) -> None:
    """Every local gradient against finite differences of the whole loss, with the owner moving the logit."""
    world = dist.get_world_size()
    sizes = {1: (13,), 2: (3, 10), 3: (4, 0, 9), 4: (2, 5, 5, 1)}[world]
    split = Split(sizes, 12)
    shard = split.shard
    old, new = draw("normal", split, 3, torch.float64, seed=160)
    rows = torch.tensor([2, 0])
    sampled = sample(old[rows], seed=161)
    options = {"k": 4, "dropped_mass": 1e-3}
    policy = select(VocabLogits.of(split.local(old), rows, shard), sampled, Selection(**options))  # type: ignore[arg-type]
    ids = ids_of_every_sort(split, 2, seed=162)
    at_weight = torch.where(ids >= 0, normal(*ids.shape, seed=163), 0.0)

    def at(local: Tensor) -> Tensor:
        return (
            torch.where(ids >= 0, VocabLogits.of(local, rows, shard).log_probs_at(ids).log_probs, 0.0) * at_weight
        ).sum()

    def comparison(rule: str, local: Tensor) -> Tensor:
        result = compare(rule, VocabLogits.of(local, rows, shard), policy, Selection(**options))  # type: ignore[arg-type]
        live = result.new_log_probs > -INF
        weight = normal(*result.new_log_probs.shape, seed=164)
        return (torch.where(live, result.new_log_probs, 0.0) * weight).sum() + result.sampled_log_probs.sum()

    step = 1e-5
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "at": at,
        **{rule: functools.partial(comparison, rule) for rule in RULES},
    }
    for what, function in functions.items():
        local = split.local(new).requires_grad_()
        (grad,) = torch.autograd.grad(function(local), local)
        for token in rows.tolist():
            for column in range(sum(sizes)):
                owned = shard.start <= column < shard.stop
                values = []
                for sign in (1, -1):
                    moved = local.detach().clone()
                    if owned:
                        moved[token, column - shard.start] += sign * step
                    values.append(function(moved))
                    notes.agree(values[-1])
                if owned:
                    slope = (values[0] - values[1]) / (2 * step)
                    notes.close(f"{what}: {token}, {column}", grad[token, column - shard.start], slope, atol=1e-8)


@case("groups")
def groups(notes: Notes) -> None:
    """Two groups of ranks at once, each with its own vocabulary, side by side and interleaved."""
    world = dist.get_world_size()
    if world != 4:
        return
    for members in ([[0, 1], [2, 3]], [[0, 2], [1, 3]]):
        handles = [dist.new_group(ranks) for ranks in members]
        mine = next(i for i, ranks in enumerate(members) if dist.get_rank() in ranks)
        split = Split((70, 40), VOCAB, handles[mine])
        own = Notes()
        old, new = draw("normal", split, TOKENS, torch.float32, seed=170 + 10 * mine)
        rows = torch.tensor(ROWS)
        sampled = sample(old[rows], seed=171)
        options = {"k": 20, "dropped_mass": 0.0}
        check_top(own, split, old, rows, sampled, 20)
        check_log_probs_at(own, split, new, rows, ids_of_every_sort(split, len(ROWS), seed=172), seed=173)
        policy = check_select(own, split, old, rows, sampled, options)
        check_loss(own, split, new, old, rows, sampled, policy, options)
        # The groups' digests differ, so only failures count here.
        notes.failures += own.failures
        for handle in handles:
            if dist.get_rank(handle) >= 0:
                dist.destroy_process_group(handle)


@case("shards-by-rank")
def shards_by_rank(notes: Notes) -> None:
    world, rank, group = dist.get_world_size(), dist.get_rank(), everyone()
    shard = VocabShard.even(7, 7 * world - 3, group)
    notes.same("even", (shard.start, shard.stop, shard.vocab_size), (7 * rank, 7 * rank + 7, 7 * world - 3))
    notes.same("even: columns", shard.columns, 4 if rank == world - 1 else 7)
    notes.same("even: ranks", (shard.ranks, shard.rank), (world, rank))
    # With one real id, all ranks but the first hold only padding.
    notes.same("one id", VocabShard.even(7, 1, group).columns, 1 if rank == 0 else 0)
    notes.same("full", VocabShard.even(7, 7 * world, group).columns, 7)

    ids = torch.arange(-2, 7 * world + 2).reshape(1, -1)
    columns = shard.local(ids)
    expected = [shard.start <= i < min(shard.stop, 7 * world - 3) for i in ids[0].tolist()]
    places = [i - shard.start if mine else -1 for i, mine in zip(ids[0].tolist(), expected, strict=True)]
    notes.same("local columns", columns[0].tolist(), places)
    try:
        VocabShard.even(7, 7 * world + 1, group)
        notes.true("too few columns must be refused", False)
    except ValueError as error:
        notes.true(f"the refusal names the vocabulary: {error}", f"vocabulary of {7 * world + 1}" in str(error))
    for columns_ in (6, 8):
        logits = torch.zeros(2, columns_)
        row = torch.arange(2)
        for name, call in {
            "log_probs_at": lambda: VocabLogits.of(logits, row, shard).log_probs_at(row[:, None]),  # noqa: B023
            "top_log_probs": lambda: top_log_probs(logits, row, row, 2, shard),  # noqa: B023
            "select": lambda: select(VocabLogits.of(logits, row, shard), row, Selection(2, 0.0)),  # noqa: B023
        }.items():
            try:
                call()
                notes.true(f"{name} must refuse {columns_} columns", False)
            except ValueError as error:
                notes.true(f"{name} names the columns: {error}", f"{columns_} logit columns" in str(error))


def drawn(notes: Notes, seed: int) -> None:
    """Random vocabulary, split, padding, cap, dropped mass, precision and kind of logits."""
    rng = random.Random(1000 * dist.get_world_size() + seed)
    notes.counting = seed % 5 == 0
    vocab = rng.randint(1, 40)
    total = vocab + rng.choice([0, 0, 1, 13])
    cuts = sorted(rng.randint(0, total) for _ in range(dist.get_world_size() - 1))
    edges = [0, *cuts, total]
    split = Split(tuple(b - a for a, b in itertools.pairwise(edges)), vocab)
    dtype = DTYPES[rng.choice(list(DTYPES))]
    k, dropped_mass = rng.randint(1, 50), rng.choice([0.0, 1e-5, 0.02, 0.3])
    old, new = draw(rng.choice(KINDS), split, 8, dtype, seed=rng.randint(0, 10**6))
    rows = torch.tensor(rng.sample(range(8), rng.randint(0, 6)), dtype=torch.int64)
    rows = rows[clear_of_the_edge(old, rows, k, dropped_mass) & clear_of_the_edge(new, rows, k, dropped_mass)]
    sampled = sample(old[rows], seed=seed) if rows.numel() > 0 else rows
    options = {"k": k, "dropped_mass": dropped_mass}
    with small_blocks(rng.choice([1, 50, 1 << 24])):
        check_top(notes, split, old, rows, sampled, k)
        ids = ids_of_every_sort(split, rows.shape[0], seed=seed)
        check_log_probs_at(notes, split, new, rows, ids, seed=seed)
        policy = check_select(notes, split, old, rows, sampled, options)
        check_loss(notes, split, new, old, rows, sampled, policy, options,
                   step_size_gradients=(STEP_SIZE_GRADIENTS[seed % 2],))  # fmt: skip
    notes.failures = [f"{split}, {dtype}, {options}: {failure}" for failure in notes.failures]


for _seed in range(24):
    CASES[f"drawn-{_seed}"] = functools.partial(drawn, seed=_seed)


def raised_everywhere(name: str) -> bool:
    """Whether every rank reports the same case: then all left it at the same point and may go on."""
    store = dist.distributed_c10d._get_default_store()
    keys = [f"raised/{name}/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], "")
    try:
        store.wait(keys, timedelta(seconds=5))
    except dist.DistError:
        return False
    return True


def run_cases(names: tuple[str, ...]) -> dict[str, tuple[list[str], str]]:
    """Failed checks and digest of each case.

    Raises:
        RuntimeError: a case raised on some ranks only, so the ranks are out of step.
    """
    results = {}
    for name in names:
        notes = Notes()
        try:
            CASES[name](notes)
        except Exception as error:
            if not raised_everywhere(name):
                raise RuntimeError(f"case {name}") from error
            notes.failures.append(traceback.format_exc(limit=-4))
        results[name] = notes.outcome()
    return results
