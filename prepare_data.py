"""Makes the data that train.py trains on, data/{train,val}/NNN/{blurry,sharp}.png, from photos or a public data set.

    python prepare_data.py photos FOLDER        sharp photos, each degraded in a way drawn from MIXTURE
    python prepare_data.py blurry FOLDER        blurry photos that have no sharp version, for DISTILL_WEIGHT = 1 alone
    python prepare_data.py pairs BLURRY SHARP   two folders with matching file names; a sub-folder is one sequence
    python prepare_data.py gopro FOLDER         GoPro: {train,test}/SEQUENCE/{blur,sharp}/NNNNNN.png
    python prepare_data.py reds FOLDER          REDS: {train,val}_{blur,sharp}/SEQUENCE/NNNNNNNN.png
    python prepare_data.py hide FOLDER          HIDE: train/*.png, test/*/*.png and GT/*.png
    python prepare_data.py realblur FOLDER      RealBlur-J: RealBlur_J_{train,test}_list.txt and the files they list

Existing pairs are kept, so that a second run continues where the first was stopped. Tiles of one photo and frames of
one sequence are all in train/ or all in val/.
"""

import argparse
import contextlib
import dataclasses
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from blur.degradations import Mixture, random_degradation, resize
from blur.variety import vary_photo
from cli import CliParser, check_writable, run_cli, whole_number
from images.files import atomic
from images.layouts import Pair, plan_gopro, plan_hide, plan_pairs, plan_photos, plan_realblur, plan_reds, shrunk
from images.photos import read_photo
from utils import UserError, make_generator, one_line, to_pixels, to_tensor, uniform

OUT = "data"  # contains train/ and val/
VAL_SHARE = 0.1  # share of photos or sequences, at least one unless 0; data sets with a test set keep theirs
SEED = 0  # of the split and the degradations
SMALLEST = 128  # pixels; smaller photos are skipped: PATCH_SIZE in train.py would not fit

# For sharp photos only
MIXTURE = Mixture()  # kinds and strengths of blur, see blur/degradations.py
COPIES = 1  # pairs from each photo, each degraded differently; of four the second is shrunk (crisper), the last enlarged
MARGIN = 16  # pixels around a tile that are blurred with it and cut off again
TILE = 1024  # pixels; larger photos are cut into tiles of about this size, each degraded differently
LONGEST = None  # pixels; a photo with a longer side is first shrunk to it, which makes soft photos sharp
LONGEST_NAME = 255  # bytes of a pair's folder: most file systems allow no more
SOURCE = "source.txt"  # beside each pair: what it was made from
PLANS = {"pairs": plan_pairs, "gopro": plan_gopro, "reds": plan_reds, "hide": plan_hide, "realblur": plan_realblur}


def main() -> None:
    options = parse_options()
    problems: list[str] = []
    for part in ("train", "val"):
        check_writable(options.out / part, "--out")
    if options.kind in PLANS:
        planned = PLANS[options.kind](*options.folders, problems)
    else:
        sizes = options.tile, SMALLEST, options.longest
        planned = plan_photos(*options.folders, problems, options.out, options.copies, *sizes)
    if options.kind == "blurry":  # all to train on: only pairs can be judged
        planned, options.val_share = (dataclasses.replace(pair, part="train", unpaired=True) for pair in planned), 0
    planned = without_twins(planned, problems)
    parts = split(planned, options.out, options.val_share, options.seed, problems)
    (made, there), (made_val, there_val) = (
        make_all(pairs, options.out / part, options.longest, options.seed, problems) for part, pairs in parts.items()
    )
    in_each = f"{made} pairs made in {options.out / 'train'}, {made_val} in {options.out / 'val'}"
    print(f"{in_each}, {there + there_val} existed already")
    if problems:
        print(f"{len(problems)} skipped:", *map(one_line, problems), sep="\n  ")
        raise SystemExit(1)  # like sharpen.py: everything possible was done


