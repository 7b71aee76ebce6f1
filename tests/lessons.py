"""Copies of the notebooks in which the folded answers to exercises are code cells.

python -m tests.lessons FOLDER
"""

import re
import sys
from pathlib import Path

import nbformat

# a few rows for the quickstart, which takes its own and not the run `smoke`
SMALL = {'ROWS = ""  #': 'ROWS = "data_samples/dolly.jsonl"  #'}
PATHS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))


def is_answer(cell):
    return "answer" in cell["metadata"].get("tags", [])


def answer_code(cell):
    """Returns the one block of Python that an answer's text has."""
    blocks = re.findall(r"^```python\n(.*?)\n```$", cell["source"], re.M | re.S)
    if len(blocks) != 1:
        raise ValueError(f"cell {cell['id']}: {len(blocks)} blocks of Python, not one")
    return blocks[0]


def with_answers(path):
    """Returns a notebook with each answer's code in a cell of its own after it."""
    notebook, cells = nbformat.read(path, as_version=4), []
    for cell in notebook.cells:
        for text, small in SMALL.items():
            cell.source = cell.source.replace(text, small)
        cells.append(cell)
        if is_answer(cell):
            code = nbformat.v4.new_code_cell(answer_code(cell))
            cells.append(code | {"id": f"{cell['id']}-code"})
    notebook.cells = [nbformat.from_dict(cell) for cell in cells]
    return notebook


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for path in PATHS:
        nbformat.write(with_answers(path), folder / path.name)
