"""The rows of an optimiser step, grouped in other ways, teach the same."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch._dynamo.utils import counters

from helpers import runtime
from helpers.config import changed
from helpers.data import preparation as data
from helpers.errors import ConfigError
from helpers.files import read_json, write_json
from helpers.runs import Run
from helpers.training import callbacks, inputs, layout
from helpers.training import trainer as train
from helpers.training.layout import Layout
from tests.rows import pair, write
from tests.test_packing import documents
from tests.tiny import save_tiny_model

WHOLE, OWN = Layout(4, 1, False, True), Layout(2, 2, False, False)
COMPILED = {"layout": "compiled", "engine": "transformers", "data__eval_share": 0.25}


@pytest.fixture
def unpacked(run_factory, tmp_path):
    """A run of 2 x 2 short rows a step, three steps an epoch."""
    rows = [pair(f"Say {n} times a.", "a " * (3 * n % 11 + 1)) for n in range(12)]
    run = run_factory(
        stages=["sft"],
        best_by="loss",
        system_prompt="",
        data={"train": [write(tmp_path / "rows.jsonl", rows)]},
        sft__packing=False,
        sft__per_device_train_batch_size=2,
        sft__gradient_accumulation_steps=2,
        sft__max_steps=4,
        sft__save_steps=2,
        sft__eval_strategy="no",
        sft__warmup_steps=0,
        sft__learning_rate=1e-2,
    )
    data.prepare(run)
    return run


@pytest.fixture
def free_choice(monkeypatch):
    """Lets a CPU choose its layout as a GPU does."""
    monkeypatch.setattr(layout, "reason", lambda *_: "")


def build(run):
    trainer = train.build_sft(run, *train.load_for_training(run))
    trainer.remove_callback(callbacks.LiveSamples)  # takes longer than the steps
    return trainer


def alter(run, **changes):
    return Run(run.path, changed(run.config, **changes))


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def gradient(trainer, batches):
    """Loss and gradient of batches that are one optimiser step."""
    passes, count = trainer.get_batch_samples(iter(batches), len(batches), "cpu")
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.model.zero_grad()
    loss = sum(float(trainer.training_step(trainer.model, p, count)) for p in passes)
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    return loss, torch.cat([w.grad.flatten() for w in weights])


def run_out_of_memory(trainer, step):
    """Has one pass fail after a step."""
    take_step, failures = trainer.training_step, []

    def fails_once(*args):
        loss = take_step(*args)
        if trainer.state.global_step == step and not failures:
            failures.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return loss

    trainer.training_step = fails_once


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
def test_losses_and_gradients_do_not_depend_on_how_rows_are_grouped(
    unpacked, loss_type
):
    trainer = build(alter(unpacked, sft__loss_type=loss_type))
    rows = [trainer.train_dataset[index] for index in range(8)]
    results = []
    for size in (1, 2, 8):
        for flat in (False, True):
            layout.apply_layout(trainer, Layout(size, 8 // size, False, flat))
            groups = [rows[start : start + size] for start in range(0, 8, size)]
            results.append(gradient(trainer, list(map(trainer.data_collator, groups))))
    (expected, first), *others = results
    assert first.abs().max() > 1e-3
    for loss, other in others:
        assert loss == pytest.approx(expected, abs=1e-5)
        assert (other - first).abs().max() < 1e-5


def test_the_order_is_fewest_passes_and_what_the_config_sets_is_kept(
    unpacked, free_choice
):
    trainer = build(unpacked)
    order = layout.candidates(trainer, unpacked)
    assert order[:3] == [WHOLE, Layout(4, 1, True, True), Layout(2, 2, False, True)]
    assert len(order) == 6 and {one[0] * one[1] for one in order} == {4}
    trainer.data_collator.padding_free = False
    own = {"gradient_checkpointing": False, "padding_free": False}
    order = layout.candidates(trainer, alter(unpacked, sft=own))
    assert {one[2:] for one in order} == {(False, False)}


def test_training_after_a_choice_is_training_with_that_layout(unpacked, free_choice):
    trainer = build(unpacked)
    table = layout.choose_layout(trainer, unpacked)
    assert list(table["verdict"]) == ["fits"] and table["tokens"][0] > 100
    assert Layout(**read_json(unpacked.path / "sft" / "layout.json")["choice"]) == WHOLE
    trainer.train()
    other = build(unpacked)
    layout.apply_layout(other, WHOLE)
    other.train()
    assert losses(trainer) == losses(other) and len(losses(other)) == 4
    assert losses(trainer, "num_tokens") == losses(other, "num_tokens")


def test_the_batch_that_is_tried_is_the_largest_that_the_run_draws(unpacked):
    for one in (WHOLE, OWN):
        trainer = build(unpacked)
        layout.apply_layout(trainer, one)
        tried = layout.largest_batch(trainer, one)["input_ids"].numel()
        step, drawn = trainer.training_step, []

        def taken(model, batch, count):
            drawn.append(batch["input_ids"].numel())  # noqa: B023
            return step(model, batch, count)  # noqa: B023

        trainer.training_step = taken
        trainer.train()
        assert tried == max(drawn) > min(drawn)
        # padding is no token of the report's rate
        assert trainer.state.num_input_tokens_seen == losses(trainer, "num_tokens")[-1]


def test_without_a_choice_the_layout_stays_and_the_table_says_why(unpacked):
    trainer = build(unpacked)
    (row,) = layout.choose_layout(trainer, unpacked).to_dict("records")
    assert row == OWN._asdict() | {"verdict": "on a CPU"}
    pinned = alter(unpacked, layout="pinned")
    assert list(layout.choose_layout(trainer, pinned)["verdict"]) == ["pinned"]
    assert inputs.inputs_of(pinned, "sft") == inputs.inputs_of(unpacked, "sft")


def test_a_resumed_run_keeps_its_layout_and_another_machine_chooses_anew(
    unpacked, free_choice, monkeypatch
):
    def fits(_, one):
        return {"verdict": "fits" if one.micro_batch == smallest else "out of memory"}

    smallest = 2
    monkeypatch.setattr(layout, "attempt", fits)
    whole = build(unpacked)
    assert len(layout.choose_layout(whole, unpacked)) == 3
    whole.train()
    smallest, again = 1, build(unpacked)
    layout.choose_layout(again, unpacked)
    assert again.args.per_device_train_batch_size == 2
    note = unpacked.path / "sft" / layout.NOTE
    choice = {"choice": Layout(3, 1, False, False)._asdict()}  # not of these rows
    write_json(note, read_json(note) | choice)
    layout.choose_layout(again, unpacked)
    assert again.args.per_device_train_batch_size == 1
    layout.apply_layout(again, OWN)
    machine = runtime.find_machine()._replace(name="another")
    monkeypatch.setattr(runtime, "find_machine", lambda: machine)
    layout.choose_layout(again, unpacked)
    assert again.args.per_device_train_batch_size == 1
    checkpoint = Path(again.args.output_dir) / "checkpoint-2"
    again.train(resume_from_checkpoint=str(checkpoint))
    # the rows are those that were left; TRL counts tokens anew
    assert losses(again) == pytest.approx(losses(whole), abs=1e-5)
    tokens, rest = losses(whole, "num_tokens"), losses(again, "num_tokens")[2:]
    assert rest == [count - tokens[1] for count in tokens[2:]]


@pytest.mark.parametrize("step", [0, 3])
def test_out_of_memory_in_a_step_takes_the_next_layout_and_loses_no_row(
    unpacked, free_choice, caplog, step
):
    plain = build(unpacked)
    plain.args.output_dir += "-plain"
    plain.remove_callback(callbacks.BestAdapter)  # its adapter is nothing of `fit`
    plain.train()
    trainer = build(unpacked)
    layout.choose_layout(trainer, unpacked)
    run_out_of_memory(trainer, step)
    part = train.fit(trainer, unpacked)
    assert part["layout"]["choice"] == Layout(4, 1, True, True)._asdict()
    last = part["layout"]["tries"][-1]
    assert last == WHOLE._asdict() | {"verdict": f"out of memory after step {step}"}
    assert f"out of memory after step {step}: going on with" in caplog.text
    assert losses(trainer) == pytest.approx(losses(plain), abs=1e-4)


def test_an_error_of_another_kind_and_one_past_the_last_layout_are_raised(unpacked):
    trainer = build(unpacked)
    for text in ("CUDA out of memory. Tried to allocate 2 GiB.", "sizes differ"):

        def fail(*_, text=text):
            raise RuntimeError(text)

        trainer.training_step = fail
        with pytest.raises(RuntimeError, match=text[:20]):
            train.fit(trainer, unpacked)


def test_rows_that_would_see_one_another_are_not_joined(
    unpacked, free_choice, tokenizer, tmp_path
):
    mixed = {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128}
    folder = save_tiny_model("Lfm2", tokenizer, tmp_path / "model", **mixed)
    run = alter(unpacked, model=str(folder), lora={"target_modules": ["q_proj"]})
    assert not layout.candidates(build(run), run)[0].padding_free


@pytest.fixture
def compiled(unpacked, free_choice, monkeypatch):
    """A run of compiled layers, which holds three rows out and stops at no machine."""
    monkeypatch.setattr(layout, "why_not_compiled", lambda _: "")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    run = alter(unpacked, **COMPILED)
    data.prepare(run)
    torch._dynamo.reset()
    counters.clear()
    yield run
    torch._dynamo.reset()


def test_packed_rows_under_compiled_layers_teach_what_they_teach_one_by_one(compiled):
    trainer, plain = build(compiled), build(alter(compiled, layout="pinned"))
    rows = sorted(map(tuple, trainer.train_dataset["input_ids"]))
    layout.choose_layout(trainer, compiled)
    parts = [part for row in trainer.train_dataset for part in documents(row)]
    assert sorted(tuple(part["input_ids"]) for part in parts) == rows
    batches = list(trainer.get_train_dataloader())
    assert len(batches) > 1
    assert len({batch["input_ids"].shape for batch in batches}) == 1
    loss, together = gradient(trainer, batches)
    alone = [plain.data_collator([row]) for row in plain.train_dataset]
    expected, apart = gradient(plain, alone)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert apart.abs().max() > 1e-3
    assert (together - apart).abs().max() < 1e-5
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["frames"] == {"total": 1, "ok": 1}


def test_training_compiles_one_graph_and_evaluation_is_what_it_was(compiled):
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.0}
    evaluation["per_device_eval_batch_size"] = 8
    run = alter(compiled, sft=compiled.config.sft | evaluation)
    expected = build(alter(run, layout="pinned")).evaluate()["eval_loss"]
    trainer = build(run)
    train.fit(trainer, run)
    logged = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert logged == pytest.approx([expected] * 2, abs=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_run_is_resumed_and_goes_on_where_memory_runs_out(compiled):
    whole = build(compiled)
    train.fit(whole, compiled)
    (compiled.path / "sft").rename(compiled.path / "whole")
    trainer = build(compiled)
    run_out_of_memory(trainer, 3)
    part = train.fit(trainer, compiled)
    assert part["layout"]["choice"]["recompute"]
    assert losses(trainer) == pytest.approx(losses(whole), abs=1e-5)
    assert counters["stats"]["unique_graphs"] == 1

    again = build(compiled)
    layout.choose_layout(again, compiled)
    checkpoint = Path(again.args.output_dir) / "checkpoint-3"
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.parametrize(("count", "mean"), [(8, 320), (8, 80), (2, 320), (1, 320)])
def test_packed_rows_are_whole_and_a_step_has_as_many_on_average(count, mean):
    draw = np.random.default_rng(0)
    sizes = draw.lognormal(np.log(mean), 0.5, 2000).clip(20, 4 * mean).astype(int)
    rows = [{"input_ids": [n] * size} for n, size in enumerate(sizes)]
    rows = Dataset.from_list([row | {"labels": row["input_ids"]} for row in rows])
    packed, parts = layout.pack_rows(rows, count)
    lengths = [size for row in packed["seq_lengths"] for size in row]
    assert sorted(lengths) == sorted(sizes)
    wanted = max(count, sizes.max() / sizes.mean())
    assert len(rows) / len(packed) * parts == pytest.approx(wanted, rel=0.03)


def test_compiled_layers_are_refused_where_they_cannot_be(unpacked, monkeypatch):
    with pytest.raises(ConfigError, match="needs engine='transformers'"):
        changed(unpacked.config, layout="compiled", engine="auto")
    run = alter(unpacked, **COMPILED)
    assert inputs.inputs_of(run, "sft")["layout"] == "compiled"
    trainer = build(unpacked)
    with pytest.raises(ConfigError, match="needs a GPU.*; use layout='auto'"):
        layout.choose_layout(trainer, run)
    monkeypatch.setattr(layout, "why_not_compiled", lambda _: "")
    with pytest.raises(ConfigError, match="rows cannot be joined"):
        layout.choose_layout(trainer, alter(run, sft__padding_free=False))
