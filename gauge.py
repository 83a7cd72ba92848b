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

from degradations import blur, mirrored
from layers import zeroed

WINDOW = 64  # pixels: rows and columns of the windows whose spectra are averaged
RINGS = 46  # distances from the middle of a spectrum that are told apart
KERNEL_REACH = 31  # pixels to each side that a filter sees


@torch.no_grad()
def describe(photo: Tensor, peak: float = 1.0, most: int = 144) -> Tensor:
    """The spectrum of whole photos' brightness: (N, C, H, W) from 0 to ``peak`` -> (N, 2, 64, 33).

    The logarithms of the mean power and the means of the logarithms of the power in windows of 64x64 pixels, which
    differ where few edges hold most of the power. Rows are the vertical frequencies from -32 to 31 periods in 64
    pixels, columns the horizontal ones from 0 to 32; the other half would be the mirror image.

    Args:
        most: windows that are taken at the most, spread evenly over the photo; half as many of a large one, where
            they do not overlap and tell as much.
    Source: Welch 1967, doi:10.1109/TAU.1967.1161901, with a Hann window.
    """
    with torch.autocast(photo.device.type, enabled=False):
        parts = windows(photo, peak, most)
        found = logarithms(power(spectrum(parts)))
        # A photo of a few rows or windows does not tell how blurry it is
        trust = min((min(photo.shape[-2:]) - 16) / (WINDOW - 16), (parts.shape[1] - 1) / 24)
        return found if trust >= 1 else usual_spectrum(found).lerp(found, max(0.0, trust))


def usual_spectrum(like: Tensor) -> Tensor:
    """About what ``describe`` says of a sharp photo: power falls with the cube of the frequency. Fitted to 30 photos."""
    rows, columns = (torch.arange(count, device=like.device, dtype=like.dtype) for count in like.shape[-2:])
    fall = -3 * (rows[:, None] - WINDOW // 2).hypot(columns).clamp(min=1).log()
    return torch.stack([fall + 3.0, fall + 1.2]).expand_as(like)


def power(found: Tensor) -> Tensor:
    """The squares of the absolute values of complex numbers."""
    return found.real.square().addcmul_(found.imag, found.imag)  # abs().square() takes three times longer


def logarithms(power: Tensor) -> Tensor:
    """What ``describe`` says of photos whose windows have that ``power``, (N, n, 64, 33) -> (N, 2, 64, 33)."""
    found = (power.mean(1) + 1e-7).log(), (power + 1e-7).log().mean(1)
    return torch.stack(found, 1).roll(WINDOW // 2, 2)


def windows(photo: Tensor, peak: float = 1.0, most: int = 144) -> Tensor:
    """The brightness of windows spread evenly over whole photos: (N, C, H, W) -> (N, n, 64, 64), n <= ``most``."""
    height, width = photo.shape[-2:]
    if min(height, width) < WINDOW:
        photo = photo.to(torch.promote_types(photo.dtype, torch.float32))  # 16-bit numbers cannot be indexed
        rows, columns = (mirrored(length, max(0, WINDOW - length)).to(photo.device) for length in (height, width))
        photo = photo[..., rows, :][..., columns]
        height, width = photo.shape[-2:]
    counts = [math.ceil((length - WINDOW) / (WINDOW // 2)) + 1 for length in (height, width)]
    if math.prod(counts) > 2 * most:  # then they lie side by side, and each tells about twice as much
        most = max(1, most // 2)
    share = min(1.0, (most / math.prod(counts)) ** 0.5)
    short = math.ceil(min(counts) * share)  # first along the shorter side, where one more or less is a lot
    numbers = sorted((short, min(max(counts), most // short)), reverse=counts[0] > counts[1])
    tops, lefts = (
        torch.linspace(0, length - WINDOW, number).long().tolist()
        for length, number in zip((height, width), numbers, strict=True)
    )
    photo = photo.movedim(1, -1)  # as pictures are in memory, so that rows are copied whole
    rows = torch.cat([photo[:, top : top + WINDOW] for top in tops], 1)
    found = torch.stack([rows[:, :, left : left + WINDOW] for left in lefts], 1)
    colours = found.to(torch.promote_types(found.dtype, torch.float32)).unbind(-1)
    mean = reduce(torch.add, colours) / (len(colours) * peak)  # mean(-1) takes four times longer
    return mean.view(len(photo), -1, WINDOW, WINDOW)


def spectrum(squares: Tensor) -> Tensor:
    """(..., 64, 64) -> complex (..., 64, 33), without the mean; the mean of its squares is the variance times 64 x 64."""
    hann = torch.hann_window(WINDOW, device=squares.device, dtype=squares.dtype)
    hann = hann[:, None] * hann
    squares = squares - squares.mean((-2, -1), keepdim=True)
    return torch.fft.rfft2(squares * (hann / hann.square().mean().sqrt()), norm="ortho")


def turned_spectrum(found: Tensor, turn: int) -> Tensor:
    """(..., 64, 33) of a photo as it is when the photo is turned, ``turn`` 0 to 7 as in ``patches.cut``."""
    turned = turn % 2 == 1
    if (turn >= 4) != turned:  # mirrored; a quarter turn is a transposition of the mirror image
        found = found.flip(-2).roll(1, -2)  # rows are -32 to 31, and -32 is its own mirror image
    if turned:
        left = torch.cat([found[..., :1, 1:-1].flip(-1), found[..., 1:, 1:-1].flip(-1, -2)], -2)  # the half that is left out
        found = torch.cat([found[..., -1:], left, found[..., :-1]], -1).transpose(-1, -2)  # all columns from -32 to 31
        found = torch.cat([found[..., WINDOW // 2 :], found[..., :1]], -1)
    return found


class BlurGauge(nn.Module):
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
        fade = (torch.arange(-KERNEL_REACH, KERNEL_REACH + 1).abs() - 12).clamp(min=0) / 20 * math.pi / 2
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
        self.steer = zeroed(nn.Linear(code, 2 * deep_width + RINGS))
        self.up2 = nn.Conv2d(deep_width, deep_width, 1)
        self.up = nn.ConvTranspose2d(deep_width, width, 2, stride=2)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.tail = zeroed(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, description: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(description.device.type, enabled=False):
            logs = (description.to(self.radius.dtype) + 9) / 4
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


def apply_filter(photo: Tensor, kernel: Tensor) -> Tensor:
    """(N, 3, H, W) filtered with (N, 1, 63, 63), each photo with its own.

    Outside of training in float64, then rounded: a Fourier transform of a tile rounds otherwise than one of the whole photo.
    """
    exact = not torch.is_grad_enabled() and photo.device.type != "mps"  # which has no float64
    with torch.autocast(photo.device.type, enabled=False):
        dtype = torch.float64 if exact else kernel.dtype
        return blur(photo.to(dtype), kernel.to(dtype)).to(kernel.dtype)