def parse_options() -> argparse.Namespace:
    """Each kind of data has its own options; constants are checked like them, since defaults that are text are parsed."""
    for name, value, low in ("SMALLEST", SMALLEST, 1), ("MARGIN", MARGIN, 0):
        if type(value) is not int or value < low:
            raise UserError(f"{name} = {value!r} is not a whole number from {low}: set it to one")
    if not isinstance(OUT, (str, Path)) or not str(OUT):
        raise UserError(f"OUT = {OUT!r} is not a path: set it to one in quotes")
    parser = CliParser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", help="KIND --help lists its options")
    for kind in ("photos", "blurry", *PLANS):
        add = kinds.add_parser(kind).add_argument
        about = "of blurry photos, and of sharp ones" if kind == "pairs" else None
        add("folders", nargs=2 if kind == "pairs" else 1, type=Path, metavar="FOLDER", help=about)
        add("--out", type=Path, default=OUT, help=f"folder for train/ and val/ ({OUT})")
        if kind in ("photos", "pairs"):
            add("--val-share", type=share, default=str(VAL_SHARE), help=f"share of photos or sequences ({VAL_SHARE})")
            add("--seed", type=whole_number(0), default=str(SEED), help=f"of the split and the degradations ({SEED})")
        if kind in ("photos", "blurry"):
            add("--tile", type=whole_number(SMALLEST), default=str(TILE), help=f"size of tiles of larger photos ({TILE})")
        if kind == "photos":
            add("--copies", type=whole_number(1), default=str(COPIES), help=f"pairs from each photo ({COPIES})")
            longest = LONGEST and str(LONGEST)
            add("--longest", type=whole_number(SMALLEST), default=longest, help="first shrink longer photos to this")
    parser.set_defaults(copies=1, longest=None, val_share=VAL_SHARE, seed=SEED)
    options = parser.parse_args()
    if str(options.out).startswith("~"):
        raise UserError(f"--out {options.out} starts with ~, which only a shell replaces: write the whole path")
    return options


