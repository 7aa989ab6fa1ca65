"""Logits distributed like a language model's, on one rank or split over several.

Each token has a few likely ids with geometrically decreasing probabilities, and a long normal tail. Most tails hold
less mass than TROLL drops; one token in twenty is open-ended, so the cap K ends its selection. The new policy is the
old one plus noise on the logits, with much more noise at a fixed share of the tokens.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.rows import Case

_LIKELY = 128
_TAIL_DEVIATION = 1.5
_OPEN_ENDED_SHARE = 0.05
_MOVED_SHARE = 0.25
_NOISE, _NOISE_MOVED, _NOISE_TAIL = 0.05, 1.0, 0.02
_SEQUENCES = 8


@dataclass(frozen=True)
class Batch:
    """One micro-batch of N packed tokens, R of them response tokens.

    Attributes:
        old, new: ``[N, C]`` logits of this rank's columns under each policy.
        labels: ``[N]`` int64, the sampled id at each position.
        rows: ``[R]`` int64, positions of the response tokens.
        advantages: ``[R]``.
        start: id of the first column.
    """

    old: Tensor
    new: Tensor
    labels: Tensor
    rows: Tensor
    advantages: Tensor
    start: int

    @property
    def sampled_ids(self) -> Tensor:
        """``[R]``, the labels of the response tokens."""
        return self.labels[self.rows]


def response_rows(tokens: int, share: float) -> Tensor:
    """Positions of the response tokens: the last ``share`` of each of eight packed sequences."""
    bounds = torch.linspace(0, tokens, min(_SEQUENCES, tokens) + 1).long().tolist()
    runs = []
    for start, stop in itertools.pairwise(bounds):
        runs.append(torch.arange(stop - max(1, round(share * (stop - start))), stop))
    return torch.cat(runs)


def make_batch(case: Case, rank: int = 0, *, old: bool = True, new: bool = True, seed: int = 0) -> Batch:
    """One rank's part of a case's batch; ``old`` and ``new`` say which logits to make (empty otherwise)."""
    device = case.device
    shared = torch.Generator(device).manual_seed(seed)
    own = torch.Generator(device).manual_seed(seed + 1 + rank)
    tokens, vocab = case.tokens, case.vocab
    columns = -(-vocab // case.ranks)
    start, real = rank * columns, max(0, min(columns, vocab - rank * columns))
    likely = min(_LIKELY, vocab // 2)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(tokens, 1, generator=shared, device=device)

    open_ended = uniform(0, 1) < _OPEN_ENDED_SHARE
    tail_mass = torch.where(open_ended, uniform(-3, -1), uniform(-9, -6)).mul(math.log(10)).exp()
    decay = torch.where(open_ended, uniform(0.01, 0.1), uniform(1, 6))
    index = torch.arange(likely, device=device)
    log_probs = torch.log_softmax(-decay * index, dim=-1) + torch.log1p(-tail_mass)
    # Distinct ids, spread over the vocabulary and thus over the ranks.
    first = torch.randint(vocab, (tokens, 1), generator=shared, device=device)
    ids = (first + index * (vocab // likely)) % vocab
    tail_total = math.log(vocab) + 0.5 * _TAIL_DEVIATION**2
    old_likely = log_probs - tail_mass.log() + tail_total
    noise = torch.where(uniform(0, 1) < _MOVED_SHARE, _NOISE_MOVED, _NOISE)
    new_likely = old_likely + noise * torch.randn(tokens, likely, generator=shared, device=device)

    drawn = (log_probs - _gumbel(log_probs, shared)).argmax(-1, keepdim=True)
    labels = ids.gather(-1, drawn).squeeze(-1)
    from_tail = (uniform(0, 1) < tail_mass).squeeze(-1)
    labels = torch.where(from_tail, torch.randint(vocab, (tokens,), generator=shared, device=device), labels)
    rows = response_rows(tokens, case.response_share).to(device)
    advantages = torch.randn(rows.shape[0], generator=shared, device=device)

    old_logits = torch.empty(tokens if old else 0, columns, dtype=case.torch_dtype, device=device)
    new_logits = torch.empty(tokens if new else 0, columns, dtype=case.torch_dtype, device=device)
    here = (ids >= start) & (ids < start + real)
    step = max(1, (1 << 24) // columns)
    for begin in range(0, tokens, step):
        block = slice(begin, min(begin + step, tokens))
        tail = _TAIL_DEVIATION * torch.randn(block.stop - begin, columns, generator=own, device=device)
        token, which = here[block].nonzero(as_tuple=True)
        column = ids[block][token, which] - start
        drift = tail.roll(1, -1).mul_(_NOISE_TAIL / _TAIL_DEVIATION) if new else None
        if old:
            tail[token, column] = old_likely[block][token, which]
            old_logits[block] = tail
        if drift is not None:
            tail += drift
            tail[token, column] = new_likely[block][token, which]
            new_logits[block] = tail
    return Batch(old_logits, new_logits, labels, rows, advantages, start)


def _gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(like.shape, generator=generator, device=like.device).clamp_(1e-9, 1 - 1e-7)
    return (-uniform.log()).log()
