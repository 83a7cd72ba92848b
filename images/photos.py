"""Photos on disk -> RGB pixels: reading any picture file, and decoding a folder of them only once."""

import contextlib

import hashlib

import io

import json

import os

import tempfile

import warnings

from collections.abc import Iterable

from concurrent.futures import ThreadPoolExecutor

from pathlib import Path

import numpy as np

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from tqdm import tqdm

from files import atomic_write

from processes import print0

from utils import UserError, one_line

# Whatever a name says, nothing else is tried: fewer decoders for damaged or hostile bytes, and none that runs a program
DECODERS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}

def find_photos(folder: Path | str) -> list[Path]:
    """The picture files of ``folder`` and its sub-folders, sorted; hidden ones are passed over."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the path of a folder of photos")
    try:
        # Links that lead nowhere are kept: reading them says so
        every = [Path(at, name) for at, _, names in os.walk(folder, onerror=_stop) for name in names]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be looked through ({error.strerror}): check who may read it") from None
    paths = [p for p in every if p.suffix.lower() in SUFFIXES and (p.is_file() or not p.exists())]
    paths = sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not paths:
        raise UserError(f"{folder} holds no photos ({', '.join(sorted(SUFFIXES))}): put some there")
    return paths

def _stop(error: OSError) -> None:
    raise error

def read_photo(path: Path | str) -> np.ndarray:
    """Read a picture of any kind as (H, W, 3) uint8 RGB, turned upright as its EXIF says.

    Grey and palette become RGB, transparency is dropped, 16 bits become 8.

    Raises:
        UserError: one sentence if the file is missing or cannot be decoded whole.
    """
    try:
        # From an open file: given a path, Pillow maps some turned TIFFs into memory in the wrong shape
        with open(path, "rb") as file, open_picture(file) as picture:
            return _to_rgb(ImageOps.exif_transpose(picture))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except Exception as error:  # a decoder fed damaged bytes may raise anything
        raise UserError(f"{path} cannot be read as a picture ({why(error)}): replace or remove it") from None

def why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is empty, damaged or of a kind that is not read here"
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:120] or type(error).__name__

def open_picture(file) -> Image.Image:
    """``Image.open`` for the formats in DECODERS."""
    PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes: colour profiles of printers have some megabytes
    Image.init()  # or Pillow finds only some of the formats that it is given by name
    return Image.open(file, formats=DECODERS)

def _to_rgb(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I") or picture.mode == "F":
        # Pillow's own conversion would clip 16-bit grey at 255 instead of scaling it
        values = np.asarray(picture).astype(np.float64)
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("its values are not 8- or 16-bit")
        picture = Image.fromarray(np.round(values / 257).astype(np.uint8))
    return np.array(picture.convert("RGB"))

class PixelFile:
    """Many photos' pixels one after the other in one file, from which a patch is read without the rest.

    ``pixels[i]`` is photo i as an (H, W, 3) uint8 array; ``pixels.shapes[i]`` is its (H, W).
    """

    _temporary = None  # the folder of the file, if it is to go with the last that holds it

    def __init__(self, file: Path, shapes: list[tuple[int, int]]):
        self.file, self.shapes = file, shapes
        *self._offsets, self._size = np.cumsum([0, *(height * width * 3 for height, width in shapes)]).tolist()
        self._handle = None

    def every_second(self, first: int) -> "PixelFile":
        """Photos ``first``, ``first`` + 2, ... of the same file; of the others nothing is read."""
        part = PixelFile(self.file, self.shapes[first::2])
        part._offsets, part._size = self._offsets[first::2], self._size
        part._temporary = self._temporary
        return part

    def is_complete(self) -> bool:
        return self.file.is_file() and self.file.stat().st_size == self._size

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> np.ndarray:
        return self.crop(index, slice(0, self.shapes[index][0]), slice(None))

    def crop(self, index: int, rows: slice, columns: slice) -> np.ndarray:
        """(h, w, 3) pixels of photo ``index``: its whole rows are read at once, and the columns cut out of them.

        Read, not mapped into memory: that would touch a page for each row, and let the system read 8 MB for each page.
        """
        width = self.shapes[index][1]
        count, offset = (rows.stop - rows.start) * width * 3, self._offsets[index] + rows.start * width * 3
        try:
            # Held open, so that another training on other photos or teachers may remove what it does not need
            self._handle = self._handle or open(self.file, "rb", buffering=0)  # noqa: SIM115
            found = _read_at(self._handle, count, offset)
        except OSError:
            found = b""
        if len(found) != count:
            raise UserError(f"{self.file} was removed or cut while it was in use: run again to make it anew")
        return np.frombuffer(found, np.uint8).reshape(-1, width, 3)[:, columns]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_handle": None, "_temporary": None}  # which cannot be sent to a worker

    @property
    def nbytes(self) -> int:
        return sum(height * width * 3 for height, width in self.shapes)

def _read_at(file: io.FileIO, count: int, offset: int) -> bytes:
    if hasattr(os, "pread"):  # a worker that was forked shares the place in the file, which pread leaves alone
        return os.pread(file.fileno(), count, offset)
    file.seek(offset)
    return file.read(count)

class DecodedPhotos(PixelFile):
    """Photos decoded once: ``photos[i]`` is ``paths[i]`` as (H, W, 3) uint8.

    The file lies in ``cache``, under a name made of every photo's path, size and time of change: a photo that
    was changed, added or removed means a new file. It is written whole or not at all, so two processes may
    start together. Where ``cache`` cannot be written, a temporary folder serves for this run.

    Raises:
        UserError: naming every photo that cannot be read.
    """

    def __init__(self, paths: list[Path], cache: Path):
        identity = hashlib.sha256()
        for path in paths:
            try:
                status = path.stat()
            except OSError:
                raise UserError(f"{path} is missing or cannot be opened") from None
            identity.update(f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        self.key = identity.hexdigest()[:20]
        self.cache, self._temporary = _writable(cache)
        file, index = self.cache / f"{self.key}.pixels", self.cache / f"{self.key}.json"
        super().__init__(file, _read_shapes(index))
        if len(self) != len(paths) or not self.is_complete():
            shapes: list[tuple[int, int]] = []
            atomic_write(file, lambda partial: shapes.extend(_decode_all(paths, partial)))
            atomic_write(index, lambda partial: partial.write_text(json.dumps(shapes)))
            remove_files(p for p in self.cache.glob("*.*") if not p.name.startswith((".", self.key)))  # earlier states
            super().__init__(file, shapes)

def _decode_all(paths: list[Path], file: Path) -> list[tuple[int, int]]:
    """Write the pixels of all photos one after the other; returns their (height, width)."""
    shapes, problems = [], []

    def read(path: Path):
        try:
            return read_photo(path)
        except UserError as error:
            return error

    bar = tqdm(total=len(paths), desc="decoding photos once", unit="photo", leave=False, disable=None)
    threads = os.cpu_count() or 1  # Pillow decodes outside the interpreter lock
    with open(file, "wb") as out, ThreadPoolExecutor(threads) as pool, bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata that does not touch the pixels
        for start in range(0, len(paths), 2 * threads):  # in groups: a whole data set may not fit in memory
            for result in pool.map(read, paths[start : start + 2 * threads]):
                bar.update()
                if isinstance(result, UserError):
                    problems.append(str(result))
                elif not problems:
                    shapes.append(result.shape[:2])
                    out.write(result.data)
    if problems:
        raise UserError(list_problems(problems))
    return shapes

def list_problems(problems: list[str]) -> str:
    """One line per problem, at most 50 of them."""
    shown = [one_line(problem) for problem in problems[:50]] + (
        [f"... and {len(problems) - 50} more"] if len(problems) > 50 else []
    )
    return "\n  ".join([f"{len(problems)} problem{'s' * (len(problems) > 1)} with the data:", *shown])

def _writable(cache: Path) -> tuple[Path, tempfile.TemporaryDirectory | None]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return cache, None
    except OSError:
        pass
    temporary = tempfile.TemporaryDirectory(prefix="decoded_photos_")
    print0(f"{cache} cannot be written: photos are decoded into a temporary folder for this run only")
    return Path(temporary.name), temporary

def _read_shapes(index: Path) -> list[tuple[int, int]]:
    try:
        return [(int(height), int(width)) for height, width in json.loads(index.read_text())]
    except (OSError, ValueError, TypeError):
        return []  # not there, or not whole: the photos are decoded again

def remove_files(files: Iterable[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):  # Windows keeps a file that another process has open
            file.unlink(missing_ok=True)
