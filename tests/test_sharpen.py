import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
import torch
from conftest import changing_network as network
from conftest import dummy_photo, shipped
from PIL import Image

import inference
import sharpen
from fused_student import FusedStudent
from images.photos import look_ahead
from images.pictures import read_picture
from inference import Sharpener
from models import StudentCNN, TeacherCNN

CPU = torch.device("cpu")


@pytest.fixture
def run(run_sharpen):
    return run_sharpen


def save(path, *size, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(dummy_photo(*(size or (40, 52)), seed=seed)).save(path, **options)


def sharpened_whole(pixels, made=None):
    """What the network makes of (H, W, 3) uint8 in one piece, in float32."""
    photo = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        answer = (made or network())(photo)
    return (answer.clamp(0, 1) * 255).round().byte()[0].permute(1, 2, 0).numpy()


def test_a_photo_becomes_what_the_network_makes_of_it(run, tmp_path):
    save(tmp_path / "a.png")
    code, printed, errors = run("a.png")
    assert (code, errors) == (0, "") and "seconds on cpu" in printed
    assert "1 of 1 files sharpened with best_student_model.pth" in printed
    result = read_picture(tmp_path / "sharpened" / "a.png").pixels
    before = dummy_photo(40, 52, seed=0)
    assert np.abs(result.astype(int) - sharpened_whole(before)).max() <= 1, "bfloat16 may round the other way"
    assert np.abs(result.astype(int) - before).max() > 10


@pytest.mark.parametrize("made", [network(), network(TeacherCNN, width=4, deep_width=8, hidden=[8, 8], fine_blocks=1)])
@pytest.mark.parametrize("size", [(260, 290), (130, 400), (297, 170)])
def test_tiles_give_the_whole_to_the_last_bit(made, size, monkeypatch):
    pixels, sharpener = dummy_photo(*size, seed=1), Sharpener(made, CPU)
    whole = sharpener.sharpen_in_tiles(pixels)
    for tile in 128, 160:
        monkeypatch.setattr(inference, "TILE", tile)
        assert np.array_equal(sharpener.sharpen_in_tiles(pixels), whole)


def test_a_network_that_does_not_say_how_far_it_looks_sees_the_photo_whole(monkeypatch):
    pixels, sharpener = dummy_photo(70, 90, seed=1), Sharpener(torch.nn.Conv2d(3, 3, 31, padding=15), CPU)
    whole = sharpener(pixels)
    monkeypatch.setattr(inference, "TILE", 64)
    assert np.array_equal(sharpener(pixels), whole)


def test_8_bits_go_through_the_fused_student_and_16_bits_through_the_network_itself(run, tmp_path):
    rgb = dummy_photo(70, 90, seed=4)
    (tmp_path / "photos").mkdir()
    Image.fromarray(rgb).save(tmp_path / "photos" / "plain.png")
    tifffile.imwrite(tmp_path / "photos" / "deep.tif", rgb.astype(np.uint16) * 257, photometric="rgb")
    assert run("photos")[0] == 0
    plain, deep = (read_picture(tmp_path / "sharpened" / name).pixels for name in ("plain.png", "deep.tif"))
    assert np.array_equal(plain, FusedStudent(network())(torch.from_numpy(rgb)).numpy())
    assert np.array_equal(deep, Sharpener(network(), CPU).sharpen_in_tiles(rgb.astype(np.uint16) * 257))
    assert run("photos/plain.png", "-o", "mean.png", "--orientations", "8")[0] == 0
    assert np.array_equal(read_picture(tmp_path / "mean.png").pixels, Sharpener(network(), CPU, orientations=8)(rgb))


def weaker(forward):
    return lambda student, photo, *blur: photo.lerp(forward(student, photo, *blur), 0.5)


@pytest.mark.parametrize("edited", ["forward", "parts"])
def test_an_edited_student_is_run_as_it_was_trained_and_that_is_said(monkeypatch, capsys, edited):
    made, pixels = network(), dummy_photo(70, 90, seed=4)
    fused = Sharpener(made, CPU)(pixels)
    if edited == "forward":
        monkeypatch.setattr(StudentCNN, "forward", weaker(StudentCNN.forward))
    else:
        del made.gain_map
        monkeypatch.setattr(StudentCNN, "forward", lambda student, photo, blur: 1 - photo)
    sharpener = Sharpener(made, CPU)
    assert capsys.readouterr().err.startswith("StudentCNN differs from fused_student.py") and sharpener.fused is None
    assert np.array_equal(sharpener(pixels), sharpener.sharpen_in_tiles(pixels))
    assert np.abs(sharpener(pixels).astype(int) - fused).max() > 3


@pytest.mark.parametrize("name", ["student", "free/student"])
def test_the_shipped_students_are_fused_without_a_word(name, capsys):
    assert Sharpener(shipped(name), CPU).fused and capsys.readouterr() == ("", "")


def test_strength_scales_the_change(run, tmp_path):
    before = np.full((40, 52, 3), 128, np.uint8)
    before[10:20] = 140
    before[::2, ::2] += 1  # runs of equal pixels would be kept as they are
    before[1::2, 1::2] += 1
    Image.fromarray(before).save(tmp_path / "a.png")
    changes = {}
    for strength in 0, 0.5, 1, 2:
        assert run("a.png", "-o", f"{strength}.png", "--strength", strength)[0] == 0
        changes[strength] = read_picture(tmp_path / f"{strength}.png").pixels.astype(int) - before
    assert not changes[0].any() and changes[1].any()
    for strength in 0.5, 2:
        wanted = (before + strength * changes[1]).clip(0, 255) - before
        assert np.abs(changes[strength] - wanted).max() <= 1


def test_a_folder_gives_the_same_names(run, tmp_path):
    for name in "a.png", "b.jpg", "deep/er/c.webp":
        save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no photo")
    assert run("photos", "-o", "out")[:1] == (0,)
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"a.png", "b.jpg", "deep/er/c.webp"}


