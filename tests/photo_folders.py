"""Folders of dummy photos for the tests of prepare_data.py."""

from conftest import dummy_photo
from PIL import Image

from images.photos import read_photo


def save(path, height=128, width=136, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(dummy_photo(height, width, seed=seed)).save(path)


def save_photos(tmp_path, count, start=0, **size):
    for k in range(start, count):
        save(tmp_path / "photos" / f"{k}.png", seed=k, **size)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def pixels(folder):
    return {str(path.relative_to(folder)): read_photo(path).tobytes() for path in sorted(folder.rglob("*.png"))}
