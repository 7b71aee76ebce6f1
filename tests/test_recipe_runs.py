"""Every recipe, run: its format, split, labels, LoRA, optimiser, schedule, callbacks.

Here on a tiny model, a few steps each. The full cross of recipes and engines on the
real offline model takes about an hour: `python -m pytest -m slow`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers import recipes, runs, stages
from helpers.config import RunConfig, changed
from helpers.data import preparation as data
from helpers.evaluation import evaluator as evaluation
from helpers.evaluation import tables
from helpers.grpo import trainer as grpo
from helpers.inference import generation
from helpers.masking.dataset import NO_LOSS
from helpers.runs import Run
from helpers.training import sft
from helpers.training import trainer as train

ROOT = Path(__file__).resolve().parent.parent
NAMES = [name for name in recipes.NAMES if name != "smoke"]  # the demo, smaller
SFT = [name for name in NAMES if "sft" in recipes.load(name).stages]
GRPO = [name for name in NAMES if "grpo" in recipes.load(name).stages]
STEPS = 2
# module of the optimiser's class, bits of its state, whether that is paged
OPTIMISERS = {
    "adamw_torch": ("torch.optim.adamw", None, None),
    "adamw_8bit": ("bitsandbytes.optim.adamw", 8, False),
    "paged_adamw_8bit": ("bitsandbytes.optim.adamw", 8, True),
    "paged_adamw_32bit": ("bitsandbytes.optim.adamw", 32, True),
}


class Trained(NamedTuple):
    """A recipe after its run."""

    run: Run
    tokenizer: Any
    trainers: dict[str, Any]

    @property
    def config(self) -> RunConfig:
        return self.run.config


def small(name: str, model: str) -> RunConfig:
    """A recipe on another model and our samples, every size cut down."""
    config = recipes.scaled(
        recipes.load(name), model=model, steps=STEPS, rows=4, samples=True
    )
    cuts: dict[str, Any] = {"evaluation__max_new_tokens": 4}
    if "grpo" in config.stages:
        cuts["grpo__max_completion_length"] = 8
    return changed(config, **cuts)


@pytest.fixture(scope="module", params=NAMES)
def trained(
    request: pytest.FixtureRequest,
    tiny_model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Trained]:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp(request.param)
        patch.setenv("TUNEBOOK_RUNS", str(home))
        run = runs.save_run(small(request.param, str(tiny_model_folder)))
        data.prepare(run)
        trainers: dict[str, Any] = {}
        for stage in run.config.stages:
            start = stages.ensure_adapter(run, "sft") if stage == "grpo" else None
            model, tokenizer = train.load_for_training(run, stage, start)
            build = sft.build_sft if stage == "sft" else grpo.build_grpo
            trainers[stage] = build(run, model, tokenizer)
            train.fit(trainers[stage], run)
        yield Trained(run, tokenizer, trainers)


with_sft = pytest.mark.parametrize("trained", SFT, indirect=True)
with_grpo = pytest.mark.parametrize("trained", GRPO, indirect=True)


def source_text(source: str, row: dict[str, Any], tokenizer: Any) -> str:
    """A row as the system that we reproduce wrote it, with this model's BOS and EOS."""
    if "dolly" in source:
        context = f"### Context:\n{row['context']}\n\n" if row["context"] else ""
        return (
            f"### Instruction:\n{row['instruction']}\n\n{context}"
            f"### Response:\n{row['response']}{tokenizer.eos_token}"
        )
    if "llama2_text" in source:
        text = row["text"].replace("<s>", tokenizer.bos_token)
        return text.replace("</s>", tokenizer.eos_token)
    if "sharegpt" in source:
        names = {"system": "system", "human": "user", "gpt": "assistant"}
        turns = [
            {"role": names[turn["from"]], "content": turn["value"]}
            for turn in row["conversations"]
        ]
    else:
        turns = [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"]},
        ]
    return tokenizer.apply_chat_template(turns, tokenize=False)


def rows_of(trained: Trained, part: str) -> list[dict[str, Any]]:
    return data.read_rows(trained.run.path / "data" / f"{part}.jsonl")


def questions(trained: Trained, part: str) -> set[str]:
    return {data.questions_of(row["messages"])[0] for row in rows_of(trained, part)}


def test_the_stages_take_their_steps_and_report_them(trained: Trained) -> None:
    report = trained.run.report()
    for stage in trained.config.stages:
        assert report[stage]["steps"] == STEPS
        assert (trained.run.path / stage / "adapter").is_dir()


