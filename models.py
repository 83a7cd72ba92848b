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

from estimator import KERNEL_RADIUS, BlurEstimator, apply_filter, log_power_spectrum

from layers import (
    LUMA,
    FILTER_RADIUS,
    ResidualBlock,
    FiLM,
    CondConv2d,
    modulate,
    luma,
    conv2d_per_sample,
    to_space_to_depth_kernel,
    pad_to_multiple,
    reflect_pad_picture,
    space_to_depth_indices,
    reflect_pad,
    zero_init,
)

from utils import UserError, autocast_dtype

import torch

import torch.nn.functional as F

from torch import Tensor, nn

from degradations import reflect_indices

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

    log_power_spectrum = staticmethod(log_power_spectrum)

    def __init__(self, width: int = 32, deep_width: int = 96, blocks: int = 10, fine_blocks: int = 2):
        super().__init__()
        self.arguments = dict(width=width, deep_width=deep_width, blocks=blocks, fine_blocks=fine_blocks)
        # pixels: 4 for each 3x3 convolution at a quarter, 2 at half, and what the filter saw before
        self.reach = 8 * blocks + 4 * fine_blocks + 8 + KERNEL_RADIUS
        self.estimator = BlurEstimator()
        self.head = nn.Conv2d(24, width, 3, padding=1)
        self.down = nn.Conv2d(width, deep_width, 2, stride=2)
        self.deep = nn.ModuleList(ResidualBlock(deep_width) for _ in range(blocks))
        self.up = nn.Conv2d(deep_width, 4 * width, 1)
        self.fine = nn.ModuleList(ResidualBlock(width) for _ in range(fine_blocks))
        self.tail = zero_init(nn.Conv2d(width, 12, 3, padding=1))
        self.film_deep = FiLM(blocks, deep_width, hidden=64)
        self.film_fine = FiLM(1 + fine_blocks, width, hidden=64)  # the head and the fine blocks

    def forward(self, photo: Tensor, spectrum: Tensor | None = None) -> Tensor:
        kernel, code = self.estimator(log_power_spectrum(photo) if spectrum is None else spectrum)
        filtered = apply_filter(photo, kernel)
        x = pad_to_multiple(torch.cat([photo.to(filtered.dtype), filtered], 1), 4)
        of_head, *of_fine = self.film_fine(code)
        half = F.relu(modulate(self.head(F.pixel_unshuffle(x, 2)), of_head))
        quarter = self.down(half)
        for block, film in zip(self.deep, self.film_deep(code), strict=True):
            quarter = block(quarter, film)
        half = half + F.pixel_shuffle(self.up(quarter), 2)
        for block, film in zip(self.fine, of_fine, strict=True):
            half = block(half, film)
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

    log_power_spectrum = staticmethod(log_power_spectrum)

    def __init__(self, convs: int = 3, num_experts: int = 16, hidden: int = 128):
        super().__init__()
        self.arguments = dict(convs=convs, num_experts=num_experts, hidden=hidden)
        self.reach = FILTER_RADIUS + 4 * convs + 3  # pixels
        self.estimator = BlurEstimator()
        size = 2 * FILTER_RADIUS + 1
        self.see = nn.Sequential(nn.Linear(64 + size**2, hidden), nn.ReLU())  # what the gauge found
        self.mix = nn.Linear(hidden, num_experts)  # the shares of the variants
        self.make = zero_init(nn.Linear(hidden, 1 + size**2))  # the filter, after how far the gauge's is trusted
        self.register_buffer("places", space_to_depth_indices(), persistent=False)
        hann = torch.hann_window(size + 2)[1:-1]
        self.window = nn.Parameter(0.5 * hann[:, None] * hann)  # a filter that ends abruptly would ring
        bases = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(convs)]
        zero_init(bases[-1])
        self.convs = nn.ModuleList(CondConv2d(base, num_experts) for base in bases)

    def forward(self, photo: Tensor, spectrum: Tensor | None = None) -> Tensor:
        if spectrum is None or spectrum.dim() > 2:
            spectrum = self.embed_blur(log_power_spectrum(photo) if spectrum is None else spectrum)
        kernel, mix = self.predict_kernel_and_routing(spectrum)
        with torch.autocast(photo.device.type, enabled=False):  # a strong filter would amplify rounding
            squares = F.pixel_unshuffle(reflect_pad(luma(photo)), 4)
            change = conv2d_per_sample(squares, to_space_to_depth_kernel(kernel, self.places))
        margin = FILTER_RADIUS // 4
        x = squares[..., margin:-margin, margin:-margin] + change
        for conv in self.convs[:-1]:
            x = F.relu(x + conv(x, mix))
        change = change + self.convs[-1](x, mix)
        return photo + F.pixel_shuffle(change, 4)[..., : photo.shape[-2], : photo.shape[-1]]

    def embed_blur(self, spectrum: Tensor) -> Tensor:
        """What the gauge says of photos: its 64 numbers and the middle of its filter, (N, 64 + 9 * 9)."""
        kernel, code = self.estimator(spectrum)
        middle = slice(KERNEL_RADIUS - FILTER_RADIUS, KERNEL_RADIUS + FILTER_RADIUS + 1)
        return torch.cat([code, kernel[:, 0, middle, middle].flatten(1)], 1)

    def predict_kernel_and_routing(self, convolve: Tensor) -> tuple[Tensor, Tensor]:
        """For photos of such a blur, the filter that is added, (N, 9, 9), and the share of the variants."""
        size = 2 * FILTER_RADIUS + 1
        code, found = convolve[:, : -(size**2)], convolve[:, -(size**2) :]
        with torch.autocast(convolve.device.type, enabled=False):
            seen = self.see(torch.cat([code, found.asinh()], 1))  # strong filters hold large numbers
            trust, own = self.make(seen).split([1, size**2], 1)
            change = found.view(-1, size, size).clone()
            change[:, FILTER_RADIUS, FILTER_RADIUS] -= 1  # without the photo itself, to which it is added
            kernel = own.view_as(change) + self.window * (1 + trust[..., None]) * change
            return kernel - kernel.mean((1, 2), keepdim=True), self.mix(seen).tanh()

