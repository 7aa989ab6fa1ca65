"""One model's full life on verl's real engines with TROLL, run by ranks: update, checkpoint, resume, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from tests.distributed import fsdp_scenarios as fsdp
from tests.distributed import megatron_scenarios as megatron
from tests.distributed import megatron_stock
from tests.distributed.batches import shard_of, with_old_policy, with_settings
from tests.distributed.fsdp_scenarios import Setup
from tests.distributed.megatron_stock import Layout

UPDATES = 3


def _build(case: Setup | Layout, troll: dict[str, Any]) -> tuple[Any, Any]:
    """The FSDP2 or Megatron engine, and verl's loss function with TROLL's settings."""
    if isinstance(case, Setup):
        return fsdp.build(case)[:2]
    engine = megatron_stock.build(case)
    return engine, megatron.loss_function(engine, case, troll)


def _old_pass(engine: Any, part: TensorDict, case: Setup | Layout) -> dict[str, Tensor]:
    return megatron._shared(engine, megatron_stock.old_pass(engine, part, case))


def _update(engine: Any, loss_function: Any, part: TensorDict, case: Setup | Layout) -> dict[str, float]:
    with engine.train_mode():
        result = engine.train_batch(with_settings(part, case, calculate_entropy=False), loss_function)
    return megatron._metrics(engine, result)


def _adapter(engine: Any) -> dict[str, Tensor]:
    """The adapter's weights, unmerged, under PEFT's names (collective)."""
    from verl.utils.fsdp_utils import collect_lora_params

    return dict(collect_lora_params(module=engine.module, layered_summon=False, base_sync_done=True))


def live(case: Setup | Layout, troll: dict[str, Any], batch: TensorDict, folder: str) -> dict[str, Any]:
    """Old pass, :data:`UPDATES` optimizer steps on the same mini-batch, a checkpoint in ``folder``, one more step;
    then the checkpoint loaded into a new engine, and the same step there.

    Args:
        case: the engine; for FSDP it already contains ``troll``.

    Returns:
        ``old``, ``after``: outputs of the old pass before and after the updates, for this rank's samples.
        ``history``, ``metrics``, ``resumed_metrics``: metrics of the updates, of the step after them, and of that step
        in the new engine. ``loaded``, ``saved``, ``reloaded``, ``final``, ``resumed``: weights as verl sends them to a
        rollout: from the model's files, at the checkpoint, from the checkpoint, and after the step in either engine.
        ``adapter``: its weights at the checkpoint, if there is one.
    """
    engine, loss_function = _build(case, troll)
    result: dict[str, Any] = {"engine": type(engine).__name__, "loaded": megatron_stock.exported_weights(engine)}
    part = shard_of(batch, engine)
    first = engine.get_data_parallel_rank() * len(part)
    old = _old_pass(engine, part, case)
    result["old"] = megatron._by_sample(old, first)
    part = with_old_policy(part, old)
    result["history"] = [_update(engine, loss_function, part, case) for _ in range(UPDATES)]
    result["after"] = megatron._by_sample(_old_pass(engine, part, case), first)
    engine.save_checkpoint(folder, global_step=UPDATES)
    result["saved"] = megatron_stock.exported_weights(engine)
    if isinstance(case, Setup) and case.lora_rank:
        result["adapter"] = _adapter(engine)
    result["metrics"] = _update(engine, loss_function, part, case)
    result["final"] = megatron_stock.exported_weights(engine)

    engine, loss_function = _build(case, troll)
    engine.load_checkpoint(folder, del_local_after_load=False)
    result["reloaded"] = megatron_stock.exported_weights(engine)
    result["resumed_metrics"] = _update(engine, loss_function, part, case)
    result["resumed"] = megatron_stock.exported_weights(engine)
    return result


def merge(checkpoint: str, target: str) -> None:
    """Merge an FSDP checkpoint's shards, with verl's merger, into a model that transformers loads."""
    from verl.model_merger.base_model_merger import ModelMergerConfig
    from verl.model_merger.fsdp_model_merger import FSDPModelMerger

    merger = FSDPModelMerger(
        ModelMergerConfig(
            operation="merge",
            backend="fsdp",
            local_dir=checkpoint,
            target_dir=target,
            hf_model_config_path=str(Path(checkpoint, "huggingface")),
        )
    )
    merger.merge_and_save()
    merger.cleanup()
