"""The examples of docs/reliability.md, run as they stand."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import TrainerCallback

from helpers.models import adapters
from helpers.models import load as models

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.fixture
def names(tiny_model_folder, tmp_path, monkeypatch):
    """What the page's examples are given; trainings log nothing elsewhere."""
    plain = transformers.TrainingArguments

    def arguments(folder, **values):
        quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
        return plain(str(folder), **quiet, logging_steps=1, **values)

    monkeypatch.setattr("transformers.TrainingArguments", arguments)
    model, tokenizer = models.load_model(str(tiny_model_folder))
    torch.manual_seed(0)
    model = adapters.add_lora(model, {"r": 4, "target_modules": ["q_proj"]})
    ids = torch.randint(5, 1000, (16, 8)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    values = {"model": model, "tokenizer": tokenizer, "rows": rows}
    return values | {"folder": tmp_path}


def run(number, names):
    exec(compile(EXAMPLES[number], str(PAGE), "exec"), names)
    return names


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_the_best_adapter_stays(names, tmp_path):
    best = run(0, names)["best"]
    assert best.step in (2, 4)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_saves_go_to_a_second_place_and_come_back(names, tmp_path):
    run(1, names)
    assert checkpoints(tmp_path / "fresh") == ["checkpoint-4"]


def test_answers_are_kept(names, tmp_path):
    run(2, names)
    rows = (tmp_path / "samples.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(row)["step"] for row in rows] == [2, 4]


def test_a_session_ends_in_a_checkpoint(names, tmp_path):
    guard = run(3, names)["guard"]
    step = int(re.findall(r"step (\d+): the session is over", guard.reason)[0])
    assert 0 < step < 1000
    assert checkpoints(tmp_path / "out") == [f"checkpoint-{step}"]


def test_a_gradient_that_is_not_finite_ends_the_training(names, capsys):
    run(4, names)
    assert re.search(
        r"step \d: loss or gradient is not finite", capsys.readouterr().out
    )


def test_early_stopping_goes_beside_them(names):
    assert run(5, names)["trainer"].state.global_step == 3


def test_sigterm_saves(names, tmp_path, monkeypatch):
    class Terminate(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    plain = transformers.Trainer
    # by name: this file's `transformers` is not always the one that a page imports
    monkeypatch.setattr(
        "transformers.Trainer", lambda *a, **o: plain(*a, **o, callbacks=[Terminate])
    )
    run(6, names)
    name = checkpoints(tmp_path / "out")[-1]
    assert 2 < int(name.rpartition("-")[2]) < 5000
