"""The named configurations of `recipes.toml`; `load("demo")` is one word from a run."""

import copy
import importlib.util
import json
import logging
import re
import shutil
import tomllib
from pathlib import Path
from textwrap import shorten
from typing import Any

from helpers.config import SYSTEM_PROMPT, RunConfig, changed, check_config, flatten
from helpers.data.formats import answer_places, is_solved
from helpers.data.reading import Reader
from helpers.data.sources import open_rows
from helpers.errors import ConfigError, nearest
from helpers.runtime import find_local, hub_reachable

log = logging.getLogger(__name__)

# our samples in the row format of hub datasets, by the dataset's name
SAMPLES = {
    "databricks/databricks-dolly-15k": "data_samples/dolly.jsonl",
    "mlabonne/FineTome-100k": "data_samples/sharegpt.jsonl",
    "mlabonne/guanaco-llama2-1k": "data_samples/llama2_text.jsonl",
    "WizardLMTeam/WizardLM_evol_instruct_70k": "data_samples/wizardlm.jsonl",
    "openai/gsm8k/main:train": "data_samples/word_problems/train.jsonl",
    "openai/gsm8k/main:test": "data_samples/word_problems/test.jsonl",
}
NOTES = ("source", "needs", "published")  # about a recipe, no part of its config
COMMON = ("train", "test", "data", "main", "dataset")  # names that say nothing of rows


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    groups = {k: values.get(k, {}) | v for k, v in changes.items() if type(v) is dict}
    return values | changes | groups


def read_recipes(text: str) -> dict[str, dict[str, Any]]:
    """Returns the recipes of a TOML text, each with what it has from its `like`."""
    recipes: dict[str, dict[str, Any]] = {"": {}}
    for name, values in tomllib.loads(text).items():
        if (like := values.pop("like", "")) not in recipes:
            remedy = "correct the name, or move it up"
            raise ConfigError(f"{name}: {like=} is no recipe above it: {remedy}")
        parent = {k: v for k, v in recipes[like].items() if k not in NOTES}
        recipes[name] = merged(parent, values)
    return {name: recipe for name, recipe in recipes.items() if name}


RECIPES = read_recipes(Path(__file__).with_name("recipes.toml").read_text("utf-8"))
NAMES = (*RECIPES, "smoke")


def load(name: str, gpu: bool | None = None) -> RunConfig:
    """Returns a recipe's config, with `gpu` sizes by default where there is a GPU."""
    if name == "smoke":
        config = scaled(load("demo", gpu=False), steps=4, rows=16)
        return changed(config, recipe=name, name=name, evaluation__max_new_tokens=24)
    if name not in NAMES:
        known = ", ".join(NAMES)
        raise ConfigError(f"no recipe {name!r}{nearest(name, NAMES)} (known: {known})")
    # a copy: what somebody changes in a config must not reach the next one
    recipe = copy.deepcopy(RECIPES[name])
    values = {k: v for k, v in recipe.items() if k not in (*NOTES, "gpu")}
    if "gpu" in recipe and (has_gpu() if gpu is None else gpu):
        values = merged(values, recipe["gpu"])
    return check_config({"name": name, "recipe": name, **values})


def differences(config: RunConfig) -> str:
    """Returns what differs from a config's recipe, or what is set, in ten lines."""
    known = config.recipe in NAMES
    old = flatten(load(config.recipe).model_dump()) if known else {}
    new = flatten(config.model_dump(exclude_defaults=not known))
    names = [n for n in new | old if n != "name" and new.get(n) != old.get(n)]
    lines = [f"{n} = {new.get(n)!r}" + f", not {old.get(n)!r}" * known for n in names]
    if names[9:]:
        lines[8:] = [f"and {len(names) - 8} more: {', '.join(names[8:])}"]
    title = f"changes to the recipe {config.recipe}" if known else "settings"
    lines.insert(0, f"{config.name}, {title}: {len(names)}")
    return "\n".join(shorten(line, 88, placeholder=" ...") for line in lines)


