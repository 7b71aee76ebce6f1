"""Answers prompts from exported files with plain transformers and PEFT, as others do.

A script for a process of its own: it imports nothing of this project, so that nothing
of it can make up for what the files lack. Reads a request as JSON from standard input,
writes the answers of each folder to the file that the request names.

Adapters are loaded by PEFT. `AutoModelForCausalLM.from_pretrained(adapter)` of
transformers 5.17 loses DoRA's magnitudes and `modules_to_save`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def ask(
    folder: str, loading: dict[str, Any], prompts: list[Any], max_tokens: int
) -> list[dict[str, Any]]:
    """Returns the greedy answers of an exported model or adapter, and if they ended.

    Args:
        folder: what `from_pretrained` takes.
        loading: `dtype` and, where an adapter was trained on quantised weights,
            `quantised`: what `BitsAndBytesConfig` takes.
        prompts: conversations that end in a user turn.
        max_tokens: answers are cut here.
    """
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        GenerationConfig,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    quantised = loading.get("quantised")
    adapter = (Path(folder) / "adapter_config.json").exists()
    loader = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    model = loader.from_pretrained(
        folder,
        dtype=loading["dtype"],
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        quantization_config=BitsAndBytesConfig(**quantised) if quantised else None,
    ).eval()
    settings = GenerationConfig.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    output = model.generate(
        **inputs,
        generation_config=settings,
        max_new_tokens=max_tokens,
        do_sample=False,
    )
    width = inputs["input_ids"].shape[1]
    ends = settings.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = []
    for row in output[:, width:].tolist():
        end = next((n for n, token in enumerate(row) if token in ends), None)
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        answers.append({"text": text.strip(), "stopped": end is not None})
    return answers


if __name__ == "__main__":
    request = json.load(sys.stdin)
    found = {
        folder: ask(folder, loading, request["prompts"], request["max_tokens"])
        for folder, loading in request["folders"].items()
    }
    Path(request["out"]).write_text(json.dumps(found), encoding="utf-8")
