"""What does not change during a training, computed once and stored: the teacher's outputs and the blur embeddings."""

import bisect
import contextlib
import os

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from blur.spectrum import transform_spectrum
from dataset import PairedImageDataset
from idle_cores import use_idle_cores
from images.files import read_torch_file, resumable_file, write_torch_file
from images.photos import PixelFile, remove_files
from inference import run_tiled, self_ensemble
from training.distributed import all_ranks_together, gather, main_process_first, rank, world_size
from training.fingerprint import code_fingerprint, fingerprint
from training.run import lock_path
from utils import autocast, autocast_dtype, to_pixels, to_tensor


@torch.no_grad()
def cache_teacher_outputs(
    teacher: nn.Module, data: PairedImageDataset, weight: float, device: torch.device, orientations: int = 1
) -> PixelFile:
    """Run ``teacher`` on each whole blurry photo, unless that was done before; returns the targets, (H, W, 3) uint8 each.

    They are stored beside the decoded photos as 8-bit images. Rounding adds unbiased noise at 59 dB PSNR, while a student
    is some 35 dB away from its teacher. Under torchrun each process computes a share of the photos. After an interruption
    the work continues with the first output that is missing.

    Args:
        weight: of the teacher's output in the target, 0 to 1; the rest is the sharp photo.
        orientations: flips and rotations over which the output is averaged, 1 to 8.
    Raises:
        UserError: if another training is computing them, or they cannot be written.
    """

    def run_teacher(pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> float32."""
        photo = to_tensor(pixels)[None].to(device, memory_format=torch.channels_last)
        with autocast(device):
            return run_tiled(teacher, photo)[0].float().movedim(0, -1).cpu().numpy()

    dtype = str(autocast_dtype(device)).removeprefix("torch.")
    name = f"{data.key}-{fingerprint(teacher)}"
    cache = gather(data.cache)[0]  # ranks may have temporary folders of their own
    targets = PixelFile(cache / f"{name}-{weight:g}-{orientations}-{dtype}.outputs", data.shapes)
    if all(gather(targets.is_complete())):  # every rank has looked before rank 0 writes
        return targets
    file = resumable_file(targets.file) if rank() == 0 else contextlib.nullcontext()
    with all_ranks_together(), lock_path(cache), file as out:
        done = None
        if out:
            # Of another teacher or other photos, or truncated; those that begin with a dot are not complete
            old = [p for p in cache.glob("*.outputs*") if not p.name.removeprefix(".").startswith(name)]
            remove_files([targets.file, *old])
            done = bisect.bisect_right(targets.ends, out.seek(0, os.SEEK_END)) - 1
            out.truncate(targets.ends[done])
        steps, hidden = range(gather(done)[0], len(data), world_size()), None if out else True
        for start in tqdm(steps, "running the teacher", unit="photo", unit_scale=world_size(), leave=False, disable=hidden):
            use_idle_cores()
            index = min(start + rank(), len(data) - 1)  # in the last step some ranks may repeat what another one does
            output = self_ensemble(run_teacher, data.blurry[index], orientations)
            target = to_tensor(data.sharp[index]).lerp(torch.from_numpy(output).movedim(-1, 0).clamp(0, 1), weight)
            for pixels in gather(np.ascontiguousarray(to_pixels(target)))[: len(data) - start]:
                if out:
                    out.write(pixels.data)
    return targets


@torch.no_grad()
def cache_blur_embeddings(network: nn.Module, data: PairedImageDataset, device: torch.device) -> torch.Tensor | None:
    """``network.embed_blur`` of each photo in its eight orientations, (n, 8, 637), for a frozen blur estimator.

    None for a network that needs the spectra themselves, as ``TeacherCNN`` does.
    """
    if not hasattr(network, "embed_blur"):
        return None
    code = code_fingerprint(type(network), transform_spectrum)
    file = data.cache / f"{data.key}-{fingerprint(network.estimator)}-{code}.embeddings"
    with main_process_first():
        if not file.is_file():
            remove_files(file.parent.glob("*.embeddings"))
            bar = tqdm(data.spectra, "estimating blur", unit="photo", leave=False, disable=None)
            orientations = (torch.stack([transform_spectrum(each, dihedral) for dihedral in range(8)]) for each in bar)
            write_torch_file(file, torch.stack([network.embed_blur(each.to(device)).cpu() for each in orientations]))
        return read_torch_file(file)