def for_data(path: str, model: str | None = None) -> RunConfig:
    """Returns a config of SFT alone on one's own rows; logs what it made of them.

    A tenth of the conversations, by a hash of their first question, is held out for the
    loss, and a fifth for answers. Those are judged by label where answers are few
    different texts, by number where all end in `#### <number>`, else as texts.

    Args:
        path: a file, a folder of `save_to_disk`, or a hub dataset, in any format.
        model: hub id or folder; by default one for this machine.

    Raises:
        MissingInput, DataError: there are no such rows, or they cannot be read.
    """
    base = load(usual(), gpu=False)
    reader = Reader(path, drop_unusable=True)
    chats = reader.read(open_rows(path, 20_000))
    answers = [chat[answer_places(chat)[0]]["content"].strip() for chat in chats]
    classes, judged = sorted(set(answers)), "as texts"
    evaluation = base.evaluation.model_dump()
    if all(map(is_solved, answers)):
        judged = "by number"
    elif 2 <= len(classes) <= min(20, len(answers) // 5):
        judged, evaluation["labels"] = f"by label, of {classes}", classes
    rows = min(len(answers), 300 if base.name == "demo" else 2000)
    values = base.model_dump(include={"max_length", "inference", "lora"})
    epochs = {"max_steps": -1, "num_train_epochs": 3 if rows < 1000 else 1}
    each = {"eval_strategy": "epoch", "save_strategy": "epoch", "eval_steps": None}
    values |= {"sft": base.sft | epochs | each, "evaluation": evaluation}
    values["data"] = {"train": [path], "train_rows": rows, "drop_unusable": True}
    values["data"] |= {"eval_share": 0.1, "test_share": 0.2}
    if find_local(str(base.data.general)):  # which `pip install` does not bring
        values["data"] |= base.data.model_dump(include={"general", "general_rows"})
    values["system_prompt"] = SYSTEM_PROMPT if reader.form == "gsm8k" else ""
    *_, folder, file = ["mine", *Path(path).parts]
    name = file.partition(".")[0]
    name = f"{folder}-{name}" if name.partition(":")[0] in COMMON else name
    name = re.sub(r"\W+", "-", name).strip("-") or "mine"
    values["name"] = f"{name}-data" if name in NAMES else name
    log.info(f"{path}: {reader.form}, as {reader.why}")
    text = f"{rows} of {reader.rows} rows in {epochs['num_train_epochs']} epochs of SFT"
    log.info(f"{text}; about {max(1, rows // 5)} held-out answers are judged {judged}")
    if rows < 100:
        log.info("so few rows can show a large gain alone")
    for reason, part in reader.left_out.items():
        log.info(f"left out, {reason}: {part['rows']}, like {part['examples'][0]}")
    return check_config({"model": model or base.model, "stages": ["sft"], **values})


def usual() -> str:
    """Returns the name of the recipe for a machine on which none is chosen."""
    return "finetome-llama32-1b" if has_gpu() and hub_reachable() else "demo"


def has_gpu() -> bool:
    found = shutil.which("nvidia-smi") and importlib.util.find_spec("torch")
    return bool(found) and importlib.import_module("torch").cuda.is_available()


def scaled(
    config: RunConfig,
    *,
    steps: int | None = None,
    rows: int | None = None,
    samples: bool = False,
) -> RunConfig:
    """Returns a smaller config; with `samples`, on our rows instead of the hub's."""
    values = config.model_dump()
    if samples:
        text = config.data.model_dump_json()
        for name, sample in SAMPLES.items():
            text = re.sub(rf'"{name}(:\w+)?"', f'"{sample}"', text)
        values["data"] = json.loads(text)
    if steps is not None:  # of SFT; half of GRPO; a warm-up in steps shrinks with them
        values["grpo_minutes"], half = None, max(1, steps // 2)
        for part, count in ((values["sft"], steps), (values["grpo"], max(2, half))):
            warmup, before = part.get("warmup_steps") or 0, part.get("max_steps") or 0
            if warmup >= 1 and before > 0:  # below 1 it is a share of the run
                part["warmup_steps"] = round(warmup * count / before)
            if part:
                part |= {"max_steps": count, "save_steps": half}
            if "eval_steps" in part:
                part["eval_steps"] = half
    if rows is not None:  # to score; more to train on, fewer to choose by
        values["grpo_held_out"] = max(1, rows // 4)
        values["data"] |= {"train_rows": 8 * rows, "eval_rows": rows}
        names = ("test_rows", "test_new_rows", "general_rows")
        values["data"] |= dict.fromkeys(names, rows)
    return check_config(values)


def small(config: RunConfig) -> RunConfig:
    """Returns a config on the offline model and our samples: minutes on two cores."""
    config = scaled(config, steps=10, rows=8, samples=True)
    changes: dict[str, Any] = {"model": "smollm2-135m-offline"}
    # 4-bit weights save memory, which is not short here, and cost time on a CPU
    changes |= {"weights": "auto", "evaluation__max_new_tokens": 64}
    changes["thinking"] = None  # for which this model's template has no switch
    # AWQ needs a GPU; GPTQ writes files of the same kind on a CPU
    changes["export"] = ["w4a16" if f == "awq" else f for f in config.export]
    for stage in config.stages:  # one micro-batch a step
        changes[f"{stage}__gradient_accumulation_steps"] = 1
    if "grpo" in config.stages:  # of one group of short answers
        changes["grpo__max_completion_length"] = 64
        changes["grpo__per_device_train_batch_size"] = config.grpo["num_generations"]
    return changed(config, name=f"{config.name}-small", **changes)