@with_sft
def test_training_texts_are_in_the_format_of_the_source(trained: Trained) -> None:
    tokenizer = trained.tokenizer
    texts = [
        tokenizer.decode(r["input_ids"]) for r in trained.trainers["sft"].train_dataset
    ]
    together = "\n".join(texts)
    sources = [s for s in trained.config.data.train if "word_problems" not in s]
    rows = [
        source_text(source, row, tokenizer)
        for source in sources
        for row in data.load_rows(source)
        if "messages" not in row
    ]
    trained_on = [text for text in rows if text in together]
    held_out = len(rows) - len(trained_on)
    counted = [
        trained.run.report()["data"].get(part, 0) for part in ("eval", "test_chat")
    ]
    from_shares = sum(counted) if trained.config.data.eval_share else 0
    assert held_out == from_shares and trained_on


@with_sft
def test_the_split_has_the_parts_of_the_recipe_and_no_question_twice(
    trained: Trained,
) -> None:
    parts = data.parts_of(trained.config.data)
    assert sorted(path.stem for path in (trained.run.path / "data").iterdir()) == (
        sorted(parts)
    )
    if not trained.config.data.eval_share:
        return
    held_out = [part for part in parts if part != "train"]
    sets = [questions(trained, part) for part in ["train", *held_out]]
    assert all(sets)
    assert len(set.union(*sets)) == sum(len(part) for part in sets)


@with_sft
def test_the_loss_covers_what_the_recipe_says(trained: Trained) -> None:
    tokenizer = trained.tokenizer
    answers = [
        message["content"] + tokenizer.eos_token
        for row in rows_of(trained, "train")
        for message in row["messages"]
        if message["role"] == "assistant"
    ]
    learnt = ""
    for row in trained.trainers["sft"].train_dataset:
        if trained.config.loss_on == "all":
            assert row["labels"] == row["input_ids"]
        learnt += tokenizer.decode([x for x in row["labels"] if x != NO_LOSS])
    if trained.config.loss_on == "assistant":
        assert len(learnt) == sum(map(len, answers))
        assert all(answer in learnt for answer in answers)


@with_sft
def test_eos_is_learnt_and_padding_is_not(trained: Trained) -> None:
    tokenizer = trained.tokenizer
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for batch in trained.trainers["sft"].get_train_dataloader():
        labels, ids = batch["labels"], batch["input_ids"]
        assert (labels == tokenizer.eos_token_id).sum() >= len(ids)
        assert (labels[ids == tokenizer.pad_token_id] == NO_LOSS).all()


def test_lora_sits_where_the_recipe_says_and_as_it_says(trained: Trained) -> None:
    from peft.tuners.lora import LoraLayer

    lora = trained.config.lora
    for trainer in trained.trainers.values():
        layers = {
            name.rpartition(".")[2]: module
            for name, module in trainer.model.named_modules()
            if isinstance(module, LoraLayer)
        }
        assert set(layers) == set(lora["target_modules"])
        for layer in layers.values():
            assert layer.r["default"] == lora["r"]
            assert layer.scaling["default"] == lora["lora_alpha"] / lora["r"]
            dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
            assert dropout == lora.get("lora_dropout", 0.0)
            assert layer.lora_A["default"].weight.dtype.itemsize == 4
        names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
        assert names and all("lora_" in name for name in names)


def test_the_weights_are_of_as_many_bits_as_the_recipe_says(trained: Trained) -> None:
    model = next(iter(trained.trainers.values())).model
    four_bit = trained.config.weights == "4bit"  # auto is 16bit without a GPU
    assert getattr(model, "is_loaded_in_4bit", False) == four_bit
    if four_bit:
        found = model.config.quantization_config
        assert found.bnb_4bit_quant_type == "nf4"
        assert found.bnb_4bit_use_double_quant == trained.config.double_quant


def test_the_optimiser_is_of_the_class_that_the_recipe_names(trained: Trained) -> None:
    for stage, trainer in trained.trainers.items():
        wanted = getattr(trained.config, stage)
        optimiser = trainer.optimizer.optimizer
        module, bits, paged = OPTIMISERS[wanted.get("optim", "adamw_torch")]
        assert type(optimiser).__module__ == module
        if bits:
            assert (optimiser.args.optim_bits, optimiser.is_paged) == (bits, paged)
        decay = max(group["weight_decay"] for group in optimiser.param_groups)
        assert decay == wanted.get("weight_decay", 0.0)


