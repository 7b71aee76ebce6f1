"""Packed rows teach exactly what they teach one by one, on both engines."""

import json

import pytest

from helpers.masking.dataset import NO_LOSS, mask_conversations
from tests.rows import turns

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


def pack(tokenizer):
    """Returns rows, the same as the trainer packs them, and a batch of each pack."""
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    talks = [TALK[: 2 + 2 * (n % 3)] for n in range(12)]
    chats = [turns(*talk[:-1], talk[-1] + " Well." * n) for n, talk in enumerate(talks)]
    rows = mask_conversations(tokenizer, chats, max_length=LENGTH).rows
    packed = pack_dataset(rows, LENGTH)
    collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)
    return rows, packed, [collate([row]) for row in packed]


def documents(row):
    """Returns the rows that were packed into one."""
    ends = [sum(row["seq_lengths"][: n + 1]) for n in range(len(row["seq_lengths"]))]
    return [
        {name: row[name][end - size : end] for name in ("input_ids", "labels")}
        for size, end in zip(row["seq_lengths"], ends, strict=True)
    ]


def losses(model, tokenizer):
    """Returns the loss of each packed row, and that of its documents one by one.

    The latter is the mean over the documents, weighted by their supervised tokens.
    """
    import torch

    def loss(**inputs):
        # as in TRL's trainer: with a cache positions are not looked at
        with torch.no_grad():
            return float(model(**inputs, use_cache=False).loss)

    model.eval()
    pairs = []
    _, packed, batches = pack(tokenizer)
    for row, batch in zip(packed, batches, strict=True):
        total, count = 0.0, 0
        for document in documents(row):
            part = {name: torch.tensor([values]) for name, values in document.items()}
            tokens = int((part["labels"][:, 1:] != NO_LOSS).sum())
            total, count = total + loss(**part) * tokens, count + tokens
        pairs.append((loss(**batch), total / count))
    return pairs


def test_a_packed_row_has_the_loss_of_its_documents_as_positions_restart(
    tokenizer, tiny_model_folder, run_python
):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    under_unsloth = json.loads(run_python("-c", UNSLOTH).stdout.splitlines()[-1])
    for pairs in (losses(model, tokenizer), under_unsloth):
        alone = [loss for _, loss in pairs]
        assert [loss for loss, _ in pairs] == pytest.approx(alone, abs=1e-5)
    batch = {**max(pack(tokenizer)[2], key=lambda b: b["position_ids"].argmin())}
    right = model(**batch, use_cache=False).loss.item()
    del batch["position_ids"]
    assert abs(model(**batch, use_cache=False).loss.item() - right) > 1e-5
