"""One training over several processes, as torchrun starts them: ``torchrun --nproc-per-node=2 train.py``.

Started without torchrun, a script is one process of rank 0 and nothing here does anything.
"""

import os

from collections.abc import Callable

from datetime import timedelta

from typing import TypeVar

import torch

import torch.wrap_distributed as dist

from torch import Tensor, nn

from utils import UserError, pick_device

Result = TypeVar("Result")

def init_distributed(device_name: str) -> torch.device:
    """Join the processes that torchrun started, if it did; returns the device of this one.

    On CUDA each process of a machine takes a GPU of its own (nccl), on the CPU they share the cores (gloo).
    """
    if is_torchrun() and device_name in ("auto", "cuda") and torch.cuda.is_available():
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"process {local_rank} finds no GPU of its own: start at most {gpus} on this machine")
        device_name = f"cuda:{local_rank}"
    elif is_torchrun() and str(device_name).startswith("cuda:"):
        raise UserError(f"DEVICE = {device_name!r} is one GPU for all processes of torchrun: set it to 'auto'")
    device = pick_device(device_name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # what follows, its generator above all, then means this one
    if is_torchrun() and not dist.is_initialized():
        # Rank 0 may ask the teacher about a large data set while the others wait; torchrun ends those whose peer has died
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=30))
    return device

def free_gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that photos may take, half of what is free; 0 elsewhere, where files are as fast."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0

def is_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ

def rank() -> int:
    """Number of this process, 0 to ``world_size() - 1``; rank 0 alone prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0

def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

def print0(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)

def main_process_first(work: Callable[[], Result]) -> Result:
    """Call ``work`` on rank 0, then on the others, which find what it left on the disk; returns its own result.

    Raises:
        UserError: on every rank if it was raised on any, so that none waits for one that is gone.
    """
    result = None
    for mine in (rank() == 0, rank() != 0):
        error = None
        if mine:
            try:
                result = work()
            except UserError as caught:
                error = str(caught)
        raise_on_all_ranks(error)
    return result

def raise_on_all_ranks(error: str | None) -> None:
    """Raise ``UserError`` on every rank if ``error`` is not None on any."""
    errors = [error]
    if world_size() > 1:
        errors = [None] * world_size()
        dist.all_gather_object(errors, error)
    for each in errors:
        if each is not None:
            failure = UserError(each)
            failure.shared = world_size() > 1
            raise failure

def all_reduce_sum(values: Tensor, device: torch.device) -> Tensor:
    """The sum of ``values`` over all processes, the same on each."""
    if world_size() > 1:
        values = values.to(device)  # nccl adds on the GPU only
        dist.all_reduce(values)
    return values

def all_reduce_mean(value: Tensor) -> float:
    return all_reduce_sum(value.clone(), value.device).item() / world_size()

def per_rank_batch_size(batch_size: int) -> int:
    """Patches of a batch that fall to each process."""
    if batch_size % world_size():
        raise UserError(f"BATCH_SIZE = {batch_size} cannot be shared by {world_size()} processes: take a multiple of that")
    return batch_size // world_size()

def wrap_distributed(network: nn.Module, device: torch.device) -> nn.Module:
    """``network`` with gradients averaged over the processes; ``network`` itself where there is one process."""
    if world_size() == 1:
        return network
    return nn.parallel.DistributedDataParallel(network, [device] if device.type == "cuda" else None)
