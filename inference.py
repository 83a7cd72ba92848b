"""Applies a network to photos of any size, in tiles, exactly, or with a fused student for 8 bits, and to videos."""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import FILTER_RADIUS, LUMA, flat_runs, padded_indices, to_space_to_depth_kernel, upsample_gains
from blur.estimator import BlurEstimator
from blur.local import BlurMap
from models import StudentCNN, StudentWeights
from utils import UserError, autocast, autocast_dtype

TILE = 1024  # pixels; larger photos are processed in tiles, so that memory does not grow with them
# Of the fused student: larger buffers would be unmapped and zeroed again by the system each time
BAND_PIXELS = 1_100_000
NOT_FINITE = "the network's output is not finite: its weights are damaged, use others with --weights"


class Sharpener:
    """Sharpens the pixels of photos with ``network``: 8 bits with a ``FusedStudent`` if it is a student, else exactly.

    Args:
        tile: rows and columns of a tile, a multiple of 16.
    """

    def __init__(self, network: nn.Module, device: torch.device, tile: int = TILE):
        self.network = network.to(device, memory_format=torch.channels_last).eval()
        self.device, self.tile = device, tile
        self.fused = FusedStudent(self.network) if type(network) is StudentCNN else None

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray, strength: float = 1.0) -> np.ndarray:
        """Add ``strength`` times the network's change.

        Args:
            pixels: (H, W, 3) RGB or (H, W, 1) gray, uint8 or uint16.
        Returns:
            the same shape and type.
        Raises:
            UserError: if the network's output is not finite.
        """
        if self.fused is None or pixels.dtype != np.uint8:
            return sharpen_pixels(self.network, pixels, strength, self.device, self.tile)
        picture = torch.from_numpy(pixels).to(self.device).expand(-1, -1, 3)
        return self.fused(picture, strength)[..., : pixels.shape[2]].cpu().numpy()


class VideoSharpener:
    """Sharpens the frames of a video, in order, with a blur estimate that is smoothed over time.

    Estimates of single frames fluctuate with noise and compression, and the sharpening would pulsate. With a student, the
    blur is a moving average of estimates, and so are, over fewer frames, the gains of each place. Only some frames are
    estimated, which saves time. A scene cut starts both anew. Other networks sharpen each frame by itself.
    """

    ESTIMATE_EVERY = 8  # frames
    EMA_WEIGHT = 1 / 16  # of the latest estimate in the moving average, per frame
    GAINS_EVERY = 2  # frames
    GAINS_WEIGHT = 3 / 8  # of a frame's gains in their moving average: they follow what moves
    CUT_THRESHOLD = 0.5  # change of an 8x8 thumbnail from frame to frame, as a share of its contrast

    def __init__(self, sharpener: Sharpener):
        self.sharpener, self.frames_since_estimate = sharpener, 0
        self.last_thumbnail = torch.tensor(math.inf)  # the first frame is a cut

    @torch.inference_mode()
    def __call__(self, frame: np.ndarray, strength: float = 1.0) -> np.ndarray:
        """The next frame, (H, W, 3) uint8 RGB, sharpened. Raises as ``Sharpener`` does."""
        fused = self.sharpener.fused
        if fused is None:
            return self.sharpener(frame, strength)
        thumbnail = F.adaptive_avg_pool2d(torch.from_numpy(frame[::4, ::4]).movedim(-1, 0).float(), 8)  # mean gray levels
        contrast, change = (thumbnail - thumbnail.mean()).abs().mean(), (thumbnail - self.last_thumbnail).abs().mean()
        # 2 gray levels: noise alone exceeds half the contrast of a flat frame
        cut = bool(change > self.CUT_THRESHOLD * contrast + 2)
        picture = torch.from_numpy(frame).to(self.sharpener.device)
        if cut or self.frames_since_estimate == self.ESTIMATE_EVERY:
            self.estimate, self.frames_since_estimate = fused.estimate_blur(picture), 0
        self.blur = self.estimate if cut else self.blur.lerp(self.estimate, self.EMA_WEIGHT)
        self.last_thumbnail, self.frames_since_estimate = thumbnail, self.frames_since_estimate + 1
        weights = fused.student.predict_weights(self.blur)
        if self.frames_since_estimate % self.GAINS_EVERY == 1:
            gains = fused.predict_gains(picture, weights)
            self.gains = gains if cut else self.gains.lerp(gains, self.GAINS_WEIGHT)
        return fused.sharpen(picture, weights, self.gains, strength).cpu().numpy()


