"""The gauge learns first, and alone: which linear filter brings each blurry photo nearest to its sharp one.

How far a filter brings a photo follows from two spectra and what they share, so after these were taken of whole photos
once, a step of this training costs as much as one patch of another.
"""

import math

from pathlib import Path

import torch

from torch import Tensor, nn

from torch.utils.data import DataLoader, Dataset

from tqdm import tqdm

from dataset import without_traceback

from files import read_torch_file, write_torch_file

from estimator import WINDOW, BlurEstimator, log_means, power, spectrum, transform_spectrum, windows

from patches import generator_of

from processes import main_process_first, print0

from utils import UserError

FLOOR = 1e-5  # mean squared error added to each photo's own, 50 dB: one that is sharp already must not outweigh all others

def train_estimator(
    network: nn.Module,
    train_set: Dataset,
    val_set: Dataset,
    file: Path,
    *,
    seed: int,
    workers: int,
    device: torch.device,
    draws: int = 1,
    passes: int = 16,
    learning_rate: float = 4e-3,
    batch_size: int = 32,
) -> None:
    """Train ``network.gauge`` on ``draws`` blurry versions of each photo, ``passes`` times each in one of eight positions.

    What it learns is kept in ``file``: the same gauge, photos and settings find it there. Nothing is done to a network
    without a gauge.

    Args:
        train_set, val_set: ``whole(index, draw)`` gives a blurry and a sharp photo, (3, H, W) each.
    """
    estimator = getattr(network, "gauge", None)
    if not isinstance(estimator, BlurEstimator):
        return
    settings = dict(draws=draws, passes=passes, learning_rate=learning_rate, seed=seed, photos=train_set.key)
    settings["start"] = sum(float(value.double().abs().sum()) for value in estimator.state_dict().values())

    def learn() -> dict:
        known = _known(file)
        if known.get("settings") != settings:
            data = take_spectra(train_set, draws, workers)
            apart = take_spectra(val_set, 1, workers)
            run_steps(estimator, data, passes, batch_size, learning_rate, seed, device)
            with torch.no_grad():
                gain = filter_gain(response_of(estimator.cpu()(description_in(apart))[0]), apart).mean()
            if not math.isfinite(gain):
                raise UserError("the gauge did not learn, its filters are not finite: lower GAUGE_LEARNING_RATE")
            print0(f"the gauge's filters alone bring {gain:+.2f} dB in brightness on the validation photos")
            known = {"settings": settings, "weights": estimator.state_dict()}
            write_torch_file(file, known)
        return known["weights"]

    estimator.load_state_dict(main_process_first(learn))
    estimator.to(device)

def _known(file: Path) -> dict:
    try:
        known = read_torch_file(file)
    except UserError:
        return {}  # not there, or damaged: it is learned anew
    return known if isinstance(known, dict) else {}

class Spectra(Dataset):
    """Item k: what ``filter_gain`` needs of one blurry version of a photo, (5, 64, 33): see ``take_spectra``."""

    def __init__(self, photos: Dataset, draws: int):
        self.photos, self.draws = photos, draws

    def __len__(self) -> int:
        return len(self.photos) * self.draws

    def __getitem__(self, k: int) -> Tensor:
        draw, index = divmod(k, len(self.photos))
        blurry, sharp = self.photos.whole(index, draw)
        of_blurry, of_sharp = spectrum(windows(blurry[None]))[0], spectrum(windows(sharp[None]))[0]
        power_of_blurry, shared = power(of_blurry), (of_sharp * of_blurry.conj()).real
        powers = torch.stack([power_of_blurry, power(of_sharp), shared]).mean(1)
        return torch.cat([log_means(power_of_blurry[None])[0], powers.roll(WINDOW // 2, 1)])

def take_spectra(photos: Dataset, draws: int, workers: int) -> Tensor:
    """Of all versions of all photos, (n, 5, 64, 33).

    Two channels are what ``gauge.describe`` says of the blurry photo; the others are the mean power of blurry, of sharp, and
    the real part of what both share.
    """
    spectra = Spectra(photos, draws)
    found = torch.empty(len(spectra), 5, WINDOW, WINDOW // 2 + 1)
    loader = without_traceback(iter(DataLoader(spectra, batch_size=None, num_workers=workers)))
    bar = tqdm(loader, "spectra of whole photos", total=len(spectra), unit="photo", leave=False, disable=None)
    for k, each in enumerate(bar):
        found[k] = each  # copied: what a worker process sends holds an open file as long as it is kept
    return found

def description_in(spectra: Tensor) -> Tensor:
    return spectra[:, :2]

def filter_gain(response: Tensor, spectra: Tensor) -> Tensor:
    """By how many dB filters of a ``response`` (N, 64, 33) bring photos nearer to the sharp ones: (N,).

    The error of a filter W is |X - W Y|^2 at each frequency, for spectra X of the sharp and Y of the blurry photo.
    """
    blurry, sharp, shared = spectra[:, 2:].unbind(1)
    twice = torch.full((WINDOW // 2 + 1,), 2.0, device=spectra.device)  # all but two columns stand for their mirror images
    twice[0] = twice[-1] = 1
    error = sharp - 2 * response * shared + response.square() * blurry
    before, after = (((x * twice).sum((1, 2)) / WINDOW**2) for x in (sharp - 2 * shared + blurry, error))
    return 10 * ((before.clamp(min=0) + FLOOR) / (after.clamp(min=0) + FLOOR)).log10()

def response_of(kernel: Tensor) -> Tensor:
    """By how much kernels of (N, 1, 63, 63) amplify each frequency, (N, 64, 33)."""
    middle = kernel.shape[-1] // 2
    circular = nn.functional.pad(kernel[:, 0], (0, 1, 0, 1)).roll((-middle, -middle), (1, 2))
    return torch.fft.rfft2(circular).real.roll(WINDOW // 2, 1)

def run_steps(
    estimator: BlurEstimator, data: Tensor, passes: int, batch_size: int, learning_rate: float, seed: int, device: torch.device
) -> None:
    """Train ``gauge`` on ``data``, as ``take_spectra`` gives it, for ``passes`` through all of it."""
    steps = max(1, len(data) * passes // batch_size)
    estimator.to(device).train()
    optimizer = torch.optim.AdamW(estimator.parameters(), learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps + 1)
    generator = generator_of(seed, 4)
    order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(passes)])
    bar = tqdm(range(steps), "the gauge", unit="step", leave=False, disable=None)
    for step in bar:
        spectra = data[order[step * batch_size : (step + 1) * batch_size]].to(device)
        spectra = transform_spectrum(spectra, int(torch.randint(8, (), generator=generator)))
        kernel, _ = estimator(description_in(spectra))
        loss = -filter_gain(response_of(kernel), spectra).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(estimator.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    estimator.eval()
