"""Several processes over gloo, for tests."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessException


def run(size: int, folder: Path, work: Callable[..., None], *args: Any) -> None:
    """Call ``work(rank, size, *args)`` in each of ``size`` processes that form the default group.

    The test fails with what each process that failed has to say. Starting takes seconds: one start
    for many checks.
    """
    folder.mkdir(exist_ok=True)
    try:
        mp.start_processes(_work, (size, folder, work, args), nprocs=size, start_method="spawn")
    except ProcessException as error:
        reports = [path.read_text() for path in sorted(folder.glob("rank*.txt"))]
        pytest.fail("\n".join(reports) or str(error))


def _work(rank: int, size: int, folder: Path, work: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),  # one that waits in vain fails
    )
    try:
        work(rank, size, *args)
        dist.barrier()
    except BaseException:
        (folder / f"rank{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
    dist.destroy_process_group()
    # Without secateur too, a process now and then aborts in its own end: gloo's threads outlive it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
