"""One whole training on dummy pairs, and the claims of the loop."""

import csv
from itertools import pairwise

import pytest
import torch
from conftest import DEVICES
from PIL import Image
from torch import nn

import pretrain
import train
from dataset import PairedImageDataset
from models import StudentCNN, TeacherCNN, load_model, save_model
from train import Scores, as_given, fit, validate
from utils import PSNRAndSSIMLoss, UserError, quantize_8bit

CPU = torch.device("cpu")


def small_teacher(strength=0.02):
    """A teacher that changes the brightness of its input a little, so that there is something a student can learn."""
    teacher = TeacherCNN(width=4, deep_width=8, blocks=1, fine_blocks=1)
    nn.init.normal_(teacher.tail.weight, std=strength)
    teacher.tail.weight.data = teacher.tail.weight.data[:4].repeat(3, 1, 1, 1)  # of four pixels, alike for each colour
    return teacher.eval().requires_grad_(False)


@pytest.fixture
def run(pairs, tmp_path):
    """``fit`` on dummy pairs, two epochs of three steps unless told otherwise."""
    train_set, val_set = PairedImageDataset(pairs / "train", 32), PairedImageDataset(pairs / "val")

    def run(network, target_of=as_given, loss_fn=None, reference=None, best="best.pth", epochs=2, steps=3, **machine):
        settings = dict(NUM_EPOCHS=epochs, BATCH_SIZE=3, PATCHES_PER_PHOTO=steps, LEARNING_RATE=1e-2)
        machine = dict(outputs=tmp_path / "outputs", workers=0, compiled=False, checkpoint_minutes=5, resume=True) | machine
        machine.setdefault("device", CPU)
        loss_fn = loss_fn or nn.MSELoss()
        fit(
            "student", network, target_of, loss_fn, train_set, val_set, reference or {}, tmp_path / best, settings, **machine
        )

    run.train_set, run.val_set = train_set, val_set
    return run


