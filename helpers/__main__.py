"""The command line: `python -m helpers COMMAND ...`, `--help` after any command."""

import argparse
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from helpers import recipes, runs, runtime
from helpers.config import RunConfig, read_config
from helpers.errors import TunebookError, mask_secrets

BENCH = "run --judge --judge-model --models --limit --max-new-tokens"
MODEL = "model --adapter --system --max-new-tokens --temperature"

# command: function, and the parameters that it takes from the command line
COMMANDS = {
    "train": "stages:train config --small --stage --gpus",
    "generate": f"inference.items:generate_command {MODEL} --file --out --batch-size",
    "chat": f"inference.items:chat_command {MODEL} --backend --host --port --terminal",
    "evaluate": "evaluation.evaluator:evaluate_run run --models",
    "report": "evaluation.evaluator:report run --board",
    "mt-bench": f"llm_judge.chat_benchmarks:run_mt_bench {BENCH}",
    "alpaca-eval": f"llm_judge.chat_benchmarks:run_alpaca_eval {BENCH} --reference "
    "--evaluator",
    "judge-pairs": "llm_judge.pairwise:judge_pairs run --judge --judge-model labels "
    "--set --other --limit",
    "export": "export.formats:export run --stage --format --push --public",
    "doctor": "doctor:diagnose",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "config": {"help": "a recipe's name, a config.json, or rows: mine.jsonl"},
    "model": {"help": "a run's name, a hub id, or a model's folder"},
    "labels": {"nargs": 2, "help": "two evaluated models: base sft"},
    "--small": {"action": "store_true", "help": "offline model, few sample rows"},
    "--models": {"nargs": "+", "dest": "labels", "help": "base sft ...; else all"},
    "--board": {"action": "store_true", "help": "write the run's row of results/"},
    "--adapter": {"help": "folder, hub id, a run's stage, or none; else its last"},
    **dict.fromkeys(("--file", "--out"), {"type": Path, "required": True}),
    "--temperature": {"type": float},
    **dict.fromkeys(("--max-new-tokens", "--batch-size", "--limit"), {"type": int}),
    "--backend": {"choices": ["auto", "transformers", "gguf"], "help": "else auto"},
    "--host": {"help": "of the page; else 127.0.0.1, this machine alone"},
    "--port": {"type": int, "help": "of the page; else the first free from 7860"},
    "--terminal": {"action": "store_true", "help": "chat here, without a page"},
    "--judge": {"metavar": "URL", "help": "else OPENAI_BASE_URL"},
    "--judge-model": {"metavar": "NAME", "help": "else TUNEBOOK_JUDGE"},
    "--set": {"dest": "part", "help": "answers in eval/; else test_chat"},
    "--other": {"metavar": "RUN", "help": "the second model's run"},
    "--format": {"nargs": "+", "dest": "formats", "help": "gguf:q4_k_m ..."},
    "--push": {"metavar": "OWNER/NAME", "help": "upload it, privately"},
    "--public": {"action": "store_true", "default": None, "help": "what is pushed"},
    "--stage": {"choices": ["sft", "grpo"], "help": "train: else all; else the last"},
    "--gpus": {"metavar": "N", "help": "of this machine, or all; else one"},
}


def open_config(name: str) -> RunConfig:
    """Returns the config of a recipe's name, a config file, or somebody's rows."""
    path = Path(name)
    is_list = path.exists() and path.read_bytes()[:99].lstrip().startswith(b"[")
    if path.suffix == ".json" and not is_list:
        return read_config(path)
    is_rows = re.search(r"[./]", name) or path.exists()
    return recipes.for_data(name) if is_rows else recipes.load(name)


def show(result: Any) -> None:
    if isinstance(result, runs.Run):
        from helpers.evaluation import tables

        for table in (tables.results_table, tables.differences_table):
            if not (rows := table(result.report())).empty:
                show(rows)
        result = f"{result.path}; to chat: python -m helpers chat {result.config.name}"
    if result is not None:
        print(getattr(result, "to_string", lambda: result)(), flush=True)  # noqa: T201


def execute(command: str, values: dict[str, Any]) -> Any:
    function, *options = COMMANDS[command].split()
    for name in values.keys() & {"run", "other"}:
        values[name] = runs.open_run(values[name])
    config = values["run"].config if "run" in values else None
    if "config" in values:
        config, is_small = open_config(values["config"]), values.pop("small")
        values["config"] = config = recipes.small(config) if is_small else config
    elif "model" in values:
        folder = runs.runs_folder() / values["model"]
        if folder.parent == runs.runs_folder() and folder.exists():
            config = runs.open_run(folder.name).config
    # before what imports transformers
    runtime.start(config.engine if config else "auto")
    if "--judge" in options:
        from helpers.llm_judge.judge import open_judge

        names = values.pop("judge", None), values.pop("judge_model", None)
        values["judge"] = open_judge(values["run"], *names)
    module, name = function.split(":")
    return getattr(import_module(f"helpers.{module}"), name)(**values)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, text in COMMANDS.items():
        function, *options = text.split()
        part = commands.add_parser(command, help=f"calls helpers.{function}")
        for option in options:
            part.add_argument(option, **OPTIONS.get(option, {}))
    values = vars(parser.parse_args(arguments))
    values = {name: value for name, value in values.items() if value is not None}
    for name in values.keys() & {"max_new_tokens", "batch_size", "limit"}:
        if values[name] < 1:
            parser.error(f"{name}: at least 1 expected, {values[name]} found")
    try:
        if (gpus := values.pop("gpus", None)) and "LOCAL_RANK" not in os.environ:
            runtime.launch(arguments, gpus)  # before CUDA starts in this process
        result = execute(command := values.pop("command"), values)
        show(result if command != "export" else None)  # which logs its table
    except (TunebookError, OSError, ImportError) as error:
        sys.exit(mask_secrets(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main(sys.argv[1:])
