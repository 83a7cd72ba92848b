"""The field's oldest table: photos halved and enlarged again bicubically, then sharpened; PSNR of luma on Set5.

    python benchmarks/set5.py score SET5 [WEIGHTS ...]
    python benchmarks/set5.py pairs PHOTOS OUT

SET5 is the folder of the five photos. "pairs" makes OUT/train and OUT/val from a folder of sharp photos, one in ten for
validation: with DATA = "OUT", pretrain.py and train.py then train a teacher and a student for this task alone.

The protocol is that of the published figures: sides cut to even numbers, bicubic with antialiasing, 8 bits, Y of YCbCr as
MATLAB has it, 2 pixels cut off at each border. Published, for a scale of 2: SRCNN arXiv:1501.00092, VDSR arXiv:1511.04587.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from cli import CliParser, check_writable, run_cli
from images.files import atomic
from images.photos import find_photos, read_photo
from inference import Sharpener
from models import load_model
from utils import UserError, gmac_per_megapixel, pick_device

PUBLISHED = {"bicubic": (33.66, None), "SRCNN": (36.66, 57.2), "VDSR": (37.53, 664.7)}  # dB, GMAC per megapixel
BORDER = 2  # pixels
VAL_EVERY = 10


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("job", choices=["score", "pairs"])
    parser.add_argument("photos", type=Path, help="a folder of sharp photos")
    parser.add_argument("files", nargs="*", type=Path, help="weights to score, or the folder for the pairs")
    options = parser.parse_args()
    if options.job == "score":
        score(options.photos, options.files)
    elif len(options.files) != 1:
        parser.error("pairs takes one folder to make them in")
    else:
        make_pairs(options.photos, options.files[0])


def score(folder: Path, weights: list[Path]) -> None:
    sharpeners = {str(file): Sharpener(load_model(file).requires_grad_(False), pick_device()) for file in weights}
    sums = dict.fromkeys(["bicubic", *sharpeners], 0.0)
    paths = find_photos(folder)
    for path in paths:
        sharp, blurry = halved_and_enlarged(path)
        sums["bicubic"] += psnr_of_luma(blurry, sharp)
        for name, sharpener in sharpeners.items():
            sums[name] += psnr_of_luma(sharpener(blurry), sharp)
    print(f"PSNR of luma, mean of {len(paths)} photos; GMAC per megapixel")
    for name, total in sums.items():
        cost = f"{gmac_per_megapixel(sharpeners[name].network):8.1f}" if name in sharpeners else ""
        print(f"{name:40s} {total / len(paths):6.2f} dB {cost}")
    for name, (psnr, cost) in PUBLISHED.items():
        print(f"{name + ', published':40s} {psnr:6.2f} dB {cost or '':>8}")


def halved_and_enlarged(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(sharp, blurry), both (H, W, 3) uint8 with even H and W."""
    sharp = read_photo(path)
    sharp = sharp[: sharp.shape[0] // 2 * 2, : sharp.shape[1] // 2 * 2]
    height, width = sharp.shape[:2]
    if min(height, width) < 2 * BORDER + 2:
        raise UserError(f"{path} is {width}x{height}, too small for this table: remove it")
    small = Image.fromarray(sharp).resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    return sharp, np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def psnr_of_luma(picture: np.ndarray, sharp: np.ndarray) -> float:
    """PSNR in dB of Y, from 16 to 235 for 8 bits as ITU-R BT.601 has it, without the border."""
    inner = slice(BORDER, -BORDER)
    weights = np.array([65.481, 128.553, 24.966]) / 255
    difference = (picture[inner, inner].astype(np.float64) - sharp[inner, inner]) @ weights
    return float(10 * np.log10(255**2 / np.square(difference).mean()))


def make_pairs(folder: Path, out: Path) -> None:
    check_writable(out, "OUT")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists already: name another folder, or remove it")
    for number, path in enumerate(tqdm(find_photos(folder), "halving and enlarging", unit="photo", disable=None)):
        pair = out / ("train" if number % VAL_EVERY else "val") / f"{number:05d}"
        for name, pixels in zip(("sharp.png", "blurry.png"), halved_and_enlarged(path), strict=True):
            with atomic(pair / name) as partial:
                Image.fromarray(pixels).save(partial, compress_level=3)


if __name__ == "__main__":
    run_cli(main)
