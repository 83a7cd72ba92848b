"""Any network on a photo of any size."""

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

import os

import shutil

import sys

import time

from pathlib import Path

import numpy as np

import torch

from torch import nn

from tqdm import tqdm

from checks import CliParser, check_folder, size_of

from files import atomic_write

from models import FusedStudent, StudentCNN, spectrum_of, load_model, tiles

from photos import find_photos

from pictures import FORMATS, read_picture, write_picture

from utils import UserError, autocast, is_out_of_memory, one_line, pick_device, run_cli

TILE = 1024  # pixels; larger photos go through the network in tiles, so that memory does not grow with them

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
    described = spectrum_of(network, photo)
    output = torch.empty_like(photo)
    for around, inside, place in tiles(height, width, (tile, tile), network.reach):
        output[(..., *place)] = network(photo[(..., *around)], *described)[(..., *inside)]
    return output

def spectrum_of(network: nn.Module, photo: Tensor, peak: float = 1.0) -> tuple[Tensor, ...]:
    """What ``network`` must be told of a whole photo when it is given a tile: nothing, or its description."""
    return (network.log_power_spectrum(photo, peak),) if hasattr(network, "describe") else ()

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

@torch.inference_mode()
def sharpen_pixels(
    network: nn.Module, pixels: np.ndarray, strength: float, device: torch.device, tile: int = TILE
) -> np.ndarray:
    """``pixels`` plus ``strength`` times what ``network`` changes of them, tile by tile.

    Args:
        pixels: (H, W, 3) RGB or (H, W, 1) grey, uint8 or uint16; H and W of any size.
    Returns:
        the same shape and type.
    """
    peak = np.iinfo(pixels.dtype).max
    result = np.empty_like(pixels)
    height, width, channels = pixels.shape
    # A network that does not say how far it looks sees the photo whole
    reach, tile = (network.reach, tile) if hasattr(network, "reach") else (0, max(height, width))
    described = spectrum_of(network, torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device), peak)
    for around, inside, place in tiles(height, width, (tile, tile), reach):
        part = torch.from_numpy(pixels[around].astype(np.float32)).to(device).div_(peak).permute(2, 0, 1)[None]
        part = part.expand(1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            change = network(part, *described).float() - part
        if not torch.isfinite(change).all():
            raise UserError("the network's result is not finite: its weights are damaged, take others with --weights")
        sharp = (part + strength * change)[0][(slice(None), *inside)].permute(1, 2, 0)
        sharp = sharp.mean(2, keepdim=True) if channels == 1 else sharp
        result[place] = sharp.clamp_(0, 1).mul_(peak).round_().cpu().numpy().astype(pixels.dtype)
    return result

class FusedStudent(nn.Module):
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
        to_squares = (torch.eye(16).view(16, 1, 4, 4) * LUMA.view(1, 3, 1, 1)).to(device)
        self.register_buffer("to_squares", to_squares.contiguous(memory_format=torch.channels_last), persistent=False)
        torch.empty(31_000_000, dtype=torch.uint8)  # the C library keeps pieces as large as one that it once got back

    @torch.inference_mode()
    def forward(self, picture: Tensor, strength: float = 1.0) -> Tensor:
        """``picture`` plus ``strength`` times the change that the student makes."""
        height, width, _ = picture.shape
        layers = self.fold(log_power_spectrum(picture.movedim(-1, 0)[None], 255), strength)
        result = torch.empty_like(picture)
        # In bands: larger pieces of memory go back to the system, which gives others and fills them with zeros first
        for around, inside, place in tiles(height, width, (max(8, 1_100_000 // width), width), self.student.reach):
            result[place] = self.sharpen(picture[around], layers, strength)[inside]
        return result

    def sharpen(self, picture: Tensor, layers: tuple, strength: float) -> Tensor:
        the_filter, *deep, last = layers
        height, width, _ = picture.shape
        squares, margin = F.conv2d(reflect_pad_picture(picture), self.to_squares, stride=4), FILTER_RADIUS // 4
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

    def fold(self, spectrum: Tensor, strength: float) -> tuple:
        """(weight, bias) of each layer for a picture of that description; between the layers white is 255 too."""
        kernel, mix = self.student.predict_kernel_and_routing(self.student.embed_blur(spectrum))
        *deep, (weight, bias) = (tuple(part[0] for part in conv.mixed_weights(mix)) for conv in self.student.convs)
        for skipped, _ in deep:
            skipped[:, :, 1, 1].diagonal().add_(1)  # x + conv(x)
        deep = [(weight, 255 * bias) for weight, bias in [*deep, (strength * weight, strength * bias)]]
        layers = [(to_space_to_depth_kernel(kernel, self.student.places)[0], None)]
        layers += [(weight.to(self.dtype), bias.to(self.dtype)) for weight, bias in deep]
        return tuple((weight.contiguous(memory_format=torch.channels_last), bias) for weight, bias in layers)

def reflect_pad_picture(picture: Tensor) -> Tensor:
    """As ``with_margin``, in float32, without a copy of all pixels: (H, W, 3) -> (1, 3, H', W')."""
    height, width, _ = picture.shape
    rows, columns = margin_indices(height), margin_indices(width)
    photo = torch.empty(1, len(rows), len(columns), 3, device=picture.device)
    here = slice(FILTER_RADIUS, FILTER_RADIUS + height)
    photo[0, here, FILTER_RADIUS : FILTER_RADIUS + width] = picture
    for beyond in slice(FILTER_RADIUS), slice(FILTER_RADIUS + width, None):
        photo[0, here, beyond] = photo[0, here, FILTER_RADIUS + columns[beyond]]
    for beyond in slice(FILTER_RADIUS), slice(FILTER_RADIUS + height, None):
        photo[0, beyond] = photo[0, FILTER_RADIUS + rows[beyond]]
    return photo.movedim(-1, 1)
