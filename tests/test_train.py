"""One whole training on dummy pairs, and the claims of the loop."""

import csv
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import FailsInEpoch2, interrupt, small_teacher
from PIL import Image
from torch import nn

import pretrain
import train
from models import StudentCNN, TeacherCNN, load_model, save_model
from training.loop import check_teacher, load_batches, validate
from training.run import warmup_cosine
from training.teacher_cache import cache_teacher_outputs
from utils import Scores, UserError, psnr, ssim

CPU = torch.device("cpu")


def test_main_leaves_a_student_a_table_curves_and_pictures(constants, capsys):
    train.main()
    student = load_model("best_student_model.pth")
    with open("outputs/student_epochs.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert student.metadata["val"]["ssim"] == pytest.approx(max(float(row["student_ssim"]) for row in rows))
    assert {float(row["input_ssim"]) for row in rows} == {float(rows[0]["input_ssim"])}
    assert not (constants / "outputs" / "student_checkpoint.pth").exists(), "there is nothing to resume"
    assert load_model("outputs/student_last.pth").metadata["epoch"] == train.NUM_EPOCHS
    for name in "student_curves.png", "comparison_1.png":
        picture = Image.open(constants / "outputs" / name)
        assert min(picture.size) > 100 and len(picture.getcolors(1 << 24)) > 10
    printed, bars = capsys.readouterr()
    assert "student 2/2" in printed and "gain kept" in printed
    assert "\r" not in printed + bars, "bars do not go into a log file"


@pytest.mark.parametrize("gain", [1, -1])
def test_a_student_that_does_not_beat_the_input_is_not_recommended(constants, monkeypatch, capsys, gain):
    scores = iter([Scores(25, 0.7), Scores(27, 0.8), *[Scores(25 + gain, 0.7 + gain / 100)] * train.NUM_EPOCHS])
    monkeypatch.setattr(train, "validate", lambda network, data, device: next(scores))
    train.main()
    printed = capsys.readouterr().out
    assert ("Next: python sharpen.py" in printed, "does not beat the blurry input in PSNR" in printed) == (
        gain > 0,
        gain < 0,
    )


@pytest.mark.parametrize("psnr, recommended", [(26, True), (24, False)])
def test_a_teacher_that_does_not_beat_the_input_is_not_recommended(constants, monkeypatch, capsys, psnr, recommended):
    scores = iter([Scores(25, 0.7), Scores(24, 0.71), Scores(psnr, 0.8), Scores(27, 0.72)])  # input, start, two epochs
    monkeypatch.setattr(pretrain, "validate", lambda network, data, device: next(scores))
    monkeypatch.setattr(pretrain, "START_FROM", "teacher.pth")
    pretrain.main()
    printed = capsys.readouterr().out
    assert ("Next: set TEACHER_WEIGHTS" in printed, "does not beat the blurry input in PSNR" in printed) == (
        recommended,
        not recommended,
    )


def test_the_shipped_teacher_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(train.TEACHER_WEIGHTS).is_file()


@pytest.mark.parametrize("from_photos", [False, True])
def test_pretraining_on_pairs_or_on_photos_leaves_a_teacher(constants, monkeypatch, from_photos):
    monkeypatch.setattr(pretrain, "TeacherCNN", lambda: TeacherCNN(width=4, deep_width=8, hidden=[8], fine_blocks=1))
    for file in (constants / "data").glob("*/*/sharp.png") if from_photos else []:
        file.with_name("blurry.png").unlink()
    monkeypatch.setattr(pretrain, "PHOTOS", "data" if from_photos else None)
    pretrain.main()
    assert type(load_model("outputs/teacher.pth")) is TeacherCNN


def test_pretraining_goes_on_from_given_weights_and_says_where_it_does_not_beat_them(constants, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "START_FROM", "teacher.pth")
    monkeypatch.setattr(pretrain, "LEARNING_RATE", 1e-12)
    monkeypatch.setattr(pretrain, "ESTIMATOR_LEARNING_RATE", 1e-12)
    pretrain.main()
    for weight, start in zip(*(load_model(f).parameters() for f in ("outputs/teacher.pth", "teacher.pth")), strict=True):
        torch.testing.assert_close(weight, start, atol=1e-6, rtol=0)
    printed = capsys.readouterr().out
    assert ", start " in printed and "The teacher does not beat the one it started from" in printed


@pytest.mark.parametrize("loss", [nn.MSELoss, nn.L1Loss])
def test_the_weight_of_a_photo_is_in_the_gradient_of_any_loss(constants, monkeypatch, loss):
    monkeypatch.setattr(train.nn, "MSELoss", loss)
    monkeypatch.setattr(train, "NUM_EPOCHS", 1)
    changed = []
    for weight in 0.0, 1.0:
        monkeypatch.setattr(train, "relative_weight", lambda mse, w=weight: torch.full((len(mse), 1, 1, 1), w))
        train.main()
        changed.append(any(parameter.any() for parameter in load_model("best_student_model.pth").kernel_head.parameters()))
    assert changed == [False, True], "without a gradient zeros stay zeros"


def test_it_trains_on_blurry_photos_alone_if_all_targets_are_the_teachers(constants, monkeypatch, capsys):
    for file in (constants / "data" / "train").glob("*/sharp.png"):
        file.unlink()
    train.main()
    assert "3 training photos have no sharp.png" in capsys.readouterr().out
    student = load_model("best_student_model.pth")
    assert any(parameter.any() for parameter in student.kernel_head.parameters()), "zeros at the start"
    for constant, value in ("DISTILL_WEIGHT", 0.5), ("CACHE_TEACHER", False):
        with monkeypatch.context() as context:
            context.setattr(train, constant, value)
            with pytest.raises(
                UserError, match=r"sharp\.png is missing.*train\.py needs no sharp\.png if DISTILL_WEIGHT = 1"
            ):
                train.main()


def test_a_teacher_worse_than_the_input_stops_the_run_unless_allowed(constants, monkeypatch):
    save_model("teacher.pth", small_teacher(strength=0.5))
    monkeypatch.setattr(train, "REQUIRE_GOOD_TEACHER", True)
    with pytest.raises(
        UserError, match=r"teacher.pth does not beat the blurry input on data.val: .*train .*REQUIRE_GOOD_TEACHER = False"
    ):
        train.main()
    assert not (constants / "best_student_model.pth").exists()


def test_a_perfect_teacher_passes_the_gate():
    check_teacher({"input": Scores(25, 0.7), "teacher": Scores(26, 0.71)}, "t", Path("data"), required=True)
    for worse in Scores(24, 0.71), Scores(26, 0.69), Scores(25, 0.7), Scores(float("nan"), float("nan")):
        with pytest.raises(UserError, match="does not beat"):
            check_teacher({"input": Scores(25, 0.7), "teacher": worse}, "t", Path("data"), required=True)


def test_the_student_learns_and_the_teacher_never_changes(run):
    teacher, student = small_teacher(), StudentCNN()
    before = [value.clone() for value in teacher.state_dict().values()]

    def distance():
        with torch.no_grad():
            return sum(float(nn.functional.mse_loss(student(b[None]), teacher(b[None]))) for b, _ in run.val_set)

    at_start = distance()
    run(student, lambda blurry, sharp, spectrum: teacher(blurry, spectrum), epochs=1, steps=20, learning_rate=1e-3)
    assert distance() < 0.7 * at_start
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.state_dict().values(), strict=True))


