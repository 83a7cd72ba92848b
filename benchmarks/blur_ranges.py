"""Blurs sharp photos at both ends and in the middle of every range of degradations.Mixture, a folder for each.

    python benchmarks/blur_ranges.py PHOTOS OUT [--photos 20]
    python evaluate.py OUT

Noise is in the middle of its range except where it is varied itself; the middle is the geometric one, as blurs are drawn,
except for noise and JPEG. The same photos and version give the same pixels.
"""

import dataclasses
import math
import sys
import zlib
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from blur.degradations import Mixture, random_degradation
from cli import CliParser, check_writable, run_cli, whole_number
from images.files import atomic
from images.photos import find_photos, read_photo
from utils import UserError, make_generator, to_pixels, to_tensor

RANGES = {
    "gaussian": "sigma",
    "anisotropic": "sigma",
    "defocus": "radius",
    "line": "line_length",
    "shake": "shake_length",
    "rescale": "factor",
}


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("folder", type=Path, help="sharp photos")
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument("--photos", type=whole_number(1), default=20, help="how many, evenly from the folder (20)")
    options = parser.parse_args()
    if options.out.is_file() or (options.out.is_dir() and any(options.out.iterdir())):
        raise UserError(f"{options.out} exists already: name another folder, or remove it")
    check_writable(options.out, "OUT")
    paths = find_photos(options.folder)
    paths = [paths[i * len(paths) // options.photos] for i in range(min(options.photos, len(paths)))]
    cases = make_cases(Mixture())
    for number, path in enumerate(tqdm(paths, "blurring", unit="photo", disable=None)):
        sharp = to_tensor(read_photo(path))
        for case, mixture in cases.items():
            blurry, _ = random_degradation(sharp, make_generator(zlib.crc32(f"{case}/{path.stem}".encode())), mixture)
            folder = options.out / case / f"{number:03d}-{path.stem}"  # photos in sub-folders may share a name
            for name, image in ("blurry", blurry), ("sharp", sharp):
                with atomic(folder / f"{name}.png") as partial:
                    Image.fromarray(to_pixels(image)).save(partial, compress_level=3)
    print(f"{len(paths)} photos in {len(cases)} cases are in {options.out}")


def make_cases(mixture: Mixture) -> dict[str, Mixture]:
    """Name of a case -> a mixture that draws only this one."""
    noise = sum(mixture.noise_sigma) / 2
    fixed = dataclasses.replace(
        mixture,
        identity=0,
        camera=0,
        linear_light=0,
        then_rescale=0,
        noise=1,
        noise_rescaled=1,
        noise_sigma=(noise, noise),
        jpeg=0,
    )
    cases = {}
    for kind, name in RANGES.items():
        low, high = getattr(mixture, name)
        for value in low, math.sqrt(low * high), high:
            only = dataclasses.replace(fixed, blurs={kind: 1.0}, **{name: (value, value)})
            cases[f"{kind}-{value:.2f}"] = only
    middle = math.sqrt(mixture.sigma[0] * mixture.sigma[1])
    soft = dataclasses.replace(fixed, blurs={"gaussian": 1.0}, sigma=(middle, middle))
    cases["linear-light"] = dataclasses.replace(soft, linear_light=1)
    for sigma in mixture.noise_sigma:
        cases[f"noise-{sigma:.1f}"] = dataclasses.replace(soft, noise_sigma=(sigma, sigma))
    low, high = mixture.quality
    for quality in low, (low + high) / 2, high:
        cases[f"jpeg-{quality:.0f}"] = dataclasses.replace(soft, jpeg=1, quality=(quality, quality))
    return cases


if __name__ == "__main__":
    run_cli(main)