def test_results_inside_a_folder_are_not_sharpened_again(run, tmp_path):
    save(tmp_path / "photos" / "a.png")
    assert run("photos", "-o", "photos/better")[0] == 0
    code, printed, _ = run("photos", "-o", "photos/better", "--overwrite")
    assert code == 0 and "1 of 1" in printed


def test_a_folder_is_not_sharpened_into_itself_or_silently_not_at_all(run, tmp_path):
    save(tmp_path / "photos" / "a.png")
    code, printed, errors = run("photos", "-o", "photos")
    assert code == 1 and "which is an input" in errors and "0 of 1" in printed
    assert run("photos", "-o", ".")[0] == 0 and (tmp_path / "a.png").is_file()


def test_a_link_in_a_circle_or_a_folder_name_with_a_suffix_does_not_stop_the_rest(run, tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    code, printed, errors = run("circle.png", "a.png")
    assert code == 1 and "circle.png" in errors and "1 of 2" in printed
    code, _, errors = run("a.png", "-o", "better.jxl")
    assert code == 1 and "better.jxl, which does not end in one of" in errors
    assert "is one file" in run("a.png", "circle.png", "-o", "b.png")[2]


def test_nothing_is_overwritten_unasked_and_an_input_never(run, tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", seed=1)
    before = (tmp_path / "a.png").read_bytes()
    for arguments in ("a.png", "-o", "."), ("a.png", "b.png", "-o", "."), ("a.png", "-o", "a.png"):
        code, _, errors = run(*arguments, "--overwrite")
        assert code == 1 and "which is an input" in errors and (tmp_path / "a.png").read_bytes() == before
    assert run("a.png", "-o", "c.png")[0] == 0
    result = (tmp_path / "c.png").read_bytes()
    code, _, errors = run("b.png", "-o", "c.png")
    assert code == 1 and "c.png exists already" in errors and (tmp_path / "c.png").read_bytes() == result
    assert run("b.png", "-o", "c.png", "--overwrite")[0] == 0 and (tmp_path / "c.png").read_bytes() != result


def test_two_photos_do_not_become_one(run, tmp_path):
    for folder in "x", "y":
        save(tmp_path / folder / "a.png")
    code, printed, errors = run("x", "y")
    assert code == 1 and "would both become sharpened/a.png" in errors and "1 of 2 files sharpened" in printed


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_names_that_differ_in_case_alone_are_one_on_windows_and_macos(tmp_path, monkeypatch, system):
    for name in "x/a.png", "y/A.PNG":
        save(tmp_path / name)
    monkeypatch.setattr("sys.platform", system)
    jobs, problems = sharpen.find_jobs([tmp_path / "x", tmp_path / "y"], str(tmp_path / "Results"), overwrite=False)
    assert (len(jobs), len(problems)) == ((2, 0) if system == "linux" else (1, 1))
    assert not problems or ("A.PNG and" in problems[0] and "would both become" in problems[0])


def test_a_result_never_replaces_an_input_that_is_spelled_in_another_case(tmp_path, monkeypatch):
    save(tmp_path / "photos" / "a.png")
    monkeypatch.setattr("sys.platform", "darwin")
    jobs, problems = sharpen.find_jobs([tmp_path / "photos" / "a.png"], str(tmp_path / "PHOTOS"), overwrite=True)
    assert not jobs and "which is an input" in problems[0]


def test_a_result_never_replaces_an_input_under_another_name(tmp_path):
    save(tmp_path / "photos" / "a.png")
    (tmp_path / "other").mkdir()
    # A hard link, as PHOTOS/a.png is to photos/a.png on a disk that ignores case
    os.link(tmp_path / "photos" / "a.png", tmp_path / "other" / "a.png")
    jobs, problems = sharpen.find_jobs([tmp_path / "photos" / "a.png"], str(tmp_path / "other"), overwrite=True)
    assert not jobs and "which is an input" in problems[0]


def test_gray_transparency_and_16_bits_are_kept(run, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rgb = dummy_photo(40, 52, seed=2)
    alpha = (1 + np.arange(40 * 52) % 255).reshape(40, 52).astype(np.uint8)
    Image.fromarray(rgb[..., 0]).save(folder / "gray.png")
    Image.fromarray(np.dstack([rgb, alpha])).save(folder / "clear.png")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(rgb).save(folder / "plain.png")
    assert run("photos")[0] == 0
    gray, clear, deep, plain = (read_picture(tmp_path / f"sharpened/{n}.png") for n in ("gray", "clear", "deep", "plain"))
    assert gray.pixels.shape == (40, 52, 1) and deep.pixels.dtype == np.uint16 and deep.pixels.shape == (40, 52, 1)
    assert np.array_equal(clear.pixels, plain.pixels) and np.array_equal(clear.alpha[..., 0], alpha)
    assert np.abs(deep.pixels / 257 - gray.pixels).max() <= 1.5, "the same up to rounding"


@pytest.mark.parametrize("kind", ["png", "apng"])
def test_colors_hidden_by_transparency_do_not_change_what_is_visible(run, tmp_path, kind):
    rgb, alpha = dummy_photo(40, 52, seed=2), np.full((40, 52, 1), 255, np.uint8)
    alpha[:15], alpha[:, 8:], hidden = 0, 0, np.zeros_like(rgb)
    frames = [Image.fromarray(np.dstack([np.where(alpha, rgb, color), alpha])) for color in (hidden, hidden + 255)]
    for name, frame in zip("ab", frames, strict=True):
        more = dict(save_all=True, append_images=[frame.transpose(Image.Transpose.ROTATE_180)]) if kind == "apng" else {}
        frame.save(tmp_path / f"{name}.{kind}", **more)
    assert run(f"a.{kind}", f"b.{kind}")[0] == 0
    first, second = (read_picture(tmp_path / f"sharpened/{name}.{kind}") for name in "ab")
    assert np.array_equal(first.alpha, second.alpha) and first.alpha.min() == 0
    assert np.array_equal(*(np.where(each.alpha, each.pixels, 0) for each in (first, second)))
    if kind == "png":
        assert first.pixels[:15].max() == 0 and second.pixels[:15].min() == 255, "what is hidden is kept"


def test_16_bits_in_color_are_sharpened_as_8_bits_are_but_finer(run, tmp_path):
    rgb = dummy_photo(200, 230, seed=2)
    tifffile.imwrite(tmp_path / "deep.tif", rgb.astype(np.uint16) * 257, photometric="rgb")
    Image.fromarray(rgb).save(tmp_path / "plain.tif")
    assert run("deep.tif", "plain.tif")[0] == 0
    deep, plain = (read_picture(tmp_path / "sharpened" / f"{name}.tif").pixels for name in ("deep", "plain"))
    assert deep.dtype == np.uint16 and deep.shape == (200, 230, 3)
    assert np.abs(deep / 257 - plain).max() <= 1.5 and np.square(deep / 257 - plain).mean() < 255**2 * 1e-5, "50 dB"
    assert np.abs(plain.astype(int) - rgb).max() > 10


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 500), (5, 2)])
def test_photos_of_any_size(run, tmp_path, size):
    save(tmp_path / "a.png", *size)
    assert run("a.png")[0] == 0 and read_picture(tmp_path / "sharpened/a.png").pixels.shape[:2] == size


