"""Batched sampling from a transformers model, with the log-probabilities of the sampled tokens.

Independent of verl and Ray. Shapes: ``n`` rows still running, ``v`` vocabulary size, ``t`` padded prompt length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Completion", "LogprobsMode", "Request", "generate", "token_log_probs"]

LogprobsMode = Literal["processed_logprobs", "raw_logprobs"]


@dataclass(frozen=True)
class Request:
    """One prompt to complete.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: maximum number of tokens to add, at least one.
        temperature: 0 is greedy (top_p and top_k then have no effect).
        top_p: keep the smallest set of most probable tokens whose probability reaches this, in (0, 1].
        top_k: keep this many most probable tokens; -1 or 0 keeps all.
        stop_ids: token ids that end the completion (and belong to it).
        candidates: number of most probable tokens to report at each token, at least 0; at most the vocabulary.
        noise: seed of this request's own random stream; equal requests with equal noise give equal completions,
            whatever else is in the batch.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_ids: frozenset[int] = frozenset()
    candidates: int = 0
    noise: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("prompt", len(self.prompt) >= 1, "at least one token"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 (greedy) or a positive number"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("top_k", self.top_k >= -1, "-1 or 0 (no limit), or a positive number"),
            ("candidates", self.candidates >= 0, "at least 0"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {rule}")


@dataclass
class Completion:
    """The completion of one request.

    Attributes:
        token_ids: the new tokens, including a stop token.
        log_probs: log-probability of each token, in nats.
        stop_reason: ``"completed"`` (stop token), ``"length"`` (token limit) or ``"aborted"``.
        candidates: of each token, ids and log-probabilities of the most probable ones, by falling probability.
    """

    token_ids: list[int]
    log_probs: list[float]
    stop_reason: Literal["completed", "length", "aborted"]
    candidates: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def token_log_probs(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Log-probabilities of the distribution to sample from.

    Args:
        logits: ``[n, v]``.
        temperature: ``[n]``; rows with 0 use temperature 1.
        top_p: ``[n]`` in (0, 1], applied after ``top_k``.
        top_k: ``[n]``; values below 1 keep all tokens.

    Returns:
        ``[n, v]`` float32, ``-inf`` for tokens that were cut off.
    """
    greedy = temperature == 0
    logits = logits.float() / torch.where(greedy, torch.ones_like(temperature), temperature)[:, None]
    size = logits.shape[-1]
    limit = torch.where((top_k < 1) | greedy, torch.full_like(top_k, size), top_k).clamp(max=size)
    mass = torch.where(greedy, torch.ones_like(top_p), top_p)
    if bool((limit < size).any()) or bool((mass < 1).any()):
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        ordered = ordered.masked_fill(torch.arange(size, device=logits.device) >= limit[:, None], float("-inf"))
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs
        # Always keep the most probable token, even if rounding makes the mass before it positive.
        cut = (before >= mass[:, None]) & (mass[:, None] < 1)
        cut[:, 0] = False
        logits = torch.empty_like(logits).scatter_(-1, index, ordered.masked_fill(cut, float("-inf")))
    return logits.log_softmax(-1)


def _choose(log_probs: Tensor, uniform: Tensor, greedy: Tensor) -> Tensor:
    """Token of each row: the most probable if ``greedy``, else the inverse CDF at ``uniform``."""
    cumulative = log_probs.double().exp().cumsum(-1)
    sampled = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return torch.where(greedy, log_probs.argmax(-1), sampled.clamp(max=log_probs.shape[-1] - 1))


def _left_pad(prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both ``[n, t]``."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@torch.inference_mode()
def generate(
    model: torch.nn.Module,
    requests: Sequence[Request],
    logprobs_mode: LogprobsMode = "processed_logprobs",
    aborted: Callable[[], bool] = lambda: False,
) -> list[Completion]:
    """Complete all requests in one padded batch with a key-value cache; equal prompts are read once.

    Args:
        model: a transformers causal language model in evaluation mode, on any device.
        requests: may differ in every setting.
        logprobs_mode: ``processed_logprobs`` reports the sampling distribution (after temperature, top_k and top_p);
            ``raw_logprobs`` the model's own at temperature 1.
        aborted: called before every token; once it returns true, partial completions are returned.

    Returns:
        One completion per request, in order.
    """
    if not requests:
        return []
    completions = [Completion([], [], "aborted") for _ in requests]
    device = next(model.parameters()).device
    draws = torch.from_numpy(
        np.stack(
            [np.random.default_rng(request.noise).random(max(r.max_tokens for r in requests)) for request in requests]
        )
    ).to(device)
    temperature = torch.tensor([r.temperature for r in requests], dtype=torch.float32, device=device)
    top_p = torch.tensor([r.top_p for r in requests], dtype=torch.float32, device=device)
    top_k = torch.tensor([r.top_k for r in requests], device=device)
    prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(r.prompt for r in requests))}
    prompt_of = torch.tensor([prompts[r.prompt] for r in requests], device=device)
    ids, mask = (part.to(device) for part in _left_pad(list(prompts)))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    rows = torch.arange(len(requests), device=device)  # index of the request of each running row
    cache: Any = None
    step = 0
    while len(rows) and not aborted():
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        logits = output.logits[:, -1]
        if step == 0 and len(prompts) < len(requests):
            cache.batch_select_indices(prompt_of)
            logits, mask, positions = logits[prompt_of], mask[prompt_of], positions[prompt_of]
        processed = token_log_probs(logits, temperature[rows], top_p[rows], top_k[rows])
        tokens = _choose(processed, draws[rows, step], temperature[rows] == 0)
        reported = processed if logprobs_mode == "processed_logprobs" else logits.float().log_softmax(-1)
        values = reported.gather(-1, tokens[:, None])[:, 0]
        most = min(max(requests[index].candidates for index in rows.tolist()), reported.shape[-1])
        top = tuple(part.cpu() for part in reported.topk(most, dim=-1)) if most else None
        step += 1
        keep = []
        for row, (index, token, value) in enumerate(zip(rows.tolist(), tokens.tolist(), values.tolist(), strict=True)):
            completion, request = completions[index], requests[index]
            completion.token_ids.append(token)
            completion.log_probs.append(value)
            if top is not None and request.candidates:
                completion.candidates.append((top[1][row, : request.candidates], top[0][row, : request.candidates]))
            if token in request.stop_ids:
                completion.stop_reason = "completed"
            elif step == request.max_tokens:
                completion.stop_reason = "length"
            else:
                keep.append(row)
        if len(keep) < len(rows):
            running = torch.tensor(keep, dtype=torch.long, device=device)
            rows, tokens, mask, positions = rows[running], tokens[running], mask[running], positions[running]
            if keep:
                cache.batch_select_indices(running)
        ids = tokens[:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
        positions = positions[:, -1:] + 1
    return completions
