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
import dataclasses
import functools
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from blur.degradations import Mixture, random_degradation, shrink
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
COPIES = 1  # pairs from each photo, each degraded differently; every second one is shrunk, which makes it crisper
MARGIN = 16  # pixels around a tile that are blurred with it and cut off again
TILE = 1024  # pixels; larger photos are cut into tiles of about this size, each degraded differently
LONGEST = None  # pixels; a photo with a longer side is first shrunk to it, which makes soft photos sharp
LONGEST_NAME = 255  # bytes of a pair's folder: most file systems allow no more
SOURCE = "source.txt"  # beside each pair: what it was made from


def main() -> None:
    check_constants()
    parser = CliParser(__doc__)
    plans = {"pairs": plan_pairs, "gopro": plan_gopro, "reds": plan_reds, "hide": plan_hide, "realblur": plan_realblur}
    parser.add_argument("kind", choices=["photos", "blurry", *plans], help="kind of data")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="its folder; two for pairs")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for train/ and val/ ({OUT})")
    parser.add_argument("--val-share", type=float, help=f"share of photos or sequences ({VAL_SHARE})")
    parser.add_argument("--seed", type=whole_number(0), default=SEED, help=f"of the split and the degradations ({SEED})")
    photos, size = parser.add_argument_group("only for photos; --tile for blurry, too"), whole_number(SMALLEST)
    photos.add_argument("--copies", type=whole_number(1), help=f"pairs from each photo ({COPIES})")
    photos.add_argument("--tile", type=size, help=f"cut larger photos into tiles of about this size ({TILE})")
    photos.add_argument("--longest", type=size, help="first shrink photos with a longer side to this")
    options = parser.parse_args()
    check_options(options)

    problems: list[str] = []
    sharp = options.kind == "photos"
    copies, longest = (options.copies or COPIES, options.longest or LONGEST) if sharp else (1, None)
    if options.kind in plans:
        planned = plans[options.kind](*options.folders, problems)
    else:
        tile = options.tile or TILE
        planned = plan_photos(*options.folders, problems, options.out, copies, tile, SMALLEST, longest)
    if options.kind == "blurry":  # all to train on: only pairs can be judged
        planned, options.val_share = (dataclasses.replace(pair, part="train", unpaired=True) for pair in planned), 0
    planned = without_twins(planned, problems)
    for part in ("train", "val"):
        (options.out / part).mkdir(parents=True, exist_ok=True)
    parts = split(planned, options.out, options.val_share, options.seed, problems)
    made, there = make_all(parts, options.out, longest, options.seed, problems)
    in_each = f"{made['train']} pairs made in {options.out / 'train'}, {made['val']} in {options.out / 'val'}"
    print(f"{in_each}, {there} existed already")
    if problems:
        print(f"{len(problems)} skipped:", *map(one_line, problems), sep="\n  ")
        raise SystemExit(1)  # like sharpen.py: everything possible was done


def check_constants() -> None:
    """Raise ``UserError`` if a constant is not in the range of its option."""
    whole = {"SEED": (SEED, 0), "SMALLEST": (SMALLEST, 1), "COPIES": (COPIES, 1), "MARGIN": (MARGIN, 0)}
    for name, (value, low) in (whole | {"TILE": (TILE, SMALLEST), "LONGEST": (LONGEST or SMALLEST, SMALLEST)}).items():
        if type(value) is not int or not low <= value <= 2**31:
            raise UserError(f"{name} = {value!r} is not a whole number from {low} to {2**31}: set it to one")
    if type(VAL_SHARE) not in (int, float) or not 0 <= VAL_SHARE <= 1:
        raise UserError(f"VAL_SHARE = {VAL_SHARE!r} is not a number from 0 to 1: 0.1 is one photo in ten")
    if not isinstance(OUT, (str, Path)) or not str(OUT):
        raise UserError(f"OUT = {OUT!r} is not a path: set it to one in quotes")


