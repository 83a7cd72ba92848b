"""What does not change during a training, computed once and stored: the teacher's outputs and the blur embeddings."""

import bisect
import hashlib
import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from blur.spectrum import transform_spectrum
from dataset import PairedImageDataset
from images.files import atomic_write, read_torch_file, resumable_file, write_torch_file
from images.photos import PixelFile, remove_files
from inference import run_ensemble
from training.distributed import all_ranks_together, main_process_first, rank, world_size
from training.fingerprint import code_fingerprint, fingerprint
from training.run import lock_output_dir
from utils import autocast, autocast_dtype, to_pixels, to_tensor


def cache_teacher_outputs(
    teacher: nn.Module, data: PairedImageDataset, weight: float, device: torch.device, orientations: int = 1
) -> PixelFile:
    """Run ``teacher`` on each whole blurry photo, unless that was done before; returns the targets, (H, W, 3) uint8 each.

    They are stored beside the decoded photos as 8-bit images. Rounding adds an error of 59 dB PSNR without direction,
    while a student is some 35 dB away from its teacher. Under torchrun each process computes a share of the photos. After
    an interruption the work continues with the first output that is missing.

    Args:
        weight: of the teacher's output in the target, 0 to 1; the rest is the sharp photo.
        orientations: flips and rotations over which the output is averaged, 1 to 8.
    Raises:
        UserError: if another training is computing them, or they cannot be written.
    """
    dtype = str(autocast_dtype(device)).removeprefix("torch.")
    name = f"{data.key}-{fingerprint(teacher)}"
    file = data.cache / f"{name}-{weight:g}-{orientations}-{dtype}.outputs"
    with all_ranks_together():  # every rank has looked before any writes
        complete = PixelFile(file, data.shapes).is_complete()
    if not complete:
        with all_ranks_together():
            lock = lock_output_dir(data.cache)
            if rank() == 0:
                # Of another teacher or other photos, or truncated
                remove_files(p for p in data.cache.glob("*.outputs") if p == file or not p.name.startswith(name))
            _run_teacher(teacher, data, weight, device, orientations, file)
        with main_process_first():
            if world_size() > 1 and rank() == 0:
                _concatenate([_share(file, each) for each in range(world_size())], file)
        if lock:
            lock.close()
    return PixelFile(file, data.shapes)


@torch.no_grad()
def _run_teacher(
    teacher: nn.Module, data: PairedImageDataset, weight: float, device: torch.device, orientations: int, file: Path
) -> None:
    """Write this process's share of the outputs."""
    share = range(rank() * len(data) // world_size(), (rank() + 1) * len(data) // world_size())
    sizes = (3 * height * width for height, width in data.shapes[share.start : share.stop])
    ends = [0, *itertools.accumulate(sizes)]  # bytes
    if _share(file, rank()).is_file():
        return  # complete, from an interrupted run
    with resumable_file(_share(file, rank())) as out:
        done = bisect.bisect_right(ends, out.seek(0, os.SEEK_END)) - 1
        out.truncate(ends[done])
        hidden = None if rank() == 0 else True
        bar = tqdm(share[done:], "running the teacher", len(share), initial=done, unit="photo", leave=False, disable=hidden)
        for index in bar:
            blurry = to_tensor(data.blurry[index])[None].to(device, memory_format=torch.channels_last)
            with autocast(device):
                output = run_ensemble(teacher, blurry, orientations)
            target = to_tensor(data.sharp[index]).to(device).lerp(output[0].float().clamp(0, 1), weight)
            out.write(np.ascontiguousarray(to_pixels(target)).data)


def _share(file: Path, of_rank: int) -> Path:
    return file if world_size() == 1 else file.with_name(f"{file.name}.{of_rank}of{world_size()}")


def _concatenate(shares: list[Path], file: Path) -> None:
    def write(partial: Path) -> None:
        with open(partial, "wb") as out:
            for share in shares:
                with open(share, "rb") as source:
                    shutil.copyfileobj(source, out, 2**24)

    atomic_write(file, write)
    remove_files(shares)


@torch.no_grad()
def cache_blur_embeddings(network: nn.Module, data: PairedImageDataset, device: torch.device) -> torch.Tensor | None:
    """``network.embed_blur`` of each photo in its eight orientations, (n, 8, E), for a frozen blur estimator.

    None for a network that needs the spectra themselves, as ``TeacherCNN`` does.
    """
    if not hasattr(network, "embed_blur"):
        return None
    key = hashlib.sha256((fingerprint(network.estimator) + code_fingerprint(type(network))).encode()).hexdigest()[:20]
    file = data.cache / f"{data.key}-{key}.embeddings"
    with main_process_first():
        if not file.is_file():
            remove_files(file.parent.glob("*.embeddings"))
            bar = tqdm(data.spectra, "estimating blur", unit="photo", leave=False, disable=None)
            orientations = (torch.stack([transform_spectrum(each, dihedral) for dihedral in range(8)]) for each in bar)
            write_torch_file(file, torch.stack([network.embed_blur(each.to(device)).cpu() for each in orientations]))
        return read_torch_file(file)
