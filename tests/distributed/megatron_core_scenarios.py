"""A megatron-core GPT under its own schedule, without verl: the mathematics on logits that Megatron has sharded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl_troll.core.comparison import compare
from verl_troll.core.loss import token_terms
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits, VocabShard

VOCAB, PADDED, LENGTH, SAMPLES, MICRO_BATCHES, LAYERS = 122, 128, 12, 4, 2, 4


@dataclass(frozen=True)
class Shape:
    """How the model is split over ranks."""

    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    rule: str = "union"
    noise: float = 0.003


def _build(shape: Shape) -> Any:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from verl_troll.cpu.megatron.layers import decoder_block

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(shape.tensor, shape.pipeline)
    tensor_parallel.get_cuda_rng_tracker(inference_rng_tracker=True)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=32,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=64,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        tensor_model_parallel_size=shape.tensor,
        pipeline_model_parallel_size=shape.pipeline,
        sequence_parallel=shape.sequence_parallel,
        pipeline_dtype=torch.float32,
        # Without gates, a rank's matrix is simply a slice of the whole one.
        gated_linear_unit=False,
        deallocate_pipeline_outputs=False,
    )
    return GPTModel(
        config,
        decoder_block(config),
        vocab_size=PADDED,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def _parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters under the names that they have without pipeline parallelism."""
    for name, parameter in model.named_parameters():
        found = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
        if found:
            name = f"decoder.layers.{model.decoder.layers[int(found[1])].layer_number - 1}.{found[2]}"
        yield name, parameter


def _own(name: str, parameter: Tensor, scale: float, seed: int) -> Tensor:
    """This rank's slice of a random tensor that depends only on the parameter's name."""
    from megatron.core import parallel_state

    ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    sharded = getattr(parameter, "tensor_model_parallel", False)
    size = list(parameter.shape)
    if sharded:
        size[parameter.partition_dim] *= ranks  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)) * 1000)
    whole = torch.randn(size, generator=generator, dtype=torch.float64) * scale
    return whole.chunk(ranks, parameter.partition_dim)[rank] if sharded else whole  # type: ignore[attr-defined]


def _whole_gradient(parameter: Tensor) -> Tensor:
    """The gradient of the whole parameter (collective over tensor-parallel ranks)."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    grad = parameter.grad
    assert grad is not None
    if getattr(parameter, "sequence_parallel", False):
        # Each rank saw only its share of the tokens.
        dist.all_reduce(grad, group=group)
    if not getattr(parameter, "tensor_model_parallel", False):
        return grad
    parts = [torch.empty_like(grad) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, grad.contiguous(), group=group)
    return torch.cat(parts, dim=parameter.partition_dim)  # type: ignore[attr-defined]


def losses_and_gradients(shape: Shape) -> dict[str, Any]:
    """Old policy, a change of every weight, then losses by micro-batch and gradients by parameter.

    The last columns of the output layer are padding whose weights would dominate every softmax.
    """
    from verl_troll.cpu.megatron.device import cpu_as_accelerator

    with cpu_as_accelerator():
        return _losses_and_gradients(shape)


def _losses_and_gradients(shape: Shape) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model = _build(shape)
    shard_group = parallel_state.get_tensor_model_parallel_group()
    with torch.no_grad():
        for name, parameter in _parameters(model):
            parameter.copy_(1 + _own(name, parameter, 0.2, 0) if "norm" in name else _own(name, parameter, 0.25, 0))
            if name.startswith("output_layer"):
                start = parallel_state.get_tensor_model_parallel_rank() * parameter.shape[0]
                parameter[max(0, VOCAB - start) :] *= 1000

    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCAB, (MICRO_BATCHES, SAMPLES, LENGTH + 1), generator=generator)
    advantages = torch.randn(MICRO_BATCHES, SAMPLES * LENGTH, generator=generator, dtype=torch.float64)
    old: dict[int, SparsePolicy] = {}
    rows = torch.arange(SAMPLES * LENGTH)
    settings: dict[str, Any] = {"k": 16, "dropped_mass": 1e-5}

    def forward_step(batches: Iterator[int], model: Any) -> Any:
        index = next(batches)
        sampled = tokens[index, :, 1:].reshape(-1)
        places = torch.arange(LENGTH).expand(SAMPLES, LENGTH)
        output = model(input_ids=tokens[index, :, :-1], position_ids=places, attention_mask=None)

        def loss_function(output: Tensor) -> tuple[Tensor, dict[str, Any]]:
            logits = output.flatten(0, 1)
            shard = VocabShard.even(logits.shape[-1], VOCAB, shard_group)
            if index not in old:
                old[index] = select(VocabLogits.of(logits, rows, shard), sampled, Selection(**settings))
                return logits.new_zeros(()), {}
            terms = token_terms(
                compare(shape.rule, VocabLogits.of(logits, rows, shard), old[index], Selection(**settings)), 0.05
            )
            weights = advantages[index].to(logits.dtype)
            loss = (-terms.log_ratio.exp() * weights + terms.regression_kl).mean()
            return loss, {"loss": loss.item(), "projected": terms.projected.float().mean().item()}

        return output, loss_function

    def run(forward_only: bool) -> list[dict[str, Any]]:
        reports: list[dict[str, Any]] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(range(MICRO_BATCHES)),
            model=model,
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=SAMPLES,
            forward_only=forward_only,
        )
        return reports

    run(forward_only=True)
    with torch.no_grad():
        for name, parameter in _parameters(model):
            if not name.startswith("output_layer"):
                parameter.add_(_own(name, parameter, shape.noise, 1).to(parameter.dtype))
    reports = run(forward_only=False)
    return {
        "old": {index: (policy.ids, policy.log_probs) for index, policy in old.items()},
        "reports": reports,
        "gradients": {name: _whole_gradient(parameter) for name, parameter in _parameters(model)},
    }


def each(shapes: list[Shape]) -> list[dict[str, Any]]:
    """:func:`losses_and_gradients` of several shapes in one launch."""
    return [losses_and_gradients(shape) for shape in shapes]
