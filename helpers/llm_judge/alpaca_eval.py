"""AlpacaEval 2: a run's answers to its 805 instructions, and win rates by its package.

The package `alpaca_eval` needs older libraries than training does, so it runs in an
environment of its own, which `uv` makes from the head of `alpaca_annotate.py` and
keeps. Prompts and settings of the judge are the package's.

    python -m helpers alpaca-eval RUN --models base sft --judge URL --judge-model NAME
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

from helpers import runtime
from helpers.data.formats import Row
from helpers.errors import DataError, JudgeError
from helpers.evaluation.evaluator import model_print
from helpers.evaluation.items import answer_rows
from helpers.inference.generation import Answer, Prompt, generate_batches
from helpers.llm_judge import judge
from helpers.llm_judge.judge import Judge
from helpers.models import load as models
from helpers.runs import Run, fingerprint, write_json

HUB = "tatsu-lab/alpaca_eval"
# the baseline's answers, which AlpacaEval 2 compares with; they hold the instructions
BASELINE = "alpaca_eval_gpt4_baseline.json"
WHOLE = 805
SCRIPT = Path(__file__).parent / "alpaca_annotate.py"


def read_outputs(path: Path) -> list[Row]:
    """Returns a model's outputs as AlpacaEval keeps them, in a .json file.

    Raises:
        DataError: the file is no JSON, or a row is no output.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds no list of outputs")
    for number, row in enumerate(rows, start=1):
        for key in ("instruction", "output"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise DataError(f"row {number} of {path} lacks {key!r}, a text")
    return rows


def find_outputs(path: Path | None) -> Path:
    """Returns the file given, or that of the baseline from the hub.

    Raises:
        DataError: there is no such file, or the hub is out of reach.
    """
    if path is not None:
        if not path.is_file():
            raise DataError(f"no file {path}: give outputs in AlpacaEval's format")
        return path
    from huggingface_hub import hf_hub_download

    away = not runtime.hub_reachable()  # would be tried for minutes
    try:
        found = hf_hub_download(
            HUB, BASELINE, repo_type="dataset", local_files_only=away
        )
        return Path(found)
    except OSError as error:
        raise DataError(
            f"{BASELINE} of {HUB} cannot be had ({type(error).__name__}): give a copy, "
            "or another model's outputs, with --reference"
        ) from error


def answer(
    run: Run,
    label: str,
    adapter: Path | str | None,
    reference: list[Row],
    *,
    max_new_tokens: int = 2048,
) -> Path:
    """Returns the file of a model's outputs, made where they are missing.

    It is `eval/<label>/alpaca_eval/model_outputs.json`, or `alpaca_eval_<n>` where the
    reference has not all 805. Answers are kept batch by batch; those of other weights
    or settings are made again. Greedy, or by the config's `inference`.

    Args:
        run: whose model answers.
        label: `base`, `sft`, `grpo`.
        adapter: on the base model; None answers with the base.
        reference: from `read_outputs`; `instruction` and `dataset` are taken.
        max_new_tokens: answers are cut here.
    """
    config, n = run.config, len(reference)
    sampling = {**config.inference, "max_new_tokens": max_new_tokens}

    def generate(prompts: list[Prompt]) -> Iterator[dict[int, Answer]]:
        if not prompts:
            return
        options = models.options(config)
        options["max_length"] = max(config.max_length, 2 * max_new_tokens)
        loaded = models.load_model(config.model, adapter=adapter, **options)
        runtime.seed_everything(config.seed + n - len(prompts))
        size = config.evaluation.batch_size
        yield from generate_batches(
            *loaded, prompts, batch_size=size, sampling=sampling
        )

    rows = [
        {"id": place, "prompt": [{"role": "user", "content": row["instruction"]}]}
        for place, row in enumerate(reference)
    ]
    name = "alpaca_eval" if n == WHOLE else f"alpaca_eval_{n}"
    home = run.path / "eval" / label / name
    settings = fingerprint(model_print(config, adapter), sampling)
    items = answer_rows(
        home / "answers.jsonl", rows, settings, generate, lambda text, row: {}
    )
    runtime.free_memory()
    outputs = [
        {
            "dataset": row.get("dataset", ""),
            "instruction": row["instruction"],
            "output": item["output"],
            "generator": f"{config.name}-{label}",
        }
        for row, item in zip(reference, items, strict=True)
    ]
    write_json(home / "model_outputs.json", outputs)
    return home / "model_outputs.json"


def annotate(
    outputs: Path, reference: Path, client: Judge, evaluator: str | None = None
) -> dict[str, Any]:
    """Returns the win rate over the reference, as the package `alpaca_eval` counts it.

    Annotations are kept beside the outputs: a repeated run asks only what is missing.

    Args:
        outputs: from `answer`.
        reference: the outputs to win against.
        client: the judge.
        evaluator: a configuration of the package; None is AlpacaEval 2's, which needs
            a judge that returns log-probabilities (`alpaca_eval_gpt4` does not).

    Raises:
        JudgeError: there is no `uv`, the judge refuses a request, or the package
            stopped, after which its last line is told.
    """
    beside = Path(sys.executable).parent
    uv = shutil.which("uv", path=str(beside)) or shutil.which("uv")
    if uv is None:
        raise JudgeError("alpaca_eval gets an environment of its own: pip install uv")
    found = outputs.with_name("win_rate.json")
    found.unlink(missing_ok=True)
    settings = {
        "outputs": str(outputs),
        "reference": str(reference),
        "result": str(found),
        "evaluator": evaluator,
        "model": client.model,
        "base_url": client.base_url,
        "whole": len(read_outputs(outputs)) == WHOLE,
        "client": {"timeout": client.timeout_s, "max_retries": client.retries},
    }
    environment = {
        **os.environ,
        "OPENAI_API_KEY": client.api_key,
        "OPENAI_MAX_CONCURRENCY": str(client.workers),
        "PYTHONSAFEPATH": "1",
    }
    environment.pop("PYTHONPATH", None)
    environment.pop("OPENAI_CLIENT_CONFIG_PATH", None)  # would name another judge
    if not runtime.hub_reachable():
        environment["HF_HUB_OFFLINE"] = "1"
    command = [uv, "run", "--no-project", "--python", sys.executable]
    command += ["--script", str(SCRIPT), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode or not found.exists():
        log = outputs.with_name("annotated.log")
        log.write_text(done.stderr, encoding="utf-8")
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise JudgeError(
            f"alpaca_eval stopped: {lines[-1][:300]} (more in {log}); a judge without "
            "log-probabilities needs --evaluator alpaca_eval_gpt4"
        )
    values = json.loads(found.read_text(encoding="utf-8"))
    if "refusal" in values:
        found.unlink()
        raise JudgeError(values["refusal"])
    return values


def measure(
    run: Run,
    adapters: dict[str, Path | str | None],
    client: Judge | None,
    *,
    reference: Path | None = None,
    evaluator: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 2048,
) -> dict[str, dict[str, Any]]:
    """Returns the win rates of models by their labels, nothing without a judge.

    Outputs lie where `answer` says, win rates in the report.

    Args:
        run: whose models answer.
        adapters: the adapter of each label, from `judge.find_adapters`.
        client: the judge; None stops after the outputs.
        reference: outputs to win against; None is the baseline, from the hub.
        evaluator: see `annotate`.
        limit: only so many instructions, spread evenly over the file.
        max_new_tokens: answers are cut here.

    Raises:
        DataError: the reference cannot be had, or is not as it should be.
        JudgeError: see `annotate`.
    """
    reference = find_outputs(reference)
    rows = judge.spread(read_outputs(reference), limit)
    parts = {}
    for label, adapter in adapters.items():
        path = answer(run, label, adapter, rows, max_new_tokens=max_new_tokens)
        if client is not None:
            parts[label] = annotate(path, reference, client, evaluator)
            parts[label]["judge"] = client.model
            judge.add_result(run, label, path.parent.name, parts[label])
    return parts


def main(arguments: list[str]) -> None:
    """Answers AlpacaEval with models of a run and has a judge compare the answers.

    Raises:
        SystemExit: something that the user can mend is wrong; the message says what.
    """
    parser = judge.answering_parser(
        "python -m helpers alpaca-eval", "instructions", 2048
    )
    parser.add_argument("--reference", type=Path, help="outputs to win against")
    parser.add_argument("--evaluator", help="a configuration of alpaca_eval")
    given = parser.parse_args(arguments)
    with runtime.exit_on(ValueError, OSError):
        parts = measure(
            **judge.open_answering(given),
            reference=given.reference,
            evaluator=given.evaluator,
        )
    for label, part in parts.items():
        print(label, json.dumps(part))  # noqa: T201
    if not parts:
        print(judge.UNJUDGED)  # noqa: T201
