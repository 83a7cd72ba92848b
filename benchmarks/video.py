"""How evenly the student sharpens a video, frame by frame and with ``VideoSharpener``.

    python benchmarks/video.py
    python benchmarks/video.py --weights best_student_model.pth --frames 200

A camera moves over a soft portrait, with more or less noise and compression. The sharpening of a frame is the ratio of mean
gradients of output and input; printed is by how many percent it changes from one frame to the next.
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage import data

sys.path.insert(0, str(Path(__file__).parent.parent))
from cli import CliParser, run_cli, whole_number
from inference import Sharpener, VideoSharpener
from models import load_model
from utils import pick_device

DEGRADATIONS = {
    "clean": (0, 95),
    "noise 4, JPEG 80": (4, 80),
    "noise 10, JPEG 60": (10, 60),
}  # sigma in gray levels, quality


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent.parent / "weights" / "student.pth")
    parser.add_argument("--frames", type=whole_number(2), default=60)
    options = parser.parse_args()
    sharpener = Sharpener(load_model(options.weights), pick_device())
    print(f"{'change from frame to frame, %':32s} {'mean':>6s} {'largest':>8s} {'sharpening':>11s}")
    for kind, (noise, quality) in DEGRADATIONS.items():
        frames = list(pan(options.frames, noise, quality))
        for name, sharpen in ("frame by frame", sharpener), ("video", VideoSharpener(sharpener)):
            ratios = np.array([mean_gradient(sharpen(frame)) / mean_gradient(frame) for frame in frames])
            changes = np.abs(ratios[1:] / ratios[:-1] - 1) * 100
            print(f"{kind + ', ' + name:32s} {changes.mean():6.2f} {changes.max():8.2f} {ratios.mean():11.3f}")


def pan(count: int, noise: float, quality: int, height: int = 288, width: int = 352) -> Iterator[np.ndarray]:
    """Frames, (height, width, 3) uint8, of a camera that moves to and fro by up to 3 pixels a frame."""
    soft, rng = gaussian_filter(data.astronaut().astype(float), (1.5, 1.5, 0)), np.random.default_rng(0)
    for k in range(count):
        top, left = (round((room / 2) * (1 - np.cos(2 * k / room))) for room in (512 - height, 512 - width))
        view = soft[top : top + height, left : left + width] + rng.normal(0, noise, (height, width, 3))
        file = io.BytesIO()
        Image.fromarray(view.round().clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
        yield np.array(Image.open(file))


def mean_gradient(frame: np.ndarray) -> float:
    return sum(np.abs(np.diff(frame.astype(float), axis=axis)).mean() for axis in (0, 1))


if __name__ == "__main__":
    run_cli(main)
