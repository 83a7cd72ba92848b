"""What is measured of a whole photo, and how it steers a network.

A blur is the same all over a photo, but no convolution sees all of it, and a patch of it shows little. So both
networks are given a few numbers about the photo (``describe``), which scale and shift what is inside them (``BlurGauge``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Pairs of pixels whose differences are measured: (rows, columns) apart, along both axes and both diagonals
OFFSETS = [
    *((0, 1), (0, 2), (0, 3), (0, 4), (0, 6), (0, 8), (1, 0), (2, 0), (3, 0), (4, 0), (6, 0), (8, 0)),
    *((1, 1), (2, 2), (4, 4), (1, -1), (2, -2), (4, -4)),
]


@torch.no_grad()
def describe(photo: Tensor, peak: float = 1.0) -> Tensor:
    """How blurry and noisy whole photos are: (N, C, H, W) from 0 to ``peak`` -> (N, 54), about -2 to 2 each.

    For each of OFFSETS the logarithms of the mean square, mean and mean root of the difference in brightness: how
    fast it grows with distance tells the blur, its start the noise, squares weigh edges and roots flat areas. The
    mean square by distance is the structure function (Kolmogorov 1941), twice the variogram of geostatistics.
    Of a large photo it takes 16 windows of 64x64 pixels, evenly spread.
    """
    height, width = photo.shape[-2:]
    if height * width > 200_000 and min(height, width) >= 64:
        tops, lefts = ([i * (length - 64) // 3 for i in range(4)] for length in (height, width))
        photo = torch.stack([photo[..., top : top + 64, left : left + 64] for top in tops for left in lefts], 1)
    with torch.autocast(photo.device.type, enabled=False):
        brightness = photo.float().mean(-3) / peak
        rows, columns = max(0, 9 - brightness.shape[-2]), max(0, 13 - brightness.shape[-1])
        brightness = F.pad(brightness, (0, columns, 0, rows), mode="replicate") if rows or columns else brightness
        height, width = brightness.shape[-2] - 8, brightness.shape[-1] - 12  # pixels whose partners are all there
        partners = [brightness[..., r : r + height, 4 + c : 4 + c + width] for r, c in OFFSETS]
        apart = (torch.stack(partners, 1) - brightness[:, None, ..., :height, 4 : 4 + width]).abs_().flatten(2)
        means, squares, roots = apart.mean(2), apart.square().mean(2), apart.sqrt_().mean(2)
        found = (squares + 1e-7).log(), (means + 3e-4).log() * 2, (roots + 1e-2).log() * 4
        return (torch.stack(found, 2).flatten(1) + 9) / 3


class BlurGauge(nn.Module):
    """From what ``describe`` says of whole photos, a scale and a shift for each channel of each block.

    Starts as scale 1 and shift 0.

    Shapes: (N, 54) -> ``blocks`` pairs of (N, channels, 1, 1).
    Source: FiLM, arXiv:1709.07871, section 2.
    """

    def __init__(self, blocks: int, channels: int, hidden: int):
        super().__init__()
        self.blocks = blocks
        sizes = 3 * len(OFFSETS), hidden, hidden, 2 * channels * blocks
        self.layers = nn.Sequential(
            nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:3]), nn.ReLU(), nn.Linear(*sizes[2:])
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, description: Tensor) -> list[tuple[Tensor, Tensor]]:
        with torch.autocast(description.device.type, enabled=False):
            found = self.layers(description.to(self.layers[0].weight.dtype))[:, :, None, None]
        return [(1 + scale, shift) for scale, shift in (part.chunk(2, 1) for part in found.chunk(self.blocks, 1))]


def adjust(x: Tensor, gauge: tuple[Tensor, Tensor]) -> Tensor:
    """Each channel of (N, channels, H, W) times its scale plus its shift, (N, channels, 1, 1) each."""
    scale, shift = gauge
    return x * scale.to(x.dtype) + shift.to(x.dtype)
