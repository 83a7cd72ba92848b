"""The two networks, and how they are saved and loaded.

Both take and give (N, 3, H, W) RGB in [0, 1], any H, W >= 1. Both work in two scales: a little at half
resolution, where the detail is, most at a quarter, where a 3x3 convolution costs a sixteenth and sees
four times as far. Both are told how blurry the whole photo is, which a patch does not show (``describe``). Both
add what they compute to their input and start with a last layer of zeros, so an untrained network gives back
the photo as it is.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import UserError, read_torch_file, write_torch_file

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
    Of a large photo it takes 16 windows of 128x128 pixels, evenly spread.
    """
    height, width = photo.shape[-2:]
    if height * width > 16 * 128 * 128 and min(height, width) >= 128:
        tops, lefts = ([i * (length - 128) // 3 for i in range(4)] for length in (height, width))
        photo = torch.cat([photo[..., top : top + 128, left : left + 128] for top in tops for left in lefts], 1)
        photo = photo.unflatten(1, (16, -1))
    with torch.autocast(photo.device.type, enabled=False):
        brightness = photo.float().mean(-3) / peak
        rows, columns = (max(0, 9 - length) for length in brightness.shape[-2:])
        brightness = F.pad(brightness, (0, columns, 0, rows), mode="replicate") if rows or columns else brightness
        height, width = brightness.shape[-2:]
        found = []
        for down, right in OFFSETS:
            first = brightness[..., : height - down, max(0, -right) : width - max(0, right)]
            second = brightness[..., down:, max(0, right) : width + min(0, right)]
            apart = (first - second).abs().flatten(1)
            found.append((apart.square().mean(1) + 1e-7).log())
            found.append((apart.mean(1) + 3e-4).log() * 2)
            found.append((apart.sqrt().mean(1) + 1e-2).log() * 4)
        return (torch.stack(found, 1) + 9) / 3


class BlurGauge(nn.Module):
    """From what ``describe`` says of whole photos, a scale and a shift for each channel of each block.

    A blur is the same all over a photo, but no convolution sees all of it. Starts as scale 1 and shift 0.

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


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a skip: (N, channels, H, W) -> same. EDSR, arXiv:1707.02921, figure 2c."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # x + 0 at the start: a deep stack begins harmless
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, gauge: tuple[Tensor, Tensor] | None = None) -> Tensor:
        inside = self.conv1(x)
        if gauge is not None:
            scale, shift = gauge
            inside = inside * scale.to(inside.dtype) + shift.to(inside.dtype)
        return x + self.conv2(F.relu(inside))


class TeacherCNN(nn.Module):
    """Deep residual network: accurate, too slow for video.

    Args:
        width: channels at half resolution.
        deep_width: channels at a quarter, where nearly all of the arithmetic is.
        blocks: residual blocks at a quarter.
        fine_blocks: residual blocks at half resolution, after the two scales are joined.
    Shapes: (N, 3, H, W) in [0, 1] -> same; the result may lie a little outside [0, 1]. A tile of a larger photo
        needs what ``describe`` says of the whole one.
    Sources: pixel-shuffle, arXiv:1609.05158; blocks and global skip, arXiv:1707.02921 and 1511.04587.
    """

    describe = staticmethod(describe)

    def __init__(self, width: int = 32, deep_width: int = 96, blocks: int = 10, fine_blocks: int = 2):
        super().__init__()
        self.arguments = dict(width=width, deep_width=deep_width, blocks=blocks, fine_blocks=fine_blocks)
        self.reach = 8 * blocks + 4 * fine_blocks + 8  # pixels: 4 for each 3x3 convolution at a quarter, 2 at half
        self.head = nn.Conv2d(12, width, 3, padding=1)
        self.down = nn.Conv2d(width, deep_width, 2, stride=2)
        self.deep = nn.ModuleList(ResidualBlock(deep_width) for _ in range(blocks))
        self.gauge = BlurGauge(blocks, deep_width, hidden=64)
        self.up = nn.Conv2d(deep_width, 4 * width, 1)
        self.fine = nn.Sequential(*(ResidualBlock(width) for _ in range(fine_blocks)))
        self.tail = zero_conv(width)

    def forward(self, photo: Tensor, description: Tensor | None = None) -> Tensor:
        x = pad_to_multiple(photo, 4)
        gauges = self.gauge(describe(photo) if description is None else description)
        half = F.relu(self.head(F.pixel_unshuffle(x, 2)))
        quarter = self.down(half)
        for block, gauge in zip(self.deep, gauges, strict=True):
            quarter = block(quarter, gauge)
        half = self.fine(half + F.pixel_shuffle(self.up(quarter), 2))
        x = x + F.pixel_shuffle(self.tail(half), 2)
        return x[..., : photo.shape[-2], : photo.shape[-1]]


class StudentCNN(nn.Module):
    """Small two-scale network for real time: the teacher's layout with single convolutions.

    Args:
        width: channels at half resolution.
        deep_width: channels at a quarter.
        convs: 3x3 convolutions at a quarter, each with a skip.
    Shapes: as ``TeacherCNN``.
    Source: as ``TeacherCNN``.
    """

    describe = staticmethod(describe)

    def __init__(self, width: int = 16, deep_width: int = 32, convs: int = 4):
        super().__init__()
        self.arguments = dict(width=width, deep_width=deep_width, convs=convs)
        self.reach = 4 * convs + 10  # pixels: 4 for each 3x3 convolution at a quarter, 2 at half
        self.head = nn.Conv2d(12, width, 3, padding=1)
        self.down = nn.Conv2d(width, deep_width, 2, stride=2)
        self.deep = nn.ModuleList(nn.Conv2d(deep_width, deep_width, 3, padding=1) for _ in range(convs))
        self.gauge = BlurGauge(convs, deep_width, hidden=32)
        self.up = nn.Conv2d(deep_width, 4 * width, 1)
        self.fine = nn.Conv2d(width, width, 3, padding=1)
        self.tail = zero_conv(width)

    def forward(self, photo: Tensor, description: Tensor | None = None) -> Tensor:
        x = pad_to_multiple(photo, 4)
        gauges = self.gauge(describe(photo) if description is None else description)
        half = F.relu(self.head(F.pixel_unshuffle(x, 2)))
        quarter = self.down(half)
        for conv, (scale, shift) in zip(self.deep, gauges, strict=True):
            inside = conv(quarter)
            quarter = quarter + F.relu(inside * scale.to(inside.dtype) + shift.to(inside.dtype))
        half = F.relu(self.fine(half + F.pixel_shuffle(self.up(quarter), 2)))
        x = x + F.pixel_shuffle(self.tail(half), 2)
        return x[..., : photo.shape[-2], : photo.shape[-1]]


def zero_conv(width: int) -> nn.Conv2d:
    """(N, width, H/2, W/2) -> (N, 12, H/2, W/2), all zeros until it is trained."""
    conv = nn.Conv2d(width, 12, 3, padding=1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def pad_to_multiple(photo: Tensor, multiple: int) -> Tensor:
    """(N, C, H, W) -> (N, C, H', W') with H', W' the next multiples, the edge repeated below and right."""
    height, width = photo.shape[-2:]
    rows, columns = -height % multiple, -width % multiple
    return F.pad(photo, (0, columns, 0, rows), mode="replicate") if rows or columns else photo


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def gmac_per_megapixel(network: nn.Module, size: int = 64) -> float:
    """Multiplications and additions of all convolutions for 1,000,000 pixels, counted in pairs, in billions."""
    counts = []

    def count(conv: nn.Conv2d, _, output: Tensor) -> None:
        counts.append(output.numel() * conv.weight[0].numel())

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d)]
    try:
        network(next(network.parameters()).new_zeros(1, 3, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts) / size**2 / 1e3


def fingerprint(network: nn.Module) -> str:
    """20 characters that change with the class, its source, the shape or any weight of ``network``."""
    digest = hashlib.sha256(type(network).__name__.encode())
    with contextlib.suppress(OSError, TypeError):  # a class typed at a prompt has no source
        digest.update(inspect.getsource(type(network)).encode())
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:20]


def run_tiled(network: nn.Module, photo: Tensor, tile: int = 1024) -> Tensor:
    """``network(photo)`` for a photo of any size with the memory of a tile; equal to it, but for rounding.

    Each tile is run with the surroundings that can reach it (``network.reach``) and these are cut off again.

    Args:
        photo: (N, 3, H, W) in [0, 1].
        tile: rows and columns of a tile without its surroundings, a multiple of 8.
    A network that does not say its reach is run on the whole photo.
    """
    height, width = photo.shape[-2:]
    if height * width <= tile * tile or not hasattr(network, "reach"):
        return network(photo)
    described = description_of(network, photo)
    output = torch.empty_like(photo)
    for around, inside, place in tiles(height, width, tile, network.reach):
        output[(..., *place)] = network(photo[(..., *around)], *described)[(..., *inside)]
    return output


def description_of(network: nn.Module, photo: Tensor, peak: float = 1.0) -> tuple[Tensor, ...]:
    """What ``network`` must be told of a whole photo when it is given a tile: nothing, or its description."""
    return (network.describe(photo, peak),) if hasattr(network, "describe") else ()


def tiles(height: int, width: int, tile: int, reach: int) -> Iterator[tuple[tuple[slice, slice], ...]]:
    """For each tile of a photo: the rows and columns to be looked at, the part of these to be kept, and its place."""
    margin = -(-reach // 8) * 8  # tiles keep the grid of the strided layers
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            first_row, first_column = max(0, top - margin), max(0, left - margin)
            around = slice(first_row, bottom + margin), slice(first_column, right + margin)
            inside = slice(top - first_row, bottom - first_row), slice(left - first_column, right - first_column)
            yield around, inside, (slice(top, bottom), slice(left, right))


def save_model(path: Path | str, model: nn.Module, **facts) -> None:
    """Write ``model`` to one file, whole or not at all: class, constructor arguments, weights, facts.

    A network of your own can be loaded again if its class stands in this file and its constructor
    keeps its arguments in ``self.arguments``, as above.

    Args:
        facts: what should be known of its training; str, int, float, bool, None, and lists or dicts of these.
    Raises:
        TypeError: if a fact is of another type (it could not be loaded safely).
        UserError: if the file cannot be written.
    """
    for name, value in facts.items():
        _check_plain(name, value)
    content = {
        "class": type(model).__name__,
        "arguments": dict(getattr(model, "arguments", {})),
        "weights": {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()},
        "facts": facts,
    }
    write_torch_file(path, content)


def load_model(path: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The network that ``save_model`` wrote, in eval mode, its facts in ``.facts``. No code in the file is ever run.

    Args:
        model: takes the weights and is returned, where it is; if None, one is built on the CPU.

    Raises:
        UserError: one sentence if the file is missing, damaged, not from ``save_model``, of a class
            that is not defined here, or its weights do not fit that class or are not finite.
    """
    content = _read_model_file(Path(path))
    classes = {name: c for name, c in globals().items() if isinstance(c, type) and issubclass(c, nn.Module)}
    if model is None and content["class"] not in classes:
        raise UserError(f"{path} holds a {content['class']}, which models.py does not define: add its class there")
    try:
        model = model or classes[content["class"]](**content["arguments"])
        model.load_state_dict(content["weights"])
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} does not fit {content['class']} as models.py defines it now ({reason}): train it anew, "
            "or take the models.py it was made with"
        ) from None
    if not all(torch.isfinite(value).all() for value in model.state_dict().values() if value.is_floating_point()):
        raise UserError(f"{path} holds weights that are not finite: its training failed, train it anew")
    model.facts = content["facts"]
    return model.eval()


def _read_model_file(path: Path) -> dict:
    content = read_torch_file(path)
    keys = {"class": str, "arguments": dict, "weights": dict, "facts": dict}
    if not isinstance(content, dict) or any(not isinstance(content.get(k), t) for k, t in keys.items()):
        raise UserError(f"{path} was not written by save_model: load it with its own code and save it with save_model")
    return content


def _check_plain(name: str, value) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_plain(name, item)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"fact {name} is a {type(value).__name__}: only plain numbers, text, lists and dicts are kept")
