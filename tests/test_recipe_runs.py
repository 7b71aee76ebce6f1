"""Every recipe, run: its format, split, labels, LoRA, optimiser, schedule.

Here on a tiny model, a few steps each. The full cross of recipes and engines on the
real offline model takes about an hour: `python -m pytest -m slow`.
"""

import json
from typing import Any, NamedTuple

import pytest

from helpers import files, recipes, runs, stages
from helpers.config import HELD_OUT, changed
from helpers.data import preparation as data
from helpers.data.sources import load_rows
from helpers.evaluation import evaluator
from helpers.evaluation.tables import results_table
from helpers.grpo import trainer as grpo
from helpers.masking.dataset import NO_LOSS
from helpers.runs import Run
from helpers.training import trainer as sft
from helpers.training import trainer as train

# smoke is the demo, smaller; today's models are run by test_architectures
TODAY = [n for n, r in recipes.RECIPES.items() if r["source"].startswith("ours: ")]
NAMES = [name for name in recipes.RECIPES if name not in TODAY]
SFT = [name for name in NAMES if "sft" in recipes.load(name).stages]
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
    def config(self):
        return self.run.config


def small(name, model):
    """A recipe on another model and our samples, every size cut down."""
    config = recipes.scaled(recipes.load(name), steps=STEPS, rows=4, samples=True)
    cuts = {"model": model, "evaluation__max_new_tokens": 4}
    cuts["export"] = recipes.small(config).export  # what a CPU can write
    if "grpo" in config.stages:
        cuts["grpo__max_completion_length"] = 8
    return changed(config, **cuts)


@pytest.fixture(scope="module", params=NAMES)
def trained(request, tiny_model_folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp(request.param)
        patch.setenv("TUNEBOOK_RUNS", str(home))
        run = runs.save_run(small(request.param, str(tiny_model_folder)))
        data.prepare(run)
        trainers = {}
        for stage in run.config.stages:
            start = stages.ensure_adapter(run, "sft") if stage == "grpo" else None
            model, tokenizer = train.load_for_training(run, stage, start)
            build = sft.build_sft if stage == "sft" else grpo.build_grpo
            trainers[stage] = build(run, model, tokenizer)
            train.fit(trainers[stage], run)
        yield Trained(run, tokenizer, trainers)


with_sft = pytest.mark.parametrize("trained", SFT, indirect=True)


def source_text(source, row, tokenizer):
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
    names = {"system": "system", "human": "user", "gpt": "assistant"}
    turns = [(names[t["from"]], t["value"]) for t in row.get("conversations", [])]
    turns = turns or [("user", row["instruction"]), ("assistant", row["output"])]
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False)


@with_sft
def test_training_texts_are_in_the_format_of_the_source(trained):
    tokenizer, part = trained.tokenizer, trained.run.report()["data"]
    rows = trained.trainers["sft"].train_dataset
    together = "\n".join(tokenizer.decode(row["input_ids"]) for row in rows)
    texts = [
        source_text(source, row, tokenizer)
        for source in trained.config.data.train
        for row in load_rows(source)
        if "messages" not in row and "word_problems" not in source
    ]
    absent = [text for text in texts if text not in together]
    held_out = sum(part.get(name, 0) for name in ("eval", "test_chat"))
    assert len(absent) == (held_out if trained.config.data.eval_share else 0)
    assert len(absent) < len(texts)


@with_sft
def test_the_loss_covers_what_the_recipe_says_and_padding_never(trained):
    tokenizer, trainer = trained.tokenizer, trained.trainers["sft"]
    rows = files.read_rows(trained.run.path / "data" / "train.jsonl")
    answers = [
        message["content"] + tokenizer.eos_token
        for row in rows
        for message in row["messages"]
        if message["role"] == "assistant"
    ]
    supervised = ""
    for row in trainer.train_dataset:
        if trained.config.loss_on == "all":
            assert row["labels"] == row["input_ids"]
        supervised += tokenizer.decode([x for x in row["labels"] if x != NO_LOSS])
    if trained.config.loss_on == "assistant":
        assert len(supervised) == sum(map(len, answers))
        assert all(answer in supervised for answer in answers)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for batch in trainer.get_train_dataloader():
        labels, ids = batch["labels"], batch["input_ids"]
        assert (labels == tokenizer.eos_token_id).sum() >= len(ids)
        assert (labels[ids == tokenizer.pad_token_id] == NO_LOSS).all()


