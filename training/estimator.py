"""The blur estimator is trained first and alone: which linear filter brings each blurry photo closest to its sharp version.

How close a filter brings it follows from two power spectra and a cross spectrum. They are computed once, from the whole of
each version of each photo, its blurriest windows and a random region; after that a step costs as little as one patch of the
main training.
"""

import contextlib
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from blur.estimator import BlurEstimator
from blur.local import surroundings
from blur.spectrum import (
    WINDOW,
    blurriest_windows,
    color_windows,
    gray_mean,
    log_power_spectrum,
    power,
    transform_spectrum,
    windowed_fft,
)
from images.files import read_torch_file, write_torch_file
from training.config import TrainConfig
from training.distributed import main_process_first
from training.fingerprint import code_fingerprint, fingerprint
from training.loop import in_shared_memory
from utils import UserError, make_generator, print0

MSE_FLOOR = 1e-5  # added to each mean squared error, 50 dB: a photo that is sharp already must not outweigh all others
SPECTRA_PER_STEP = 32


def train_estimator(
    network: nn.Module, train_set: Dataset, val_set: Dataset, file: Path, config: TrainConfig, device: torch.device
) -> None:
    """Train ``network.estimator`` and then, from the layers that both have, ``network.student_estimator``, if any.

    The result is stored in ``file`` and reused for the same estimator, photos and settings. How many blurry versions of each
    photo they are trained on, and for how many passes, ``config`` says.

    Args:
        train_set, val_set: ``whole(index, blur_version)`` gives a blurry and a sharp photo, (3, H, W) each.
    """
    both = [getattr(network, name, None) for name in ("estimator", "student_estimator")]
    estimators = nn.ModuleList(each for each in both if isinstance(each, BlurEstimator))
    if not estimators:
        return
    names = "estimator_versions", "estimator_passes", "estimator_learning_rate", "seed"
    settings = {name: getattr(config, name) for name in names} | dict(photos=train_set.key, start=fingerprint(estimators))
    settings["code"] = code_fingerprint(type(train_set), CrossSpectra, fit_filters)
    with main_process_first():
        stored = {}
        with contextlib.suppress(UserError):  # missing or damaged: it is trained again
            stored = read_torch_file(file)
        if stored.get("settings") != settings:
            spectra = compute_spectra(train_set, config.estimator_versions, config.num_workers)
            val_spectra = compute_spectra(val_set, None, config.num_workers)
            gains = []
            for estimator in estimators:
                own, first = estimator.state_dict(), estimators[0].state_dict()
                same = {name: value for name, value in first.items() if value.shape == own[name].shape}
                estimator.load_state_dict(same, strict=False)  # the layers that both have
                fit_filters(estimator, spectra, config, device)
                with torch.no_grad():
                    gain = filter_gain(response_of(estimator.cpu()(val_spectra[:, :4])[0]), val_spectra).mean()
                if not math.isfinite(gain):
                    raise UserError("the blur estimator's filters are not finite: lower ESTIMATOR_LEARNING_RATE")
                gains.append(f"{gain:+.2f} dB")
            small = ", the small ones for students ".join(gains)
            print0(f"on the validation photos the blur estimator's filters alone gain {small}")
            stored = {"settings": settings, "weights": estimators.state_dict()}
            write_torch_file(file, stored)
    estimators.load_state_dict(stored["weights"])
    estimators.to(device)


class CrossSpectra(Dataset):
    """Item k: a list of the spectra of one blurry version of a photo, (3, 7, 64, 33): see ``compute_spectra``."""

    def __init__(self, photos: Dataset, versions: int | None):
        self.photos, self.versions = photos, versions

    def __len__(self) -> int:
        return len(self.photos) * (self.versions or 1)

    def __getitem__(self, k: int) -> list[Tensor]:
        version, index = divmod(k, len(self.photos))
        pair = self.photos.whole(index, version if self.versions else None)
        blurriest, whole = log_power_spectrum(pair[0][None], with_blurriest=True)[0].chunk(2)
        size, generator = pair[0].shape[-2:], make_generator(5, k)
        center = tuple(int(torch.randint(length, (), generator=generator)) for length in size)
        around = [photo[(..., *surroundings(center, size))] for photo in pair]
        windows = [windowed_fft(gray_mean(color_windows(photo[None])))[0] for photo in pair]
        in_region = [windowed_fft(gray_mean(color_windows(photo[None])))[0] for photo in around]
        soft = blurriest_windows(power(windows[0])[None])[0]
        found = [(whole, windows), (blurriest, [each[soft] for each in windows])]
        found.append((log_power_spectrum(around[0][None])[0], in_region))
        return [torch.stack([torch.cat([spectrum, whole, mean_powers(*part)]) for spectrum, part in found])]


