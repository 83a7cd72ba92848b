"""What the networks are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degradations import mirrored


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a skip: (N, channels, H, W) -> same. EDSR, arXiv:1707.02921, figure 2c."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = zeroed(nn.Conv2d(channels, channels, 3, padding=1))  # x + 0 at the start: a deep stack begins harmless

    def forward(self, x: Tensor, steering: tuple[Tensor, Tensor]) -> Tensor:
        return x + self.conv2(F.relu(adjust(self.conv1(x), steering)))


class Steering(nn.Module):
    """From the code of ``BlurGauge``, a scale and a shift for each channel of each block; 1 and 0 at the start.

    Shapes: (N, 64) -> ``blocks`` pairs of (N, channels, 1, 1).
    Source: FiLM, arXiv:1709.07871, section 2.
    """

    def __init__(self, blocks: int, channels: int, hidden: int, code: int = 64):
        super().__init__()
        self.blocks = blocks
        self.layers = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), zeroed(nn.Linear(hidden, 2 * channels * blocks)))

    def forward(self, code: Tensor) -> list[tuple[Tensor, Tensor]]:
        with torch.autocast(code.device.type, enabled=False):
            found = self.layers(code)[:, :, None, None]
        return [(1 + scale, shift) for scale, shift in (part.chunk(2, 1) for part in found.chunk(self.blocks, 1))]


def adjust(x: Tensor, steering: tuple[Tensor, Tensor]) -> Tensor:
    """Each channel of (N, channels, H, W) times its scale plus its shift, (N, channels, 1, 1) each."""
    scale, shift = steering
    return x * scale.to(x.dtype) + shift.to(x.dtype)


class VariedConv(nn.Module):
    """A convolution whose weights are ``base`` and, for each photo, a mixture of ``variants`` (zeros at the start)."""

    def __init__(self, base: nn.Conv2d, variants: int):
        super().__init__()
        self.base = base
        self.weight = nn.Parameter(torch.zeros(variants, base.weight.numel()))
        self.bias = nn.Parameter(torch.zeros(variants, base.bias.numel()))

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        """(N, C, H, W) and (N, variants) -> the convolution of each photo with its own weights."""
        return conv_each(x, *self.mixed(mix), self.base.padding)

    def mixed(self, mix: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and biases for each photo, (N, out, in, k, k) and (N, out)."""
        with torch.autocast(mix.device.type, enabled=False):
            varied = (mix @ self.weight).view(-1, *self.base.weight.shape)
            return self.base.weight + varied, self.base.bias + mix @ self.bias


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer itself, giving zeros until it is trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def pad_to_multiple(photo: Tensor, multiple: int) -> Tensor:
    """(N, C, H, W) -> (N, C, H', W') with H', W' the next multiples, the edge repeated below and right."""
    height, width = photo.shape[-2:]
    rows, columns = -height % multiple, -width % multiple
    return F.pad(photo, (0, columns, 0, rows), mode="replicate") if rows or columns else photo


def conv_each(x: Tensor, weights: Tensor, biases: Tensor | None = None, padding: int | tuple[int, int] = 0) -> Tensor:
    """(N, C, H, W) and (N, out, C, k, k) -> (N, out, H', W'): each photo with its own weights.

    As one convolution in N groups, three times faster than one after another.
    """
    count, channels = x.shape[:2]
    biases = biases if biases is None else biases.flatten()
    side_by_side = x.reshape(1, count * channels, *x.shape[2:])
    found = F.conv2d(side_by_side, weights.flatten(0, 1), biases, padding=padding, groups=count)
    return found.view(count, -1, *found.shape[2:])


FILTER_REACH = 4  # pixels to each side that the student's filter sees; a multiple of 4, since it works on squares of 4x4
BRIGHTNESS = torch.tensor([0.299, 0.587, 0.114])  # of red, green and blue, as in JPEG


def brightness(photo: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W)."""
    return (photo.movedim(1, -1) @ BRIGHTNESS.to(photo))[:, None]


def with_margin(photo: Tensor) -> Tensor:
    """(N, C, H, W) with what the filter sees beyond the borders, mirrored, and filled up to a multiple of 4."""
    rows, columns = (margin_indices(length).to(photo.device) for length in photo.shape[-2:])
    return photo[..., rows, :][..., columns]


def margin_indices(length: int) -> Tensor:
    """Which of ``length`` rows stands where in ``with_margin``."""
    return mirrored(length, FILTER_REACH + 4)[4 : FILTER_REACH + 4 + length + -length % 4 + FILTER_REACH]


def picture_with_margin(picture: Tensor) -> Tensor:
    """As ``with_margin``, in float32, without a copy of all pixels: (H, W, 3) -> (1, 3, H', W')."""
    height, width, _ = picture.shape
    rows, columns = margin_indices(height), margin_indices(width)
    photo = torch.empty(1, len(rows), len(columns), 3, device=picture.device)
    here = slice(FILTER_REACH, FILTER_REACH + height)
    photo[0, here, FILTER_REACH : FILTER_REACH + width] = picture
    for beyond in slice(FILTER_REACH), slice(FILTER_REACH + width, None):
        photo[0, here, beyond] = photo[0, here, FILTER_REACH + columns[beyond]]
    for beyond in slice(FILTER_REACH), slice(FILTER_REACH + height, None):
        photo[0, beyond] = photo[0, FILTER_REACH + rows[beyond]]
    return photo.movedim(-1, 1)


def in_squares(kernel: Tensor, places: Tensor) -> Tensor:
    """Kernels of 9x9 pixels, (N, 9, 9), as convolutions of squares of 4x4 pixels: (N, 16, 16, 3, 3).

    Args:
        places: what ``places_in_kernel`` gives.
    """
    return F.pad(kernel.flatten(1), (0, 1))[:, places]  # where a kernel ends there are zeros


def places_in_kernel() -> Tensor:
    size, reach = 2 * FILTER_REACH + 1, FILTER_REACH // 4
    one, other, square = torch.arange(4)[:, None, None], torch.arange(4)[:, None], torch.arange(-reach, reach + 1)
    place = 4 * square + other - one + FILTER_REACH  # (4, 4, 3): from pixel `other` of a square to pixel `one`
    y, x = place[:, None, :, None, :, None], place[None, :, None, :, None, :]
    inside = (y >= 0) & (y < size) & (x >= 0) & (x < size)
    return torch.where(inside, y * size + x, size**2).view(16, 16, 2 * reach + 1, 2 * reach + 1)
