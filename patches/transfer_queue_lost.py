"""Patch: a run whose TransferQueue has lost an actor ends with its name.

The client sets no limit for requests to the controller, and ZeroMQ keeps a message for a peer that has gone: without
the controller, the trainer waits for ever. Without a storage unit, each sample of a batch waits three times 200 s.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import time
from collections.abc import Coroutine
from typing import Any

from verl_troll.patches.registry import Patch

PATIENCE = 10.0
"""Seconds between two looks at the actors, while requests come in or one waits."""


def _check() -> None:
    """Raise if an actor that this process knows has died; one that does not answer may be busy."""
    import ray
    from transfer_queue import interface

    units = (interface._TQ_STORAGE or {}).get("SimpleStorage", {})
    actors = {"TransferQueueController": interface._TQ_CONTROLLER, **units}
    answers = {name: actor.get_zmq_server_info.remote() for name, actor in actors.items() if actor is not None}
    ready = ray.wait(list(answers.values()), num_returns=len(answers), timeout=PATIENCE)[0] if answers else []
    for name, answer in answers.items():
        try:
            if answer in ready:
                ray.get(answer)
        except ray.exceptions.RayActorError as error:
            raise RuntimeError(
                f"TransferQueue has lost its actor {name}: the process was killed or crashed, or its node was lost. "
                "The samples in flight are lost with it; resume from the last checkpoint, if the run has one."
            ) from error


def _install() -> None:
    from transfer_queue.client import TransferQueueClient

    looked = time.monotonic()

    @functools.wraps(TransferQueueClient._run_coroutine)
    def watched(self: Any, request: Coroutine[Any, Any, Any]) -> Any:
        nonlocal looked
        answer = asyncio.run_coroutine_threadsafe(request, self._loop)
        try:
            while True:
                # The trainer asks again and again for finished samples, and each answer may come at once.
                if time.monotonic() - looked >= PATIENCE:
                    _check()
                    looked = time.monotonic()
                concurrent.futures.wait([answer], timeout=PATIENCE)
                if answer.done():
                    return answer.result()
        finally:
            answer.cancel()

    TransferQueueClient._run_coroutine = watched


PATCH = Patch(
    name="transfer-queue-lost",
    host="TransferQueue",
    versions=">=0.1.10,<0.2",
    why="A run whose TransferQueue controller was killed would hang, and nearly so without a storage unit.",
    upstream="transfer_queue/client.py: a timeout of controller_rpc_pool; a look at the actor while a request waits",
    install=_install,
    replaces={"transfer_queue.client:TransferQueueClient._run_coroutine": "b5ab33e29a67e23b"},
)