def test_what_cannot_be_sharpened_is_said_and_the_rest_goes_on(run, tmp_path):
    folder = tmp_path / "photos"
    save(folder / "good.png")
    save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:400])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no photo")
    Image.fromarray(dummy_photo(20, 20, seed=0)).convert("LAB").save(folder / "lab.tif")
    (folder / "bomb.png").write_bytes(b"P4 30000 30000\n")  # PBM: a bit for each pixel, all of them 0, on the disk a hole
    os.truncate(folder / "bomb.png", (folder / "bomb.png").stat().st_size + 30000 * 30000 // 8)
    code, printed, errors = run("photos", "nowhere.png", "notes.txt")
    assert code == 1 and "1 of 8 files sharpened" in printed
    assert [line.split(": ")[0] for line in errors.splitlines()] == ["error"] * 7
    for name in "cut.jpg", "empty.png", "text.png", "lab.tif", "bomb.png", "nowhere.png", "notes.txt":
        assert errors.count(name) >= 1, name
    assert [path.name for path in (tmp_path / "sharpened").iterdir()] == ["good.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name photos, videos or folders to sharpen, or --frames"),
        (("a.png", "--strength", "3"), "--strength 3.0 must be between 0"),
        (("a.png", "--strength", "nan"), "--strength nan must be between 0"),
        (("a.png", "--device", "abacus"), "abacus"),
        (("a.png", "--orientations", "9"), "9 is not a whole number from 1 to 8"),
        (("a.png", "--weights", "none.pth"), "none.pth is not a file"),
        (("--frames", "0x10"), "argument --frames: 0x10 must be WIDTHxHEIGHT"),
        (("a.png", "--frames", "10x10"), "not both"),
        (("--frames", "10x10", "-o", "better.raw"), "--frames writes to standard output: leave out -o"),
    ],
)
def test_a_mistake_is_one_sentence(run, tmp_path, arguments, said):
    save(tmp_path / "a.png")
    code, _, errors = run(*arguments)
    assert code == 1 and errors.startswith("error: ") and said in errors and "\n" not in errors.strip()


