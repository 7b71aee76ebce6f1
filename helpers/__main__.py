"""The command line: `python -m helpers COMMAND ...`, `--help` after any command."""

import argparse
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

REMEDY = "run `make setup` and use .venv/bin/python, or install tunebook[stack]"
SMALLER = "take weights='4bit', a shorter max_length or a smaller model"
try:
    from helpers import recipes, runs, runtime
    from helpers.config import RunConfig, read_config
    from helpers.errors import TunebookError, mask_secrets
except ImportError as error:
    sys.exit(f"{error}: {REMEDY}")

BENCH = "run --judge --judge-model --models --limit --max-new-tokens"
MODEL = "model --adapter --system --max-new-tokens --temperature"

# command: what it is for, its function, and the parameters from the command line
COMMANDS = {
    "train": "train, evaluate and compare, by a recipe or on your rows: "
    "stages:train config --small --stage --gpus --shard",
    "generate": "answer the prompts of a file: "
    f"inference.items:generate_command {MODEL} --file --out --batch-size",
    "chat": "talk to a model, on a page or in the terminal: "
    f"inference.items:chat_command {MODEL} --backend --host --port --terminal",
    "evaluate": "score the models of a run on its held-out rows: "
    "evaluation.evaluator:evaluate_run run --models",
    "report": "print the tables of a run: evaluation.evaluator:report run --board",
    "mt-bench": "have a judge grade answers to MT-Bench's questions: "
    f"llm_judge.chat_benchmarks:run_mt_bench {BENCH}",
    "alpaca-eval": "have a judge compare answers with a reference's: "
    f"llm_judge.chat_benchmarks:run_alpaca_eval {BENCH} --reference --evaluator",
    "judge-pairs": "have a judge compare two models of a run: llm_judge.pairwise:"
    "judge_pairs run --judge --judge-model labels --set --other --limit",
    "export": "write a run's model for other programs, and compare: "
    "export.formats:export run --stage --format --push --public",
    "doctor": "check this machine, with a remedy for what fails: doctor:report",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "config": {"help": "a recipe or run, a config.json, or rows: mine.jsonl"},
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
    "--stage": {"choices": ["sft", "grpo"], "help": "this one; else all, or the last"},
    "--gpus": {"metavar": "N", "help": "of this machine, or all; else one"},
    "--shard": {"action": "store_true", "help": "share weights that one cannot hold"},
}
LEAST = {"temperature": 0, "max_new_tokens": 1, "batch_size": 1, "limit": 1}


def open_config(name: str) -> RunConfig:
    """Returns the config of a recipe, a run, a config file, or somebody's rows."""
    if name not in recipes.NAMES and runs.is_run(name):
        return runs.open_run(name).config
    path = Path(name)
    is_list = path.is_file() and path.read_bytes()[:99].lstrip().startswith(b"[")
    if path.suffix == ".json" and not is_list:
        return read_config(path)
    is_rows = re.search(r"[./]", name) or path.is_file()
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
    function, *options = COMMANDS[command].partition(": ")[2].split()
    for name in values.keys() & {"run", "other"}:
        values[name] = runs.open_run(values[name])
    config = values["run"].config if "run" in values else None
    if "config" in values:
        config, is_small = open_config(values["config"]), values.pop("small")
        values["config"] = config = recipes.small(config) if is_small else config
    elif "model" in values and runs.is_run(values["model"]):
        config = runs.open_run(values["model"]).config
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
        purpose, _, parts = text.partition(": ")
        part = commands.add_parser(command, help=purpose)
        for option in parts.split()[1:]:
            part.add_argument(option, **OPTIONS.get(option, {}))
    values = vars(parser.parse_args(arguments))
    for name, least in LEAST.items():
        if (value := values.get(name)) is not None and value < least:
            parser.error(f"{name}={value}: the least is {least}")
    values = {name: value for name, value in values.items() if value is not None}
    runtime.show_messages()
    try:
        shard = values.pop("shard", False)
        gpus = values.pop("gpus", "all" if shard else None)
        if gpus and "LOCAL_RANK" not in os.environ:
            # before CUDA starts in this process
            runtime.launch(arguments, gpus, shard)
        result = execute(command := values.pop("command"), values)
        show(result if command != "export" else None)  # which logs its table
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from what is saved")
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: {REMEDY}")
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        sys.exit(f"{type(error).__name__}: {str(error).partition('. ')[0]}: {SMALLER}")
    except (TunebookError, OSError, ImportError) as error:
        sys.exit(mask_secrets(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main(sys.argv[1:])
