"""Base models without weights: their numbers, and what LoRA trains of them.

The libraries build the model, and PEFT puts LoRA on it, on torch's meta device, where
tensors have shapes and no memory. So whatever PEFT knows is counted as PEFT does it.
"""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.errors import ModelError, UnknownArchitecture

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel


class Architecture(NamedTuple):
    """A decoder in numbers."""

    hidden: int
    """Width of the residual stream."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width inside the MLP."""
    vocab: int
    linear: int
    """Weights in the layers' matrices: what quantisation shrinks."""
    parameters: int
    """All of them, a tied head counted once."""


class Adapter(NamedTuple):
    """LoRA on a base model, in numbers."""

    trained: int
    """Parameters that are trained, `modules_to_save` included."""
    total: int
    """All parameters, the adapter's included."""
    folded: int
    """Weights of the matrices that LoRA is put on, in all layers."""
    inputs: int
    """Widths of these matrices' inputs, added up."""


# fields of LlamaConfig, from the models' published config.json
NUMBERS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
NUMBERS += ["num_key_value_heads", "intermediate_size", "vocab_size"]
NUMBERS += ["max_position_embeddings", "tie_word_embeddings"]
KNOWN: dict[str, dict[str, Any]] = {
    name: dict(zip(NUMBERS, numbers, strict=True))
    for name, numbers in {
        "llama-3.2-1b": (2048, 16, 32, 64, 8, 8192, 128256, 131072, True),
        "llama-3.2-3b": (3072, 28, 24, 128, 8, 8192, 128256, 131072, True),
        "llama-2-7b": (4096, 32, 32, 128, 32, 11008, 32000, 4096, False),
        "smollm2-135m": (576, 30, 9, 64, 3, 1536, 49152, 8192, True),
    }.items()
}


def find_config(model: str) -> PreTrainedConfig:
    """Returns a model's config: that known here, of its folder, or of the hub.

    >>> find_config("unsloth/Llama-3.2-1B-Instruct").num_hidden_layers
    16

    Raises:
        UnknownArchitecture: it is nowhere to be found, or transformers cannot read it.
    """
    # the hub is asked once; a folder may change
    find = look_up.__wrapped__ if Path(model).is_dir() else look_up
    config = find(model)
    if isinstance(config, str):
        raise UnknownArchitecture(config)
    return config


@cache
def look_up(model: str) -> PreTrainedConfig | str:
    """Returns a model's config, or the reason for having none."""
    from transformers import AutoConfig

    from helpers import runtime

    if not Path(model).is_dir():
        name = model.lower().rpartition("/")[2]
        for known, numbers in KNOWN.items():
            if name.startswith((known, f"meta-{known}")):
                return AutoConfig.for_model("llama", **numbers)
        if not runtime.hub_reachable():
            return (
                f"the numbers of {model!r} are not known here and the model hub cannot "
                "be reached"
            )
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, TypeError) as error:
        return f"{model}: {str(error)[:200]}"


@cache
def build(config: str, lora: str = "") -> PreTrainedModel | PeftModel:
    """Returns a model on the meta device, with LoRA where asked for.

    Args:
        config: of the base model, as JSON.
        lora: fields of `LoraConfig`, as JSON.

    Raises:
        UnknownArchitecture: transformers has no causal model of this kind.
        ValueError: PEFT cannot put the LoRA on it.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training warns, too
        try:
            numbers = AutoConfig.for_model(**json.loads(config))
            net: PreTrainedModel = AutoModelForCausalLM.from_config(numbers)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise UnknownArchitecture(str(error)[:200]) from error
        if not lora:
            return net
        # the first values of the matrices do not count, and take time
        fields = {**json.loads(lora), "init_lora_weights": False}
        fields["task_type"] = "CAUSAL_LM"
        return get_peft_model(net, LoraConfig(**fields))


def skeleton(model: str) -> PreTrainedModel:
    """Returns a base model without weights; do not change it.

    Raises:
        UnknownArchitecture: see `find_config`.
    """
    return build(find_config(model).to_json_string())


def adapt(model: str, lora: dict[str, Any]) -> PeftModel:
    """Returns a base model without weights, with LoRA on it; do not change it.

    Args:
        model: the base model.
        lora: fields of PEFT's `LoraConfig`.

    Raises:
        UnknownArchitecture: see `find_config`.
        ModelError: PEFT refuses it, or would leave out a part of it.
    """
    from helpers.models import adapters

    adapters.check_lora(skeleton(model), lora)
    fields = json.dumps(lora, default=list)
    try:
        tuned = build(find_config(model).to_json_string(), fields)
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        text = " ".join(str(error).split())[:300]
        if isinstance(error, AttributeError):
            text = f"PEFT fails on a setting of lora that it should refuse: {text}"
        raise ModelError(text) from error
    adapters.check_attached(tuned, lora)
    return tuned


def linear_names(net: PreTrainedModel) -> list[str]:
    """Returns the names of a model's matrices, the output head left out."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = net.get_output_embeddings()
    return [
        name
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]


def find_architecture(model: str) -> Architecture:
    """Returns a base model in numbers.

    >>> f"{find_architecture('unsloth/Llama-3.2-1B-Instruct').parameters:,}"
    '1,235,814,400'

    Raises:
        UnknownArchitecture: see `find_config`; or it has no attention heads.
    """
    net = skeleton(model)
    config = net.config.get_text_config()
    try:
        hidden, heads = config.hidden_size, config.num_attention_heads
        layers, vocab = config.num_hidden_layers, config.vocab_size
    except AttributeError as error:
        raise UnknownArchitecture(f"{model}: {error}") from error
    matrices = (net.get_submodule(name).weight for name in linear_names(net))
    return Architecture(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        # GPT-2 has no name for it
        intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
        vocab=vocab,
        linear=sum(weight.numel() for weight in matrices),
        parameters=net.num_parameters(),
    )


def count_lora(model: str, lora: dict[str, Any]) -> Adapter:
    """Returns LoRA on a base model in numbers.

    >>> lora = {"r": 16, "target_modules": "all-linear"}
    >>> count_lora("unsloth/Llama-3.2-1B", lora)[:2]
    (11272192, 1247086592)

    Raises:
        UnknownArchitecture: see `find_config`.
        ModelError: see `adapt`.
    """
    from peft.tuners.lora import Linear

    tuned = adapt(model, lora)
    trained, total = tuned.get_nb_trainable_parameters()
    layers = [module for module in tuned.modules() if isinstance(module, Linear)]
    return Adapter(
        trained=trained,
        total=total,
        folded=sum(layer.get_base_layer().weight.numel() for layer in layers),
        inputs=sum(layer.in_features for layer in layers),
    )
