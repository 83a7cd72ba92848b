"""Training on several processes: ``torchrun --nproc-per-node=2 train.py``. Without torchrun there is one, of rank 0."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from idle_cores import use_idle_cores
from utils import UserError, pick_device


def init_distributed(device_name: str) -> torch.device:
    """Connect the processes that torchrun started, if it did; returns the device of this one.

    With CUDA each process uses a GPU of its own (nccl), else they share the cores of the CPU (gloo, which has no MPS). A
    single process computes on those that are idle now.
    """
    torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if torchrun and str(device_name).startswith(("auto", "cuda")) and torch.cuda.is_available():
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(f"{processes} processes share {gpus} GPUs: start at most one per GPU with --nproc-per-node")
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device_name)
    if torchrun and device.type == "mps":
        device = torch.device("cpu")
    if device.type == "cpu" and not torchrun:
        threads = torch.get_num_threads()
        use_idle_cores()
        if torch.get_num_threads() < threads:
            print(f"on {torch.get_num_threads()} of {threads} threads, others are busy: OMP_NUM_THREADS={threads} takes all")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # the default of everything that follows, its random generator above all
    if torchrun and not dist.is_initialized():
        # The longest wait is for rank 0 to decode a large data set
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return device


def rank() -> int:
    """Number of this process, 0 to ``world_size() - 1``; rank 0 alone prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """``value`` of every rank, in their order. Every rank must call this.

    Raises:
        UserError: on every rank if it is the ``value`` of any.
    """
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    for each in values:
        if isinstance(each, UserError):
            each.shared = world_size() > 1
            raise each from None
    return values


@contextlib.contextmanager
def all_ranks_together() -> Iterator[None]:
    """Run the block on all ranks; each waits for the others at its end.

    Raises:
        UserError: on every rank if it was raised on any, so that no rank waits for one that is gone.
    """
    error = None
    try:
        yield
    except UserError as caught:
        if caught.shared:  # by a ``gather`` in the block
            raise
        error = caught
    gather(error)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block on rank 0, then on the others, which find what rank 0 left on the disk. Errors are raised on all."""
    if rank() != 0:
        gather(None)  # waits for rank 0
    with all_ranks_together():
        yield
    if rank() == 0:
        gather(None)  # waits for the others
