"""Tests of helpers.memory, helpers.gpus and helpers.timing's training minutes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from helpers import gpus, memory, recipes, shapes, timing
from helpers.config import changed

ROOT = Path(__file__).resolve().parent.parent
MEASURED = json.loads((ROOT / "results" / "memory.json").read_text())["rows"]
STOCK = recipes.load("finetome-llama32-1b")
SEVEN = recipes.load("dolly-llama2-7b")
H100 = gpus.Gpu("H100", 79.0, *gpus.KNOWN["H100"])


@pytest.fixture(scope="module")
def benchmark():
    path = ROOT / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_benchmark"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row["id"])
def test_the_committed_table_holds_what_is_predicted_today(row, benchmark) -> None:
    case = benchmark.find_case(row["id"])
    assert (case.held_out, case.changes) == (row["held_out"], row["config"])
    found = benchmark.predict(case, row)
    assert found.peak_gb == pytest.approx(row["predicted_gb"], abs=0.002)


def test_all_that_is_said_to_fit_ran_under_the_cap() -> None:
    assert all(row["ran"] for row in MEASURED if row["predicted_fits"])


def test_nothing_is_said_not_to_fit_that_ran_with_a_gigabyte_to_spare() -> None:
    refused = [row for row in MEASURED if not row["predicted_fits"]]
    assert refused
    assert not [row for row in refused if row["ran"] and row["measured_gb"] < 13.0]


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_weights_take_what_bitsandbytes_stores(double_quant: bool) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(
        512, 1024, bias=False, compress_statistics=double_quant, quant_type="nf4"
    )
    layer.load_state_dict({"weight": torch.randn(1024, 512)})
    weight = layer.to("cpu").weight
    state = weight.quant_state
    tensors = [weight.data, state.absmax]
    if double_quant:
        tensors.append(state.state2.absmax)
    stored = sum(t.numel() * t.element_size() for t in tensors)
    config = changed(SEVEN, double_quant=double_quant, engine="unsloth")
    arch = shapes.find_architecture(config.model)
    rest = 2 * (arch.parameters - arch.linear)
    weights = memory.fixed_bytes(config, arch, "sft")["weights"]
    predicted = (weights - rest) / arch.linear
    assert predicted == pytest.approx(stored / (512 * 1024), rel=1e-3)


def test_eight_bit_weights_take_twice_and_sixteen_four_times_four_bit() -> None:
    arch = shapes.find_architecture(STOCK.model)
    sizes = [
        memory.fixed_bytes(changed(STOCK, weights=bits), arch, "sft")["weights"]
        for bits in ("4bit", "8bit", "16bit")
    ]
    rest = 2 * (arch.parameters - arch.linear)
    four, eight, sixteen = (size - rest for size in sizes)
    assert eight / four == pytest.approx(2, rel=0.04)
    assert sixteen == 2 * eight


def test_transformers_keeps_embeddings_in_fp32_beside_quantised_weights() -> None:
    arch = shapes.find_architecture(STOCK.model)
    unsloth, plain = (
        memory.fixed_bytes(changed(STOCK, engine=engine), arch, "sft")["weights"]
        for engine in ("unsloth", "transformers")
    )
    embeddings = arch.vocab * arch.hidden
    assert plain - unsloth == pytest.approx(2 * embeddings, rel=1e-3)


@pytest.mark.parametrize(
    ("optim", "a_parameter"),
    [("adamw_torch", 8), ("adamw_8bit", 2), ("paged_adamw_32bit", 0)],
)
def test_the_optimiser_takes_its_bytes_a_trained_parameter(optim, a_parameter) -> None:
    arch = shapes.find_architecture(STOCK.model)
    parts = memory.fixed_bytes(changed(STOCK, sft__optim=optim), arch, "sft")
    assert parts["optimiser"] == a_parameter * 11_272_192


def peak(config, **changes) -> float:
    return memory.predict(changed(config, **changes), gpus.T4, "sft").peak_gb


@pytest.mark.parametrize("engine", ["unsloth", "transformers"])
@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"max_length": 1024}, {"max_length": 2048}),
        ({"lora__r": 8}, {"lora__r": 64}),
        ({"sft__gradient_checkpointing": True}, {"sft__gradient_checkpointing": False}),
        (
            {"sft__per_device_train_batch_size": 2},
            {"sft__per_device_train_batch_size": 4},
        ),
        ({"weights": "4bit"}, {"weights": "16bit"}),
    ],
    ids=["length", "rank", "checkpointing", "batch", "weights"],
)
def test_what_takes_more_is_predicted_to_take_more(engine, less, more) -> None:
    config = changed(STOCK, engine=engine)
    assert peak(config, **less) < peak(config, **more)


def test_gradient_accumulation_takes_no_memory() -> None:
    one = peak(STOCK, sft__gradient_accumulation_steps=1)
    assert one == peak(STOCK, sft__gradient_accumulation_steps=16)


def test_shorter_rows_than_max_length_take_less() -> None:
    short = memory.predict(STOCK, gpus.T4, "sft", row_tokens=500).peak_gb
    assert short < peak(STOCK)
    long = memory.predict(STOCK, gpus.T4, "sft", row_tokens=9000).peak_gb
    assert long == peak(STOCK)


@pytest.mark.parametrize("group", ["sft", "grpo"])
def test_a_value_left_open_is_predicted_as_the_default_of_its_class(group: str) -> None:
    """A copy of one of them has been wrong: 256 tokens an answer, where TRL has 512."""
    from trl import GRPOConfig, SFTConfig

    kind = {"sft": SFTConfig, "grpo": GRPOConfig}[group]
    names = ["per_device_train_batch_size", "gradient_accumulation_steps", "optim"]
    names += ["gradient_checkpointing"]
    names += ["packing"] if group == "sft" else ["num_generations"]
    names += ["max_completion_length"] if group == "grpo" else []
    open_ = changed(STOCK, **{group: {}, "grpo_minutes": None})
    written = changed(open_, **{f"{group}__{n}": getattr(kind, n) for n in names})
    predicted = [memory.predict(c, gpus.T4, group, steps=9) for c in (open_, written)]
    assert predicted[0] == predicted[1]
    assert predicted[0].minutes is not None


def test_patterns_take_the_memory_of_the_modules_that_they_match() -> None:
    named = changed(STOCK, engine="transformers", lora__target_modules=["q_proj"])
    for targets in (r".*\.q_proj", r"model\.layers\.\d+\.self_attn\.q_proj"):
        pattern = changed(named, lora__target_modules=targets)
        for stage in STOCK.stages:
            found = [memory.predict(c, gpus.T4, stage) for c in (named, pattern)]
            assert found[0] == found[1]
    every = changed(named, lora__target_modules="all-linear")
    assert memory.predict(every, gpus.T4, "sft") == memory.predict(
        changed(STOCK, engine="transformers"), gpus.T4, "sft"
    )


def test_modules_that_are_saved_are_trained_and_take_their_memory() -> None:
    saved = changed(STOCK, lora__modules_to_save=["embed_tokens"])
    before, after = (memory.predict(c, gpus.T4, "sft").parts for c in (STOCK, saved))
    embedding = 128256 * 2048 * 2 / memory.GIB  # adamw_8bit: two bytes a parameter
    grown = after["optimiser"] - before["optimiser"]
    assert grown == pytest.approx(embedding)


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_what_a_copy_cannot_sample_from_is_predicted_without_a_copy(lora: dict) -> None:
    changes = {f"lora__{name}": value for name, value in lora.items()}
    config = changed(STOCK, **changes)
    large = H100._replace(memory_gb=79.0)
    assert memory.settle_sampler(STOCK, large).sampler == "copy"
    assert memory.settle_sampler(config, large).sampler == "model"
    assert memory.COPY not in memory.predict(config, large, "grpo").parts


def test_longer_answers_take_a_larger_cache_in_grpo() -> None:
    found = [
        memory.predict(changed(STOCK, grpo__max_completion_length=n), gpus.T4, "grpo")
        for n in (256, 1024)
    ]
    assert found[0].parts["KV cache"] < found[1].parts["KV cache"]


def test_without_a_stage_the_hungriest_is_predicted() -> None:
    stages = [memory.predict(STOCK, gpus.T4, stage).peak_gb for stage in STOCK.stages]
    assert memory.predict(STOCK, gpus.T4).peak_gb == max(stages)


def test_the_parts_add_up_to_the_peak_and_the_context_is_apart() -> None:
    found = memory.predict(STOCK, gpus.T4, "sft")
    assert found.peak_gb == sum(found.parts.values())
    assert found.context_gb == gpus.CONTEXT_GB
    assert gpus.T4.memory_gb + gpus.CONTEXT_GB == pytest.approx(14.74)


def test_seven_billion_in_sixteen_bit_do_not_fit_a_t4() -> None:
    assert not memory.predict(changed(SEVEN, weights="16bit"), gpus.T4).fits


@pytest.mark.parametrize("name", [n for n in recipes.NAMES if n != "smoke"])
def test_every_recipe_is_predicted_to_fit_the_gpu_that_it_says(name: str) -> None:
    assert memory.predict(recipes.load(name), gpus.T4).fits


def test_a_model_whose_numbers_nobody_knows_is_refused() -> None:
    with pytest.raises(shapes.UnknownArchitecture, match="nobody/nothing"):
        memory.predict(changed(STOCK, model="nobody/nothing"), gpus.T4)


def test_a_machine_without_a_gpu_has_none_to_predict_for() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpus.this_gpu() is None
    assert memory.predict(STOCK, None, "sft").gpu == gpus.T4


def test_minutes_follow_the_steps_and_the_gpu() -> None:
    ten = timing.training_minutes(STOCK, gpus.T4, "sft", 10)
    assert timing.training_minutes(STOCK, gpus.T4, "sft", 20) == 2 * ten
    assert timing.training_minutes(STOCK, H100, "sft", 10) < ten


def test_minutes_are_unknown_when_epochs_are_counted() -> None:
    assert timing.training_minutes(SEVEN, gpus.T4, "sft") is None


def test_recomputing_costs_a_third_of_the_arithmetic() -> None:
    big = {"sft__per_device_train_batch_size": 512}
    fast, slow = (
        timing.training_minutes(
            changed(STOCK, **big, sft__gradient_checkpointing=on), gpus.T4, "sft"
        )
        for on in (False, True)
    )
    assert fast / slow == pytest.approx(2 / 3, rel=0.01)


def test_the_published_run_on_a_t4_is_predicted_within_a_quarter() -> None:
    # 394.6 s for 60 steps of 8 rows of FineTome on Llama-3.2-3B
    found = timing.training_minutes(
        recipes.load("finetome-llama32-3b-a"), gpus.T4, "sft"
    )
    assert found * 60 == pytest.approx(394.6, rel=0.25)


def test_the_measured_demo_on_two_cores_is_predicted_and_sampling_at_most_doubled():
    report = json.loads((ROOT / "results" / "demo_cpu.json").read_text())
    sft, grpo = (
        60 * timing.training_minutes(recipes.load("demo"), None, stage)
        for stage in ("sft", "grpo")
    )
    assert sft == pytest.approx(report["sft"]["seconds"], rel=0.25)
    # answers that stop early take less than was allowed for
    assert 1 <= grpo / report["grpo"]["seconds"] <= 2


def test_the_measured_grpo_on_an_h200_is_predicted_within_a_quarter() -> None:
    measured = json.loads((ROOT / "results" / "grpo_speed.json").read_text())
    shape = {"max_completion_length": 256, "per_device_train_batch_size": 8}
    shape |= {"num_generations": 8, "gradient_accumulation_steps": 1}
    config = changed(STOCK, stages=["grpo"], grpo_minutes=None)
    config = changed(config, **{f"grpo__{name}": x for name, x in shape.items()})
    h200 = gpus.Gpu("H200", 14.0, *gpus.KNOWN["H200"])
    itself = changed(config, sampler="model")
    plain = changed(itself, engine="transformers")
    for name, sampled in (("ours", config), ("unsloth", itself), ("trl", plain)):
        minutes = timing.training_minutes(sampled, h200, "grpo", 1)
        assert 60 / minutes == pytest.approx(measured[name], rel=0.25), name


def test_the_weights_are_compared_on_both_engines_side_by_side() -> None:
    table = memory.compare_weights(SEVEN, gpus.T4)
    assert [row[0] for row in table.rows] == ["4bit", "8bit", "16bit"]
    assert [len(row) for row in table.rows] == [len(table.header)] * 3
    sizes = [float(row[1]) for row in table.rows]
    assert sizes == sorted(sizes)
    assert "does not fit" in table.rows[2][2]


def test_a_model_without_numbers_gets_a_table_that_says_so() -> None:
    table = memory.compare_weights(changed(STOCK, model="nobody/nothing"), gpus.T4)
    assert "the numbers of 'nobody/nothing' are not known" in repr(table)
