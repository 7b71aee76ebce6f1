"""Loading: the offline model, 4-bit weights, and what cannot be loaded."""

import shutil

import pytest
import torch

from helpers.errors import ModelError
from helpers.inference.generation import reply
from helpers.models import load as models
from helpers.models.adapters import add_lora
from tests.tiny import save_tiny_model

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


def test_the_offline_model_loads_like_any_other_and_knows_its_special_tokens():
    model, tokenizer = models.load_model("smollm2-135m-offline")
    assert model.num_parameters() == 134_515_008
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer("1234", add_special_tokens=False).input_ids) == 4
    question = "What is the capital of France?"
    assert "Paris" in reply(model, tokenizer, question, max_new_tokens=12)


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match="'nobody/nothing' .* hub cannot be reached"):
        models.load_model("nobody/nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"'{tmp_path}' could not be loaded: "):
        models.load_model(str(tmp_path))


def test_weights_that_are_cut_are_one_sentence(tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="could not be loaded: .*header"):
        models.load_model(str(folder))


def test_a_tokenizer_larger_than_the_embedding_is_one_sentence(tokenizer, tmp_path):
    small = save_tiny_model("Llama", tokenizer, tmp_path / "small", vocab_size=64)
    with pytest.raises(ModelError, match="more tokens than rows of its embedding, 64"):
        models.load_model(str(small))


def test_an_answer_in_between_leaves_the_gradients_of_four_bit_weights_alone(
    tiny_model_folder,
):
    model, tokenizer = models.load_model(str(tiny_model_folder), weights="4bit")
    model = add_lora(model, LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at zero no gradient would pass to the layers below
            torch.nn.init.normal_(parameter, generator=torch.manual_seed(0))
    ids = tokenizer("Two and two are four.", return_tensors="pt").input_ids

    def gradients():
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
