import functools

"""A training that is interrupted and one that is not give the same student."""

import inspect
import shutil

import numpy as np
import pytest
import torch
from conftest import FailsInEpoch2, interrupt
from kill_and_resume import kill_and_resume
from PIL import Image
from torch.nn import functional as F

import pretrain
import train
import training.report
from models import StudentCNN, TeacherCNN, load_model, save_model
from utils import UserError


def test_killed_at_random_moments_a_training_ends_with_the_same_bits_with_0_and_with_2_workers(tmp_path, start):
    both = {}
    for workers in 0, 2:  # side by side, which saves time
        log = tmp_path / f"{workers}.log"
        both[log] = start(kill_and_resume, 1, workers, workers, log=log)
    for log, run_with in both.items():
        run_with.join(120)
        assert run_with.exitcode == 0 and "weights the same" in log.read_text(), log.read_text()


def fail(*_):
    raise KeyboardInterrupt


def small_student():
    torch.manual_seed(3)
    return StudentCNN(convs=2, num_experts=2, hidden=8)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_finished_training_is_followed_by_a_new_one(constants, capsys):
    students = []
    for _ in range(2):
        train.main()
        students.append(load_model("best_student_model.pth"))
    printed = capsys.readouterr().out
    assert "resuming" not in printed and printed.count("student 1/2") == 2
    assert same_weights(*students)


