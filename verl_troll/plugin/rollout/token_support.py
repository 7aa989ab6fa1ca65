"""The support of one request's generated tokens, as the rollout engine returns it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from verl_troll.core.support import keep_most_probable

FIELD = "troll_support"
"""Name in ``TokenOutput.extra_fields``."""

LOWEST = -128.0
"""What a sampled id's log-probability is raised to, in nats: below, the support cannot carry it (``core/wire.py``)."""
# Engines write this (vLLM) or float32's minimum (SGLang) where they do not write -inf.
_ZERO = -9999.0


@dataclass(frozen=True)
class SupportRequest:
    """What the servers must keep; verl passes it to them as ``rollout.custom.troll``.

    Attributes:
        k: maximum number of ids kept per token.
        dropped_mass: probability mass that may be dropped.
    """

    k: int
    dropped_mass: float

    @classmethod
    def of(cls, rollout_config: Any, model_config: Any) -> SupportRequest:
        """The request in verl's rollout configuration, with ``k`` capped at the vocabulary size.

        Raises:
            ValueError: the configuration has none.
        """
        custom = rollout_config.custom or {}
        if "troll" not in custom:
            raise ValueError(
                "actor_rollout_ref.rollout.custom.troll is missing: verl_troll.plugin.rollout was loaded without "
                "+troll=rollout_support, which sets it"
            )
        vocab_size = model_config.hf_config.get_text_config().vocab_size
        return cls(min(int(custom["troll"]["k"]), vocab_size), float(custom["troll"]["dropped_mass"]))


