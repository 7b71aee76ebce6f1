"""Sampling from the folded copy: it says what the trained model would say."""

import inspect
import json
from types import SimpleNamespace

import pytest
import torch

from helpers.config import changed
from helpers.errors import ConfigError
from helpers.inference import decoder as decoding
from helpers.inference import sampler as sampling
from helpers.inference.generation import generate
from helpers.models import adapters
from helpers.models import load as models
from helpers.runs import Run
from tests.tiny import save_tiny_model

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [20]]
DRAWN = (1.0, 0, 1.0, None)  # temperature, top-k, top-p, min-p
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]}


@pytest.fixture
def load(tiny_model_folder):
    """Loads the tiny model with LoRA matrices that change its answers."""

    def make(weights="16bit", **lora):
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


def copied(model):
    """Returns the sampler of a model, its adapter merged."""
    sampler = sampling.Sampler(model)
    sampler.refresh()
    return sampler


def greedy(sampler):
    return sampler.decoder.generate(PROMPTS, 12, [2], None)[0]


def shake(model, size):
    """Changes all LoRA matrices, as an optimiser would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)


def greedy_of(model, prompt, tokens, stop):
    """Returns what transformers generates from the trained model itself."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": stop, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **options)
    return output[0, len(prompt) :].tolist()


def log_probabilities(model, prompt, ids, temperature=1.0):
    """Returns those of the trained model itself."""
    whole = torch.tensor([prompt + ids])
    with torch.no_grad():
        scores = model(input_ids=whole).logits[0, len(prompt) - 1 : -1] / temperature
    return scores.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("weights", ["16bit", "4bit"])
def test_samples_and_their_log_probabilities_are_the_trained_models(load, weights):
    model = load(weights)
    sampler = copied(model)
    likeliest = greedy(sampler)
    assert len({tuple(ids) for ids in likeliest}) > 1
    rows = zip(PROMPTS, *sampler.decoder.generate(PROMPTS, 12, [2], DRAWN), strict=True)
    for number, (prompt, ids, logps) in enumerate(rows):
        assert likeliest[number] == greedy_of(model, prompt, 12, stop=2)
        expected = log_probabilities(model, prompt, ids)
        assert logps == pytest.approx(expected, abs=2e-4)


def test_a_refresh_follows_the_adapter_and_keeps_weights_in_place(load):
    model = load()
    sampler = copied(model)
    net = sampler.decoder.net
    places = [p.data_ptr() for p in net.parameters()]
    before = greedy(sampler)
    for _ in range(3):  # nothing of a former adapter may stay behind
        shake(model, 0.3)
        sampler.refresh()
    assert greedy(sampler) != before
    assert greedy(sampler)[0] == greedy_of(model, PROMPTS[0], 12, stop=2)
    assert [p.data_ptr() for p in net.parameters()] == places
    embedding = model.get_base_model().get_input_embeddings().weight  # not trained
    assert net.get_input_embeddings().weight.data_ptr() == embedding.data_ptr()


def test_a_completion_ends_with_its_stop_token_and_sampling_with_the_last(
    load, monkeypatch
):
    sampler = copied(load())
    whole = greedy(sampler)[1]
    rows, logps = sampler.decoder.generate(PROMPTS, 12, [whole[4]], None)
    assert rows[1] == whole[: whole.index(whole[4]) + 1]
    assert len(logps[1]) == len(rows[1])
    calls = []
    token = sampler.decoder.token
    monkeypatch.setattr(sampler.decoder, "token", lambda: (calls.append(1), token()))
    everything = list(range(sampler.decoder.net.config.vocab_size))
    rows, _ = sampler.decoder.generate(PROMPTS, 200, everything, DRAWN)
    assert [len(row) for row in rows] == [1, 1, 1]
    assert len(calls) < decoding.LOOK


def test_sampled_tokens_follow_the_models_probabilities(load):
    torch.manual_seed(0)
    model = load()
    sampler = copied(model)
    with torch.no_grad():
        best = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].topk(3)
    settings = (1.0, 3, 1.0, None)
    rows, _ = sampler.decoder.generate([PROMPTS[0]] * 2000, 1, [2], settings)
    shares = (torch.tensor(rows) == best.indices).float().mean(0)
    assert shares.sum() == 1
    assert shares.tolist() == pytest.approx(best.values.softmax(0).tolist(), abs=0.04)


def test_a_window_that_nothing_leaves_is_full_attention(tokenizer, run, tmp_path):
    kinds = ["sliding_attention"] * 2 + ["full_attention"]
    sizes = {"num_hidden_layers": 3, "sliding_window": 64, "layer_types": kinds}
    folder = save_tiny_model("Gemma3Text", tokenizer, tmp_path, head_dim=16, **sizes)
    model, _ = models.load_model(str(folder), engine="transformers")
    tuned = adapters.add_lora(model, LORA, engine="transformers").eval()
    shake(tuned, 0.3)
    lengths = {"grpo__max_completion_length": 12, "sampler": "copy"}
    sampler = choose(run, tuned, **lengths, max_prompt_length=52)
    assert isinstance(sampler, sampling.Sampler)
    sampler.refresh()
    assert greedy(sampler) == [greedy_of(tuned, p, 12, stop=2) for p in PROMPTS]
    with pytest.raises(ConfigError, match="128 tokens leave the window: shorten"):
        sampler.decoder.generate(PROMPTS, 60, [2], None)
    for prompt in (53, None):
        with pytest.raises(ConfigError, match="does not know .* sliding_attention"):
            choose(run, tuned, **lengths, max_prompt_length=prompt)


