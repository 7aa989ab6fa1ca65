"""Batches in verl's no-padding format, and what verl's trainer and workers do to them around an engine's passes."""

from __future__ import annotations

import random
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tests.rounding import last_place

# All ids are below this; a model's vocabulary may be larger.
VOCAB = 61
TEMPERATURE = 0.8


def make_batch(
    seed: int = 0,
    samples: int = 8,
    *,
    vocab: int = VOCAB,
    prompt_length: tuple[int, int] = (2, 7),
    response_length: tuple[int, int] = (3, 12),
) -> TensorDict:
    """Ragged prompts and responses: one response is empty, one is fully masked, one has masked turns inside."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    prompts, responses, masks = [], [], []
    for index in range(samples):
        prompt = torch.randint(2, vocab, (rng.randint(*prompt_length),), generator=generator)
        response = torch.randint(2, vocab, (rng.randint(*response_length),), generator=generator)
        mask = torch.ones(len(response), dtype=torch.long)
        if index == 1:
            response, mask = response[:0], mask[:0]
        elif index == 3:
            mask[:] = 0
        elif index == 5:
            mask[1:3] = 0
        prompts.append(prompt)
        responses.append(response)
        masks.append(mask)
    sequences = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    advantages = [torch.randn(len(r), generator=generator) for r in responses]
    weights = [torch.rand(len(r), generator=generator) * 1.5 for r in responses]
    reference = [-3 + 0.5 * torch.randn(len(r), generator=generator) for r in responses]

    def nested(rows: list[Tensor]) -> Tensor:
        offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
        return torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets)

    return TensorDict(
        {
            "input_ids": nested(sequences),
            "position_ids": nested([torch.arange(len(s)) for s in sequences]),
            "prompts": nested(prompts),
            "responses": nested(responses),
            "response_mask": nested(masks),
            "loss_mask": nested(masks),
            "advantages": nested(advantages),
            "rollout_is_weights": nested(weights),
            "ref_log_prob": nested(reference),
        },
        batch_size=[samples],
    )


def with_settings(batch: TensorDict, setup: Any, **extra: Any) -> TensorDict:
    """A copy of ``batch`` with what verl's workers add to it; ``setup`` may come from any scenario."""
    from verl.utils import tensordict_utils as tu

    batch = batch.clone()
    tu.assign_non_tensor(
        batch,
        use_remove_padding=setup.use_remove_padding,
        use_dynamic_bsz=setup.use_dynamic_bsz,
        max_token_len_per_gpu=setup.max_token_len,
        micro_batch_size_per_gpu=setup.micro_batch_size,
        use_fused_kernels=setup.use_fused_kernels,
        temperature=setup.temperature,
        global_batch_size=setup.mini_batch_size,
        pad_token_id=0,
        **extra,
    )
    return batch


def shard_of(batch: TensorDict, engine: Any) -> TensorDict:
    """This data-parallel rank's part of the batch, as verl dispatches it."""
    from verl.utils import tensordict_utils as tu

    return tu.chunk_tensordict(batch, engine.get_data_parallel_size())[engine.get_data_parallel_rank()]


def by_sample(output: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """One dictionary per sample of nested model outputs, the support decoded to ids and log-probabilities."""
    from verl_troll.plugin import carry

    rows = [dict(zip(output, row, strict=True)) for row in zip(*(v.unbind() for v in output.values()), strict=True)]
    for row in rows:
        if carry.SUPPORT in row:
            row["troll_old_ids"], row["troll_old_log_probs"] = carry.unpack_row(row.pop(carry.SUPPORT))
    return rows


def with_old_policy(batch: TensorDict, output: dict[str, Tensor]) -> TensorDict:
    """The batch with the fields that the old pass adds, as verl's trainer stores them."""
    from verl.workers.utils.padding import response_from_nested

    batch = batch.clone()
    batch["old_log_probs"] = response_from_nested(output["log_probs"], batch["response_mask"])
    for name, value in output.items():
        if name.startswith("troll_"):
            batch[name] = value
    return batch


def with_broken_advantage(batch: TensorDict, value: float) -> TensorDict:
    """The batch, with this advantage at the last token that takes part."""
    batch = batch.clone()
    advantages = batch["advantages"].values().clone()
    advantages[batch["response_mask"].values().nonzero()[-1]] = value
    batch["advantages"] = torch.nested.nested_tensor_from_jagged(advantages, batch["advantages"].offsets())
    return batch


def all_masked(batch: TensorDict) -> TensorDict:
    """The batch, with no token that takes part."""
    batch = batch.clone()
    for name in ("response_mask", "loss_mask"):
        mask = batch[name]
        batch[name] = torch.nested.nested_tensor_from_jagged(torch.zeros_like(mask.values()), mask.offsets())
    return batch


def assert_loss_at_ratio_one(loss: float, batch: TensorDict) -> None:
    """At ratio 1 the policy loss, averaged over tokens, is the negative mean advantage."""
    advantages = batch["advantages"].values()[batch["response_mask"].values().bool()].double()
    # Advantages have both signs and are summed in some order: sums are as large as the advantages, their mean is not.
    # Micro-batch, batch and average each round once or twice.
    assert abs(loss + advantages.mean().item()) <= 4 * last_place(advantages.abs().mean())


def as_v0(batch: TensorDict) -> TensorDict:
    """A copy of ``batch`` as verl's v0 trainers hand it to their workers: only the sequences are without padding."""
    from verl.workers.utils.padding import left_right_2_no_padding

    def ones(rows: list[Tensor]) -> list[Tensor]:
        return [torch.ones_like(row) for row in rows]

    def left(rows: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")

    def right(rows: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    rows = {name: list(value.unbind()) for name, value in batch.items() if isinstance(value, Tensor)}
    prompts, responses = rows.pop("prompts"), rows.pop("responses")
    attention_mask = torch.cat([left(ones(prompts)), right(ones(responses))], dim=-1)
    columns = {
        "prompts": left(prompts),
        "responses": right(responses),
        "input_ids": torch.cat([left(prompts), right(responses)], dim=-1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(-1) - 1).clamp_min(0),
    }
    for name in rows:
        # The engine adds the support.
        columns.setdefault(name, batch[name] if name.startswith("troll_") else right(rows[name]))
    del columns["loss_mask"]
    return left_right_2_no_padding(TensorDict(columns, batch_size=batch.batch_size))
