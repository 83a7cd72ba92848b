"""The blur estimator: from the spectrum of a photo to the filter that undoes most of its blur.

A convolution sees little of a photo, and a patch shows little of its blur. So the networks are given power spectra, of the
whole photo, its blurriest windows and the surroundings of each place (spectrum.py, local.py), from which this small network
predicts a Wiener-like inverse filter and an embedding of the blur, which conditions the layers of the networks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blur.spectrum import WINDOW
from utils import zero_init

RINGS = 46  # bins of radial frequency
KERNEL_RADIUS = 31  # pixels
EMBEDDING = 64  # numbers
WIDTH, DEEP_WIDTH = 16, 32  # channels: of the whole spectrum, and at a half and a quarter of its resolution


class BlurEstimator(nn.Module):
    """Predicts an inverse filter and a blur embedding from spectra. Starts with the identity filter.

    Args:
        blocks: residual blocks at a quarter of the resolution.
        kernel_radius: pixels, of the filter, 1 to ``KERNEL_RADIUS``; k is twice as much plus 1. An estimator that is trained
            for small filters makes more of them than the middle of large ones would.
        exponential: the frequency response is (1 + b) exp(a), of either sign, instead of 1 + 2 a, for outputs a and b of the
            last layer. Learns faster.
    Shapes: (N, 4, 64, 33), the ``log_power_spectrum`` of a region, the blurriest windows or the whole photo, and after it
        that of the whole photo -> kernels (N, 1, k, k), embeddings (N, 64), and radial profiles, the means over rings of the
        four channels from low to high frequencies, (N, 4 * 46), scaled to about -1 to 1.
    """

    def __init__(self, blocks: int = 1, kernel_radius: int = KERNEL_RADIUS, exponential: bool = False):
        super().__init__()
        self.arguments = dict(blocks=blocks, kernel_radius=kernel_radius, exponential=exponential)
        self.exponential = exponential
        outputs = 2 if exponential else 1
        rows, columns = torch.arange(-32, 32)[:, None] / WINDOW, torch.arange(33) / WINDOW
        radius = (rows**2 + columns**2).sqrt()  # periods per pixel
        ring = (radius * WINDOW).round().long().flatten()
        rings = F.one_hot(ring, RINGS).float()
        # 1 within 12 pixels, then down to 0, or over all of a small filter: one that ends abruptly would ring
        flat, exponent = (12, 2) if kernel_radius > 12 else (0, 1)
        fade = (torch.arange(-kernel_radius, kernel_radius + 1).abs() - flat).clamp(min=0)
        fade = (fade / (kernel_radius + 1 - flat) * math.pi / 2).cos() ** exponent
        self.register_buffer("radius", radius * 4 - 1, persistent=False)
        self.register_buffer("ring", ring, persistent=False)
        self.register_buffer("rings", rings / rings.sum(0), persistent=False)
        self.register_buffer("fade", fade[:, None] * fade, persistent=False)
        self.head = nn.Conv2d(7, WIDTH, 3, padding=1)
        self.down = nn.Conv2d(WIDTH, DEEP_WIDTH, 4, stride=2, padding=1)
        self.deep = nn.ModuleList(nn.Conv2d(DEEP_WIDTH, DEEP_WIDTH, 3, padding=1) for _ in range(2))
        self.down2 = nn.Conv2d(DEEP_WIDTH, DEEP_WIDTH, 2, stride=2)
        self.deepest = nn.ModuleList(nn.Conv2d(DEEP_WIDTH, DEEP_WIDTH, 3, padding=1) for _ in range(2 * blocks))
        self.embedding = nn.Sequential(
            nn.Linear(4 * RINGS + 2 * DEEP_WIDTH, 128), nn.ReLU(), nn.Linear(128, EMBEDDING), nn.ReLU()
        )
        self.film = zero_init(nn.Linear(EMBEDDING, 2 * DEEP_WIDTH + outputs * RINGS))
        self.up2 = nn.Conv2d(DEEP_WIDTH, DEEP_WIDTH, 1)
        self.up = nn.ConvTranspose2d(DEEP_WIDTH, WIDTH, 2, stride=2)
        self.last = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.tail = zero_init(nn.Conv2d(WIDTH, outputs, 3, padding=1))

    def forward(self, spectrum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(spectrum.device.type, enabled=False):
            logs = (spectrum.to(self.radius.dtype) + 9) / 4  # about -1 to 1
            profile = logs.flatten(2) @ self.rings  # (N, 4, 46)
            # What differs from the mean of its ring: motion blurs one direction
            power = logs[:, ::2]
            anisotropy = 2 * (power - profile[:, ::2, self.ring].view_as(power))
            inputs = [logs[:, :2], anisotropy[:, :1], self.radius.expand_as(logs[:, :1]), logs[:, 2:], anisotropy[:, 1:]]
            full = torch.cat(inputs, 1)
            full = F.relu(self.head(full.contiguous(memory_format=torch.channels_last)))
            half = F.relu(self.down(F.pad(full, (0, 1))))
            half = half + self.deep[1](F.relu(self.deep[0](half)))
            quarter = F.relu(self.down2(F.pad(half, (0, 1))))
            for first, second in zip(self.deepest[::2], self.deepest[1::2], strict=True):
                quarter = quarter + second(F.relu(first(quarter)))
            embedding = self.embedding(torch.cat([profile.flatten(1), quarter.mean((2, 3)), quarter.amax((2, 3))], 1))
            scale, shift, radial = self.film(embedding).tensor_split([DEEP_WIDTH, 2 * DEEP_WIDTH], 1)
            quarter = F.relu(quarter * (1 + scale[..., None, None]) + shift[..., None, None])
            half = F.relu(half + self.up2(quarter.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :17]))
            full = F.relu(self.last(F.relu(full + self.up(half)[..., :33])))
            change = self.tail(full)
            change = change + radial.view(len(radial), -1, RINGS)[..., self.ring].view_as(change)
            response = (1 + change[:, 1]) * change[:, 0].clamp(max=4).exp() if self.exponential else 1 + 2 * change[:, 0]
            return self.to_kernel(response), embedding, profile.flatten(1)

    def to_kernel(self, response: Tensor) -> Tensor:
        """Frequency responses, (N, 64, 33), as kernels of sum 1, (N, 1, k, k)."""
        radius = len(self.fade) // 2
        kernel = torch.fft.irfft2(response.roll(WINDOW // 2, 1), s=(WINDOW, WINDOW)).roll((WINDOW // 2,) * 2, (1, 2))
        center = slice(WINDOW // 2 - radius, WINDOW // 2 + radius + 1)
        kernel = kernel[:, None, center, center] * self.fade
        return kernel + (1 - kernel.sum((2, 3), keepdim=True)) * (self.fade / self.fade.sum())
