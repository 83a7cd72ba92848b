"""The rival without a network: its blur estimate, its polynomial, halos, and photos of any size."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from conftest import write_pair

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import polyblur

from blur.filters import convolve, gaussian_kernel
from images.photos import read_photo
from utils import psnr, quantize_8bit, to_tensor


@pytest.fixture(scope="module")
def photo():
    return to_tensor(read_photo(Path(skimage.__file__).parent / "data" / "astronaut.png")[:240, :320])


def blurred(photo, *gaussian):
    return quantize_8bit(convolve(photo, gaussian_kernel(*gaussian)))


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_the_blur_is_estimated_from_the_steepest_edges(photo, sigma):
    assert polyblur.estimate_gaussian(blurred(photo, sigma))[:2] == pytest.approx((sigma, sigma), rel=0.3)


@pytest.mark.parametrize("angle", [0.0, 0.8, 2.2])
def test_the_direction_of_the_blur_is_found(photo, angle):
    along, across, found = polyblur.estimate_gaussian(blurred(photo, 3.0, 1.0, angle))
    assert abs(math.remainder(found - angle, math.pi)) < 0.3 and along > 2 * across


def test_a_sharp_photo_is_left_almost_as_it_is(photo):
    assert psnr(polyblur.polyblur(photo)[None], photo[None]) > 35


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_blurred_photo_becomes_sharper(photo, iterations):
    blurry = blurred(photo, 1.0)
    sharper = polyblur.polyblur(blurry, iterations)
    assert sharper.min() >= 0 and sharper.max() <= 1
    assert psnr(sharper[None], photo[None]) > psnr(blurry[None], photo[None]) + 0.5


def test_the_filter_is_the_polynomial_of_the_blur():
    """By repeated blurring, with the coefficients b, a/2 - 3b + 5, 3b - a - 6 and a/2 - b + 2 for a = 6 and b = 1."""
    point, kernel = torch.zeros(1, 41, 41), gaussian_kernel(1.2, 0.7, 0.5)
    point[0, 20, 20] = 1
    once = convolve(point, kernel)
    twice = convolve(once, kernel)
    wanted = point + 5 * once - 9 * twice + 4 * convolve(twice, kernel)
    assert torch.allclose(convolve(point, polyblur.inverse_filter(kernel)), wanted, atol=1e-5)


def test_halos_are_shortened_and_the_edge_stays_steep():
    step = convolve((torch.arange(61) > 30).float().expand(3, 20, 61) * 0.6 + 0.2, gaussian_kernel(1.5))
    sharper = convolve(step, polyblur.inverse_filter(gaussian_kernel(2.5)))
    mended = polyblur.remove_halos(step, sharper)
    overshoot, left = (int((picture[0, 10] > 0.81).sum()) for picture in (sharper, mended))
    assert overshoot >= 5 and left <= overshoot / 2
    assert mended.diff(dim=-1).max() == sharper.diff(dim=-1).max() > 1.2 * step.diff(dim=-1).max()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (17, 40)])
def test_photos_of_any_size_and_without_edges(size):
    noisy = torch.rand(3, *size)
    assert polyblur.polyblur(noisy).shape == noisy.shape and torch.isfinite(polyblur.polyblur(noisy)).all()
    flat = torch.full((3, *size), 0.4)
    assert torch.allclose(polyblur.polyblur(flat), flat, atol=1e-4)


def test_the_tables_name_quality_and_time(tmp_path, monkeypatch, capsys):
    for level in "a", "b":
        write_pair(tmp_path / level / "001")
    monkeypatch.setattr("sys.argv", ["polyblur.py", str(tmp_path)])
    polyblur.main()
    printed = capsys.readouterr().out
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("| Polyblur")]
    assert len(rows) == len(polyblur.ITERATIONS) and all(" dB / " in row[4] and int(row[10]) >= 0 for row in rows)
    assert "| a " in printed and "| unsharp mask" in printed
    assert np.isfinite(float(rows[0][2]))
