"""A training that is interrupted and one that is not give the same student."""

import pytest
import torch
from kill_and_resume import kill_and_resume
from test_train import FailsAtStep5, constants, interrupt, run  # noqa: F401  (fixtures)

import pretrain
import train
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


def interrupt_now():
    raise KeyboardInterrupt


def small_student():
    torch.manual_seed(3)
    return StudentCNN(convs=2, num_experts=2, hidden=8)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_finished_training_is_followed_by_a_new_one(constants, capsys):  # noqa: F811
    students = []
    for _ in range(2):
        train.main()
        students.append(load_model("best_student_model.pth"))
    printed = capsys.readouterr().out
    assert "going on" not in printed and printed.count("student 1/2") == 2
    assert same_weights(*students)


def test_an_interrupted_training_goes_on_and_says_so(run, tmp_path, capsys):  # noqa: F811
    alone, stopped, again = small_student(), small_student(), small_student()
    run(alone, outputs=tmp_path / "alone")
    loss_fn, outputs = FailsAtStep5(interrupt), tmp_path / "stopped"
    with pytest.raises(SystemExit):
        run(stopped, loss_fn=loss_fn, outputs=outputs)
    run(again, loss_fn=loss_fn, outputs=outputs)
    assert "going on with the training that was interrupted after step 3 of 6" in capsys.readouterr().out
    assert same_weights(alone, again)


def test_a_run_killed_after_its_last_epoch_only_draws_its_pictures(constants, monkeypatch, capsys):  # noqa: F811
    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_comparison", interrupt)
        with pytest.raises(TypeError):
            train.main()
    before = load_model("best_student_model.pth")
    capsys.readouterr()
    train.main()
    printed = capsys.readouterr().out
    assert "after step" in printed and "student 1/2" not in printed and "gain kept" in printed
    assert same_weights(before, load_model("best_student_model.pth"))


@pytest.fixture
def taught(constants, monkeypatch):  # noqa: F811
    """train.main() has taught a teacher of its own, and was interrupted before the student's first step."""
    monkeypatch.setattr(train, "TEACHER_WEIGHTS", None)
    monkeypatch.setattr(train, "TeacherCNN", lambda: TeacherCNN(width=4, deep_width=8, blocks=1, fine_blocks=1))
    with monkeypatch.context() as patch:
        patch.setattr(train, "share_gauge", lambda *_: interrupt_now())
        with pytest.raises(KeyboardInterrupt):
            train.main()


def test_a_teacher_that_was_taught_before_the_interruption_is_not_taught_again(taught, capsys):
    train.main()  # the student of the interrupted run
    printed = capsys.readouterr().out
    assert "teacher 1/2" not in printed and "student 1/2" in printed
    assert "teacher.pth was taught already; RESUME = False teaches another" in printed
    train.main()  # a run of its own
    assert capsys.readouterr().out.count("teacher 1/2") == 1


def test_a_teacher_taught_under_other_settings_is_not_taken_silently(taught, monkeypatch):
    monkeypatch.setattr(train, "TEACHER_LEARNING_RATE", 5e-4)
    with pytest.raises(UserError, match=r"last_teacher.pth .*LEARNING_RATE was 0.0004, is 0.0005.*RESUME = False"):
        train.main()


def test_an_interrupted_student_of_another_teacher_is_told_before_one_is_taught(interrupted, monkeypatch):
    monkeypatch.setattr(train, "TEACHER_WEIGHTS", None)
    monkeypatch.setattr(train, "teach_gauge", lambda *_: pytest.fail("a teacher is taught"))
    with pytest.raises(UserError, match=r"last.pth holds .*of a student of another teacher: .*put TEACHER_WEIGHTS back"):
        train.main()


def test_a_teacher_of_pretraining_is_not_overwritten_unasked(constants, monkeypatch):  # noqa: F811
    for script in pretrain, train:
        monkeypatch.setattr(script, "TeacherCNN", lambda: TeacherCNN(width=4, deep_width=8, blocks=1, fine_blocks=1))
    pretrain.main()
    before = (constants / "outputs" / "teacher.pth").read_bytes()
    monkeypatch.setattr(train, "TEACHER_WEIGHTS", None)
    with pytest.raises(UserError, match="teacher.pth was taught by pretrain.py, .*: name it in TEACHER_WEIGHTS"):
        train.main()
    assert (constants / "outputs" / "teacher.pth").read_bytes() == before


def test_without_going_on_a_damaged_checkpoint_does_not_matter(constants, monkeypatch):  # noqa: F811
    monkeypatch.setattr(train, "TEACHER_WEIGHTS", None)
    monkeypatch.setattr(train, "RESUME", False)
    monkeypatch.setattr(train, "TeacherCNN", lambda: TeacherCNN(width=4, deep_width=8, blocks=1, fine_blocks=1))
    (constants / "outputs").mkdir()
    for name in "last.pth", "last_teacher.pth", "gauge.pth":
        (constants / "outputs" / name).write_bytes(b"")
    train.main()
    assert load_model("best_student_model.pth")


