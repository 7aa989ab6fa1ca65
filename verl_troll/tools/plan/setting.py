"""The numbers that describe a run, and the model sizes from a Hugging Face configuration."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from verl_troll.core.kernels import MAX_K_OF_TERMS
from verl_troll.core.wire import MAX_K, MAX_VOCAB_SIZE

Backend = Literal["fsdp", "megatron"]
Support = Literal["union", "anchored"]
Form = Literal["triton", "torch"]
BACKENDS: tuple[str, ...] = get_args(Backend)
SUPPORTS: tuple[str, ...] = get_args(Support)
FORMS: tuple[str, ...] = get_args(Form)
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class PlanError(ValueError):
    """A number is out of range or contradicts another; the message names the option."""


@dataclass(frozen=True)
class Model:
    """Sizes of a language model; parameters include the embedding and the head.

    Attributes:
        active_parameters: used per token; fewer than ``parameters`` in a mixture of experts.
        tied: embedding and head share one weight.
    """

    vocab: int
    hidden: int
    parameters: float
    active_parameters: float
    tied: bool = False


@dataclass(frozen=True)
class Hardware:
    """Rates of one GPU and its links, per second. Defaults are nominal, for one H100 SXM in a DGX H100.

    Attributes:
        flops: dense bfloat16 matrix products; the data sheet's 1,979e12 assumes sparsity.
        memory_bandwidth: bytes of GPU memory, by its data sheet; the formulas account for the achieved rate.
        link_bandwidth: bytes in one direction inside a node; the data sheet's 900e9 counts both.
        network_bandwidth: bytes of one 400 Gb/s port per GPU between nodes.
        latency: seconds per collective, an assumption.
        launch: seconds per small GPU operation, an assumption.
        gpus_per_node: GPUs that ``link_bandwidth`` connects.
    """

    flops: float = 989e12
    memory_bandwidth: float = 3.35e12
    link_bandwidth: float = 450e9
    network_bandwidth: float = 50e9
    latency: float = 20e-6
    launch: float = 5e-6
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        tokens: response tokens per step, of all samples.
        prompt_tokens: prompt tokens per step, of all samples.
        micro_batch_tokens: tokens per micro-batch of a data-parallel rank, prompts included.
        cp: ranks that share the tokens of a micro-batch (Megatron's context parallel, FSDP's Ulysses).
        mini_batches: optimizer steps per epoch.
        sequences: samples per step; 0 if unknown, and then their padding is left out.
        kept_ids: mean number of ids kept per token.
        fused: ``use_fused_kernels``: the head is fused with the reading of its logits.
        entropy: the update needs the entropy (a bonus, or ``calculate_entropy``).
        form: Triton kernels (the default on GPUs) or their torch forms.
        dtype_bytes: bytes per logit in the engine.
    """

    model: Model
    backend: Backend
    tokens: int
    prompt_tokens: int
    micro_batch_tokens: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    epochs: int = 1
    mini_batches: int = 1
    sequences: int = 0
    k: int = 64
    kept_ids: float = 10.0
    support: Support = "union"
    fused: bool = False
    entropy: bool = False
    reuse_logits: bool = True
    form: Form = "triton"
    dtype_bytes: int = 2
    hardware: Hardware = Hardware()

    def __post_init__(self) -> None:
        model, hardware = self.model, self.hardware
        counts = ("tokens", "micro_batch_tokens", "tp", "pp", "cp", "dp", "epochs", "mini_batches")
        for name in counts:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("prompt_tokens", "sequences"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require(2 <= model.vocab <= MAX_VOCAB_SIZE, "vocab", model.vocab, f"between 2 and {MAX_VOCAB_SIZE}")
        _require(model.hidden >= 1, "hidden", model.hidden, "at least 1")
        embeddings = model.vocab * model.hidden * (1 if model.tied else 2)
        for name in ("parameters", "active_parameters"):
            value, words = getattr(model, name), f"more than embedding and head hold together, {embeddings:,}"
            _require(math.isfinite(value) and value > embeddings, name, value, words)
        _require(
            model.active_parameters <= model.parameters,
            "active_parameters",
            model.active_parameters,
            f"at most --parameters, {model.parameters:g}",
        )
        _require(1 <= self.k <= MAX_K, "k", self.k, f"between 1 and {MAX_K}")
        kernels_hold = self.form != "triton" or self.k <= MAX_K_OF_TERMS
        _require(kernels_hold, "k", self.k, f"at most {MAX_K_OF_TERMS}, or --kernels torch must be given")
        most = min(self.k + 1, model.vocab)
        _require(1 <= self.kept_ids <= most, "kept_ids", self.kept_ids, f"between 1 and {most} (k and the sampled id)")
        for name, allowed in (("backend", BACKENDS), ("support", SUPPORTS), ("form", FORMS)):
            _require(getattr(self, name) in allowed, name, getattr(self, name), f"one of {', '.join(allowed)}")
        _require(self.dtype_bytes in DTYPE_BYTES.values(), "dtype_bytes", self.dtype_bytes, "2 or 4")
        if self.backend == "fsdp":
            for name in ("tp", "pp"):
                _require(getattr(self, name) == 1, name, getattr(self, name), "1 with --backend fsdp")
        samples_fit = self.mini_batches * self.dp <= self.tokens + self.prompt_tokens
        _require(samples_fit, "mini_batches", self.mini_batches, "so many that each rank has a token in each")
        for field in fields(hardware):
            value = getattr(hardware, field.name)
            least_is_zero = field.name in ("latency", "launch")
            fits = math.isfinite(value) and (value >= 0 if least_is_zero else value > 0)
            _require(fits, field.name, value, "finite and " + ("at least 0" if least_is_zero else "above 0"))


def _require(fits: bool, name: str, value: object, allowed: str) -> None:
    if not fits:
        raise PlanError(f"--{name.replace('_', '-')} must be {allowed}, got {value!r}")


def model_from_config(path: Path) -> Model:
    """Model sizes from a Hugging Face ``config.json``, or from its folder.

    Raises:
        PlanError: the file is missing, or the parameters of its architecture cannot be counted; the message says
            which numbers to give instead.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"--model {path}: no Hugging Face configuration can be read from {file}: {error}") from error
    # A vision-language model keeps its text sizes apart from its vision tower's.
    tied = config.get("tie_word_embeddings", False)
    config = config.get("text_config", config)
    tied = bool(config.get("tie_word_embeddings", tied))
    try:
        hidden, layers, vocab = (int(config[key]) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
        trunk, active = _layer_parameters(config, hidden)
    except (KeyError, TypeError) as error:
        raise PlanError(
            f"--model {file}: cannot count the parameters ({error}); in its place give --vocab, --hidden and "
            "--parameters"
        ) from error
    embeddings = vocab * hidden * (1 if tied else 2)
    return Model(vocab, hidden, layers * trunk + embeddings, layers * active + embeddings, tied)


def _layer_parameters(config: dict[str, Any], hidden: int) -> tuple[int, int]:
    """Weights of one layer, in total and used per token; norms and biases are too few to count."""
    odd = [key for key in ("kv_lora_rank", "first_k_dense_replace", "mlp_only_layers") if config.get(key)]
    if odd:
        raise TypeError(f"unequal layers or another attention: {', '.join(odd)}")
    heads = config["num_attention_heads"]
    key_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head_size * (heads + key_heads)
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    if not experts:
        dense = attention + 3 * hidden * config["intermediate_size"]
        return dense, dense
    if config.get("decoder_sparse_step", 1) != 1:
        raise TypeError("unequal layers: decoder_sparse_step")
    size = config.get("moe_intermediate_size") or config["intermediate_size"]
    shared = attention + hidden * experts + 3 * hidden * (config.get("shared_expert_intermediate_size") or 0)
    return shared + 3 * hidden * size * experts, shared + 3 * hidden * size * config["num_experts_per_tok"]
