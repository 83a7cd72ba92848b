"""The two networks, and how they are saved and loaded.

Both map (N, 3, H, W) RGB in [0, 1] to the same shape, any H, W >= 1. First a blur estimator (blur/estimator.py) reads power
spectra, means over windows of 64x64 pixels: over all of a photo's, over its blurriest twelfth (the smallest share of high
frequencies) and, in the teacher, over those around each region. From them it predicts filters, which undo most of the blur.
Noise, measured too (blur/noise.py), limits how far chroma is smoothed. Convolutions add what filters cannot, mostly at a
quarter of the resolution, where a 3x3 convolution costs a sixteenth and covers four times the distance. Filters start as the
identity and last layers at zero: an untrained network returns its input.

Sizes, in pixels: windows of 64 for spectra; regions of 64, one filter of the teacher for each; cells of 16, within which the
filters are mixed; blocks of 4x4, whose pixels the student's convolutions see as 16 channels (space-to-depth).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks import (
    FILTER_RADIUS,
    ChangeGains,
    CondConv2d,
    FiLM,
    GainMap,
    GatedBlock,
    OutputLinear,
    ResidualBlock,
    conv2d_per_sample,
    dct_response,
    keep_flat_runs,
    luma,
    modulate,
    reflect_pad_to_blocks,
    smooth_chroma,
    space_to_depth_indices,
    to_space_to_depth_kernel,
)
from blur.estimator import EMBEDDING, KERNEL_RADIUS, RINGS, BlurEstimator
from blur.local import CELL, BlurMap, local_spectra, softness_map, upper_half
from blur.noise import NOISE_FEATURES, normalize_noise, photo_spectra
from images.files import read_torch_file, write_torch_file
from utils import UserError, zero_init

# Hidden channels of the teacher's residual blocks: the most active 424 of the 960 of an earlier teacher
DEEP_HIDDEN = 80, 72, 56, 40, 32, 32, 56, 56
# Arguments of every student's estimator; a teacher's file holds a trained one
STUDENT_ESTIMATOR = dict(blocks=2, kernel_radius=FILTER_RADIUS, exponential=True)


class TeacherCNN(nn.Module):
    """Deep residual network: accurate, too slow for video.

    The blur estimator predicts an inverse filter for each region and one for the blurriest windows; a softness map
    (blur/local.py) shows where that one fits. The photo, its chroma smoothed, is filtered with both, and the results are
    blended. A residual network adds what linear filters cannot recover and removes noise. Gains, one for each cell, say how
    much of all this change is kept.

    Args:
        width: channels at half resolution.
        deep_width: channels at a quarter, where nearly all of the arithmetic is.
        hidden: channels within each residual block at a quarter; a gated block follows each.
        fine_blocks: residual blocks at half resolution, after the two scales are merged.
    Shapes: (N, 3, H, W) in [0, 1] -> same, possibly a little outside [0, 1]. For a part of a photo, pass its blur: the
        cropped ``BlurMap`` of the whole photo or, for a patch with one blur, spectra (N, 9, 64, 33).
    Sources: pixel shuffle, arXiv:1609.05158; blocks, arXiv:1707.02921; global skip, arXiv:1511.04587.
    """

    def __init__(self, width: int = 32, deep_width: int = 96, hidden: Sequence[int] = DEEP_HIDDEN, fine_blocks: int = 2):
        super().__init__()
        self.arguments = dict(width=width, deep_width=deep_width, hidden=tuple(hidden), fine_blocks=fine_blocks)
        # Pixels: 12 for each pair of blocks at a quarter (three 3x3 convolutions), 4 for each block at half resolution, 8
        # for head, tail and the strided layers between them; and the filter and at most 7 for smooth chroma before all
        self.receptive_radius = 12 * len(hidden) + 4 * fine_blocks + 8 + KERNEL_RADIUS + 7 + ChangeGains.RADIUS
        self.estimator = BlurEstimator()
        # Students copy this one; the teacher does not use it. Only its filters were trained, not with the whole network
        self.student_estimator = BlurEstimator(**STUDENT_ESTIMATOR).requires_grad_(False)
        self.gate = nn.Parameter(torch.tensor([8.0, -4.8]))  # slope and offset: the blurriest windows' filter from 0.6 on
        self.chroma_gain = nn.Parameter(torch.tensor(0.0))  # how far chroma is moved at most, in units of its noise
        self.head = nn.Conv2d(4 * 10, width, 3, padding=1)
        self.down = nn.Conv2d(width, deep_width, 2, stride=2)
        pairs = [(ResidualBlock(deep_width, each), GatedBlock(deep_width)) for each in hidden]
        self.deep = nn.ModuleList(block for pair in pairs for block in pair)
        self.up = nn.Conv2d(deep_width, 4 * width, 1)
        self.fine = nn.ModuleList(ResidualBlock(width, width) for _ in range(fine_blocks))
        self.tail = zero_init(nn.Conv2d(width, 12, 3, padding=1))
        self.film_deep = FiLM([channels for each in hidden for channels in (each, deep_width)])
        self.film_fine = FiLM([width] * (1 + fine_blocks))  # the head and the fine blocks
        self.gains = ChangeGains(deep_width)
        self.film_gains = FiLM([ChangeGains.HIDDEN])

    def estimate_blur(self, photo: Tensor, peak: float = 1.0) -> BlurMap:
        """The blur of each region of whole photos, (N, C, H, W) in [0, ``peak``]."""
        kernels, embeddings = [], []
        blurriest_and_whole, noise = photo_spectra(photo, peak).split([4, NOISE_FEATURES], 1)
        blurriest_kernel, blurriest_embedding, _ = self.estimator(blurriest_and_whole)
        for spectra in local_spectra(photo, blurriest_and_whole[:, 2:], peak):  # (N, gw, 4, 64, 33) of a row of regions
            kernel, embedding, _ = self.estimator(spectra.flatten(0, 1))
            kernels.append(upper_half(kernel).unflatten(0, spectra.shape[:2]))
            embeddings.append(embedding.unflatten(0, spectra.shape[:2]))
        embeddings = torch.stack(embeddings, 1)
        embeddings = torch.cat([embeddings, blurriest_embedding[:, None, None].expand_as(embeddings)], -1)
        softness = softness_map(photo, blurriest_and_whole, peak)
        return BlurMap(torch.stack(kernels, 1), embeddings, upper_half(blurriest_kernel), softness, noise[..., 0, 0])

    def blur_of_patch(self, photo: Tensor, spectra: Tensor) -> BlurMap:
        """One region for all of a patch, from the spectra of a region and ``photo_spectra``, (N, 2 + 7, 64, 33).

        At the borders of the patch the softness map is that of reflected pixels.
        """
        region, blurriest, whole, noise = spectra.split([2, 2, 2, NOISE_FEATURES], 1)
        both = torch.cat([torch.cat([region, blurriest]), whole.repeat(2, 1, 1, 1)], 1)
        kernels, embeddings, _ = self.estimator(both)
        kernel, blurriest_kernel = upper_half(kernels).chunk(2)
        embeddings = torch.cat(embeddings.chunk(2), -1)[:, None, None]
        softness = softness_map(photo, spectra[:, 2:6])
        return BlurMap(kernel[:, None, None], embeddings, blurriest_kernel, softness, noise[..., 0, 0])

    def forward(self, photo: Tensor, blur: BlurMap | Tensor | None = None) -> Tensor:
        if blur is None:
            blur = self.estimate_blur(photo)
        elif isinstance(blur, Tensor):
            blur = self.blur_of_patch(photo, blur)
        x = self.first_layer_input(photo + smooth_chroma(photo, self.chroma_gain * blur.noise[:, :1].exp()), blur)
        shape = x.shape
        padded = F.pad(photo, (0, shape[-1] - photo.shape[-1], 0, shape[-2] - photo.shape[-2]), mode="replicate")
        change = x[:, 6:9] - padded
        half = self.head(F.pixel_unshuffle(x, 2))
        del x  # it would take as much memory as the rest of a tile
        fine_films = self.film_fine(blur, shape, 2)  # one after another: all maps together would fill the memory
        half = F.relu(modulate(half, next(fine_films)), inplace=True)
        quarter = self.down(half)
        for block, film in zip(self.deep, self.film_deep(blur, shape, 4), strict=True):
            quarter = block(quarter, film)
        half = half + F.pixel_shuffle(self.up(quarter), 2)
        for block, film in zip(self.fine, fine_films, strict=True):
            half = block(half, film)
        change = change + F.pixel_shuffle(self.tail(half), 2)
        x = padded + self.gains(quarter, padded, change, *self.film_gains(blur, shape, 4))
        return keep_flat_runs(photo, x[..., : photo.shape[-2], : photo.shape[-1]])

    def first_layer_input(self, photo: Tensor, blur: BlurMap) -> Tensor:
        """(N, 3, H, W) -> (N, 10, H', W'), multiples of 4: the photo; filtered by region; that blended with the photo
        as the blurriest windows' filter leaves it (channels 6 to 8, to which the output is added); the softness map."""
        regional, blurriest = blur.apply_filters(photo, exact=not self.training).chunk(2, 1)
        size = photo.shape[-2:]
        softness = blur.interpolate(blur.softness.to(regional), *size, 1, CELL).expand(-1, -1, *size)
        slope, offset = self.gate
        base = regional.lerp(blurriest, (slope * softness + offset).sigmoid())
        x = torch.cat([photo.to(base.dtype), regional, base, softness.tanh()], 1)
        rows, columns = -size[0] % 4, -size[1] % 4
        return F.pad(x, (0, columns, 0, rows), mode="replicate") if rows or columns else x