@torch.inference_mode()
def sharpen_pixels(
    network: nn.Module, pixels: np.ndarray, strength: float, device: torch.device, tile: int = TILE
) -> np.ndarray:
    """As ``Sharpener``, for any network and depth, tile by tile."""
    peak = np.iinfo(pixels.dtype).max
    result = np.empty_like(pixels)
    height, width, channels = pixels.shape
    radius, tile = tile_geometry(network, (height, width), tile)
    blur = blur_of(network, torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device), peak)
    for outer, inner, place in tiles(height, width, (tile, tile), radius):
        part = torch.from_numpy(pixels[outer].astype(np.float32)).to(device).div_(peak).permute(2, 0, 1)[None]
        part = part.expand(1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            change = network(part, *crop_blur(blur, outer)).float() - part
        if not torch.isfinite(change).all():
            raise UserError(NOT_FINITE)
        sharpened = (part + strength * change)[0][(slice(None), *inner)].permute(1, 2, 0)
        sharpened = sharpened.mean(2, keepdim=True) if channels == 1 else sharpened
        result[place] = sharpened.clamp_(0, 1).mul_(peak).round_().cpu().numpy().astype(pixels.dtype)
    return result


def run_tiled(network: nn.Module, photo: Tensor, tile: int = TILE) -> Tensor:
    """``network(photo)`` for a photo of any size with the memory of one tile.

    Each tile is processed with the surroundings that affect it (``network.receptive_radius``), which are cut off again.

    Args:
        photo: (N, 3, H, W) in [0, 1].
        tile: rows and columns of a tile without its surroundings, a multiple of 16.
    """
    height, width = photo.shape[-2:]
    radius, tile = tile_geometry(network, (height, width), tile)
    if height * width <= tile * tile:
        return network(photo)
    blur = blur_of(network, photo)
    output = torch.empty_like(photo)
    for outer, inner, place in tiles(height, width, (tile, tile), radius):
        output[(..., *place)] = network(photo[(..., *outer)], *crop_blur(blur, outer))[(..., *inner)]
    return output


def run_ensemble(network: nn.Module, photo: Tensor, orientations: int) -> Tensor:
    """Mean of ``network`` over the first ``orientations``, 1 to 8, of the flips and rotations of (N, 3, H, W).

    Source: Lim et al. 2017, arXiv:1707.02921, section 3.4 (geometric self-ensemble).
    """
    total = torch.zeros_like(photo)
    for dihedral in range(orientations):
        flipped = photo.flip(-1) if dihedral >= 4 else photo
        output = run_tiled(network, flipped.rot90(dihedral % 4, (2, 3))).rot90(-(dihedral % 4), (2, 3))
        total += output.flip(-1) if dihedral >= 4 else output
    return total / orientations


def blur_of(network: nn.Module, photo: Tensor, peak: float = 1.0) -> tuple[BlurMap | Tensor, ...]:
    """The second argument of ``network`` for ``photo``: its estimated blur, or nothing."""
    return (network.estimate_blur(photo, peak),) if estimates_blur(network) else ()


def crop_blur(blur: tuple[BlurMap | Tensor, ...], place: tuple[slice, slice]) -> tuple[BlurMap | Tensor, ...]:
    """The same for a part of the photo."""
    return tuple(each.crop(*place) if isinstance(each, BlurMap) else each for each in blur)


def estimates_blur(network: nn.Module) -> bool:
    """Whether ``network`` has a blur estimator, and so takes a blur as its second argument."""
    return isinstance(getattr(getattr(network, "module", network), "estimator", None), BlurEstimator)  # module: under DDP


def run_patches(network: nn.Module, patches: Tensor, blur: Tensor) -> Tensor:
    """``network`` on (N, 3, S, S) patches with spectra (N, 6, 64, 33), or blur embeddings, if it estimates blur."""
    return network(patches, blur) if estimates_blur(network) else network(patches)


def tile_geometry(network: nn.Module, size: tuple[int, int], tile: int) -> tuple[int, int]:
    """(receptive radius, tile): a network without ``receptive_radius`` processes the photo as one tile."""
    return (network.receptive_radius, tile) if hasattr(network, "receptive_radius") else (0, max(size))


def tiles(height: int, width: int, tile: tuple[int, int], radius: int) -> Iterator[tuple[tuple[slice, slice], ...]]:
    """For each tile of a photo: rows and columns to process, which part of the result to keep, and its place."""
    margin = -(-radius // 16) * 16  # tiles keep the grid of the strided layers and of the student's cells
    # All of about equal size: for very small ones torch chooses another algorithm, which rounds differently
    counts = math.ceil(height / tile[0]), math.ceil(width / tile[1])
    step_down, step_right = 16 * math.ceil(height / counts[0] / 16), 16 * math.ceil(width / counts[1] / 16)
    for top in range(0, height, step_down):
        for left in range(0, width, step_right):
            bottom, right = min(top + step_down, height), min(left + step_right, width)
            first_row, first_column = max(0, top - margin), max(0, left - margin)
            outer = slice(first_row, bottom + margin), slice(first_column, right + margin)
            inner = slice(top - first_row, bottom - first_row), slice(left - first_column, right - first_column)
            yield outer, inner, (slice(top, bottom), slice(left, right))


class FusedStudent(nn.Module):
    """A trained ``StudentCNN`` for 8-bit pixels, several times faster and equal to it up to rounding.

    Experts and skips are folded into the weights, for one photo at a time; convolutions run in ``dtype``, channels last,
    as the pixels of a photo are stored.

    Args:
        dtype: if None, float16 on CUDA, bfloat16 where the CPU is faster in it, else float32.
    Shapes: (H, W, 3) uint8 RGB -> same.
    """

    SCALE = 256  # activations are pixel values / 256: float16 cannot overflow, and a power of two never rounds
    FIXED_POINT = 16  # steps per gray level, in which smooth chroma is added up

    def __init__(self, student: StudentCNN, dtype: torch.dtype | None = None):
        super().__init__()
        device = student.tapers.device
        self.student, self.dtype = student.eval(), dtype
        if dtype is None:
            self.dtype = torch.float16 if device.type == "cuda" else autocast_dtype(device)
        to_blocks = torch.eye(16).view(16, 1, 4, 4) * LUMA.view(1, 3, 1, 1) / self.SCALE
        to_dct = torch.einsum("kp,pcyx->kcyx", student.gain_map.dct.cpu(), to_blocks) * self.SCALE / 255
        to_chroma = (torch.eye(3) - LUMA)[..., None, None].expand(3, 3, 4, 4) / 16  # mean chroma of a block
        # Bilinear interpolation of block means at the 4 pixels of an axis, from the block before, this one and the next
        bilinear = torch.tensor([[3.0, 5, 0], [1, 7, 0], [0, 7, 1], [0, 5, 3]]) / 8
        to_pixels = torch.einsum("iy,jx,cd->ijcdyx", bilinear, bilinear, torch.eye(3)).reshape(48, 3, 3, 3)
        matrices = {"to_blocks": to_blocks, "to_dct": to_dct, "to_chroma": to_chroma, "to_pixels": to_pixels}
        for name, weight in matrices.items():
            weight = weight.to(device).contiguous(memory_format=torch.channels_last)
            self.register_buffer(name, weight, persistent=False)
        torch.empty(31_000_000, dtype=torch.uint8)  # glibc then keeps freed blocks up to this size instead of unmapping them

    @torch.inference_mode()
    def forward(self, picture: Tensor, strength: float = 1.0) -> Tensor:
        """``picture`` plus ``strength`` times the student's change. Raises ``UserError`` if that is not finite."""
        weights = self.student.predict_weights(self.estimate_blur(picture))
        return self.sharpen(picture, weights, self.predict_gains(picture, weights), strength)

    def sharpen(self, picture: Tensor, weights: StudentWeights, gains: Tensor, strength: float) -> Tensor:
        """``forward`` for what is known already: weights, and gains as ``predict_gains`` returns them."""
        height, width, _ = picture.shape
        layers, smoothing = self.fuse_weights(weights, strength)
        result = torch.empty_like(picture)
        for outer, inner, place in tiles(height, width, (band_rows(width), width), FILTER_RADIUS + self.student.conv_radius):
            first, last = outer[0].start // 16, math.ceil(min(outer[0].stop, height) / 16)  # cells of the band
            above = max(0, first - 1)  # interpolation needs one more on each side
            part = upsample_gains(gains[:, :, above : last + 1])[:, :, 4 * (first - above) :]
            result[place] = self.sharpen_band(picture[outer], layers, part, smoothing, strength)[inner]
        return result

    def estimate_blur(self, picture: Tensor) -> Tensor:
        return self.student.estimate_blur(picture.movedim(-1, 0)[None], 255)

    def predict_gains(self, picture: Tensor, weights: StudentWeights) -> Tensor:
        """``GainMap.predict_gains`` of the photo, whose energies are computed in bands: (1, 3, H / 16, W / 16)."""
        rows, columns = (padded_indices(length)[FILTER_RADIUS:-FILTER_RADIUS] for length in picture.shape[:2])
        energies, cells = [], math.ceil(band_rows(len(columns)) / 16)
        for part in rows.view(-1, 4)[::2].split(2 * cells):  # two rows of blocks for each row of cells
            half = picture[part.flatten()]
            half = half if len(columns) == half.shape[1] else half[:, columns]
            coefficients = F.conv2d(half.movedim(-1, 0)[None].float(), self.to_dct, stride=4)
            energies.append(self.student.gain_map.energies(coefficients))
        return self.student.gain_map.predict_gains(torch.cat(energies, 2), weights.film, weights.references)

    def sharpen_band(self, picture: Tensor, layers: tuple, gains: Tensor, smoothing: float, strength: float) -> Tensor:
        first, second, *deep, last = layers
        height, width, _ = picture.shape
        padded, margin = reflect_pad_picture(picture), FILTER_RADIUS // 4
        blocks = F.conv2d(padded, self.to_blocks, stride=4)
        gains = gains[..., : blocks.shape[2] - 2 * margin, : blocks.shape[3] - 2 * margin].split(1, 1)
        x = (blocks - 0.5).to(self.dtype)  # filters of sum 0 ignore what is subtracted, and numbers near 0 are rounded less
        change = F.conv2d(x, *first).float().mul_(gains[0]).addcmul_(F.conv2d(x, *second).float(), gains[1])
        blocks = blocks[..., margin:-margin, margin:-margin]
        x = (blocks + change).to(self.dtype)
        for layer in deep:
            x = F.conv2d(x, *layer, padding=1).relu_()
        change = change.addcmul_(F.conv2d(x, *last, padding=1).float(), gains[2]).mul_(strength)
        if not torch.isfinite(change.sum()):
            raise UserError(NOT_FINITE)
        unit = self.FIXED_POINT if smoothing else 1
        if smoothing:  # photo + change + smoothing * (smooth chroma - photo + luma)
            change = change.add_(blocks, alpha=smoothing)
        change = shuffle_pixels(change.mul_(self.SCALE * unit), 1)[:height, :width, 0]
        flat = self.find_bars(picture, blocks)
        if not smoothing:
            change.masked_fill_(flat, 0)
        rgb = torch.empty(height, width, 3, dtype=torch.int16, device=picture.device)
        for channel in rgb.unbind(-1):  # torch.stack uses one core here
            channel.copy_(change)
        # All of one type: mixed types take several times longer
        photo = picture.to(torch.int16)
        if not smoothing:
            return rgb.add_(photo).clamp_(0, 255)
        smooth = F.conv2d(F.conv2d(padded, self.to_chroma, stride=4), self.to_pixels).mul_(smoothing * unit)
        rgb.add_(shuffle_pixels(smooth, 3)[:height, :width]).add_(photo * round(unit * (1 - smoothing)))
        rgb.add_(unit // 2).bitwise_right_shift_(unit.bit_length() - 1).clamp_(0, 255)
        return torch.where(flat[..., None], photo, rgb) if flat.any() else rgb

    @staticmethod
    def find_bars(picture: Tensor, blocks: Tensor) -> Tensor:
        """``blocks.flat_runs``, (H, W); of a large picture in the rows of bars and frames alone, since it is slow.

        There 16 blocks in line are flat on their diagonals.
        """
        flat = ((blocks[:, 0] == blocks[:, 15]) & (blocks[:, 3] == blocks[:, 12]))[0]
        across, down = run_starts(flat, 1), run_starts(flat, 0)
        rows = 4 * torch.cat([across, down, down + 15])  # pixels
        if picture.numel() < 2**20:
            rows = torch.tensor([0, len(picture)])
        flat = torch.zeros_like(picture[..., 0], dtype=torch.bool)
        if len(rows):
            top, bottom = max(0, int(rows.min()) - 8), int(rows.max()) + 12
            found = flat_runs(picture[top:bottom].movedim(-1, 0)[None])[0, 0]
            kept = slice(4 * (top > 0), len(found) - 4 * (bottom < len(picture)))  # cut edges are no borders
            flat[top:bottom][kept] = found[kept]
        return flat

    def fuse_weights(self, weights: StudentWeights, strength: float) -> tuple[tuple, float]:
        """For one photo: (weight, bias) of each layer, and the share of smooth chroma."""
        convs = [tuple(part[0] for part in conv.mix_experts(weights.routing)) for conv in self.student.convs]
        for weight, _ in convs[:-1]:
            weight[:, :, 1, 1].diagonal().add_(1)  # x + conv(x)
        kernels = weights.kernels[0].to(self.dtype).float()
        kernels[:, 0, 0] -= kernels.sum((1, 2))  # rounded they are still of sum 0
        filters = to_space_to_depth_kernel(kernels, self.student.space_to_depth_indices)
        layers = [(weight.to(self.dtype), None) for weight in filters]
        layers += [(weight.to(self.dtype), (bias * 255 / self.SCALE).to(self.dtype)) for weight, bias in convs]
        layers = tuple((weight.contiguous(memory_format=torch.channels_last), bias) for weight, bias in layers)
        if not torch.isfinite(weights.smoothing).all():
            raise UserError(NOT_FINITE)
        return layers, round(float(weights.smoothing) * strength * self.FIXED_POINT) / self.FIXED_POINT


def band_rows(width: int) -> int:
    return max(16, BAND_PIXELS // width)


def run_starts(flags: Tensor, axis: int) -> Tensor:
    """Rows of (H, W) flags in which 16 true ones in line along ``axis`` begin; of fewer if H or W is smaller."""
    for step in (1, 2, 4, 8):
        count = flags.shape[axis] - step
        if count > 0:
            flags = flags.narrow(axis, 0, count) & flags.narrow(axis, step, count)
    return flags.any(1).nonzero()


def shuffle_pixels(blocks: Tensor, channels: int) -> Tensor:
    """Pixel shuffle: (1, 4 * 4 * channels, H / 4, W / 4), channels last, -> (H, W, channels), rounded to int16."""
    rows, columns = blocks.shape[2:]
    values = blocks.clamp_(-20000, 20000).round_()[0].movedim(0, -1).to(torch.int16).reshape(-1).view(torch.int64)
    values = values.view(rows, columns, 4, channels).transpose(1, 2).reshape(-1).view(torch.int16)  # four values at once
    return values.view(4 * rows, 4 * columns, channels)


def reflect_pad_picture(picture: Tensor) -> Tensor:
    """As ``blocks.reflect_pad_to_blocks``, in float32 and without copying every pixel twice: (H, W, 3) -> (1, 3, H', W')."""
    height, width, _ = picture.shape
    rows, columns = padded_indices(height), padded_indices(width)
    photo = torch.empty(1, len(rows), len(columns), 3, device=picture.device)
    here = slice(FILTER_RADIUS, FILTER_RADIUS + height)
    photo[0, here, FILTER_RADIUS : FILTER_RADIUS + width] = picture
    for beyond in slice(FILTER_RADIUS), slice(FILTER_RADIUS + width, None):
        photo[0, here, beyond] = photo[0, here, FILTER_RADIUS + columns[beyond]]
    for beyond in slice(FILTER_RADIUS), slice(FILTER_RADIUS + height, None):
        photo[0, beyond] = photo[0, FILTER_RADIUS + rows[beyond]]
    return photo.movedim(-1, 1)