def test_a_patched_class_does_not_change_the_copy(load, monkeypatch):
    from transformers.models.llama import modeling_llama

    def broken(*_, **__):
        raise AssertionError("the patched forward was called")

    model = load()
    expected = greedy_of(model, PROMPTS[0], 4, stop=2)
    for name in ("LlamaAttention", "LlamaModel", "LlamaForCausalLM"):
        monkeypatch.setattr(getattr(modeling_llama, name), "forward", broken)
    assert greedy(copied(model))[0][:4] == expected


def test_a_rollout_is_of_the_model_as_it_is_now_at_the_trainers_temperature(
    load, tokenizer
):
    model = load()
    sampler = sampling.Sampler(model)
    shake(model, 0.3)
    trainer = SimpleNamespace(
        processing_class=tokenizer,
        **{"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": None},
        **{"max_completion_length": 6, "eos_token_ids": [2], "model": model},
    )
    output = sampler([[{"role": "user", "content": "1 + 1?"}], "A text"], trainer)
    for prompt, ids, logps in zip(*output.values(), strict=True):
        expected = log_probabilities(model, prompt, ids, 0.7)
        assert logps == pytest.approx(expected, abs=2e-4)


def test_training_logs_the_drift_of_the_copy_every_ten_steps(
    load, tiny_model_folder, tmp_path
):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    model = load(r=8)
    rows = [{"prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(8)]
    settings = {"per_device_train_batch_size": 4, "num_generations": 4}
    settings |= {"max_completion_length": 6, "max_steps": 11, "learning_rate": 5e-2}
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(output_dir=str(tmp_path), **settings),
        reward_funcs=[lambda completion_ids, **_: [sum(i) % 7 for i in completion_ids]],
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
        rollout_func=sampling.Sampler(model),
    )
    trainer.train()
    name = "sampling/importance_sampling_ratio/mean"
    ratios = [e[name] for e in trainer.state.log_history if name in e]
    # of the first step, and of the eleventh: ten large updates lie between
    assert ratios == pytest.approx([1.0, 1.0], abs=1e-3)


def test_trl_and_transformers_still_have_what_is_private_of_them():
    from transformers import PreTrainedModel
    from trl import GRPOTrainer

    assert callable(GRPOTrainer._get_per_token_logps_and_entropies)
    assert callable(GRPOTrainer._log_metric)
    assert "TRL_EXPERIMENTAL_SILENCE" in inspect.getsource(GRPOTrainer.__init__)
    assert "attn_implementation" in inspect.getsource(PreTrainedModel._from_config)


def test_the_copy_answers_as_the_model_does_whatever_it_drew_before(load, tokenizer):
    model = load()
    sampler = copied(model)
    questions = [f"{'What is ' * n}{n} + {n}?" for n in (9, 1, 4, 2, 7)]
    sampler.decoder.generate(PROMPTS, 12, [2], (2.0, 0, 1.0, None))
    for _ in range(2):
        answers = sampler.generate(tokenizer, questions, 2, 12)
        options = {"batch_size": 2, "max_new_tokens": 12}
        assert answers == generate(model, tokenizer, questions, **options)
        shake(model, 0.3)  # the copy follows


def choose(run, model, **changes):
    return sampling.choose_sampler(Run(run.path, changed(run.config, **changes)), model)


def test_on_a_cpu_the_trained_model_samples(load, run, caplog):
    caplog.set_level("INFO")
    assert choose(run, load()) is None
    assert "the trained model: a copy is faster only on a GPU" in caplog.text
    note = json.loads((run.path / "grpo" / "sampler.json").read_text())
    assert note == {"name": "model", "reason": "a copy is faster only on a GPU"}
    assert isinstance(choose(run, load(), sampler="copy"), sampling.Sampler)


@pytest.mark.parametrize(
    ("changes", "compiled"),
    [
        ({"grpo_minutes": 10, "grpo__max_steps": 5}, True),
        ({"grpo_minutes": 9, "grpo__max_steps": 200}, False),
        ({"grpo__max_steps": 200}, True),
        ({"grpo__max_steps": 199}, False),
        ({"grpo__max_steps": -1}, True),
    ],
)
def test_only_long_runs_are_compiled(load, run, monkeypatch, changes, compiled):
    monkeypatch.setattr(sampling, "Sampler", lambda _, compiled: compiled)
    assert choose(run, load(), sampler="copy", **changes) is compiled


@pytest.mark.parametrize(
    ("changes", "lora", "text"),
    [
        ({"grpo__repetition_penalty": 1.2}, {}, "grpo.repetition_penalty; choose"),
        ({}, {"use_dora": True}, "lora_magnitude_vector.* is trained besides LoRA"),
    ],
)
def test_what_a_copy_cannot_do_is_refused(load, run, changes, lora, text):
    with pytest.raises(ConfigError, match=f"sampler='copy' does not work: .*{text}"):
        choose(run, load(**lora), sampler="copy", **changes)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
    ],
)
def test_a_model_that_cannot_be_copied_is_refused(run, values, text):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**values))
    with pytest.raises(ConfigError, match=f"does not know the model's {text}"):
        choose(run, SimpleNamespace(config=config), sampler="copy")


@pytest.mark.parametrize(("free", "fits"), [(2.1, True), (1.9, False)])
def test_a_copy_takes_half_of_the_free_memory_at_most(
    load, run, monkeypatch, free, fits
):
    model = load()
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    weights = 2 * sum(layer.base_layer.weight.numel() for layer in layers)
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * weights), 0))
    names = ("config", "modules", "named_parameters")
    on_gpu = SimpleNamespace(**{name: getattr(model, name) for name in names})
    on_gpu.device = torch.device("cuda")
    monkeypatch.setattr(sampling, "Sampler", lambda *_, **__: "copy")
    assert choose(run, on_gpu) == ("copy" if fits else None)