class StudentWeights(NamedTuple):
    """What ``StudentCNN`` predicts for a photo."""

    kernels: Tensor  # (N, 2, 17, 17), filters whose results are added to the photo
    routing: Tensor  # (N, experts), weights of the experts, the same for all convolutions
    chroma_limit: Tensor  # (N, 1), by how much chroma is moved at most, in units of [0, 1]
    film: Tensor  # (N, 64), scales and shifts in the GainMap
    expected_energies: Tensor  # (N, 2, 16), log energies of DCT coefficients in the whole photo and in its blurriest windows


class StudentCNN(nn.Module):
    """Small real-time network on luma: two predicted filters, mixed from place to place, then a few convolutions.

    For each of two blur estimates, of the whole photo and of its blurriest windows, the same layers correct the estimator's
    17x17 filter; from both follow the routing weights that mix the experts of each convolution. All this is computed once
    per photo. A ``GainMap`` sets, per cell of 16 pixels, how much of each filter's and of the convolutions' change is added
    to R, G and B alike. Convolutions see 4x4 pixels as 16 channels (space-to-depth). Noisy chroma is smoothed.

    Args:
        convs: 3x3 convolutions, all but the last with a skip, which ``FusedStudent`` folds into the weights.
        num_experts: experts per convolution.
        hidden: width of the layer that predicts the filters and the routing weights.
    Shapes: (N, 3, H, W) in [0, 1] -> same, possibly a little outside [0, 1]. For a part of a photo, pass the blur of the
        whole photo: what ``estimate_blur`` returns, (N, 637), or spectra whose last seven channels are its
        ``photo_spectra``, (N, 7 or 9, 64, 33).
    Sources: predicted filters, arXiv:1605.09673; CondConv, arXiv:1904.04971, section 3; folded skips as in RepVGG,
        arXiv:2101.03697, section 3.3.
    """

    def __init__(self, convs: int = 2, num_experts: int = 16, hidden: int = 128):
        super().__init__()
        self.arguments = dict(convs=convs, num_experts=num_experts, hidden=hidden)
        self.conv_radius = 4 * convs + 3  # pixels; 3: from the far side of a space-to-depth block
        self.receptive_radius = self.conv_radius + GainMap.RADIUS
        self.estimator = BlurEstimator(**STUDENT_ESTIMATOR)
        size = 2 * FILTER_RADIUS + 1
        inputs = EMBEDDING + 2 * RINGS + size**2 // 2 + 1 + NOISE_FEATURES
        # Normalized, so that about half of the units are active for every photo
        self.embed = nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden, elementwise_affine=False), nn.ReLU())
        self.router = OutputLinear(2 * hidden, num_experts)
        # For each filter: a factor of the estimator's, minus 1, and a correction that is added
        self.kernel_head = zero_init(OutputLinear(hidden, 1 + size**2))
        self.chroma_head = zero_init(OutputLinear(2 * hidden + NOISE_FEATURES, 1))
        self.gain_map = GainMap(2 * hidden)
        self.register_buffer("dct_response", dct_response(), persistent=False)
        self.register_buffer("space_to_depth_indices", space_to_depth_indices(), persistent=False)
        self.convs = nn.ModuleList(CondConv2d(nn.Conv2d(16, 16, 3, padding=1), num_experts) for _ in range(convs))
        zero_init(self.convs[-1].base)

    def forward(self, photo: Tensor, blur: Tensor | None = None) -> Tensor:
        if blur is None:
            blur = self.estimate_blur(photo)
        elif blur.dim() > 2:
            blur = self.embed_blur(blur)
        weights = self.predict_weights(blur)
        with torch.autocast(photo.device.type, enabled=False):  # a strong filter would amplify rounding
            blocks = F.pixel_unshuffle(reflect_pad_to_blocks(luma(photo)), 4)
            kernels = to_space_to_depth_kernel(weights.kernels.flatten(0, 1), self.space_to_depth_indices)
            changes = conv2d_per_sample(blocks, kernels.unflatten(0, (-1, 2)).flatten(1, 2)).chunk(2, 1)
            margin = FILTER_RADIUS // 4
            blocks = blocks[..., margin:-margin, margin:-margin]
            gains = self.gain_map(blocks, weights.film, weights.expected_energies).split(1, 1)
            change = changes[0] * gains[0] + changes[1] * gains[1]
        x = blocks + change
        for conv in self.convs[:-1]:
            x = F.relu(x + conv(x, weights.routing))
        change = change + self.convs[-1](x, weights.routing) * gains[2]
        change = F.pixel_shuffle(change, 4)[..., : photo.shape[-2], : photo.shape[-1]]
        return keep_flat_runs(photo, photo + change + smooth_chroma(photo, weights.chroma_limit))

    def estimate_blur(self, photo: Tensor, peak: float = 1.0) -> Tensor:
        """``embed_blur`` of whole photos, (N, C, H, W) in [0, ``peak``]: (N, 637)."""
        return self.embed_blur(photo_spectra(photo, peak))

    def embed_blur(self, spectra: Tensor) -> Tensor:
        """All that the student knows of the blur: (N, 7 or 9, 64, 33), whose last seven are ``photo_spectra``, -> (N, 637).

        For the whole photo and then for its blurriest windows: the estimator's embedding (64), the radial profile of the
        spectrum (92), half and the center of the estimator's filter, which is symmetric (145), and log energies of DCT
        coefficients (16). Last the noise (3).
        """
        blurriest, whole, noise = spectra[:, -4 - NOISE_FEATURES :].split([2, 2, NOISE_FEATURES], 1)
        both = torch.cat([whole, blurriest])
        kernels, embeddings, profiles = self.estimator(torch.cat([both, whole.repeat(2, 1, 1, 1)], 1))
        with torch.autocast(spectra.device.type, enabled=False):  # GainMap's gate amplifies rounding
            energies = (torch.einsum("nyx,kyx->nk", both[:, 0].exp(), self.dct_response) + 1e-6).log()
        kernels, profiles = kernels.flatten(1)[:, : kernels[0].numel() // 2 + 1], profiles[:, : 2 * RINGS]
        embedded = torch.cat([embeddings, profiles, kernels, energies], 1)
        return torch.cat([*embedded.chunk(2), noise[..., 0, 0].to(embedded)], 1)

    def predict_weights(self, embedded: Tensor) -> StudentWeights:
        """From what ``embed_blur`` returned, (N, 637), once per photo."""
        size = 2 * FILTER_RADIUS + 1
        with torch.autocast(embedded.device.type, enabled=False):
            sizes = [EMBEDDING + 2 * RINGS, size**2 // 2 + 1, 16]
            log_noise = embedded[:, -NOISE_FEATURES:]
            embeddings, estimated, energies = embedded[:, :-NOISE_FEATURES].unflatten(1, (2, -1)).split(sizes, 2)
            noise = normalize_noise(log_noise)
            # Strong filters have large values
            hidden = self.embed(torch.cat([embeddings, estimated.asinh(), noise[:, None].expand(-1, 2, -1)], 2))
            scale, correction = self.kernel_head(hidden).split([1, size**2], 2)
            hidden = hidden.flatten(1)
            change = torch.cat([estimated, estimated[..., :-1].flip(2)], 2).view(-1, 2, size, size)
            change[..., FILTER_RADIUS, FILTER_RADIUS] -= 1  # the filter's result is added to the photo
            kernels = correction.reshape(change.shape) + (1 + scale[..., None]) * change
            # A sum of 0, so that flat areas keep their brightness
            kernels = kernels - kernels.mean((2, 3), keepdim=True)
            limit = self.chroma_head(torch.cat([hidden, noise], 1)) * log_noise[:, :1].exp()
            if not self.training:
                limit = limit * (limit > 0.5 / 255)  # less than half a gray level is not worth the time
            return StudentWeights(kernels, self.router(hidden).tanh(), limit, self.gain_map.film(hidden), energies)


def copy_estimator(teacher: nn.Module, student: nn.Module) -> bool:
    """Copy ``teacher``'s blur estimator for students to ``student`` and freeze it; returns whether both have one.

    A student that is a small ``TeacherCNN`` gets the teacher's own. Raises ``UserError`` if they differ in size.
    """
    source = getattr(teacher, "estimator" if isinstance(student, TeacherCNN) else "student_estimator", None)
    target = getattr(student, "estimator", None)
    if not (isinstance(source, BlurEstimator) and isinstance(target, BlurEstimator)):
        return False
    if source.arguments != target.arguments:
        raise UserError("the blur estimators of teacher and student differ in size: create both with the same arguments")
    target.load_state_dict(source.state_dict())
    target.requires_grad_(False)
    return True


# Files


def save_model(path: Path | str, model: nn.Module, **metadata) -> None:
    """Write class name, constructor arguments, weights and metadata of ``model`` to one file, whole or not at all.

    A network of your own can be loaded again if its class is in this file and its constructor stores its arguments in
    ``self.arguments``, as above. Arguments and metadata must be plain data that JSON can hold (else ``TypeError``), so that
    loading executes no code.
    """
    content = {
        "class": type(model).__name__,
        "arguments": json.loads(json.dumps(getattr(model, "arguments", {}))),
        "weights": {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()},
        "metadata": json.loads(json.dumps(metadata)),
    }
    write_torch_file(path, content)


def load_model(path: Path | str, model: nn.Module | None = None) -> nn.Module:
    """Load what ``save_model`` wrote into a new network, or into ``model``; in eval mode, with its ``.metadata``.

    Raises ``UserError`` if the file is missing, damaged, not from ``save_model``, of a class that is not defined here, or if
    its weights do not fit that class or are not finite. No code in the file is ever executed.
    """
    content = read_torch_file(path)
    keys = {"class": str, "arguments": dict, "weights": dict, "metadata": dict}
    if not isinstance(content, dict) or any(not isinstance(content.get(k), t) for k, t in keys.items()):
        raise UserError(f"{path} was not written by save_model: load it with its own code and save it with save_model")
    classes = {name: c for name, c in globals().items() if isinstance(c, type) and issubclass(c, nn.Module)}
    if model is None and content["class"] not in classes:
        raise UserError(f"{path} contains a {content['class']}, which models.py does not define: add its class there")
    try:
        model = classes[content["class"]](**content["arguments"]) if model is None else model
        model.load_state_dict(content["weights"])
    except Exception as error:  # a constructor may raise anything on wrong arguments
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} does not fit {content['class']} as models.py defines it now ({reason}): train it again, "
            "or use the models.py it was trained with"
        ) from None
    if not all(torch.isfinite(value).all() for value in model.state_dict().values() if value.is_floating_point()):
        raise UserError(f"{path} contains weights that are not finite, its training failed: train it again")
    model.metadata = content["metadata"]
    return model.eval()
