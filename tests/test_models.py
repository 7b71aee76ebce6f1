"""Loading: the offline model, weights, options, and what cannot be loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import recipes
from helpers.errors import ModelError
from helpers.inference.generation import reply
from helpers.models import load as models
from helpers.models.adapters import add_lora
from tests.tiny import save_tiny_model

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
Load = Callable[..., tuple[Any, Any]]


@pytest.fixture
def load(tiny_model_folder: Path) -> Load:
    """Loads the tiny model; takes the options of `load_model`."""
    return lambda **more: models.load_model(str(tiny_model_folder), **more)


def test_the_offline_model_loads_like_any_other_and_knows_its_special_tokens() -> None:
    model, tokenizer = models.load_model("smollm2-135m-offline")
    assert model.num_parameters() == 134_515_008
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer("1234", add_special_tokens=False).input_ids) == 4
    question = "What is the capital of France?"
    assert "Paris" in reply(model, tokenizer, question, max_new_tokens=12)


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="'nobody/nothing' could .*hub cannot be reached"
    ):
        models.load_model("nobody/nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"'{tmp_path}' could not be loaded: "):
        models.load_model(str(tmp_path))


def test_a_tokenizer_larger_than_the_embedding_is_one_sentence(
    tokenizer: Any, tmp_path: Path
) -> None:
    small = save_tiny_model("Llama", tokenizer, tmp_path / "small", vocab_size=64)
    with pytest.raises(ModelError, match="more tokens than rows of its embedding, 64"):
        models.load_model(str(small))


def test_the_options_of_a_config_are_arguments_of_load_model() -> None:
    options = models.options(recipes.load("guanaco-llama2-7b"))
    assert set(options) < set(inspect.signature(models.load_model).parameters)
    assert (options["double_quant"], options["template"]) == (False, "llama-2")


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_scales_of_four_bit_weights_are_quantised_as_asked(
    load: Load, double_quant: bool
) -> None:
    model, _ = load(weights="4bit", double_quant=double_quant)
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.nested == double_quant


def test_an_answer_in_between_leaves_the_gradients_of_four_bit_weights_alone(
    load: Load,
) -> None:
    model, tokenizer = load(weights="4bit")
    model = add_lora(model, LORA, checkpointing=True)
    if not torch.cuda.is_available():
        assert not model.is_gradient_checkpointing
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at zero no gradient would pass to the layers below
            torch.nn.init.normal_(parameter, generator=torch.manual_seed(0))
    ids = tokenizer("Two and two are four.", return_tensors="pt").input_ids

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = gradients()
    reply(model, tokenizer, "Count to three.", max_new_tokens=2)
    model.train()
    after = gradients()
    assert len(before) == 8
    for first, second in zip(before, after, strict=True):
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-8)