@pytest.fixture
def constants(pairs, tmp_path, monkeypatch):
    """train.py's constants for a run of seconds in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    small = dict(NUM_EPOCHS=2, PATCHES_PER_PHOTO=3, BATCH_SIZE=2, PATCH_SIZE=32, DEVICE="cpu", NUM_WORKERS=0)
    for module in train, pretrain:
        for name, value in small.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(pretrain, "GAUGE_DRAWS", 2)
    monkeypatch.setattr(pretrain, "GAUGE_PASSES", 1)
    monkeypatch.setattr(train, "TEACHER_WEIGHTS", "teacher.pth")
    monkeypatch.setattr(train, "REQUIRE_GOOD_TEACHER", False)
    monkeypatch.setattr("report.ms_per_megapixel", lambda network, device: 1.0)  # which takes longer than all the rest
    save_model(tmp_path / "teacher.pth", small_teacher())
    return tmp_path


def test_main_leaves_a_student_a_table_curves_and_pictures(constants, capsys):
    (constants / "outputs").mkdir()
    (constants / "outputs" / "comparison_3.png").write_text("of an earlier training on more photos")
    train.main()
    student = load_model("best_student_model.pth")
    with open("outputs/student_epochs.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert student.metadata["val"]["ssim"] == pytest.approx(max(float(row["student_ssim"]) for row in rows))
    assert {float(row["input_ssim"]) for row in rows} == {float(rows[0]["input_ssim"])}
    assert not (constants / "outputs" / "comparison_3.png").exists()
    for name in "student_curves.png", "comparison_1.png":
        picture = Image.open(constants / "outputs" / name)
        assert min(picture.size) > 100 and len(picture.getcolors(1 << 24)) > 10
    printed, bars = capsys.readouterr()
    assert "student 2/2" in printed and "gain kept" in printed
    assert "\r" not in printed + bars, "bars do not go into a log file"


def test_main_teaches_a_teacher_first_where_there_are_no_weights(constants, monkeypatch):
    monkeypatch.setattr(train, "TEACHER_WEIGHTS", None)
    monkeypatch.setattr(train, "TeacherCNN", lambda: TeacherCNN(width=4, deep_width=8, blocks=1, fine_blocks=1))
    train.main()
    assert type(load_model("outputs/teacher.pth")) is TeacherCNN
    assert type(load_model("best_student_model.pth")) is StudentCNN
    for name in "teacher", "student":
        rows = list(csv.DictReader((constants / "outputs" / f"{name}_epochs.csv").read_text().splitlines()))
        assert [row["epoch"] for row in rows] == ["1", "2"]


def test_a_teacher_learns_at_its_own_rate_and_the_student_at_the_other(constants, monkeypatch):
    rates, fit = {}, train.fit
    monkeypatch.setattr(train, "TEACHER_WEIGHTS", None)
    monkeypatch.setattr(train, "TEACHER_LEARNING_RATE", 3e-4)
    monkeypatch.setattr(train, "TeacherCNN", lambda: TeacherCNN(width=4, deep_width=8, blocks=1, fine_blocks=1))

    def noted(name, *arguments, **machine):
        rates[name] = arguments[-1]["LEARNING_RATE"]
        return fit(name, *arguments, **machine)

    monkeypatch.setattr(train, "fit", noted)
    train.main()
    assert rates == {"teacher": 3e-4, "student": train.LEARNING_RATE}


@pytest.mark.parametrize("from_photos", [False, True])
def test_pretraining_on_pairs_or_on_photos_leaves_a_teacher(constants, monkeypatch, from_photos):
    monkeypatch.setattr(pretrain, "TeacherCNN", lambda: TeacherCNN(width=4, deep_width=8, blocks=1, fine_blocks=1))
    monkeypatch.setattr(pretrain, "PHOTOS", "data/train" if from_photos else None)
    pretrain.main()
    assert type(load_model("outputs/teacher.pth")) is TeacherCNN


def test_pretraining_goes_on_from_given_weights_and_says_where_it_does_not_beat_them(constants, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "START_FROM", "teacher.pth")
    monkeypatch.setattr(pretrain, "LEARNING_RATE", 1e-12)
    monkeypatch.setattr(pretrain, "GAUGE_LEARNING_RATE", 1e-12)
    pretrain.main()
    for weight, start in zip(*(load_model(f).parameters() for f in ("outputs/teacher.pth", "teacher.pth")), strict=True):
        torch.testing.assert_close(weight, start, atol=1e-6, rtol=0)
    printed = capsys.readouterr().out
    assert ", start " in printed and "It does not beat teacher.pth" in printed


def test_a_teacher_worse_than_the_input_stops_the_run_unless_allowed(constants, monkeypatch):
    save_model("teacher.pth", small_teacher(strength=0.5))
    monkeypatch.setattr(train, "REQUIRE_GOOD_TEACHER", True)
    with pytest.raises(
        UserError, match=r"teacher.pth does not beat the blurry input .* dB, SSIM .*REQUIRE_GOOD_TEACHER = False"
    ):
        train.main()
    assert not (constants / "best_student_model.pth").exists()


def test_a_perfect_teacher_passes_the_gate():
    train.check_teacher({"input": Scores(25, 0.7), "teacher": Scores(26, 0.71)}, "t", train.Path("data"), required=True)
    for worse in Scores(24, 0.71), Scores(26, 0.69), Scores(25, 0.7), Scores(float("nan"), float("nan")):
        with pytest.raises(UserError, match="does not beat"):
            train.check_teacher({"input": Scores(25, 0.7), "teacher": worse}, "t", train.Path("data"), required=True)


def test_the_student_learns_and_the_teacher_never_changes(run):
    teacher, student = small_teacher(), StudentCNN()
    before = [value.clone() for value in teacher.state_dict().values()]

    def distance():
        with torch.no_grad():
            return sum(float(nn.functional.mse_loss(student(b[None]), teacher(b[None]))) for b, _ in run.val_set)

    at_start = distance()
    run(student, lambda blurry, sharp, spectrum: teacher(blurry, spectrum), steps=40)
    assert distance() < 0.7 * at_start
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.state_dict().values(), strict=True))


@pytest.mark.parametrize("once", [True, False])
def test_without_its_weight_the_teacher_does_not_count(constants, monkeypatch, once):
    monkeypatch.setattr(train, "DISTILL_WEIGHT", 0)
    monkeypatch.setattr(train, "ASK_TEACHER_ONCE", once)
    students = []
    for seed in 1, 2:
        save_model("teacher.pth", small_teacher(strength=0.1 * seed))
        train.main()
        students.append(load_model("best_student_model.pth"))
    for one, other in zip(*(student.parameters() for student in students), strict=True):
        assert torch.equal(one, other)


def test_the_student_learns_the_teachers_output_and_not_the_sharp_photo(run):
    seen = []

    class Recorder(nn.Module):
        def forward(self, prediction, target):
            seen.append(target)
            return nn.functional.mse_loss(prediction, target)

    run(StudentCNN(), lambda blurry, sharp, spectrum: blurry * 0 + 0.25, Recorder())
    assert len(seen) == 6 and all((target == 0.25).all() for target in seen)
    assert all(target.dtype == torch.float32 for target in seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_weights(run, tmp_path, workers):
    weights = []
    for best in "a.pth", "b.pth":
        torch.manual_seed(5)
        student = StudentCNN(convs=2, num_experts=2, hidden=8)
        run(student, loss_fn=PSNRAndSSIMLoss(), best=best, outputs=tmp_path / best.removesuffix(".pth"), workers=workers)
        weights.append(student.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_best_epoch_is_kept_and_not_the_last(run, tmp_path, monkeypatch):
    values = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(train, "validate", lambda *_: Scores(20.0, next(values)))
    run(StudentCNN(), epochs=3)
    metadata = load_model(tmp_path / "best.pth").metadata
    assert metadata["epoch"] == 2 and metadata["val"]["ssim"] == 0.9


class FailsAtStep5(nn.MSELoss):
    """Stands for anything that goes wrong in the second epoch: calls ``fail`` on the loss."""

    steps = 0

    def __init__(self, fail):
        super().__init__()
        self.fail = fail

    def forward(self, prediction, target):
        self.steps += 1
        loss = super().forward(prediction, target)
        return self.fail(loss) if self.steps == 5 else loss


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_stops_with_a_sentence_and_keeps_the_best(run, tmp_path, value):
    with pytest.raises(UserError, match="no longer a finite number: lower LEARNING_RATE"):
        run(StudentCNN(), loss_fn=FailsAtStep5(lambda loss: loss * value))
    assert load_model(tmp_path / "best.pth").metadata["epoch"] == 1
    assert not (tmp_path / "outputs" / "last.pth").exists(), "going on from it would only fail again"


def interrupt(loss):
    raise KeyboardInterrupt


def test_ctrl_c_ends_with_the_best_so_far(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(StudentCNN(), loss_fn=FailsAtStep5(interrupt))
    assert caught.value.code == 130
    assert "Stopped after 1 of 2 epochs: the best so far" in capsys.readouterr().out
    assert load_model(tmp_path / "best.pth").metadata["epoch"] == 1


def test_validation_is_the_mean_over_photos_and_a_perfect_one_counts_50_db(run):
    scores = validate(nn.Identity(), run.val_set, CPU)
    each = [(train.psnr(b[None], s[None]).item(), train.ssim(b[None], s[None]).item()) for b, s in run.val_set]
    assert scores.psnr == pytest.approx(sum(p for p, _ in each) / 2, abs=1e-4)
    assert scores.ssim == pytest.approx(sum(s for _, s in each) / 2, abs=1e-6)
    assert validate(nn.Identity(), [(s, s) for _, s in run.val_set], CPU) == pytest.approx((50, 1))


@pytest.mark.parametrize(
    "constant, value",
    [
        ("BATCH_SIZE", 0),
        ("NUM_EPOCHS", -1),
        ("PATCHES_PER_PHOTO", 0),
        ("PATCH_SIZE", 32.0),
        ("SEED", -1),
        ("LEARNING_RATE", -1e-3),
        ("LEARNING_RATE", float("nan")),
    ],
)
@pytest.mark.parametrize("script", [train, pretrain])
def test_a_constant_out_of_range_is_one_sentence_before_any_work(constants, monkeypatch, script, constant, value):
    monkeypatch.setattr(script, constant, value)
    with pytest.raises(UserError, match=f"{constant} = {value!r} is not a "):
        script.main()
    assert not (constants / "outputs").exists() and not (constants / "data" / "train" / ".cache").exists()


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan"), "1"])
def test_a_share_of_the_teacher_outside_0_to_1_is_one_sentence(constants, monkeypatch, weight):
    monkeypatch.setattr(train, "DISTILL_WEIGHT", weight)
    with pytest.raises(UserError, match=f"DISTILL_WEIGHT = {weight!r} is not a number from 0 to 1"):
        train.main()


def test_the_learning_rate_rises_and_then_falls_to_zero():
    factors = [train.warmup_cosine(step, 1000) for step in range(1001)]
    assert factors[0] < 0.03 and max(factors) == factors[50] == 1 and factors[1000] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(factors[50:]))


def all_batches(train_set, workers, device=CPU):
    return [[part.cpu() for part in batch] for batch in train.start_batches(train_set, device, range(2, 6), 3, workers)]


def equal(batches, others):
    return all(
        torch.equal(a, b) for one, other in zip(batches, others, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_batches_are_the_same_from_workers_and_from_memory(run):
    run.train_set.cache_teacher_outputs(small_teacher(), CPU)
    from_disk = all_batches(run.train_set, 0)
    assert len(from_disk) == 4 and len(from_disk[0]) == 3 and from_disk[0][0].shape == (3, 3, 32, 32)
    assert torch.equal(from_disk[0][0][1], run.train_set[7][0]), "step 2 of batches of 3 starts with patch 6"
    assert equal(from_disk, all_batches(run.train_set, 2))
    run.train_set.load_onto(CPU, room=1000)
    assert not run.train_set.on_device, "they take more than that"
    run.train_set.load_onto(CPU, room=10**9)
    assert run.train_set.on_device and equal(from_disk, all_batches(run.train_set, 2))


def test_compiled_in_place_a_student_learns_and_is_saved_under_the_same_names(run, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(StudentCNN, "compile", lambda network: compiled.append(network))  # a C++ compiler may be absent
    run(StudentCNN(), compiled=True)
    assert len(compiled) == 1 and load_model(tmp_path / "best.pth").state_dict().keys() == StudentCNN().state_dict().keys()


@pytest.mark.parametrize("device", DEVICES)
def test_a_student_learns_from_photos_that_lie_on_its_device_and_goes_on_after_an_interruption(run, tmp_path, device):
    device, teacher = torch.device(device), TeacherCNN(width=4, deep_width=8, blocks=1, fine_blocks=1).to(device)
    nn.init.constant_(teacher.tail.bias, 0.05)  # brighter: answers that are turned with their photos must stay answers
    student, again = StudentCNN().to(device), StudentCNN().to(device)
    run.train_set.cache_teacher_outputs(teacher, device)
    from_disk = all_batches(run.train_set, 0, device)
    run.train_set.load_onto(device, room=10**9)
    assert run.train_set.on_device and equal(from_disk, all_batches(run.train_set, 0, device))

    def distance(student):
        with torch.no_grad():
            photos = [blurry[None].to(device) for blurry, _ in run.val_set]
            return sum(float(nn.functional.mse_loss(student(photo), quantize_8bit(teacher(photo)))) for photo in photos)

    at_start, loss_fn = distance(student), FailsAtStep5(interrupt)
    with pytest.raises(SystemExit):
        run(student, train.as_given, loss_fn, steps=4, epochs=10, device=device)
    run(again, train.as_given, loss_fn, steps=4, epochs=10, device=device)
    assert distance(again) < 0.1 * at_start