def test_a_best_file_that_was_taken_away_is_one_sentence(interrupted):
    (interrupted / "best_student_model.pth").unlink()
    with pytest.raises(UserError, match=r"best_student_model.pth is gone, .*put it back or set RESUME = False"):
        train.main()


def test_another_network_under_the_same_name_is_one_sentence(interrupted, monkeypatch):
    def other():
        student = StudentCNN()
        student.mix = torch.nn.Linear(128, 16, bias=False)
        return student

    monkeypatch.setattr(train, "StudentCNN", other)
    with pytest.raises(UserError, match="of a network that was written differently then: set RESUME = False"):
        train.main()


@pytest.fixture
def interrupted(constants, monkeypatch):  # noqa: F811
    """train.main() was interrupted in its second epoch."""
    with monkeypatch.context() as patch:
        patch.setattr(train.nn, "MSELoss", lambda: FailsAtStep5(interrupt))
        with pytest.raises(SystemExit):
            train.main()
    monkeypatch.setattr(train.nn, "MSELoss", lambda: FailsAtStep5(lambda loss: loss))
    return constants


@pytest.mark.parametrize(
    "constant, value, sentence",
    [
        ("LEARNING_RATE", 0.5, "LEARNING_RATE was 0.001, is 0.5"),
        ("NUM_EPOCHS", 7, "NUM_EPOCHS was 2, is 7"),
        ("PATCH_SIZE", 16, "PATCH_SIZE was 32, is 16"),
        ("ASK_TEACHER_ONCE", False, "ASK_TEACHER_ONCE was True, is False"),
    ],
)
def test_settings_changed_in_between_are_named_with_the_two_ways_out(interrupted, monkeypatch, constant, value, sentence):
    before = (interrupted / "outputs" / "last.pth").read_bytes()
    monkeypatch.setattr(train, constant, value)
    with pytest.raises(UserError, match=f"{sentence}.*RESUME = False.*or put the old values back"):
        train.main()
    assert (interrupted / "outputs" / "last.pth").read_bytes() == before


def test_with_resume_off_an_interrupted_training_is_dropped_and_a_new_one_starts(interrupted, monkeypatch, capsys):
    monkeypatch.setattr(train, "LEARNING_RATE", 0.5)
    monkeypatch.setattr(train, "RESUME", False)
    train.main()
    assert "going on" not in capsys.readouterr().out


def test_a_teacher_or_photos_changed_in_between_are_noticed(interrupted):
    original = (interrupted / "teacher.pth").read_bytes()
    teacher = load_model("teacher.pth")
    torch.nn.init.normal_(teacher.head.bias)
    save_model("teacher.pth", teacher)
    with pytest.raises(UserError, match="the teacher was .*, is "):
        train.main()
    (interrupted / "teacher.pth").write_bytes(original)
    (interrupted / "data" / "train" / "001" / "sharp.png").touch()
    with pytest.raises(UserError, match="the photos was .*, is "):
        train.main()


def test_a_gauge_that_was_taught_otherwise_is_named(constants, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pretrain, "TeacherCNN", lambda: TeacherCNN(width=4, deep_width=8, blocks=1, fine_blocks=1))
    monkeypatch.setattr(pretrain, "PSNRAndSSIMLoss", lambda: FailsAtStep5(interrupt))
    with pytest.raises(SystemExit):
        pretrain.main()
    monkeypatch.setattr(pretrain, "GAUGE_PASSES", 2)
    with pytest.raises(UserError, match="GAUGE_PASSES was 1, is 2.*RESUME = False.*or put the old values back"):
        pretrain.main()
    monkeypatch.setattr(train, "TEACHER_WEIGHTS", None)
    monkeypatch.setattr(train, "TeacherCNN", pretrain.TeacherCNN)
    with pytest.raises(UserError, match="GAUGE_DRAWS was 2, is None"):  # the other script's training
        train.main()


def test_with_the_old_values_an_interrupted_main_goes_on(interrupted, capsys):
    train.main()
    assert "going on with the training that was interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_damaged_checkpoint_is_one_sentence(interrupted, content):
    last = interrupted / "outputs" / "last.pth"
    last.write_bytes(last.read_bytes()[:5000] if content is None else content)
    with pytest.raises(UserError, match=r"last.pth is damaged or no checkpoint: remove it or set RESUME = False"):
        train.main()


def test_a_full_disk_is_a_sentence_and_the_earlier_checkpoint_survives(interrupted, monkeypatch):
    before = (interrupted / "outputs" / "last.pth").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("files.torch.save", full)
    with pytest.raises(UserError, match=r"last\.pth cannot be written .*No space left on device.*: free some space"):
        train.main()
    assert (interrupted / "outputs" / "last.pth").read_bytes() == before
