"""TROLL on verl's real Megatron engine, run by ranks; results come back as plain tensors and floats."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tensordict import TensorDict
from torch import Tensor

from tests.distributed import megatron_stock as stock
from tests.distributed.batches import by_sample, shard_of, with_old_policy, with_settings
from tests.distributed.megatron_stock import Layout
from tests.model_families import VOCAB


def loss_function(engine: Any, layout: Layout, troll: dict[str, Any], **actor_settings: Any) -> Any:
    """verl's loss; building the actor's configuration around the engine's passes the settings to the engine."""
    from verl.workers.utils.losses import ppo_loss

    from verl_troll.plugin.actor_config import TrollPolicyLossConfig
    from verl_troll.plugin.backends import actor_config
    from verl_troll.plugin.settings import HostSettings, TrollConfig

    settings = TrollConfig(**troll, host=HostSettings(external_lib="verl_troll.plugin"))
    actor = actor_config(
        strategy="megatron",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=layout.micro_batch_size,
        policy_loss=TrollPolicyLossConfig(loss_mode="troll", troll=settings),
        megatron=engine.engine_config,
        **actor_settings,
    )
    return functools.partial(ppo_loss, config=actor)


def _shared(engine: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
    """This data-parallel rank's old-pass output, shared with every rank; normally verl's controller does that."""
    outputs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outputs, (engine.get_data_parallel_rank(), output))
    return next(found for rank, found in outputs if rank == engine.get_data_parallel_rank() and found)


def _metrics(engine: Any, output: dict[str, Any]) -> dict[str, float]:
    """Metrics of one mini-batch reduced over data-parallel ranks, as verl's worker does (collective)."""
    from verl.utils.metric import Metric

    gathered: list[Any] = [None] * dist.get_world_size()
    own = {**output["metrics"], "loss": sum(output["loss"])} if engine.is_mp_src_rank_with_outputs() else None
    dist.all_gather_object(gathered, own)
    rows = [row for row in gathered if row is not None]
    result = {"grad_norm": float(rows[0]["grad_norm"]), "loss": sum(row["loss"] for row in rows) / len(rows)}
    for name, value in rows[0].items():
        if isinstance(value, Metric):
            result[name] = float(Metric.aggregate_dp([row[name] for row in rows]))
    return result


def old_passes(layout: Layout, troll: dict[str, Any], batch: TensorDict) -> tuple[dict[int, Any], dict[int, Any]]:
    """Old-pass outputs by sample: with TROLL, and with verl's own pass on the same engine without settings."""
    engine = stock.build(layout)
    verls = _shared(engine, stock.old_pass(engine, batch, layout))
    loss_function(engine, layout, troll)
    ours = _shared(engine, stock.old_pass(engine, batch, layout))
    return _by_sample(ours), _by_sample(verls)


def _by_sample(output: dict[str, Tensor], first: int = 0) -> dict[int, dict[str, Tensor]]:
    return {first + index: row for index, row in enumerate(by_sample(output))}


def train(layout: Layout, troll: dict[str, Any], batch: TensorDict, steps: int = 3, **actor: Any) -> dict[str, Any]:
    """Old pass, then ``steps`` optimizer steps on the same mini-batch.

    ``old``: output of the old pass by sample; ``history``: metrics by step; ``weights``: on the first rank, exported
    after the last step.
    """
    return _train(stock.build(layout), layout, troll, batch, steps, **actor)


def _train(
    engine: Any, layout: Layout, troll: dict[str, Any], batch: TensorDict, steps: int, **actor: Any
) -> dict[str, Any]:
    loss = loss_function(engine, layout, troll, **actor)
    replay = {"enable_routing_replay": True} if layout.router_replay != "disabled" else {}
    part = shard_of(batch, engine)
    output = _shared(engine, stock.old_pass(engine, part, layout, **replay))
    first = engine.get_data_parallel_rank() * len(part)
    part = with_old_policy(part, output)
    if layout.router_replay == "R2":
        part["routed_experts"] = output["routed_experts"]
    history = []
    for _ in range(steps):
        data = with_settings(part, layout, calculate_entropy=bool(actor.get("entropy_coeff")), **replay)
        with engine.train_mode():
            result = engine.train_batch(data, loss)
        history.append(_metrics(engine, result))
    # verl reads a buffer here that only the distributed optimizer has.
    exports = layout.use_distributed_optimizer
    weights = stock.exported_weights(engine) if exports else {}
    return {
        "engine": type(engine).__name__,
        "old": _by_sample(output, first),
        "history": history,
        "exports": exports,
        "weights": weights,
    }


def broken_step(layout: Layout, troll: dict[str, Any], batch: TensorDict) -> dict[str, Any]:
    """An update of ``batch`` as it is; how far it moved the parameters, and its metrics."""
    engine = stock.build(layout)
    loss = loss_function(engine, layout, troll)
    part = shard_of(batch, engine)
    part = with_old_policy(part, _shared(engine, stock.old_pass(engine, part, layout)))
    before = {name: parameter.detach().clone() for name, parameter in engine.module[0].named_parameters()}
    with engine.train_mode():
        result = engine.train_batch(with_settings(part, layout, calculate_entropy=False), loss)
        now = dict(engine.module[0].named_parameters())
        moved = max(float((now[name].detach() - old).abs().max()) for name, old in before.items())
    return {"moved": moved, **_metrics(engine, result)}


# Columns after the bridge's padding: at four ranks the last rank holds only padding.
PADDED = 192


def train_with_padding(layout: Layout, troll: dict[str, Any], batch: TensorDict, steps: int = 3) -> dict[str, Any]:
    """:func:`train` on a vocabulary that the bridge pads, with padding columns that would dominate every softmax.

    ``padding_moved``: largest change of an output weight in the padding; 0 on ranks without padding.
    """
    from verl.models.mcore.mbridge import AutoBridge

    padding = functools.partial(AutoBridge.from_config, make_vocab_size_divisible_by=PADDED)
    with mock.patch.object(AutoBridge, "from_config", padding):
        engine = stock.build(layout)
    weight = next(value for name, value in engine.module[0].named_parameters() if "output_layer" in name)
    start = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
    padded = torch.arange(start, start + weight.shape[0]) >= VOCAB
    with torch.no_grad():
        weight[padded] = (
            50
            * torch.randn(PADDED, weight.shape[1], generator=torch.Generator().manual_seed(1))[
                start : start + weight.shape[0]
            ][padded]
        )
    before = weight[padded].clone()
    engine.optimizer.reload_model_params()
    result = _train(engine, layout, troll, batch, steps)
    moved = (weight[padded] - before).abs().max() if padded.any() else torch.zeros(())
    return {**result, "padding_moved": float(moved)}


def each(cases: list[tuple[Layout, dict[str, Any], dict[str, Any]]], batch: TensorDict) -> list[dict[str, Any]]:
    """:func:`train` of several cases in one launch."""
    return [train(layout, troll, batch, **actor) for layout, troll, actor in cases]
