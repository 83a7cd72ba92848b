"""Batches for a training, validation, and the check that a teacher is worth learning from."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dataset import PairedImageDataset
from inference import run_tiled
from training.distributed import gather, rank, world_size
from training.report import score
from utils import Scores, UserError, autocast, one_line, print0, quantize_8bit


@torch.no_grad()
def validate(network: nn.Module, val_set: Dataset, device: torch.device) -> Scores:
    """Mean PSNR and SSIM of the output of ``network`` for each blurry photo, as an 8-bit image, against the sharp one.

    A photo counts for at most 50 dB: the PSNR of a perfect one is infinite, and so would be the mean. Each process scores
    its share of the photos, each photo once.
    """
    network.eval()
    scores = []
    for index in range(rank(), len(val_set), world_size()):
        blurry, sharp = (photo[None].to(device, memory_format=torch.channels_last) for photo in val_set[index])
        with autocast(device):
            prediction = quantize_8bit(run_tiled(network, blurry))
        scores.append(score(prediction[0], sharp[0]))
    everywhere = [each for share in gather(scores) for each in share]
    return Scores(*(sum(values) / len(val_set) for values in zip(*everywhere, strict=True)))


def check_teacher(baselines: dict[str, Scores], weights: Path | str, pairs: Path, required: bool) -> None:
    """Print the scores of input and teacher; raise ``UserError`` if the teacher is ``required`` to be better and is not."""
    blurry, teacher = baselines["input"], baselines["teacher"]
    print0(f"input    {blurry}\nteacher  {teacher}")
    if required and not teacher.beats(blurry):
        error = UserError(
            f"the teacher in {weights} does not beat the blurry input on {pairs}: check that blurry.png and sharp.png are "
            "not equal, swapped or shifted; if they are right, train a teacher on such pairs with pretrain.py, or set "
            "REQUIRE_GOOD_TEACHER = False to distill from this one anyway"
        )
        gather(error)  # raises it, on all ranks


def in_shared_memory(batch: list[Tensor]) -> list[Tensor]:
    """``batch``, from a worker process, where the training reads it from.

    Raises ``UserError`` if no shared memory is left, where torch, which would do the same a little later, would hang.
    """
    try:
        return batch if get_worker_info() is None else [part.share_memory_() for part in batch]
    except RuntimeError as error:
        raise UserError(
            f"a worker process is out of shared memory ({one_line(str(error))[:120]}): set NUM_WORKERS = 0, lower "
            "BATCH_SIZE, or give a container more, as docker run --shm-size=8g does"
        ) from None


def load_batches(
    train_set: Dataset, device: torch.device, steps: range, batch_size: int, workers: int
) -> Iterator[list[Tensor]]:
    """A batch for each of ``steps``, from ``workers`` processes: this rank's share of patches step * ``batch_size`` and on.

    Raises ``UserError`` if a batch cannot be split over the ranks.
    """
    if batch_size % world_size():
        raise UserError(f"BATCH_SIZE = {batch_size} cannot be split over {world_size()} processes: use a multiple")
    if workers and isinstance(train_set, PairedImageDataset) and train_set.embeddings is None:
        _ = train_set.spectra  # computed once here, not in every worker
    share = batch_size // world_size()
    starts = range(steps.start * batch_size + rank() * share, steps.stop * batch_size, batch_size)
    loader = DataLoader(
        train_set,
        batch_size=None,  # an item is a batch already
        sampler=(range(start, start + share) for start in starts),
        collate_fn=in_shared_memory,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it draws from torch's own, which a resumed training must not repeat
    )
    return iter(loader)