def test_lora_and_weights_are_as_the_recipe_says(trained):
    from peft.tuners.lora import LoraLayer

    lora, four_bit = trained.config.lora, trained.config.weights == "4bit"
    for trainer in trained.trainers.values():
        model = trainer.model
        modules = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
        assert {n.rpartition(".")[2] for n, _ in modules} == {*lora["target_modules"]}
        for _, layer in modules:
            assert layer.r["default"] == lora["r"]
            assert layer.scaling["default"] == lora["lora_alpha"] / lora["r"]
            dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
            assert dropout == lora.get("lora_dropout", 0.0)
            assert layer.lora_A["default"].weight.dtype.itemsize == 4
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert names and all("lora_" in name for name in names)
        # auto is 16bit without a GPU
        assert getattr(model, "is_loaded_in_4bit", False) == four_bit
        if four_bit:
            quantised = model.config.quantization_config
            assert quantised.bnb_4bit_quant_type == "nf4"
            assert quantised.bnb_4bit_use_double_quant == trained.config.double_quant


def test_optimiser_schedule_and_batch_are_the_recipes(trained):
    for stage, trainer in trained.trainers.items():
        values = getattr(trained.config, stage)
        optimiser = trainer.optimizer.optimizer
        module, bits, paged = OPTIMISERS[values.get("optim", "adamw_torch")]
        assert type(optimiser).__module__ == module
        if bits:
            assert (optimiser.args.optim_bits, optimiser.is_paged) == (bits, paged)
        decay = max(group["weight_decay"] for group in optimiser.param_groups)
        assert decay == values.get("weight_decay", 0.0)
        schedule, warmup = trainer.lr_scheduler.lr_lambdas[0], values["warmup_steps"]
        kind = values.get("lr_scheduler_type", "linear").partition("_")[0]
        assert f"_get_{kind}" in schedule.func.__name__
        # a share of two steps is rounded up
        warmup = 1 if 0 < warmup < 1 else warmup
        assert schedule.keywords["num_warmup_steps"] == warmup
        assert trainer.lr_scheduler.base_lrs[0] == values["learning_rate"]
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            assert getattr(trainer.args, name) == values.get(name, 1)
        assert trainer.args.max_grad_norm == values.get("max_grad_norm", 1.0)
        if stage == "grpo":
            assert trainer.num_generations == values["num_generations"]
            pairs = zip(trainer.reward_func_names, trainer.reward_weights, strict=True)
            assert dict(pairs) == pytest.approx(trained.config.rewards)
        assert trained.run.report()[stage]["steps"] == STEPS
        assert (trained.run.path / stage / "adapter").is_dir()


def test_what_the_recipe_holds_out_is_measured(trained):
    run, stage = trained.run, trained.config.stages[-1]
    names, adapter = evaluator.held_out(trained.config), run.path / stage / "adapter"
    part = evaluator.evaluate(run, stage, adapter)
    keys = {name: name for name in HELD_OUT} | {"eval": "eval_loss"}
    assert {key for key in keys.values() if key in part} == {keys[n] for n in names}
    assert len(results_table(run.report())) == 1


def test_the_one_that_ends_in_four_bits_trains_and_exports_in_one_call(
    tiny_model_folder, runs_home
):
    config = small("dolly-llama32-3b", str(tiny_model_folder))
    part = stages.train(config).report()["export"]
    assert part["adapter"]["tokens_agree"] > 0.5
    for name in ("adapter", "merged", "w4a16"):
        assert part[name]["faults"] == [] and part[name]["perplexity"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_on_the_real_model_with_either_engine(
    name, engine, tmp_path, run_python
):
    config = changed(small(name, "smollm2-135m-offline"), engine=engine)
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json(), encoding="utf-8")
    run_python("-m", "helpers", "train", str(path), TUNEBOOK_RUNS=str(tmp_path))
    report = json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8"))
    assert report["environment"]["engine"] == engine
    assert all(report[stage]["steps"] == STEPS for stage in config.stages)
    assert ("eval" in report) == bool(evaluator.held_out(config))
