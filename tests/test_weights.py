from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from conftest import shipped
from PIL import Image

from blur.camera import add_noise
from blur.filters import convolve, gaussian_kernel
from utils import count_parameters, psnr, quantize_8bit, ssim, to_tensor

WEIGHTS = Path(__file__).parent.parent / "weights"


@pytest.fixture(params=["student", "teacher", "free/student", "free/teacher"])
def network(request):
    return shipped(request.param)


def test_shipped_weights_are_small_and_their_card_is_of_them(network):
    student, name = type(network).__name__ == "StudentCNN", f"{type(network).__name__.removesuffix('CNN').lower()}.pth"
    assert (WEIGHTS / name).stat().st_size < (1.4e6 if student else 16e6)
    assert f"{count_parameters(network):,} parameters" in (WEIGHTS / "README.md").read_text()


def sample_photo():
    with Image.open(Path(skimage.__file__).parent / "data" / "coffee.png") as picture:
        return to_tensor(np.array(picture.convert("RGB").resize((300, 200))))[None]


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_shipped_weights_sharpen_a_photo(network, sigma):
    sharp, noise = sample_photo(), torch.Generator().manual_seed(0)
    blurry = quantize_8bit(add_noise(convolve(sharp[0], gaussian_kernel(sigma)), 1.0, noise)[None])
    with torch.no_grad():
        sharpened = quantize_8bit(network(blurry))
    assert psnr(sharpened, sharp) > psnr(blurry, sharp) + 1 and ssim(sharpened, sharp) > ssim(blurry, sharp) + 0.02


def test_shipped_weights_leave_a_sharp_photo_nearly_as_it_is(network):
    sharp = sample_photo()
    with torch.no_grad():
        assert psnr(quantize_8bit(network(sharp)), sharp) > 35


def test_shipped_weights_take_the_noise_of_a_sharp_photo_for_noise(network):
    sharp = sample_photo()
    noisy = quantize_8bit(add_noise(sharp[0], 3.0, torch.Generator().manual_seed(0))[None])
    with torch.no_grad():
        assert psnr(quantize_8bit(network(noisy)), sharp) > psnr(noisy, sharp) + 0.5


@pytest.mark.parametrize("name", ["student", "free/student"])
def test_what_a_shipped_student_predicts_uses_its_units_and_differs_from_place_to_place(name):
    student, photo, seen = shipped(name), sample_photo(), []
    photo[..., 150:] = convolve(photo[0], gaussian_kernel(2.0))[None, ..., 150:]
    student.embed.register_forward_hook(lambda module, inputs, hidden: seen.append(hidden))
    student.gain_map.tail.register_forward_hook(lambda module, inputs, logarithms: seen.append(logarithms))
    with torch.no_grad():
        student(photo)
    hidden, logarithms = seen
    assert 0.3 < (hidden > 0).float().mean() < 0.7
    assert (logarithms.std((2, 3)) > 0.05).all() and logarithms.amax() < 5
