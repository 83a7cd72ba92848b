"""Leaves to other programs the cores that they use, also to those that start during a long computation."""

import contextlib
import os
import time
from collections import deque
from pathlib import Path

import torch

ALL_THREADS = torch.get_num_threads()  # how many torch takes by itself
busy_cores: deque[int] = deque(maxlen=5)  # at the last looks of ``use_idle_cores``


def use_idle_cores() -> None:
    """Compute on the cores that no other program uses, at least on one; on all where the system does not tell.

    The threads of OpenMP wait for each other in busy loops: where one of them shares its core with another program, all of
    them together are slower than a single one. The first call looks five times, each further one once, for a tenth of a
    millisecond, and what counts is the median of the last five looks: call it again and again in a long computation.
    OMP_NUM_THREADS, if it is set, is obeyed.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    with contextlib.suppress(OSError):  # only Linux tells
        busy_cores.append(count_busy_cores())
        while len(busy_cores) < 5:
            time.sleep(0.01)  # seconds
            busy_cores.append(count_busy_cores())
        threads = max(1, min(ALL_THREADS, (os.cpu_count() or 1) - sorted(busy_cores)[2]))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)


def count_busy_cores(proc: Path = Path("/proc")) -> int:
    """Threads of other programs that run or wait for a core now; raises ``OSError`` where the system is not Linux."""
    running = int((proc / "loadavg").read_text().split()[3].partition("/")[0])
    own = [stat.read_text().rpartition(")")[2].split()[0] for stat in proc.glob("self/task/*/stat")]
    return running - own.count("R")