@dataclass(frozen=True)
class TokenSupport:
    """Kept ids of r generated tokens, concatenated (s = sum of the counts).

    Attributes:
        tokens: ``[r]`` int32, the generated tokens.
        counts: ``[r]`` int16, number of ids kept at each.
        ids: ``[s]`` int32.
        log_probs: ``[s]`` float32, over the full vocabulary, in nats.
    """

    tokens: NDArray[np.int32]
    counts: NDArray[np.int16]
    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]

    @classmethod
    def read(
        cls,
        tokens: Sequence[int],
        token_log_probs: Any,
        counts: Any,
        ids: Any,
        log_probs: Any,
        wanted: SupportRequest,
        source: str,
    ) -> TokenSupport:
        """Apply the old-log-prob pass's selection rule to an engine's candidates.

        There may be fewer or more candidates than asked for, in any order, and an id may occur twice: the ``k`` most
        probable ids count. A candidate of log-probability -9999 or less, with which engines replace ``-inf``, is none.
        A sampled id's log-probability is raised to :data:`LOWEST`, whatever lower value the engine wrote.

        Args:
            tokens, token_log_probs: ``[r]``.
            counts: ``[r]``, number of candidates of each token.
            ids, log_probs: ``[sum of counts]``, the candidates; the sampled token may be among them.
            wanted: number of candidates asked for, and the mass that may be dropped.
            source: names the engine and the request, for errors.

        Raises:
            ValueError: a token has no candidate, or the numbers of tokens and candidates differ, or a log-probability
                is NaN.
        """
        counts = np.asarray(counts, dtype=np.int64)
        ids, log_probs = np.asarray(ids, dtype=np.int64), np.asarray(log_probs, dtype=np.float32)
        sampled = np.asarray(token_log_probs, dtype=np.float32)
        if not len(tokens) == len(sampled) == len(counts):
            raise wrong_answer(
                source, f"{len(tokens)} tokens, {len(sampled)} log-probabilities of these, candidates for {len(counts)}"
            )
        if (counts == 0).any():
            raise wrong_answer(source, f"token {int(counts.argmin())} of {len(tokens)} has no candidates")
        if np.isnan(sampled).any() or np.isnan(log_probs).any():
            raise wrong_answer(source, "a log-probability is NaN")
        top_ids, top_log_probs = _most_probable(counts, ids, log_probs, wanted.k)
        return cls.select(tokens, np.maximum(sampled, LOWEST), top_ids, top_log_probs, wanted.dropped_mass)

    @classmethod
    def select(
        cls,
        tokens: Sequence[int],
        token_log_probs: Any,
        top_ids: Any,
        top_log_probs: Any,
        dropped_mass: float,
    ) -> TokenSupport:
        """Apply the old-log-prob pass's selection rule to an engine's top log-probabilities.

        Args:
            tokens, token_log_probs: ``[r]``.
            top_ids, top_log_probs: ``[r, k]``, by falling probability; -1 and ``-inf`` where there are fewer.
            dropped_mass: delta in [0, 1).
        """
        sampled = torch.tensor(tokens, dtype=torch.int64)
        policy = keep_most_probable(
            torch.as_tensor(top_ids, dtype=torch.int64),
            torch.as_tensor(top_log_probs, dtype=torch.float32),
            sampled,
            torch.as_tensor(token_log_probs, dtype=torch.float32),
            dropped_mass,
        )
        used = policy.ids >= 0
        return cls(
            sampled.numpy().astype(np.int32),
            used.sum(-1).numpy().astype(np.int16),
            policy.ids[used].numpy().astype(np.int32),
            policy.log_probs[used].numpy(),
        )

    @classmethod
    def join(cls, turns: Sequence[TokenSupport]) -> TokenSupport:
        """Concatenate the attempts of one conversation's turns, in order; at least one."""
        return cls(
            np.concatenate([turn.tokens for turn in turns]),
            np.concatenate([turn.counts for turn in turns]),
            np.concatenate([turn.ids for turn in turns]),
            np.concatenate([turn.log_probs for turn in turns]),
        )

    def to_fields(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        response_mask: Sequence[int],
        versions: NDArray[np.int32] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Fields of :mod:`verl_troll.plugin.carry` for one sample; tokens with ``response_mask`` 1 were generated.

        The response may be truncated before the last generated token.

        Args:
            versions: ``[r]``, of the weights that sampled each generated token, -1 if unknown; None for no such field.

        Raises:
            ValueError: the response's generated tokens are not those of the support.
        """
        from verl_troll.plugin import carry

        mask = np.asarray(response_mask, dtype=bool)
        generated = np.asarray(response_ids, dtype=np.int32)[mask]
        count = len(generated)
        if count > len(self.tokens) or not np.array_equal(generated, self.tokens[:count]):
            raise ValueError(
                f"the agent loop returned {count} generated tokens that are not, in order, those of the rollout "
                f"engine ({len(self.tokens)}): its support cannot be used. Compute the old policy in the actor "
                "(+troll=default), or keep the engine's tokens unchanged."
            )
        counts = np.zeros(len(mask), dtype=np.int16)
        counts[mask] = self.counts[:count]
        kept = int(self.counts[:count].sum())
        ids, log_probs = torch.from_numpy(self.ids[:kept]), torch.from_numpy(self.log_probs[:kept])
        fields = carry.pack_sample(prompt_ids, response_ids, torch.from_numpy(counts), ids, log_probs)
        if versions is not None:
            placed = np.full(len(mask), -1, dtype=np.int32)
            placed[mask] = versions[:count]
            fields[carry.VERSIONS] = torch.from_numpy(placed)
        return fields


def wrong_answer(source: str, wrong: str) -> ValueError:
    """The error for an answer of the engine that holds no support."""
    return ValueError(
        f"{source} answered without the log-probabilities that were asked for: {wrong}. Look at what changes them in "
        "the engine (its version, speculative decoding, a plugin), or compute the old policy in the actor "
        "(+troll=default)."
    )


def _most_probable(
    counts: NDArray[np.int64], ids: NDArray[np.int64], log_probs: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """``[r, k]`` distinct candidates of each token by falling probability; -1 and ``-inf`` where there are fewer."""
    log_probs = np.where(log_probs <= _ZERO, -np.inf, log_probs)
    if (counts == k).all() and (ids >= 0).all():
        # What engines return, as long as nothing is unusual; sorting it would take longer than the selection.
        table, values = ids.reshape(-1, k), log_probs.reshape(-1, k)
        by_id = np.sort(table, axis=-1)
        if (values[:, 1:] <= values[:, :-1]).all() and (by_id[:, 1:] != by_id[:, :-1]).all():
            return np.where(values > -np.inf, table, -1), values
    rows = np.repeat(np.arange(len(counts)), counts)
    possible = (log_probs > -np.inf) & (ids >= 0)
    rows, ids, log_probs = rows[possible], ids[possible], log_probs[possible]
    order = np.lexsort((ids, -log_probs, rows))
    rows, ids, log_probs = rows[order], ids[order], log_probs[order]
    # The first time that an id occurs at a token.
    _, first = np.unique(rows * (ids.max(initial=0) + 1) + ids, return_index=True)
    first.sort()
    rows, ids, log_probs = rows[first], ids[first], log_probs[first]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    top = place < k
    all_ids = np.full((len(counts), k), -1, dtype=np.int64)
    all_log_probs = np.full((len(counts), k), -np.inf, dtype=np.float32)
    all_ids[rows[top], place[top]] = ids[top]
    all_log_probs[rows[top], place[top]] = log_probs[top]
    return all_ids, all_log_probs
