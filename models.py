"""The two networks, and how they are saved and loaded.

Both take and give (N, 3, H, W) RGB in [0, 1], any H, W >= 1. Both first find the blur of the whole photo, which a patch
does not show (gauge.py), and undo most of it with one filter. What their convolutions compute is added to that, mostly at
a quarter of the resolution, where a 3x3 convolution costs a sixteenth and sees four times as far. Filters and last
layers start so that an untrained network gives back the photo as it is.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from files import read_torch_file, write_torch_file
from gauge import KERNEL_REACH, BlurGauge, apply_filter, describe
from layers import (
    BRIGHTNESS,
    FILTER_REACH,
    ResidualBlock,
    Steering,
    VariedConv,
    adjust,
    brightness,
    conv_each,
    in_squares,
    pad_to_multiple,
    picture_with_margin,
    places_in_kernel,
    with_margin,
    zeroed,
)
from utils import UserError, autocast_dtype


class TeacherCNN(nn.Module):
    """Deep residual network: accurate, too slow for video.

    ``BlurGauge`` gives the one filter that undoes most of a photo's blur; what it makes of the photo stands beside the photo
    at the first layer, and all that the convolutions find is added to it: texture and edges, and noise taken away.

    Args:
        width: channels at half resolution.
        deep_width: channels at a quarter, where nearly all of the arithmetic is.
        blocks: residual blocks at a quarter.
        fine_blocks: residual blocks at half resolution, after the two scales are joined.
    Shapes: (N, 3, H, W) in [0, 1] -> same or a little outside. A tile of a photo needs the description of all of it.
    Sources: pixel-shuffle, arXiv:1609.05158; blocks and global skip, arXiv:1707.02921 and 1511.04587.
    """

    describe = staticmethod(describe)

    def __init__(self, width: int = 32, deep_width: int = 96, blocks: int = 10, fine_blocks: int = 2):
        super().__init__()
        self.arguments = dict(width=width, deep_width=deep_width, blocks=blocks, fine_blocks=fine_blocks)
        # pixels: 4 for each 3x3 convolution at a quarter, 2 at half, and what the filter saw before
        self.reach = 8 * blocks + 4 * fine_blocks + 8 + KERNEL_REACH
        self.gauge = BlurGauge()
        self.head = nn.Conv2d(24, width, 3, padding=1)
        self.down = nn.Conv2d(width, deep_width, 2, stride=2)
        self.deep = nn.ModuleList(ResidualBlock(deep_width) for _ in range(blocks))
        self.up = nn.Conv2d(deep_width, 4 * width, 1)
        self.fine = nn.ModuleList(ResidualBlock(width) for _ in range(fine_blocks))
        self.tail = zeroed(nn.Conv2d(width, 12, 3, padding=1))
        self.steer_deep = Steering(blocks, deep_width, hidden=64)
        self.steer_fine = Steering(1 + fine_blocks, width, hidden=64)  # the head and the fine blocks

    def forward(self, photo: Tensor, description: Tensor | None = None) -> Tensor:
        kernel, code = self.gauge(describe(photo) if description is None else description)
        filtered = apply_filter(photo, kernel)
        x = pad_to_multiple(torch.cat([photo.to(filtered.dtype), filtered], 1), 4)
        of_head, *of_fine = self.steer_fine(code)
        half = F.relu(adjust(self.head(F.pixel_unshuffle(x, 2)), of_head))
        quarter = self.down(half)
        for block, steering in zip(self.deep, self.steer_deep(code), strict=True):
            quarter = block(quarter, steering)
        half = half + F.pixel_shuffle(self.up(quarter), 2)
        for block, steering in zip(self.fine, of_fine, strict=True):
            half = block(half, steering)
        x = x[:, 3:] + F.pixel_shuffle(self.tail(half), 2)
        return x[..., : photo.shape[-2], : photo.shape[-1]]


class StudentCNN(nn.Module):
    """Small network for real time: a filter made for each photo, then a few convolutions, on brightness alone.

    From what ``BlurGauge`` finds in the whole photo follows one linear filter for it, 9x9 pixels, and how much of each of
    some variants is added to the weights of the convolutions. That costs nothing for each pixel: kernels made for one
    blur do what many general ones cannot. All of it works on squares of 4x4 pixels, whose 16 values are the channels:
    nothing is lost, a 3x3 convolution sees 12x12 pixels, and none costs less. Colours change as their brightness does.

    Args:
        convs: 3x3 convolutions, all but the last with a skip that ``FastStudent`` makes a part of the weights.
        variants: of each convolution's weights.
        hidden: width of the layer that makes the filter and the shares of the variants.
    Shapes: (N, 3, H, W) in [0, 1] -> same or a little outside. A tile of a photo needs the description of all of it: what
        ``describe`` says, (N, 2, 64, 33), or what ``find_blur`` made of that, (N, 145).
    Sources: filters made by a network, arXiv:1605.09673; weights mixed for each input, arXiv:1904.04971, section 3; skips
        inside the weights as in RepVGG, arXiv:2101.03697, section 3.3.
    """

    describe = staticmethod(describe)

    def __init__(self, convs: int = 3, variants: int = 16, hidden: int = 128):
        super().__init__()
        self.arguments = dict(convs=convs, variants=variants, hidden=hidden)
        self.reach = FILTER_REACH + 4 * convs + 3  # pixels
        self.gauge = BlurGauge()
        size = 2 * FILTER_REACH + 1
        self.see = nn.Sequential(nn.Linear(64 + size**2, hidden), nn.ReLU())  # what the gauge found
        self.mix = nn.Linear(hidden, variants)  # the shares of the variants
        self.make = zeroed(nn.Linear(hidden, 1 + size**2))  # the filter, after how far the gauge's is trusted
        self.register_buffer("places", places_in_kernel(), persistent=False)
        hann = torch.hann_window(size + 2)[1:-1]
        self.window = nn.Parameter(0.5 * hann[:, None] * hann)  # a filter that ends abruptly would ring
        bases = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(convs)]
        zeroed(bases[-1])
        self.convs = nn.ModuleList(VariedConv(base, variants) for base in bases)

    def forward(self, photo: Tensor, description: Tensor | None = None) -> Tensor:
        if description is None or description.dim() > 2:
            description = self.find_blur(describe(photo) if description is None else description)
        kernel, mix = self.plan(description)
        with torch.autocast(photo.device.type, enabled=False):  # a strong filter would amplify rounding
            squares = F.pixel_unshuffle(with_margin(brightness(photo)), 4)
            change = conv_each(squares, in_squares(kernel, self.places))
        margin = FILTER_REACH // 4
        x = squares[..., margin:-margin, margin:-margin] + change
        for conv in self.convs[:-1]:
            x = F.relu(x + conv(x, mix))
        change = change + self.convs[-1](x, mix)
        return photo + F.pixel_shuffle(change, 4)[..., : photo.shape[-2], : photo.shape[-1]]

    def find_blur(self, description: Tensor) -> Tensor:
        """What the gauge says of photos: its 64 numbers and the middle of its filter, (N, 64 + 9 * 9)."""
        kernel, code = self.gauge(description)
        middle = slice(KERNEL_REACH - FILTER_REACH, KERNEL_REACH + FILTER_REACH + 1)
        return torch.cat([code, kernel[:, 0, middle, middle].flatten(1)], 1)

    def plan(self, blur: Tensor) -> tuple[Tensor, Tensor]:
        """For photos of such a blur, the filter that is added, (N, 9, 9), and the share of the variants."""
        size = 2 * FILTER_REACH + 1
        code, found = blur[:, : -(size**2)], blur[:, -(size**2) :]
        with torch.autocast(blur.device.type, enabled=False):
            seen = self.see(torch.cat([code, found.asinh()], 1))  # strong filters hold large numbers
            trust, own = self.make(seen).split([1, size**2], 1)
            change = found.view(-1, size, size).clone()
            change[:, FILTER_REACH, FILTER_REACH] -= 1  # without the photo itself, to which it is added
            kernel = own.view_as(change) + self.window * (1 + trust[..., None]) * change
            return kernel - kernel.mean((1, 2), keepdim=True), self.mix(seen).tanh()


def share_gauge(teacher: nn.Module, student: nn.Module) -> bool:
    """Give ``student`` the trained gauge of ``teacher``, to be used as it is; returns whether both have one.

    Raises:
        UserError: if they are of different sizes.
    """
    both = all(isinstance(getattr(network, "gauge", None), BlurGauge) for network in (teacher, student))
    if both:
        try:
            student.gauge.load_state_dict(teacher.gauge.state_dict())
        except RuntimeError:
            raise UserError("the student's gauge is not of the size of the teacher's: make both with BlurGauge()") from None
        student.gauge.requires_grad_(False)
    return both


class FastStudent(nn.Module):
    """A trained ``StudentCNN`` for 8-bit pictures, several times faster and equal to it but for rounding.

    Variants and skips become a part of the weights, for one picture at a time; the convolutions run in ``dtype``, all
    in the order of bytes that a picture has in memory.

    Args:
        dtype: float16 on CUDA, bfloat16 where the CPU is faster in it, else float32, if None.
    Shapes: (H, W, 3) uint8 RGB -> same.
    """

    def __init__(self, student: StudentCNN, dtype: torch.dtype | None = None):
        super().__init__()
        device = student.window.device
        self.student, self.dtype = student.eval(), dtype
        if dtype is None:
            self.dtype = torch.float16 if device.type == "cuda" else autocast_dtype(device)
        to_squares = (torch.eye(16).view(16, 1, 4, 4) * BRIGHTNESS.view(1, 3, 1, 1)).to(device)
        self.register_buffer("to_squares", to_squares.contiguous(memory_format=torch.channels_last), persistent=False)
        torch.empty(31_000_000, dtype=torch.uint8)  # the C library keeps pieces as large as one that it once got back

    @torch.inference_mode()
    def forward(self, picture: Tensor, strength: float = 1.0) -> Tensor:
        """``picture`` plus ``strength`` times the change that the student makes."""
        height, width, _ = picture.shape
        layers = self.fold(describe(picture.movedim(-1, 0)[None], 255), strength)
        result = torch.empty_like(picture)
        # In bands: larger pieces of memory go back to the system, which gives others and fills them with zeros first
        for around, inside, place in tiles(height, width, (max(8, 1_100_000 // width), width), self.student.reach):
            result[place] = self.sharpen(picture[around], layers, strength)[inside]
        return result

    def sharpen(self, picture: Tensor, layers: tuple, strength: float) -> Tensor:
        the_filter, *deep, last = layers
        height, width, _ = picture.shape
        squares, margin = F.conv2d(picture_with_margin(picture), self.to_squares, stride=4), FILTER_REACH // 4
        change = F.conv2d(squares, *the_filter)
        x = (squares[..., margin:-margin, margin:-margin] + change).to(self.dtype)
        for layer in deep:
            x = F.conv2d(x, *layer, padding=1).relu_()
        change = torch.add(F.conv2d(x, *last, padding=1), change, alpha=strength).clamp_(-255, 255).round_()
        # Pixel-shuffle, a row of four pixels as one number
        rows, columns = x.shape[2:]
        change = change[0].movedim(0, -1).to(torch.int16).reshape(-1).view(torch.int64)
        change = change.view(rows, columns, 4).transpose(1, 2).reshape(-1).view(torch.int16)
        change = change.view(4 * rows, 4 * columns)[:height, :width]
        coloured = torch.empty(height, width, 3, dtype=torch.int16, device=picture.device)
        for colour in coloured.unbind(-1):  # torch.stack works on one core here
            colour.copy_(change)
        # Of one type each: adding bytes to it, or going straight to them, takes several times longer
        return coloured.add_(picture.to(torch.int16)).clamp_(0, 255)

    def fold(self, description: Tensor, strength: float) -> tuple:
        """(weight, bias) of each layer for a picture of that description; between the layers white is 255 too."""
        kernel, mix = self.student.plan(self.student.find_blur(description))
        *deep, (weight, bias) = (tuple(part[0] for part in conv.mixed(mix)) for conv in self.student.convs)
        for skipped, _ in deep:
            skipped[:, :, 1, 1].diagonal().add_(1)  # x + conv(x)
        deep = [(weight, 255 * bias) for weight, bias in [*deep, (strength * weight, strength * bias)]]
        layers = [(in_squares(kernel, self.student.places)[0], None)]
        layers += [(weight.to(self.dtype), bias.to(self.dtype)) for weight, bias in deep]
        return tuple((weight.contiguous(memory_format=torch.channels_last), bias) for weight, bias in layers)


def run_tiled(network: nn.Module, photo: Tensor, tile: int = 1024) -> Tensor:
    """``network(photo)`` for a photo of any size with the memory of a tile; equal to it, but for rounding.

    Each tile is run with the surroundings that can reach it (``network.reach``) and these are cut off again.

    Args:
        photo: (N, 3, H, W) in [0, 1].
        tile: rows and columns of a tile without its surroundings, a multiple of 8.
    """
    height, width = photo.shape[-2:]
    if height * width <= tile * tile or not hasattr(network, "reach"):
        return network(photo)
    described = description_of(network, photo)
    output = torch.empty_like(photo)
    for around, inside, place in tiles(height, width, (tile, tile), network.reach):
        output[(..., *place)] = network(photo[(..., *around)], *described)[(..., *inside)]
    return output


def description_of(network: nn.Module, photo: Tensor, peak: float = 1.0) -> tuple[Tensor, ...]:
    """What ``network`` must be told of a whole photo when it is given a tile: nothing, or its description."""
    return (network.describe(photo, peak),) if hasattr(network, "describe") else ()


def tiles(height: int, width: int, tile: tuple[int, int], reach: int) -> Iterator[tuple[tuple[slice, slice], ...]]:
    """For each tile of a photo: the rows and columns to be looked at, the part of these to be kept, and its place."""
    margin = -(-reach // 8) * 8  # tiles keep the grid of the strided layers
    # All about equal: for very small ones torch takes another convolution, which rounds otherwise
    counts = math.ceil(height / tile[0]), math.ceil(width / tile[1])
    step_down, step_right = 8 * math.ceil(height / counts[0] / 8), 8 * math.ceil(width / counts[1] / 8)
    for top in range(0, height, step_down):
        for left in range(0, width, step_right):
            bottom, right = min(top + step_down, height), min(left + step_right, width)
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
    except Exception as error:  # whatever a constructor makes of odd arguments
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