def test_the_rate_follows_the_recipes_schedule(trained: Trained) -> None:
    for stage, trainer in trained.trainers.items():
        wanted = getattr(trained.config, stage)
        schedule = trainer.lr_scheduler.lr_lambdas[0]
        kind = wanted.get("lr_scheduler_type", "linear").partition("_")[0]
        assert f"_get_{kind}" in schedule.func.__name__
        warmup = wanted["warmup_steps"]
        # a share of two steps is rounded up
        steps = 1 if 0 < warmup < 1 else warmup
        assert schedule.keywords["num_warmup_steps"] == steps
        peak = trainer.lr_scheduler.base_lrs[0]
        assert peak == wanted["learning_rate"]


def test_a_step_holds_as_many_rows_as_the_recipe_says(trained: Trained) -> None:
    for stage, trainer in trained.trainers.items():
        wanted = getattr(trained.config, stage)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            assert getattr(trainer.args, name) == wanted.get(name, 1)
        assert trainer.args.max_grad_norm == wanted.get("max_grad_norm", 1.0)


@with_sft
def test_rows_are_drawn_as_the_recipe_says(trained: Trained) -> None:
    sampler = type(trained.trainers["sft"]._get_train_sampler()).__name__
    grouped = "train_sampling_strategy" in trained.config.sft
    assert sampler == ("LengthGroupedSampler" if grouped else "RandomSampler")


@with_sft
def test_the_callbacks_are_there_and_the_tracker_where_it_can_be(
    trained: Trained,
) -> None:
    trainer = trained.trainers["sft"]
    ours = {type(c).__name__: c for c in trainer.callback_handler.callbacks}
    assert ours["BestAdapter"].by == trained.config.best_by
    assert ours["LiveSamples"].prompts
    assert {"Stopwatch", "TimedSaves", "SkippedSteps"} <= set(ours)
    # the tests run with WANDB_MODE=disabled, which asks nobody
    assert ("WandbCallback" in ours) == (trained.config.sft.get("report_to") == "wandb")


@with_grpo
def test_the_rewards_and_the_group_are_the_recipes(trained: Trained) -> None:
    trainer, config = trained.trainers["grpo"], trained.config
    paid = dict(zip(trainer.reward_func_names, trainer.reward_weights, strict=True))
    assert paid == pytest.approx(config.rewards)
    assert trainer.num_generations == config.grpo["num_generations"]
    prompt = trainer.train_dataset[0]["prompt"]
    assert prompt[0] == {"role": "system", "content": config.system_prompt}


def test_what_the_recipe_holds_out_is_measured(trained: Trained) -> None:
    run, stage = trained.run, trained.config.stages[-1]
    held_out = evaluation.held_out(trained.config)
    adapter = run.path / stage / "adapter"
    if not held_out:
        with pytest.raises(
            data.DataError, match="set data.eval_share or data.test_sha"
        ):
            evaluation.evaluate(run, stage, adapter)
        return
    part = evaluation.evaluate(run, stage, adapter)
    keys = {"eval": "eval_loss", "test_chat": "test_chat"}
    keys |= {"test": "accuracy", "test_new": "accuracy_new"}
    assert {key for key in keys.values() if key in part} == {keys[h] for h in held_out}
    assert len(tables.results_table(run.report()).columns) == 3 + len(held_out)
    tables.plot_results(run.report(), run.path / "results.png")


def test_the_tuned_model_answers_with_the_recipes_sampling(trained: Trained) -> None:
    model = next(iter(trained.trainers.values())).model
    sampling = {**trained.config.inference, "max_new_tokens": 3}
    prompts = [[{"role": "user", "content": "Hello"}]]
    answer = generation.generate(model, trained.tokenizer, prompts, sampling=sampling)
    assert 1 <= answer[0].tokens <= 3


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_on_the_real_model_with_either_engine(
    name: str, engine: str, tmp_path: Path, run_python: Any
) -> None:
    config = changed(small(name, "smollm2-135m-offline"), engine=engine)
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json(), encoding="utf-8")
    run_python(
        "-m", "helpers", "train", str(path), TUNEBOOK_RUNS=str(tmp_path / "runs")
    )
    text = (tmp_path / "runs" / name / "report.json").read_text(encoding="utf-8")
    report = json.loads(text)
    assert report["environment"]["engine"] == engine
    assert all(report[stage]["steps"] == STEPS for stage in config.stages)
    assert ("eval" in report) == bool(evaluation.held_out(config))


@pytest.mark.slow
def test_a_recipes_small_version_is_one_command(
    tmp_path: Path, run_python: Any
) -> None:
    command = ["-m", "helpers", "train", "dolly-llama32-3b", "--small"]
    done = run_python(*command, TUNEBOOK_RUNS=str(tmp_path))
    assert "run dolly-llama32-3b-small on" in done.stdout
    assert "eval loss" in done.stdout
