"""What every notebook keeps to, checked without running one."""

import ast
import contextlib
import copy
import io
import json
import math
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import nbformat
import pandas
import pytest
import torch

from benchmarks import outputs as stored_outputs
from helpers import estimate, recipes
from tests.lessons import answer_code, is_answer, with_answers

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = ROOT / "README.md"
COLAB = "https://colab.research.google.com/github/"

SERIES = [path for path in PATHS if path.stem[0].isdigit()]
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
every_lesson = pytest.mark.parametrize("path", SERIES, ids=lambda path: path.stem)


@cache
def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path, kind):
    """The texts of all cells of a kind, in order."""
    cells = load(path)["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == kind]


def nodes(path):
    for source in sources(path, "code"):
        yield from ast.walk(ast.parse(source))


def repository():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["project"]["urls"]["Repository"]


KINDS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def undefined(code):
    """What ruff says of names that are used before anything binds them."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache"]
    command += ["--select", "F821", "--output-format", "concise", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout if done.returncode else ""


def test_the_notebooks_are_numbered_without_a_gap():
    numbers = [int(path.stem.split("_")[0]) for path in SERIES]
    assert len(numbers) >= 7
    assert numbers == list(range(len(numbers)))


@every_notebook
def test_a_notebook_is_valid_nbformat_4_5(path):
    notebook = copy.deepcopy(load(path))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    nbformat.validate(notebook)
    assert notebook == load(path), "validation had something to repair"


def test_the_bootstrap_is_the_same_and_asks_before_installing():
    (code,) = {sources(path, "code")[0] for path in PATHS}
    assert len(re.findall(r'^KEEP = "drive"  # on Colab ', code, re.M)) == 1
    opened = code.index("\nruntime.keep_runs(KEEP)\n")
    assert opened < code.index("\ninstall.ensure()\n")
    assert re.findall(r'^REPOSITORY = "(.*)"$', code, re.M) == [repository()]


def test_the_bootstrap_fetches_a_pinned_version_and_says_from_where(
    tmp_path, monkeypatch, capsys
):
    code = sources(PATHS[0], "code")[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    version = f"v{project['project']['version']}"
    assert re.findall(r'^VERSION = "(.*?)"', code, re.M) == [version]
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: commands.append(words))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    exec(code.partition("\nfrom helpers")[0], {})
    fetch = ["git", "-c", "advice.detachedHead=false", "clone", "-q", "--depth=1"]
    assert commands == [[*fetch, "--branch", version, repository(), "tunebook"]]
    assert capsys.readouterr().out == f"fetches {repository()} at {version}\n"


@every_notebook
def test_the_badge_opens_this_notebook_of_the_repository(path):
    owner = repository().removeprefix("https://github.com/")
    links = re.findall(rf"\(({COLAB}[^)]*)\)", sources(path, "markdown")[0])
    assert links == [f"{COLAB}{owner}/blob/main/notebooks/{path.name}"]


def result(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


@every_lesson
def test_the_readme_lists_the_notebook_with_its_measured_minutes_and_its_memory(path):
    minutes = f"{result('demo_cpu')['notebooks']['seconds'][path.stem] / 60:.1f}"
    (line,) = re.findall(rf"^\| \[{path.stem}\].*", README.read_text(), re.M)
    said, memory_gb = line.strip("| ").split(" | ")[-2:]
    title = "".join(load(path)["cells"][0]["source"])
    assert said == minutes
    takes = f"**Takes** {minutes} minutes and {memory_gb} GB on two CPU cores (demo"
    assert f"{takes} recipe){on_gpus(path.stem)}. **Reads**" in title


def t4_minutes(tokens):
    """Minutes for answers: a token costs one reading of the weights, at 320 GB/s."""
    h100_ms = result("grpo_speed")["runs"]["ours"]["sampler"]["ms_a_token"]
    return tokens * h100_ms * 3350 / 320 / 60_000


def beside(notebook):
    """Minutes of a notebook on an H100 without its stage: start, imports, probes."""
    demo = result("demo_gpu")
    parts = {"02_sft_qlora": [demo["sft"]], "03_grpo_gsm8k": [demo["grpo"]]}
    parts["04_evaluation"] = demo["eval"].values()
    stage_s = sum(part["seconds"] for part in parts.get(notebook, []))
    return (demo["notebooks"]["seconds"][notebook] - stage_s) / 60


def on_gpus(notebook):
    """A notebook's minutes on an H100, as measured, and on a T4: docs/speed.md."""
    took = result("demo_gpu")["notebooks"]["seconds"].get(notebook)
    text = f", {took / 60:.1f} minutes on an H100" if took else ""
    if notebook == "05_export":
        text += " (adapter and merged model alone)"
        return f"{text}; a T4 is not predicted: its host's CPU answers for GGUF files"
    config = recipes.load("finetome-llama32-1b")
    rows = (config.data.test_rows, config.data.test_new_rows)
    batches = sum(math.ceil(n / config.evaluation.batch_size) for n in rows)
    minutes = {
        "00_setup": beside("00_setup") + t4_minutes(96),
        "01_data_prep": beside("01_data_prep"),
        "02_sft_qlora": beside("02_sft_qlora")
        + estimate.sft_minutes(config, estimate.T4),
        "03_grpo_gsm8k": beside("03_grpo_gsm8k") + config.grpo_minutes,
        "04_evaluation": beside("04_evaluation")
        + t4_minutes(3 * batches * config.evaluation.max_new_tokens),
        # starts as 00 does; two turns of two models, three batches of draws
        "06_chat_and_judges": beside("00_setup") + t4_minutes(4 * 40 + 3 * 24),
    }[notebook]
    return f"{text}; {minutes:.1f} on a T4 (default recipe), predicted, not measured"


def test_the_quickstart_says_its_predicted_minutes_on_a_t4(monkeypatch):
    monkeypatch.setattr(recipes, "usual", lambda: "finetome-llama32-1b")
    config = recipes.for_data("data_samples/word_problems/train.jsonl")
    kept = config.data.train_rows * (
        1 - config.data.eval_share - config.data.test_share
    )
    minutes = estimate.sft_minutes(config, estimate.T4, round(kept))
    decoding = config.evaluation
    batches = math.ceil(decoding.text_rows / decoding.batch_size)
    minutes += t4_minutes(2 * batches * decoding.max_new_tokens)
    minutes += beside("02_sft_qlora") + beside("04_evaluation")
    title = sources(ROOT / "notebooks" / "quickstart.ipynb", "markdown")[0]
    assert minutes < 20
    form = "{:.1f} on a T4 (FineTome), predicted, not measured. **Reads**"
    assert form.format(minutes) in title


@every_lesson
def test_the_first_text_says_what_is_read_and_written_and_the_last_what_is_next(path):
    title, *_, close = sources(path, "markdown")
    assert load(path)["cells"][0]["cell_type"] == "markdown"
    assert title.startswith(f"# {int(path.stem.split('_')[0])}. ")
    assert [title.count(f"**{word}** ") for word in ("Takes", "Reads", "Writes")] == [
        1
    ] * 3
    assert close.startswith("## Done")
    for following in SERIES[SERIES.index(path) + 1 :][:1]:
        assert f"**{following.stem}**" in close


@every_notebook
def test_cells_are_short_and_not_empty(path):
    code, texts = sources(path, "code"), sources(path, "markdown")
    assert len(code) <= 45
    assert max(len(source.splitlines()) for source in code) <= 25
    lines = [line for source in code for line in source.splitlines()]
    assert [line for line in lines if len(line) > 88] == []
    prose = [re.sub(r"```.*?```", "", text, flags=re.S) for text in texts]
    assert [text[:40] for text in prose if len(text.split()) > 120] == []
    assert all(source.strip() for source in [*code, *texts])


@every_notebook
def test_the_code_is_plain_python_that_asks_for_no_token(path):
    for source in sources(path, "code"):
        ast.parse(source)
        assert not re.search(r"^\s*(%|!)", source, flags=re.M)
        assert not re.search(r"login|HF_TOKEN|userdata|getpass|\binput\(", source)


@every_notebook
def test_no_function_of_the_helpers_is_defined_again(path):
    here = {node.name for node in nodes(path) if isinstance(node, KINDS)}
    for file in (ROOT / "helpers").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert here.isdisjoint({n.name for n in tree.body if isinstance(n, KINDS)})


@every_notebook
def test_every_name_is_bound_by_a_cell_above(path):
    cells = [c for c in with_answers(path).cells if c["cell_type"] == "code"]
    assert undefined("\n".join(cell["source"] + "\n" for cell in cells)) == ""


@every_lesson
def test_two_exercises_have_folded_answers_that_the_notebooks_test_runs(path):
    cells = with_answers(path).cells
    answers = [n for n, cell in enumerate(cells) if is_answer(cell)]
    assert len(answers) == 2
    for n in answers:
        text = cells[n]["source"]
        assert text.startswith("<details><summary>") and text.endswith("</details>")
        assert cells[n + 1]["source"] == answer_code(cells[n])


@every_lesson
def test_the_figure_has_a_description_and_shows_on_any_background(path):
    folder = "figures/"
    if "/OWNER/" not in repository():  # Colab has no files beside a notebook
        address = repository().replace("github.com", "raw.githubusercontent.com")
        folder = f"{address}/main/notebooks/{folder}"
    text = "\n".join(sources(path, "markdown"))
    figures = re.findall(r"!\[(.{40,})\]\((?!http.*badge)(.*?)(\w+\.svg)\)", text)
    assert figures and {place for _, place, _ in figures} == {folder}
    for _, _, name in figures:
        root = ElementTree.parse(ROOT / "notebooks" / "figures" / name).getroot()
        _, _, width, height = map(float, root.get("viewBox", "").split())
        card = next(each for each in root if each.tag.endswith("rect"))
        assert float(card.get("width")) >= width - 2
        assert float(card.get("height")) >= height - 2
        assert re.fullmatch("#[0-9a-f]{6}", card.get("fill"))


@every_lesson
def test_links_to_read_on_are_given(path):
    (reading,) = [s for s in sources(path, "markdown") if "ead on" in s]
    assert len(re.findall(r"\]\(https://", reading)) >= 3


def imported(path):
    """What the notebook's cells bind by importing from the helpers, really imported."""
    bound = {}
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "helpers":
            module = import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    import_module(f"{node.module}.{alias.name}")
                bound[alias.asname or alias.name] = getattr(module, alias.name)
    return bound


@every_notebook
def test_what_is_asked_of_the_helpers_exists_and_none_is_overwritten(path):
    bound = imported(path)
    modules = {k: v for k, v in bound.items() if isinstance(v, ModuleType)}
    absent = [
        f"{node.value.id}.{node.attr}"
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in modules and not hasattr(modules[node.value.id], node.attr)
    ]
    assert absent == []
    names = [node for node in nodes(path) if isinstance(node, ast.Name)]
    assert bound.keys().isdisjoint(n.id for n in names if isinstance(n.ctx, ast.Store))


@every_notebook
def test_what_is_stored_is_small_and_has_no_widgets_counts_or_errors(path):
    assert path.stat().st_size < 250_000
    assert "widgets" not in load(path)["metadata"]
    assert "application/vnd.jupyter.widget" not in json.dumps(load(path))
    cells = [c for c in load(path)["cells"] if c["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    counted = [x for x in cells + outputs if x.get("execution_count") is not None]
    assert counted == []
    assert "error" not in {output["output_type"] for output in outputs}


@every_notebook
def test_stored_outputs_were_made_by_the_code_above_them(path):
    notebook = nbformat.read(path, as_version=4)
    made = notebook.metadata.get("outputs")
    if not made:
        pytest.skip("no outputs are stored")
    assert made["code"] == stored_outputs.hash_code(notebook), "run make outputs"
    assert f"**Outputs** made on {made['made']}." in notebook.cells[0].source
    shown = [output for c in notebook.cells for output in c.get("outputs", [])]
    assert shown
    text = stored_outputs.PICTURE.sub("", json.dumps(shown))
    assert not re.search(r"(?<![\w:/.])/(home|root|tmp|content|Users|usr|work)/", text)
    assert not stored_outputs.BAR.search(text)


PROSE = re.compile(r"```.*?```|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)", re.S)


def value_of(source, path):
    """What a cell shows, or `results/<name>.json` has under keys, times a factor.

    An answer that needs nothing of the cells above is run.
    """
    if not source.startswith("results/"):
        (cell,) = [c for c in load(path)["cells"] if c["id"] == source]
        if cell["cell_type"] == "code":
            return json.dumps(cell["outputs"], ensure_ascii=False)
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            code = answer_code(cell | {"source": "".join(cell["source"])})
            exec(code, {"torch": torch, "pandas": pandas})
        return shown.getvalue()
    name, *keys, factor = source.removeprefix("results/").split(" | ")
    value = result(name)
    for key in keys:
        value = value[int(key) if isinstance(value, list) else key]
    return f"{value * float(factor):.6f}"


@every_notebook
def test_numbers_in_the_prose_are_those_of_outputs_and_results(path):
    """A text's metadata name the source of each number that a run gave."""
    for cell in load(path)["cells"]:
        text = PROSE.sub("", "".join(cell["source"]))
        for number, source in cell["metadata"].get("numbers", {}).items():
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", text), number
            value = value_of(source, path)
            if source.startswith("results/"):
                digits = len(number.partition(".")[2])
                assert f"{float(value):.{digits}f}" == number, source
            elif value != "[]":  # outputs are made by `make outputs`
                assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", value), source


@every_notebook
def test_a_text_with_a_measured_number_names_its_source(path):
    """Rates and decimals are measured, unless the code or a formula has them."""
    written = sources(path, "code")
    written += re.findall(
        r"```.*?```|\$[^$]*\$", "".join(sources(path, "markdown")), re.S
    )
    written.append("95")  # the level of all intervals
    known = {float(n) for n in re.findall(r"\d+\.?\d*(?:e-?\d+)?", " ".join(written))}
    for number, cell in enumerate(load(path)["cells"]):
        if cell["cell_type"] == "code" or number == 0 or cell["id"].endswith("done"):
            continue
        text = PROSE.sub("", "".join(cell["source"]))
        names = cell["metadata"].get("numbers", {})
        decimals = re.findall(r"(?<![\w.,])\d+\.\d+(?!\.?\d)|\d+(?= ?%)", text)
        unnamed = {n for n in decimals if n not in names and float(n) not in known}
        assert unnamed <= set(cell["metadata"].get("constants", [])), cell["id"]


DRAWS = re.compile(r"plt\.show\(|Image\(|training\.fit\(|train_stage\(")


@every_notebook
def test_a_cell_that_draws_says_in_words_what_its_picture_shows(path):
    for cell in load(path)["cells"]:
        if cell["cell_type"] != "code" or not DRAWS.search("".join(cell["source"])):
            continue
        assert len(cell["metadata"].get("alt", "")) > 80, cell["id"]
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                picture = output["metadata"]["image/png"]
                assert picture["alt"] == cell["metadata"]["alt"], cell["id"]