@pytest.mark.parametrize("once", [True, False])
def test_without_its_weight_the_teacher_does_not_count(constants, monkeypatch, once):
    for constant, value in dict(DISTILL_WEIGHT=0, CACHE_TEACHER=once, NUM_EPOCHS=1).items():
        monkeypatch.setattr(train, constant, value)
    students, teacher = [], small_teacher()
    for _ in range(2):  # teachers that share an estimator, as students of both do
        nn.init.normal_(teacher.tail.weight, std=0.1)
        save_model("teacher.pth", teacher)
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


def test_the_same_seed_gives_the_same_weights_with_0_and_with_2_workers(run, tmp_path):
    weights = []
    for best, workers in ("a.pth", 0), ("b.pth", 2):
        torch.manual_seed(5)
        student = StudentCNN(convs=2, num_experts=2, hidden=8)
        run(student, loss_fn=nn.L1Loss(), best=best, outputs=tmp_path / best.removesuffix(".pth"), num_workers=workers)
        weights.append(student.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_what_is_kept_is_a_moving_average_of_the_weights_after_each_step(run, tmp_path, monkeypatch):
    monkeypatch.setattr("training.run.EMA_SHARE", 0.25)  # two of eight steps
    student, before = StudentCNN(convs=2, num_experts=2, hidden=8), []
    weight = student.convs[0].base.weight

    def loss_fn(prediction, target):
        before.append(weight.detach().clone())
        return nn.functional.mse_loss(prediction, target)

    run(student, loss_fn=loss_fn, epochs=1, steps=8)
    average, *after = *before[1:], weight.detach()
    for each in after:
        average = average.lerp(each, 1 / 2)
    kept = load_model(tmp_path / "best.pth").convs[0].base.weight
    torch.testing.assert_close(kept, average)
    assert not torch.equal(kept, weight)


def test_the_best_epoch_is_kept_and_not_the_last(run, tmp_path):
    values = iter([0.5, 0.9, 0.7])
    run(StudentCNN(), epochs=3, validate=lambda *_: Scores(20.0, next(values)))
    metadata = load_model(tmp_path / "best.pth").metadata
    assert metadata["epoch"] == 2 and metadata["val"]["ssim"] == 0.9


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_stops_with_a_sentence_and_keeps_the_best(run, tmp_path, value):
    with pytest.raises(UserError, match="no longer a finite number: lower LEARNING_RATE"):
        run(StudentCNN(), loss_fn=FailsInEpoch2(lambda loss: loss * value))
    assert load_model(tmp_path / "best.pth").metadata["epoch"] == 1
    assert not (tmp_path / "outputs" / "student_checkpoint.pth").exists(), "resuming from it would only fail again"


def test_a_loss_may_be_a_tensor_of_one_element(run, tmp_path):
    run(StudentCNN(), loss_fn=lambda prediction, target: nn.functional.l1_loss(prediction, target).view(1))
    assert load_model(tmp_path / "outputs" / "student_last.pth").metadata["epoch"] == 2


def test_ctrl_c_ends_with_the_best_so_far(run, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="Stopped after 1 of 2 epochs: the best weights so far"):
        run(StudentCNN(), loss_fn=FailsInEpoch2(interrupt))
    assert load_model(tmp_path / "best.pth").metadata["epoch"] == 1


def test_validation_is_the_mean_over_photos_and_a_perfect_one_counts_50_db(run):
    scores = validate(nn.Identity(), run.val_set, CPU)
    each = [(psnr(b[None], s[None]).item(), ssim(b[None], s[None]).item()) for b, s in run.val_set]
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
    factors = [warmup_cosine(step, 1000) for step in range(1001)]
    assert factors[0] < 0.03 and max(factors) == factors[50] == 1 and factors[1000] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(factors[50:]))


