"""Demo pairs, cut from the sample photos inside scikit-image: train.py runs without any data."""

from pathlib import Path

import numpy as np
import skimage
from PIL import Image

from blur.degradations import Mixture, random_degradation
from images.files import atomic
from images.photos import read_photo
from utils import UserError, make_generator, print0, to_pixels, to_tensor

TILE = 144  # pixels
PHOTOS = {  # sample photos of scikit-image, and how many tiles of each; no photo is in both parts
    "train": {"astronaut.png": 9, "motorcycle_left.png": 15, "chelsea.png": 6, "rocket.jpg": 2},
    "val": {"coffee.png": 8},
}
# The middle of the default ranges: eight photos that hardly need sharpening would show nothing
MIXTURE = Mixture(
    identity=0, camera=0, blurs={"gaussian": 0.4, "anisotropic": 0.2, "defocus": 0.3, "line": 0.05, "shake": 0.05},
    sigma=(0.8, 2.5), radius=(1.5, 3.5), line_length=(3, 10), shake_length=(4, 14),
    noise_sigma=(0.2, 1.5), jpeg=0.15, quality=(60, 95),
)  # fmt: skip
NOTE = "Demo pairs, cut from the sample photos of scikit-image and blurred by blur/degradations.py. Safe to delete.\n"


def find_or_make_data(root: Path | str) -> Path:
    """The folder with train/ and val/: ``root`` if the user has put anything there, else demo data in ``root``/demo.

    Raises ``UserError`` if pairs are elsewhere in ``root``, or if it does not exist under another name than data.
    """
    root = Path(root)
    for folder in root / "train", root / "val":
        if folder.exists() and (not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())):
            return root
    for stray in (*root.glob("*/blurry.png"), *root.glob("*/*/blurry.png")):  # those of the demo are one level deeper
        raise UserError(f"{stray} is not in {root}/train/NNN or {root}/val/NNN: move it there, or change DATA")
    if not root.exists() and root.name != "data":
        raise UserError(f"{root} does not exist: set DATA to a folder with train/ and val/, or to 'data' for demo data")
    make_demo_data(root / "demo")
    print0(
        f"{root} contains no pairs, so this is demo data: small tiles of scikit-image's sample photos, in {root / 'demo'};\n"
        "prepare_data.py makes pairs from your own photos, and weights/student.pth was trained on many more than these"
    )
    return root / "demo"


def make_demo_data(root: Path) -> None:
    """Write 32 training and 8 validation pairs of 144x144 pixels to ``root``/{train,val}/NNN, unless they are there.

    Anything else in ``root`` is never touched, but a ``UserError``.
    """
    if (root / "DEMO.txt").is_file():
        return
    with atomic(root) as partial:  # whole or not at all; fails if there is anything else
        for part, photos in PHOTOS.items():
            tiles = [tile for name, count in photos.items() for tile in _cut_tiles(name, count)]
            for k, sharp in enumerate(tiles, start=1):
                blurry, _ = random_degradation(to_tensor(sharp), make_generator(len(part), k), MIXTURE)
                folder = partial / part / f"{k:03d}"
                folder.mkdir(parents=True)
                Image.fromarray(to_pixels(blurry)).save(folder / "blurry.png")
                Image.fromarray(sharp).save(folder / "sharp.png")
        (partial / "DEMO.txt").write_text(NOTE)


def _cut_tiles(name: str, count: int) -> list[np.ndarray]:
    """The ``count`` tiles with the most detail of a sample photo of scikit-image, (TILE, TILE, 3) uint8."""
    photo = read_photo(Path(skimage.__file__).parent / "data" / name)
    rows, columns = (range(0, length - TILE + 1, TILE) for length in photo.shape[:2])
    tiles = [photo[top : top + TILE, left : left + TILE].copy() for top in rows for left in columns]
    return sorted(tiles, key=lambda tile: -np.abs(np.diff(tile.astype(np.int16), axis=0)).mean())[:count]
