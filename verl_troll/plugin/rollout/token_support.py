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
            top_ids, top_log_probs: ``[r, k]``, by decreasing probability.
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
        """Concatenate the turns of one conversation, in order; at least one."""
        return cls(
            np.concatenate([turn.tokens for turn in turns]),
            np.concatenate([turn.counts for turn in turns]),
            np.concatenate([turn.ids for turn in turns]),
            np.concatenate([turn.log_probs for turn in turns]),
        )

    def to_fields(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], response_mask: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Fields of :mod:`verl_troll.plugin.carry` for one sample; tokens with ``response_mask`` 1 were generated.

        The response may be truncated before the last generated token.

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
        return carry.pack_sample(prompt_ids, response_ids, torch.from_numpy(counts), ids, log_probs)
