"""Applies a network to photos of any size, in tiles, exactly, or with a FusedStudent for 8 bits, and to videos."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blur.estimator import BlurEstimator
from blur.local import BlurMap
from fused_student import NOT_FINITE, FusedStudent
from models import StudentCNN
from utils import UserError, autocast, make_generator

TILE = 1024  # pixels, a multiple of 16; larger photos are processed in tiles, so that memory does not grow with them


class Sharpener:
    """Sharpens the pixels of photos with ``network``: 8 bits with a ``FusedStudent`` if it is a student, else exactly.

    Exactly means in tiles of TILE rows and columns. The result is the mean over the first
    ``orientations``, 1 to 8, of the flips and rotations of a photo (``self_ensemble``): more take longer and are a
    little better. ``strength`` times the network's change is added. Raises ``UserError`` if its output is not finite.
    """

    def __init__(self, network: nn.Module, device: torch.device, orientations: int = 1, strength: float = 1.0):
        self.network = network.to(device, memory_format=torch.channels_last).eval()
        self.device, self.orientations, self.strength = device, orientations, strength
        fits = type(network) is StudentCNN and matches_fused_student(self.network, device)
        self.fused = FusedStudent(self.network, strength=strength) if fits else None

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Sharpen (H, W, 3) RGB or (H, W, 1) gray, uint8 or uint16."""
        if self.orientations == 1:
            return self.sharpen_upright(pixels)
        return self_ensemble(self.sharpen_upright, pixels, self.orientations).round().astype(pixels.dtype)

    @torch.inference_mode()
    def sharpen_upright(self, pixels: np.ndarray) -> np.ndarray:
        """The same in one orientation."""
        pixels = np.require(pixels, requirements=("C", "W"))  # not so from np.asarray(Image), or BGR turned by [..., ::-1]
        if self.fused is None or pixels.dtype != np.uint8:
            return self.sharpen_in_tiles(pixels)
        picture = torch.from_numpy(pixels).to(self.device).expand(-1, -1, 3)
        return self.fused(picture)[..., : pixels.shape[2]].cpu().numpy()

    @torch.inference_mode()
    def sharpen_in_tiles(self, pixels: np.ndarray) -> np.ndarray:
        """The same with the network itself, without a ``FusedStudent``."""
        peak, result = np.iinfo(pixels.dtype).max, np.empty_like(pixels)
        blur = blur_of(self.network, torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.device), peak)
        for outer, inner, place, local_blur in tiles(self.network, pixels.shape[:2], blur):
            part = torch.from_numpy(pixels[outer].astype(np.float32)).to(self.device).div_(peak).permute(2, 0, 1)[None]
            part = part.expand(1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            with autocast(self.device):
                change = self.network(part, *local_blur).float() - part
            if not torch.isfinite(change).all():
                raise UserError(NOT_FINITE)
            sharpened = (part + self.strength * change)[0][(slice(None), *inner)].permute(1, 2, 0)
            sharpened = sharpened.mean(2, keepdim=True) if pixels.shape[2] == 1 else sharpened
            result[place] = sharpened.clamp_(0, 1).mul_(peak).round_().cpu().numpy().astype(pixels.dtype)
        return result


class VideoSharpener:
    """Sharpens the frames of a video, in order, with a blur estimate that is smoothed over time.

    Estimates of single frames fluctuate with noise and compression, and the sharpening would pulsate. With a student, the
    blur is a moving average of estimates, and so are, over fewer frames, the gains of each place. Only some frames are
    estimated, which saves time. A scene cut starts both anew. Other networks, and a student in several orientations, sharpen
    each frame by itself.
    """

    ESTIMATE_EVERY = 8  # frames
    EMA_WEIGHT = 1 / 16  # of the latest estimate in the moving average, per frame
    GAINS_EVERY = 2  # frames
    GAINS_WEIGHT = 3 / 8  # of a frame's gains in their moving average: they follow what moves
    CUT_THRESHOLD = 0.5  # change of an 8x8 thumbnail from frame to frame, as a share of its contrast

    def __init__(self, sharpener: Sharpener):
        self.sharpener, self.frames = sharpener, 0  # since the last cut
        self.last_thumbnail, self.shape = torch.tensor(math.inf), None  # the first frame is a cut

    @torch.inference_mode()
    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """The next frame, (H, W, 3) uint8 RGB, sharpened. Raises as ``Sharpener`` does."""
        fused, frame = self.sharpener.fused, np.require(frame, requirements=("C", "W"))
        if fused is None or self.sharpener.orientations > 1:
            return self.sharpener(frame)
        thumbnail = F.adaptive_avg_pool2d(torch.from_numpy(frame[::4, ::4]).movedim(-1, 0).float(), 8)  # mean gray levels
        contrast, change = (thumbnail - thumbnail.mean()).abs().mean(), (thumbnail - self.last_thumbnail).abs().mean()
        # 2 gray levels: noise alone exceeds half the contrast of a flat frame
        cut = bool(change > self.CUT_THRESHOLD * contrast + 2) or frame.shape != self.shape
        picture, self.shape = torch.from_numpy(frame).to(self.sharpener.device), frame.shape
        self.last_thumbnail, self.frames = thumbnail, 0 if cut else self.frames + 1
        if self.frames % self.ESTIMATE_EVERY == 0:
            self.estimate = fused.estimate_blur(picture)
        self.blur = self.estimate if cut else self.blur.lerp(self.estimate, self.EMA_WEIGHT)
        weights, due = fused.student.predict_weights(self.blur), self.frames % self.GAINS_EVERY == 0
        blocks, cells = fused.split_into_blocks(picture, with_cells=due)
        if due:
            gains = fused.predict_gains(cells, weights)
            self.gains = gains if cut else self.gains.lerp(gains, self.GAINS_WEIGHT)
        return fused.sharpen(picture, blocks, weights, self.gains).cpu().numpy()


@torch.inference_mode()
def matches_fused_student(student: StudentCNN, device: torch.device) -> bool:
    """Whether ``student`` and a ``FusedStudent`` do the same to a small blurry picture; if not, a line is printed."""
    generator = make_generator(0)
    photo = F.interpolate(torch.rand(1, 1, 40, 40, generator=generator), 160, mode="bilinear")
    photo = (0.1 + 0.8 * photo + 0.01 * torch.randn(1, 3, 160, 160, generator=generator)).mul(255).byte().to(device)
    photo[..., :8, :] = 25  # a bar
    try:
        fused = FusedStudent(student, torch.float32)(photo[0].movedim(0, -1))
        difference = (student(photo / 255)[0].movedim(0, -1).clamp(0, 1) * 255 - fused).abs().max()
        if difference <= 3:  # gray levels; rounding makes 0.7
            return True
    except (AttributeError, RuntimeError, TypeError, ValueError):  # other layers than those that it knows
        pass
    # Standard output may be a video
    print("StudentCNN differs from fused_student.py: the plain network is used, several times slower", file=sys.stderr)
    return False


def run_tiled(network: nn.Module, photo: Tensor) -> Tensor:
    """``network(photo)`` for (N, 3, H, W) in [0, 1] of any size, with the memory of one of its ``tiles``."""
    output = torch.empty_like(photo)
    for outer, inner, place, local_blur in tiles(network, photo.shape[-2:], blur_of(network, photo)):
        output[(..., *place)] = network(photo[(..., *outer)], *local_blur)[(..., *inner)]
    return output


def self_ensemble(sharpen: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, orientations: int) -> np.ndarray:
    """Mean of ``sharpen`` over the first ``orientations``, 1 to 8, of the flips and rotations of (H, W, C), as float32.

    Source: Lim et al. 2017, arXiv:1707.02921, section 3.4 (geometric self-ensemble).
    """
    total = np.zeros(pixels.shape, np.float32)
    for dihedral in range(orientations):
        flipped = pixels[:, ::-1] if dihedral >= 4 else pixels
        output = np.rot90(sharpen(np.ascontiguousarray(np.rot90(flipped, dihedral))), -dihedral)
        total += output[:, ::-1] if dihedral >= 4 else output
    return total / orientations


def blur_of(network: nn.Module, photo: Tensor, peak: float = 1.0) -> tuple[BlurMap | Tensor, ...]:
    """The second argument of ``network`` for ``photo``: its estimated blur, or nothing."""
    return (network.estimate_blur(photo, peak),) if estimates_blur(network) else ()


def estimates_blur(network: nn.Module) -> bool:
    """Whether ``network`` has a blur estimator, and so takes a blur as its second argument."""
    return isinstance(getattr(getattr(network, "module", network), "estimator", None), BlurEstimator)  # module: under DDP


def run_patches(network: nn.Module, patches: Tensor, blur: Tensor) -> Tensor:
    """``network`` on (N, 3, S, S) patches with spectra (N, 9, 64, 33), or blur embeddings, if it estimates blur."""
    return network(patches, blur) if estimates_blur(network) else network(patches)


def tiles(network: nn.Module, size: tuple[int, int], blur: tuple[BlurMap | Tensor, ...]) -> Iterator[tuple]:
    """For each tile of a photo of (H, W): rows and columns to process, which part of the result to keep, its place, and
    the part of ``blur``, which ``blur_of`` returned.

    What is processed includes the surroundings that affect the tile (``network.receptive_radius``). A photo with no more
    pixels than a tile is one, and so is any photo for a network whose radius is not known.
    """
    tile = max(size) if math.prod(size) <= TILE**2 or not hasattr(network, "receptive_radius") else TILE
    # Tiles keep the grid of the strided layers and of the student's cells
    margin, axes = 16 * math.ceil(getattr(network, "receptive_radius", 0) / 16), ([], [])
    for length, axis in zip(size, axes, strict=True):
        # All of about equal size: for very small ones torch chooses another algorithm, which rounds differently
        step = 16 * math.ceil(length / math.ceil(length / tile) / 16)
        for start in range(0, length, step):
            first, stop = max(0, start - margin), min(start + step, length)
            axis.append((slice(first, stop + margin), slice(start - first, stop - first), slice(start, stop)))
    for rows, columns in itertools.product(*axes):
        outer, inner, place = zip(rows, columns, strict=True)
        yield outer, inner, place, tuple(each.crop(*outer) if isinstance(each, BlurMap) else each for each in blur)
