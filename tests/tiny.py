"""Models of random weights, two layers each."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_tiny_model(family: str, tokenizer: Any, folder: Path, **more: Any) -> Path:
    """Writes a model of a family's architecture and its tokenizer; returns the folder.

    Args:
        family: as its classes begin, like `Llama`; `Gemma3` has a vision tower, too.
        tokenizer: decides the vocabulary.
        folder: where to.
        more: fields of the family's config.
    """
    import torch
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 4
    fields = {
        "vocab_size": len(tokenizer),
        **sizes,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **more,
    }
    if family == "Gemma3":
        vision = {**sizes, "image_size": 28, "patch_size": 14, "vision_use_head": False}
        fields = {"text_config": fields, "vision_config": vision}
    config = getattr(transformers, f"{family}Config")(**fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
