"""Makes the pairs that train.py learns from, data/{train,val}/NNN/{blurry,sharp}.png, of photos or a public data set.

    python prepare_data.py photos FOLDER        sharp photos, each blurred in a way drawn from MIXTURE
    python prepare_data.py pairs BLURRY SHARP   two folders with matching names; a sub-folder is one sequence
    python prepare_data.py gopro FOLDER         GoPro: {train,test}/SEQUENCE/{blur,sharp}/NNNNNN.png
    python prepare_data.py reds FOLDER          REDS: {train,val}_{blur,sharp}/SEQUENCE/NNNNNNNN.png
    python prepare_data.py hide FOLDER          HIDE: train/*.png, test/*/*.png and GT/*.png
    python prepare_data.py realblur FOLDER      RealBlur-J: RealBlur_J_{train,test}_list.txt and what they name

Pairs that are there already stay as they are, so a second run goes on where the first was stopped. Tiles of one
photo and frames of one sequence are all in train/ or all in val/.
"""

import argparse

import contextlib

import dataclasses

import functools

import os

import shutil

import time

import zlib

from collections.abc import Iterable

from concurrent.futures import ThreadPoolExecutor

from itertools import groupby

from pathlib import Path

import numpy as np

from PIL import Image

from tqdm import tqdm

from checks import CliParser, check_folder

from degradations import Mixture, random_degradation, shrink, uniform

from files import atomic_write

from layouts import Pair, plan_gopro, plan_hide, plan_pairs, plan_photos, plan_realblur, plan_reds, shrunk

from patches import generator_of, to_pixels, to_tensor

from photos import read_photo

from utils import UserError, one_line, run_cli

OUT = "data"  # where train/ and val/ are

VAL_SHARE = 0.1  # of the photos or sequences, at least one unless it is 0; data sets with a test part keep theirs

SEED = 0  # of the split and the blur

SMALLEST = 128  # pixels; smaller photos are left out: PATCH_SIZE of train.py would not fit

# Only for sharp photos
MIXTURE = Mixture()  # the blurs and their strengths, see degradations.py

COPIES = 1  # pairs made of each photo, each with a blur of its own; every second one is shrunk, which makes it crisper

MARGIN = 16  # pixels around a tile that are blurred with it and cut off again, as its real surroundings

TILE = 1024  # pixels; larger photos are cut into tiles of about this, each with a blur of its own

LONGEST = None  # pixels; a photo with a longer side is shrunk to it first, which makes a soft photo sharp

SOURCE = "source.txt"  # beside each pair: what it was made of

def main() -> None:
    parser = CliParser(__doc__)
    plans = {"pairs": plan_pairs, "gopro": plan_gopro, "reds": plan_reds, "hide": plan_hide, "realblur": plan_realblur}
    parser.add_argument("kind", choices=["photos", *plans], help="what there is")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="where it is: one, for pairs two")
    parser.add_argument("--out", type=Path, default=OUT, help=f"where train/ and val/ are made ({OUT})")
    parser.add_argument(
        "--val-share",
        type=float,
        default=VAL_SHARE,
        help=f"of the photos or sequences, 0 to 1 ({VAL_SHARE})",
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the split and the blur ({SEED})")
    photos = parser.add_argument_group("only for photos")
    photos.add_argument("--blur", nargs="+", choices=MIXTURE.blurs, help="kinds of blur (those of MIXTURE)")
    photos.add_argument("--copies", type=int, help=f"pairs made of each photo ({COPIES})")
    photos.add_argument("--tile", type=int, help=f"cut larger photos into tiles of about this ({TILE})")
    photos.add_argument("--longest", type=int, default=LONGEST, help="shrink photos with a longer side to this first")
    options = parser.parse_args()
    check_options(options)

    problems: list[str] = []
    mixture, longest = MIXTURE, options.longest
    if options.kind == "photos":
        mixture = dataclasses.replace(mixture, blurs={kind: mixture.blurs[kind] for kind in options.convolve or mixture.blurs})
        copies, tile = options.copies or COPIES, options.tile or TILE
        planned = plan_photos(*options.folders, problems, options.out, copies, tile, SMALLEST, longest)
    else:
        planned = plans[options.kind](*options.folders, problems)
    planned = without_twins(planned, problems)
    for part in ("train", "val"):
        (options.out / part).mkdir(parents=True, exist_ok=True)
    parts = split(planned, options.out, options.val_share, options.seed, problems)
    made, there = make_all(parts, options.out, mixture, longest, options.seed, problems)
    report(options.out, made, there, problems)
    for part in made:
        if parts[part] and not any(is_visible(path) for path in (options.out / part).iterdir()):
            raise UserError(
                f"{options.out / part} is empty, since what was drawn for it cannot be used (see above): "
                "move some folders of the other part there by hand"
            )
    if problems:
        raise SystemExit(1)  # as sharpen.py ends: all that could be done is

def is_visible(path: Path) -> bool:
    return not path.name.startswith(".")

def check_options(options: argparse.Namespace) -> None:
    wanted = 2 if options.kind == "pairs" else 1
    if len(options.folders) != wanted:
        raise UserError(f"{options.kind} takes {wanted} folder{'s' * (wanted > 1)}, not {len(options.folders)}")
    if options.kind != "photos" and (options.convolve or options.copies or options.tile or options.longest):
        raise UserError(f"--blur, --copies, --tile and --longest are for sharp photos: {options.kind} stay as they are")
    if not 0 <= options.val_share <= 1:
        raise UserError(f"--val-share {options.val_share} must be from 0 to 1: 0.1 is one photo in ten")
    for name, least in {"seed": 0, "copies": 1, "tile": SMALLEST, "longest": SMALLEST}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} must be {least} or more")
    for part in ("train", "val"):
        check_folder(options.out / part, "--out")

