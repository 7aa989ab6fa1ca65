"""verl's stock Megatron engine on tiny models: helpers that write a model, build an engine and run its passes."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tests.device import DEVICE
from tests.distributed import batches
from tests.distributed.batches import TEMPERATURE, shard_of, with_settings
from tests.model_families import VOCAB, save


@dataclass(frozen=True)
class Layout:
    """One model and how it is split over the ranks; every field is a setting that a user would make."""

    model_path: str
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    sequence_parallel: bool = True
    use_remove_padding: bool = True
    use_fused_kernels: bool = False
    use_distributed_optimizer: bool = True
    micro_batch_size: int = 2
    use_dynamic_bsz: bool = False
    max_token_len: int = 64
    mini_batch_size: int = 8
    temperature: float = TEMPERATURE
    lr: float = 1.0
    # With Adam's usual epsilon, rounding decides where a parameter with a tiny gradient goes.
    adam_eps: float = 1.0
    router_replay: str = "disabled"
    transformer: dict[str, Any] = field(default_factory=dict)


# Layouts of dense models by number of ranks; the remaining factor is data parallel.
DENSE: dict[int, list[dict[str, Any]]] = {
    1: [{}, {"use_remove_padding": False}],
    2: [
        {},
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": False},
        {"tensor": 2, "use_remove_padding": False},
        {"pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"context": 2},
        {"context": 2, "use_remove_padding": False},
    ],
    4: [
        {"tensor": 4},
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "context": 2},
        {"tensor": 2, "use_dynamic_bsz": True, "max_token_len": 24},
    ],
}


def write_model(folder: Path, kind: str = "qwen2", *, layers: int = 4, tie: bool = False) -> str:
    """A random model with peaked outputs and a tokenizer, as verl loads them.

    Args:
        kind: ``qwen2``, ``qwen3``, ``qwen3_moe`` or ``llama``.
        tie: share the embedding's weights with the output layer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
    )
    if kind != "qwen2":
        sizes["head_dim"] = 4
    if kind == "qwen3_moe":
        sizes.update(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)
    return save(model, folder)


def make_batch(seed: int = 0, samples: int = 8) -> TensorDict:
    """The FSDP scenarios' ragged batch, with log-probabilities of an old policy other than the model."""
    batch = batches.make_batch(seed, samples).exclude("rollout_is_weights")
    mask = batch["response_mask"]
    values = -3 + 0.5 * torch.randn(mask.values().shape, generator=torch.Generator().manual_seed(seed + 1))
    batch["old_log_probs"] = torch.nested.nested_tensor_from_jagged(values, mask.offsets())
    return batch


def transformers_log_probs(model_path: str, batch: TensorDict, temperature: float = TEMPERATURE) -> list[Tensor]:
    """Log-probability of each next token of every sample (``[length - 1]``), by transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager").eval()
    results = []
    with torch.no_grad():
        for ids in batch["input_ids"].unbind():
            logits = model(ids[None]).logits[0, :-1] / temperature
            results.append(logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0])
    return results


def _engine_config() -> Any:
    """The engine's configuration on this device; on a GPU verl's own, with layers that need no TransformerEngine."""
    if DEVICE == "cpu":
        from verl_troll.cpu.megatron.config import CpuMcoreEngineConfig

        return CpuMcoreEngineConfig
    from verl.workers.config import McoreEngineConfig

    from verl_troll.cpu.megatron import bridges

    bridges.register()
    return McoreEngineConfig


def build(layout: Layout, *, forward_only: bool = False) -> Any:
    """The engine that verl's registry gives for ``layout``; first tears down this process's earlier engine."""
    from megatron.core import parallel_state
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import EngineRouterReplayConfig, HFModelConfig, McoreOptimizerConfig
    from verl.workers.engine import EngineRegistry

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    torch.manual_seed(0)
    engine = EngineRegistry.new(
        "language_model",
        "megatron",
        model_config=HFModelConfig(path=layout.model_path, use_remove_padding=layout.use_remove_padding),
        engine_config=_engine_config()(
            vanilla_mbridge=True,
            forward_only=forward_only,
            use_fused_kernels=layout.use_fused_kernels,
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            use_distributed_optimizer=layout.use_distributed_optimizer,
            router_replay=EngineRouterReplayConfig(mode=layout.router_replay),
            use_remove_padding=layout.use_remove_padding,
            use_dynamic_bsz=layout.use_dynamic_bsz,
            max_token_len_per_gpu=layout.max_token_len,
            infer_max_token_len_per_gpu=layout.max_token_len,
            micro_batch_size_per_gpu=layout.micro_batch_size,
            infer_micro_batch_size_per_gpu=layout.micro_batch_size,
            override_transformer_config={
                "sequence_parallel": layout.sequence_parallel and layout.tensor > 1,
                **layout.transformer,
            },
        ),
        optimizer_config=McoreOptimizerConfig(
            lr=layout.lr,
            lr_warmup_steps=0,
            lr_decay_style="constant",
            total_training_steps=10,
            weight_decay=0.0,
            clip_grad=1e9,
            override_optimizer_config={"adam_eps": layout.adam_eps},
        ),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def old_pass(engine: Any, batch: TensorDict, layout: Any, **extra: Any) -> dict[str, Tensor]:
    """``compute_log_prob`` as verl's worker calls it; nested outputs on the CPU, empty on ranks that have none."""
    data = with_settings(batch, layout, calculate_entropy=True, compute_loss=False, **extra)
    with engine.eval_mode():
        output = engine.infer_batch(data, loss_function=None)
    if not engine.is_mp_src_rank_with_outputs():
        return {}
    return {name: value.cpu() for name, value in output["model_output"].items()}


