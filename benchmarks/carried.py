"""Bytes carried per response token from the old-log-prob pass to the update."""

from __future__ import annotations

from functools import partial

import torch
from tensordict import TensorDict
from torch import Tensor

from benchmarks.inputs import make_batch
from benchmarks.measure import Contender, Spread, take_turns
from benchmarks.rows import Case, Row, parameters, phase_seconds
from benchmarks.troll import DROPPED_MASS, compact, support_facts
from verl_troll.core import wire
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits
from verl_troll.plugin import carry

NAME = "carried"
AXES = ("tokens", "k")
KEPT = (1, 10, 64)

# What verl's v1 trainer keeps per response token between rollout and update under GRPO.
VERL_FIELDS = {
    "responses": torch.int64,
    "input_ids": torch.int64,
    "position_ids": torch.int64,
    "response_mask": torch.int64,
    "loss_mask": torch.int64,
    "rollout_log_probs": torch.float32,
    "rm_scores": torch.float32,
    "old_log_probs": torch.float32,
    "entropy": torch.float32,
    "advantages": torch.float32,
    "returns": torch.float32,
}
_PROMPT, _SEQUENCES = 3, 8


def needed_bytes(case: Case) -> int:
    """Memory for the logits of the language-model-like support."""
    return 2 * case.logits_bytes


def micro_batch(sampled_ids: Tensor) -> tuple[TensorDict, carry.ResponseTokens]:
    """A batch in verl's no-padding format with these response ids, and their positions."""
    parts = [part for part in sampled_ids.cpu().tensor_split(_SEQUENCES) if part.numel() > 0]
    prompt = torch.zeros(_PROMPT, dtype=torch.int64)

    def jagged(tensors: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    data = TensorDict(
        {
            "input_ids": jagged([torch.cat([prompt, part]) for part in parts]),
            "response_mask": jagged([torch.ones_like(part) for part in parts]),
        },
        batch_size=[len(parts)],
    )
    return data, carry.response_tokens(data)


def packed_bytes(fields: dict[str, Tensor]) -> int:
    """Bytes of the values, without the offsets (8 bytes per sequence and field)."""
    return sum(field.values().numel() * field.values().element_size() for field in fields.values())


def run(case: Case, repeat: int, shard: None = None) -> list[Row]:
    """Packed bytes at fixed numbers of kept ids and a language model's, beside verl's fields and dense forms."""
    tokens = case.tokens
    result = []
    for kept in (*KEPT, None):
        policy, sampled_ids = _language_model_policy(case) if kept is None else _fixed_policy(tokens, kept)
        result.append(_packed_row(case, policy, sampled_ids, repeat, kept))
    verl = sum(dtype.itemsize for dtype in VERL_FIELDS.values())
    fields = ", ".join(f"{name} {dtype.itemsize}" for name, dtype in VERL_FIELDS.items())
    others = {
        "verl's own fields": (verl, {"fields": fields}),
        "dense log-probs, float32": (4 * case.vocab, {}),
        "dense log-probs, bfloat16": (2 * case.vocab, {}),
        "k ids and log-probs, padded": (8 * case.k, {}),
    }
    for name, (count, facts) in others.items():
        result.append(
            Row(
                NAME,
                name,
                parameters(case, "vocab", "k"),
                facts={"bytes_per_token": count, "from": "computed", **facts},
            )
        )
    return result


def _packed_row(case: Case, policy: SparsePolicy, sampled_ids: Tensor, repeat: int, kept: int | None) -> Row:
    data, tokens = micro_batch(sampled_ids)
    unpack = partial(carry.unpack, data, tokens, k=policy.ids.shape[1], vocab_size=wire.MAX_VOCAB_SIZE)
    fields = carry.pack(policy.ids, policy.log_probs, tokens)
    for name, field in fields.items():
        data[name] = field
    back = unpack().policy
    sent = compact(policy)
    if not torch.equal(back.ids, sent.ids):
        raise RuntimeError("the carried support came back with other ids")
    used = sent.ids >= 0
    error = (back.log_probs[used] - sent.log_probs[used]).abs() / sent.log_probs[used].abs().clamp_min(1e-30)
    contender = Contender(
        "TROLL",
        {
            "pack": lambda _: carry.pack(policy.ids, policy.log_probs, tokens),
            "unpack": lambda _: unpack(),
        },
    )
    times = take_turns([contender], repeat, "cpu")
    packing, unpacking = (phase_seconds(times, "TROLL", [phase]) for phase in ("pack", "unpack"))
    facts = support_facts(policy)
    per_token = packed_bytes(fields) / sampled_ids.shape[0]
    return Row(
        NAME,
        "TROLL",
        {"tokens": sampled_ids.shape[0], "kept": "a language model's" if kept is None else kept, "k": case.k},
        "pack + unpack",
        Spread.of([a + b for a, b in zip(packing, unpacking, strict=True)]),
        facts={
            "bytes_per_token": round(per_token, 2),
            "relative_error": float(error.max()),
            "allowed_bytes": round(8 + 6 * facts["kept_ids"], 2),
            "bytes_per_field": {
                name: round(field.values().numel() * field.values().element_size() / sampled_ids.shape[0], 2)
                for name, field in fields.items()
            },
            **facts,
        },
    )


def _fixed_policy(tokens: int, kept: int) -> tuple[SparsePolicy, Tensor]:
    generator = torch.Generator().manual_seed(kept)
    log_probs = torch.log_softmax(torch.randn(tokens, kept, generator=generator), -1).sort(descending=True).values
    ids = torch.arange(kept).expand(tokens, kept) + torch.randint(100_000, (tokens, 1), generator=generator)
    sampled = torch.zeros(tokens, dtype=torch.int64)
    return SparsePolicy(ids, log_probs, sampled), ids[:, 0]


def _language_model_policy(case: Case) -> tuple[SparsePolicy, Tensor]:
    batch = make_batch(case, new=False)
    policy = select(VocabLogits.of(batch.old, batch.rows), batch.sampled_ids, Selection(case.k, DROPPED_MASS))
    return SparsePolicy(policy.ids.cpu(), policy.log_probs.cpu(), policy.sampled.cpu()), batch.sampled_ids.cpu()
