"""SFT: its arguments, its labelled rows, and its trainer, as notebook 02 builds it."""

from __future__ import annotations

import logging
import tempfile
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
# tokenised rows go when this process ends
SCRATCH = tempfile.TemporaryDirectory(prefix="tunebook-")


def sft_arguments(run: Run) -> dict[str, Any]:
    """Returns the arguments of `SFTConfig` for a run."""
    logging.getLogger("trl.trainer.sft_trainer").addFilter(is_not_about_packing)
    return {
        **training_arguments(run, "sft", run.path / "sft"),
        "max_length": run.config.max_length,
        "include_num_input_tokens_seen": "all",  # Unsloth logs no num_tokens
    }


def is_not_about_packing(record: logging.LogRecord) -> bool:
    """Returns False for TRL's warning that packed rows may attend to each other."""
    # transformers keeps them apart by position ids, see `tests/test_train.py`
    return "supported Flash Attention variant" not in record.getMessage()


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
    parts = data.parts_of(config.data)
    for part in [name for name in ("train", "eval") if name in parts]:
        file = Path(SCRATCH.name) / f"{config.name}-{part}.arrow"
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
    """Returns the SFT trainer of a run, for a model from `load_for_training`."""
    from trl import SFTConfig, SFTTrainer

    config, folder = run.config, run.path / "sft"
    rows = label_rows(run, tokenizer)
    samples = folder / "samples.jsonl"
    return SFTTrainer(
        model=model,
        args=SFTConfig(**sft_arguments(run)),
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        processing_class=tokenizer,
        callbacks=[
            callbacks.BestAdapter(folder / "adapter", config.best_by),
            callbacks.LiveSamples(tokenizer, samples, config.system_prompt),
        ],
    )
