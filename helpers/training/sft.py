"""SFT: its arguments, its labelled rows, and the trainer of the command line.

Notebook 02 constructs the same objects in its cells.
"""

from __future__ import annotations

import json
import logging
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import checks
from helpers.data import preparation as data
from helpers.masking.dataset import mask_conversations
from helpers.runs import Run, write_json
from helpers.training import callbacks
from helpers.training.inputs import open_stage, training_arguments

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

log = logging.getLogger(__name__)
FILE = Path(__file__).with_name("eval_prompts.jsonl")
PROMPTS = [json.loads(row)["prompt"] for row in FILE.read_text("utf-8").splitlines()]
"""One of these is answered at each epoch's end."""


def sft_arguments(run: Run) -> dict[str, Any]:
    """Returns the arguments of `SFTConfig` for a run."""
    logging.getLogger("trl.trainer.sft_trainer").addFilter(is_not_about_packing)
    return {
        **training_arguments(run, "sft", run.path / "sft"),
        "max_length": run.config.max_length,
        "include_num_input_tokens_seen": "all",  # Unsloth logs no num_tokens
    }


def is_not_about_packing(record: logging.LogRecord) -> bool:
    """Returns False for TRL's warning that packed rows may attend to each other.

    It looks for FlashAttention. Since 5.x transformers keeps packed documents apart
    with SDPA too, by the position ids; `tests/test_train.py` holds it to that.
    """
    return "supported Flash Attention variant" not in record.getMessage()


@cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """Returns a folder for tokenised rows that goes when this process ends."""
    return tempfile.TemporaryDirectory(prefix="tunebook-")


def label_rows(run: Run, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Returns `input_ids` and `labels` of the run's `train` and `eval` rows.

    Opens the stage's folder, and writes what was dropped and cut to `labels.json`.

    Args:
        run: with `data/` prepared.
        tokenizer: of the model.

    Raises:
        MissingInput: notebook 01 has not prepared the data.
        ConfigError: the run has no sft stage.
        DataError: the labels would be wrong (see `masking`).
    """
    config, folder = run.config, open_stage(run, "sft")
    rows: dict[str, Dataset] = {}
    for part in ("train", "eval"):
        if part not in data.parts_of(config.data):
            continue
        file = Path(scratch().name) / f"{config.name}-{part}.arrow"
        file.unlink(missing_ok=True)  # an earlier trainer may still read it
        conversations = data.stream_rows(run.require(f"data/{part}.jsonl"))
        masked = mask_conversations(
            tokenizer,
            (row["messages"] for row in conversations),
            config.loss_on,
            config.max_length,
            file,
            drop=config.data.drop_unusable,
        )
        rows[part] = masked.rows
        if masked.dropped:
            log.info(f"{part}: {masked.describe_dropped()}")
        if part == "train":
            write_json(folder / "labels.json", masked.counts)
            if cut := checks.check_lengths(masked.ends, config.max_length):
                log.info(checks.report([cut]))
    return rows


def build_sft(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Trainer:
    """Returns the SFT trainer of a run, as notebook 02 constructs it.

    Args:
        run: with `data/` prepared.
        model: with LoRA attached, from `load_for_training`.
        tokenizer: of the model.

    Raises:
        MissingInput, ConfigError, DataError: see `label_rows`.
    """
    from trl import SFTConfig, SFTTrainer

    config, folder = run.config, run.path / "sft"
    rows = label_rows(run, tokenizer)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**sft_arguments(run)),
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        processing_class=tokenizer,
        callbacks=[
            callbacks.BestAdapter(folder / "adapter", config.best_by),
            callbacks.TimedSaves(config.save_minutes),
            callbacks.SkippedSteps(),
            callbacks.LiveSamples(
                tokenizer,
                PROMPTS,
                folder / "samples.jsonl",
                system_prompt=config.system_prompt,
            ),
        ],
    )
