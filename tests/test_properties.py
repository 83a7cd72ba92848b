"""What must hold for any size and any values: of blurs, metrics and networks, on draws at random, seeded."""

import numpy as np
import pytest
import torch
from conftest import changing_network, dummy_photo, fit, small_config
from torch import nn

import blur.degradations as D
from blur.filters import convolve
from blur.noise import photo_spectra
from blur.spectrum import log_power_spectrum
from dataset import PairedImageDataset
from inference import Sharpener, VideoSharpener
from models import StudentCNN, TeacherCNN
from utils import make_generator, psnr, quantize_8bit, ssim

NETWORKS = {
    "student": lambda: StudentCNN(convs=2, num_experts=3, hidden=8),
    "teacher": lambda: TeacherCNN(width=4, deep_width=8, hidden=[8], fine_blocks=1),
}


def random_photo(rng: np.random.Generator, most: int = 70) -> torch.Tensor:
    """(3, H, W) of any size: noise, one color, black, white or a ramp, in 8-bit steps."""
    height, width = (int(n) for n in rng.integers(1, most, 2))
    kind = rng.integers(5)
    if kind == 0:
        photo = rng.random((3, height, width))
    elif kind == 1:
        photo = np.broadcast_to(rng.random((3, 1, 1)), (3, height, width))
    elif kind == 4:
        photo = np.broadcast_to(np.linspace(0, 1, width), (3, height, width))
    else:
        photo = np.full((3, height, width), kind - 2.0)
    return quantize_8bit(torch.tensor(photo))


@pytest.mark.parametrize("seed", range(60))
def test_any_photo_is_blurred_to_8_bits_of_its_size_the_same_each_time(seed):
    photo = random_photo(np.random.default_rng([1, seed]))
    blurry, sharp = D.random_degradation(photo, make_generator(1, seed))
    assert blurry.shape == sharp.shape == photo.shape and torch.isfinite(blurry).all() and torch.isfinite(sharp).all()
    assert torch.equal(blurry, quantize_8bit(blurry))
    assert torch.equal(blurry, D.random_degradation(photo, make_generator(1, seed))[0])


@pytest.mark.parametrize("kind", ["gaussian", "anisotropic", "defocus", "line", "shake"])
def test_any_kernel_of_the_mixture_keeps_energy_and_amplifies_nothing(kind):
    for seed in range(15):
        kernel = D.random_kernel(kind, make_generator(2, seed), D.Mixture())
        assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1 and (kernel >= 0).all()
        assert float(kernel.sum()) == pytest.approx(1, abs=1e-5)
        assert float(torch.fft.fft2(kernel).abs().max()) <= 1 + 1e-5
        photo = random_photo(np.random.default_rng([2, seed]))
        blurry = convolve(photo, kernel)
        assert blurry.min() >= photo.min() - 1e-5 and blurry.max() <= photo.max() + 1e-5


@pytest.mark.parametrize("seed", range(20))
def test_metrics_are_symmetric_and_bounded_and_perfect_only_for_equals(seed):
    rng = np.random.default_rng([3, seed])
    one = random_photo(rng)[None]
    other = quantize_8bit(one + torch.tensor(rng.normal(0, rng.choice([0.004, 0.1, 1]), one.shape)))
    assert float(ssim(one, other)) == pytest.approx(float(ssim(other, one)), abs=1e-5)
    assert -1 <= float(ssim(one, other)) <= 1 + 1e-5 and float(ssim(one, one)) == pytest.approx(1, abs=1e-5)
    assert torch.equal(psnr(one, other), psnr(other, one))
    assert torch.isinf(psnr(one, other)).all() == torch.equal(one, other)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(8))
def test_any_photo_has_a_finite_result_and_finite_gradients(name, seed):
    torch.manual_seed(seed)
    network = NETWORKS[name]()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    photo = random_photo(np.random.default_rng([4, seed]))[None]
    output = network(photo)
    assert output.shape == photo.shape and torch.isfinite(output).all()
    output.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_photo_that_is_moved_by_whole_squares_is_sharpened_alike(name):
    torch.manual_seed(5)
    network = NETWORKS[name]().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    photo = torch.rand(1, 3, 280, 280)
    with torch.no_grad():
        spectra = torch.cat([log_power_spectrum(photo), photo_spectra(photo)], 1)
        whole, moved = network(photo, spectra), network(photo[..., 16:, 32:], spectra)
    inner = slice(100, 130)
    torch.testing.assert_close(whole[..., 116:146, 132:162], moved[..., inner, inner], atol=1e-4, rtol=0)


def test_a_short_seeded_training_gains_what_it_always_did(pairs, tmp_path):
    """A silent change of the training shows here; rounding differs between processors, so the gain has a band."""
    train_set, val_set = PairedImageDataset(pairs / "train", 32, seed=1), PairedImageDataset(pairs / "val")
    torch.manual_seed(1)
    student = StudentCNN()
    config = small_config(num_epochs=1, batch_size=4, patches_per_photo=80, learning_rate=2e-3)
    fit(student, train_set, val_set, config, tmp_path / "best.pth", tmp_path)
    with torch.no_grad():
        gains = [psnr(student.eval()(b[None]), s[None]) - psnr(b[None], s[None]) for b, s in val_set]
    gain = float(torch.cat(gains).mean())
    assert 0.44 < gain < 0.6, "dB; it was 0.52 when this was written, and 0.46 to 0.49 with other seeds"


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_averaged_over_eight_orientations_a_rotated_photo_becomes_the_rotated_result(depth, channels):
    sharpener = Sharpener(changing_network(), torch.device("cpu"), orientations=8)
    pixels = dummy_photo(60, 84, seed=1)[..., :channels]
    pixels = pixels if depth == 8 else pixels.astype(np.uint16) * 257
    result = sharpener(pixels).astype(int)
    assert np.abs(sharpener(np.rot90(pixels[:, ::-1])).astype(int) - np.rot90(result[:, ::-1])).max() == 0
    once = [np.rot90(Sharpener(changing_network(), torch.device("cpu"))(np.rot90(pixels, k)), -k) for k in range(4)]
    sharpener.orientations = 4
    assert np.abs(sharpener(pixels) - np.mean(once, 0)).max() <= 0.5, "the mean of the first four, rounded"
    assert np.abs(result - once[0]).max() > 0


def test_frames_of_a_video_are_averaged_over_orientations_too():
    sharpener = Sharpener(changing_network(), torch.device("cpu"), orientations=2)
    frames = [dummy_photo(48, 64, seed) for seed in (1, 2)]
    video = VideoSharpener(sharpener)
    assert all(np.array_equal(video(frame), sharpener(frame)) for frame in frames)
