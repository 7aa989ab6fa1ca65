"""Weight transfer to standalone rollout replicas through Ray's object store, for asynchronous trainers in CPU mode.

verl's own transports (NCCL, NIXL, ...) need an accelerator. Enabled by
``actor_rollout_ref.rollout.checkpoint_engine.backend=ray_object_store`` and
``checkpoint_engine.custom_backend_module=verl_troll.cpu.checkpoint_engine``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.workers.rollout.utils import ensure_async_iterator

__all__ = ["ObjectStoreCheckpointEngine"]


class _Mailbox:
    """Holds one set of weights until every receiver has collected it."""

    def __init__(self) -> None:
        self._state: asyncio.Future[dict[str, torch.Tensor]] = asyncio.get_event_loop().create_future()

    async def deliver(self, state: dict[str, torch.Tensor]) -> None:
        self._state.set_result(state)

    async def collect(self) -> dict[str, torch.Tensor]:
        return await asyncio.shield(self._state)


@CheckpointEngineRegistry.register("ray_object_store")
class ObjectStoreCheckpointEngine(CheckpointEngine):
    """verl's interface between actor ranks and rollout workers, with one Ray actor per update.

    Args:
        bucket_size: unused, since all weights are sent at once.
        is_master: whether this rank of the actor sends.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master = is_master
        self.mailbox: Any = None

    def prepare(self) -> Any:
        """A new mailbox on the sending rank, None on the others."""
        return ray.remote(_Mailbox).options(num_cpus=0).remote() if self.is_master else None

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Give every rank the sending rank's mailbox."""
        return {"mailbox": [metadata[0]] * actor_wg_world_size}, {"mailbox": [metadata[0]] * rollout_world_size}

    def init_process_group(self, mailbox: Any) -> None:
        """Store the mailbox."""
        self.mailbox = mailbox

    def finalize(self) -> None:
        """Drop the mailbox; Ray ends it with its last handle."""
        self.mailbox = None

    async def send_weights(self, weights: Iterator[tuple[str, torch.Tensor]], global_steps: int | None = None) -> None:
        """Send the weights from the master; every rank iterates, since gathering each weight is a collective."""
        state: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            async for name, weight in ensure_async_iterator(weights):
                if self.is_master:
                    state[name] = weight.detach().to("cpu", copy=True)
        if self.is_master:
            await self.mailbox.deliver.remote(state)

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, weight)`` once the weights have arrived."""
        for item in (await self.mailbox.collect.remote()).items():
            yield item
