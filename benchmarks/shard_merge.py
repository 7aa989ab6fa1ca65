"""Compares two exact ways to merge the top-k candidates of vocabulary shards.

    python -m benchmarks.shard_merge [--ranks 2 4] [--tokens 512] [--vocab 151936] [--k 64] [--repeat 15]

``by token`` is the library's way (``verl_troll.core.vocab._merge``): an all-to-all gives each rank all candidates for
its share of the tokens, it merges them, and an all-gather distributes the results. ``everywhere``: one all-gather, then
every rank merges all tokens. Ranks are local processes that communicate through gloo.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from verl_troll.core.logits import DenseLogits, Normaliser, Reading
from verl_troll.core.vocab import VocabShard, _merge, _pack, _unpack


def merge_everywhere(reading: Reading, shard: VocabShard) -> Reading:
    """Same result as ``verl_troll.core.vocab._merge``, but every rank merges every row."""
    normaliser, sampled, values, ids = reading
    width = ids.shape[-1]
    found = _pack(normaliser, values, ids, sampled)
    gathered = found.new_empty(shard.ranks, *found.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), found, group=shard.group)
    parts, values, ids, sampled = _unpack(gathered, width, values.dtype)
    best = values.transpose(0, 1).flatten(1).sort(dim=-1, descending=True, stable=True)
    ids = ids.transpose(0, 1).flatten(1).gather(-1, best.indices[:, :width]).long()
    whole = Normaliser.combine(*(part for part in parts if part is not None))
    return Reading(whole, sampled.sum(0), best.values[:, :width], ids)


def _seconds(calls: list[Callable[[], object]], repeat: int) -> list[float]:
    """Median time of each call; they alternate, so a busy machine slows all of them equally."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeat + 1):
        for call, own in zip(calls, times, strict=True):
            dist.barrier()
            start = time.perf_counter()
            call()
            dist.barrier()
            own.append(time.perf_counter() - start)
    return [statistics.median(own[1:]) for own in times]


def _rank(rank: int, ranks: int, folder: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    group = dist.group.WORLD
    assert group is not None
    columns = -(-arguments.vocab // ranks)
    shard = VocabShard.even(columns, arguments.vocab, group)
    tokens = arguments.tokens
    logits = 4 * torch.randn(tokens, columns, generator=torch.Generator().manual_seed(rank))
    rows, first = torch.arange(tokens), torch.zeros(tokens, 1, dtype=torch.int64)
    reading = DenseLogits(logits).read(rows, first, shard.columns, k=arguments.k)
    local = (reading._replace(top_ids=reading.top_ids + shard.start), shard)
    one, other = _merge(*local), merge_everywhere(*local)
    for left, right in zip((*one.normaliser, *one[1:]), (*other.normaliser, *other[1:]), strict=True):
        assert left is right is None or (left is not None and right is not None and torch.equal(left, right))
    read, by_token, everywhere = _seconds(
        [
            lambda: DenseLogits(logits).read(rows, first, shard.columns, k=arguments.k),
            lambda: _merge(*local),
            lambda: merge_everywhere(*local),
        ],
        arguments.repeat,
    )
    if rank == 0:
        message = 8 * arguments.k + 12
        received = 2 * (ranks - 1) / ranks * message, (ranks - 1) * message
        print(
            f"{ranks:>5} {tokens:>7} {arguments.k:>4} {1e3 * read:>14.1f} {1e3 * by_token:>9.1f} "
            f"{1e3 * everywhere:>11.1f} {by_token / everywhere:>6.2f} {received[0]:>12.0f} {received[1]:>11.0f}"
        )
    dist.destroy_process_group()


def main() -> None:
    """Print one line per number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=15)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"vocabulary {arguments.vocab}, float32, milliseconds per call (median of {arguments.repeat})")
    print("ranks  tokens    k  local reading  by token  everywhere  ratio  bytes received per token, each way")
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(_rank, args=(ranks, folder, arguments), nprocs=ranks)


if __name__ == "__main__":
    main()
