"""Scenarios that ranks run on verl's real FSDP engines; results come back as plain tensors and floats."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from tests.distributed.batches import TEMPERATURE, VOCAB, by_sample, shard_of, with_old_policy, with_settings


@dataclass(frozen=True)
class Setup:
    """One configuration of engine, method and batch; every field is a setting that a user would make."""

    model_path: str
    troll: dict[str, Any] | None = field(default_factory=dict)
    # The strategy "fsdp" needs an accelerator.
    strategy: str = "fsdp2"
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: int | None = None
    micro_batch_size: int = 4
    use_dynamic_bsz: bool = False
    max_token_len: int = 64
    use_remove_padding: bool = True
    use_fused_kernels: bool = False
    fused_backend: str = "torch"
    ulysses: int = 1
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.1
    entropy_coeff: float = 0.0
    rollout_weights: bool = False
    lora_rank: int = 0
    merge_lora: bool = False
    temperature: float = TEMPERATURE
    mini_batch_size: int = 8
    lr: float = 3e-2
    adam_eps: float = 1e-8
    param_dtype: str = "fp32"
    load_tokenizer: bool = False
    save_contents: tuple[str, ...] = ("model", "optimizer", "extra")


def write_model(folder: Path, *, attention: bool = True) -> str:
    """A tiny random Qwen2 with peaked outputs, saved as verl loads it; no tokenizer is needed at this level.

    Without ``attention`` no token sees another: sequence-parallel attention needs a flash kernel, which CPUs lack.
    """
    from tests.tiny_model import tiny_qwen2

    model = tiny_qwen2(VOCAB)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
        model.lm_head.weight.mul_(3)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(float(attention))
    model.save_pretrained(folder)
    return str(folder)


def actor_of(setup: Setup, engine_config: Any) -> Any:
    """The actor's configuration; building it passes TROLL's settings, if any, to the engine's configuration."""
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    from verl_troll.plugin.actor_config import TrollPolicyLossConfig
    from verl_troll.plugin.backends import actor_config
    from verl_troll.plugin.settings import HostSettings, TrollConfig

    common: dict[str, Any] = dict(
        strategy=setup.strategy,
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=setup.micro_batch_size,
        loss_agg_mode=setup.loss_agg_mode,
        loss_scale_factor=setup.loss_scale_factor,
        use_kl_loss=setup.use_kl_loss,
        kl_loss_coef=setup.kl_loss_coef,
        kl_loss_type="k2",
        entropy_coeff=setup.entropy_coeff,
        fsdp_config=engine_config,
    )
    if setup.troll is None:
        return FSDPActorConfig(policy_loss=PolicyLossConfig(loss_mode="vanilla"), **common)
    settings = TrollConfig(**setup.troll, host=HostSettings(external_lib="verl_troll.plugin"))
    return actor_config(policy_loss=TrollPolicyLossConfig(loss_mode="troll", troll=settings), **common)


def build(setup: Setup) -> tuple[Any, Any, Any]:
    """Engine, verl's loss function and the actor's configuration, built through verl's own registry and dataclasses."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry
    from verl.workers.utils.losses import ppo_loss

    import verl_troll.plugin  # noqa: F401

    torch.manual_seed(0)
    model = HFModelConfig(
        path=setup.model_path,
        load_tokenizer=setup.load_tokenizer,
        override_config={"attn_implementation": "sdpa"},
        enable_gradient_checkpointing=False,
        use_remove_padding=setup.use_remove_padding,
        use_fused_kernels=setup.use_fused_kernels,
        fused_kernel_options={"impl_backend": setup.fused_backend},
        lora_rank=setup.lora_rank,
        lora={"merge": setup.merge_lora},
    )
    engine_config = FSDPEngineConfig(
        strategy=setup.strategy,
        use_torch_compile=False,
        mixed_precision={"param_dtype": setup.param_dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        use_dynamic_bsz=setup.use_dynamic_bsz,
        max_token_len_per_gpu=setup.max_token_len,
        infer_max_token_len_per_gpu=setup.max_token_len,
        micro_batch_size_per_gpu=setup.micro_batch_size,
        infer_micro_batch_size_per_gpu=setup.micro_batch_size,
        ulysses_sequence_parallel_size=setup.ulysses,
        use_remove_padding=setup.use_remove_padding,
    )
    actor = actor_of(setup, engine_config)
    engine = EngineRegistry.new(
        "language_model",
        setup.strategy,
        model_config=model,
        engine_config=engine_config,
        optimizer_config=FSDPOptimizerConfig(
            lr=setup.lr, clip_grad=1e9, weight_decay=0.0, override_optimizer_config={"eps": setup.adam_eps}
        ),
        checkpoint_config=CheckpointConfig(save_contents=list(setup.save_contents)),
    )
    engine.initialize()
    return engine, functools.partial(ppo_loss, config=actor), actor


def old_pass(engine: Any, batch: TensorDict, setup: Setup, **extra: Any) -> dict[str, Tensor]:
    """``compute_log_prob`` as verl's worker calls it; returns nested model outputs on the CPU."""
    data = with_settings(batch, setup, calculate_entropy=True, compute_loss=False, **extra)
    with engine.eval_mode():
        output = engine.infer_batch(data, loss_function=None)["model_output"]
    return {name: value.cpu() for name, value in output.items()}


