"""What the networks are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gauge import adjust


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a skip: (N, channels, H, W) -> same. EDSR, arXiv:1707.02921, figure 2c."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # x + 0 at the start: a deep stack begins harmless
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, steering: tuple[Tensor, Tensor]) -> Tensor:
        return x + self.conv2(F.relu(adjust(self.conv1(x), steering)))


class VariedConv(nn.Module):
    """A convolution whose weights are ``base`` and, for each photo, a mixture of ``variants`` (zeros at the start)."""

    def __init__(self, base: nn.Conv2d, variants: int):
        super().__init__()
        self.base = base
        self.weight = nn.Parameter(torch.zeros(variants, base.weight.numel()))
        self.bias = nn.Parameter(torch.zeros(variants, base.bias.numel()))

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        """(N, C, H, W) and (N, variants) -> the convolution of each photo with its own weights."""
        weights, biases = self.mixed(mix)
        stride, padding = self.base.stride, self.base.padding
        each = (F.conv2d(x[i : i + 1], weights[i], biases[i], stride, padding) for i in range(len(x)))
        return torch.cat(list(each))

    def mixed(self, mix: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and biases for each photo, (N, out, in, k, k) and (N, out)."""
        with torch.autocast(mix.device.type, enabled=False):
            varied = (mix @ self.weight).view(-1, *self.base.weight.shape)
            return self.base.weight + varied, self.base.bias + mix @ self.bias


def zero_conv(width: int, size: int) -> nn.Conv2d:
    """(N, width, H/2, W/2) -> (N, 12, H/2, W/2), a row and column more if ``size`` is even; zeros until trained."""
    conv = nn.Conv2d(width, 12, size, padding=1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def pad_to_multiple(photo: Tensor, multiple: int) -> Tensor:
    """(N, C, H, W) -> (N, C, H', W') with H', W' the next multiples, the edge repeated below and right."""
    height, width = photo.shape[-2:]
    rows, columns = -height % multiple, -width % multiple
    return F.pad(photo, (0, columns, 0, rows), mode="replicate") if rows or columns else photo