def mean_powers(blurry: Tensor, sharp: Tensor) -> Tensor:
    """Mean power of blurry, that of sharp, and the real part of their cross spectrum, (3, 64, 33), from (n, 64, 33) each."""
    return torch.stack([power(blurry), power(sharp), (sharp * blurry.conj()).real]).mean(1).roll(WINDOW // 2, 1)


def compute_spectra(photos: Dataset, versions: int | None, workers: int) -> Tensor:
    """Spectra of each version of each photo: of the whole, the blurriest windows and a random region, (3 n, 7, 64, 33).

    ``versions`` is their number per photo; None: the one to validate on. Four channels are what the estimator is given, the
    ``log_power_spectrum`` of the blurry part and of the whole photo; the others are their ``mean_powers``.
    """
    dataset = CrossSpectra(photos, versions)
    spectra = torch.empty(len(dataset), 3, 7, WINDOW, WINDOW // 2 + 1)
    loader = DataLoader(dataset, batch_size=None, collate_fn=in_shared_memory, num_workers=workers)
    bar = tqdm(loader, "spectra of photos", total=len(dataset), unit="photo", leave=False, disable=None)
    for k, (each,) in enumerate(bar):
        spectra[k] = each  # copied: a tensor from a worker process keeps a file open
    return spectra.flatten(0, 1)


def filter_gain(response: Tensor, spectra: Tensor) -> Tensor:
    """Gain in dB of filters with that ``response``, (N, 64, 33), on photos with those ``spectra``, (N, 7, 64, 33): (N,).

    The error of a filter W is |X - W Y|^2 at each frequency, for spectra X of the sharp and Y of the blurry photo.
    """
    blurry, sharp, cross = spectra[:, 4:].unbind(1)
    weight = torch.full((WINDOW // 2 + 1,), 2.0, device=spectra.device)  # most columns also represent their mirror images
    weight[0] = weight[-1] = 1
    error = sharp - 2 * response * cross + response.square() * blurry
    before, after = (((x * weight).sum((1, 2)) / WINDOW**2) for x in (sharp - 2 * cross + blurry, error))
    return 10 * ((before.clamp(min=0) + MSE_FLOOR) / (after.clamp(min=0) + MSE_FLOOR)).log10()


def response_of(kernel: Tensor) -> Tensor:
    """Frequency responses, (N, 64, 33), of kernels (N, 1, k, k)."""
    size = kernel.shape[-1]
    circular = nn.functional.pad(kernel[:, 0], (0, WINDOW - size) * 2).roll((-(size // 2),) * 2, (1, 2))
    return torch.fft.rfft2(circular).real.roll(WINDOW // 2, 1)


def fit_filters(estimator: BlurEstimator, spectra: Tensor, config: TrainConfig, device: torch.device) -> None:
    """Maximize ``filter_gain``."""
    passes, learning_rate = config.estimator_passes, config.estimator_learning_rate
    steps = max(1, len(spectra) * passes // SPECTRA_PER_STEP)
    trainable = next(estimator.parameters()).requires_grad  # that for students is frozen
    estimator.to(device).requires_grad_().train()
    optimizer = torch.optim.AdamW(estimator.parameters(), learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps + 1)
    generator = make_generator(config.seed, 4)
    order = torch.cat([torch.randperm(len(spectra), generator=generator) for _ in range(passes)])
    for step in tqdm(range(steps), "blur estimator", unit="step", leave=False, disable=None):
        batch = spectra[order[step * SPECTRA_PER_STEP : (step + 1) * SPECTRA_PER_STEP]].to(device)
        batch = transform_spectrum(batch, int(torch.randint(8, (), generator=generator)))
        kernel, *_ = estimator(batch[:, :4])
        loss = -filter_gain(response_of(kernel), batch).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(estimator.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    estimator.eval().requires_grad_(trainable)
