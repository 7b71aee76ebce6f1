"""The notebooks construct what the command line builds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.data import preparation as data
from helpers.runs import Run
from helpers.training import trainer as train

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def execute(notebook: str, cells: list[str], **names: Any) -> dict[str, Any]:
    """Executes a notebook's cells of these ids; returns all the names they bind."""
    content = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))
    sources = {cell["id"]: "".join(cell["source"]) for cell in content["cells"]}
    for cell in cells:
        exec(compile(sources[cell], f"{notebook}:{cell}", "exec"), names)
    return names


def watchers(trainer: Any) -> list[tuple[str, dict[str, str]]]:
    """The callbacks of a trainer with their settings, without state and clocks."""
    state = ("last", "model", "training_tracker", "prediction_bar", "training_bar")
    return [
        (type(c).__name__, {k: str(v) for k, v in vars(c).items() if k not in state})
        for c in trainer.callback_handler.callbacks
    ]


def test_notebook_02_constructs_the_sft_trainer_of_the_command_line(
    run_factory: Callable[..., Run],
) -> None:
    from helpers import masking, models, training

    lora = {"target_modules": ["q_proj", "v_proj"], "r": 4, "use_rslora": True}
    run = run_factory(lora=lora, sft__packing=True, sft__weight_decay=0.1)
    data.prepare(run)
    model, tokenizer = train.load_for_training(run)
    built = train.build_sft(run, model, tokenizer)

    cells = ["02-lora-config", "02-06-code", "02-labels-look", "02-args-config"]
    packages = {"masking": masking, "models": models, "training": training}
    bound = {"run": run, "config": run.config, **packages}
    names = execute("02_sft_qlora", [*cells, "02-08-code"], **bound)
    shown = names["trainer"]
    assert shown.args.to_dict() == built.args.to_dict()
    assert names["lora"].r == 4 and names["lora"].use_rslora
    tuned, expected = (t.model.peft_config["default"] for t in (shown, built))
    assert tuned.to_dict() == expected.to_dict()
    matrices = dict(shown.model.named_parameters())
    for name, parameter in built.model.named_parameters():
        assert (matrices[name] == parameter).all()
    assert list(shown.train_dataset) == list(built.train_dataset)
    assert list(shown.eval_dataset) == list(built.eval_dataset)
    assert watchers(shown) == watchers(built)
