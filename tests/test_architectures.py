"""Tiny models of other families than Llama: labels, training, an answer that ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chats import fit_tokenizer, trl_templates
from helpers import files
from helpers.data import preparation as data
from helpers.inference import generation
from helpers.masking import dataset as masking
from helpers.masking.templates import neutralise, stop_token_ids
from helpers.models.load import load_tokenizer
from helpers.runs import Run
from helpers.training import trainer as sft
from helpers.training import trainer as train
from tests.tiny import save_tiny_model

# family -> the class's name, trl's template for it, and what else its config needs
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen": ("Qwen2", "qwen2_5", {}),
    "qwen3": ("Qwen3", "qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", "gemma3", {"head_dim": 16}),
    "phi": ("Phi3", "phi3", {}),
}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model of random weights with the chat template of its family."""
    kind, name, more = FAMILIES[request.param]
    base = load_tokenizer("smollm2-135m-offline")
    template = next(t for t in trl_templates() if f"trl/{name}" in t.names)
    tokenizer = fit_tokenizer(base, template)
    return save_tiny_model(kind, tokenizer, tmp_path / "model", **more)


def test_another_family_is_masked_trained_and_answers(
    folder: Path, run_factory: Callable[..., Run]
) -> None:
    run = run_factory(
        model=str(folder),
        system_prompt="",
        lora__target_modules="all-linear",
        sft__max_steps=3,
        sft__eval_steps=3,
        sft__warmup_steps=0,
    )
    data.prepare(run)
    model, tokenizer = train.load_for_training(run)
    rows = files.read_rows(run.path / "data" / "train.jsonl")
    row = masking.mask_conversation(tokenizer, rows[0]["messages"])
    answer = rows[0]["messages"][-1]["content"]
    learnt = tokenizer.decode([x for x in row["labels"] if x != masking.NO_LOSS])
    assert answer in learnt and not learnt.endswith(answer)
    stops = stop_token_ids(tokenizer)
    assert [x for x in row["labels"] if x != masking.NO_LOSS][-1] in stops

    trainer = sft.build_sft(run, model, tokenizer)
    part = train.fit(trainer, run)
    assert part["steps"] == 3 and part["loss_last"] > 0

    asked = [rows[0]["messages"][:-1]]
    (answered,) = generation.generate(model, tokenizer, asked, max_new_tokens=6)
    assert 0 < answered.tokens <= 6


def test_a_newline_among_gemmas_added_tokens_is_left_in_texts(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["\n", "\n\n", "  ", "<table>"])  # as Gemma's vocabulary has
    messages = [{"role": "user", "content": "One.\n\n  <table>\nTwo."}]
    assert neutralise(tokenizer, messages) is messages
