"""Export: files that answer as the trained model does, without this project too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import export, stages
from helpers.data import preparation as data
from helpers.errors import ModelError
from helpers.export import parity
from helpers.models.hub import OFFLINE, find_model
from helpers.runs import Run

SFT_ONLY = {
    "stages": ["sft"],
    "data__train": ["data_samples/llama2_text.jsonl"],
    "data__eval": None,
    "data__problems": None,
    "data__test": None,
    "data__test_new": None,
    "best_by": "loss",
    "template": "llama-2",
    "sft": {"max_steps": 2, "learning_rate": 5e-3},
    "evaluation__max_new_tokens": 6,
}


@pytest.mark.parametrize("weights", ["16bit", "4bit", "8bit"])
def test_adapter_and_merged_model_answer_as_trained(
    run_factory: Callable[..., Run], weights: str
) -> None:
    run = run_factory(
        weights=weights,
        sft__max_steps=3,
        sft__eval_steps=3,
        sft__learning_rate=5e-3,
        evaluation__max_new_tokens=8,
    )
    data.prepare(run)
    stages.train_stage(run, "sft")
    part = export.export(run, "sft", prompts=6)
    for name in ("adapter", "merged"):
        assert part[name]["greedy_agreement"] == 1.0
        assert part[name]["right"] == part["trained"]["right"]
        reloaded = part[name]["reloaded"]
        limit = 0.1 if weights == "8bit" else 1e-4
        assert reloaded["difference"] <= limit * reloaded["logits"]
    merged = Path(part["merged"]["path"])
    assert (merged / "chat_template.jinja").exists()
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"]
    assert run.report()["export"] == part


def test_a_run_of_sft_alone_is_exported_with_its_template(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(**SFT_ONLY)
    stages.train_stage(run, "sft")
    part = export.export(run, prompts=3)
    assert part["trained"]["prompts"] == 3
    assert part["merged"]["greedy_agreement"] == 1.0
    template = Path(part["merged"]["path"]) / "chat_template.jinja"
    assert "[INST]" in template.read_text()


def test_what_a_base_like_model_becomes_stops_by_itself_in_plain_transformers(
    run_factory: Callable[..., Run], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(find_model(OFFLINE), base)
    edits = {  # another EOS than the one that its template writes
        "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
        "config.json": {"eos_token_id": 0},
        "generation_config.json": {"eos_token_id": 0},
    }
    for name, values in edits.items():
        file = base / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    run = run_factory(
        **SFT_ONLY
        | {
            "model": str(base),
            "template": "own",
            "sft": {"max_steps": 1, "learning_rate": 1e-5},
            "data__train": ["data_samples/openai_messages.jsonl"],
            "evaluation__max_new_tokens": 48,
        }
    )
    stages.train_stage(run, "sft")
    part = export.export(run, "sft", prompts=3)
    assert part["trained"]["stop_rate"] > 0
    for name in ("adapter", "merged"):
        assert part[name]["stop_rate"] == part["trained"]["stop_rate"]
        assert part[name]["greedy_agreement"] == 1.0
    merged = Path(part["merged"]["path"])
    settings = json.loads((merged / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [0, 2]
    tokenizer = json.loads((merged / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|im_end|>"


def test_files_that_do_not_stop_elsewhere_fail_the_export() -> None:
    expected, plain = [("4", True)] * 5, [("4 and on", False)] * 5
    with pytest.raises(ModelError, match="merged: 5 of 5 answers no longer end"):
        parity.compare_answers("merged", plain, expected, [])


def test_files_that_cannot_be_loaded_elsewhere_fail_the_export(tmp_path: Path) -> None:
    prompts = [[{"role": "user", "content": "Hi"}]]
    with pytest.raises(ModelError, match="fails in plain transformers"):
        parity.ask_plainly(tmp_path, {}, prompts, 4)
