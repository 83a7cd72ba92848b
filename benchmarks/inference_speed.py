"""How long one 1920x1080 frame takes, from 8-bit pixels in memory to 8-bit pixels in memory.

    python benchmarks/inference_speed.py
    python benchmarks/inference_speed.py --threads 1 --size 3840x2160

Each method processes some frames one after another, as in a video, in three rounds. "Convolutions alone" are those of the
fused student on tensors that are already there: the limit. Untrained networks are as fast as trained ones. Close
other programs first.
"""

import sys
import time
from pathlib import Path

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from cli import CliParser, parse_size, run_cli, whole_number
from inference import FusedStudent, sharpen_pixels
from models import StudentCNN, TeacherCNN
from training.distributed import init_distributed
from utils import count_parameters, gmac_per_megapixel


def main() -> None:
    parser = CliParser(__doc__)
    parser.add_argument("--size", default="1920x1080", help="WIDTHxHEIGHT of the frame")
    parser.add_argument("--threads", type=whole_number(1, 1024), help="of torch on the CPU; all cores, if not given")
    parser.add_argument("--rounds", type=whole_number(1), default=15, help="frames of each method in each round")
    parser.add_argument("--slow-rounds", type=whole_number(1), default=2, help="the same for what takes seconds on a CPU")
    options = parser.parse_args()
    height, width = parse_size("--size", options.size)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = init_distributed("auto")
    sizes = [(height, width)] if device.type == "cpu" else [(height, width), (2160, 3840)]
    print(f"torch {torch.__version__} on {device}, {torch.get_num_threads()} threads")
    for size in sizes:
        measure(*size, device, options.rounds, options.slow_rounds)


ROUNDS = 3
SLOW = {"teacher", "scipy Gaussian unsharp mask", "student, float32"}


def measure(height: int, width: int, device: torch.device, rounds: int, slow_rounds: int) -> None:
    frame = example_frame(height, width)
    torch.manual_seed(0)
    student, teacher = (kind().eval().requires_grad_(False).to(device) for kind in (StudentCNN, TeacherCNN))
    nn.init.normal_(student.convs[-1].base.weight, std=0.05)
    for network in student, teacher:
        network.to(memory_format=torch.channels_last)
    fused, plain = FusedStudent(student), FusedStudent(student, torch.float32)
    picture, pillow = torch.from_numpy(frame).to(device), Image.fromarray(frame)
    convolutions = ConvolutionsAlone(fused, picture)
    name = f"student, fused ({str(fused.dtype).removeprefix('torch.')})"
    ways = {
        name: lambda: fused(picture),
        "student, float32": lambda: in_float32(student, picture),
        "student, fused in float32": lambda: plain(picture),
        "convolutions alone": convolutions.run,
        "Pillow UnsharpMask(2, 150, 3)": lambda: pillow.filter(ImageFilter.UnsharpMask(2, 150, 3)),
        "scipy Gaussian unsharp mask": lambda: scipy_unsharp(frame),
        "teacher": lambda: sharpen_pixels(teacher, frame, 1.0, device),
    }
    if device.type == "cuda":
        ways["student, fused, 8 frames"] = lambda: [fused(picture) for _ in range(8)]
    seconds = {way: [] for way in ways}
    for _ in range(ROUNDS):  # frames of one method follow each other, as in a video
        for way, run in ways.items():
            count = slow_rounds if way in SLOW else rounds
            for done in range(-2, count):  # two to warm up
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if done >= 0:
                    seconds[way].append(time.perf_counter() - start)
    networks = {"student": student, "teacher": teacher}
    print(f"\none frame of {width}x{height}          median ms  95th percentile   parameters  GMAC a frame")
    middle = {}
    for way, spent in seconds.items():
        middle[way], slow = np.median(spent) * 1000, np.percentile(spent, 95) * 1000
        network = networks.get(way.split(",")[0])
        gmac = network and gmac_per_megapixel(network) * height * width / 1e6
        columns = f"{count_parameters(network):12,d} {gmac:13.1f}" if network else ""
        print(f"{way:32s} {middle[way]:8.1f} {slow:16.1f} {columns}")
    others = [way for way in ways if way != name]
    print("fused student / " + ", / ".join(f"{way} {middle[name] / middle[way]:.2f}" for way in others))


def example_frame(height: int, width: int) -> np.ndarray:
    with Image.open(Path(skimage.__file__).parent / "data" / "coffee.png") as picture:
        return np.array(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


@torch.inference_mode()
def in_float32(student: nn.Module, picture: Tensor) -> Tensor:
    photo = picture.movedim(-1, 0)[None].float().div(255)
    return student(photo).clamp(0, 1).mul(255).round().byte()[0].movedim(0, -1).contiguous()


def scipy_unsharp(frame: np.ndarray) -> np.ndarray:
    values = frame.astype(np.float32)
    values += 1.5 * (values - gaussian_filter(values, (2, 2, 0)))
    return values.round().clip(0, 255).astype(np.uint8)


class ConvolutionsAlone:
    """Those of ``fused`` for ``picture``, without everything between them."""

    def __init__(self, fused: FusedStudent, picture: Tensor):
        calls = self.calls = []

        def noted(convolution):
            def run(x, *layer, **arguments):
                calls.append((convolution, x.clone(), layer, arguments))
                return convolution(x, *layer, **arguments)

            return run

        kept = F.conv2d, F.conv_transpose2d
        F.conv2d, F.conv_transpose2d = map(noted, kept)
        try:
            fused(picture)
        finally:
            F.conv2d, F.conv_transpose2d = kept

    @torch.inference_mode()
    def run(self) -> None:
        for convolution, x, layer, arguments in self.calls:
            convolution(x, *layer, **arguments)


if __name__ == "__main__":
    run_cli(main)
