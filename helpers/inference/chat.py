"""Answers with a run's model or any other: a file of prompts, or a conversation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.data.formats import Fields, Messages, Row, read_prompt
from helpers.data.preparation import ask
from helpers.data.sources import open_rows
from helpers.errors import ConfigError, DataError
from helpers.evaluation.items import answer_rows
from helpers.inference.generation import generate_batches, reply
from helpers.models.load import load_model, options
from helpers.runs import Run, content_hash, fingerprint, open_run, runs_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def generate_command(
    model: str,
    *,
    adapter: str | None = None,
    file: Path | None = None,
    out: Path | None = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    batch_size: int | None = None,
) -> None:
    """Answers prompts: those of a file into another, or those typed in a chat.

    A file that was interrupted goes on where it stopped.

    Args:
        model: a run's name, a hub id, or a model's folder.
        adapter: folder, hub id, stage, or `none`; by default the run's last one.
        file: prompts, in any format of training rows, or a text with one a line.
        out: the answers, a JSON line each.
        system: the system prompt; a run's own by default.
        max_new_tokens: answers are cut here.
        temperature: of sampling; 0 is greedy. A run's `inference` by default.
        batch_size: prompts answered at once.

    Raises:
        ConfigError: `file` without `out`, or the run's config is not valid.
        DataError: a row of the file is not a prompt.
    """
    if (file is None) != (out is None):
        raise ConfigError("--file and --out go together: prompts, and their answers")
    loading, sampling = dict[str, Any](), dict[str, Any]()
    # a model's folder has a config.json too, a run's name is not a path
    if Path(model).name == model and (runs_folder() / model / "config.json").exists():
        run = open_run(model)
        adapter = find_adapter(run, adapter)
        model, loading = run.config.model, options(run.config)
        sampling = dict(run.config.inference)
        system = run.config.system_prompt if system is None else system
    if temperature == 0:
        sampling = {k: v for k, v in sampling.items() if k == "max_new_tokens"}
    elif temperature is not None:
        sampling["temperature"] = temperature
    if max_new_tokens is not None:
        sampling["max_new_tokens"] = max_new_tokens
    loading["adapter"] = None if adapter == "none" else adapter
    # read before minutes of loading
    rows = read_prompts(file, system or "") if file else []
    net, tokenizer = load_model(model, **loading)
    if out is None:
        chat(net, tokenizer, system or "", sampling)
        return
    answer_rows(
        out,
        rows,
        fingerprint(model, loading, sampling, content_hash(loading["adapter"])),
        lambda prompts: generate_batches(
            net, tokenizer, prompts, sampling=sampling, batch_size=batch_size
        ),
        lambda text, row: {},
    )
    log.info("%d answers in %s", len(rows), out)


def find_adapter(run: Run, adapter: str | None) -> str | None:
    """Returns a run's adapter: of a stage, by default of the last one trained."""
    stages = run.config.stages
    if adapter is not None:
        return str(run.require(f"{adapter}/adapter")) if adapter in stages else adapter
    folders = [run.path / stage / "adapter" for stage in reversed(stages)]
    trained = [str(folder) for folder in folders if folder.exists()]
    return trained[0] if trained else run.config.sft_adapter


def read_prompts(path: Path, system_prompt: str) -> list[Row]:
    """Returns `{"id", "prompt"}` rows, the prompt being a conversation."""
    rows, fields = [], Fields()
    for number, row in open_rows(str(path)):
        try:
            if isinstance(row, DataError):
                raise row
            prompt = read_prompt(row, system_prompt, fields)
        except DataError as error:
            raise DataError(
                f"{path}, row {number} is not a prompt: {error}; expected a text or an "
                "object with prompt, question, instruction, messages or conversations "
                "that ends with the user"
            ) from None
        key = row.get("id", number) if isinstance(row, dict) else number
        rows.append({"id": key, "prompt": prompt})
    fields.report(str(path))
    return rows


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str = "",
    sampling: dict[str, Any] | None = None,
) -> None:
    """Answers what is typed, printing words as they come, until /quit or the end."""
    print("/new starts a new conversation, /quit ends.")  # noqa: T201
    turns: Messages = []
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            return
        if message == "/quit":
            return
        if message == "/new":
            turns = []
        elif message:
            turns = [*turns, *ask(message, "" if turns else system_prompt)]
            text = reply(model, tokenizer, turns, stream=True, sampling=sampling)
            turns.append({"role": "assistant", "content": text})
