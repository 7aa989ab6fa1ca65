"""Weights of asynchronous trainers in CPU mode: what is sent arrives, and what is saved stays as it was."""

from __future__ import annotations

from tests.cpu.test_platform import CPU_MODE, in_process


def test_saved_weights_are_a_copy() -> None:
    """As in the worker that re-scores a mini-batch with the policy of the step's start."""
    found = in_process(
        """
        import tempfile
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        import verl_troll.cpu.checkpoint_engine
        from verl.experimental.separation.engine_workers import DetachActorWorker
        from omegaconf import OmegaConf

        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 1), rank=0, world_size=1)
            model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            worker = object.__new__(DetachActorWorker)
            worker.config = OmegaConf.create({"actor": {"strategy": "fsdp2"}})
            worker._strategy_handlers = None
            old = [parameter.full_tensor().clone() for parameter in model.parameters()]
            saved, spec = worker.copy_handler(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
            changed = [parameter.full_tensor().clone() for parameter in model.parameters()]
            worker.restore_handler(model, saved, spec)
            now = [parameter.full_tensor() for parameter in model.parameters()]
            result = [
                [torch.equal(one, other) for one, other in zip(now, old)],
                [torch.equal(one, other) for one, other in zip(changed, old)],
            ]
            dist.destroy_process_group()
        """,
        **CPU_MODE,
    )
    assert found == [[True] * 4, [False] * 4]


def test_every_update_arrives_through_one_mailbox() -> None:
    found = in_process(
        """
        import asyncio
        import ray
        import torch
        from verl_troll.cpu.checkpoint_engine import ObjectStoreCheckpointEngine as Engine

        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
        sending, idle, receiving = Engine(0, is_master=True), Engine(0), Engine(0)
        mailboxes = set()

        async def update(value):
            metadata = [engine.prepare() for engine in (sending, idle, receiving)]
            actor, rollout = Engine.build_topology(2, 1, metadata)
            for engines, each in (((sending, idle), actor), ((receiving,), rollout)):
                for rank, engine in enumerate(engines):
                    engine.init_process_group(**{name: values[rank] for name, values in each.items()})
            weights = [("one", torch.full((2,), value)), ("other", torch.full((1,), -value))]

            async def receive():
                return [(name, weight.tolist()) async for name, weight in receiving.receive_weights()]

            _, _, arrived = await asyncio.gather(
                sending.send_weights(iter(weights)), idle.send_weights(iter(weights)), receive()
            )
            mailboxes.update(engine.mailbox._actor_id.hex() for engine in (sending, idle, receiving))
            for engine in (sending, idle, receiving):
                engine.finalize()
            return arrived

        async def updates():
            return [await update(value) for value in (1.0, 2.0, 3.0)]

        arrived = asyncio.run(updates())
        result = [arrived, len(mailboxes)]
        ray.shutdown()
        """,
        **CPU_MODE,
    )
    arrived, mailboxes = found
    assert arrived == [[["one", [value] * 2], ["other", [-value]]] for value in (1.0, 2.0, 3.0)]
    assert mailboxes == 1
