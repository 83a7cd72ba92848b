"""The student as it runs on 8-bit photos and frames: the same network, several times faster.

The weights that it predicts for a photo are folded into a few convolutions, which run in half precision on bands of rows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blocks import FILTER_RADIUS, LUMA, flat_runs, padded_indices, to_space_to_depth_kernel
from models import StudentCNN, StudentWeights
from utils import UserError, autocast_dtype

BAND_PIXELS = 2_200_000  # much larger buffers would be unmapped and zeroed again by the system each time
MARGIN = FILTER_RADIUS // 4  # blocks around a photo that the filters see
NOT_FINITE = "the network's output is not finite: its weights are damaged, use others with --weights"


class FusedStudent:
    """A trained ``StudentCNN`` for 8-bit pixels, several times faster and equal to it up to rounding.

    Experts and skips are folded into the weights, for one photo at a time; convolutions run in ``dtype``, channels last,
    as the pixels of a photo are stored.

    Args:
        dtype: if None, float16 on CUDA, bfloat16 where the CPU is faster in it, else float32.
        strength: how much of the student's change is added.
    Shapes: (H, W, 3) uint8 RGB -> same.
    """

    SCALE = 256  # activations are pixel values / 256: float16 cannot overflow, and a power of two never rounds
    FIXED_POINT = 16  # steps per gray level, in which changes of chroma are limited and added up

    def __init__(self, student: StudentCNN, dtype: torch.dtype | None = None, strength: float = 1.0):
        device = student.router.weight.device
        self.student, self.strength = student.eval(), strength
        self.dtype = dtype or (torch.float16 if device.type == "cuda" else autocast_dtype(device))
        to_blocks = torch.eye(16).view(16, 1, 4, 4) * LUMA.view(1, 3, 1, 1) / self.SCALE
        to_cells = student.gain_map.basis.cpu()[..., None, None] * self.SCALE / 255
        to_chroma = (torch.eye(3) - LUMA)[..., None, None].expand(3, 3, 4, 4) / 16  # mean chroma of a block
        # Bilinear interpolation of block means at the 4 pixels of an axis, from the block before, this one and the next
        bilinear = torch.tensor([[3.0, 5, 0], [1, 7, 0], [0, 7, 1], [0, 5, 3]]) / 8
        to_pixels = torch.einsum("iy,jx,cd->ijcdyx", bilinear, bilinear, torch.eye(3)).reshape(48, 3, 3, 3)
        self.to_blocks, self.to_cells, self.to_chroma, self.to_pixels = (
            each.to(device).contiguous(memory_format=torch.channels_last)
            for each in (to_blocks, to_cells, to_chroma, to_pixels)
        )
        torch.empty(31_000_000, dtype=torch.uint8)  # glibc then keeps freed blocks up to this size instead of unmapping them

    @torch.inference_mode()
    def __call__(self, picture: Tensor) -> Tensor:
        """A sharper ``picture``. Raises ``UserError`` if that is not finite."""
        weights = self.student.predict_weights(self.estimate_blur(picture))
        blocks, cells = self.split_into_blocks(picture)
        return self.sharpen(picture, blocks, weights, self.predict_gains(cells, weights))

    def estimate_blur(self, picture: Tensor) -> Tensor:
        return self.student.estimate_blur(picture.movedim(-1, 0)[None], 255)

    def split_into_blocks(self, picture: Tensor, with_cells: bool = True) -> tuple[Tensor, Tensor | None]:
        """Luma / SCALE in space-to-depth blocks, padded, (1, 16, H / 4, W / 4), and ``GainMap.measure_cells`` of them."""
        # Float16 is exact to 0.06 gray levels and half the memory
        dtype = torch.float32 if self.dtype == torch.float32 else torch.float16
        rows, columns = (len(padded_indices(length)) // 4 for length in picture.shape[:2])
        stored = torch.empty(1, rows, columns, 16, dtype=dtype, device=picture.device).movedim(-1, 1)  # channels last
        cells, done = [], 0
        for top, bottom in bands(*picture.shape[:2]):
            blocks = F.conv2d(pad_band(picture, top, bottom), self.to_blocks, stride=4)
            stored[:, :, done : done + blocks.shape[2]] = blocks
            done += blocks.shape[2]
            if with_cells:
                inside = slice(None if top else MARGIN, -MARGIN if bottom == len(picture) else None)
                coefficients = F.conv2d(blocks[:, :, inside, MARGIN:-MARGIN][:, :, ::2], self.to_cells)
                cells.append(self.student.gain_map.measure_cells(coefficients))
        return stored, torch.cat(cells, 2) if cells else None

    def predict_gains(self, cells: Tensor, weights: StudentWeights) -> Tensor:
        """(1, 19, H / 16, W / 16) -> (1, 3, H / 16, W / 16)."""
        return self.student.gain_map.predict_gains(cells, weights.film, weights.expected_energies)

    def sharpen(self, picture: Tensor, blocks: Tensor, weights: StudentWeights, gains: Tensor) -> Tensor:
        """``__call__`` for what is known already, as the methods above return it."""
        height, width, _ = picture.shape
        layers, limit = self.fuse_weights(weights)
        result, context = torch.empty_like(picture), 16 * math.ceil(self.student.conv_radius / 16)
        for top, bottom in bands(height, width):
            first, last = max(0, top - context), min(bottom + context, height)
            band = blocks[:, :, first // 4 : math.ceil(last / 4) + 2 * MARGIN]
            above = max(0, first // 16 - 1)  # cells, of which interpolation needs one more on each side
            part = F.interpolate(gains[:, :, above : last // 16 + 2], scale_factor=4, mode="bilinear")
            part = part[:, :, first // 4 - 4 * above :]
            changed = self.sharpen_band(picture[first:last], band, layers, part, limit)
            result[top:bottom] = changed[top - first : bottom - first]
        return result

    def sharpen_band(self, picture: Tensor, blocks: Tensor, layers: tuple, gains: Tensor, limit: int) -> Tensor:
        filters, *deep, last = layers
        height, width, _ = picture.shape
        blocks = blocks.float()
        gains = gains[..., : blocks.shape[2] - 2 * MARGIN, : blocks.shape[3] - 2 * MARGIN].split(1, 1)
        x = (blocks - 0.5).to(self.dtype)  # filters of sum 0 ignore what is subtracted, and numbers near 0 are rounded less
        change, blurriest = F.conv2d(x, *filters).split(16, 1)
        change = (change.float() * gains[0]).addcmul_(blurriest.float(), gains[1])
        blocks = blocks[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
        x = (blocks + change).to(self.dtype)
        for layer in deep:
            x = F.conv2d(x, *layer, padding=1).relu_()
        change = change.addcmul_(F.conv2d(x, *last, padding=1).float(), gains[2])
        if not torch.isfinite(change.sum()):
            raise UserError(NOT_FINITE)
        unit = self.FIXED_POINT if limit else 1
        change = shuffle_pixels(change.mul_(self.strength * self.SCALE * unit), 1)[:height, :width, 0]
        # All of one type: mixed types take several times longer
        photo = picture.to(torch.int16)
        if limit:
            chroma = F.conv2d(pad_band(picture, 0, height), self.to_chroma, stride=4)
            beyond = slice(MARGIN - 1, 1 - MARGIN or None)  # interpolation needs one block
            smooth = F.conv2d(chroma[..., beyond, beyond], self.to_pixels)
            smooth.unflatten(1, (16, 3)).add_(blocks[:, :, None], alpha=self.SCALE)
            rgb = shuffle_pixels(smooth.mul_(unit), 3)[:height, :width]  # as the photo, with smooth chroma
            rgb.sub_(photo * unit).clamp_(-limit, limit)
            rgb = rgb if self.strength == 1 else (self.strength * rgb).round_().to(torch.int16)
            for channel in rgb.unbind(-1):
                channel.add_(change)
            rgb.add_(unit // 2).bitwise_right_shift_(unit.bit_length() - 1)
        else:
            rgb = torch.empty(height, width, 3, dtype=torch.int16, device=picture.device)
            for channel in rgb.unbind(-1):  # torch.stack uses one core here
                channel.copy_(change)
        rows, columns = flat_runs(picture.movedim(-1, 0)[None])[0, 0].nonzero(as_tuple=True)
        rgb[rows, columns] = 0  # few: several times faster than with a mask
        return rgb.add_(photo).clamp_(0, 255)

    def fuse_weights(self, weights: StudentWeights) -> tuple[tuple, int]:
        """For one photo: (weight, bias) of each layer, and how far chroma is moved at most, in steps of FIXED_POINT."""
        convs = [tuple(part[0] for part in conv.mix_experts(weights.routing)) for conv in self.student.convs]
        for weight, _ in convs[:-1]:
            weight[:, :, 1, 1].diagonal().add_(1)  # x + conv(x)
        kernels = weights.kernels[0].to(self.dtype, copy=True).float()
        kernels[:, 0, 0] -= kernels.sum((1, 2))  # rounded they are still of sum 0
        filters = to_space_to_depth_kernel(kernels, self.student.space_to_depth_indices).flatten(0, 1)
        layers = [(filters.to(self.dtype), None)]  # both in one convolution, which is faster
        layers += [(weight.to(self.dtype), (bias * 255 / self.SCALE).to(self.dtype)) for weight, bias in convs]
        layers = tuple((weight.contiguous(memory_format=torch.channels_last), bias) for weight, bias in layers)
        if not torch.isfinite(weights.chroma_limit).all():
            raise UserError(NOT_FINITE)
        return layers, round(min(float(weights.chroma_limit), 1) * 255 * self.FIXED_POINT)


def bands(height: int, width: int) -> list[tuple[int, int]]:
    """First row, a multiple of 16, and last row, exclusive, of bands of a picture, about equally large."""
    rows = 16 * math.ceil(height / math.ceil(height * width / BAND_PIXELS) / 16)
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


def shuffle_pixels(blocks: Tensor, channels: int) -> Tensor:
    """Pixel shuffle: (1, 4 * 4 * channels, H / 4, W / 4), channels last, -> (H, W, channels), rounded to int16."""
    rows, columns = blocks.shape[2:]
    values = blocks.clamp_(-20000, 20000).round_()[0].movedim(0, -1).to(torch.int16).reshape(-1).view(torch.int64)
    values = values.view(rows, columns, 4, channels).transpose(1, 2).reshape(-1).view(torch.int16)  # four values at once
    return values.view(4 * rows, 4 * columns, channels)


def pad_band(picture: Tensor, top: int, bottom: int) -> Tensor:
    """As ``blocks.reflect_pad_to_blocks``, for the rows of a band: (H, W, 3) -> (1, 3, H', W') float32.

    The first band also has what is above the picture, the last one what is below it.
    """
    height, width, _ = picture.shape
    rows, columns = padded_indices(height), padded_indices(width)
    rows = rows[top + FILTER_RADIUS if top else 0 : bottom + FILTER_RADIUS if bottom < height else None]
    above = 0 if top else FILTER_RADIUS
    below = above + bottom - top
    photo = torch.empty(1, len(rows), len(columns), 3, device=picture.device)
    inside = photo[0, :, FILTER_RADIUS : FILTER_RADIUS + width]
    inside[above:below] = picture[top:bottom]  # most rows, and as slices they are not copied twice
    for beyond in slice(above), slice(below, None):
        inside[beyond] = picture[rows[beyond]].to(inside)
    for beyond in slice(FILTER_RADIUS), slice(FILTER_RADIUS + width, None):
        photo[0, :, beyond] = photo[0, :, FILTER_RADIUS + columns[beyond]]
    return photo.movedim(-1, 1)
