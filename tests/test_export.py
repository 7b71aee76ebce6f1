"""Export: what is reloaded answers as what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import export, stages
from helpers.data import preparation as data
from helpers.errors import ConfigError, MissingInput, ModelError
from helpers.evaluation import evaluator as evaluation
from helpers.inference.generation import Answer
from helpers.runs import Run


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
    assert part["adapter"]["greedy_agreement"] == 1.0
    assert part["merged"]["greedy_agreement"] == 1.0
    for name in ("adapter", "merged"):
        reloaded = part[name]["reloaded"]
        limit = 0.1 if weights == "8bit" else 1e-4
        assert reloaded["difference"] <= limit * reloaded["logits"]
    assert part["adapter"]["plain"]["agreement"] == 1.0
    assert part["merged"]["plain"]["agreement"] == 1.0
    merged = Path(part["merged"]["path"])
    assert (merged / "chat_template.jinja").exists()
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"]
    assert run.report()["export"] == part


def test_the_evaluation_writes_every_item_and_its_part_of_the_report(
    run_factory: Callable[..., Run],
) -> None:
    run = run_factory(evaluation__max_new_tokens=6)
    data.prepare(run)
    part = evaluation.evaluate(run, "base")
    assert part["accuracy"]["n"] == 6 and part["accuracy_new"]["n"] == 4
    items = data.read_rows(run.path / "eval" / "base" / "test.jsonl")
    problems = data.read_rows(run.path / "data" / "test.jsonl")
    assert [i["id"] for i in items] == [p["id"] for p in problems]
    assert set(items[0]) >= {"question", "output", "extracted", "gold", "correct"}
    assert run.report()["eval"]["base"] == part


def test_exporting_what_was_not_trained_names_the_notebook(run: Run) -> None:
    with pytest.raises(MissingInput, match="run notebook 03_grpo_gsm8k"):
        export.export(run)


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


def test_exporting_a_stage_that_the_run_lacks_names_its_notebook(
    run_factory: Callable[..., Run],
) -> None:
    with pytest.raises(ConfigError, match="has no grpo stage, .*notebook 02_sft_qlora"):
        export.export(run_factory(**SFT_ONLY), "grpo")


@pytest.mark.parametrize(
    ("changes", "question"),
    [
        ({}, "test"),
        ({"data__test": None}, "test_new"),
        ({"data__test": None, "data__test_new": None}, "eval"),
    ],
)
def test_prompts_to_compare_come_from_held_out_rows(
    run_factory: Callable[..., Run], changes: dict[str, Any], question: str
) -> None:
    run = run_factory(**changes)
    data.prepare(run)
    prompts, gold = export.held_out_prompts(run, 2)
    row = data.read_rows(run.path / "data" / f"{question}.jsonl")[0]
    asked = row.get("question") or data.questions_of(row["messages"])[0]
    assert prompts[0][-1] == {"role": "user", "content": asked}
    assert len(gold) == (2 if question != "eval" else 0)


def make_base_like(folder: Path) -> Path:
    """Copies the offline model, with another EOS than the one its template writes."""
    import shutil

    from helpers.models.hub import OFFLINE, find_model

    shutil.copytree(find_model(OFFLINE), folder)
    edits = {
        "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
        "config.json": {"eos_token_id": 0},
        "generation_config.json": {"eos_token_id": 0},
    }
    for name, values in edits.items():
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_what_a_base_like_model_becomes_stops_by_itself_in_plain_transformers(
    run_factory: Callable[..., Run], tmp_path: Path
) -> None:
    run = run_factory(
        model=str(make_base_like(tmp_path / "base")),
        stages=["sft"],
        sft={"max_steps": 1, "learning_rate": 1e-5},
        best_by="loss",
        data__eval=None,
        data__problems=None,
        data__train=["data_samples/openai_messages.jsonl"],
        data__test=None,
        data__test_new=None,
        evaluation__max_new_tokens=48,
    )
    stages.train_stage(run, "sft")
    part = export.export(run, "sft", prompts=3)
    assert part["trained"]["stop_rate"] > 0
    for name in ("adapter", "merged"):
        assert part[name]["plain"]["stop_rate"] == part["trained"]["stop_rate"]
        assert part[name]["plain"]["agreement"] == 1.0
    merged = Path(part["merged"]["path"])
    settings = json.loads((merged / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [0, 2]
    tokenizer = json.loads((merged / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|im_end|>"


def test_files_that_do_not_stop_elsewhere_fail_the_export() -> None:
    ours = [Answer("4", 2, True)] * 5
    theirs = [{"text": "4 and on", "stopped": False}] * 5
    with pytest.raises(ModelError, match="5 of 5 answers end by themselves in the tr"):
        export.compare_plain(Path("merged"), ours, theirs)


def test_files_that_cannot_be_loaded_elsewhere_fail_the_export(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be used in plain transformers"):
        export.ask_plainly({tmp_path: {}}, [[{"role": "user", "content": "Hi"}]], 4)


def test_the_script_that_asks_exported_files_imports_nothing_of_ours() -> None:
    script = Path(export.__file__).with_name("ask_exported.py").read_text()
    assert "import helpers" not in script and "from helpers" not in script
