"""What both networks are built of: blocks whose weights or features depend on the blur, padding, pixel layouts."""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blur.estimator import EMBEDDING
from blur.filters import reflect_indices
from blur.local import BlurMap
from blur.noise import NOISE_FEATURES, normalize_noise
from blur.spectrum import nll
from utils import zero_init

FILTER_RADIUS = 8  # pixels, of the student's filters; a multiple of 4, the size of a space-to-depth block
# Indices of the 16 DCT coefficients of a block, row by row, without the highest, where noise prevails
LOW_FREQUENCIES = [i for i in range(16) if math.hypot(*divmod(i, 4)) < 3.25]
DIFFERENCES = 12, 4  # of pixels 1 and 3 apart: rows of difference_basis
LUMA = torch.tensor([0.299, 0.587, 0.114])  # weights of red, green and blue. Source: ITU-R BT.601, as in JPEG


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a skip: (N, channels, H, W) -> same. Source: EDSR, arXiv:1707.02921, figure 2c."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = zero_init(nn.Conv2d(hidden, channels, 3, padding=1))  # the identity: a deep stack starts stable

    def forward(self, x: Tensor, film: tuple[Tensor, Tensor]) -> Tensor:
        return x + self.conv2(F.relu(modulate(self.conv1(x), film), inplace=True))


class GatedBlock(nn.Module):
    """A 3x3 convolution, half of whose channels multiply the other half, and a skip: (N, channels, H, W) -> same.

    Unlike a ReLU, a product passes a gradient everywhere, so that no unit dies. The normalization and the scale, 0 at the
    start, keep the steps of the optimizer small.
    Source: NAFNet, arXiv:2204.04676, section 3 (SimpleGate, LayerNorm, scaled skip), here with one full convolution.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels // 2, channels, 1)
        self.scale = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor, film: tuple[Tensor, Tensor]) -> Tensor:
        normalized = F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)
        values, gates = modulate(self.conv1(normalized), film).chunk(2, 1)
        return x + self.conv2(values * gates) * self.scale.to(x.dtype)


class FiLM(nn.Module):
    """Predicts a scale, minus 1, and a shift for each channel of each block from blur embeddings and the noise.

    Both are 0 at the start.

    Args:
        channels: of each block.
    Shapes: a ``BlurMap``, the shape (N, C, H, W) of the photos and the ``step`` of the blocks -> for each block two of
        (N, channels, H / step, W / step), or of (N, channels, 1, 1) for a single region.
    Source: FiLM, arXiv:1709.07871, section 2.
    """

    def __init__(self, channels: Sequence[int], hidden: int = 64):
        super().__init__()
        self.sizes = [2 * each for each in channels]
        last = zero_init(nn.Linear(hidden, sum(self.sizes)))
        self.layers = nn.Sequential(nn.Linear(2 * EMBEDDING + NOISE_FEATURES, hidden), nn.ReLU(), last)

    def forward(self, blur: BlurMap, shape: torch.Size, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        with torch.autocast(blur.embeddings.device.type, enabled=False):
            noise = normalize_noise(blur.noise)[:, None, None].expand(*blur.embeddings.shape[:3], -1)
            predicted = self.layers(torch.cat([blur.embeddings, noise.to(blur.embeddings)], -1))
        for part in predicted.split(self.sizes, -1):  # one after another: as maps, all together would fill the memory
            yield tuple(blur.interpolate(each, shape[-2] // step, shape[-1] // step, step) for each in part.chunk(2, -1))


def modulate(x: Tensor, film: tuple[Tensor, Tensor]) -> Tensor:
    """Scale by 1 plus the first, shift by the second: (N, channels, H, W), or (N, channels, 1, 1) for all of the photo."""
    scale, shift = film
    return (x + shift.to(x.dtype)).addcmul_(x, scale.to(x.dtype))


class OutputLinear(nn.Linear):
    """A linear layer that divides its inputs by their number: (..., in_features) -> (..., out_features).

    So a step of Adam changes an output by about the learning rate, not by that times the number of inputs: in a filter of
    the whole photo so large a step disturbs the output so much that hidden units die.
    Source: muP, arXiv:2203.03466, table 3 (output weights).
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / self.in_features)


