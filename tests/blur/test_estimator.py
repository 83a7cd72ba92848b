import math
import os
import resource
from copy import deepcopy
from unittest.mock import Mock

import pytest
import torch
from conftest import dummy_photo, small_config

import training.estimator
from blocks import FiLM
from blur.camera import add_noise
from blur.estimator import BlurEstimator
from blur.filters import convolve, gaussian_kernel, line_kernel
from blur.local import BlurMap
from blur.spectrum import (
    blurriest_windows,
    color_windows,
    gray_mean,
    log_power_spectrum,
    transform_spectrum,
    windowed_fft,
)
from dataset import PairedImageDataset, SyntheticBlurDataset
from models import TeacherCNN
from training.estimator import compute_spectra, filter_gain, response_of, train_estimator
from utils import UserError, to_tensor

CPU = torch.device("cpu")


def photo_of(size=256, seed=5):
    return to_tensor(dummy_photo(size, size, seed=seed))


def trained(estimator):
    for parameter in estimator.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    return estimator


def test_a_description_tells_blur_and_noise():
    sharp = photo_of()
    versions = [sharp, convolve(sharp, gaussian_kernel(0.7)), convolve(sharp, gaussian_kernel(2.0))]
    versions.append(add_noise(versions[2], 3, torch.Generator().manual_seed(0)).clamp(0, 1))
    found = log_power_spectrum(torch.stack(versions))
    assert found.shape == (4, 2, 64, 33)
    highest, middle = found[:, 0, :8, 24:].mean((1, 2)), found[:, 0, 18:26, 8:16].mean((1, 2))
    assert middle[0] > middle[1] + 0.5 > middle[2] + 1
    assert highest[3] > highest[2] + 0.5, "noise shows at high frequencies"


def test_a_blur_to_the_side_shows_in_one_direction():
    found = log_power_spectrum(torch.stack([photo_of(), convolve(photo_of(), line_kernel(9, 0.0))]))[:, 0]
    lost = found[0] - found[1]
    assert lost[32, 20:30].mean() > lost[2:12, 0].mean() + 2, "columns are the horizontal frequencies"


def test_the_power_of_a_spectrum_is_the_variance():
    squares = torch.randn(200, 64, 64)
    full = windowed_fft(squares).abs().square()
    total = (2 * full.sum(2) - full[..., 0] - full[..., -1]).sum(1).mean() / 64**2
    assert float(total) == pytest.approx(1, abs=0.02)


def test_a_description_is_the_same_for_bytes_and_for_numbers_and_for_any_batch():
    photo = torch.randint(0, 256, (2, 3, 600, 700), dtype=torch.uint8)
    described = log_power_spectrum(photo.float() / 255)
    torch.testing.assert_close(log_power_spectrum(photo, peak=255), described, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(log_power_spectrum(photo[1:].float() / 255), described[1:], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (9, 3), (63, 65), (127, 5000), (513, 512)])
def test_photos_of_any_size_are_described_from_a_bounded_number_of_windows(size):
    photo = torch.rand(1, 3, *size)
    assert color_windows(photo).shape[1] <= 144 and torch.isfinite(log_power_spectrum(photo)).all()


def test_windows_that_do_not_overlap_are_half_as_many():
    small, large = (color_windows(torch.rand(1, 1, *size)) for size in ((321, 481), (1080, 1920)))
    assert 72 < small.shape[1] <= 144 and 60 < large.shape[1] <= 72


