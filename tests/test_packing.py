"""Packed rows teach exactly what they teach one by one, on both engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.data.formats import Messages
from helpers.masking.dataset import NO_LOSS, mask_conversations
from tests.rows import turns

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 160
TALK = ["What is 2 + 2?", "It is 4.", "And 2 + 3?", "It is 5.", "Thanks", "Bye! 🎉"]
UNSLOTH = """
import json
from helpers.models.load import load_model
from tests.test_packing import losses

model, tokenizer = load_model(
    "smollm2-135m-offline", engine="unsloth", weights="16bit", dtype="float32"
)
print(json.dumps(losses(model, tokenizer)))
"""


def conversations() -> list[Messages]:
    """Returns chats of different lengths."""
    chats = []
    for number in range(12):
        talk = TALK[: 2 + 2 * (number % 3)]
        talk[-1] += " Very well." * number
        chats.append(turns(*talk))
    return chats


def pack(tokenizer: Any) -> tuple[Any, Any]:
    """Returns the rows, and the same as the trainer packs them."""
    from trl import pack_dataset

    rows = mask_conversations(tokenizer, conversations(), max_length=LENGTH).rows
    return rows, pack_dataset(rows, LENGTH)


def batches(tokenizer: Any, rows: Any) -> list[dict[str, Any]]:
    """Returns one batch a row, as the trainer's collator makes them."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)
    return [collate([row]) for row in rows]


def losses(model: Any, tokenizer: Any) -> list[tuple[float, float]]:
    """Returns the loss of each packed row, and that of its documents one by one.

    The latter is the mean over the documents, weighted by their supervised tokens.
    """
    import torch

    def loss(**inputs: Any) -> float:
        # as in TRL's trainer: with a cache positions are not looked at
        with torch.no_grad():
            return float(model(**inputs, use_cache=False).loss)

    model.eval()
    pairs = []
    _, packed = pack(tokenizer)
    for row, batch in zip(packed, batches(tokenizer, packed), strict=True):
        total, count, start = 0.0, 0, 0
        for size in row["seq_lengths"]:
            part = {
                name: torch.tensor([row[name][start : start + size]])
                for name in ("input_ids", "labels")
            }
            tokens = int((part["labels"][:, 1:] != NO_LOSS).sum())
            total, count = total + loss(**part) * tokens, count + tokens
            start += size
        pairs.append((loss(**batch), total / count))
    return pairs


def test_packing_keeps_each_document_whole_with_its_labels(tokenizer: Any) -> None:
    rows, packed = pack(tokenizer)
    documents = []
    for row in packed:
        start = 0
        for size in row["seq_lengths"]:
            end = start + size
            documents.append((row["input_ids"][start:end], row["labels"][start:end]))
            start = end
        assert start == len(row["input_ids"]) <= LENGTH
    assert len(packed) < len(rows)
    assert sorted(documents) == sorted((r["input_ids"], r["labels"]) for r in rows)


def test_positions_restart_at_each_document(tokenizer: Any) -> None:
    _, packed = pack(tokenizer)
    for row, batch in zip(packed, batches(tokenizer, packed), strict=True):
        expected = [place for size in row["seq_lengths"] for place in range(size)]
        assert batch["position_ids"].tolist() == [expected]
        assert "attention_mask" not in batch  # the positions keep documents apart


def assert_same(pairs: list[Any]) -> None:
    assert len(pairs) > 1
    assert [x for x, _ in pairs] == pytest.approx([y for _, y in pairs], abs=1e-5)


def test_a_packed_row_has_the_loss_of_its_documents_as_positions_restart(
    tokenizer: Any, tiny_model_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    assert str(model.dtype) == "torch.float32"
    assert_same(losses(model, tokenizer))
    _, packed = pack(tokenizer)
    row = next(n for n, row in enumerate(packed) if len(row["seq_lengths"]) > 1)
    batch = {**batches(tokenizer, packed)[row], "use_cache": False}
    right = model(**batch).loss.item()
    del batch["position_ids"]
    assert abs(model(**batch).loss.item() - right) > 1e-5


def test_a_packed_row_has_the_loss_of_its_documents_under_unsloth_too(
    run_python: Any,
) -> None:
    assert_same(json.loads(run_python("-c", UNSLOTH).stdout.splitlines()[-1]))
