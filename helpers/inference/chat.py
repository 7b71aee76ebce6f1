"""Answers prompts with a run's model or any other, one by one or from a file.

    python -m helpers generate demo                         # chat, the last adapter on
    python -m helpers generate demo --adapter none          # the base model
    python -m helpers generate smollm2-135m-offline --adapter path/or/hub-id
    python -m helpers generate demo --file prompts.jsonl --out answers.jsonl

The file is read as training rows are: JSON lines, a JSON list, a table, or a text with
a prompt a line. A row is a text, or an object with `prompt`, `question`, `instruction`,
`messages` or `conversations`.
A stopped batch goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers import runtime
from helpers.config import RunConfig, read_config
from helpers.data import preparation as data
from helpers.data import sources
from helpers.data.formats import Fields, Messages, Row, read_prompt
from helpers.errors import ConfigError, DataError, ModelError, TemplateError
from helpers.models import load as models
from helpers.runs import Run, content_hash, fingerprint, runs_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUIT, NEW = "/quit", "/new"


class Chosen(NamedTuple):
    """What a command line asks for."""

    model: str
    adapter: str | None
    options: dict[str, Any]
    """Of `models.load_model`."""
    system_prompt: str
    sampling: dict[str, Any]
    """Of `generation.generate`; greedy without anything but `max_new_tokens`."""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers generate",
        description="Answers prompts, one by one or from a file.",
    )
    parser.add_argument("model", help="a run's name, a hub id, or a model's folder")
    parser.add_argument(
        "--adapter",
        help="folder, hub id, a stage of the run, or none; a run's last one by default",
    )
    parser.add_argument(
        "--file",
        type=Path,
        help="prompts: .jsonl, .json, .csv, .parquet, or .txt with one a line",
    )
    parser.add_argument("--out", type=Path, help="answers, a JSON line each")
    parser.add_argument("--system", help="system prompt; a run's own by default")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--temperature", type=float, help="0 = greedy")
    parser.add_argument("--batch-size", type=int)
    given = parser.parse_args(arguments)
    if (given.file is None) != (given.out is None):
        parser.error("--file and --out go together")
    return given


def choose(given: argparse.Namespace) -> Chosen:
    """Returns the model, adapter and settings that are meant.

    Raises:
        ConfigError: the run's config is not valid.
    """
    folder = runs_folder() / given.model
    options: dict[str, Any] = {}
    system, sampling, adapter = "", {}, given.adapter
    name = given.model
    # a model's folder has a config.json too, a run's name is no path
    if Path(name).name == name and (folder / "config.json").exists():
        run = Run(folder, read_config(folder / "config.json"))
        config = run.config
        name, options, system = (
            config.model,
            models.options(config),
            config.system_prompt,
        )
        sampling = dict(config.inference)
        adapter = find_adapter(run, adapter)
    if adapter == "none":
        adapter = None
    if given.temperature is not None:
        sampling.pop("temperature", None)
        if given.temperature > 0:
            sampling["temperature"] = given.temperature
        else:
            sampling = {k: v for k, v in sampling.items() if k == "max_new_tokens"}
    if given.max_new_tokens:
        sampling["max_new_tokens"] = given.max_new_tokens
    if given.system is not None:
        system = given.system
    return Chosen(name, adapter, options, system, sampling)


def find_adapter(run: Run, asked: str | None) -> str | None:
    """Returns a run's adapter: of a stage, by default of the last one trained."""
    config: RunConfig = run.config
    if asked in config.stages:
        return str(run.require(f"{asked}/adapter"))
    if asked is not None:
        return asked
    trained = [run.path / stage / "adapter" for stage in reversed(config.stages)]
    found = next((str(path) for path in trained if path.exists()), None)
    return found or config.sft_adapter


def read_prompts(path: Path, system_prompt: str) -> list[Row]:
    """Returns `{"id", "prompt"}` rows, the prompt being a conversation.

    Prints which fields were not used, or turns changed.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file is empty, or a row is no prompt.
    """
    rows, fields = [], Fields()
    for number, row in sources.open_rows(str(path)):
        try:
            if isinstance(row, DataError):
                raise row
            prompt = read_prompt(row, system_prompt, fields)
        except DataError as error:
            raise DataError(
                f"{path}, row {number} is no prompt: {error}; expected a text, or an "
                "object with prompt, question, instruction, messages or conversations "
                "that ends with the user"
            ) from None
        key = row.get("id", number) if isinstance(row, dict) else number
        rows.append({"id": key, "prompt": prompt})
    for line in data.remarks({"sources": {str(path): vars(fields)}}):
        print(line)  # noqa: T201
    return rows


def answer_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Chosen,
    given: argparse.Namespace,
    rows: list[Row],
) -> None:
    """Answers prompts, from `read_prompts`, and writes the answers as they come."""
    from helpers.evaluation.items import answer_rows
    from helpers.inference.generation import generate_batches

    answer_rows(
        given.out,
        rows,
        fingerprint(chosen, content_hash(chosen.adapter)),
        lambda prompts: generate_batches(
            model,
            tokenizer,
            prompts,
            sampling=chosen.sampling,
            batch_size=given.batch_size,
        ),
        lambda text, row: {},
    )


def chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chosen: Chosen
) -> None:
    """Talks with whoever types, printing words as they come, until /quit or the end."""
    from helpers.inference.generation import reply

    print(f"{NEW} starts a new conversation, {QUIT} ends.")  # noqa: T201
    turns: Messages = []
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return
        if said == QUIT:
            return
        if said == NEW:
            turns = []
        elif said:
            turns = [*turns, *data.ask(said, "" if turns else chosen.system_prompt)]
            text = reply(model, tokenizer, turns, stream=True, sampling=chosen.sampling)
            turns.append({"role": "assistant", "content": text})


def main(arguments: list[str]) -> None:
    """Answers prompts, one by one or from a file.

    Raises:
        SystemExit: something that the user can mend is wrong; the message says what.
    """
    given = parse_arguments(arguments)
    with runtime.exit_on(ConfigError, DataError, ModelError, TemplateError, OSError):
        chosen = choose(given)
        # read before minutes of loading
        rows = read_prompts(given.file, chosen.system_prompt) if given.file else []
        model, tokenizer = models.load_model(
            chosen.model, adapter=chosen.adapter, **chosen.options
        )
        if given.file:
            answer_file(model, tokenizer, chosen, given, rows)
            print(f"{len(rows)} answers in {given.out}")  # noqa: T201
        else:
            chat(model, tokenizer, chosen)
