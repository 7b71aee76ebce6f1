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
from pathlib import Path
from typing import Any

import pandas as pd

from helpers import runtime
from helpers.data.formats import Row
from helpers.errors import DataError, JudgeError
from helpers.llm_judge.judge import UNJUDGED, Judge
from helpers.llm_judge.mt_bench import add_result, answering, find_adapters, subsample
from helpers.runs import Run, write_json

HUB = "tatsu-lab/alpaca_eval"
# the baseline's answers, which AlpacaEval 2 compares with; they hold the instructions
BASELINE = "alpaca_eval_gpt4_baseline.json"
WHOLE = 805
SCRIPT = Path(__file__).with_name("alpaca_annotate.py")


def find_baseline() -> Path:
    """Returns the file of the baseline's outputs, from the hub or its cache."""
    from huggingface_hub import hf_hub_download

    offline = not runtime.hub_reachable()  # else the download would retry for minutes
    options = {"repo_type": "dataset", "local_files_only": offline}
    try:
        return Path(hf_hub_download(HUB, BASELINE, **options))
    except OSError as error:
        raise DataError(
            f"{BASELINE} of {HUB} is not available ({type(error).__name__}): give a "
            "copy, or another model's outputs, with --reference"
        ) from error


def read_outputs(path: Path) -> list[Row]:
    """Returns a model's outputs as AlpacaEval keeps them, in a .json file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        texts = [(row["instruction"], row["output"]) for row in rows]
    except (OSError, ValueError, LookupError, TypeError) as error:
        texts, rows = [], error
    bad = [n for n, pair in enumerate(texts, 1) if {type(t) for t in pair} != {str}]
    if bad or not texts:
        raise DataError(
            f"{path}: expected a JSON list of rows with the texts 'instruction' and "
            f"'output'; found {f'row {bad[0]} without' if bad else repr(rows)}"
        )
    return rows


def answer(
    run: Run,
    label: str,
    adapter: Path | str | None,
    reference: list[Row],
    max_new_tokens: int,
) -> Path:
    """Returns the file of a model's outputs, made where they are missing.

    It is `eval/<label>/alpaca_eval/model_outputs.json`, or `alpaca_eval_<n>` with fewer
    than 805 instructions. Greedy, or by the config's `inference`.
    """
    count, config = len(reference), run.config
    name = "alpaca_eval" if count == WHOLE else f"alpaca_eval_{count}"
    folder = run.path / "eval" / label / name
    prompts = [[{"role": "user", "content": row["instruction"]}] for row in reference]
    sampling = {**config.inference, "max_new_tokens": max_new_tokens}
    generate = answering(run, adapter, max(config.max_length, 2 * max_new_tokens))
    items = generate(folder / "answers.jsonl", prompts, **sampling)
    outputs = [
        {
            "dataset": row.get("dataset", ""),
            "instruction": row["instruction"],
            "output": item["output"],
            "generator": f"{config.name}-{label}",
        }
        for row, item in zip(reference, items, strict=True)
    ]
    write_json(folder / "model_outputs.json", outputs)
    return folder / "model_outputs.json"


def annotate(
    outputs: Path, reference: Path, judge: Judge, evaluator: str | None = None
) -> dict[str, Any]:
    """Returns the win rate over the reference, as the package `alpaca_eval` counts it.

    Annotations are kept beside the outputs: a repeated run asks only what is missing.

    Raises:
        JudgeError: there is no `uv`, the judge refuses a request, or the package fails.
    """
    beside = str(Path(sys.executable).parent)
    uv = shutil.which("uv", path=beside) or shutil.which("uv")
    if uv is None:
        raise JudgeError("alpaca_eval gets an environment of its own: pip install uv")
    settings = {
        "outputs": str(outputs),
        "reference": str(reference),
        "evaluator": evaluator,
        "model": judge.model,
        "base_url": judge.base_url,
        "whole": WHOLE,
        "client": {"timeout": judge.timeout_s, "max_retries": judge.retries},
    }
    # the last of these names another judge's address
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
        raise JudgeError(
            f"alpaca_eval stopped: {process.stderr.strip().splitlines()[-1][:600]} "
            f"(more in {log}); a judge without log-probabilities needs --evaluator "
            "alpaca_eval_gpt4"
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

    Outputs lie in `eval/<label>/alpaca_eval/`, win rates in the report.

    Args:
        run: whose models answer.
        judge: from `open_judge`; None stops after the outputs.
        labels: of models, by default `base` and all stages.
        limit: only so many instructions, spread evenly over the file.
        max_new_tokens: answers are cut here.
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
        path = answer(run, label, adapter, rows, max_new_tokens)
        runtime.free_memory()
        if judge is not None:
            values = annotate(path, reference, judge, evaluator)
            parts[label] = {**values, "judge": judge.model}
            add_result(run, label, path.parent.name, parts[label])
    return pd.DataFrame(parts) if parts else UNJUDGED