def perturb(engine: Any, seed: int, scale: float) -> None:
    """Add noise, the same on all ranks, to every non-zero parameter, as if the policy had been updated."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(engine.module.named_parameters())):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + index)) * scale
            if isinstance(parameter, DTensor):
                noise = distribute_tensor(noise.to(parameter.device), parameter.device_mesh, parameter.placements)
            parameter.add_(noise.to(parameter.device) * (parameter != 0))


def gradients(engine: Any) -> dict[str, Tensor]:
    """Full gradients by parameter name (collective)."""
    from torch.distributed.tensor import DTensor

    result = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            result[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return result


def _aggregate(metrics: dict[str, Any]) -> dict[str, float]:
    """Reduce one mini-batch's metrics over micro-batches and data-parallel ranks, as verl's worker does."""
    from verl.utils.metric import Metric
    from verl.utils.torch_functional import allgather_dict_into_dict

    gathered = allgather_dict_into_dict(data=metrics, group=dist.group.WORLD)
    return {
        name: float(Metric.aggregate_dp(values)) for name, values in gathered.items() if isinstance(values[0], Metric)
    }


def loss_and_gradient(setup: Setup, batch: TensorDict, noise: float = 0.006) -> dict[str, Any]:
    """Old pass, a change of the policy, then loss, metrics and full gradients of one mini-batch."""
    engine, loss_function, _ = build(setup)
    if not setup.rollout_weights:
        batch = batch.exclude("rollout_is_weights")
    shard = shard_of(batch, engine)
    output = old_pass(engine, shard, setup)
    shard = with_old_policy(shard, output)
    perturb(engine, seed=1, scale=noise)
    data = with_settings(shard, setup, calculate_entropy=setup.entropy_coeff != 0)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        result = engine.forward_backward_batch(data, loss_function, forward_only=False)
        loss = torch.tensor(sum(result["loss"]), dtype=torch.float64)
        dist.all_reduce(loss, op=dist.ReduceOp.SUM)
        grads = gradients(engine)
        metrics = _aggregate(result["metrics"])
    return {
        "loss": loss.item() / dist.get_world_size(),
        "gradients": grads,
        "metrics": metrics,
        "engine": type(engine).__name__,
    }


def each(setups: list[Setup], batch: TensorDict, noise: float = 0.006) -> list[dict[str, Any]]:
    """:func:`loss_and_gradient` of several setups in one launch."""
    return [loss_and_gradient(setup, batch, noise) for setup in setups]


def old_policies(setups: list[Setup], batch: TensorDict) -> list[dict[str, list[Tensor]]]:
    """Model outputs of the old pass by name, one tensor per sample, for several setups."""
    results = []
    for setup in setups:
        engine, _, _ = build(setup)
        output = old_pass(engine, shard_of(batch, engine), setup)
        rows = by_sample(output)
        results.append({name: [row[name] for row in rows] for name in rows[0]})
    return results


def lora_passes(setup: Setup, batch: TensorDict) -> dict[str, Any]:
    """Old pass and reference pass through one LoRA engine with a nonzero adapter, then an update."""
    engine, loss_function, _ = build(setup)
    perturb(engine, seed=5, scale=0.1)
    batch = batch.exclude("rollout_is_weights")
    old = old_pass(engine, batch, setup)
    data = with_settings(batch, setup, calculate_entropy=False, compute_loss=False)
    with engine.eval_mode(), engine.disable_adapter():
        reference = dict(engine.infer_batch(data, loss_function=None)["model_output"])
    data = with_settings(with_old_policy(batch, old), setup, calculate_entropy=False)
    with engine.train_mode():
        result = engine.train_batch(data, loss_function)
    return {
        "old_fields": sorted(old),
        "reference_fields": sorted(reference),
        "reference": reference["log_probs"].values(),
        "moved": (old["log_probs"].values() - reference["log_probs"].values()).abs().max().item(),
        "trained": sorted(name for name, weight in engine.module.named_parameters() if weight.requires_grad),
        "grad_norm": float(result["metrics"]["grad_norm"]),
    }


def refused_heads(paths: dict[str, str], batch: TensorDict) -> dict[str, str]:
    """By name, the error that an old pass with fused kernels raises for each model in ``paths``."""
    found = {}
    for name, path in paths.items():
        setup = Setup(path, use_fused_kernels=True)
        engine, _, _ = build(setup)
        try:
            old_pass(engine, shard_of(batch, engine), setup)
            found[name] = "no error"
        except ValueError as error:
            found[name] = str(error)
    return found


def update_without_support(setup: Setup, batch: TensorDict) -> str:
    """The error raised by an update whose batch lost the old policy's support."""
    engine, loss_function, _ = build(setup)
    output = old_pass(engine, batch, setup)
    data = with_old_policy(batch, {name: v for name, v in output.items() if not name.startswith("troll_")})
    return _error(engine, with_settings(data, setup, calculate_entropy=False), loss_function)


