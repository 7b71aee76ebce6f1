"""The prompts that held-out problems are asked with: ours, or lm-evaluation-harness's.

Its protocols make numbers comparable with published ones. Their texts are read from the
installed `lm_eval` package, which puts the prompts together itself; only the date that
Llama's chat template writes stays the same here, and there is that of the day.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from helpers.data import preparation as data
from helpers.data.formats import Messages, Row
from helpers.data.sources import load_rows
from helpers.errors import ConfigError
from helpers.inference.generation import Prompt
from helpers.masking.templates import render
from helpers.runs import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = ("gsm8k_cot_llama",)  # asked through the chat template, a shot a turn
SHOTS_SEED = 1234  # lm_eval's default, --seed's third number


class Questions(NamedTuple):
    """Prompts, and the texts that end an answer besides the stop tokens."""

    prompts: list[Prompt]
    until: list[str]


def ask(run: Run, tokenizer: PreTrainedTokenizerBase, problems: list[Row]) -> Questions:
    """Returns the prompts of problems under the config's `evaluation.protocol`.

    Args:
        run: with `data/` prepared.
        tokenizer: the model's.
        problems: `question` and `answer` each.

    Raises:
        ConfigError: the protocol needs lm_eval, or training problems as examples.
    """
    protocol, source = run.config.evaluation.protocol, run.config.data.problems
    if protocol == "ours":
        system = run.config.system_prompt
        return Questions([data.ask(p["question"], system) for p in problems], [])
    examples: list[Row] = []
    if protocol not in CHAT:
        if not source:
            raise ConfigError(
                f"evaluation.protocol={protocol!r} shows solved examples of "
                "data.problems, which is not set: set it, or choose protocol='ours'"
            )
        examples = load_rows(source)
    task = make_task(protocol, problems, examples)

    def chat_template(chat: Messages, add_generation_prompt: bool = True) -> str:
        return render(tokenizer, chat, for_generation=add_generation_prompt)

    options: dict[str, Any] = {"num_fewshot": task.config.num_fewshot}
    if protocol in CHAT:
        options |= {"apply_chat_template": True, "fewshot_as_multiturn": True}
        options["chat_template"] = chat_template
    # in the problems' order: each draws its examples from the same generator
    prompts = [task.fewshot_context(doc, **options) for doc in task.test_docs()]
    return Questions(prompts, list(task.config.generation_kwargs["until"]))


def make_task(protocol: str, problems: list[Row], shots: list[Row]) -> Any:
    """Returns lm_eval's task of a protocol over problems of ours.

    Args:
        protocol: a task of lm_eval's folder `gsm8k`.
        problems: `question` and `answer` each.
        shots: the same; solved examples are drawn from them.

    Raises:
        ConfigError: lm_eval is not installed, or has no such task.
    """
    try:
        import lm_eval
        from lm_eval.api.task import ConfigurableTask
    except ImportError as error:
        raise ConfigError(
            f"evaluation.protocol={protocol!r} reads its texts from lm-evaluation-"
            f"harness, which cannot be imported ({error}): pip install lm-eval==0.4.13,"
            " or choose protocol='ours'"
        ) from error
    import yaml
    from datasets import Dataset, DatasetDict

    folder = Path(lm_eval.__file__).parent / "tasks" / "gsm8k"
    files = (
        yaml.safe_load(f.read_text("utf-8")) for f in sorted(folder.glob("*.yaml"))
    )
    found = next((task for task in files if task.get("task") == protocol), None)
    if found is None:
        raise ConfigError(f"{folder} has no task {protocol!r}; try lm-eval==0.4.13")
    parts = {"test": problems, "train": shots or problems}
    rows = {
        part: Dataset.from_list([{k: r[k] for k in ("question", "answer")} for r in of])
        for part, of in parts.items()
    }
    # it warns that the data are not the hub's
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    found["custom_dataset"] = lambda **_: DatasetDict(rows)
    task = ConfigurableTask(config=found)
    task.set_fewshot_seed(SHOTS_SEED)
    return task
