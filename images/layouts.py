"""The pairs in a folder of photos or in a public data set, as prepare_data.py makes them.

``plan_photos`` and ``plan_pairs`` append a sentence to ``problems`` for whatever cannot be used; those for public data
sets raise ``UserError``.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

from tqdm import tqdm

from images.photos import FORMATS, SYSTEM_FOLDERS, find_photos, find_single_photos, raise_problems, upright_size
from utils import UserError


@dataclass(frozen=True)
class Pair:
    """A pair to make: the name of its folder, and its sources."""

    name: str  # starts with the group
    group: str  # photo or sequence, never on both sides of the split
    sharp: Path
    blurry: Path | None = None  # None: blur the sharp photo
    part: str | None = None  # "train" or "val", if the data set says so
    tile: tuple[int, int, int, int] | None = None  # of the sharp photo after shrinking: top, left, bottom, right
    copy: int = 0  # odd ones are resized and varied before they are blurred
    unpaired: bool = False  # ``sharp`` is a photo that is blurry as it is: there is no sharp one


def plan_photos(
    folder: Path, problems: list[str], out: Path, copies: int, tile: int, smallest: int, longest: int | None
) -> Iterator[Pair]:
    """Sharp photos, to be blurred ``copies`` times; large ones in tiles. Sizes in pixels, see prepare_data.py."""
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):  # else they are not among the photos
        made = (path for part in ("train", "val") for path in sorted((out / part).rglob("[!.]*")))
        strays = (p for p in made if p.suffix.lower() in FORMATS and p.name not in ("blurry.png", "sharp.png"))
        advice = f"is where pairs are put: move it to a folder beside {out}"
        raise_problems([f"{path} {advice}" for path in strays if SYSTEM_FOLDERS.isdisjoint(path.parts)])
    paths = find_single_photos(folder, without=[out / part for part in ("train", "val", "demo")])
    for path in tqdm(paths, "reading photos", unit="photo", leave=False, disable=None):
        try:
            height, width = shrunk(upright_size(path), longest)
        except UserError as error:
            problems.append(str(error))
            continue
        if min(height, width) < smallest:
            problems.append(f"{path} is {width}x{height}, smaller than {smallest} pixels")
            continue
        group = folder_name(path.relative_to(folder).with_suffix(""))
        rows, columns = cuts(height, tile, smallest), cuts(width, tile, smallest)
        for (row, (top, bottom)), (column, (left, right)) in product(enumerate(rows), enumerate(columns)):
            name = f"{group}.r{row}c{column}" if len(rows) * len(columns) > 1 else group
            for copy in range(copies):
                copy_name = f"{name}.copy{copy}" if copy else name
                yield Pair(copy_name, group, path, tile=(top, left, bottom, right), copy=copy)


def plan_pairs(blurry: Path, sharp: Path, problems: list[str]) -> Iterator[Pair]:
    if blurry.is_dir() and sharp.is_dir() and os.path.samefile(blurry, sharp):  # each photo would match itself
        raise UserError(f"{blurry} and {sharp} are the same folder: move the sharp photos to another one")
    blurry_files, sharp_files = (by_name(folder, problems) for folder in (blurry, sharp))
    problems += [f"{blurry_files[p]} has no counterpart in {sharp}" for p in blurry_files if p not in sharp_files]
    problems += [f"{sharp_files[p]} has no counterpart in {blurry}" for p in sharp_files if p not in blurry_files]
    for p in blurry_files:
        if p in sharp_files:
            at_top_level = p.parent == Path()
            group = folder_name(p) if at_top_level else folder_name(p.parent)
            yield Pair(group if at_top_level else f"{group}.{folder_name(p.name)}", group, sharp_files[p], blurry_files[p])


def by_name(folder: Path, problems: list[str]) -> dict[Path, Path]:
    """The photos of ``folder`` by their relative path without the suffix, so that a JPEG may match a PNG."""
    files: dict[Path, Path] = {}
    for path in find_photos(folder):
        name = path.relative_to(folder).with_suffix("")
        if files.setdefault(name, path) != path:
            problems.append(f"{path} has the same name as {files[name]}: rename one of them")
    return files


def plan_gopro(folder: Path, problems: list[str]) -> Iterator[Pair]:
    for their_part, part in (("train", "train"), ("test", "val")):
        for path in files_of(folder, f"{their_part}/*/blur/*.png"):
            sequence = path.parent.parent
            group = folder_name(sequence.name)
            yield Pair(f"{group}.{folder_name(path.stem)}", group, sequence / "sharp" / path.name, path, part)


def plan_reds(folder: Path, problems: list[str]) -> Iterator[Pair]:
    for part in ("train", "val"):
        inside = folder / part if (folder / part).is_dir() else folder  # the archives unpack to train/train_blur/...
        for path in files_of(inside, f"{part}_blur/*/*.png"):
            group = f"{part}-{folder_name(path.parent.name)}"  # both parts count their sequences from 000
            sharp = inside / f"{part}_sharp" / path.parent.name / path.name
            yield Pair(f"{group}.{folder_name(path.stem)}", group, sharp, path, part)


def plan_hide(folder: Path, problems: list[str]) -> Iterator[Pair]:
    for pattern, part in (("train/*.png", "train"), ("test/*/*.png", "val")):
        for path in files_of(folder, pattern):
            group = folder_name(path.stem.partition("from")[2] or path.stem)  # 12fromGOPR0950.png is a frame of GOPR0950
            yield Pair(f"{group}.{folder_name(path.stem)}", group, folder / "GT" / path.name, path, part)


def plan_realblur(folder: Path, problems: list[str]) -> Iterator[Pair]:
    for their_part, part in (("train", "train"), ("test", "val")):
        for path in files_of(folder, f"RealBlur_J_{their_part}_list.txt"):
            files = [folder / name for name in path.read_text(errors="replace").split()]  # a sharp and a blurry one a line
            for sharp, blurry in zip(files[::2], files[1::2], strict=False):
                group = folder_name(sharp.parent.parent.name)  # .../scene001/gt/gt_1.png
                yield Pair(f"{group}.{folder_name(blurry.stem)}", group, sharp, blurry, part)


def files_of(folder: Path, pattern: str) -> list[Path]:
    if not (files := sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))):
        raise UserError(f"{folder} contains no {pattern}: give the folder into which the data set was unpacked")
    return files


def folder_name(path: Path | str) -> str:
    """A folder name for ``path``: letters, digits and dashes stay, anything else becomes an underscore."""
    return re.sub(r"[^\w-]", "_", str(path))


def shrunk(size: tuple[int, int], longest: int | None) -> tuple[int, int]:
    scale = min(1, longest / max(size)) if longest else 1
    return tuple(max(1, round(length * scale)) for length in size)


def cuts(length: int, tile: int, smallest: int) -> list[tuple[int, int]]:
    """Split ``length`` into equal parts of at most ``tile``, fewer if below ``smallest``: (start, end) each."""
    count = max(1, min(-(-length // tile), length // smallest))
    return list(pairwise(round(i * length / count) for i in range(count + 1)))
