import csv
import os

import numpy as np
import pytest
import torch
from conftest import dummy_photo, gmac_of, write_pair
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

import evaluate
from fused_student import FusedStudent
from images.photos import read_photo
from models import StudentCNN, TeacherCNN, load_model, save_model
from utils import Scores, UserError, count_parameters, gmac_per_megapixel, to_pixels, to_tensor


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs ``python evaluate.py ARGUMENTS`` in ``tmp_path``, with a small student and teacher; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    student, teacher = StudentCNN(), TeacherCNN(4, 8, [8], 1)
    for name, made, last in ("student", student, student.convs[-1].base), ("teacher", teacher, teacher.tail):
        torch.nn.init.normal_(last.weight, std=0.01)
        save_model(f"{name}.pth", made)
        monkeypatch.setitem(evaluate.NETWORKS, name, (f"{name}.pth",))

    monkeypatch.setattr(evaluate, "RADII", (0.8, 1.2))
    monkeypatch.setattr(evaluate, "AMOUNTS", (0.6, 1.5))
    monkeypatch.setattr(evaluate, "gmac_per_megapixel", lambda network: gmac_of(type(network), *network.arguments.values()))
    monkeypatch.setattr(evaluate, "ms_per_megapixel", lambda network, device: 1.0)  # which takes a second

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *(str(a) for a in arguments)])
        evaluate.main()
        return capsys.readouterr().out

    return run


def cells(text, first):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_validation_pairs_are_scored_for_every_sharpener(run, pairs):
    printed = run()
    for name in "input", "unsharp", "best unsharp", "student", "teacher":
        assert len(cells(printed, name)) == 10
    assert cells(printed, "student")[7:9] == [
        f"{count_parameters(StudentCNN()):,}",
        f"{gmac_per_megapixel(StudentCNN()):.1f}",
    ]
    assert float(cells(printed, "best unsharp")[1]) > float(cells(printed, "input")[1])


def test_scores_are_those_of_scikit_image_on_8_bit_pictures(run, pairs, tmp_path):
    run("--csv", "scores.csv")
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert len(rows) == 2 * 5
    for row in rows:
        if row["sharpener"] == "input":
            blurry, sharp = (np.array(Image.open(pairs / f"val/{row['photo']}/{n}.png")) for n in ("blurry", "sharp"))
            mse = np.mean((blurry.astype(float) - sharp) ** 2)
            assert float(row["psnr"]) == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-3)
            theirs = structural_similarity(
                blurry, sharp, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            assert float(row["ssim"]) == pytest.approx(theirs, abs=1e-4)


def test_the_mask_is_the_usual_one_of_scipy():
    photo = dummy_photo(50, 60, seed=3)
    detail = photo - gaussian_filter(photo.astype(float), (1.2, 1.2, 0), mode="mirror")
    wanted = np.clip(np.round(photo + 1.5 * detail), 0, 255)
    ours = to_pixels(evaluate.unsharp(to_tensor(photo), 1.2, 1.5)).astype(int)
    assert np.abs(ours - wanted).max() <= 1 and (ours != wanted).mean() < 0.01


def test_degradations_get_a_table_and_count_alike_in_the_mean(run, tmp_path):
    for k in range(3):
        write_pair(tmp_path / "bench" / "heavy" / f"{k}", seed=k)
    write_pair(tmp_path / "bench" / "light" / "0", seed=9)
    for k in range(2):
        folder = tmp_path / "bench" / "perfect" / f"{k}"
        folder.mkdir(parents=True)
        for name in "blurry", "sharp":
            Image.fromarray(dummy_photo(40, 40, seed=k)).save(folder / f"{name}.png")
    printed = run("bench", "--markdown", "table.md", "--picture", "picture.png")
    tables = (tmp_path / "table.md").read_text()
    assert tables.strip() in printed
    means = [float(cells(tables, name)[1].split()[0]) for name in ("heavy", "light", "perfect")]
    assert float(cells(tables, "input")[1]) == pytest.approx(np.mean(means), abs=0.011)
    assert cells(tables, "student")[5].endswith("of 6")
    with Image.open("picture.png") as picture:
        assert picture.width > 4 * 300 and len(picture.getcolors(1 << 24)) > 50


def test_a_perfect_photo_counts_50_db_as_in_a_training_and_any_change_is_a_loss(run, tmp_path):
    (tmp_path / "crisp" / "0").mkdir(parents=True)
    for name in "blurry", "sharp":
        Image.fromarray(dummy_photo(40, 40, seed=1)).save(tmp_path / "crisp" / "0" / f"{name}.png")
    printed = run("crisp")
    assert cells(printed, "input")[1:3] == ["50.00", "1.0000"] and "nan" not in printed and "inf" not in printed
    assert 20 < float(cells(printed, "student")[1]) < 50 and cells(printed, "student")[5] == "1 of 1"


def test_any_name_of_a_folder_can_be_in_the_results(run, tmp_path):
    name = "two\nlines|pipe" + os.fsdecode(b"\xff")
    write_pair(tmp_path / "odd" / name, seed=4)
    printed = run("odd", "--csv", "odd.csv", "--markdown", "odd.md")
    assert len(cells(printed.replace("\\|", "/"), "student")) == 10 and "lines|pipe" not in (tmp_path / "odd.md").read_text()
    (photo,) = {row["photo"] for row in csv.DictReader((tmp_path / "odd.csv").open(newline=""))}
    assert photo == "two\nlines|pipe\\udcff"


def test_the_share_of_the_teachers_gain_is_shown():
    scores = {"input": Scores(20, 0.8), "unsharp": Scores(19, 0.82), "student": Scores(23, 0.85), "teacher": Scores(24, 0.9)}
    results = {"val": {name: {"a": score} for name, score in scores.items()}}
    table = evaluate.summary_table(results, {"teacher": ["1", "2", "3"]})
    assert [cells(table, name)[4] for name in scores] == ["", "-25% / 20%", "75% / 50%", "100% / 100%"]


def test_there_is_no_share_of_a_gain_that_the_teacher_has_not():
    scores = {"input": Scores(20, 0.8), "unsharp": Scores(19, 0.7), "student": Scores(19, 0.85), "teacher": Scores(18, 0.9)}
    results = {"val": {name: {"a": score} for name, score in scores.items()}}
    table = evaluate.summary_table(results, {"teacher": ["1", "2", "3"]})
    assert [cells(table, name)[4] for name in scores] == ["", "- / -100%", "- / 50%", "- / 100%"]


def test_photos_made_worse_are_counted_and_named():
    scores = {name: dict.fromkeys("abc", Scores(20, 0.8)) for name in evaluate.BASELINES}
    results = {"val": {**scores, "student": {"a": Scores(21, 0.9), "b": Scores(19.5, 0.7), "c": Scores(18, 0.6)}}}
    assert cells(evaluate.summary_table(results, {}), "student")[5:7] == ["2 of 3", "c -2.00 dB"]


def test_the_student_is_the_first_file_that_exists_and_other_networks_are_rows_of_their_own(run, pairs, monkeypatch):
    monkeypatch.setitem(evaluate.NETWORKS, "student", ("nowhere.pth", "student.pth"))
    save_model("other.pth", StudentCNN())
    printed = run("data/val", "other.pth", "./other.pth")
    names = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert names == ["", "input", "unsharp", "best unsharp", "student", "teacher", "other.pth"]
    assert "student is student.pth" in printed


def test_scores_are_of_what_sharpen_would_save(run, pairs, tmp_path):
    run("--csv", "scores.csv")
    fused = FusedStudent(load_model("student.pth"))
    rows = [row for row in csv.DictReader((tmp_path / "scores.csv").open(newline="")) if row["sharpener"] == "student"]
    assert len(rows) == 2
    for row in rows:
        blurry, sharp = (np.array(Image.open(pairs / f"val/{row['photo']}/{n}.png")) for n in ("blurry", "sharp"))
        mse = np.mean((fused(torch.from_numpy(blurry)).numpy().astype(float) - sharp) ** 2)
        assert float(row["psnr"]) == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-3)


