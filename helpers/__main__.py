"""The command line: `python -m helpers COMMAND ...`, `--help` after any command."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from helpers import recipes, runs, runtime
from helpers.config import read_config
from helpers.errors import MissingInput, TunebookError

CELL_TIMEOUT_S = 3600
IDLE_WITHOUT = {"sft": "02_sft_qlora", "grpo": "03_grpo_gsm8k"}
BENCH = "run --judge --judge-model --models --limit --max-new-tokens"
MODEL = "model --adapter --system --max-new-tokens --temperature"

# command: function, and its options. A value goes to the parameter of the option's
# name; without one it has the function's own default.
COMMANDS = {
    "train": ("stages:train", "config --small"),
    "generate": (
        "inference.items:generate_command",
        f"{MODEL} --file --out --batch-size",
    ),
    "chat": ("inference.items:generate_command", MODEL),
    "evaluate": ("evaluation.evaluator:evaluate_run", "run --models"),
    "mt-bench": ("llm_judge.mt_bench:run_mt_bench", f"{BENCH} --data"),
    "alpaca-eval": (
        "llm_judge.alpaca_eval:run_alpaca_eval",
        f"{BENCH} --reference --evaluator",
    ),
    "judge-pairs": (
        "llm_judge.pairwise:judge_pairs",
        "run --judge --judge-model models --set --other --data",
    ),
    "export": ("export:export", "run --stage"),
    "demo": ("__main__:demo", "recipe"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "run": {"help": "a run's name"},
    "config": {"help": "a recipe's name, or a config.json"},
    "recipe": {"nargs": "?", "default": "demo", "help": "a recipe's name"},
    "model": {"help": "a run's name, a hub id, or a model's folder"},
    "models": {"nargs": 2, "help": "two evaluated models: base sft"},
    "--small": {"action": "store_true", "help": "offline model, few sample rows"},
    "--models": {"nargs": "+", "dest": "labels", "help": "base sft ...; else all"},
    "--adapter": {"help": "folder, hub id, a run's stage, or none; else its last"},
    "--system": {"help": "system prompt; else the run's"},
    "--file": {"type": Path, "required": True, "help": "prompts: JSON, CSV, text, ..."},
    "--out": {"type": Path, "required": True, "help": "answers, one JSON line each"},
    "--max-new-tokens": {"type": int, "help": "answers are cut here"},
    "--temperature": {"type": float, "help": "0 = greedy"},
    "--batch-size": {"type": int, "help": "prompts answered at once"},
    "--limit": {"type": int, "help": "answer at most this many"},
    "--judge": {"metavar": "URL", "help": "else OPENAI_BASE_URL"},
    "--judge-model": {"metavar": "NAME", "help": "else TUNEBOOK_JUDGE"},
    "--set": {"dest": "part", "help": "answers in eval/; else test_chat"},
    "--other": {"metavar": "RUN", "help": "the second model's run"},
    "--data": {"type": Path, "help": "FastChat's llm_judge/data folder"},
    "--reference": {"type": Path, "help": "outputs to win against"},
    "--evaluator": {"help": "a configuration of alpaca_eval"},
    "--stage": {"choices": ["sft", "grpo"], "help": "else the run's last one"},
}


def demo(recipe: str) -> runs.Run:
    """Executes copies of the notebooks, below the run's folder; returns the run."""
    sources = sorted((runtime.ROOT / "notebooks").glob("0*.ipynb"))
    if not sources:
        raise MissingInput("no notebooks: run this in a clone of the repository")
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbformat import read, write

    run, seconds = runs.save_run(recipes.load(recipe)), {}
    idle = [name for s, name in IDLE_WITHOUT.items() if s not in run.config.stages]
    # nobody is there to give access to Google Drive
    os.environ |= {"TUNEBOOK_RUN": run.config.name, "TUNEBOOK_DRIVE": "0"}
    (run.path / "notebooks").mkdir(exist_ok=True)
    for source in (path for path in sources if path.stem not in idle):
        notebook, started = read(source, as_version=4), time.perf_counter()
        client = NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT_S,
            kernel_name="python3",
            resources={"metadata": {"path": str(source.parent)}},
            coalesce_streams=True,  # an answer that was streamed stays one text
        )
        try:
            # the cells' own stderr is in the copy; this is the kernel's
            client.execute(stderr=subprocess.DEVNULL)
        except CellExecutionError as error:
            raise TunebookError(f"{source.name} failed\n{error}") from None
        finally:
            write(notebook, run.path / "notebooks" / source.name)
        seconds[source.stem] = round(time.perf_counter() - started, 1)
        show(f"{source.name} {seconds[source.stem] / 60:.1f} min")
    run.write_part("notebooks", {"seconds": seconds})
    return run


def show(result: Any) -> None:
    """Prints a text, a table, a part of the report, or the table of a run."""
    if isinstance(result, runs.Run):
        path, result = result.path, result.report()
        if "eval" in result:
            from helpers.evaluation.tables import results_table

            result = results_table(result)
        else:
            result = f"the run is in {path}"
    if isinstance(result, dict):
        result = json.dumps(result, indent=1)
    if result is not None:
        print(getattr(result, "to_string", lambda: result)(), flush=True)  # noqa: T201


def execute(command: str, settings: dict[str, Any]) -> Any:
    """Returns the result of a command's function, `settings` being its parameters."""
    engine = "auto"
    for name in settings.keys() & {"run", "other"}:
        settings[name] = runs.open_run(settings[name])
    if "run" in settings:
        engine = settings["run"].config.engine
    elif "config" in settings:
        name, is_small = settings["config"], settings.pop("small")
        is_file = name.endswith(".json")
        config = read_config(Path(name)) if is_file else recipes.load(name)
        settings["config"] = recipes.small(config) if is_small else config
        engine = config.engine
    elif "model" in settings:
        name = settings["model"]  # a run's name, no path
        if Path(name).name == name and (runs.runs_folder() / name).exists():
            engine = runs.open_run(name).config.engine
    if command != "demo":
        runtime.start(engine)  # before what imports transformers
    function, options = COMMANDS[command]
    if "--judge" in options:
        from helpers.llm_judge.judge import open_judge

        names = settings.pop("judge", None), settings.pop("judge_model", None)
        settings["judge"] = open_judge(settings["run"], *names)
    module, name = function.split(":")
    return getattr(import_module(f"helpers.{module}"), name)(**settings)


def main(arguments: list[str]) -> None:
    """Runs a command; SystemExit says in a sentence what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, (function, options) in COMMANDS.items():
        part = commands.add_parser(command, help=f"calls helpers.{function}")
        for option in options.split():
            part.add_argument(option, **OPTIONS[option])
    values = {
        k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None
    }
    if "models" in values:
        values["labels"] = tuple(values.pop("models"))
    try:
        show(execute(values.pop("command"), values))
    except (TunebookError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
