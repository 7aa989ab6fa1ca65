"""Random models and batches, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of two batches, one for comparisons and one for timing."""

    vocab: int
    hidden: int
    layers: int
    prompt: tuple[int, int]
    response: tuple[int, int]
    timed_prompt: tuple[int, int]
    timed_response: tuple[int, int]
    repeat: int
    heads: tuple[int, int] = (8, 4)
    intermediate: int = 0


SIZES = {
    "full": Size(151_936, 512, 4, (16, 64), (32, 128), (64, 128), (512, 512), repeat=3),
    "tiny": Size(512, 32, 2, (2, 7), (3, 12), (2, 7), (3, 12), repeat=1),
    # Qwen2.5-1.5B's.
    "model": Size(
        *(151_936, 1536, 28), (16, 64), (32, 128), (256, 512), (1024, 1024), repeat=5, heads=(12, 2), intermediate=8960
    ),
}


def make_batch(size: Size, *, timed: bool = False) -> Any:
    """A ragged batch of random tokens with advantages, without the fields that only some scenarios need."""
    from tests.distributed import batches

    batch = batches.make_batch(
        vocab=size.vocab,
        prompt_length=size.timed_prompt if timed else size.prompt,
        response_length=size.timed_response if timed else size.response,
    )
    return batch.exclude("rollout_is_weights", "ref_log_prob")


def sampled(batch: Any, path: str, device: str) -> Any:
    """The batch with responses sampled from the model at ``path`` by the embedded rollout's code."""
    from transformers import AutoModelForCausalLM

    from verl_troll.embedded.generation import Request, generate

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    prompts = [tuple(prompt.tolist()) for prompt in batch["prompts"].unbind()]
    lengths = batch["responses"].offsets().diff().tolist()
    requests = [
        Request(prompt, length, noise=(number,))
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        if length
    ]
    completions = iter(generate(model, requests))
    responses = [next(completions).token_ids if length else [] for length in lengths]
    sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    batch = batch.clone()
    for name, rows in (("responses", responses), ("input_ids", sequences)):
        values = torch.tensor([token for row in rows for token in row])
        batch[name] = torch.nested.nested_tensor_from_jagged(values, batch[name].offsets())
    return batch


def write_model(folder: Path, size: Size, device: str, *, tied: bool) -> str:
    """Write a random Qwen2 whose outputs are as peaked as a trained model's; return its path."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate or 4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads[0],
        num_key_value_heads=size.heads[1],
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device(device), torch.no_grad():
        model = Qwen2ForCausalLM(config)
        for layer in model.model.layers:
            for weight in (weight for weight in layer.parameters() if weight.ndim == 2):
                weight.normal_(0, weight.shape[1] ** -0.5)
            # Larger than the embedding, so a tied head does not repeat its input.
            layer.mlp.down_proj.weight.mul_(20)
        model.lm_head.weight.mul_(10 / (model.lm_head.weight.std() * size.hidden**0.5))
    model.save_pretrained(folder)
    return str(folder)
