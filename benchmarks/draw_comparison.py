"""Draws the README's picture: two sample photos of scikit-image, blurred as cameras do it, sharpened, and as they were.

    python benchmarks/draw_comparison.py docs/comparison.png

The cat is out of focus, the portrait is shaken; both with a little noise and JPEG. Nothing was trained on them.
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import data

sys.path.insert(0, str(Path(__file__).parent.parent))
from blur.camera import add_noise, jpeg
from blur.filters import convolve_linear_light, disk_kernel
from blur.spatial import camera_shake
from cli import CliParser, check_writable, run_cli
from images.files import atomic
from inference import Sharpener
from models import load_model
from training.report import score
from utils import make_generator, pick_device, to_pixels, to_tensor

WEIGHTS = Path(__file__).parent.parent / "weights"
SIZE, HEAD, GAP = 250, 20, 4  # pixels: of a crop, of the line above it, between crops


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("picture", type=Path, help="file for the picture, such as comparison.png")
    options = parser.parse_args()
    check_writable(options.picture.parent, "PICTURE")
    cat, portrait = to_tensor(data.chelsea()), to_tensor(data.astronaut())
    blurry = [convolve_linear_light(cat, disk_kernel(2.2)), camera_shake(portrait, make_generator(7))]
    sharpeners = {name: Sharpener(load_model(WEIGHTS / f"{name}.pth"), pick_device()) for name in ("student", "teacher")}
    page = Image.new("RGB", (4 * (SIZE + GAP) - GAP, 2 * (HEAD + SIZE)), "white")
    for row, (sharp, photo, corner) in enumerate(zip((cat, portrait), blurry, [(40, 90), (20, 150)], strict=True)):
        photo = jpeg(add_noise(photo, 2.5, make_generator(3)).clamp(0, 1), 88)
        sharpened = {name: to_tensor(sharpen(to_pixels(photo))) for name, sharpen in sharpeners.items()}
        for column, (name, image) in enumerate(({"blurry": photo} | sharpened | {"sharp": sharp}).items()):
            place = column * (SIZE + GAP), row * (HEAD + SIZE)
            label = name if name == "sharp" else f"{name}, {score(image, sharp).psnr:.2f} dB"
            ImageDraw.Draw(page).text((place[0] + 2, place[1] + 2), label, "black", ImageFont.load_default(14))
            crop = image[:, corner[0] : corner[0] + SIZE, corner[1] : corner[1] + SIZE]
            page.paste(Image.fromarray(to_pixels(crop)), (place[0], place[1] + HEAD))
    with atomic(options.picture) as partial:
        page.save(partial)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_cli(main)
