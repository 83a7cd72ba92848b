"""Runs the code cells of a notebook, from top to bottom, without Jupyter."""

import json
import sys
from pathlib import Path

notebook = json.loads(Path(sys.argv[1]).read_text())
names = {"display": lambda image: image.load()}
for number, cell in enumerate(notebook["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"{sys.argv[1]}, cell {number}", "exec"), names)