def share(text: str) -> float:
    """For ``add_argument(type=...)``: a number from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} must be a number from 0 to 1: 0.1 is one photo in ten")


# The split


def without_twins(planned: Iterable[Pair], problems: list[str]) -> list[Pair]:
    """Without pairs that would go to the same folder as another source, or to one of too long a name."""
    kept: dict[str, Pair] = {}
    for pair in planned:
        source = pair.blurry or pair.sharp
        if len(os.fsencode(pair.name)) > LONGEST_NAME:
            problems.append(f"{source} has too long a name, or those of its folders are: rename them")
        elif (twin := kept.setdefault(pair.name, pair)) is not pair:
            other = twin.blurry or twin.sharp
            problems.append(f"{source} would be stored as {pair.name}, like {other}: rename one of them")
    return list(kept.values())


def split(planned: list[Pair], out: Path, share: float, seed: int, problems: list[str]) -> dict[str, list[Pair]]:
    """The pairs of "train" and of "val": as the data set says, where the group already is, or else at random."""
    there = {part: {path.name.partition(".")[0] for path in (out / part).glob("[!.]*")} for part in ("train", "val")}
    part_of = {pair.group: pair.part for pair in planned if pair.part}  # "val" comes last: it wins
    for part, groups in there.items():
        part_of |= {pair.group: part for pair in planned if pair.part is None and pair.group in groups}
    groups = {pair.group for pair in planned}
    open_ones = sorted(groups - part_of.keys(), key=lambda group: (zlib.crc32(f"{seed} {group}".encode()), group))
    wanted = min(max(1, round(share * len(groups))), len(groups) - 1) if 0 < share < 1 else share * len(groups)
    missing = wanted - list(part_of.values()).count("val")
    part_of |= {group: "val" if i < missing else "train" for i, group in enumerate(open_ones)}
    parts = {"train": [], "val": []}
    for pair in planned:
        if pair.part == "train" and (part_of[pair.group] == "val" or pair.group in there["val"]):
            problems.append(f"{pair.blurry or pair.sharp} is left out: its group {pair.group} is in val/ already")
        else:
            parts[part_of[pair.group]].append(pair)
    for part, unwanted in ("train", share == 1), ("val", share == 0):
        if not (parts[part] or there[part] or unwanted):
            why = f" ({len(problems)} skipped, such as: {problems[0]})" if problems else ""
            raise UserError(
                f"nothing is left for {out / part}: at least two photos or sequences are needed; if all are in the other "
                f"part already, move some of its folders by hand{why}"
            )
    return parts


# Making pairs


def make_all(pairs: list[Pair], folder: Path, longest: int | None, seed: int, problems: list[str]) -> tuple[int, int]:
    """Make the pairs that are missing in ``folder``; returns how many were made, and how many existed."""
    todo, made, there = [], 0, 0
    for pair in pairs:
        target, names = folder / pair.name, ("blurry.png",) if pair.unpaired else ("blurry.png", "sharp.png")
        if not target.exists():
            todo.append(pair)
        elif not all((target / name).is_file() for name in names):
            problems.append(f"{target} is incomplete: remove it and run again")
        elif (target / SOURCE).is_file() and (target / SOURCE).read_bytes() != source_of(pair):  # none: made by hand
            problems.append(f"{pair.blurry or pair.sharp} would be stored as {pair.name}, like another photo: rename it")
        else:
            there += 1
    by_source = [list(of_one) for _, of_one in groupby(todo, lambda pair: (pair.sharp, pair.blurry))]
    bar = tqdm(total=len(todo), desc=f"making {folder.name}", unit="pair", disable=None)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:  # all the work runs outside the interpreter lock
        results = pool.map(lambda of_one: make(of_one, folder, longest, seed), by_source)
        for of_one, failed in zip(by_source, results, strict=True):
            problems += failed
            made += len(of_one) - len(failed)
            bar.update(len(of_one))
    return made, there


def make(pairs: list[Pair], folder: Path, longest: int | None, seed: int) -> list[str]:
    """Make the pairs of one source in ``folder``; returns a sentence for each if it cannot be read."""
    try:
        photo, blurry = read_source(pairs[0])
    except UserError as error:
        return [f"{pair.name}: {error}" for pair in pairs]
    size = shrunk(photo.shape[:2], longest)
    if size != photo.shape[:2]:
        photo = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.LANCZOS))
    for pair in pairs:
        images = make_tile(photo, pair, seed) if blurry is None else (blurry, photo)
        with atomic(folder / pair.name) as partial:  # all files or none
            partial.mkdir()
            for name, pixels in zip(("blurry.png", "sharp.png"), images, strict=False):
                Image.fromarray(pixels).save(partial / name, compress_level=3)
            (partial / SOURCE).write_bytes(source_of(pair))
    return []


def read_source(pair: Pair) -> tuple[np.ndarray, np.ndarray | None]:
    """What ``pair`` calls sharp, and blurry unless that is to be made of it, (H, W, 3) uint8 each."""
    sharp = read_photo(pair.sharp)
    if pair.blurry is None:
        return sharp, None
    blurry = read_photo(pair.blurry)
    if blurry.shape != sharp.shape:
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (blurry, sharp)]
        raise UserError(f"{pair.blurry} is {sizes[0]}, {pair.sharp} is {sizes[1]}: both must have the same size")
    if min(sharp.shape[:2]) < SMALLEST:
        raise UserError(f"{pair.blurry} is {sharp.shape[1]}x{sharp.shape[0]}, smaller than {SMALLEST} pixels")
    return sharp, blurry


def source_of(pair: Pair) -> bytes:
    """Distinguishes photos of the same name, for a file beside the pair."""
    return b"".join(os.fsencode(f"{file.name} {file.stat().st_size}\n") for file in (pair.blurry, pair.sharp) if file)


def make_tile(photo: np.ndarray, pair: Pair, seed: int) -> tuple[np.ndarray, ...]:
    """A tile of ``photo``, blurred together with its surroundings, and sharp, or as it is if unpaired: (H, W, 3) uint8."""
    top, left, bottom, right = pair.tile
    if pair.unpaired:
        return (photo[top:bottom, left:right],)
    first_row, first_column = max(0, top - MARGIN), max(0, left - MARGIN)
    around = to_tensor(photo[first_row : bottom + MARGIN, first_column : right + MARGIN])
    tile = ..., slice(top - first_row, bottom - first_row), slice(left - first_column, right - first_column)
    generator = make_generator(seed, zlib.crc32(pair.name.encode()))
    if pair.copy % 2 == 0:
        return tuple(to_pixels(image[tile]) for image in random_degradation(around, generator, MIXTURE))
    sharp = around[tile]
    height, width = sharp.shape[1:]
    scale = uniform((max(0.5, SMALLEST / height, SMALLEST / width), 1) if pair.copy % 4 == 1 else (1, 1.6), generator)
    sharp = vary_photo(resize(sharp, (round(height * scale), round(width * scale))), generator)
    return tuple(map(to_pixels, random_degradation(sharp, generator, MIXTURE)))


if __name__ == "__main__":
    run_cli(main)
