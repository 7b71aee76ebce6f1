"""Outputs of an executed notebook, as they are stored."""

import base64
import io

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from benchmarks import outputs

CODE = "print(1)"
TITLE = "# 0. A title\n\nThe *loss* falls. Why?"


def stream(text, name="stdout"):
    return new_output("stream", text=text, name=name)


def result(**data):
    data = {name.replace("_", "/", 1): value for name, value in data.items()}
    return new_output("execute_result", data, execution_count=3)


def fill(folder, *executed, code=CODE, alt="", runs=1):
    """A notebook with one code cell, after the outputs of its copy are put in."""
    cells = [
        new_markdown_cell(TITLE),
        new_code_cell(code, metadata={"alt": alt} if alt else {}),
    ]
    nbformat.write(new_notebook(cells=cells), folder / "a.ipynb")
    cells[1] = new_code_cell(CODE, execution_count=3, outputs=[*executed])
    nbformat.write(new_notebook(cells=cells), folder / "copy.ipynb")
    for _ in range(runs):
        outputs.fill(folder / "a.ipynb", folder / "copy.ipynb", "two cores, float32")
    notebook = nbformat.read(folder / "a.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_parts_of_a_stream_are_joined_in_the_order_they_came(tmp_path):
    parts = [stream("a\n"), stream("b\n"), result(text_plain="1"), stream("c\n")]
    cell = fill(tmp_path, *parts).cells[1]
    assert [o.get("text") for o in cell.outputs] == ["a\nb\n", None, "c\n"]
    assert cell.execution_count is cell.outputs[1].execution_count is None


def test_bars_banners_widgets_and_stderr_are_left_out(tmp_path):
    bar = result(text_plain="Loading weights:   0%|          | 0/272")
    form = result(text_plain="Form(...)", text_html="<table></table>")
    only_widget = result(text_plain="Box()")
    for output in (form, only_widget):
        output.data[outputs.WIDGET] = {"model_id": "1"}
    noise = stream("🦥 Unsloth: will patch\nloss 1.0\n"), stream("a warning", "stderr")
    stored = fill(tmp_path, bar, only_widget, *noise, form).cells[1].outputs
    assert [output.output_type for output in stored] == ["stream", "execute_result"]
    assert stored[0].text == "loss 1.0\n"
    assert set(stored[1].data) == {"text/html"}


def test_long_text_is_cut_with_a_word_and_paths_are_those_of_the_project(tmp_path):
    texts = stream("in /home/me/tunebook/runs/demo\n"), result(text_plain="x" * 7_000)
    first, second = fill(tmp_path, *texts).cells[1].outputs
    assert first.text == "in runs/demo\n"
    assert second.data["text/plain"].endswith("x\n... 1000 characters are left out")


def test_a_picture_is_stored_small(tmp_path):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((1_500, 300)).save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    html = f'<img src="data:image/png;base64,{picture}">'
    first, second = (
        fill(tmp_path, result(image_png=picture), result(text_html=html), alt="A < B")
        .cells[1]
        .outputs
    )
    stored = first.data["image/png"].replace("\n", "")
    assert Image.open(io.BytesIO(base64.b64decode(stored))).size == (1_000, 200)
    assert stored in second.data["text/html"]
    assert first.metadata["image/png"] == {"alt": "A < B"}
    assert second.data["text/html"].startswith('<img alt="A &lt; B" src="data:image')
    for drawn in (result(image_png=picture), result(text_html=html)):
        with pytest.raises(SystemExit, match="draws: say what, in its metadata's alt"):
            fill(tmp_path, drawn)


def test_the_title_says_once_which_machine_made_them(tmp_path):
    notebook = fill(tmp_path, stream("1\n"), runs=2)
    text = f"{TITLE}\n\n**Outputs** made on two cores, float32."
    assert notebook.cells[0].source == text
    made = {"code": outputs.hash_code(notebook), "made": "two cores, float32"}
    assert notebook.metadata.outputs == made


def test_outputs_of_other_code_and_of_a_failed_cell_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"copy.ipynb ran other code than a.ipynb has"):
        fill(tmp_path, code="print(2)")
    error = new_output("error", ename="ValueError", evalue="no", traceback=[])
    with pytest.raises(SystemExit, match="failed with ValueError: no"):
        fill(tmp_path, error)


def test_a_notebook_that_would_be_too_large_is_refused(tmp_path):
    rows = [stream("x" * 6_000), result(text_plain="1")] * 50
    with pytest.raises(SystemExit, match=r"a.ipynb would have 3\d\d,\d+ bytes"):
        fill(tmp_path, *rows)
