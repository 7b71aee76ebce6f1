"""AlpacaEval 2: a run's answers to its 805 instructions, and win rates by its package.

The package `alpaca_eval` needs older libraries than training does: `uv` makes and keeps
an environment for it, from the head of `alpaca_annotate.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import runtime
from helpers.data.formats import Row
from helpers.errors import DataError, JudgeError
from helpers.files import fingerprint, write_json
from helpers.inference.generation import Answer, Prompt, generate_batches
from helpers.inference.items import answer_rows, find_adapters, model_print
from helpers.llm_judge.judge import UNJUDGED, Judge, add_result, subsample
from helpers.models import load as models
from helpers.runs import Run

HUB = "tatsu-lab/alpaca_eval"
# the baseline's answers, which AlpacaEval 2 compares with; they hold the instructions
BASELINE = "alpaca_eval_gpt4_baseline.json"
WHOLE = 805
SCRIPT = Path(__file__).with_name("alpaca_annotate.py")


def find_baseline() -> Path:
    """Returns the file of the baseline's outputs, from the hub or its cache."""
    from huggingface_hub import hf_hub_download

    offline = not runtime.hub_reachable()  # else the download would retry for minutes
    options: dict[str, Any] = {"repo_type": "dataset", "local_files_only": offline}
    try:
        return Path(hf_hub_download(HUB, BASELINE, **options))
    except OSError as error:
        raise DataError(
            f"{BASELINE} of {HUB} is not available ({type(error).__name__}): give a "
            "copy, or another model's outputs, with --reference"
        ) from error


def read_outputs(path: Path) -> list[Row]:
    """Returns a model's outputs as AlpacaEval keeps them, in a .json file."""
    expected = "expected a JSON list of rows with the texts 'instruction' and 'output'"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        texts = [text for row in rows for text in (row["instruction"], row["output"])]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: {expected}; found {error!r}") from error
    if {type(text) for text in texts} != {str}:
        raise DataError(
            f"{path}: {expected}; found {len(rows)} rows, not all with texts"
        )
    return rows


def answer_instructions(
    run: Run,
    label: str,
    adapter: Path | str | None,
    reference: list[Row],
    max_new_tokens: int,
) -> Path:
    """Returns the file of a model's outputs, by the config's `inference` or greedy."""
    count, config = len(reference), run.config
    name = "alpaca_eval" if count == WHOLE else f"alpaca_eval_{count}"
    folder = run.path / "eval" / label / name
    sampling = {**config.inference, "max_new_tokens": max_new_tokens}

    def generate(prompts: list[Prompt]) -> Iterator[dict[int, Answer]]:
        if prompts:
            from transformers import set_seed

            options = models.options(config)
            options["max_length"] = max(config.max_length, 2 * max_new_tokens)
            loaded = models.load_model(config.model, adapter=adapter, **options)
            set_seed(config.seed + count - len(prompts))
            size = config.evaluation.batch_size
            yield from generate_batches(
                *loaded, prompts, batch_size=size, sampling=sampling
            )

    rows = [
        {"id": n, "prompt": [{"role": "user", "content": row["instruction"]}]}
        for n, row in enumerate(reference)
    ]
    settings = fingerprint(model_print(config, adapter), sampling)
    path = folder / "answers.jsonl"
    items = answer_rows(path, rows, settings, generate, lambda text, row: {})
    name = f"{config.name}-{label}"
    outputs = [
        {**row, "output": item["output"], "generator": name}
        for row, item in zip(reference, items, strict=True)
    ]
    write_json(folder / "model_outputs.json", outputs)
    return folder / "model_outputs.json"


def annotate(
    outputs: Path, reference: Path, judge: Judge, evaluator: str | None = None
) -> dict[str, Any]:
    """Returns the win rate over the reference by the package `alpaca_eval`."""
    beside = str(Path(sys.executable).parent)
    uv = shutil.which("uv", path=beside) or shutil.which("uv")
    if uv is None:
        raise JudgeError("alpaca_eval gets an environment of its own: pip install uv")
    settings: dict[str, Any] = {"outputs": str(outputs), "reference": str(reference)}
    settings |= {"evaluator": evaluator, "whole": WHOLE}
    settings |= {"model": judge.model, "base_url": judge.base_url}
    settings["client"] = {"timeout": judge.timeout_s, "max_retries": judge.retries}
    # the second would name another judge
    dropped = ("PYTHONPATH", "OPENAI_CLIENT_CONFIG_PATH")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment |= {"OPENAI_API_KEY": judge.api_key, "PYTHONSAFEPATH": "1"}
    environment["OPENAI_MAX_CONCURRENCY"] = str(judge.workers)
    if not runtime.hub_reachable():
        environment["HF_HUB_OFFLINE"] = "1"
    command = [uv, "run", "--no-project", "--python", sys.executable, "--script"]
    command += [str(SCRIPT), json.dumps(settings)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        log = outputs.with_name("annotated.log")
        log.write_text(process.stderr, encoding="utf-8")
        text = process.stderr.strip() or f"exit status {process.returncode}"
        raise JudgeError(
            f"alpaca_eval stopped: {text.splitlines()[-1][:600]} (more in {log}); a "
            "judge without log-probabilities needs --evaluator alpaca_eval_gpt4"
        )
    return json.loads(process.stdout.splitlines()[-1])


def run_alpaca_eval(
    run: Run,
    judge: Judge | None,
    *,
    labels: list[str] | None = None,
    limit: int | None = None,
    max_new_tokens: int = 2048,
    reference: Path | None = None,
    evaluator: str | None = None,
) -> pd.DataFrame | str:
    """Returns the win rates of models, or a message where no judge is configured.

    Args:
        run, judge, labels, limit, max_new_tokens: as for `run_mt_bench`.
        reference: outputs to win against, by default AlpacaEval 2's baseline.
        evaluator: a configuration of the package, by default AlpacaEval 2's, which
            needs a judge with log-probabilities (`alpaca_eval_gpt4` does not).

    Raises:
        DataError: the run has no such model, or the reference is not available.
        JudgeError: see `annotate`.
    """
    reference = reference or find_baseline()
    rows = subsample(read_outputs(reference), limit)
    parts = {}
    for label, adapter in find_adapters(run, labels).items():
        path = answer_instructions(run, label, adapter, rows, max_new_tokens)
        runtime.free_memory()
        if judge is not None:
            values = annotate(path, reference, judge, evaluator)
            parts[label] = {**values, "judge": judge.model}
            add_result(run, label, path.parent.name, parts[label])
    return pd.DataFrame(parts) if parts else UNJUDGED