def share_estimator(teacher: nn.Module, student: nn.Module) -> bool:
    """Give ``student`` the trained gauge of ``teacher``, to be used as it is; returns whether both have one.

    Raises:
        UserError: if they are of different sizes.
    """
    both = all(isinstance(getattr(network, "gauge", None), BlurEstimator) for network in (teacher, student))
    if both:
        try:
            student.estimator.load_state_dict(teacher.estimator.state_dict())
        except RuntimeError:
            raise UserError("the student's gauge is not of the size of the teacher's: make both with BlurGauge()") from None
        student.estimator.requires_grad_(False)
    return both

class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a skip: (N, channels, H, W) -> same. EDSR, arXiv:1707.02921, figure 2c."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))  # x + 0 at the start: a deep stack begins harmless

    def forward(self, x: Tensor, film: tuple[Tensor, Tensor]) -> Tensor:
        return x + self.conv2(F.relu(modulate(self.conv1(x), film)))

class FiLM(nn.Module):
    """From the code of ``BlurGauge``, a scale and a shift for each channel of each block; 1 and 0 at the start.

    Shapes: (N, 64) -> ``blocks`` pairs of (N, channels, 1, 1).
    Source: FiLM, arXiv:1709.07871, section 2.
    """

    def __init__(self, blocks: int, channels: int, hidden: int, code: int = 64):
        super().__init__()
        self.blocks = blocks
        self.layers = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), zero_init(nn.Linear(hidden, 2 * channels * blocks)))

    def forward(self, code: Tensor) -> list[tuple[Tensor, Tensor]]:
        with torch.autocast(code.device.type, enabled=False):
            found = self.layers(code)[:, :, None, None]
        return [(1 + scale, shift) for scale, shift in (part.chunk(2, 1) for part in found.chunk(self.blocks, 1))]

def modulate(x: Tensor, film: tuple[Tensor, Tensor]) -> Tensor:
    """Each channel of (N, channels, H, W) times its scale plus its shift, (N, channels, 1, 1) each."""
    scale, shift = film
    return x * scale.to(x.dtype) + shift.to(x.dtype)

