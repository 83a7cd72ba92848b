"""Blur that differs from place to place, and what a camera does after the lens."""

import pytest
import torch
from conftest import dummy_photo

from blur import camera, spatial, variety
from utils import make_generator, quantize_8bit, to_tensor

PHOTO = to_tensor(dummy_photo(96, 128, seed=1))
BLURS = [spatial.layered_focus, spatial.graded_focus, spatial.moving_object, spatial.camera_shake]
STEPS = [camera.strong_noise, camera.sensor_noise, camera.smooth_noise, camera.sharpen_too_much, camera.random_jpeg]
VARIETY = [variety.vary_photo, variety.add_texture, variety.add_grain]


@pytest.mark.parametrize("degrade", BLURS + STEPS + VARIETY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (3, 2), (40, 50)])
def test_any_size_stays_and_the_same_seed_gives_the_same_pixels(degrade, size):
    photo = quantize_8bit(torch.rand(3, *size, generator=make_generator(1)))
    for seed in range(4):
        result = degrade(photo, make_generator(seed))
        assert result.shape == photo.shape and torch.isfinite(result).all()
        assert torch.equal(result, degrade(photo, make_generator(seed)))


@pytest.mark.parametrize("degrade", BLURS, ids=lambda f: f.__name__)
def test_a_flat_photo_stays_flat(degrade):
    flat = torch.full((3, 60, 80), 0.5)
    for seed in range(6):
        torch.testing.assert_close(degrade(flat, make_generator(seed)), flat, atol=2e-3, rtol=0)


def detail(photo: torch.Tensor) -> torch.Tensor:
    """Mean squared gradient by tiles of 32 pixels, (3, 3)."""
    gradient = photo.diff(dim=-1).square().mean(0)[:, :96]
    return gradient.unfold(0, 32, 32).unfold(1, 32, 32).mean((2, 3))


@pytest.mark.parametrize("degrade", BLURS[:3], ids=lambda f: f.__name__)
def test_the_blur_differs_from_place_to_place(degrade):
    kept = [detail(degrade(PHOTO, make_generator(seed))) / (detail(PHOTO) + 1e-4) for seed in range(12)]
    spread = [float(share.max() - share.min()) for share in kept]
    assert sum(s > 0.25 for s in spread) >= 8


def test_a_mask_covers_about_its_share_with_values_from_0_to_1():
    for seed in range(12):
        mask = spatial.random_mask(PHOTO, 0.3, make_generator(seed))
        assert mask.shape == (1, 96, 128) and mask.min() >= 0 and mask.max() <= 1
        assert 0.15 < float(mask.mean()) < 0.45


def test_sensor_noise_is_stronger_in_the_light_and_correlated_between_neighbours():
    dark, bright = (torch.full((3, 200, 200), value) for value in (0.1, 0.8))
    for seed in range(5):
        noises = [camera.sensor_noise(flat, make_generator(seed)) - flat for flat in (dark, bright)]
        linear = [noise * flat ** (2.2 - 1) for noise, flat in zip(noises, (0.1, 0.8), strict=True)]  # about: slope of gamma
        assert linear[1].std() > 1.5 * linear[0].std()


def test_an_overlay_is_the_same_on_both_photos_and_nothing_else_changes():
    blurry = spatial.graded_focus(PHOTO, make_generator(0)).clamp(0, 1)
    drawn = 0
    for seed in range(20):
        pair = camera.overlay((blurry, PHOTO), make_generator(seed))
        changed = [
            (after - quantize_8bit(before)).abs().amax(0) > 1 / 255
            for after, before in zip(pair, (blurry, PHOTO), strict=True)
        ]
        both = changed[0] & changed[1]
        assert torch.allclose(pair[0][:, both], pair[1][:, both], atol=0.5), "drawn alike, up to antialiased letters"
        drawn += bool(both.any())
    assert drawn >= 15


def test_chains_of_resizing_lose_detail():
    for seed in range(8):
        result = camera.resize_chain(PHOTO, (1.8, 2.2), make_generator(seed))
        assert result.shape == PHOTO.shape and 0.1 < float(detail(result).sum() / detail(PHOTO).sum()) < 0.8


def test_added_texture_has_hardly_any_color_and_is_fine():
    flat, textured = torch.full((3, 96, 96), 0.5), 0
    for seed in range(8):
        change = variety.add_texture(flat, make_generator(seed)) - flat
        gray = change.mean(0, keepdim=True)
        assert gray.std() > 2 / 255 and (change - gray).std() < 0.5 * gray.std()
        textured += bool(gray.diff(dim=-1).std() > 0.5 * gray.std() or gray.diff(dim=-2).std() > 0.5 * gray.std())
    assert textured == 8, "neighboring pixels differ"


def test_some_photos_are_varied_and_some_are_not():
    results = [variety.vary_photo(PHOTO, make_generator(seed)) for seed in range(30)]
    assert 3 < sum(torch.equal(result, quantize_8bit(PHOTO)) for result in results) < 20
    assert all(result.min() >= 0 and result.max() <= 1 for result in results)
