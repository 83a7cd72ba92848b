import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import blur.degradations as D
from blur import camera, filters
from utils import psnr

KERNELS = {
    "a gaussian": lambda g: filters.gaussian_kernel(1.7),
    "an anisotropic gaussian": lambda g: filters.gaussian_kernel(2.5, 0.7, 0.6),
    "a disk": lambda g: filters.disk_kernel(2.5),
    "a disk below a pixel": lambda g: filters.disk_kernel(0.01),
    "a line": lambda g: filters.line_kernel(9, 0.4),
    "a shake": lambda g: filters.shake_kernel(15, g),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photo(height=40, width=50, seed=0):
    return (torch.rand(3, height, width, generator=generator(seed)) * 255).round() / 255


def grid(kernel):
    x = torch.arange(len(kernel)) - len(kernel) // 2
    return x, x[:, None]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("seed", range(3))
def test_a_kernel_keeps_brightness_and_place(name, seed):
    kernel = KERNELS[name](generator(seed))
    x, y = grid(kernel)
    assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    assert (kernel >= 0).all() and float(kernel.sum()) == pytest.approx(1, abs=1e-5)
    assert float((kernel * x).sum()) == pytest.approx(0, abs=1e-3)
    assert float((kernel * y).sum()) == pytest.approx(0, abs=1e-3)


def test_kernels_have_the_width_they_are_asked_for():
    def variance(kernel, axis):
        return float((kernel * grid(kernel)[axis] ** 2).sum())

    assert variance(filters.gaussian_kernel(2.0), 0) == pytest.approx(4, rel=0.01)
    assert variance(filters.gaussian_kernel(3.0, 1.0, 0.0), 0) == pytest.approx(9, rel=0.01)
    assert variance(filters.gaussian_kernel(3.0, 1.0, 0.0), 1) == pytest.approx(1, rel=0.01)
    assert variance(filters.disk_kernel(4.0), 0) == pytest.approx(4**2 / 4 + 1 / 12, rel=0.02)  # disk and pixel
    assert variance(filters.line_kernel(12, 0.0), 0) == pytest.approx(12**2 / 12, rel=0.1)  # of a segment
    assert variance(filters.line_kernel(12, 0.0), 1) == pytest.approx(0, abs=1e-6)


def test_gaussian_blur_equals_scipy():
    image = photo()
    expected = gaussian_filter(image.numpy(), (0, 1.5, 1.5), mode="mirror")
    np.testing.assert_allclose(filters.convolve(image, filters.gaussian_kernel(1.5)).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("function", [filters.convolve, filters.convolve_linear_light])
def test_blur_leaves_an_even_photo_as_it_is_up_to_the_border(function):
    image = torch.full((3, 30, 20), 0.3)
    assert torch.allclose(function(image, filters.disk_kernel(4)), image, atol=1e-5)


def test_blur_in_linear_light_spreads_bright_points_further():
    image = torch.zeros(3, 21, 21)
    image[:, 10, 10] = 1
    kernel = filters.gaussian_kernel(1.5)
    assert (filters.convolve_linear_light(image, kernel)[:, 10, 12] > 2 * filters.convolve(image, kernel)[:, 10, 12]).all()


def test_srgb_and_linear_light_are_inverse():
    values = torch.linspace(0, 1, 256)
    assert torch.allclose(filters.linear_to_srgb(filters.srgb_to_linear(values)), values, atol=1e-5)


def test_noise_has_the_strength_it_is_asked_for():
    image = torch.full((3, 200, 200), 0.5)
    assert float((camera.add_noise(image, 2.0, generator()) - image).std() * 255) == pytest.approx(2, rel=0.02)


def test_jpeg_loses_more_at_lower_quality():
    image = photo()
    high, low = (float(psnr(camera.jpeg(image, quality)[None], image[None])) for quality in (95, 20))
    assert high > low > 10


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 50), (33, 20)])
def test_the_mixture_gives_an_8_bit_photo_of_the_same_size(size):
    for seed in range(40):
        result, _ = D.random_degradation(photo(*size), generator(seed))
        assert result.shape == (3, *size)
        assert float(result.min()) >= 0 and float(result.max()) <= 1
        assert torch.allclose(result * 255, (result * 255).round(), atol=1e-4)


def test_the_same_seed_gives_the_same_pixels_and_another_gives_others():
    image = photo()
    results = [D.random_degradation(image, generator(seed))[0] for seed in range(30)]
    assert all(torch.equal(r, D.random_degradation(image, generator(seed))[0]) for seed, r in enumerate(results))
    assert len({r.numpy().tobytes() for r in results}) > 20


def test_every_kind_of_blur_alone_changes_the_photo_and_the_identity_does_not():
    image = photo()
    quiet = dict(noise=0, noise_rescaled=0, jpeg=0, identity=0, camera=0)
    for kind in D.Mixture().blurs:
        changed = not torch.equal(D.random_degradation(image, generator(3), D.Mixture(blurs={kind: 1.0}, **quiet))[0], image)
        assert changed == (kind != "none"), kind
    assert torch.equal(D.random_degradation(image, generator(), D.Mixture(identity=1))[0], image)


def test_rescaled_photos_have_a_share_of_noise_of_their_own():
    flat = torch.full((3, 24, 24), 128 / 255)
    quiet, noisy = (dict(identity=0, camera=0, jpeg=0, noise=1 - share, noise_rescaled=share) for share in (0, 1))
    for kind, share in ("rescale", quiet), ("gaussian", noisy):
        assert torch.equal(
            D.random_degradation(flat, generator(), D.Mixture(blurs={kind: 1.0}, **share))[0], (flat * 255).round() / 255
        )
    for kind, share in ("rescale", noisy), ("gaussian", quiet):
        assert D.random_degradation(flat, generator(), D.Mixture(blurs={kind: 1.0}, **share))[0].std() > 0.0005


def test_the_mixture_leaves_about_its_share_of_photos_as_they_are():
    image = photo(16, 16)
    mixture = D.Mixture(identity=0.3, camera=0)
    same = sum(torch.equal(D.random_degradation(image, generator(s), mixture)[0], image) for s in range(400))
    assert 0.2 < same / 400 < 0.42


def test_an_unknown_kind_of_blur_is_one_sentence():
    with pytest.raises(ValueError, match="unknown kind of blur 'swirl'"):
        D.random_degradation(photo(), generator(), D.Mixture(identity=0, camera=0, blurs={"swirl": 1.0}))