def test_an_interrupted_training_goes_on_with_as_many_threads_unless_they_are_set(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with pytest.raises(KeyboardInterrupt):
        run(small_student(), loss_fn=FailsInEpoch2(interrupt), outputs=tmp_path)
    shutil.copytree(tmp_path, tmp_path.with_name("again"))
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run(small_student(), loss_fn=FailsInEpoch2(lambda loss: loss), outputs=tmp_path)
    assert chosen == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    run(small_student(), loss_fn=FailsInEpoch2(lambda loss: loss), outputs=tmp_path.with_name("again"))
    assert chosen == [3]


def test_an_interrupted_training_goes_on_and_says_so(run, tmp_path, capsys):
    alone, stopped, again = small_student(), small_student(), small_student()
    run(alone, outputs=tmp_path / "alone")
    outputs = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(stopped, loss_fn=FailsInEpoch2(interrupt), outputs=outputs)
    run(again, loss_fn=FailsInEpoch2(lambda loss: loss), outputs=outputs)
    assert "resuming the interrupted training after step 3 of 6" in capsys.readouterr().out
    assert same_weights(alone, again)


def test_a_run_killed_after_its_last_epoch_only_draws_its_pictures(constants, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(training.report, "print_summary", fail)
        with pytest.raises(KeyboardInterrupt):
            train.main()
    before = load_model("best_student_model.pth")
    capsys.readouterr()
    train.main()
    printed = capsys.readouterr().out
    assert "after step" in printed and "student 1/2" not in printed and "gain kept" in printed
    assert same_weights(before, load_model("best_student_model.pth"))


def test_a_best_file_that_was_taken_away_is_one_sentence(interrupted):
    (interrupted / "best_student_model.pth").unlink()
    with pytest.raises(
        UserError, match=r"^best_student_model.pth, the best weights .* is missing: put it back or set RESUME"
    ):
        train.main()


def test_another_network_under_the_same_name_is_one_sentence(interrupted, monkeypatch):
    def other():
        student = StudentCNN()
        student.router = torch.nn.Linear(256, 16, bias=False)
        return student

    monkeypatch.setattr(train, "StudentCNN", other)
    with pytest.raises(UserError, match="the network was .* parameters, is .*RESUME = False"):
        train.main()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What the first use of ``interrupted`` leaves for the others."""
    return tmp_path_factory.mktemp("kept") / "interrupted"


@pytest.fixture
def interrupted(constants, monkeypatch, kept):
    """train.main() was interrupted in its second epoch."""
    if not kept.exists():
        with monkeypatch.context() as patch:
            patch.setattr(train.nn, "MSELoss", lambda: FailsInEpoch2(interrupt))
            with pytest.raises(KeyboardInterrupt):
                train.main()
        shutil.copytree(constants, kept)
    shutil.copytree(kept, constants, dirs_exist_ok=True)  # the times of files are kept, too
    monkeypatch.setattr(train.nn, "MSELoss", lambda: FailsInEpoch2(lambda loss: loss))
    return constants


@pytest.mark.parametrize(
    "constant, value, sentence",
    [
        ("LEARNING_RATE", 0.5, "LEARNING_RATE was 0.001, is 0.5"),
        ("NUM_EPOCHS", 7, "NUM_EPOCHS was 2, is 7"),
        ("PATCH_SIZE", 16, "PATCH_SIZE was 32, is 16"),
        ("CACHE_TEACHER", False, "CACHE_TEACHER was True, is False"),
    ],
)
def test_settings_changed_in_between_are_named_with_the_two_ways_out(interrupted, monkeypatch, constant, value, sentence):
    before = (interrupted / "outputs" / "student_checkpoint.pth").read_bytes()
    monkeypatch.setattr(train, constant, value)
    with pytest.raises(UserError, match=f"{sentence}.*RESUME = False.*or restore the old values"):
        train.main()
    assert (interrupted / "outputs" / "student_checkpoint.pth").read_bytes() == before


def test_a_network_whose_code_was_changed_in_between_is_named(interrupted, monkeypatch):
    source_of = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda of: source_of(of).replace("return ", "return 1 * ", of is StudentCNN))
    with pytest.raises(UserError, match=r"other settings \(the code of the network was \w+, is \w+\)"):
        train.main()


def test_an_optimizer_that_was_changed_in_between_is_named(interrupted, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, amsgrad=True))
    with pytest.raises(UserError, match=r"\(the optimizer was AdamW .*'amsgrad': False.*, is .*'amsgrad': True"):
        train.main()


def test_with_resume_off_an_interrupted_training_is_dropped_and_a_new_one_starts(interrupted, monkeypatch, capsys):
    monkeypatch.setattr(train, "LEARNING_RATE", 0.5)
    monkeypatch.setattr(train, "RESUME", False)
    train.main()
    assert "resuming" not in capsys.readouterr().out


def test_a_teacher_or_photos_changed_in_between_are_noticed(interrupted):
    original = (interrupted / "teacher.pth").read_bytes()
    teacher = load_model("teacher.pth")
    torch.nn.init.normal_(teacher.head.bias)
    save_model("teacher.pth", teacher)
    with pytest.raises(UserError, match="the teacher was .*, is "):
        train.main()
    (interrupted / "teacher.pth").write_bytes(original)
    sharp = interrupted / "data" / "train" / "001" / "sharp.png"
    Image.fromarray(np.array(Image.open(sharp)) // 2).save(sharp)
    with pytest.raises(UserError, match="photos was .*, is "):
        train.main()


def test_an_estimator_that_was_trained_otherwise_is_named(constants, monkeypatch):
    monkeypatch.setattr(pretrain, "TeacherCNN", lambda: TeacherCNN(width=4, deep_width=8, hidden=[8], fine_blocks=1))
    monkeypatch.setattr(pretrain, "RelativeMSEAndSSIMLoss", lambda: FailsInEpoch2(interrupt))
    with pytest.raises(KeyboardInterrupt):
        pretrain.main()
    monkeypatch.setattr(pretrain, "ESTIMATOR_PASSES", 2)
    with pytest.raises(UserError, match=r"ESTIMATOR_PASSES was 1, is 2.*RESUME = False.*or restore the old values"):
        pretrain.main()


def test_with_the_old_values_an_interrupted_main_is_resumed_whatever_the_times_of_its_files(interrupted, capsys):
    for file in interrupted.rglob("*.png"):
        file.touch()
    train.main()
    assert "resuming the interrupted training" in capsys.readouterr().out


@pytest.mark.parametrize("loss", [F.l1_loss, lambda prediction, target: 0.5 * F.l1_loss(prediction, target)])
def test_a_training_whose_loss_is_a_function_is_resumed_in_a_moved_folder_too(constants, monkeypatch, capsys, loss):
    monkeypatch.setattr(train.nn, "MSELoss", lambda: loss)
    with monkeypatch.context() as patch:
        patch.setattr(train.TrainingRun, "finish_epoch", fail)
        with pytest.raises(KeyboardInterrupt):
            train.main()
    moved = shutil.copytree(constants, constants / "moved")
    shutil.rmtree(constants / "data")
    monkeypatch.chdir(moved)
    for file in moved.rglob("*.png"):
        file.touch()
    train.main()
    assert "resuming the interrupted training" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_damaged_checkpoint_is_one_sentence(interrupted, content):
    last = interrupted / "outputs" / "student_checkpoint.pth"
    last.write_bytes(last.read_bytes()[:5000] if content is None else content)
    with pytest.raises(UserError, match=r"student_checkpoint.pth is damaged.*remove it"):
        train.main()


def test_a_full_disk_is_a_sentence_and_the_earlier_checkpoint_survives(interrupted, monkeypatch):
    before = (interrupted / "outputs" / "student_checkpoint.pth").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("images.files.torch.save", full)
    with pytest.raises(UserError, match=r"checkpoint\.pth cannot be written .*No space left.*: free some disk space"):
        train.main()
    assert (interrupted / "outputs" / "student_checkpoint.pth").read_bytes() == before
