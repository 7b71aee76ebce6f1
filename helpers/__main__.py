"""The command line: `python -m helpers COMMAND ...`, `--help` behind any command."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "train": "helpers.training.trainer",
    "generate": "helpers.inference.chat",
    "judge-pairs": "helpers.llm_judge.duels",
    "alpaca-eval": "helpers.llm_judge.alpaca_eval",
    "mt-bench": "helpers.llm_judge.mt_bench",
}


def main(arguments: list[str]) -> None:
    """Runs a command.

    Raises:
        SystemExit: there is no such command.
    """
    name, *rest = arguments or ["--help"]
    if name == "series":
        sys.exit(import_module("helpers.series").main((rest or ["demo"])[0]))
    if name == "recipes":
        print(import_module("helpers.recipes").list_recipes())  # noqa: T201
        return
    if name not in COMMANDS:
        sys.exit(f"expected one of {', '.join(COMMANDS)}; found {name}")
    import_module(COMMANDS[name]).main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
