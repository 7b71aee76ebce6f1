"""Exported files asked by other programs, and compared with the trained model."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.errors import ModelError
from helpers.grpo.answers import is_correct


def answer_plainly(folder: str, loading: dict, prompts: list, length: int) -> list:
    """Returns texts, and whether they ended; another process runs this source alone."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # of adapters, transformers 5.17 itself loses parts
    loader = AutoPeftModelForCausalLM if loading else AutoModelForCausalLM
    model = loader.from_pretrained(folder, device_map="auto", **loading)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    settings = GenerationConfig.from_pretrained(folder)
    settings.update(max_new_tokens=length, do_sample=False)
    form = {"padding": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, **form)
    output = model.generate(**inputs.to(model.device), generation_config=settings)
    output = output[:, inputs["input_ids"].shape[1] :].cpu()
    ends = torch.isin(output, torch.tensor(settings.eos_token_id))
    output = output.masked_fill(ends, tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return list(zip(map(str.strip, texts), ends.any(1).tolist(), strict=True))


def ask_plainly(folder: Path, *arguments: Any) -> list:
    script = "import json, sys\n" + inspect.getsource(answer_plainly)
    script += "print(json.dumps(answer_plainly(*json.load(sys.stdin))))"
    request = json.dumps([str(folder), *arguments])
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, input=request, capture_output=True, text=True)
    if done.returncode:
        raise ModelError(f"{folder} fails in plain transformers: {done.stderr[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_answers(name: str, answers: list, expected: list, gold: list) -> dict:
    count, stopped = len(answers), sum(ended for _, ended in answers)
    lost = sum(ended for _, ended in expected) - stopped
    if lost > max(1, 0.2 * count):
        raise ModelError(f"{name}: {lost} of {count} answers no longer end: lost stops")
    same = sum(a[0] == e[0] for a, e in zip(answers, expected, strict=True))
    values = {"greedy_agreement": same / count, "stop_rate": stopped / count}
    if gold:
        values["right"] = sum(map(is_correct, [text for text, _ in answers], gold))
    return values
