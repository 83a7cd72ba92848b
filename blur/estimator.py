"""How blurry a whole photo is, and the one linear filter that undoes most of it.

A blur is the same all over a photo, but no convolution sees all of it, and a patch of it shows little. So both
networks are given the spectrum of the whole photo (``describe``). A small network reads from it which filter would bring
the photo nearest to the sharp one (``BlurGauge``), and steers the layers of the large one (``Steering``).
"""

import math

from functools import reduce

import torch

import torch.nn.functional as F

from torch import Tensor, nn

from degradations import convolve, reflect_indices

from layers import zero_init

RINGS = 46  # distances from the middle of a spectrum that are told apart

KERNEL_RADIUS = 31  # pixels to each side that a filter sees

class BlurEstimator(nn.Module):
    """From the spectrum of whole photos, the filter that sharpens each, and numbers that tell its blur.

    Starts with the filter that changes nothing.

    Shapes: (N, 2, 64, 33), as ``describe`` gives it -> kernels of (N, 1, 63, 63), and (N, 64).
    """

    def __init__(self, width: int = 16, deep_width: int = 32, code: int = 64):
        super().__init__()
        rows, columns = torch.arange(-32, 32)[:, None] / WINDOW, torch.arange(33) / WINDOW
        radius = (rows**2 + columns**2).sqrt()  # periods per pixel
        ring = (radius * WINDOW).round().long().flatten()
        rings = F.one_hot(ring, RINGS).float()
        fade = (torch.arange(-KERNEL_RADIUS, KERNEL_RADIUS + 1).abs() - 12).clamp(min=0) / 20 * math.pi / 2
        fade = fade.cos().square()  # 1 within 12 pixels, then down to 0
        self.register_buffer("radius", radius * 4 - 1, persistent=False)
        self.register_buffer("ring", ring, persistent=False)
        self.register_buffer("rings", rings / rings.sum(0), persistent=False)
        self.register_buffer("fade", fade[:, None] * fade, persistent=False)
        self.head = nn.Conv2d(4, width, 3, padding=1)
        self.down = nn.Conv2d(width, deep_width, 4, stride=2, padding=1)
        self.deep = nn.ModuleList(nn.Conv2d(deep_width, deep_width, 3, padding=1) for _ in range(2))
        self.down2 = nn.Conv2d(deep_width, deep_width, 2, stride=2)
        self.deepest = nn.ModuleList(nn.Conv2d(deep_width, deep_width, 3, padding=1) for _ in range(2))
        self.code = nn.Sequential(nn.Linear(2 * RINGS + 2 * deep_width, 128), nn.ReLU(), nn.Linear(128, code), nn.ReLU())
        self.steer = zero_init(nn.Linear(code, 2 * deep_width + RINGS))
        self.up2 = nn.Conv2d(deep_width, deep_width, 1)
        self.up = nn.ConvTranspose2d(deep_width, width, 2, stride=2)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.tail = zero_init(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, spectrum: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(spectrum.device.type, enabled=False):
            logs = (spectrum.to(self.radius.dtype) + 9) / 4
            profile = logs.flatten(2) @ self.rings  # (N, 2, 46): means over rings, from low to high frequencies
            uneven = 2 * (logs[:, :1] - profile[:, :1, self.ring].view_as(logs[:, :1]))  # motion blurs one direction
            whole = torch.cat([logs, uneven, self.radius.expand_as(uneven)], 1)
            whole = F.relu(self.head(whole.contiguous(memory_format=torch.channels_last)))
            half = F.relu(self.down(F.pad(whole, (0, 1))))
            half = half + self.deep[1](F.relu(self.deep[0](half)))
            quarter = F.relu(self.down2(F.pad(half, (0, 1))))
            quarter = quarter + self.deepest[1](F.relu(self.deepest[0](quarter)))
            code = self.code(torch.cat([profile.flatten(1), quarter.mean((2, 3)), quarter.amax((2, 3))], 1))
            scale, shift, radial = self.steer(code).split([quarter.shape[1], quarter.shape[1], RINGS], 1)
            quarter = F.relu(quarter * (1 + scale[..., None, None]) + shift[..., None, None])
            half = F.relu(half + self.up2(quarter.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :17]))
            whole = F.relu(self.last(F.relu(whole + self.up(half)[..., :33])))
            response = 1 + 2 * (self.tail(whole)[:, 0] + radial[:, self.ring].view(-1, *self.radius.shape))
            return self.kernel(response), code

    def kernel(self, response: Tensor) -> Tensor:
        """By how much each frequency is amplified, (N, 64, 33), as kernels of sum 1, (N, 1, 63, 63)."""
        kernel = torch.fft.irfft2(response.roll(WINDOW // 2, 1), s=(WINDOW, WINDOW)).roll((WINDOW // 2,) * 2, (1, 2))
        kernel = kernel[:, None, 1:, 1:] * self.fade  # a filter that ends abruptly would ring
        return kernel + (1 - kernel.sum((2, 3), keepdim=True)) * (self.fade / self.fade.sum())