def test_arithmetic_is_counted():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1)
    assert gmac_per_megapixel(conv) == pytest.approx(3 * 5 * 9 / 1000)
    assert gmac_per_megapixel(torch.nn.Conv2d(3, 6, 2, stride=2)) == pytest.approx(3 * 6 * 4 / 4 / 1000)
    assert gmac_of(TeacherCNN) == pytest.approx(111, abs=1)


def test_a_mistake_is_one_sentence(run, tmp_path):
    with pytest.raises(evaluate.UserError, match="nowhere is not a folder"):
        run("nowhere")
    write_pair(tmp_path / "mixed" / "1")
    write_pair(tmp_path / "mixed" / "heavy" / "1")
    with pytest.raises(evaluate.UserError, match="contains both pairs and folders of pairs"):
        run("mixed")


def test_all_that_would_stop_the_scoring_later_is_listed_before_the_networks_are_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda _: pytest.fail("it was loaded"))
    for name in "heavy/1", "heavy/2", "light/1", "light/2":
        write_pair(tmp_path / "bench" / name)
    Image.new("RGB", (30, 20)).save(tmp_path / "bench/heavy/2/sharp.png")
    (tmp_path / "bench/light/1/blurry.png").write_text("no picture")
    with pytest.raises(
        UserError, match=r"(?s)2 problems.*heavy/2: blurry.png is 48x40, sharp.png is 30x20.*1/blurry.png can"
    ):
        run("bench")
    for k in 1, 2:
        (tmp_path / f"bench/light/{k}/blurry.png").rename(tmp_path / f"bench/light/{k}/Blurry.jpg")
    with pytest.raises(UserError, match=r"(?s)2 problems.*light/2/blurry.png is missing, rename Blurry.jpg to blurry.png"):
        run("bench")


def test_a_folder_in_place_of_weights_is_one_sentence(run, pairs):
    with pytest.raises(UserError, match=r"\. is not a file: give the path of a .pth file"):
        run("data/val", ".")


def test_a_picture_is_written_of_pairs_of_any_size(run, tmp_path):
    write_pair(tmp_path / "tiny" / "1", 1, 9)
    run("tiny", "--picture", "picture.png")
    assert read_photo(tmp_path / "picture.png").shape[1] > 1000
