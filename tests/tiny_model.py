"""The random Qwen2 shared by tests: two layers, with a forward pass in milliseconds."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def tiny_qwen2(
    vocab_size: int, *, pad: int = 0, end: int = 1, initializer_range: float = 0.02, hidden_size: int = 32
) -> Qwen2ForCausalLM:
    """A float32 model whose weights depend only on the arguments."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=initializer_range,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return Qwen2ForCausalLM(config)
