"""What the tests share: the offline tokenizer, a tiny model, and run folders."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.tiny import save_tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from helpers.runs import Run

# read when the libraries are imported, so set before any test imports them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# a former test's rows must not answer for the file that a test just wrote
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="tunebook-datasets-")
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="tunebook-trackio-")
for _name in ("HF_DATASETS_CACHE", "TRACKIO_DIR"):
    atexit.register(shutil.rmtree, os.environ[_name], ignore_errors=True)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the variables that steer a run out of the way."""
    for name in ("RUN", "RECIPE", "DTYPE", "GPU_GB"):
        monkeypatch.delenv(f"TUNEBOOK_{name}", raising=False)


@pytest.fixture(autouse=True)
def plain_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logs as `runtime.start()` has it, but where caplog sees it."""
    library = logging.getLogger("helpers")
    monkeypatch.setattr(library, "handlers", [])
    monkeypatch.setattr(library, "propagate", True)
    level = library.level
    library.setLevel(logging.INFO)
    yield
    library.setLevel(level)


@pytest.fixture(scope="session")
def run_python(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a Python of its own in the project's folder, which must end well.

    Takes its command line, and variables of its environment.
    """

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        compiled = tmp_path_factory.mktemp("unsloth")
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "UNSLOTH_COMPILE_LOCATION": str(compiled), **more},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope="session")
def heavy_modules(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[[str], list[str]]:
    """Runs a program in a Python of its own; returns the heavy modules it loaded."""
    heavy = ["torch", "transformers", "datasets", "trl", "peft", "unsloth"]
    loaded = f"print(*(name for name in {heavy} if name in sys.modules))"
    return lambda program: run_python(
        "-c", f"{program}\nimport sys\n{loaded}"
    ).stdout.split()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The offline model's tokenizer; do not change it, `make_tokenizer` copies it."""
    from helpers.models import load_tokenizer

    return load_tokenizer("smollm2-135m-offline")


@pytest.fixture(scope="session")
def make_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., PreTrainedTokenizerFast]:
    """Makes a copy of the tokenizer with other special tokens and template.

    `special` are tokens to add, `adds_bos` has it put BOS before every text, and the
    rest goes to `PreTrainedTokenizerFast`.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    serialized = tokenizer.backend_tokenizer.to_str()

    def make(
        special: tuple[str, ...] = (), adds_bos: bool = False, **options: Any
    ) -> PreTrainedTokenizerFast:
        core = Tokenizer.from_str(serialized)
        core.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in special]
        )
        if adds_bos:
            bos = options["bos_token"]
            core.post_processor = TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=core, clean_up_tokenization_spaces=False, **options
        )

    return make


@pytest.fixture(scope="session")
def tiny_model_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a random two-layer Llama, with the offline tokenizer."""
    return save_tiny_model(
        "Llama",
        tokenizer,
        tmp_path_factory.mktemp("tiny-model"),
        max_position_embeddings=2048,
    )


@pytest.fixture
def runs_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of runs, instead of the project's own."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("TUNEBOOK_RUNS", str(folder))
    return folder


@pytest.fixture
def run_factory(runs_home: Path, tiny_model_folder: Path) -> Callable[..., Run]:
    """Makes and saves a run of the tiny model on few rows; takes `changed`'s fields."""
    from helpers import recipes, runs
    from helpers.config import changed

    def make(**changes: Any) -> Run:
        small = {
            "name": "test",
            "model": str(tiny_model_folder),
            "max_length": 256,
            "data__train_rows": 24,
            "data__eval_rows": 4,
            "data__test_rows": 6,
            "data__test_new_rows": 4,
            "data__general_rows": 4,
        }
        config = changed(recipes.load("smoke"), **{**small, **changes})
        return runs.save_run(config, current=True)

    return make


@pytest.fixture
def run(run_factory: Callable[..., Run]) -> Run:
    """A saved run of the tiny model, nothing prepared or trained."""
    return run_factory()