class CondConv2d(nn.Module):
    """A convolution whose weights are ``base`` plus, for each sample, a mixture of ``num_experts``, 0 at the start.

    Source: CondConv, arXiv:1904.04971, section 3, which has no base and routing weights in (0, 1); here in (-1, 1).
    """

    def __init__(self, base: nn.Conv2d, num_experts: int):
        super().__init__()
        self.base = base
        self.weight = nn.Parameter(torch.zeros(num_experts, base.weight.numel()))
        self.bias = nn.Parameter(torch.zeros(num_experts, base.bias.numel()))

    def forward(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        """(N, C, H, W) and (N, num_experts) -> (N, out, H, W)."""
        return conv2d_per_sample(x, *self.mix_experts(routing_weights), self.base.padding)

    def mix_experts(self, routing_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and biases for each sample, (N, out, in, k, k) and (N, out)."""
        with torch.autocast(routing_weights.device.type, enabled=False):
            mixed = (routing_weights @ self.weight).view(-1, *self.base.weight.shape)
            return self.base.weight + mixed, self.base.bias + routing_weights @ self.bias


class GainMap(nn.Module):
    """Gains, for cells of 16 pixels, of the whole photo's filter, the blurriest windows' filter and the convolutions.

    The filter of the blurriest windows is used where their spectrum explains the energies of DCT frequencies better than
    that of the whole photo, as in ``blur.local.softness_map``. From the same energies, and from how steep the steepest edges
    are, small convolutions predict gains. What these mean depends on the blur and the noise of the photo, which come in by
    FiLM (arXiv:1709.07871, section 2).

    Args:
        hidden: size of the embedding that ``film`` takes.
    Shapes: luma in space-to-depth blocks, (N, 16, H / 4, W / 4), scales and shifts (N, 2 * width), what ``film`` returned,
        and the logarithms of the energies of the whole photo and of the blurriest windows, (N, 2, 16)
        -> (N, 3, H / 4, W / 4): 0 to 2.7, interpolated; at the start the first two add up to 1, and the third is 1.
    """

    # Pixels, an upper bound: six cells (smoothing, four convolutions and the interpolation), and from the far side of one
    RADIUS = 16 * 6 + 15

    def __init__(self, hidden: int, width: int = 32):
        super().__init__()
        self.register_buffer("basis", torch.cat([dct_basis(), difference_basis()]), persistent=False)
        self.gate = nn.Parameter(torch.tensor([16.0, -2.0]))  # slope and offset, for the log-likelihood ratio
        options = dict(kernel_size=3, padding=1, padding_mode="replicate")
        self.head = nn.Conv2d(20, width, **options)
        self.body = nn.ModuleList(nn.Conv2d(width, width, **options) for _ in range(2))
        self.tail = zero_init(nn.Conv2d(width, 3, **options))
        self.film = zero_init(OutputLinear(hidden, 2 * width))

    def forward(self, blocks: Tensor, film: Tensor, expected_energies: Tensor) -> Tensor:
        coefficients = F.conv2d(blocks[..., ::2, :], self.basis[..., None, None])  # half of the blocks show enough
        gains = self.predict_gains(self.measure_cells(coefficients), film, expected_energies)
        return F.interpolate(gains, scale_factor=4, mode="bilinear")[..., : blocks.shape[-2], : blocks.shape[-1]]

    @staticmethod
    def measure_cells(coefficients: Tensor) -> Tensor:
        """Products of ``basis`` and every second row of blocks, (N, 32, H / 8, W / 4) -> (N, 19, H / 16, W / 16).

        For each cell 16 mean energies, the mean, and the largest differences of pixels that are 1 and 3 apart: their ratio
        is about 1 if the cell's steepest edge is crisp, and 1/3 if it is soft.
        """
        options = dict(kernel_size=(2, 4), ceil_mode=True)
        mean = functools.partial(F.avg_pool2d, **options, count_include_pad=False)
        coefficients, differences = coefficients.split([16, sum(DIFFERENCES)], 1)
        means = coefficients[:, :1]
        steps = F.pad(means.diff(dim=-1), (0, 1))  # from block to block, for lower frequencies than those of a block
        energies = mean(torch.cat([steps, coefficients[:, 1:]], 1).square())
        largest = F.max_pool2d(differences.abs(), **options).split(DIFFERENCES, 1)
        return torch.cat([energies, mean(means), *(each.amax(1, keepdim=True) for each in largest)], 1)

    def predict_gains(self, cells: Tensor, film: Tensor, expected_energies: Tensor) -> Tensor:
        """What ``measure_cells`` returned, (N, 19, H / 16, W / 16) -> (N, 3, H / 16, W / 16)."""
        energies, means, differences = cells.split([16, 1, 2], 1)
        energies, (near, far) = energies + 1e-6, (differences + 2e-3).log().split(1, 1)
        smooth = F.avg_pool2d(F.pad(energies, (1, 1, 1, 1), mode="replicate"), 3, 1)
        whole, blurriest = expected_energies[:, :, None, None, LOW_FREQUENCIES].exp().unbind(1)
        powers = smooth[:, LOW_FREQUENCIES].movedim(1, -1)
        softness = (nll(powers, whole) - nll(powers, blurriest))[:, None]
        slope, offset = self.gate
        gate = (slope * softness + offset).sigmoid()
        x = [energies.log() / 3 + 3, means / 4 - 0.5, 2 * softness.tanh(), near - far + 0.7, far / 2 + 1]
        x = torch.cat(x, 1)  # each about -1 to 1
        x = F.relu(modulate(self.head(x), film[..., None, None].chunk(2, 1)))
        for conv in self.body:
            x = x + F.relu(conv(x))
        # An exponential, limited above, does not saturate below; divided as in OutputLinear
        gains = self.tail(x / self.tail.weight[0].numel()).clamp(max=1).exp()
        return gains * torch.cat([1 - gate, gate, torch.ones_like(gate)], 1)


class ChangeGains(nn.Module):
    """Gains, for cells of 16 pixels, of what the teacher changes in luma and in chroma.

    Filters and residual blocks act from pixel to pixel. Whether there is anything to undo, or whether a phone has done so
    before, shows in all of a cell and around it.

    Args:
        channels: of the features.
    Shapes: features at a quarter, (N, channels, H / 4, W / 4), the photo in [0, 1] and its change, (N, 3, H, W), where H and
        W are multiples of 4, and the scale and shift of FiLM, for HIDDEN channels -> (N, 3, H, W), the change times the
        gains, which are 0 to 2, interpolated, and 1 at the start.
    """

    HIDDEN = 24
    RADIUS = 16 * 3 + 15  # pixels: two convolutions and the interpolation, in cells, and from the far side of one

    def __init__(self, channels: int):
        super().__init__()
        options = dict(kernel_size=3, padding=1, padding_mode="replicate")
        self.head = nn.Conv2d(channels + 2 * 48, self.HIDDEN, 1)  # 48: the pixels of 4x4, three colors each
        self.conv1 = nn.Conv2d(self.HIDDEN, self.HIDDEN, **options)
        self.conv2 = zero_init(nn.Conv2d(self.HIDDEN, self.HIDDEN, **options))
        self.tail = zero_init(nn.Conv2d(self.HIDDEN, 2, 1))

    def forward(self, features: Tensor, photo: Tensor, change: Tensor, film: tuple[Tensor, Tensor]) -> Tensor:
        # Each about -1 to 1
        x = torch.cat([features, F.pixel_unshuffle(photo, 4) - 0.5, 10 * F.pixel_unshuffle(change, 4)], 1)
        x = F.relu(modulate(self.head(x), film))
        x = F.avg_pool2d(x, 4, ceil_mode=True, count_include_pad=False)
        x = x + self.conv2(F.relu(self.conv1(x)))
        with torch.autocast(change.device.type, enabled=False):
            gains = 2 * self.tail(x.to(self.tail.weight)).sigmoid()
            gains = F.interpolate(gains, scale_factor=16, mode="bilinear")[..., : change.shape[-2], : change.shape[-1]]
            luma_change = luma(change)
            return luma_change * gains[:, :1] + (change - luma_change) * gains[:, 1:]


def dct_response() -> Tensor:
    """(16, 64, 33): power spectra times these, summed, are expected energies of ``GainMap.measure_cells``."""
    basis = F.pad(dct_basis().view(16, 4, 4), (0, 60, 0, 60))
    response = torch.fft.fft2(basis).abs().square()[..., :33].roll(32, 1) / 64**2
    response[..., 1:32] *= 2  # most columns also represent their mirror images
    response[0] *= 4 * (math.pi * 4 / 64 * torch.arange(33)).sin().square()  # the difference of two blocks
    return response


def difference_basis() -> Tensor:
    """(16, 16): differences of two pixels of 4x4, in rows: 12 of pixels 1 apart, then 4 of pixels 3 apart."""
    pixels = torch.eye(16).view(4, 4, 16)
    lines = torch.stack([pixels[::2], pixels.transpose(0, 1)[::2]])  # every second row and column: (2, 2, 4, 16)
    return torch.cat([lines.diff(dim=2).reshape(12, 16), (lines[:, :, 3] - lines[:, :, 0]).view(4, 16)])


def dct_basis() -> Tensor:
    """(16, 16): coefficients of the orthonormal DCT-II of 4x4 pixels, in rows; both row by row of the square."""
    k = torch.arange(4)
    rows = torch.cos(math.pi / 4 * (k + 0.5) * k[:, None]) * torch.tensor([0.5, 0.5**0.5, 0.5**0.5, 0.5**0.5])[:, None]
    return torch.kron(rows, rows)


def conv2d_per_sample(x: Tensor, weights: Tensor, biases: Tensor | None = None, padding: Sequence[int] = (0, 0)) -> Tensor:
    """(N, C, H, W) and (N, out, C, k, k) -> (N, out, H', W'): each sample with its own weights.

    As one convolution in N groups, three times faster than one after another.
    """
    count, channels = x.shape[:2]
    biases = biases if biases is None else biases.flatten()
    grouped = x.reshape(1, count * channels, *x.shape[2:])
    result = F.conv2d(grouped, weights.flatten(0, 1), biases, padding=padding, groups=count)
    return result.view(count, -1, *result.shape[2:])


def keep_flat_runs(photo: Tensor, output: Tensor) -> Tensor:
    """``photo`` where ``flat_runs`` are, else ``output``; both (N, C, H, W)."""
    return torch.where(flat_runs(photo), photo.to(output.dtype), output)


def flat_runs(photo: Tensor) -> Tensor:
    """Which pixels of (N, C, H, W) are in the middle of nine exactly equal ones of a row or column: (N, 1, H, W).

    At the borders of a photo five suffice. No lens and sensor made such runs: they are bars, frames or saturated, and a
    filter would draw ghost lines into them. Any type of pixels, also uint8.
    """
    channels, *size = photo.shape[1:]
    lines = photo.movedim(1, -1).flatten(2)  # (N, H, W * C), no copy where channels are last in memory
    flat = torch.zeros_like(lines[..., channels - 1 :], dtype=torch.bool)
    for axis, apart in (1, 1), (2, channels):  # apart: from a pixel to the next along the axis
        if size[axis - 1] < 5:
            continue
        pairs = lines.shape[axis] - apart
        equal = lines.narrow(axis, 0, pairs) == lines.narrow(axis, apart, pairs)
        border = torch.ones_like(lines.narrow(axis, 0, 4 * apart), dtype=torch.bool)
        equal = torch.cat([border, equal, border], axis)
        for step in (apart, 2 * apart, 4 * apart):  # runs of 2, 4 and 8 equal pairs
            runs = equal.shape[axis] - step
            equal = equal.narrow(axis, 0, runs) & equal.narrow(axis, step, runs)
        flat |= functools.reduce(torch.logical_and, [equal[..., c : c + flat.shape[-1]] for c in range(channels)])
    return flat[:, None, :, ::channels]  # only where a pixel begins are all of its channels compared


def smooth_chroma(photo: Tensor, limit: Tensor) -> Tensor:
    """What is added to (N, 3, H, W) to move its chroma by up to ``limit``, (N, 1), to interpolated means of 4x4 pixels.

    Noise is less than that, edges of colors are more and stay. Luma stays where the limit is not reached.
    Source: soft thresholds, Donoho 1995, doi:10.1109/18.382009.
    """
    height, width = photo.shape[-2:]
    with torch.autocast(photo.device.type, enabled=False):  # luma is a product of matrices, which would be rounded
        means = F.interpolate(F.avg_pool2d(reflect_pad_to_blocks(photo), 4), scale_factor=4, mode="bilinear")
        change = means[..., FILTER_RADIUS : FILTER_RADIUS + height, FILTER_RADIUS : FILTER_RADIUS + width] - photo
        change, limit = change - luma(change), limit[..., None, None].to(change)
        # change.clamp(-limit, limit); the opposite for limits below 0, so that in training these have a gradient
        return 0.5 * ((change + limit).abs() - (change - limit).abs())


def luma(photo: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W)."""
    return (photo.movedim(1, -1) @ LUMA.to(photo))[:, None]


def reflect_pad_to_blocks(photo: Tensor) -> Tensor:
    """(N, C, H, W) extended by what the student's filter sees beyond the borders, and to a multiple of 4."""
    rows, columns = (padded_indices(length).to(photo.device) for length in photo.shape[-2:])
    return photo.index_select(-2, rows).index_select(-1, columns)  # twice as fast as indexing


def padded_indices(length: int) -> Tensor:
    """Which of ``length`` rows is in which row after ``reflect_pad_to_blocks``."""
    return reflect_indices(length, FILTER_RADIUS + 3)[3 : 3 + 2 * FILTER_RADIUS + length + -length % 4]


def to_space_to_depth_kernel(kernel: Tensor, indices: Tensor) -> Tensor:
    """Kernels of 17x17 pixels, (N, 17, 17), as convolutions of space-to-depth blocks of 4x4 pixels: (N, 16, 16, 5, 5)."""
    padded = F.pad(kernel.flatten(1), (0, 1))  # beyond the kernel there are zeros
    return padded.index_select(1, indices.flatten()).view(-1, *indices.shape)


def space_to_depth_indices() -> Tensor:
    """(16, 16, 5, 5): which value of a flattened 17x17 kernel, or the zero after it, links two pixels of two blocks."""
    size = 2 * FILTER_RADIUS + 1
    kernel = torch.arange(size**2).view(1, size, size)
    moved = [F.pad(kernel, (x, 3 - x, y, 3 - y), value=size**2) for y in range(4) for x in range(4)]  # by pixels of a block
    return F.pixel_unshuffle(torch.stack(moved, 1), 4).view(16, 16, (size + 3) // 4, -1)