@pytest.mark.parametrize("size", [(128, 3136), (3136, 128), (160, 2368), (512, 513), (4000, 3000)])
def test_windows_are_of_all_parts_of_a_photo(size):
    photo = torch.zeros(1, 1, *size)
    photo[..., size[0] // 2 :, :] += 1
    photo[..., size[1] // 2 :] += 2
    found = gray_mean(color_windows(photo))
    assert found.shape[1] > 60 and float(found.mean()) == pytest.approx(float(photo.mean()), abs=0.05)


@pytest.mark.parametrize("turn", range(8))
def test_the_spectrum_of_a_turned_photo_is_the_turned_spectrum(turn):
    photo = torch.rand(3, 64, 64)
    photo[:, 0], photo[:, :, 0] = 0.5, 0.5  # a Hann window is 0 there, and what is left is symmetric
    turned = (photo[:, 1:, 1:].flip(2) if turn >= 4 else photo[:, 1:, 1:]).rot90(turn % 4, (1, 2))
    expected = photo.clone()
    expected[:, 1:, 1:] = turned
    torch.testing.assert_close(
        transform_spectrum(log_power_spectrum(photo[None]), turn), log_power_spectrum(expected[None]), atol=1e-2, rtol=1e-2
    )


@pytest.mark.parametrize("kernel", [gaussian_kernel(2.0), line_kernel(11, 0.0)], ids=["gaussian", "motion"])
def test_the_blurriest_windows_are_those_of_the_part_that_is_blurred_and_show_its_blur(kernel):
    photo = photo_of(384)
    blurred = convolve(photo, kernel)
    partly = photo.clone()
    partly[:, 200:, 100:] = blurred[:, 200:, 100:]  # 40% of the photo
    partly[:, :64] = 0.5  # without texture
    soft, whole = log_power_spectrum(partly[None], with_blurriest=True)[0].split(2)
    torch.testing.assert_close(whole, log_power_spectrum(partly[None])[0])
    wanted = log_power_spectrum(blurred[None, :, 200:, 100:])[0]
    fine = slice(32 - 5, 32 + 5), slice(10, 20)  # horizontal frequencies, which the blur removes
    assert (soft - wanted)[0][fine].mean().abs() < 1 < (whole - wanted)[0][fine].mean()


@pytest.mark.parametrize("count", [1, 2, 5, 144])
def test_a_twelfth_of_the_windows_is_selected_the_same_in_any_batch(count):
    powers = torch.rand(3, count, 64, 33, generator=torch.Generator().manual_seed(count))
    selected = powers.take_along_dim(blurriest_windows(powers)[..., None, None], 1)
    assert selected.shape == (3, math.ceil(count / 12), 64, 33)
    assert torch.equal(selected[1:2], powers[1:2].take_along_dim(blurriest_windows(powers[1:2])[..., None, None], 1))
    assert all(any(torch.equal(window, each) for each in powers[0]) for window in selected[0])


@pytest.mark.parametrize("exponential", [False, True])
@pytest.mark.parametrize("radius", [8, 31])
def test_an_estimator_starts_with_the_filter_that_changes_nothing(radius, exponential):
    photo, size = torch.rand(2, 3, 50, 70), 2 * radius + 1
    estimator = BlurEstimator(kernel_radius=radius, exponential=exponential)
    kernel, embedding, profile = estimator(log_power_spectrum(photo, with_blurriest=True))
    assert kernel.shape == (2, 1, size, size) and embedding.shape == (2, 64) and profile.shape == (2, 184)
    torch.testing.assert_close(convolve(photo, kernel), photo, atol=1e-5, rtol=0)


@pytest.mark.parametrize("exponential", [False, True])
@pytest.mark.parametrize("radius", [8, 31])
def test_a_filter_keeps_brightness_and_is_symmetric(radius, exponential):
    estimator = trained(BlurEstimator(kernel_radius=radius, exponential=exponential))
    kernel, *_ = estimator(log_power_spectrum(torch.rand(3, 3, 90, 80), with_blurriest=True))
    assert (kernel[:, 0].flatten(1).abs().sum(1) - 1).abs().min() > 1e-3, "it does something"
    torch.testing.assert_close(kernel.sum((1, 2, 3)), torch.ones(3))
    torch.testing.assert_close(kernel, kernel.flip(2, 3))


@pytest.mark.parametrize("regions", [(1, 1), (2, 3)])
def test_film_starts_by_changing_nothing(regions):
    shapes = (2, *regions, 3, 3), (2, *regions, 2 * 64), (2, 3, 3), (2, 1, 1, 1), (2, 3)
    blur = BlurMap(*map(torch.randn, shapes))
    films = list(FiLM([8, 6, 8], hidden=4)(blur, (2, 3, 128, 256), 4))
    assert [[each.shape[:2] for each in film] for film in films] == [[(2, channels)] * 2 for channels in (8, 6, 8)]
    assert not any(each.any() for film in films for each in film)


def test_the_gain_of_a_filter_read_from_spectra_is_its_gain_on_the_photo():
    class One:
        def __len__(self):
            return 1

        def whole(self, index, draw):
            sharp = torch.rand(3, 400, 400, generator=torch.Generator().manual_seed(0))  # all over the same texture
            return convolve(sharp, gaussian_kernel(1.0)), sharp

    spectra = compute_spectra(One(), 1, workers=0)
    kernel = torch.zeros(1, 1, 63, 63)
    kernel[..., 28:35, 28:35] = -gaussian_kernel(1.0)[1:-1, 1:-1]
    kernel[..., 31, 31] += 2
    kernel = kernel / kernel.sum()
    blurry, sharp = (photo.mean(0) for photo in One().whole(0, 0))
    sharpened = convolve(blurry.expand(1, 3, -1, -1), kernel)[0, 0]
    gain = 10 * ((blurry - sharp).square().mean() / (sharpened - sharp).square().mean()).log10()
    assert gain > 0.3
    assert filter_gain(response_of(kernel), spectra).tolist() == pytest.approx(3 * [float(gain)], abs=0.05)
    assert filter_gain(torch.ones(1, 64, 33), spectra).tolist() == pytest.approx([0, 0, 0])


def test_spectra_that_workers_take_hold_no_files_open(pairs):
    photos = PairedImageDataset(pairs / "train", 32)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, hard))
    try:
        found = compute_spectra(photos, 20, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.shape == (180, 7, 64, 33) and torch.equal(found[:9], compute_spectra(photos, 1, workers=0))


def test_an_estimator_that_diverges_is_said_and_not_kept(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(training.estimator, "SPECTRA_PER_STEP", 3)
    train_set = PairedImageDataset(pairs / "train", 32)
    config = small_config(estimator_passes=4, estimator_learning_rate=1e8)
    with pytest.raises(UserError, match="the blur estimator's filters are not finite: lower ESTIMATOR_LEARNING_RATE"):
        train_estimator(TeacherCNN(4, 8, [8], 1), train_set, train_set, tmp_path / "estimator.pth", config, CPU)
    assert not (tmp_path / "estimator.pth").exists()


def test_an_estimator_learns_to_sharpen_and_is_found_again(tmp_path, pairs, capsys, monkeypatch):
    monkeypatch.setattr(training.estimator, "SPECTRA_PER_STEP", 3)
    train_set, teacher = PairedImageDataset(pairs / "train", 32), TeacherCNN(4, 8, [8], 1)
    again, untaught = deepcopy(teacher), deepcopy(teacher)
    val_set = PairedImageDataset(pairs / "val")
    config = small_config(estimator_passes=10)
    train_estimator(teacher, train_set, val_set, tmp_path / "estimator.pth", config, CPU)
    spectra = compute_spectra(train_set, 1, 0)
    for estimator in teacher.estimator, teacher.student_estimator:
        with torch.no_grad():
            gain = filter_gain(response_of(estimator(spectra[:, :4])[0]), spectra)
        assert gain.mean() > 1
        assert all(each.requires_grad == (estimator is teacher.estimator) for each in estimator.parameters())
    assert "gain" in capsys.readouterr().out
    train_estimator(again, train_set, val_set, tmp_path / "estimator.pth", config, CPU)
    assert not capsys.readouterr().out, "it was found"
    for one, other in zip(teacher.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    with monkeypatch.context() as changed, pytest.raises(AssertionError, match="computed again"):
        changed.setattr(training.estimator, "MSE_FLOOR", 2e-5)  # of other code
        changed.setattr(training.estimator, "compute_spectra", Mock(side_effect=AssertionError("computed again")))
        train_estimator(again, train_set, val_set, tmp_path / "estimator.pth", config, CPU)
    (tmp_path / "estimator.pth").write_text("damaged")
    train_estimator(untaught, train_set, val_set, tmp_path / "estimator.pth", config, CPU)
    assert "gain" in capsys.readouterr().out, "it was learned anew"
    for one, other in zip(teacher.estimator.parameters(), untaught.estimator.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_patches_of_photos_blurred_on_the_fly_come_with_the_description_of_the_whole(pairs, tmp_path):
    paths = sorted((pairs / "train").glob("*/sharp.png"))
    photos = SyntheticBlurDataset(paths, tmp_path / "cache", patch_size=32, seed=1)
    blurry, sharp, spectrum, _ = photos[range(4)]
    assert blurry.shape == sharp.shape == (4, 3, 32, 32) and spectrum.shape == (4, 9, 64, 33)
    again = SyntheticBlurDataset(paths, tmp_path / "cache", patch_size=32, seed=1)
    late = again[range(30, 31)]  # of a later version
    assert torch.equal(again[range(2, 3)][2][0], spectrum[2]) and torch.equal(late[0], photos[range(30, 31)][0])