def all_batches(train_set, workers):
    return list(load_batches(train_set, CPU, range(2, 6), 3, workers))


def test_batches_are_the_same_from_worker_processes(run):
    run.train_set.targets = cache_teacher_outputs(small_teacher(), run.train_set, 1.0, CPU)
    batches, others = (all_batches(run.train_set, workers) for workers in (0, 2))
    assert len(batches) == 4 and len(batches[0]) == 4 and batches[0][0].shape == (3, 3, 32, 32)
    assert torch.equal(batches[0][0][1], run.train_set[7][0]), "step 2 of batches of 3 starts with patch 6"
    for batch, other in zip(batches, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


@pytest.mark.parametrize("cached", [True, False])
def test_the_student_reuses_the_teachers_estimator_whatever_the_target(constants, monkeypatch, cached):
    monkeypatch.setattr(train, "CACHE_TEACHER", cached)
    monkeypatch.setattr(train, "NUM_EPOCHS", 1)
    teacher = small_teacher()
    nn.init.normal_(teacher.student_estimator.tail.weight, std=0.02)
    save_model("teacher.pth", teacher)
    for weight in 0, 1:
        monkeypatch.setattr(train, "DISTILL_WEIGHT", weight)
        train.main()
        estimator = load_model("best_student_model.pth").estimator
        assert torch.equal(estimator.tail.weight, teacher.student_estimator.tail.weight)


@pytest.mark.parametrize("cached", [True, False])
def test_training_goes_on_from_a_student_with_its_own_estimator(constants, monkeypatch, capsys, cached):
    student = StudentCNN()
    nn.init.normal_(student.estimator.tail.weight, std=0.02)
    save_model("mine.pth", student)
    save_model("teacher.pth", StudentCNN(convs=2, num_experts=2, hidden=8))  # has no estimator to give
    for name, value in dict(START_FROM="mine.pth", LEARNING_RATE=1e-12, CACHE_TEACHER=cached, NUM_EPOCHS=1).items():
        monkeypatch.setattr(train, name, value)
    train.main()
    kept = load_model("best_student_model.pth").state_dict()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(kept[name], value, atol=0 if name.startswith("estimator") else 1e-6, rtol=0)
    printed = capsys.readouterr().out
    assert ", start " in printed and "The student does not beat the one it started from" in printed


@pytest.mark.parametrize("cached", [True, False])
def test_an_estimator_that_is_not_frozen_is_copied_and_trained_on(constants, monkeypatch, cached):
    for name, value in dict(CACHE_TEACHER=cached, FREEZE_ESTIMATOR=False, NUM_EPOCHS=1).items():
        monkeypatch.setattr(train, name, value)
    train.main()
    of_teacher, own = load_model("teacher.pth").student_estimator.head, load_model("best_student_model.pth").estimator.head
    torch.testing.assert_close(own.weight, of_teacher.weight, atol=0.02, rtol=0)
    assert not torch.equal(own.weight, of_teacher.weight)


def test_a_student_of_ones_own_without_an_estimator_can_be_trained(constants, monkeypatch):
    class Plain(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 3, 3, padding=1)

    monkeypatch.setattr(train, "NUM_EPOCHS", 1)
    monkeypatch.setattr("models.Plain", Plain, raising=False)
    monkeypatch.setattr(train, "StudentCNN", Plain)
    train.main()
    assert type(load_model("best_student_model.pth")) is Plain


def test_a_student_can_be_a_small_teacher(constants, monkeypatch):
    monkeypatch.setattr(train, "NUM_EPOCHS", 1)
    monkeypatch.setattr(train, "StudentCNN", lambda: TeacherCNN(width=4, deep_width=8, hidden=[8], fine_blocks=1))
    train.main()
    assert type(load_model("best_student_model.pth")) is TeacherCNN


def test_a_training_with_a_perceptual_loss_is_an_edit_of_one_line(constants, monkeypatch, perceptual_loss):
    monkeypatch.setattr(train, "NUM_EPOCHS", 1)
    monkeypatch.setattr(train.nn, "MSELoss", lambda: perceptual_loss)
    train.main()
    assert load_model("best_student_model.pth").metadata["training"]["the loss"].startswith("PerceptualLoss")
