"""Photos on disk -> RGB pixels: reading any image file, and decoding a folder of them only once."""

import atexit
import contextlib
import copy
import hashlib
import importlib
import io
import json
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError
from tqdm import tqdm

from images.files import atomic
from utils import UserError, one_line, print0

FORMATS = {  # suffix -> Pillow's name
    **{".png": "PNG", ".apng": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP"},
    **{".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".gif": "GIF", ".ppm": "PPM", ".pgm": "PPM", ".avif": "AVIF"},
    **{".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF", ".jp2": "JPEG2000", ".j2k": "JPEG2000"},
}
MAX_PIXELS = 2**28  # in one file; Pillow refuses twice as many. Phones make 200 megapixels
SYSTEM_FOLDERS = {"@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found"}


def find_photos(folder: Path | str, problems: list[str] | None = None, without: Iterable[Path] = ()) -> list[Path]:
    """The image files in ``folder`` and its sub-folders, sorted, at least one; a line is printed about other files.

    What is hidden, of the system or in a folder ``without`` is skipped. Linked folders are followed, each is read once. If
    given, ``problems`` gets a sentence for each sub-folder that cannot be listed, which else is a ``UserError``.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder: give the path of a folder of photos")

    def fail(error: OSError) -> None:
        problem = f"{error.filename} cannot be listed ({error.strerror}): check permissions"
        if problems is None or error.filename == os.fspath(folder):
            raise UserError(problem)
        problems.append(problem)

    files, seen = [], {os.path.realpath(path) for path in without} - {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(n for n in folders if n[0] != "." and n not in SYSTEM_FOLDERS)
        files += [] if real in seen else [Path(parent, name) for name in names if name[0] != "."]
        seen.add(real)
    # Broken links, and what may not be looked at, are kept: reading reports them
    files = sorted(p for p in files if os.path.isfile(p) or not os.path.exists(p))
    if not (paths := [p for p in files if p.suffix.lower() in FORMATS]):
        raise UserError(f"{folder} contains no photos ({', '.join(FORMATS)}): put some there")
    if others := Counter(p.suffix.lower() or p.name for p in files if p.suffix.lower() not in FORMATS):
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(9))
        print0(one_line(f"{others.total()} other files in {folder} are left out: {kinds}"))
    return paths


def find_single_photos(folder: Path | str, without: Iterable[Path] = ()) -> list[Path]:
    """``find_photos``, but blurry.png beside sharp.png is a ``UserError``: that is a pair, not two single photos."""
    paths = find_photos(folder, without=without)
    for path in {p.parent for p in paths if p.name == "blurry.png"} & {p.parent for p in paths if p.name == "sharp.png"}:
        raise UserError(
            f"{folder} contains pairs, such as {path}: give a folder of single photos; train.py and, with PHOTOS = None, "
            "pretrain.py take pairs as they are"
        )
    return paths


def read_photo(path: Path | str) -> np.ndarray:
    """Read an image of any kind as (H, W, 3) uint8 RGB, rotated as its EXIF orientation says.

    Gray, palette and CMYK images become RGB, transparency is dropped, 16 bits become 8, animations their first frame.
    Raises ``UserError`` if the file is missing or damaged.
    """
    with open_image(path) as image:
        image.load()
        if orientation_of(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            # Pillow's own conversion would clip 16-bit gray at 255 instead of scaling it
            image = Image.fromarray(np.round(deep_gray(image) / 257).astype(np.uint8))
        return pixels_of(cmyk_to_rgb(image) if image.mode == "CMYK" else image.convert("RGB"))


def pixels_of(image: Image.Image) -> np.ndarray:
    """(H, W, C) uint8 of an image with 8 bits per channel, with half of the memory that ``np.array(image)`` takes."""
    pixels = np.empty((image.height, image.width, len(image.getbands())), np.uint8)
    for top in range(0, image.height, 256):
        band = np.asarray(image.crop((0, top, image.width, min(top + 256, image.height))))
        pixels[top : top + 256] = band.reshape(len(band), image.width, -1)
    return pixels


@contextlib.contextmanager
def open_image(path: Path | str) -> Iterator[Image.Image]:
    """Context manager: the image in a file of one of the FORMATS; any error in the block is a ``UserError`` about it."""
    PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes: color profiles of printers have some megabytes
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    Image.core.set_block_size(2**26)  # bytes: smaller blocks the C library keeps when a large photo is freed
    Image.init()  # or Pillow finds only some of the formats that it is given by name
    try:
        # From an open file: given a path, Pillow maps some rotated TIFFs into memory in the wrong shape
        with open(path, "rb") as file:
            if file.read(10)[4:] in (b"ftyphe", b"ftypmi", b"ftypms"):  # heic, heix, hevc, mif1, ...
                load_heif(path)
            file.seek(0)
            # Whatever the name says: fewer decoders for damaged or hostile bytes, none that runs a program
            with Image.open(file, formats=[kind for kind in dict.fromkeys(FORMATS.values()) if kind in Image.OPEN]) as image:
                yield image
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # damaged bytes may raise anything in a decoder
        reason = describe_error(error)
        raise UserError(f"{path} cannot be read as an image ({reason}): convert, replace or remove it") from None


def describe_error(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is empty, damaged or in an unsupported format"
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:120] or type(error).__name__


def load_heif(path: Path | str) -> None:
    """Teach Pillow HEIC; ``path`` is named in the error if it cannot be."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        raise UserError(f"{path} is HEIC: install pillow-heif to read and write it, pip install pillow-heif") from None


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation; 1, upright, if the EXIF is damaged: the pixels may be sound."""
    try:
        return exif_of(image).get(0x0112, 1)
    except Exception:  # damaged bytes may raise anything
        return 1


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) after EXIF rotation, from the file's header if possible."""
    with contextlib.suppress(UserError), open_image(path) as image:
        if image.format != "TIFF":  # which Pillow rotates itself, depending on its version
            return image.size if orientation_of(image) in (5, 6, 7, 8) else image.size[::-1]
    return read_photo(path).shape[:2]  # or raises the error


def exif_of(image: Image.Image) -> Image.Exif:
    """Raises if it is damaged. Takes the XMP out of ``image.info``: Pillow would add its orientation, viewers do not."""
    for name in "xmp", "XML:com.adobe.xmp":
        image.info.pop(name, None)
    return image.getexif()


def cmyk_to_rgb(image: Image.Image) -> Image.Image:
    """sRGB, through the color profile in the file if there is a usable one."""
    try:
        profile = io.BytesIO(image.info["icc_profile"])
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (KeyError, TypeError, ImageCms.PyCMSError):
        return image.convert("RGB")


def deep_gray(image: Image.Image) -> np.ndarray:
    """(H, W) uint16 of an image of gray with more than 8 bits. Raises ``ValueError`` if it has more than 16."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its values are not 8- or 16-bit")
    tags = getattr(image, "tag_v2", {})
    if 8 < (bits := tags.get(258, (16,))[0]) < 16:  # a TIFF's, which Pillow does not scale
        values = np.rint(values * (65535 / (2**bits - 1)))
    if tags.get(262) == 0:  # a TIFF's white is zero, which Pillow undoes for 8 bits only
        values = 65535 - values
    return values.astype(np.uint16)


class PixelFile:
    """The pixels of many photos one after the other in one file, from which patches are read without the rest.

    ``pixels[i]`` is photo i as an (H, W, 3) uint8 array; ``pixels.shapes[i]`` is its (H, W).
    """

    def __init__(self, file: Path, shapes: list[tuple[int, int]]):
        self.file, self.shapes = file, shapes
        self.ends = np.cumsum([0, *(height * width * 3 for height, width in shapes)]).tolist()  # bytes; where each begins
        self._handle = None

    def subset(self, start: int) -> "PixelFile":
        """Every second photo of the same file, from ``start`` on."""
        part = copy.copy(self)
        part.shapes, part.ends = self.shapes[start::2], self.ends[start::2]
        return part

    def is_complete(self) -> bool:
        return self.file.is_file() and self.file.stat().st_size == self.ends[-1]

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.crop(index, slice(0, self.shapes[index][0]), slice(None))

    def crop(self, index: int, rows: slice, columns: slice) -> np.ndarray:
        """(h, w, 3) pixels of photo ``index``: complete rows are read at once and the columns cut out of them.

        Read instead of mapped into memory: a mapping would touch a page per row, and each may read ahead 8 MB.
        """
        width = self.shapes[index][1]
        count, offset = (rows.stop - rows.start) * width * 3, self.ends[index] + rows.start * width * 3
        try:
            # Kept open, so that another training may remove the file when its photos or teacher changed
            self._handle = self._handle or open(self.file, "rb", buffering=0)  # noqa: SIM115
            if hasattr(os, "pread"):  # forked workers share the file position, which pread does not use
                data = os.pread(self._handle.fileno(), count, offset)
            else:
                self._handle.seek(offset)
                data = self._handle.read(count)
        except OSError:
            data = b""
        if len(data) != count:
            raise UserError(f"{self.file} was removed or truncated while in use: run again to create it again")
        return np.frombuffer(data, np.uint8).reshape(-1, width, 3)[:, columns]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_handle": None}  # which cannot be sent to a worker


class DecodedPhotos(PixelFile):
    """Photos decoded once: ``photos[i]`` is ``paths[i]`` as (H, W, 3) uint8. A ``UserError`` lists all that cannot be read.

    The pixels are in ``cache``, in a file whose name depends on each photo's path below the folder that all are in, size and
    modification time. It is written whole or not at all, so that two processes may start together. If ``cache`` cannot be
    written to, a temporary folder is used for this run. ``key``, 20 characters, depends on the content alone.
    ``paths_by_content`` maps a hash of each photo's pixels to its path.
    """

    def __init__(self, paths: list[Path], cache: Path):
        state, root = hashlib.sha256(), os.path.commonpath([path.parent for path in paths])
        for path in paths:
            state.update(f"{path.relative_to(root)}|".encode(errors="surrogateescape"))  # a moved data set stays decoded
            with contextlib.suppress(OSError):  # decoding tells which are missing
                status = path.stat()
                state.update(f"{status.st_size}|{status.st_mtime_ns}\n".encode())
        name = state.hexdigest()[:20]
        if not self._load(cache, name):
            cache = _writable(cache)
            with atomic(cache / f"{name}.pixels") as partial:
                index = json.dumps(_decode_all(paths, partial))
            with atomic(cache / f"{name}.json") as partial:
                partial.write_text(index)
            remove_files(p for suffix in ("pixels", "json") for p in cache.glob(f"*.{suffix}") if p.stem != name)
            self._load(cache, name)
        self.paths_by_content = dict(zip(self._contents, paths, strict=True))

    def _load(self, cache: Path, name: str) -> bool:
        """Whether ``cache`` holds the photos called ``name``; takes them if so."""
        try:
            index = json.loads((cache / f"{name}.json").read_text())
            self.cache, self.key, self._contents, shapes = cache, index["key"], index["contents"], index["shapes"]
        except (OSError, ValueError, KeyError):
            return False  # missing, damaged or written by an earlier version
        super().__init__(cache / f"{name}.pixels", [tuple(shape) for shape in shapes])
        return self.is_complete()


def _writable(cache: Path) -> Path:
    """``cache``, or a temporary folder until the process ends."""
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            return cache
    print0(f"{cache} cannot be written to: photos are decoded into a temporary folder for this run only")
    temporary = tempfile.mkdtemp(prefix="decoded_photos_")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


def _decode_all(paths: list[Path], file: Path) -> dict:
    """Write the pixels of all photos one after the other; returns what the index holds of them."""
    shapes, contents, problems = [], [], []
    threads = os.cpu_count() or 1  # Pillow decodes outside the interpreter lock
    with open(file, "wb") as out, ThreadPoolExecutor(threads) as pool:
        jobs = look_ahead((pool.submit(read_photo, path) for path in paths), threads)
        for decoded in tqdm(jobs, "decoding photos", len(paths), unit="photo", leave=False, disable=None):
            try:
                photo = decoded.result()
            except UserError as error:
                problems.append(str(error))
                continue
            shapes.append(photo.shape[:2])
            contents.append(f"{photo.shape} {hashlib.sha256(photo).hexdigest()[:20]}")
            out.write(photo.data)
    raise_problems(problems)
    return {"shapes": shapes, "contents": contents, "key": hashlib.sha256(repr(contents).encode()).hexdigest()[:20]}


def look_ahead(items: Iterable, count: int) -> Iterator:
    """The same ``items``, of which ``count`` more are taken than given: futures are at work meanwhile, a few in memory."""
    waiting = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def raise_problems(problems: list[str]) -> None:
    """Raise ``UserError`` with a line for each of the first 50 ``problems``, if there are any."""
    if problems:
        lines = [one_line(problem) for problem in problems[:50]]
        if len(problems) > 50:
            lines.append(f"... and {len(problems) - 50} more")
        raise UserError("\n  ".join([f"{len(problems)} problem{'s' * (len(problems) > 1)} with the data:", *lines]))


def remove_files(files: Iterable[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):  # Windows keeps a file that another process has open
            file.unlink(missing_ok=True)
