"""Models of random weights, two layers each."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_tiny_model(family: str, tokenizer: Any, folder: Path, **more: Any) -> Path:
    """Writes a model of a family's architecture and its tokenizer; returns the folder.

    Args:
        family: as its classes begin, like `Llama`.
        tokenizer: decides the vocabulary.
        folder: where to.
        more: fields of the family's config.
    """
    import torch
    import transformers

    text = "Text" if family == "Gemma3" else ""  # else it reads pictures, too
    config = getattr(transformers, f"{family}{text}Config")(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **more,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
