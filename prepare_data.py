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
    for part in ("train", "val"):
        (options.out / part).mkdir(parents=True, exist_ok=True)
    parts = split(planned, options.out, options.val_share, options.seed, problems)
    made, there = make_all(parts, options.out, options.longest, options.seed, problems)
    in_each = f"{made['train']} pairs made in {options.out / 'train'}, {made['val']} in {options.out / 'val'}"
    print(f"{in_each}, {there} existed already")
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
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="KIND", help="one of those above; KIND --help lists its options"
    )
    for kind in ("photos", "blurry", *PLANS):
        add = kinds.add_parser(kind).add_argument
        about = "of blurry photos, and of sharp ones" if kind == "pairs" else None
        add("folders", nargs=2 if kind == "pairs" else 1, type=Path, metavar="FOLDER", help=about)
        add("--out", type=Path, default=OUT, help=f"folder for train/ and val/ ({OUT})")
        if kind in ("photos", "pairs"):
            add("--val-share", type=share, default=str(VAL_SHARE), help=f"share of photos or sequences ({VAL_SHARE})")
            add("--seed", type=whole_number(0), default=str(SEED), help=f"of the split and the degradations ({SEED})")
        if kind in ("photos", "blurry"):
            about = f"cut larger photos into tiles of about this size ({TILE})"
            add("--tile", type=whole_number(SMALLEST), default=str(TILE), help=about)
        if kind == "photos":
            add("--copies", type=whole_number(1), default=str(COPIES), help=f"pairs from each photo ({COPIES})")
            about, longest = "first shrink photos with a longer side to this", LONGEST and str(LONGEST)
            add("--longest", type=whole_number(SMALLEST), default=longest, help=about)
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
        if len(os.fsencode(pair.name)) > LONGEST_NAME:
            problems.append(f"{pair.blurry or pair.sharp} has too long a name, or those of its folders are: rename them")
            continue
        twin = kept.setdefault(pair.name, pair)
        if twin is not pair:
            one, other = (p.blurry or p.sharp for p in (pair, twin))
            problems.append(f"{one} would be stored as {pair.name}, like {other}: rename one of them")
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
                problems.append(f"{pair.blurry or pair.sharp} would be stored as {pair.name}, like another photo: rename it")
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
        raise UserError(f"{pair.blurry} is {sizes[0]}, {pair.sharp} is {sizes[1]}: both must have the same size")
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
