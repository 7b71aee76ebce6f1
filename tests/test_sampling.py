"""Sampling from the folded copy: it says what the trained model would say."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.config import changed
from helpers.errors import ConfigError
from helpers.inference.generation import generate
from helpers.models import adapters
from helpers.models import load as models
from helpers.rollout import decoder as decoding
from helpers.rollout import sampler as sampling
from helpers.runs import Run

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [20]]
DRAWN = decoding.Settings()
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]}


Load = Callable[..., Any]


@pytest.fixture
def load(tiny_model_folder: Any) -> Load:
    """Loads the tiny model with LoRA matrices that change its answers."""

    def make(weights: str = "16bit", **lora: Any) -> Any:
        model, _ = models.load_model(
            str(tiny_model_folder), engine="transformers", weights=weights
        )
        torch.manual_seed(1)
        for parameter in model.parameters():  # else greedy answers repeat one token
            if weights == "16bit":
                parameter.data.mul_(8)
        tuned = adapters.add_lora(model, {**LORA, **lora}, engine="transformers")
        shake(tuned, 0.3)
        return tuned.eval()

    return make


def copied(model: Any) -> sampling.Sampler:
    """Returns the sampler of a model, its adapter merged."""
    sampler = sampling.Sampler(model)
    sampler.copy.refresh()
    return sampler


def shake(model: Any, size: float) -> None:
    """Changes all LoRA matrices, as an optimiser would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)