def check_options(options: argparse.Namespace) -> None:
    wanted = 2 if options.kind == "pairs" else 1
    if len(options.folders) != wanted:
        raise UserError(f"{options.kind} takes {wanted} folder{'s' * (wanted > 1)}, not {len(options.folders)}")
    if options.kind != "photos" and (options.copies or options.longest or (options.tile and options.kind != "blurry")):
        raise UserError(f"--copies, --tile and --longest are for sharp photos: {options.kind} are used as they are")
    if options.kind not in ("photos", "pairs") and options.val_share is not None:
        why = "they are all to train on" if options.kind == "blurry" else f"{options.kind} has a test set"
        raise UserError(f"--val-share is for photos and pairs, not for {options.kind}: {why}")
    options.val_share = VAL_SHARE if options.val_share is None else options.val_share
    if not 0 <= options.val_share <= 1:
        raise UserError(f"--val-share {options.val_share} must be from 0 to 1: 0.1 is one photo in ten")
    if str(options.out).startswith("~"):
        raise UserError(f"--out {options.out} starts with ~, which only a shell replaces: write the whole path")
    for part in ("train", "val"):
        check_writable(options.out / part, "--out")


# The split


def without_twins(planned: Iterable[Pair], problems: list[str]) -> list[Pair]:
    """Without pairs that would go to the same folder as another source, or to one of too long a name."""
    kept: dict[str, Pair] = {}
    for pair in planned:
        if len(os.fsencode(pair.name)) > LONGEST_NAME:
            problems.append(f"{pair.blurry or pair.sharp} has too long a name, or those of its folders are: rename them")
            continue
        twin = kept.setdefault(pair.name, pair)
        if twin is not pair:
            one, other = (p.blurry or p.sharp for p in (pair, twin))
            problems.append(f"{one} would become {pair.name}, which {other} is: rename one of them")
    return list(kept.values())


def split(planned: list[Pair], out: Path, share: float, seed: int, problems: list[str]) -> dict[str, list[Pair]]:
    """The pairs of "train" and of "val": as the data set says, where the group already is, or else at random."""
    there = {part: [path.name for path in (out / part).iterdir() if path.name[0] != "."] for part in ("train", "val")}
    part_of = {pair.group: pair.part for pair in planned if pair.part}  # "val" comes last: it wins
    groups_there = {part: {name.partition(".")[0] for name in names} for part, names in there.items()}
    for part, groups in groups_there.items():
        part_of |= {pair.group: part for pair in planned if pair.part is None and pair.group in groups}
    groups = {pair.group for pair in planned}
    open_ones = sorted(groups - part_of.keys(), key=lambda group: (zlib.crc32(f"{seed} {group}".encode()), group))
    wanted = min(max(1, round(share * len(groups))), len(groups) - 1) if 0 < share < 1 else share * len(groups)
    missing = wanted - sum(part == "val" for part in part_of.values())
    part_of |= {group: "val" if i < missing else "train" for i, group in enumerate(open_ones)}
    parts = {"train": [], "val": []}
    for pair in planned:
        if pair.part == "train" and (part_of[pair.group] == "val" or pair.group in groups_there["val"]):
            problems.append(f"{pair.blurry or pair.sharp} belongs to {pair.group}, which is in val/ too: not in train/")
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


