"""The architecture numbers of base models, and what can be counted from them alone.

No weights are loaded. Only dense decoders of Llama's layout are known here (Llama,
Mistral, Qwen2, Qwen3): separate q/k/v/o and gate/up/down projections.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from helpers.config import nearest

LAYOUTS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


# our names -> those of transformers' LlamaConfig
FIELDS = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
    "tied": "tie_word_embeddings",
}


class UnknownArchitecture(ValueError):
    """A model whose numbers are neither known here nor found on disk or hub."""


class Architecture(NamedTuple):
    """A dense decoder in numbers."""

    hidden: int
    """Width of the residual stream."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width inside the MLP."""
    vocab: int
    tied: bool
    """Whether the output head is the embedding matrix."""
    qkv_bias: bool = False
    qk_norm: bool = False


# from the models' published config.json
KNOWN = {
    "llama-3.2-1b": Architecture(2048, 16, 32, 8, 64, 8192, 128256, True),
    "llama-3.2-3b": Architecture(3072, 28, 24, 8, 128, 8192, 128256, True),
    "llama-2-7b": Architecture(4096, 32, 32, 32, 128, 11008, 32000, False),
    "smollm2-135m": Architecture(576, 30, 9, 3, 64, 1536, 49152, True),
}


def find_architecture(model: str) -> Architecture:
    """Returns a model's numbers: those known here, of its folder, or of the hub.

    >>> find_architecture("unsloth/Llama-3.2-1B-Instruct").layers
    16

    Raises:
        UnknownArchitecture: they are nowhere to be found, or the model is built in
            another way than Llama.
    """
    if Path(model).is_dir():
        return read_architecture(Path(model) / "config.json")
    found = look_up(model)
    if isinstance(found, UnknownArchitecture):
        raise found
    return found


@cache
def look_up(model: str) -> Architecture | UnknownArchitecture:
    """Returns a model's numbers or the reason for having none; asks the hub once."""
    try:
        return search(model)
    except UnknownArchitecture as error:
        return error


def search(model: str) -> Architecture:
    """Returns the numbers of a model by its name; see `find_architecture`."""
    name = model.lower().rpartition("/")[2]
    for known, numbers in KNOWN.items():
        if name.startswith((known, f"meta-{known}")):
            return numbers
    from helpers import runtime

    if not runtime.hub_reachable():
        raise UnknownArchitecture(
            f"the numbers of {model!r} are not known here and the model hub cannot be "
            "reached"
        )
    from huggingface_hub import hf_hub_download

    try:
        return read_architecture(Path(hf_hub_download(model, "config.json")))
    except (OSError, ValueError) as error:
        raise UnknownArchitecture(
            f"no config.json of {model!r}: {str(error)[:200]}"
        ) from error


def read_architecture(path: Path) -> Architecture:
    """Returns the numbers in a model's `config.json`.

    Raises:
        UnknownArchitecture: the file is missing or describes another layout.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UnknownArchitecture(f"{path}: {error}") from error
    kind = found.get("model_type")
    if kind not in LAYOUTS:
        raise UnknownArchitecture(
            f"{path}: model type {kind!r}; known: {', '.join(LAYOUTS)}"
        )
    needed = ["num_attention_heads", "hidden_size", "num_hidden_layers"]
    absent = [k for k in [*needed, "intermediate_size", "vocab_size"] if k not in found]
    if absent:
        raise UnknownArchitecture(f"{path} lacks {absent[0]!r}")
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    return Architecture(
        hidden=hidden,
        layers=found["num_hidden_layers"],
        heads=heads,
        kv_heads=found.get("num_key_value_heads") or heads,
        head_dim=found.get("head_dim") or hidden // heads,
        intermediate=found["intermediate_size"],
        vocab=found["vocab_size"],
        tied=found.get("tie_word_embeddings", False),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )


def config_fields(arch: Architecture) -> dict[str, int | bool]:
    """Returns the numbers as transformers' config classes take them.

    >>> config_fields(KNOWN["llama-3.2-1b"])["num_hidden_layers"]
    16
    """
    return {theirs: getattr(arch, ours) for ours, theirs in FIELDS.items()}


def linear_shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """Returns `(in, out)` of each projection of one layer, by name.

    >>> linear_shapes(KNOWN["llama-3.2-1b"])["k_proj"]
    (2048, 512)
    """
    width, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    return {
        "q_proj": (arch.hidden, width),
        "k_proj": (arch.hidden, kv),
        "v_proj": (arch.hidden, kv),
        "o_proj": (width, arch.hidden),
        "gate_proj": (arch.hidden, arch.intermediate),
        "up_proj": (arch.hidden, arch.intermediate),
        "down_proj": (arch.intermediate, arch.hidden),
    }


def count_linear(arch: Architecture) -> int:
    """Returns the weights in all layers' projections: what quantisation shrinks."""
    return arch.layers * sum(a * b for a, b in linear_shapes(arch).values())


def count_parameters(arch: Architecture) -> int:
    """Returns all parameters of the base model, a tied head counted once.

    >>> f"{count_parameters(KNOWN['llama-3.2-1b']):,}"
    '1,235,814,400'
    """
    per_layer = 2 * arch.hidden
    if arch.qkv_bias:
        shapes = linear_shapes(arch)
        per_layer += sum(shapes[name][1] for name in ("q_proj", "k_proj", "v_proj"))
    if arch.qk_norm:
        per_layer += 2 * arch.head_dim
    embeddings = arch.vocab * arch.hidden * (1 if arch.tied else 2)
    return embeddings + count_linear(arch) + arch.layers * per_layer + arch.hidden


def count_lora(arch: Architecture, r: int, target_modules: list[str]) -> int:
    """Returns the trainable parameters of LoRA: r x (in + out) a projection.

    >>> stock = KNOWN["llama-3.2-1b"]
    >>> count_lora(stock, 16, list(linear_shapes(stock)))
    11272192

    Raises:
        ValueError: a target module is none of the model's projections.
    """
    shapes = linear_shapes(arch)
    absent = [name for name in target_modules if name not in shapes]
    if absent:
        raise ValueError(
            f"the model has no module {absent[0]!r}{nearest(absent[0], shapes)} "
            f"(it has {', '.join(shapes)})"
        )
    per_layer = sum(r * sum(shapes[name]) for name in target_modules)
    return arch.layers * per_layer
