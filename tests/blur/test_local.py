"""Blur by region: what holds for any photo, whole and in tiles."""

import pytest
import torch
from conftest import dummy_photo, texture

import inference
from blur.filters import convolve, gaussian_kernel, line_kernel
from blur.local import (
    CELL,
    REGION,
    SURROUNDINGS,
    BlurMap,
    local_spectra,
    region_centers,
    softness_map,
    surroundings,
    upper_half,
)
from blur.spectrum import log_power_spectrum
from inference import run_tiled
from models import TeacherCNN
from utils import to_tensor


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 191, 193, 320, 321, 5000])
def test_every_pixel_is_near_the_center_of_a_region(length):
    centers = torch.tensor(region_centers(length))
    pixels = torch.arange(length) + 0.5
    assert (pixels[:, None] - centers).abs().amin(1).max() <= REGION
    for center in centers.tolist():
        rows, _ = surroundings((center, center), (length, 400))
        assert 0 <= rows.start < rows.stop <= length and rows.stop - rows.start == min(length, SURROUNDINGS)


def test_spectra_are_those_of_the_surroundings_and_of_the_whole_photo():
    photo = torch.rand(2, 3, 300, 420)
    whole = log_power_spectrum(photo)
    spectra = torch.stack(list(local_spectra(photo, whole)), 1)
    assert spectra.shape == (2, len(region_centers(300)), len(region_centers(420)), 4, 64, 33)
    assert torch.equal(spectra[:, 1, 2, 2:], whole)
    torch.testing.assert_close(spectra[:, 0, 0, :2], log_power_spectrum(photo[..., :SURROUNDINGS, :SURROUNDINGS]))


@pytest.mark.parametrize("kernel", [gaussian_kernel(1.5), line_kernel(9, 0.4)])
def test_the_softness_map_shows_where_a_photo_is_blurry(kernel):
    photo = texture(320, 448)
    photo[..., :240, 288:] = convolve(photo, kernel[None, None])[..., :240, 288:]
    softness = softness_map(photo, log_power_spectrum(photo, with_blurriest=True))[0, ..., 0]
    blurry, sharp = softness[:14, 19:], softness[:, :17]
    assert softness.shape == (20, 28) and blurry.min() > 0.2 and sharp.max() < 0


@pytest.mark.parametrize("size", [(1, 1), (20, 333), (129, 64), (300, 16)])
def test_a_softness_map_does_not_depend_on_scale_or_contrast(size):
    photo = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    spectra = log_power_spectrum(photo, with_blurriest=True)
    softness = softness_map(photo, spectra)
    assert softness.shape == (2, -(-size[0] // CELL), -(-size[1] // CELL), 1) and torch.isfinite(softness).all()
    torch.testing.assert_close(softness_map(255 * photo, spectra, 255), softness, atol=1e-4, rtol=0)
    torch.testing.assert_close(softness_map(photo / 2 + 0.1, spectra), softness, atol=1e-3, rtol=0)


NO_NOISE = torch.zeros(1, 3)


def random_map(regions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, *regions, 5, 9), (1, *regions, 5), (1, 5, 9), (1, *regions, 1), (1, 3)
    return BlurMap(*(torch.randn(shape, generator=generator) for shape in shapes))


def test_equal_filters_everywhere_are_one_filter():
    photo, kernel, soft = torch.rand(1, 3, 300, 420), gaussian_kernel(1.5), gaussian_kernel(1.4)
    assert kernel.shape == soft.shape
    halves = [upper_half(each[None, None]) for each in (kernel, soft)]
    blur = BlurMap(halves[0].expand(1, 2, 3, -1, -1), torch.zeros(1, 2, 3, 5), halves[1], torch.zeros(1, 1, 1, 1), NO_NOISE)
    expected = torch.cat([convolve(photo, each[None, None]) for each in (kernel, soft)], 1)
    torch.testing.assert_close(blur.apply_filters(photo, exact=False), expected, atol=1e-5, rtol=0)


def test_a_smooth_gradient_has_no_seams():
    """The largest step between neighbours is that of the ramp, however much the regions differ."""
    ramp = torch.linspace(0.2, 0.8, 420).expand(1, 3, 300, 420)
    kernels = torch.stack([gaussian_kernel(s, s) for s in (1.0, 1.0)])
    kernels = torch.nn.functional.pad(kernels, (2, 2, 2, 2))
    sharpening = -kernels.clone()
    sharpening[:, 6, 6] += 2
    kernels = torch.stack([kernels[0], sharpening[0], kernels[1]] * 2)[:, None]
    halves = upper_half(kernels)
    blur = BlurMap(halves.view(1, 2, 3, 7, 13), torch.zeros(1, 2, 3, 5), halves[:1], torch.zeros(1, 1, 1, 1), NO_NOISE)
    result = blur.apply_filters(ramp, exact=True)[:, :3, :, 8:-8]  # borders are reflected
    step = 0.6 / 419
    assert (result.diff(dim=-1) - step).abs().max() < 0.05 * step and result.diff(dim=-2).abs().max() < 1e-6


def test_values_are_exact_at_centers_linear_between_them_and_constant_beyond():
    blur, (first, second) = random_map((2, 3)), region_centers(2 * REGION)
    values = blur.interpolate(blur.embeddings, 2 * REGION + 20, 3 * REGION + 20, 1)
    at_center = values[0, :, first - 1 : first + 1, second - 1 : second + 1].mean((1, 2))  # a center is between pixels
    torch.testing.assert_close(at_center, blur.embeddings[0, 0, 1], atol=0.05, rtol=0)
    left, middle, right = (values[0, :, first + 5, first + 10 * k] for k in (1, 2, 3))
    torch.testing.assert_close(middle, (left + right) / 2, atol=1e-5, rtol=0)
    assert torch.equal(values[..., : first - 1, :], values[..., :1, :].expand(-1, -1, first - 1, -1))


@pytest.mark.parametrize("top, bottom", [(0, 16), (16, 96), (96, 200), (200, 400), (368, 400), (0, 400)])
def test_a_part_of_the_map_is_the_map_of_the_part(top, bottom):
    blur = random_map((6, 8))._replace(softness=torch.randn(1, 25, 33, 1))  # of 400x520 pixels
    part = blur.crop(slice(top, bottom), slice(200, 328))
    for name, step, cell in ("embeddings", 2, REGION), ("embeddings", 4, REGION), ("softness", 1, CELL):
        whole = blur.interpolate(getattr(blur, name), 400 // step, 520 // step, step, cell)
        of_part = part.interpolate(getattr(part, name), (bottom - top) // step, 128 // step, step, cell)
        assert torch.equal(of_part, whole[..., top // step : bottom // step, 200 // step : 328 // step])


@pytest.mark.parametrize("size", [(200, 290), (129, 420), (64, 64), (20, 333)])
def test_a_teacher_gives_the_same_in_tiles_where_the_blur_differs(size, monkeypatch):
    torch.manual_seed(1)
    teacher = TeacherCNN(width=4, deep_width=8, hidden=[8, 8], fine_blocks=1).eval()
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    photo = to_tensor(dummy_photo(*size, seed=2))[None]
    photo[..., size[1] // 2 :] = convolve(photo, gaussian_kernel(2.0)[None, None])[..., size[1] // 2 :]
    teacher.double()
    with torch.no_grad():
        whole = teacher(photo.double())
        monkeypatch.setattr(inference, "TILE", 64)
        torch.testing.assert_close(run_tiled(teacher, photo.double()), whole, atol=1e-12, rtol=0)
    assert (whole - photo).abs().max() > 0.01
