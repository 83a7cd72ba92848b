"""Training on several processes: ``torchrun --nproc-per-node=2 train.py``. Without torchrun there is one, of rank 0."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import UserError, pick_device


def init_distributed(device_name: str) -> torch.device:
    """Connect the processes that torchrun started, if it did; returns the device of this one.

    With CUDA each process uses a GPU of its own (nccl), on the CPU they share the cores (gloo).
    """
    torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if torchrun and str(device_name).startswith(("auto", "cuda")) and torch.cuda.is_available():
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(f"{processes} processes share {gpus} GPUs: start at most one per GPU with --nproc-per-node")
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device_name)
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
        error = str(caught)
    raise_on_all_ranks(error)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block on rank 0, then on the others, which find what rank 0 left on the disk. Errors are raised on all."""
    if rank() != 0:
        raise_on_all_ranks(None)  # waits for rank 0
    with all_ranks_together():
        yield
    if rank() == 0:
        raise_on_all_ranks(None)  # waits for the others


def raise_on_all_ranks(error: str | None) -> None:
    """Raise ``UserError`` on every rank if ``error`` is not None on any. Every rank must call this."""
    errors = [error]
    if world_size() > 1:
        errors = [None] * world_size()
        dist.all_gather_object(errors, error)
    for each in errors:
        if each is not None:
            failure = UserError(each)
            failure.shared = world_size() > 1
            raise failure from None


def all_reduce_sum(values: Tensor, device: torch.device) -> Tensor:
    """The sum of ``values`` over all processes, the same on each."""
    if world_size() > 1:
        values = values.to(device)  # nccl works on the GPU only
        dist.all_reduce(values)
    return values


def all_reduce_mean(value: Tensor) -> float:
    return all_reduce_sum(value.clone(), value.device).item() / world_size()


def per_rank_batch_size(batch_size: int) -> int:
    if batch_size % world_size():
        raise UserError(f"BATCH_SIZE = {batch_size} cannot be split over {world_size()} processes: use a multiple of that")
    return batch_size // world_size()


def wrap_ddp(network: nn.Module, device: torch.device) -> nn.Module:
    """``network`` with gradients averaged over the processes; ``network`` itself if there is only one."""
    if world_size() == 1:
        return network
    return nn.parallel.DistributedDataParallel(network, [device] if device.type == "cuda" else None)
