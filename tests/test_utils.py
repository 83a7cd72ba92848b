import urllib.error

import numpy as np
import pytest
import torch
from conftest import DEVICES
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import utils
from utils import (
    PerceptualLoss,
    RelativeMSEAndSSIMLoss,
    UserError,
    autocast_dtype,
    ms_per_megapixel,
    psnr,
    quantize_8bit,
    relative_weight,
    ssim,
)


def two_images(height, width, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, height, width, generator=generator)
    return x, (x + noise * torch.randn(x.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("size", [(11, 11), (11, 40), (12, 17), (37, 64), (120, 81)])
@pytest.mark.parametrize("noise", [0.001, 0.05, 0.4])
def test_ssim_equals_scikit_image(size, noise):
    x, y = two_images(*size, noise)
    expected = [
        structural_similarity(
            a.permute(1, 2, 0).numpy(),
            b.permute(1, 2, 0).numpy(),
            channel_axis=2,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(ssim(x, y).numpy(), expected, atol=1e-4, rtol=0)


def test_psnr_equals_scikit_image():
    x, y = two_images(20, 31)
    expected = [peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(psnr(x, y).numpy(), expected, atol=1e-4)


def test_psnr_of_a_constant_error_is_exact():
    target = torch.full((1, 3, 8, 8), 0.5)
    torch.testing.assert_close(psnr(target + 0.1, target), torch.tensor([20.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (10, 10)])
def test_ssim_below_the_window_is_defined(size):
    x, y = two_images(*size)
    assert torch.allclose(ssim(x, x), torch.ones(2), atol=1e-6)
    assert (ssim(x, y) < 0.9999).all()
    assert torch.allclose(ssim(x, y), ssim(y, x), atol=1e-6)


def test_metrics_of_identical_images_are_perfect_and_per_image():
    x, y = two_images(16, 16)
    y[0] = x[0]
    assert psnr(x, y)[0] == torch.inf and torch.isfinite(psnr(x, y)[1])
    assert ssim(x, y)[0] == 1 and ssim(x, y)[1] < 0.999
    assert psnr(x, y).shape == ssim(x, y).shape == (2,)
    assert psnr(x, y).dtype == ssim(x, y).dtype == torch.float32


def test_ssim_is_the_same_inside_autocast():
    x, y = two_images(32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ssim(x, y)
    assert torch.equal(inside, ssim(x, y))


def test_metrics_refuse_unequal_shapes():
    for metric in psnr, ssim:
        with pytest.raises(ValueError, match="one shape"):
            metric(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 17))


def test_as_saved_is_what_a_png_would_hold():
    image = torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.7]).reshape(1, 1, 1, 5)
    assert torch.allclose(quantize_8bit(image).flatten() * 255, torch.tensor([0.0, 0, 128, 255, 255]))


def test_the_teachers_loss_is_the_error_as_a_share_of_the_blurry_photos_and_what_ssim_lacks_to_1():
    x, y = two_images(16, 16, noise=0.2)
    input_mse = torch.tensor([0.02, 0.05])
    share = (x - y).square().mean((1, 2, 3)) / (input_mse + 3e-5)
    loss = RelativeMSEAndSSIMLoss(ssim_weight=7.0)(x, y, input_mse)
    torch.testing.assert_close(loss, (share + 7 * (1 - ssim(x, y))).mean())


def test_weighted_errors_are_shares_of_the_input_error_however_large_that_is():
    input_mse = torch.tensor([1e-1, 1e-2, 1e-3, 1e-5, 0.0])
    shares = relative_weight(input_mse).flatten() * input_mse / 1e-3
    assert (shares[:3] > 0.97).all() and (shares <= 1).all()
    assert shares[3] < 0.3, "a photo of more than 45 dB counts less"
    assert float(relative_weight(input_mse)[-1]) < 34


def test_the_time_for_a_megapixel_is_a_number_above_0():
    assert 0 < ms_per_megapixel(torch.nn.Conv2d(3, 3, 3), torch.device("cpu"), size=16) < np.inf


def test_a_device_computes_float32_convolutions_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    utils.pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32


def test_an_unknown_device_is_one_sentence():
    with pytest.raises(UserError, match="DEVICE = 'cpuu'"):
        utils.pick_device("cpuu")


def test_absent_cuda_is_one_sentence(monkeypatch):
    def absent(*_, **__):
        raise AssertionError("Torch not compiled with CUDA enabled\nand more")

    monkeypatch.setattr(torch, "zeros", absent)  # on a machine with CUDA too
    with pytest.raises(
        UserError, match=r"DEVICE = 'cuda' cannot be used here \(Torch not compiled with CUDA enabled\): set"
    ):
        utils.pick_device("cuda")


@pytest.mark.parametrize("error, device", [(0, "mps"), (2e-4, "mps"), (0.1, "cpu"), (None, "cpu")])
def test_auto_is_an_apple_gpu_that_computes_as_the_cpu_does(monkeypatch, error, device):
    def to(self, device):
        if device == "mps" and error is None:
            raise RuntimeError("aten::_fft_r2c has no MPS kernel")  # torch raises a subclass of it
        return self * (1 + error) if device == "mps" else self

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert utils.pick_device().type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert utils.pick_device() == torch.device(device)


@pytest.mark.parametrize("device", DEVICES)
def test_metrics_on_every_device_equal_those_of_scikit_image(device):
    x, y = two_images(40, 50)
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0)
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(x, y, strict=True)]
    expected = torch.tensor([structural_similarity(a, b, **options) for a, b in pairs])
    torch.testing.assert_close(ssim(x.to(device), y.to(device)).cpu(), expected.float(), atol=1e-4, rtol=0)
    expected = torch.tensor([peak_signal_noise_ratio(b, a, data_range=1) for a, b in pairs])
    torch.testing.assert_close(psnr(x.to(device), y.to(device)).cpu(), expected.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "capabilities, dtype",
    [
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_bfloat16_is_taken_only_where_a_processor_is_faster_in_it(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert autocast_dtype(torch.device("cpu")) is dtype


def test_a_perceptual_loss_is_0_for_equal_images_and_has_a_gradient_otherwise(perceptual_loss):
    loss_fn, target = perceptual_loss, torch.rand(2, 3, 32, 32)
    prediction = (target + 0.1 * torch.randn_like(target)).requires_grad_()
    assert float(loss_fn(target, target)) == 0
    loss = loss_fn(prediction, target)
    loss.backward()
    assert (
        float(loss.detach()) > float(torch.nn.functional.mse_loss(prediction.detach(), target))
        and prediction.grad.abs().max() > 0
    )
    assert not any(parameter.requires_grad for parameter in loss_fn.parameters())


def test_a_perceptual_loss_without_a_network_connection_is_one_sentence(monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torchvision.models.vgg16", offline)
    with pytest.raises(UserError, match=r"PerceptualLoss cannot download VGG16 .*or use nn\.MSELoss"):
        PerceptualLoss()