def troll_loss_on_stock_engine(setup: Setup, batch: TensorDict) -> str:
    """verl's own engine under the registered loss ``troll``: the error that prevents a silent stock run."""
    import verl.workers.engine.fsdp.transformer_impl as stock
    from verl.workers.engine import EngineRegistry

    registry = EngineRegistry._engines["language_model"]["fsdp2"]
    engine, loss_function, _ = build(setup)
    output = old_pass(engine, batch, setup)
    data = with_settings(with_old_policy(batch, output), setup, calculate_entropy=False)
    engine.__class__ = stock.FSDPEngineWithLMHead
    assert registry["cuda"] is stock.FSDPEngineWithLMHead
    return _error(engine, data, loss_function)


def _error(engine: Any, data: TensorDict, loss_function: Any) -> str:
    with engine.train_mode():
        try:
            engine.forward_backward_batch(data, loss_function, forward_only=False)
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def snapshots(setup: Setup, batch: TensorDict) -> dict[str, Tensor]:
    """Log-probs before and after a change of the policy, and again after restoring verl's snapshots of both in turn."""
    from verl.utils import fsdp_utils

    engine, _, _ = build(setup)
    shard = shard_of(batch, engine)

    def log_probs() -> Tensor:
        return old_pass(engine, shard, setup)["log_probs"].values().clone()

    found = {"before": log_probs()}
    before = fsdp_utils.fsdp2_sharded_save_to_cpu(engine.module)
    perturb(engine, seed=1, scale=0.05)
    found["after"] = log_probs()
    after = fsdp_utils.fsdp2_sharded_save_to_cpu(engine.module)
    fsdp_utils.fsdp2_sharded_load_from_cpu(engine.module, *before)
    found["restored before"] = log_probs()
    fsdp_utils.fsdp2_sharded_load_from_cpu(engine.module, *after)
    found["restored after"] = log_probs()
    return found


def train_steps_after_move(setup: Setup, batch: TensorDict, steps: int) -> list[dict[str, float]]:
    """:func:`train_steps` for a policy that has left the region."""
    return train_steps(setup, batch, steps, noise=0.05)


def train_steps(setup: Setup, batch: TensorDict, steps: int, noise: float = 0.0) -> list[dict[str, float]]:
    """Optimizer steps on one mini-batch after a single old pass; returns metrics by step."""
    engine, loss_function, _ = build(setup)
    batch = batch.exclude("rollout_is_weights")
    shard = shard_of(batch, engine)
    shard = with_old_policy(shard, old_pass(engine, shard, setup))
    perturb(engine, seed=1, scale=noise)
    history = []
    for _ in range(steps):
        with engine.train_mode():
            data = with_settings(shard, setup, calculate_entropy=setup.entropy_coeff != 0)
            result = engine.train_batch(data, loss_function)
        grad_norm = float(result["metrics"].pop("grad_norm"))
        history.append({**_aggregate(result["metrics"]), "grad_norm": grad_norm})
    return history


def broken_step(setup: Setup, batch: TensorDict) -> dict[str, Any]:
    """An update of ``batch`` as it is; how far it moved the parameters, and its metrics."""
    engine, loss_function, _ = build(setup)
    batch = batch.exclude("rollout_is_weights")
    shard = shard_of(batch, engine)
    data = with_settings(with_old_policy(shard, old_pass(engine, shard, setup)), setup, calculate_entropy=False)
    before = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    with engine.train_mode():
        result = engine.train_batch(data, loss_function)
        now = dict(engine.module.named_parameters())
        moved = max(float((now[name].detach() - old).abs().max()) for name, old in before.items())
    return {
        "moved": moved,
        "grad_norm": float(result["metrics"].pop("grad_norm")),
        "loss": sum(result["loss"]),
        **_aggregate(result["metrics"]),
    }


def broken_steps(setups: list[Setup], batch: TensorDict) -> list[dict[str, Any]]:
    """:func:`broken_step` of several setups in one launch."""
    return [broken_step(setup, batch) for setup in setups]
