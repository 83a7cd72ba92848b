"""Imports go down only: scripts -> training -> inference -> fused_student -> models, dataset -> images, blocks -> blur ->
cli -> utils, idle_cores."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train", "pretrain", "prepare_data", "sharpen", "evaluate", "export"}
FLOORS = [
    {"utils", "idle_cores"},
    {"cli"},
    {"blur"},
    {"images", "blocks"},
    {"models", "dataset"},
    {"fused_student"},
    {"inference"},
    {"training"},
    SCRIPTS,
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def test_imports_go_down_only_and_every_file_has_its_floor():
    files = [*ROOT.glob("*.py"), *(file for name in ("blur", "images", "training") for file in (ROOT / name).glob("*.py"))]
    assert {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in files} == FLOOR_OF.keys()
    for file in files:
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                for other in {name.partition(".")[0] for name in names} & FLOOR_OF.keys():
                    inside = other == room and (ROOT / room).is_dir()
                    assert inside or FLOOR_OF[other] < FLOOR_OF[room], f"{file.name} imports {other}"


def test_uv_installs_what_pip_does():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pairs = {"requirements.txt": project["dependencies"]}
    pairs["requirements-extras.txt"] = project["optional-dependencies"]["extras"]
    for file, packages in pairs.items():
        lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
        assert packages == [line for line in lines if line]
