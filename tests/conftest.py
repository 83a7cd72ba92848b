"""Dummy photos and pairs, made in a temporary folder, and processes beside the tests."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are not installed

from blur.filters import convolve, gaussian_kernel
from utils import to_pixels, to_tensor

# For tests of what runs on a GPU too
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA"))]


def dummy_photo(height: int, width: int, seed: int) -> np.ndarray:
    """(height, width, 3) uint8: random rectangles, so that there are edges to sharpen."""
    rng = np.random.default_rng(seed)
    photo = np.full((height, width, 3), 128, np.uint8)
    for _ in range(25):
        top, left = rng.integers(height), rng.integers(width)
        photo[top : top + rng.integers(2, 24), left : left + rng.integers(2, 24)] = rng.integers(0, 256, 3)
    return photo


def write_pair(folder: Path, height: int = 40, width: int = 48, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    sharp = dummy_photo(height, width, seed)
    Image.fromarray(sharp).save(folder / "sharp.png")
    Image.fromarray(to_pixels(convolve(to_tensor(sharp), gaussian_kernel(1.2)))).save(folder / "blurry.png")


@pytest.fixture
def pairs(tmp_path) -> Path:
    """data/ with three training pairs and two validation pairs, of differing sizes."""
    for part, count in ("train", 3), ("val", 2):
        for k in range(count):
            write_pair(tmp_path / "data" / part / f"{k + 1:03d}", 40 + 3 * k, 48 - 5 * k, seed=10 * len(part) + k)
    return tmp_path / "data"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Set going what ``start`` forks its processes from, which imports torch while other tests are at work."""
    if any("start" in item.fixturenames for item in session.items):
        from multiprocessing import forkserver  # which Windows has not

        # The second is what torch imports for every optimizer, in two seconds; train is found from the repository's root
        forkserver.set_forkserver_preload(["train", "torch._dynamo"])
        forkserver.ensure_running()


@pytest.fixture
def start():
    """Calls ``work`` of a module in a process of its own, forked from one that has imported torch once for all of them.

    What it prints goes to ``log``. If it is still at work when the test ends, it is killed. Linux and macOS only.
    """
    forks, processes = multiprocessing.get_context("forkserver"), []

    def start(work: Callable, *arguments, log: Path) -> multiprocessing.Process:
        log.touch()
        process = forks.Process(target=_as_if_alone, args=(multiprocessing.get_start_method(), log, work, *arguments))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def _as_if_alone(start_method: str, log: Path, work: Callable, *arguments) -> None:
    multiprocessing.set_start_method(start_method, force=True)  # of its own workers
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    work(*arguments)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
