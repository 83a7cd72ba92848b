import math

import pytest
import torch
from conftest import dummy_photo

from blur.noise import FLOOR, chroma_noise
from blur.spectrum import color_windows
from utils import to_tensor


def noise_of(photo, peak=1.0):
    return chroma_noise(color_windows(photo), peak)


def noisy(photo, sigma, seed=0):
    return photo + sigma / 255 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma", [2.0, 6.0, 20.0])
@pytest.mark.parametrize("size", [(64, 64), (203, 301), (1080, 400)])
def test_white_noise_is_measured_whatever_the_detail_of_the_photo(sigma, size):
    photo = to_tensor(dummy_photo(*size, seed=1))[None]
    expected = sigma / 255 * math.sqrt(2 / 3 * 15 / 16)  # of three channels less their mean, within blocks of 16 pixels
    assert noise_of(noisy(photo, sigma)).exp()[0, 0] == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("size", [(160, 160), (512, 512), (600, 800)])
def test_all_parts_of_a_photo_count(size):
    generator = torch.Generator().manual_seed(0)
    noise = torch.linspace(0, 10 / 255, size[0])[:, None] * torch.randn(1, 3, *size, generator=generator)
    from_top_to_bottom = 0.5 + noise
    from_left_to_right = from_top_to_bottom.rot90(1, (2, 3))
    torch.testing.assert_close(noise_of(from_left_to_right), noise_of(from_top_to_bottom), atol=0.12, rtol=0)


def test_more_noise_is_larger_in_every_quantile_and_quantiles_ascend():
    photo = to_tensor(dummy_photo(200, 300, seed=2))[None]
    less, more = (noise_of(noisy(photo, sigma)) for sigma in (1, 3))
    assert less.shape == (1, 3) and (more > less).all() and (more.diff() >= 0).all()


def test_gray_photos_have_no_chroma():
    gray = noisy(torch.full((2, 1, 100, 90), 0.5), 10)
    for photo in gray, gray.expand(-1, 3, -1, -1):
        torch.testing.assert_close(noise_of(photo), torch.full((2, 3), math.log(FLOOR)), atol=1e-2, rtol=0)


def test_8_and_16_bits_are_measured_like_floats():
    pixels = torch.from_numpy(dummy_photo(90, 120, seed=3)).movedim(-1, 0)[None]
    expected = noise_of(pixels / 255)
    torch.testing.assert_close(noise_of(pixels, 255), expected)
    torch.testing.assert_close(noise_of((pixels.int() * 257).to(torch.uint16), 65535), expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (63, 65), (2000, 70)])
def test_any_size_is_measured(size):
    photo = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert color_windows(photo).shape[2:] == (64, 64, 3)
    assert torch.isfinite(noise_of(photo)).all()
