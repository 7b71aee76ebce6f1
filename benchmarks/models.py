"""Writes the tables of docs/models.md: what fits which GPU, what templates do.

    python benchmarks/models.py      # by `helpers.estimate` and `helpers.masking`

It measures nothing and fetches nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.chats import fit_tokenizer, trl_templates, turns  # noqa: E402
from benchmarks.markdown import to_markdown  # noqa: E402
from benchmarks.publish import replace  # noqa: E402
from helpers import recipes  # noqa: E402
from helpers.errors import TemplateError  # noqa: E402
from helpers.estimate import GIB, T4, Gpu, estimate_memory, skeleton  # noqa: E402
from helpers.masking import mask_conversation, prepare_tokenizer, render  # noqa: E402
from helpers.masking.dataset import NO_LOSS  # noqa: E402
from helpers.models.load import load_tokenizer  # noqa: E402

# GiB that are left to torch, as `estimate.this_gpu` reckons
GPUS = [T4, Gpu("RTX 3060", 11.0, 0), Gpu("L4", 21.7, 0)]
# trl's templates of the recipes' models, and what `thinking` is tried with them
TEMPLATES: dict[str, list[bool | None]] = {
    "llama3_2": [None],
    "qwen3": [None, True, False],
    "gemma3": [None],
}


def fits() -> str:
    """Returns the table of recipes and GPUs: estimated peak GiB of each stage."""
    rows = []
    for name in recipes.RECIPES:
        config = recipes.load(name, gpu=True)
        base = skeleton(config.model)
        trained, _ = skeleton(config.model, config.lora).get_nb_trainable_parameters()
        row = {"recipe": f"`{name}`", "parameters": f"{base.num_parameters():,}"}
        row["trained"] = f"{trained:,}"
        for gpu in GPUS:
            peaks = {s: estimate_memory(config, gpu, s).sum() for s in config.stages}
            cells = [
                f"{stage.upper()} {peak:.1f}"
                + ", too large" * bool(peak > gpu.memory_gb)
                for stage, peak in peaks.items()
            ]
            row[f"{gpu.name}, {gpu.memory_gb:.1f} GiB"] = "; ".join(cells)
        row["RAM on a CPU"] = f"{4 * base.num_parameters() / GIB:.1f}"
        rows.append(row)
    return to_markdown(rows)


def quote(text: str) -> str:
    text = text.replace("\n", "\\n").replace("|", "\\|")
    return f"`{text}`" if text else "-"


def labels_of(tokenizer: Any, thinking: bool | None) -> dict[str, str]:
    """Returns what a template does to the labels of conversations, in words."""
    own = tokenizer.chat_template
    prepare_tokenizer(tokenizer, special_tokens="keep", thinking=thinking)

    def learnt(messages: Any, loss_on: Any = "last") -> str:
        row = mask_conversation(tokenizer, messages, loss_on)
        return tokenizer.decode([x for x in row["labels"] if x != NO_LOSS])

    question, answer = turns("Hi"), turns("Hi", "Hello.")
    prompt = render(tokenizer, question, for_generation=True)
    header = prompt.partition("Hi")[2]
    before, _, after = learnt(answer).partition("Hello.")
    system = render(tokenizer, turns("Hi", system="Be brief."))
    plain = render(tokenizer, question)
    folded = system.replace("Be brief.\n\n", "") == plain
    thought = "<think>\nHm.\n</think>\n\nHello."
    place = "put before the question" if folded else "a turn of its own"
    place += ", written without one, too" * ("system" in plain)
    kept = "Hm." in render(tokenizer, turns("Hi", thought, "And?"))
    try:
        learnt(turns("Hi", "Hello.", "And?", "Bye."), "assistant")
        several = "all answers"
    except TemplateError:
        several = 'the last, by `loss_on = "last"`'
    tags = "yes" if "{% generation" in own or "{%- generation" in own else "no"
    return {
        "the prompt ends in": quote(header),
        "learnt before a plain answer": quote(before),
        "learnt after it": quote(after),
        "system turn": place,
        "thoughts of earlier answers": "kept" if kept else "left out",
        "learnt of several turns": several,
        "generation tags": tags,
    }


def labels() -> str:
    """Returns the table of templates, by what `helpers.masking` makes of them."""
    base = load_tokenizer("smollm2-135m-offline")
    texts = {name: t for t in trl_templates() for name in t.names}
    rows = []
    for name, values in TEMPLATES.items():
        for thinking in values:
            switch = "" if thinking is None else f", `thinking = {thinking}`".lower()
            tokenizer = fit_tokenizer(base, texts[f"trl/{name}"])
            row = {"template": name + switch}
            rows.append(row | labels_of(tokenizer, thinking))
    return to_markdown(rows)


def main() -> None:
    page = ROOT / "docs" / "models.md"
    replace(page, "fits", fits())
    replace(page, "labels", labels())


if __name__ == "__main__":
    main()
