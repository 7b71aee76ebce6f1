"""Tests of helpers.estimate: parameters, peak memory, steps and minutes."""

import json
from types import SimpleNamespace

import psutil
import pytest

from benchmarks import memory
from helpers import estimate, recipes, runtime
from helpers.config import changed
from helpers.errors import UnknownArchitecture
from helpers.estimate import CPU, T4, estimate_memory, skeleton

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STOCK = recipes.load("finetome-llama32-1b")
H100 = estimate.Gpu("H100", 79.0, 343.0)
COPY = "16-bit copy to sample from"


@pytest.mark.parametrize(
    ("recipe", "parameters", "trained"),  # as published
    [
        ("demo", 134_515_008, 4_884_480),
        ("finetome-llama32-1b", 1_235_814_400, 11_272_192),
        ("guanaco-llama2-7b", 6_738_415_616, 16_777_216),
    ],
)
def test_a_recipe_has_and_trains_the_known_numbers_of_parameters(
    recipe, parameters, trained
):
    config = recipes.load(recipe)
    assert skeleton(config.model).num_parameters() == parameters
    tuned = skeleton(config.model, config.lora)
    assert tuned.get_nb_trainable_parameters()[0] == trained


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "unheard-of"}'])
def test_a_folder_without_a_usable_config_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnknownArchitecture, match=str(tmp_path)):
        estimate_memory(changed(STOCK, model=str(tmp_path)))


def test_an_unknown_model_without_a_hub_is_said_to_be_unknown():
    with pytest.raises(UnknownArchitecture, match="nobody/nothing.* connect"):
        skeleton("nobody/nothing-9b")


def test_gpus_that_share_weights_each_hold_their_part_and_what_is_gathered() -> None:
    config = changed(recipes.load("guanaco-llama2-7b"), engine="transformers")
    whole, two, four = (estimate_memory(config, T4, "sft", n) for n in (1, 2, 4))
    parts = ["weights", "embeddings", "LoRA and gradients", "optimiser"]
    assert two[parts].sum() == pytest.approx(2 * four[parts].sum())
    assert 2 * two["embeddings"] == whole["embeddings"]
    packed = two["weights"] * 2 + two["scales of the weights"]
    assert packed == pytest.approx(whole["weights"])
    assert whole.sum() > two.sum() > four.sum()
    # torch's AdamW has to keep fp32 moments
    assert two["optimiser"] * 2**30 == 8 * 16_777_216 / 2


@pytest.mark.parametrize("held_out", [True, False])
def test_measured_peaks_are_estimated_within_15_percent(held_out):
    cases = [c for c in memory.read_cases() if c["held_out"] == held_out]
    sizes = [abs(e) for e in memory.errors([c for c in cases if c["ran"]])]
    assert max(sizes) < 0.15 and sum(sizes) / len(sizes) < 0.04
    # what ran out of memory is estimated not to fit
    assert all(memory.estimate_case(c) > T4.memory_gb for c in cases if not c["ran"])


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_value_left_open_counts_as_the_default_of_its_class(stage):
    import trl

    kind = {"sft": trl.SFTConfig, "grpo": trl.GRPOConfig}[stage]
    names = ["per_device_train_batch_size", "gradient_accumulation_steps"]
    names += ["packing"] if stage == "sft" else ["max_completion_length"]
    empty = changed(STOCK, **{stage: {}})
    written = changed(empty, **{f"{stage}__{n}": getattr(kind, n) for n in names})
    assert estimate_memory(empty, T4, stage).equals(estimate_memory(written, T4, stage))
    assert estimate.step_rows(empty, stage) == estimate.step_rows(written, stage)


def test_a_copy_to_sample_from_is_counted_where_it_fits():
    copied = estimate_memory(STOCK, H100, "grpo")
    assert 1.8 < copied[COPY] < 2.4
    small = T4._replace(memory_gb=copied.sum())  # no room for the estimate's error
    assert COPY not in estimate_memory(STOCK, small, "grpo")


@pytest.mark.parametrize("name", [n for n in recipes.NAMES if n != "smoke"])
def test_every_recipe_is_estimated_to_fit_a_t4(name):
    assert estimate_memory(recipes.load(name)).sum() < T4.memory_gb


def test_steps_and_minutes_are_unknown_until_the_rows_are_counted():
    config = recipes.load("guanaco-llama2-7b")
    assert estimate.count_steps(config, "sft") is None
    assert estimate.sft_minutes(config, T4) is None
    assert estimate.count_steps(config, "sft", 1000) == 1250
    assert 0 < estimate.sft_minutes(config, H100, 1000) < 60
    assert estimate.count_steps(changed(config, sft__packing=True), "sft", 9) is None
    config = changed(STOCK, grpo__max_steps=-1, grpo__num_train_epochs=1)
    problems = 10 * estimate.step_rows(config, "grpo") // config.grpo["num_generations"]
    assert estimate.count_steps(config, "grpo", problems) == 10


@pytest.mark.parametrize(
    ("recipe", "place"), [("finetome-llama32-3b-a", T4), ("demo", CPU)]
)
def test_measured_trainings_are_estimated_within_a_factor_of_1_5(recipe, place):
    report = json.loads((runtime.ROOT / "results" / "demo_cpu.json").read_text())
    seconds = report["sft"]["seconds"] if place is CPU else 394.6  # published
    minutes = estimate.sft_minutes(recipes.load(recipe), place)
    assert 1 / 1.5 < 60 * minutes / seconds < 1.5


def test_memory_without_a_gpu_is_that_of_fp32_and_of_ram():
    report = json.loads((runtime.ROOT / "results" / "demo_cpu.json").read_text())
    demo = recipes.load("demo", gpu=False)
    sft, grpo = (estimate_memory(demo, CPU, s).sum() for s in ("sft", "grpo"))
    assert sft == pytest.approx(report["sft"]["peak_memory_gb"], rel=0.15)
    # its prompts have 100 tokens at most, 200 are assumed
    assert 1 < grpo / report["grpo"]["peak_memory_gb"] < 2
    for change in ({"sampler": "copy"}, {"engine": "transformers"}):
        assert estimate_memory(changed(demo, **change), CPU, "grpo").sum() == grpo
    assert CPU.memory_gb == pytest.approx(psutil.virtual_memory().total / 2**30)


@pytest.mark.parametrize(("cap", "memory_gb"), [("inf", 14.0), ("8", 8.0)])
def test_this_gpu_is_what_the_card_leaves_to_torch(cap, memory_gb, monkeypatch):
    card = SimpleNamespace(name="Tesla T4", total_memory=14.74 * 2**30, major=7)
    card.multi_processor_count = 40
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda *_: card)
    monkeypatch.setenv("TUNEBOOK_GPU_GB", cap)
    gpu = estimate.this_gpu()
    assert gpu.memory_gb == pytest.approx(memory_gb)
    assert gpu.tflops == pytest.approx(T4.tflops, rel=0.05)
