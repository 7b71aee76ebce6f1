"""AlpacaEval 2: answers to its 805 instructions, and win rates by its own package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import hf_hub_download

from helpers import runtime
from helpers.data.formats import ask
from helpers.errors import DataError, JudgeError
from helpers.files import write_json
from helpers.inference.items import find_adapters
from helpers.llm_judge.judge import UNJUDGED, Judge, add_result
from helpers.llm_judge.mt_bench import load_answering
from helpers.runs import Run, writes

# the answers that AlpacaEval 2 compares with; they hold the instructions
BASELINE = ("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json")


def annotate(
    outputs: Path, reference: Path, judge: Judge, evaluator: str | None = None
) -> dict[str, Any]:
    """Returns the win rate over the reference by the package `alpaca_eval`."""
    settings: list[Any] = [str(outputs), str(reference), judge.model, judge.base_url]
    settings += [evaluator, {"timeout": judge.timeout_s, "max_retries": judge.retries}]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0" if runtime.hub_reachable() else "1",
        "OPENAI_API_KEY": judge.api_key,
        "OPENAI_CLIENT_CONFIG_PATH": "",  # could name another judge
        "OPENAI_MAX_CONCURRENCY": str(judge.workers),
        "PYTHONPATH": "",
        "TQDM_DISABLE": "1",  # its bars end after the error
        "PYTHONSAFEPATH": "1",  # else this file would pass for the package
    }
    script = str(Path(__file__).with_name("alpaca_annotate.py"))
    command = [sys.executable, "-m", "uv", "run", "--no-project", "--script"]
    command += ["--python", sys.executable, script, json.dumps(settings)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        log = outputs.with_name("annotated.log")
        log.write_text(process.stderr, encoding="utf-8")
        lines = process.stderr.splitlines() or [f"exit status {process.returncode}"]
        raise JudgeError(
            f"alpaca_eval stopped: {lines[-1][:600]} (more in {log}); it needs `pip "
            "install uv`, and --evaluator alpaca_eval_gpt4 without log-probabilities"
        )
    return json.loads(process.stdout.splitlines()[-1])


@writes
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
        DataError, OSError: the run has no such model, or there is no reference.
        JudgeError: the package is missing, stopped, or read no verdict.
    """
    if reference is None:
        offline = not runtime.hub_reachable()  # else it would retry for minutes
        file = hf_hub_download(*BASELINE, repo_type="dataset", local_files_only=offline)
        reference = Path(file)
    try:
        rows = pd.read_json(reference, dtype=False)[["instruction", "output"]]
    except (ValueError, LookupError, TypeError) as error:
        message = "expected JSON rows with instruction and output"
        raise DataError(f"{reference}: {message}, found {error!r}") from None
    if not rows.map(lambda text: isinstance(text, str)).all(axis=None):
        raise DataError(f"{reference}: not every instruction and output is a text")
    texts = list(rows["instruction"][:: -(-len(rows) // limit) if limit else 1])
    name = "alpaca_eval" if len(texts) == 805 else f"alpaca_eval_{len(texts)}"
    sampling = {**run.config.inference, "max_new_tokens": max_new_tokens}
    parts = {}
    for label, adapter in find_adapters(run, labels).items():
        path = run.path / "eval" / label / name / "model_outputs.json"
        answer = load_answering(run, adapter, 2 * max_new_tokens)
        prompts = [ask(text, "") for text in texts]
        answers = answer(path.with_name("answers.jsonl"), prompts, sampling)
        del answer  # and its model
        runtime.free_memory()
        outputs = pd.DataFrame({"instruction": texts, "output": answers})
        outputs["generator"] = f"{run.config.name}-{label}"
        write_json(path, outputs.to_dict("records"))
        if judge is not None:
            parts[label] = annotate(path, reference, judge, evaluator)
            parts[label]["judge"] = judge.model
            add_result(run, label, name, parts[label])
    return pd.DataFrame(parts) if parts else UNJUDGED
