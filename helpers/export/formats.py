"""A trained stage as files for other programs: adapter, merged, GGUF, 4-bit, Space."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from helpers import estimate, runtime
from helpers.config import Format, RunConfig, Stage, changed
from helpers.data.formats import ask
from helpers.errors import ConfigError, ModelError
from helpers.export import card, gguf, parity
from helpers.files import content_hash, new_folder, read_rows
from helpers.masking import templates
from helpers.masking.dataset import mask_conversations
from helpers.masking.templates import answer_marks, render, stop_token_ids
from helpers.models import load
from helpers.runs import Run, writes
from helpers.training.inputs import require_stage

log = logging.getLogger(__name__)
FOUR_BIT = {"w4a16": 0, "awq": 128}  # and how many training rows calibrate it


@writes
def export(
    run: Run,
    stage: Stage | None = None,
    formats: list[Format] | None = None,
    prompts: int = 64,
    push: str | None = None,
    public: bool = False,
) -> dict[str, Any]:
    """Returns the report part of a stage's exported files, after writing them.

    Args:
        run: with the stage trained.
        stage: the run's last one by default.
        formats: by default the config's, else adapter and merged; they replace their
            folders in `export/`, others stay.
        prompts: the number of prompts to compare with the trained model.
        push, public: OWNER/NAME for the upload of one format, by the token in
            `HF_TOKEN`, and whether a new repository is public.

    Raises:
        ConfigError, MissingInput: no such stage or format, or not to be had here.
        ModelError: too little space; or a file does not behave as what was trained,
            which is in the report, where all that was written is.
    """
    config, folder, report = run.config, run.path / "export", run.report()
    stage = stage or config.stages[-1]
    require_stage(config, stage)
    adapter, token = run.require(f"{stage}/adapter"), os.environ.get("HF_TOKEN")
    formats = formats or config.export or ["adapter", "merged"]
    require_formats(changed(config, export=formats))
    if (push or public) and not (push and token and len(formats) == 1):
        form = "push=OWNER/NAME, with or without public, goes with one format"
        raise ConfigError(f"{form}, and a token in the environment variable HF_TOKEN")
    names = [name for name in get_args(Format) if name in formats and name != "space"]
    if "space" in formats and not kinds_of(names):
        names.append("gguf:q4_k_m")
    check_space(config, folder, names)
    paths = {name: folder / name.replace(":", "-") for name in names}
    write_files(run, adapter, paths)
    rows, faults = parity.check(run, stage, paths, prompts)
    for name, row in rows.items():
        row |= {"stage": stage, "adapter": content_hash(adapter)}
        row["faults"] = [fault for fault in faults if fault.startswith(f"{name}:")]
    report["export"] = report.get("export", {}) | rows
    table = parity.parity_table(report)
    for name, path in paths.items():
        card.write_card(path, run, name, report, table)
    sound = [name for name in names if "gguf:" in name and not rows[name]["faults"]]
    if "space" in formats and sound:  # the last is the smallest
        card.write_space(folder / "space", config, paths[sound[-1]] / "model.gguf")
        space = {"path": str(folder / "space")}
        report["export"]["space"] = rows[sound[-1]] | space
    run.write_part("export", report["export"])
    log.info(table.to_string())
    if faults:
        raise ModelError("\n".join(faults))
    if push and token:
        path = folder / formats[0].replace(":", "-")
        log.info(card.push_to_hub(path, push, token=token, private=not public))
    return report["export"]


def require_formats(config: RunConfig) -> None:
    """Raises ConfigError for formats of a config that this machine cannot write."""
    if "awq" in config.export and runtime.find_machine().device != "cuda":
        raise ConfigError("awq is calibrated on a GPU, and there is none: use w4a16")
    if {*FOUR_BIT} & {*config.export} and not find_spec("llmcompressor"):
        remedy = "python helpers/install.py requirements-export.txt"
        raise ConfigError(f"w4a16 and awq need llmcompressor: {remedy}")


def kinds_of(names: list[Format]) -> list[str]:
    return [name.removeprefix("gguf:") for name in names if "gguf:" in name]


def check_space(config: RunConfig, folder: Path, names: list[Format]) -> None:
    on_gpu = runtime.find_machine().device == "cuda"
    size, bits = estimate.skeleton(config.model).num_parameters(), 16 if on_gpu else 32
    disk, memory = gguf.needed_space(size, kinds_of(names), bits)
    if not on_gpu or {*FOUR_BIT} & {*names}:  # the weights are in RAM
        memory = max(memory, size * bits / 8e9)
    if names != ["adapter"]:
        gguf.require_space(folder, disk, memory)


def write_files(run: Run, adapter: Path, paths: dict[Any, Path]) -> None:
    config, folder = run.config, run.path / "export"
    folder.mkdir(exist_ok=True)
    if "adapter" in paths:
        write_adapter(config, adapter, paths["adapter"])
    if [*paths] == ["adapter"]:
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".merged-") as scratch:
        merged = paths.get("merged", Path(scratch, "merged"))
        tokenizer = merge(config, adapter, merged)
        runtime.free_memory()
        options: Any = {"system": config.system_prompt, "sampling": config.inference}
        if kinds := kinds_of([*paths]):
            for file in gguf.write_gguf(merged, folder, kinds).values():
                gguf.write_modelfile(file.parent, tokenizer, **options)
        for name in [name for name in FOUR_BIT if name in paths]:
            rows = training_ids(run, tokenizer, FOUR_BIT[name])
            with new_folder(paths[name]) as new:
                parity.run_alone(quantize, str(merged), str(new), rows)


def write_adapter(config: RunConfig, adapter: Path, folder: Path) -> None:
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(load.find_model(config.model))
    except OSError:  # the model comes without
        settings = GenerationConfig()
    with new_folder(folder) as new:
        for file in adapter.glob("adapter_*"):
            shutil.copy2(file, new)
        plain_tokenizer(config, settings).save_pretrained(new)
        settings.save_pretrained(new)


def merge(config: RunConfig, adapter: Path | str, folder: Path) -> Any:
    """Writes base and adapter as one model in 16 bit (fp32 on a CPU)."""
    options = {**load.options(config), "engine": "transformers"}
    base, _ = load.load_model(config.model, **options)
    if load.resolve_weights(config.weights) != "16bit":  # what it was trained on
        base = base.dequantize(dtype=base.dtype)
    tuned = load.load_adapter(base, adapter, engine="transformers")
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    plain = [getattr(m, "base_layer", getattr(m, "original_module", m)) for m in ends]
    # PEFT would change both of tied weights where the adapter changes one alone
    if plain != ends and plain[0].weight is plain[1].weight:
        plain[1].weight = copy.deepcopy(plain[1].weight)
    model = tuned.merge_and_unload()
    tokenizer = plain_tokenizer(config, model.generation_config)
    model.config.eos_token_id = tokenizer.eos_token_id
    with new_folder(folder) as scratch:
        # a file's weights are copied from a GPU to RAM before they are written
        model.save_pretrained(scratch, max_shard_size="2GB")
        tokenizer.save_pretrained(scratch)
    return tokenizer


def plain_tokenizer(config: RunConfig, settings: Any) -> Any:
    """Returns a tokenizer that works without this project; writes stops to settings."""
    options: Any = {"template": config.template, "pad_token": config.pad_token}
    tokenizer = load.load_tokenizer(config.model, **options)
    tokenizer.chat_template = templates.fix_date(tokenizer.chat_template)
    turns = [{"role": "user", "content": "?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    if text != render(tokenizer, turns):  # others add no BOS to what a template prints
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    stops = settings.eos_token_id = stop_token_ids(tokenizer)
    settings.pad_token_id = tokenizer.pad_token_id
    ids = tokenizer(answer_marks(tokenizer)[1], add_special_tokens=False).input_ids
    ends = [i for i in ids if i in stops]
    # some stop at the tokenizer's EOS alone, which its template may print elsewhere
    elsewhere = "eos_token" in tokenizer.chat_template
    if ends and tokenizer.eos_token_id not in ends and not elsewhere:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer


def training_ids(run: Run, tokenizer: Any, count: int) -> list[list[int]]:
    """Returns the token ids of the first rows that were trained on, (rows, seq)."""
    config = run.config
    part = "train" if config.data.train else "problems"
    rows = read_rows(run.require(f"data/{part}.jsonl"))[:count]
    for row in [row for row in rows if "question" in row]:
        answer = {"role": "assistant", "content": row["answer"]}
        row["messages"] = [*ask(row["question"], config.system_prompt), answer]
    chats, limits = [r["messages"] for r in rows], (config.loss_on, config.max_length)
    masked = mask_conversations(tokenizer, chats, *limits, drop=True) if rows else None
    return list(masked.rows["input_ids"]) if masked else []


def quantize(source: str, folder: str, rows: list[list[int]]) -> None:
    """Writes a model in 4 bit, by AWQ if there are rows; another process runs this."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from torch import nn, tensor
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    dtype = "bfloat16" if rows else "auto"  # fp16 overflows in AWQ's search
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    widths = [layer.in_features for name, layer in layers.items() if name != "lm_head"]
    groups = (128, 64, 32) if rows else (32,)  # rounding alone needs small ones
    sizes = [size for size in groups if not any(width % size for width in widths)]
    if not sizes:
        raise SystemExit("4 bit needs layers that are a multiple of 32 wide")
    scheme = preset_name_to_scheme("W4A16_ASYM", ["Linear"])
    scheme.weights.group_size = sizes[0]
    recipe: Any = [
        QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"])
    ]
    data = DataLoader([{"input_ids": tensor(ids)} for ids in rows]) if rows else None
    recipe = [AWQModifier(), *recipe] if rows else recipe
    oneshot(model=model, recipe=recipe, dataset=data, output_dir=folder)
