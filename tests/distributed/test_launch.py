"""The launcher itself: a rank that fails, dies or hangs ends the test, with an error that says what happened."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import RankFailedError, run_ranks


def add_ranks() -> int:
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    return int(total)


def fail_on(rank: int) -> None:
    """The other ranks wait for the failing one."""
    if dist.get_rank() == rank:
        raise ArithmeticError("the sum is off")
    dist.barrier()


def fail_and_end_late(rank: int) -> None:
    """As on a busy machine: the failing rank lets go of the others and is still there when they have ended."""
    if dist.get_rank() == rank:
        end = os._exit

        def end_late(code: int) -> None:
            dist.destroy_process_group()
            time.sleep(2)
            end(code)

        os._exit = end_late  # type: ignore[assignment]
        raise ArithmeticError("the sum is off")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        print("last words", flush=True)
        os._exit(7)
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)


def test_results_come_back_by_rank() -> None:
    assert run_ranks(add_ranks, 3) == [6, 6, 6]


@pytest.mark.parametrize("fail", [fail_on, fail_and_end_late])
def test_failing_rank_fails_the_test_at_once_with_its_traceback(fail: Callable[[int], None]) -> None:
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 failed.*in fail_.*ArithmeticError: the sum is off"):
        run_ranks(fail, 2, (1,))


def test_dying_rank_is_named_with_its_last_words() -> None:
    with pytest.raises(RankFailedError, match=r"(?s)rank 0 ended with exit code 7.*last words"):
        run_ranks(die_on, 2, (0,))


def test_hanging_rank_is_named() -> None:
    # The other ranks wait for it at the end.
    with pytest.raises(RankFailedError, match=r"ranks \[0, 1\] of 2 hang: no progress for 3 s"):
        run_ranks(hang_on, 2, (1,), idle=3)


def leave_a_process_behind(rank: int) -> int:
    """As Megatron's checkpoints do; a rank that ends without Python's clean-up does not end it."""
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(1000,))
    process.start()
    if dist.get_rank() == rank:
        raise ArithmeticError(process.pid)
    assert process.pid is not None
    return process.pid


def test_ranks_leave_no_process_behind() -> None:
    assert not any(psutil.pid_exists(process) for process in run_ranks(leave_a_process_behind, 2, (-1,)))
    with pytest.raises(RankFailedError, match="ArithmeticError") as failure:
        run_ranks(leave_a_process_behind, 1, (0,))
    assert not psutil.pid_exists(int(str(failure.value).split()[-1]))