# The split


def without_twins(planned: Iterable[Pair], problems: list[str]) -> list[Pair]:
    """Without pairs that would go into the folder of another source."""
    kept: dict[str, Pair] = {}
    for pair in planned:
        twin = kept.setdefault(pair.name, pair)
        if len(os.fsencode(pair.name)) > 200:  # bytes; most systems take 255, and ours are longer while they are written
            problems.append(f"{pair.blurry or pair.sharp} has a name that is too long, with its folders: shorten it")
            del kept[pair.name]
        elif twin is not pair:
            one, other = (p.blurry or p.sharp for p in (pair, twin))
            problems.append(f"{one} would become {pair.name}, which {other} is: rename one of them")
    return list(kept.values())

def split(planned: list[Pair], out: Path, share: float, seed: int, problems: list[str]) -> dict[str, list[Pair]]:
    """The pairs of "train" and of "val": where the data set says, where the group is already, or else by chance."""
    part_of = {pair.group: pair.part for pair in planned if pair.part == "train"}
    part_of |= {pair.group: pair.part for pair in planned if pair.part == "val"}
    for part in ("train", "val"):
        there = {path.name.partition(".")[0] for path in (out / part).iterdir() if is_visible(path)}
        part_of |= {pair.group: part for pair in planned if pair.part is None and pair.group in there}
    groups = {pair.group for pair in planned}
    open_ones = sorted(groups - part_of.keys(), key=lambda group: (zlib.crc32(f"{seed} {group}".encode()), group))
    wanted = min(max(1, round(share * len(groups))), len(groups) - 1) if 0 < share < 1 else share * len(groups)
    missing = wanted - sum(part == "val" for part in part_of.values())
    part_of |= {group: "val" if i < missing else "train" for i, group in enumerate(open_ones)}
    parts = {"train": [], "val": []}
    for pair in planned:
        if pair.part == "train" and part_of[pair.group] == "val":
            problems.append(f"{pair.blurry} is of {pair.group}, which is in the test part too: not in train/")
        else:
            parts[part_of[pair.group]].append(pair)
    for part, pairs in parts.items():
        unwanted = share == {"train": 1, "val": 0}[part]
        if not pairs and not unwanted and not any(is_visible(path) for path in (out / part).iterdir()):
            why = f" ({len(problems)} left out, such as: {problems[0]})" if problems else ""
            raise UserError(
                f"nothing is left for {out / part}: two photos or sequences are needed at least, and if all are in the "
                f"other part already, move some of its folders by hand{why}"
            )
    return parts

# Making them


def make_all(
    parts: dict[str, list[Pair]], out: Path, mixture: Mixture, longest: int | None, seed: int, problems: list[str]
) -> tuple[dict[str, int], int]:
    """Make the pairs that are not there yet; returns how many were made in each part, and how many were there."""
    made, there = {"train": 0, "val": 0}, 0
    for part, pairs in parts.items():
        remove_leftovers(out / part)
        todo = []
        for pair in pairs:
            files = [out / part / pair.name / name for name in ("blurry.png", "sharp.png")]
            if all(file.is_file() for file in files):
                there += 1
                if made_of_another(files[0].parent, pair):
                    there -= 1
                    problems.append(f"{pair.blurry or pair.sharp} would be {pair.name}, which is another photo: rename it")
            elif files[0].parent.exists():
                problems.append(f"{files[0].parent} is there but not whole: remove it and run again")
            else:
                todo.append(pair)
        by_source = [list(of_one) for _, of_one in groupby(todo, lambda pair: pair.sharp)]
        threads = os.cpu_count() or 1  # decoding, blurring and encoding run outside the interpreter lock
        make_some = functools.partial(make, folder=out / part, mixture=mixture, longest=longest, seed=seed)
        bar = tqdm(total=len(todo), desc=f"making {part}", unit="pair", disable=None)
        with ThreadPoolExecutor(threads) as pool, bar:
            for start in range(0, len(by_source), 2 * threads):  # in groups: Ctrl-C waits for one
                some = by_source[start : start + 2 * threads]
                for of_one, found in zip(some, pool.map(make_some, some), strict=True):
                    problems += found
                    made[part] += len(of_one) - len(found)
                    bar.update(len(of_one))
    return made, there