def vanilla_update(engine: Any, batch: TensorDict, layout: Layout) -> dict[str, Any]:
    """Metrics of one update with verl's ``ppo_loss``; empty on ranks that have none."""
    from verl.workers.config import ActorConfig
    from verl.workers.utils.losses import ppo_loss

    actor = ActorConfig(
        strategy="megatron",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=layout.micro_batch_size,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        kl_loss_type="k2",
        entropy_coeff=0.01,
    )
    data = with_settings(batch, layout, calculate_entropy=True)
    with engine.train_mode():
        output = engine.train_batch(data, functools.partial(ppo_loss, config=actor))
    engine.lr_scheduler_step()
    return output["metrics"] if engine.is_mp_src_rank_with_outputs() else {}


def exported_weights(engine: Any) -> dict[str, Tensor]:
    """The weights that verl would send to the rollout (collective)."""
    return {name: weight.detach().clone() for name, weight in engine.get_per_tensor_param()[0]}


def two_passes(layout: Layout, batch: TensorDict, steps: int = 2) -> dict[str, Any]:
    """Log-probabilities and entropies before ``steps`` updates, their gradient norms, and log-probabilities after.

    Outputs are for this rank's samples, by index in the batch; empty on ranks that have none.
    """
    engine = build(layout)
    part = shard_of(batch, engine)
    first = engine.get_data_parallel_rank() * len(part)

    def by_sample(output: dict[str, Tensor], name: str) -> dict[int, Tensor]:
        return dict(enumerate(output[name].unbind(), first)) if output else {}

    before = old_pass(engine, part, layout)
    loaded = exported_weights(engine)
    norms = [vanilla_update(engine, part, layout).get("grad_norm") for _ in range(steps)]
    return {
        "log_probs": by_sample(before, "log_probs"),
        "entropy": by_sample(before, "entropy"),
        "after": by_sample(old_pass(engine, part, layout), "log_probs"),
        "grad_norm": [float(norm) for norm in norms if norm is not None],
        "loaded": loaded,
        "trained": exported_weights(engine),
    }


def each(layouts: list[Layout], batch: TensorDict) -> list[dict[str, Any]]:
    """:func:`two_passes` of several layouts in one launch."""
    return [two_passes(layout, batch) for layout in layouts]


def resumed(layout: Layout, batch: TensorDict, folder: str) -> dict[str, Any]:
    """Weights after three updates, and after the third in a new engine that loads the second one's checkpoint."""
    engine = build(layout)
    part = shard_of(batch, engine)
    for _ in range(2):
        vanilla_update(engine, part, layout)
    engine.save_checkpoint(folder, global_step=2)
    saved = exported_weights(engine)
    vanilla_update(engine, part, layout)
    expected = exported_weights(engine)
    engine = build(layout)
    engine.load_checkpoint(folder, del_local_after_load=False)
    loaded = exported_weights(engine)
    vanilla_update(engine, part, layout)
    return {"saved": saved, "loaded": loaded, "expected": expected, "resumed": exported_weights(engine)}


def other_thread(layout: Layout, batch: TensorDict) -> dict[str, Any]:
    """What an engine's pass leaves behind in its thread, and whether it runs in a thread that did not build it."""
    engine = build(layout)
    with ThreadPoolExecutor(1) as threads:
        output = threads.submit(old_pass, engine, batch, layout).result()
    try:
        leaked = torch.zeros(1, device="cuda").device.type == "cpu"
    except (AssertionError, RuntimeError):
        leaked = False
    return {"log_probs": dict(enumerate(output["log_probs"].unbind())), "leaked": leaked}


def before_any_engine() -> dict[str, Any]:
    """Whether loading the package, the plugin or the configuration's module changed ``torch.cuda``."""
    import verl_troll.cpu.megatron.config  # noqa: F401
    from verl_troll.patches import registry

    return {
        "current_device": torch.cuda.current_device.__module__,
        "patches": [patch.name for patch in registry.applied()],
    }
