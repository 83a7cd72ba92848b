import pickle

import pytest
import torch
from conftest import dummy_photo, gmac_of, texture

import fused_student
import inference
from blocks import OutputLinear, luma, smooth_chroma
from blur.filters import convolve, gaussian_kernel, line_kernel
from blur.noise import photo_spectra
from blur.spectrum import log_power_spectrum
from fused_student import FusedStudent
from inference import run_tiled
from models import StudentCNN, TeacherCNN, copy_estimator, load_model, save_model
from utils import UserError, quantize_8bit, to_pixels, to_tensor

SMALL = {
    TeacherCNN: dict(width=4, deep_width=8, hidden=[8, 8], fine_blocks=1),
    StudentCNN: dict(convs=2, num_experts=3, hidden=8),
}


def trained(network):
    """The network with random weights in place of the zeros it starts with."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize("network_class", [TeacherCNN, StudentCNN])
def test_an_untrained_network_gives_the_photo_back(network_class):
    photo = torch.rand(2, 3, 22, 35)
    torch.testing.assert_close(network_class()(photo), photo, atol=1e-6, rtol=0)


@pytest.mark.parametrize("network_class", [TeacherCNN, StudentCNN])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (5, 4), (7, 1), (8, 8), (30, 33), (67, 131)])
def test_any_size_comes_out_as_it_went_in(network_class, size):
    network = trained(network_class(**SMALL[network_class]))
    output = network(torch.rand(1, 3, *size))
    assert output.shape == (1, 3, *size) and torch.isfinite(output).all()


@pytest.mark.parametrize("network_class", [TeacherCNN, StudentCNN])
def test_padding_does_not_reach_far_into_the_photo(network_class):
    network = trained(network_class(**SMALL[network_class]))
    photo = torch.rand(1, 3, 168, 168)
    described = torch.cat([log_power_spectrum(photo), photo_spectra(photo)], 1)
    whole, cropped = network(photo, described), network(photo[..., :167, :166], described)
    assert torch.allclose(whole[..., :40, :40], cropped[..., :40, :40], atol=1e-5)


@pytest.mark.parametrize("size", [(200, 333), (97, 500), (64, 64)])
def test_tiles_give_what_the_whole_photo_gives(size, monkeypatch):
    """By a student; by a teacher in test_local.py, where the blur differs, too."""
    network = trained(StudentCNN(**SMALL[StudentCNN])).double()  # so that rounding hides nothing
    photo = torch.rand(1, 3, *size, dtype=torch.float64)
    monkeypatch.setattr(inference, "TILE", 64)
    with torch.no_grad():
        assert torch.allclose(run_tiled(network, photo), network(photo), atol=1e-12, rtol=0)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("network_class", [TeacherCNN, StudentCNN])
def test_a_network_draws_nothing_into_black_or_white_bars(network_class, level):
    network = trained(network_class(**SMALL[network_class]))
    photo = torch.full((1, 3, 120, 90), float(level))
    photo[..., 30:90, :] = quantize_8bit(torch.rand(1, 3, 60, 90))
    outputs = [network(photo)]
    if network_class is StudentCNN:
        picture = torch.from_numpy(to_pixels(photo[0]))
        outputs += [to_tensor(FusedStudent(network, torch.float32, strength)(picture))[None] for strength in (1.0, 0.4)]
    for output in outputs:
        assert (output - photo)[..., 30:90, :].abs().max() > 0.02
        assert torch.equal(output[..., :30, :], photo[..., :30, :]) and torch.equal(output[..., 90:, :], photo[..., 90:, :])


def test_a_teacher_computes_the_same_whether_gradients_are_recorded_or_not():
    teacher, photo = trained(TeacherCNN(**SMALL[TeacherCNN])), torch.rand(1, 3, 70, 90)
    recorded = teacher(photo).detach()
    with torch.no_grad():
        assert torch.equal(teacher(photo), recorded)


@pytest.mark.parametrize("network_class", [TeacherCNN, StudentCNN])
def test_a_network_looks_no_further_than_its_receptive_radius(network_class):
    network = trained(network_class(**SMALL[network_class])).double()
    photo = torch.rand(1, 3, 320, 320, dtype=torch.float64, requires_grad=True)
    network(photo)[..., 160, 160].sum().backward()
    seen = (photo.grad.abs().sum(dim=(0, 1)) > 1e-10).nonzero()  # a Fourier transform rounds everywhere
    furthest = int((seen - 160).abs().max())
    assert 0.6 * network.receptive_radius < furthest <= network.receptive_radius


@pytest.mark.parametrize("kernel", [gaussian_kernel(1.5), line_kernel(9, 0.4)])
def test_the_filter_of_the_blurriest_windows_is_used_where_a_photo_is_blurry(kernel):
    """By both networks, before they are trained."""
    photo = texture(320, 448)
    photo[..., :240, 288:] = convolve(photo, kernel[None, None])[..., :240, 288:]
    teacher, student = TeacherCNN(), StudentCNN()
    blur = teacher.estimate_blur(photo)
    gates = [(teacher.gate[0] * blur.softness[0, ..., 0] + teacher.gate[1]).sigmoid()]
    seen = []
    student.gain_map.register_forward_hook(lambda module, inputs, gains: seen.append(gains[0, 1, 2::4, 2::4]))
    student(photo)
    for gate in gates + seen:
        assert gate.shape == (20, 28)
        assert gate[:14, 19:].mean() > 0.9 and gate[:, :17].mean() < 0.1


def a_student_with_experts():
    """What a trained student may look like: it changes a photo by about .05, and by its description."""
    torch.manual_seed(2)
    student = StudentCNN()
    for name, parameter in student.named_parameters():
        if not name.startswith("estimator"):
            torch.nn.init.normal_(parameter, std=0.04)
    for layer in student.modules():
        if isinstance(layer, OutputLinear):  # divides its inputs
            torch.nn.init.normal_(layer.weight, std=0.04 * layer.in_features)
    torch.nn.init.constant_(student.chroma_head.bias, -20.0)  # no smooth chroma, which is rounded when it is fused
    return student.eval()


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (33, 50), (96, 128), (1003, 1405)])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_fused_student_gives_in_float32_what_the_student_gives(size, strength):
    student = a_student_with_experts()
    picture = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    photo = picture.movedim(-1, 0)[None].float() / 255
    with torch.no_grad():
        change = student(photo) - photo
    expected = ((photo + strength * change).clamp(0, 1) * 255)[0].movedim(0, -1)
    assert change.abs().max() > 0.01
    result = FusedStudent(student, torch.float32, strength)(picture)
    assert result.dtype == torch.uint8 and (result - expected).abs().max() < 0.51


def test_short_runs_of_equal_pixels_in_a_large_picture_stay_as_they_are():
    student, picture = a_student_with_experts(), torch.randint(0, 200, (640, 600, 3), dtype=torch.uint8)
    for top, left in (0, 0), (250, 101), (505, 300), (626, 586):  # 14x14 saturated pixels
        picture[top : top + 14, left : left + 14] = 250
    with torch.no_grad():
        expected = student(picture.movedim(-1, 0)[None] / 255)[0].movedim(0, -1).clamp(0, 1) * 255
    result = FusedStudent(student, torch.float32)(picture)
    assert (result - expected).abs().max() < 0.51
    assert (result[254:260, 105:111] == 250).all()


def test_the_bands_of_the_fused_student_give_what_one_band_gives(monkeypatch):
    picture, fused = torch.from_numpy(dummy_photo(161, 66, seed=2)), FusedStudent(a_student_with_experts(), torch.float32)
    whole = fused(picture)
    monkeypatch.setattr(fused_student, "BAND_PIXELS", 16 * 66)
    assert (fused(picture).int() - whole).abs().max() <= 1 and (whole.int() - picture).abs().max() > 20


def test_smooth_chroma_takes_color_noise_away_and_leaves_luma():
    generator = torch.Generator().manual_seed(0)
    clean = torch.linspace(0.2, 0.7, 131).expand(2, 3, 67, 131) * torch.tensor([1.0, 0.8, 0.6]).view(3, 1, 1)
    noisy = clean + 0.05 * torch.randn(clean.shape, generator=generator)
    change = smooth_chroma(noisy, torch.tensor([[0.0], [1.0]]))
    assert not change[0].any() and smooth_chroma(noisy, torch.full((2, 1), 0.01)).abs().max() < 0.011
    torch.testing.assert_close(luma(change), torch.zeros(2, 1, 67, 131), atol=1e-6, rtol=0)
    before, after = (((image - luma(image)) - (clean - luma(clean)))[1].std() for image in (noisy, noisy + change))
    assert after < 0.3 * before
    gray = noisy[:, :1].expand(-1, 3, -1, -1)
    assert smooth_chroma(gray, torch.ones(2, 1)).abs().max() < 1e-6


def test_smooth_chroma_keeps_colored_edges_that_are_above_the_limit():
    red_and_blue = torch.zeros(1, 3, 32, 64)
    red_and_blue[:, 0, :, :30], red_and_blue[:, 2, :, 30:] = 0.8, 0.8
    change = smooth_chroma(red_and_blue, torch.tensor([[0.02]]))
    assert 0.019 < change.abs().max() < 0.021 and change[..., :20].abs().max() < 1e-6


def test_chroma_is_smoothed_only_if_the_predicted_limit_is_above_0_in_the_fused_student_too():
    student = trained(StudentCNN(**SMALL[StudentCNN]))
    picture = torch.from_numpy(dummy_photo(203, 301, seed=1))
    photo = to_tensor(picture)[None]
    results = []
    for bias in (-20.0, 200.0):
        torch.nn.init.zeros_(student.chroma_head.weight)
        torch.nn.init.constant_(student.chroma_head.bias, bias)
        with torch.no_grad():
            results.append(quantize_8bit(student(photo)))
            limit = student.predict_weights(student.estimate_blur(photo)).chroma_limit
            assert limit == 0 if bias < 0 else limit > 0.02
        fused = to_tensor(FusedStudent(student, torch.float32)(picture))
        assert (fused - results[-1][0]).abs().max() < 1.01 / 255
    assert (results[0] - results[1]).abs().max() > 3 / 255


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_student_in_16_bits_is_50_dB_from_the_student(dtype):
    student = a_student_with_experts()
    picture = torch.from_numpy(dummy_photo(256, 320, seed=4))
    photo = picture.movedim(-1, 0)[None].float() / 255
    with torch.no_grad():
        expected = student(photo).clamp(0, 1)[0].movedim(0, -1)
    assert psnr_of(photo[0].movedim(0, -1), expected) < 40, "there is something to be compared"
    assert psnr_of(FusedStudent(student, dtype)(picture) / 255, expected) > 50


def test_the_fused_student_does_not_overflow_in_float16():
    student = a_student_with_experts()
    student.convs[0].base.weight.data *= 40  # activations of some thousands on a scale of 255
    student.convs[-1].base.weight.data /= 40
    student.convs[-1].weight.data /= 40
    picture = torch.from_numpy(dummy_photo(64, 64, seed=4))
    exact, half = (FusedStudent(student, dtype)(picture) / 255 for dtype in (torch.float32, torch.float16))
    assert psnr_of(half, exact) > 45


def test_the_fused_student_reports_values_that_are_not_finite():
    student = a_student_with_experts()
    student.convs[-1].base.bias.data[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        FusedStudent(student, torch.float32)(torch.zeros(20, 20, 3, dtype=torch.uint8))


def test_the_fused_student_reports_a_limit_of_chroma_that_is_not_finite():
    student = trained(StudentCNN(**SMALL[StudentCNN]))
    torch.nn.init.constant_(student.chroma_head.bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        FusedStudent(student, torch.float32)(torch.zeros(20, 20, 3, dtype=torch.uint8))


def psnr_of(a, b):
    return -10 * (a - b).square().mean().log10()


def test_the_student_is_a_small_fraction_of_the_teacher():
    assert gmac_of(StudentCNN) * 50 < gmac_of(TeacherCNN)


def test_a_student_reuses_the_estimator_of_its_teacher_and_does_not_train_it():
    teacher, student = trained(TeacherCNN(**SMALL[TeacherCNN])), StudentCNN(**SMALL[StudentCNN])
    copy_estimator(teacher, student)
    described = log_power_spectrum(torch.rand(1, 3, 80, 80), with_blurriest=True)
    assert torch.equal(teacher.student_estimator(described)[0], student.estimator(described)[0])
    assert not any(parameter.requires_grad for parameter in student.estimator.parameters())
    assert all(parameter.requires_grad for parameter in student.convs.parameters())
    small = TeacherCNN(**SMALL[TeacherCNN])
    assert copy_estimator(teacher, small) and torch.equal(teacher.estimator(described)[0], small.estimator(described)[0])
    assert not copy_estimator(torch.nn.Conv2d(3, 3, 1), student), "a network of another kind has none to give"


@pytest.mark.parametrize("network_class", [TeacherCNN, StudentCNN])
def test_a_saved_network_comes_back_with_its_arguments_weights_and_metadata(network_class, tmp_path):
    network = trained(network_class(**SMALL[network_class]))
    save_model(tmp_path / "a.pth", network, data="dummy", psnr=31.5, steps=[1, 2])
    loaded = load_model(tmp_path / "a.pth")
    photo = torch.rand(1, 3, 12, 12)
    assert type(loaded) is network_class and not loaded.training
    assert torch.equal(loaded(photo), network(photo))
    assert loaded.metadata == {"data": "dummy", "psnr": 31.5, "steps": [1, 2]}


def test_what_cannot_be_loaded_safely_is_refused_before_writing(tmp_path):
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        save_model(tmp_path / "a.pth", StudentCNN(), psnr=torch.tensor(1.0))
    network = torch.nn.ReLU()
    network.arguments = {"activation": torch.nn.ReLU}
    with pytest.raises(TypeError, match="type is not JSON serializable"):
        save_model(tmp_path / "a.pth", network)
    assert not list(tmp_path.iterdir())


def bad_files(folder):
    good = folder / "good.pth"
    save_model(good, StudentCNN(**SMALL[StudentCNN]))
    content = torch.load(good, weights_only=True)
    (folder / "empty.pth").touch()
    (folder / "text.pth").write_text("not weights")
    content_of_file = good.read_bytes()
    middle = len(content_of_file) // 2
    inverted = bytes(255 - value for value in content_of_file[middle : middle + 500])
    (folder / "inverted.pth").write_bytes(content_of_file[:middle] + inverted + content_of_file[middle + 500 :])
    (folder / "cut.pth").write_bytes(good.read_bytes()[:3000])
    torch.save(StudentCNN().state_dict(), folder / "foreign.pth")
    torch.save({**content, "class": "UNet"}, folder / "unknown.pth")
    torch.save({**content, "class": "load_model"}, folder / "function.pth")
    torch.save({**content, "class": "TeacherCNN"}, folder / "other.pth")
    torch.save({**content, "arguments": {"num_experts": 5}}, folder / "mismatch.pth")
    nan = {**content, "weights": {**content["weights"], "router.bias": torch.full((3,), torch.nan)}}
    torch.save(nan, folder / "nan.pth")


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("missing", "is not a file"),
        ("empty", "damaged or was not written by these scripts"),
        ("text", "damaged or was not written by these scripts"),
        ("inverted", "damaged or was not written by these scripts"),
        ("cut", "damaged or was not written by these scripts"),
        ("foreign", "was not written by save_model"),
        ("unknown", "contains a UNet, which models.py does not define"),
        ("function", "contains a load_model, which models.py does not define"),
        ("other", "does not fit TeacherCNN"),
        ("mismatch", "does not fit StudentCNN"),
        ("nan", "not finite"),
    ],
)
def test_a_bad_weight_file_is_one_sentence_that_names_it(tmp_path, name, sentence):
    bad_files(tmp_path)
    with pytest.raises(UserError, match=sentence) as caught:
        load_model(tmp_path / f"{name}.pth")
    assert f"{name}.pth" in str(caught.value) and "\n" not in str(caught.value)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_weight_file_is_never_run(tmp_path, save):
    target = tmp_path / "ran"
    save({"class": "StudentCNN", "metadata": Bomb(target)}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="is damaged or was not written by these scripts"):
        load_model(tmp_path / "bomb.pth")
    assert not target.exists()
