"""Draws a page of random degradations, sharp (varied) and degraded crops side by side, so that a person can look at them.

python benchmarks/draw_mixture.py PHOTOS page.png [--crops 40]
"""

import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import center_crop
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).parent.parent))
from PIL import Image

from blur.degradations import random_degradation
from blur.variety import vary_photo
from cli import CliParser, check_writable, run_cli, whole_number
from images.files import atomic
from images.photos import find_photos, read_photo
from utils import make_generator, to_pixels, to_tensor

SIZE = 160  # pixels, of a crop


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("photos", type=Path, help="a folder of sharp photos")
    parser.add_argument("page", type=Path, help="file for the picture, such as page.png")
    parser.add_argument("--crops", type=whole_number(1, 400), default=40, help="number of degradations (40)")
    options = parser.parse_args()
    check_writable(options.page.parent, "PAGE")
    paths, crops = find_photos(options.photos), []
    for k in range(options.crops):
        photo = to_tensor(read_photo(paths[k * len(paths) // options.crops]))
        generator = make_generator(9, k)
        blurry, sharp = random_degradation(vary_photo(photo, generator), generator)
        crops += [center_crop(image, [SIZE, SIZE]) for image in (sharp, blurry)]
    page = make_grid(torch.stack(crops), nrow=10, padding=4, pad_value=1)
    with atomic(options.page) as partial:
        Image.fromarray(to_pixels(page)).save(partial)


if __name__ == "__main__":
    run_cli(main)