def test_without_a_student_of_ones_own_the_shipped_one_is_taken(run, tmp_path, monkeypatch):
    (tmp_path / "best_student_model.pth").rename(tmp_path / "student.pth")
    monkeypatch.setattr(sharpen, "SHIPPED", tmp_path / "student.pth")
    save(tmp_path / "a.png")
    assert f"1 of 1 files sharpened with {tmp_path / 'student.pth'}" in run("a.png")[1]


def test_photos_are_read_ahead_in_order_and_never_many():
    taken = []
    with ThreadPoolExecutor(3) as pool:
        results = (pool.submit(lambda k: k * k, taken.append(k) or k) for k in range(20))
        for done, result in enumerate(look_ahead(results, 3)):
            assert result.result() == done**2 and done < len(taken) <= done + 4
    assert len(taken) == 20


def test_a_half_done_folder_is_finished_and_what_is_no_photo_is_named(run, tmp_path):
    for name in "a.png", "b.png", "c.png":
        save(tmp_path / "in" / name)
    for name in "d.nef", "e.nef", "f.mp4":
        (tmp_path / "in" / name).touch()
    assert run("in/a.png", "in/b.png", "-o", "results.jxl")[0] == 1, "several inputs into what looks like a file"
    assert run("in/a.png", "in/b.png", "-o", "results.2024")[0] == 0
    before = (tmp_path / "results.2024/a.png").stat().st_mtime_ns
    code, printed, errors = run("in", "-o", "results.2024")
    assert (code, errors) == (0, "") and before == (tmp_path / "results.2024/a.png").stat().st_mtime_ns
    assert "2 of the results exist already: --overwrite makes them again" in printed and "1 of 1 files" in printed
    assert "3 other files in in are left out: 2 .nef, 1 .mp4" in printed
    assert run("in", "-o", "new.2024")[0] == 0 and (tmp_path / "new.2024/c.png").is_file()


@pytest.mark.parametrize("out", ["photos.2024-06", "res.v2/", "res.png/"])
def test_a_name_that_ends_in_a_date_or_a_separator_is_that_of_a_folder(run, tmp_path, out):
    save(tmp_path / "a.png")
    assert run("a.png", "-o", out)[0] == 0 and (tmp_path / out / "a.png").is_file()


def test_a_pattern_that_the_shell_has_left_is_expanded(run, tmp_path):
    for name in "a.png", "b.png", "[c].png":
        save(tmp_path / name)
    code, printed, _ = run("?.png", "[c].png")
    assert code == 0 and "3 of 3 files" in printed
    assert "*.jpg is missing" in run("*.jpg")[2]


def test_what_a_result_lacks_is_told_in_its_line(run, tmp_path):
    Image.fromarray(dummy_photo(20, 20, seed=0)).convert("CMYK").save(tmp_path / "inks.jpg")
    code, printed, errors = run("inks.jpg")
    assert (code, errors) == (0, "") and "sharpened/inks.jpg: converted from CMYK to RGB\n" in printed


def test_errors_of_a_folder_come_in_order_and_each_photo_is_its_own(run, tmp_path):
    for k in range(12):
        save(tmp_path / "in" / f"{k:02d}.png", seed=k)
    for k in 3, 7:
        (tmp_path / "in" / f"{k:02d}.png").write_bytes(b"damaged")
    code, printed, errors = run("in")
    assert code == 1 and "10 of 12 files sharpened" in printed
    assert [line.split("/")[1][:2] for line in errors.splitlines()] == ["03", "07"]
    for k in (0, 6, 11):
        found = read_picture(tmp_path / "sharpened" / f"{k:02d}.png").pixels
        assert np.array_equal(found, Sharpener(network(), CPU)(dummy_photo(40, 52, seed=k)))
