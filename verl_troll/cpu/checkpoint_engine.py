"""Weight transfer to standalone rollout replicas through Ray's object store, for asynchronous trainers in CPU mode.

verl's own transports (NCCL, NIXL, ...) need an accelerator. Enabled by
``actor_rollout_ref.rollout.checkpoint_engine.backend=ray_object_store`` and
``checkpoint_engine.custom_backend_module=verl_troll.cpu.checkpoint_engine``. These trainers also save the old policy's
weights, which must be a copy (:mod:`verl_troll.patches.verl_fsdp2_snapshot`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.workers.rollout.utils import ensure_async_iterator

from verl_troll.patches import registry, verl_fsdp2_snapshot

__all__ = ["ObjectStoreCheckpointEngine"]

# Also without the plugin, which applies it for every trainer.
registry.apply(verl_fsdp2_snapshot.PATCH)


class _Mailbox:
    """Holds the weights of one update until every receiver has collected them."""

    def __init__(self) -> None:
        self._states: dict[int, asyncio.Future[dict[str, torch.Tensor]]] = {}

    def _state(self, update: int) -> asyncio.Future[dict[str, torch.Tensor]]:
        return self._states.setdefault(update, asyncio.get_event_loop().create_future())

    async def deliver(self, update: int, state: dict[str, torch.Tensor]) -> None:
        self._state(update).set_result(state)

    async def collect(self, update: int) -> dict[str, torch.Tensor]:
        return await asyncio.shield(self._state(update))

    async def drop(self, update: int) -> None:
        self._states.pop(update, None)


@CheckpointEngineRegistry.register("ray_object_store")
class ObjectStoreCheckpointEngine(CheckpointEngine):
    """verl's interface between actor ranks and rollout workers, with one Ray actor of the sending rank's.

    Args:
        bucket_size: unused, since all weights are sent at once.
        is_master: whether this rank of the actor sends.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master = is_master
        self.mailbox: Any = None
        self.update = 0

    def prepare(self) -> Any:
        """Mailbox and number of the update on the sending rank, None on the others.

        The mailbox is kept: starting a process takes longer than sending a small model.
        """
        if not self.is_master:
            return None
        if self.mailbox is None:
            self.mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()
        return self.mailbox, self.update + 1

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Give every rank the sending rank's mailbox."""
        mailbox, update = metadata[0]

        def for_ranks(count: int) -> dict[str, list[Any]]:
            return {"mailbox": [mailbox] * count, "update": [update] * count}

        return for_ranks(actor_wg_world_size), for_ranks(rollout_world_size)

    def init_process_group(self, mailbox: Any, update: int) -> None:
        """Store the mailbox and the update's number."""
        self.mailbox, self.update = mailbox, update

    def finalize(self) -> None:
        """Drop the weights, which every receiver has now."""
        if self.is_master:
            self.mailbox.drop.remote(self.update)

    async def send_weights(self, weights: Iterator[tuple[str, torch.Tensor]], global_steps: int | None = None) -> None:
        """Send the weights from the master; every rank iterates, since gathering each weight is a collective."""
        state: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            async for name, weight in ensure_async_iterator(weights):
                if self.is_master:
                    state[name] = weight.detach().to("cpu", copy=True)
        if self.is_master:
            await self.mailbox.deliver.remote(self.update, state)

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, weight)`` once the weights have arrived."""
        for item in (await self.mailbox.collect.remote(self.update)).items():
            yield item