def make(pairs: list[Pair], folder: Path, mixture: Mixture, longest: int | None, seed: int) -> list[str]:
    """Make the pairs of one source in ``folder``; returns a sentence for each that cannot be."""
    problems = []
    try:
        sharp = read_photo(pairs[0].sharp)
        size = shrunk(sharp.shape[:2], longest)
        if size != sharp.shape[:2]:
            sharp = np.asarray(Image.fromarray(sharp).resize(size[::-1], Image.Resampling.LANCZOS))
    except UserError as error:
        return [f"{pair.name}: {error}" for pair in pairs]
    for pair in pairs:
        if pair.blurry is None:
            write_pair(folder / pair.name, pair, *blur_tile(sharp, pair, mixture, seed))
            continue
        try:
            blurry = read_photo(pair.blurry)
        except UserError as error:
            problems.append(str(error))
            continue
        if blurry.shape != sharp.shape:
            sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (blurry, sharp)]
            problems.append(f"{pair.blurry} is {sizes[0]}, {pair.sharp} is {sizes[1]}: both must show the same pixels")
        elif min(sharp.shape[:2]) < SMALLEST:
            problems.append(f"{pair.blurry} is {sharp.shape[1]}x{sharp.shape[0]}, smaller than {SMALLEST} pixels")
        else:
            write_pair(folder / pair.name, pair, blurry, sharp)
    return problems

def source_of(pair: Pair) -> str:
    """What tells photos of the same name apart, for a file beside the pair."""
    files = [file for file in (pair.blurry, pair.sharp) if file]
    return "".join(f"{file.name} {file.stat().st_size}\n" for file in files)

def made_of_another(folder: Path, pair: Pair) -> bool:
    try:
        return (folder / SOURCE).read_text(encoding="utf-8", errors="surrogateescape") != source_of(pair)
    except OSError:
        return False  # made by hand

def blur_tile(photo: np.ndarray, pair: Pair, mixture: Mixture, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(blurry, sharp) of a tile of ``photo``, (H, W, 3) uint8 each, blurred together with its surroundings."""
    top, left, bottom, right = pair.tile
    first_row, first_column = max(0, top - MARGIN), max(0, left - MARGIN)
    around = to_tensor(photo[first_row : bottom + MARGIN, first_column : right + MARGIN])
    generator = generator_of(seed, zlib.crc32(pair.name.encode()))
    if pair.crisper:
        sharp = around[:, top - first_row : bottom - first_row, left - first_column : right - first_column]
        height, width = sharp.shape[1:]
        factor = uniform((1, min(2, height / SMALLEST, width / SMALLEST)), generator)
        sharp = shrink(sharp, (round(height / factor), round(width / factor)))
        return to_pixels(random_degradation(sharp, generator, mixture)), to_pixels(sharp)
    blurry = random_degradation(around, generator, mixture)
    rows, columns = slice(top - first_row, bottom - first_row), slice(left - first_column, right - first_column)
    return to_pixels(blurry[:, rows, columns]), photo[top:bottom, left:right]

def write_pair(folder: Path, pair: Pair, blurry: np.ndarray, sharp: np.ndarray) -> None:
    """Write both pictures, whole or not at all; PNG files of the same pixels are copied as they are."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had this number
        partial.mkdir()
        for name, pixels, source in ("blurry.png", blurry, pair.blurry), ("sharp.png", sharp, pair.blurry and pair.sharp):
            if source and is_plain_png(source):
                shutil.copyfile(source, partial / name)
            else:
                Image.fromarray(pixels).save(partial / name, compress_level=3)
        (partial / SOURCE).write_text(source_of(pair), encoding="utf-8", errors="surrogateescape")
        if not folder.exists():  # another run may have been faster
            os.rename(partial, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}): free some space, then run again to go on") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)

def is_plain_png(path: Path) -> bool:
    with Image.open(path) as picture:
        return picture.format == "PNG" and picture.mode == "RGB" and picture.getexif().get(0x0112, 1) == 1

def remove_leftovers(folder: Path) -> None:
    """Remove what a run that was killed left half done more than an hour ago."""
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:  # seconds; a younger one may be another run's
                shutil.rmtree(path, ignore_errors=True)

def report(out: Path, made: dict[str, int], there: int, problems: list[str], shown: int = 20) -> None:
    in_each = f"{made['train']} pairs made in {out / 'train'}, {made['val']} in {out / 'val'}"
    print(f"{in_each}, {there} of that name were there already")
    if problems:
        print(f"{len(problems)} left out:", *map(one_line, problems[:shown]), sep="\n  ")
        if len(problems) > shown:
            file = out / "left_out.txt"
            atomic_write(
                file,
                lambda partial: partial.write_text("\n".join(map(one_line, problems)) + "\n", "utf-8", "backslashreplace"),
            )
            print(f"  ... and {len(problems) - shown} more; all are in {file}")

if __name__ == "__main__":
    run_cli(main)
