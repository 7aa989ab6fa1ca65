"""Runs measurements with the vocabulary split over local processes that communicate through gloo."""

from __future__ import annotations

import gc
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks import old_pass, update
from benchmarks.rows import Case, Row
from verl_troll.core.vocab import VocabShard

# Measurements that support sharded logits.
SHARDED: dict[str, Callable[[Case, int, VocabShard | None], list[Row]]] = {
    old_pass.NAME: old_pass.run,
    update.NAME: update.run,
}


def run_on_ranks(jobs: Sequence[tuple[str, Case]], ranks: int, repeat: int, threads: int) -> list[list[Row]]:
    """The first rank's rows of each job (measurement, case); the ranks divide the threads.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed, with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, list(jobs), repeat, max(1, threads // ranks))
        multiprocessing.spawn(_rank, args=arguments, nprocs=ranks)
        rows: list[list[Row]] = pickle.loads(Path(folder, "rows").read_bytes())
        return rows


def _rank(rank: int, ranks: int, folder: str, jobs: list[tuple[str, Case]], repeat: int, threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0")
    store = dist.FileStore(str(Path(folder, "store")), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    from megatron.core import parallel_state

    # verl's form for sharded logits asks Megatron for the group.
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    gc.freeze()
    group = dist.group.WORLD
    assert group is not None
    rows = []
    for name, case in jobs:
        shard = VocabShard.even(-(-case.vocab // ranks), case.vocab, group)
        rows.append(SHARDED[name](case, repeat, shard))
    if rank == 0:
        Path(folder, "rows").write_bytes(pickle.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()