def greedy_of(model: Any, prompt: list[int], tokens: int, stop: int) -> list[int]:
    """Returns what transformers generates from the trained model itself."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": stop, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **options)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("weights", ["16bit", "4bit"])
def test_samples_and_their_log_probabilities_are_the_trained_models(
    load: Load, weights: str
) -> None:
    model = load(weights)
    sampler = copied(model)
    greedy = sampler.decoder.generate(PROMPTS, 12, [2], None)
    drawn = sampler.decoder.generate(PROMPTS, 12, [2], DRAWN)
    for prompt, likeliest, completion in zip(PROMPTS, greedy, drawn, strict=True):
        assert likeliest.ids == greedy_of(model, prompt, 12, stop=2)
        whole = torch.tensor([prompt + completion.ids])
        with torch.no_grad():
            logps = (
                model(input_ids=whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            )
        expected = logps.gather(-1, whole[0, len(prompt) :, None])[:, 0].tolist()
        assert completion.logps == pytest.approx(expected, abs=2e-4)
    assert len({tuple(completion.ids) for completion in greedy}) > 1


def test_a_refresh_follows_the_adapter_and_keeps_weights_in_place(load: Load) -> None:
    model = load()
    sampler = copied(model)
    places = [p.data_ptr() for p in sampler.copy.net.parameters()]
    before = sampler.decoder.generate(PROMPTS, 12, [2], None)
    for _ in range(3):  # nothing of a former adapter may stay behind
        shake(model, 0.3)
        sampler.copy.refresh()
    after = sampler.decoder.generate(PROMPTS, 12, [2], None)
    assert after != before
    assert after[0].ids == greedy_of(model, PROMPTS[0], 12, stop=2)
    assert [p.data_ptr() for p in sampler.copy.net.parameters()] == places
    embedding = model.get_base_model().get_input_embeddings().weight  # not trained
    shared = sampler.copy.net.get_input_embeddings().weight
    assert shared.data_ptr() == embedding.data_ptr()


def test_a_completion_ends_with_its_stop_token_and_sampling_with_the_last(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = copied(load())
    whole = sampler.decoder.generate(PROMPTS, 12, [2], None)[1].ids
    stop = whole[4]
    cut = sampler.decoder.generate(PROMPTS, 12, [stop], None)[1]
    assert cut.ids == whole[: whole.index(stop) + 1]
    assert len(cut.logps) == len(cut.ids)
    drawn: list[int] = []
    token = sampler.decoder.token
    monkeypatch.setattr(sampler.decoder, "token", lambda: (drawn.append(1), token()))
    everything = list(range(sampler.copy.net.config.vocab_size))
    rows = sampler.decoder.generate(PROMPTS, 200, everything, DRAWN)
    assert [len(row.ids) for row in rows] == [1, 1, 1]
    assert len(drawn) < decoding.LOOK


def test_smaller_batches_reuse_what_was_allocated(load: Load) -> None:
    sampler = copied(load())
    first = sampler.decoder.generate(PROMPTS, 12, [2, 3], None)
    cache = sampler.decoder.cache
    sampler.decoder.generate(PROMPTS[:2], 12, [5], DRAWN)  # drawn: by the same graph
    again = sampler.decoder.generate(PROMPTS[:2], 12, [2, 3], None)
    assert sampler.decoder.cache is cache
    assert again == first[:2]


def test_sampled_tokens_follow_the_models_probabilities(load: Load) -> None:
    torch.manual_seed(0)
    model = load()
    sampler = copied(model)
    settings = decoding.Settings(top_k=3)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    best = logits.topk(3)
    rows = sampler.decoder.generate([PROMPTS[0]] * 2000, 1, [2], settings)
    drawn = torch.tensor([row.ids for row in rows])
    shares = (drawn == best.indices).float().mean(0)
    assert shares.sum() == 1
    assert shares.tolist() == pytest.approx(best.values.softmax(0).tolist(), abs=0.04)


def test_a_patched_class_does_not_change_the_copy(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    def broken(*_: Any, **__: Any) -> None:
        raise AssertionError("the patched forward was called")

    model = load()
    expected = greedy_of(model, PROMPTS[0], 4, stop=2)
    for name in ("LlamaAttention", "LlamaModel", "LlamaForCausalLM"):
        monkeypatch.setattr(getattr(modeling_llama, name), "forward", broken)
    sampler = copied(model)
    assert sampler.decoder.generate(PROMPTS[:1], 4, [2], None)[0].ids == expected


def test_training_samples_from_the_copy_as_it_is_after_each_step(
    load: Load, tiny_model_folder: Any, tmp_path: Any
) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    model = load(r=8)
    sampler = sampling.Sampler(model)
    rows = [{"prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(8)]
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "num_generations": 4}
    settings |= {"max_completion_length": 6, "max_steps": 11, "learning_rate": 5e-2}
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(output_dir=str(tmp_path), **settings),
        reward_funcs=[lambda completion_ids, **_: [sum(i) % 7 for i in completion_ids]],
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
        rollout_func=sampler,
    )
    trainer.train()
    name = "sampling/importance_sampling_ratio/mean"
    ratios = [e[name] for e in trainer.state.log_history if name in e]
    # of the first step, and of the eleventh: ten large updates lie between
    assert ratios == pytest.approx([1.0, 1.0], abs=1e-3)


def test_the_copy_answers_as_the_model_does_whatever_it_drew_before(
    load: Load, tiny_model_folder: Any
) -> None:
    from transformers import AutoTokenizer

    model = load()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    sampler = sampling.Sampler(model)
    questions = [f"{'What is ' * n}{n} + {n}?" for n in (9, 1, 4, 2, 7)]
    drawn = {"temperature": 2.0, "top_k": None, "max_new_tokens": 12}
    options: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 12}
    sampled = sampler.generate(tokenizer, questions, batch_size=2, sampling=drawn)
    for _ in range(2):
        completions = sampler.generate(tokenizer, questions, **options)
        assert completions == generate(model, tokenizer, questions, **options)
        assert completions != sampled
        shake(model, 0.3)  # the copy follows
    assert sampler.decoder.settings.temperature == 2.0  # of the graph, which stayed


# which sampler


def choose(run: Run, model: Any, **changes: Any) -> sampling.Sampler | None:
    return sampling.choose_sampler(Run(run.path, changed(run.config, **changes)), model)


def test_on_a_cpu_the_trained_model_samples(
    load: Load, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert choose(run, load()) is None
    assert "the trained model: a copy is faster only on a GPU" in caplog.text
    note = json.loads((run.path / "grpo" / "sampler.json").read_text())
    assert note["name"] == "model"
    assert isinstance(choose(run, load(), sampler="copy"), sampling.Sampler)


@pytest.mark.parametrize(
    ("changes", "lora", "text"),
    [
        ({"grpo__repetition_penalty": 1.2}, {}, "grpo.repetition_penalty; choose"),
        ({"grpo__use_vllm": True}, {}, "it does not know grpo.use_vllm"),
        ({}, {"use_dora": True}, "lora_magnitude_vector.* is trained besides LoRA"),
    ],
)
def test_what_a_copy_cannot_do_is_refused(
    load: Load, run: Run, changes: Any, lora: Any, text: str
) -> None:
    with pytest.raises(ConfigError, match=f"sampler='copy' does not work: .*{text}"):
        choose(run, load(**lora), sampler="copy", **changes)


def test_a_model_that_cannot_be_copied_is_told(run: Run) -> None:
    numbers = SimpleNamespace(layer_types=["full_attention", "sliding_attention"])
    model: Any = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: numbers)
    )
    assert "sliding_attention" in sampling.unsupported(run.config, model)
    numbers.layer_types, numbers.rope_parameters = None, {"rope_type": "longrope"}
    assert "changes with the length" in sampling.unsupported(run.config, model)


@pytest.mark.parametrize(("free", "fits"), [(2.1, True), (1.9, False)])
def test_a_copy_takes_half_of_the_free_memory_at_most(
    load: Load, monkeypatch: pytest.MonkeyPatch, free: float, fits: bool
) -> None:
    model = load()
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    weights = 2 * sum(layer.base_layer.weight.numel() for layer in layers)
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * weights), 0))
    assert (sampling.no_room(model) == "") is fits


# private API of the libraries, by name


def test_trl_and_transformers_still_have_what_is_private_of_them() -> None:
    from transformers import PreTrainedModel
    from trl import GRPOTrainer

    assert callable(GRPOTrainer._get_per_token_logps_and_entropies)
    assert callable(GRPOTrainer._log_metric)
    assert "TRL_EXPERIMENTAL_SILENCE" in inspect.getsource(GRPOTrainer.__init__)
    assert "attn_implementation" in inspect.getsource(PreTrainedModel._from_config)