def make_all(
    parts: dict[str, list[Pair]], out: Path, longest: int | None, seed: int, problems: list[str]
) -> tuple[dict[str, int], int]:
    """Make the missing pairs; returns how many were made in each part, and how many existed."""
    made, there = {"train": 0, "val": 0}, 0
    for part, pairs in parts.items():
        todo = []
        for pair in pairs:
            folder, names = out / part / pair.name, ("blurry.png",) if pair.unpaired else ("blurry.png", "sharp.png")
            if not folder.exists():
                todo.append(pair)
            elif not all((folder / name).is_file() for name in names):
                problems.append(f"{folder} is incomplete: remove it and run again")
            elif (folder / SOURCE).is_file() and (folder / SOURCE).read_bytes() != source_of(pair):  # none: made by hand
                problems.append(f"{pair.blurry or pair.sharp} would become {pair.name}, which is another photo: rename it")
            else:
                there += 1
        by_source = [list(of_one) for _, of_one in groupby(todo, lambda pair: pair.sharp)]
        make_some = functools.partial(make, folder=out / part, longest=longest, seed=seed)
        bar = tqdm(total=len(todo), desc=f"making {part}", unit="pair", disable=None)
        with ThreadPoolExecutor(os.cpu_count()) as pool, bar:  # all the work runs outside the interpreter lock
            for of_one, found in zip(by_source, pool.map(make_some, by_source), strict=True):
                problems += found
                made[part] += len(of_one) - len(found)
                bar.update(len(of_one))
    return made, there


def make(pairs: list[Pair], folder: Path, longest: int | None, seed: int) -> list[str]:
    """Make the pairs of one source in ``folder``; returns a sentence for each that cannot be made."""
    try:
        photo = read_photo(pairs[0].sharp)
    except UserError as error:
        return [f"{pair.name}: {error}" for pair in pairs]
    size = shrunk(photo.shape[:2], longest)
    if size != photo.shape[:2]:
        photo = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.LANCZOS))
    problems = []
    for pair in pairs:
        try:
            images = images_of(pair, photo, seed)
        except UserError as error:
            problems.append(str(error))
            continue
        with atomic(folder / pair.name) as partial:  # all files or none
            partial.mkdir()
            for name, pixels in zip(("blurry.png", "sharp.png"), images, strict=False):
                Image.fromarray(pixels).save(partial / name, compress_level=3)
            (partial / SOURCE).write_bytes(source_of(pair))
    return problems


def images_of(pair: Pair, photo: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
    """Blurry and sharp of ``pair``, (H, W, 3) uint8 each, or blurry alone; ``photo`` is what it calls sharp."""
    if pair.unpaired:
        top, left, bottom, right = pair.tile
        return (photo[top:bottom, left:right],)
    if pair.blurry is None:
        return blur_tile(photo, pair, seed)
    blurry = read_photo(pair.blurry)
    if blurry.shape != photo.shape:
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (blurry, photo)]
        raise UserError(f"{pair.blurry} is {sizes[0]}, {pair.sharp} is {sizes[1]}: both must show the same pixels")
    if min(photo.shape[:2]) < SMALLEST:
        raise UserError(f"{pair.blurry} is {photo.shape[1]}x{photo.shape[0]}, smaller than {SMALLEST} pixels")
    return blurry, photo


def source_of(pair: Pair) -> bytes:
    """Distinguishes photos of the same name, for a file beside the pair."""
    return b"".join(os.fsencode(f"{file.name} {file.stat().st_size}\n") for file in (pair.blurry, pair.sharp) if file)


def blur_tile(photo: np.ndarray, pair: Pair, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(blurry, sharp) of a tile of ``photo``, (H, W, 3) uint8 each, blurred together with its surroundings."""
    top, left, bottom, right = pair.tile
    first_row, first_column = max(0, top - MARGIN), max(0, left - MARGIN)
    around = to_tensor(photo[first_row : bottom + MARGIN, first_column : right + MARGIN])
    tile = ..., slice(top - first_row, bottom - first_row), slice(left - first_column, right - first_column)
    generator = make_generator(seed, zlib.crc32(pair.name.encode()))
    if not pair.crisper:
        return tuple(to_pixels(image[tile]) for image in random_degradation(around, generator, MIXTURE))
    sharp = around[tile]
    height, width = sharp.shape[1:]
    factor = uniform((1, min(2, height / SMALLEST, width / SMALLEST)), generator)
    sharp = vary_photo(shrink(sharp, (round(height / factor), round(width / factor))), generator)
    return tuple(map(to_pixels, random_degradation(sharp, generator, MIXTURE)))


if __name__ == "__main__":
    run_cli(main)