class CondConv2d(nn.Module):
    """A convolution whose weights are ``base`` and, for each photo, a mixture of ``variants`` (zeros at the start)."""

    def __init__(self, base: nn.Conv2d, num_experts: int):
        super().__init__()
        self.base = base
        self.weight = nn.Parameter(torch.zeros(num_experts, base.weight.numel()))
        self.bias = nn.Parameter(torch.zeros(num_experts, base.bias.numel()))

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        """(N, C, H, W) and (N, variants) -> the convolution of each photo with its own weights."""
        return conv2d_per_sample(x, *self.mixed_weights(mix), self.base.padding)

    def mixed_weights(self, mix: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and biases for each photo, (N, out, in, k, k) and (N, out)."""
        with torch.autocast(mix.device.type, enabled=False):
            varied = (mix @ self.weight).view(-1, *self.base.weight.shape)
            return self.base.weight + varied, self.base.bias + mix @ self.bias

def zero_init(layer: nn.Module) -> nn.Module:
    """The layer itself, giving zeros until it is trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer

def pad_to_multiple(photo: Tensor, multiple: int) -> Tensor:
    """(N, C, H, W) -> (N, C, H', W') with H', W' the next multiples, the edge repeated below and right."""
    height, width = photo.shape[-2:]
    rows, columns = -height % multiple, -width % multiple
    return F.pad(photo, (0, columns, 0, rows), mode="replicate") if rows or columns else photo

def conv2d_per_sample(x: Tensor, weights: Tensor, biases: Tensor | None = None, padding: int | tuple[int, int] = 0) -> Tensor:
    """(N, C, H, W) and (N, out, C, k, k) -> (N, out, H', W'): each photo with its own weights.

    As one convolution in N groups, three times faster than one after another.
    """
    count, channels = x.shape[:2]
    biases = biases if biases is None else biases.flatten()
    side_by_side = x.reshape(1, count * channels, *x.shape[2:])
    found = F.conv2d(side_by_side, weights.flatten(0, 1), biases, padding=padding, groups=count)
    return found.view(count, -1, *found.shape[2:])

FILTER_RADIUS = 4  # pixels to each side that the student's filter sees; a multiple of 4, since it works on squares of 4x4

LUMA = torch.tensor([0.299, 0.587, 0.114])  # of red, green and blue, as in JPEG

def luma(photo: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W)."""
    return (photo.movedim(1, -1) @ LUMA.to(photo))[:, None]

def reflect_pad(photo: Tensor) -> Tensor:
    """(N, C, H, W) with what the filter sees beyond the borders, mirrored, and filled up to a multiple of 4."""
    rows, columns = (margin_indices(length).to(photo.device) for length in photo.shape[-2:])
    return photo[..., rows, :][..., columns]

def margin_indices(length: int) -> Tensor:
    """Which of ``length`` rows stands where in ``with_margin``."""
    return reflect_indices(length, FILTER_RADIUS + 4)[4 : FILTER_RADIUS + 4 + length + -length % 4 + FILTER_RADIUS]

def to_space_to_depth_kernel(kernel: Tensor, places: Tensor) -> Tensor:
    """Kernels of 9x9 pixels, (N, 9, 9), as convolutions of squares of 4x4 pixels: (N, 16, 16, 3, 3).

    Args:
        places: what ``places_in_kernel`` gives.
    """
    return F.pad(kernel.flatten(1), (0, 1))[:, places]  # where a kernel ends there are zeros

def space_to_depth_indices() -> Tensor:
    size, reach = 2 * FILTER_RADIUS + 1, FILTER_RADIUS // 4
    one, other, square = torch.arange(4)[:, None, None], torch.arange(4)[:, None], torch.arange(-reach, reach + 1)
    place = 4 * square + other - one + FILTER_RADIUS  # (4, 4, 3): from pixel `other` of a square to pixel `one`
    y, x = place[:, None, :, None, :, None], place[None, :, None, :, None, :]
    inside = (y >= 0) & (y < size) & (x >= 0) & (x < size)
    return torch.where(inside, y * size + x, size**2).view(16, 16, 2 * reach + 1, 2 * reach + 1)

def save_model(path: Path | str, model: nn.Module, **metadata) -> None:
    """Write ``model`` to one file, whole or not at all: class, constructor arguments, weights, facts.

    A network of your own can be loaded again if its class stands in this file and its constructor
    keeps its arguments in ``self.arguments``, as above.

    Args:
        facts: what should be known of its training; str, int, float, bool, None, and lists or dicts of these.
    Raises:
        TypeError: if a fact is of another type (it could not be loaded safely).
        UserError: if the file cannot be written.
    """
    for name, value in metadata.items():
        _check_plain(name, value)
    content = {
        "class": type(model).__name__,
        "arguments": dict(getattr(model, "arguments", {})),
        "weights": {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()},
        "facts": metadata,
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
    model.metadata = content["facts"]
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
