"""A trained stage as files for other programs: adapter, merged, GGUF, 4-bit, Space."""

import logging
import os
import shutil
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from helpers import estimate, runtime
from helpers.config import Format, RunConfig, Stage, changed
from helpers.data.reading import to_conversations
from helpers.errors import ConfigError, ModelError
from helpers.export import card, gguf, parity
from helpers.files import content_hash, new_folder, read_rows
from helpers.masking import templates
from helpers.masking.dataset import mask_conversations
from helpers.masking.templates import answer_marks, render, stop_token_ids
from helpers.models import adapters, load
from helpers.runs import Run, writes
from helpers.training.inputs import require_stage

log = logging.getLogger(__name__)
FOUR_BIT = {"w4a16", "awq"}


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
        formats: by default the config's, else adapter and merged; others that are in
            `export/` stay.
        prompts: the number of prompts to compare with the trained model.
        push, public: OWNER/NAME for the upload of one format, by the token in
            `HF_TOKEN`, and whether a new repository is public.

    Raises:
        ConfigError, MissingInput: no such stage or format, or not to be had here.
        ModelError: too little space, or a file does not behave as what was trained:
            it stays, and the report says so.
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
    if names != ["adapter"]:
        require_space(run.path, estimate.skeleton(config.model).num_parameters(), names)
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
        report["export"]["space"] = rows[sound[-1]] | {"path": str(folder / "space")}
    run.write_part("export", report["export"])
    log.info(table.to_string())
    if faults:
        raise ModelError("\n".join(faults))
    if push and token:
        path = Path(report["export"][formats[0]]["path"])
        log.info(card.push_to_hub(path, push, token=token, private=not public))
    return report["export"]


def require_formats(config: RunConfig) -> None:
    """Raises ConfigError for formats of a config that this machine cannot write."""
    if "awq" in config.export and runtime.find_machine().device != "cuda":
        raise ConfigError("awq is calibrated on a GPU, and there is none: use w4a16")
    if FOUR_BIT & {*config.export} and not find_spec("llmcompressor"):
        remedy = "python helpers/install.py requirements-export.txt"
        raise ConfigError(f"w4a16 and awq need llmcompressor: {remedy}")


def kinds_of(names: list[Format]) -> list[str]:
    return [name.removeprefix("gguf:") for name in names if "gguf:" in name]


def require_space(folder: Path, parameters: int, names: list[Format]) -> None:
    """Raises ModelError if exported files need more disk or memory than is free."""
    import psutil

    on_gpu = runtime.find_machine().device == "cuda"
    merged, largest = parameters * (2 if on_gpu else 4) / 1e9, 4e8 + parameters / 12
    kinds, four_bit = {*kinds_of(names)}, FOUR_BIT & {*names}
    bits = sum(gguf.BITS[kind] for kind in kinds | ({"f16"} if kinds else set()))
    files = parameters * (bits + 16 * len(four_bit)) / 8e9  # embeddings stay in 16 bit
    memory = 0.6 + min(parameters, largest) * 6 / 1e9  # GGUF takes tensor after tensor
    if four_bit or not on_gpu:  # all weights are in memory
        memory = max(memory, merged)
    for name, need, free in (
        ("disk", merged + files, shutil.disk_usage(folder).free),
        ("memory", memory, psutil.virtual_memory().available),
    ):
        if need > free / 1e9:
            text = f"{need:.1f} GB of {name} needed for {folder}, {free / 1e9:.1f} free"
            raise ModelError(f"{text}: make room, or take a larger machine")


def write_files(run: Run, adapter: Path, paths: dict[Any, Path]) -> None:
    from transformers import GenerationConfig

    config, folder = run.config, run.path / "export"
    folder.mkdir(exist_ok=True)
    if "adapter" in paths:
        settings = GenerationConfig()
        with suppress(OSError):  # some models come without
            settings = GenerationConfig.from_pretrained(load.find_model(config.model))
        with new_folder(paths["adapter"]) as new:
            for file in adapter.glob("adapter_*"):
                shutil.copy2(file, new)
            plain_tokenizer(config, settings).save_pretrained(new)
            settings.save_pretrained(new)
    if [*paths] == ["adapter"]:
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".merged-") as scratch:
        merged = paths.get("merged", Path(scratch, "merged"))
        tokenizer = merge(config, adapter, merged)
        runtime.free_memory()
        ours = config.system_prompt, config.inference
        if kinds := kinds_of([*paths]):
            for new in gguf.write_gguf(merged, folder, kinds):
                try:
                    gguf.write_modelfile(new, tokenizer, *ours)
                except ValueError as error:
                    log.warning(f"{new} has no Modelfile for Ollama: {error}")
        for name in FOUR_BIT & {*paths}:
            blocks = training_ids(run, tokenizer, 64)
            with new_folder(paths[name]) as new:
                form = str(merged), str(new), name == "awq"
                runtime.run_alone(write_4bit, *form, blocks)


def merge(config: RunConfig, adapter: Path | str, folder: Path) -> Any:
    """Returns the tokenizer of base and adapter, written as one model in 16 bit.

    On a CPU it is in fp32.
    """
    from transformers.utils import cached_file

    options = {**load.options(config), "engine": "transformers"}
    base, _ = load.load_model(config.model, **options)
    if load.resolve_weights(config.weights) != "16bit":  # what it was trained on
        base = base.dequantize(dtype=base.dtype)
    model = adapters.merge(load.load_adapter(base, adapter, engine="transformers"))
    tokenizer = plain_tokenizer(config, model.generation_config)
    model.config.eos_token_id = tokenizer.eos_token_id
    with new_folder(folder) as scratch:
        # a file's weights are copied from a GPU to RAM before they are written
        model.save_pretrained(scratch, max_shard_size="2GB")
        tokenizer.save_pretrained(scratch)
        with suppress(OSError):  # most come without; llama.cpp needs that of Gemma 2
            file = cached_file(load.find_model(config.model), "tokenizer.model")
            shutil.copy(str(file), scratch)
    return tokenizer


def plain_tokenizer(config: RunConfig, settings: Any) -> Any:
    """Returns a tokenizer that works without this project; writes stops to settings."""
    options = config.model_dump(include=load.TOKENIZER)
    tokenizer = load.load_tokenizer(config.model, **options)
    tokenizer.chat_template = templates.fix_date(tokenizer.chat_template)
    turns = [{"role": "user", "content": "?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    if text != render(tokenizer, turns):  # others add no BOS to what a template prints
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    stops = settings.eos_token_id = stop_token_ids(tokenizer)
    settings.pad_token_id = tokenizer.pad_token_id
    try:
        settings.validate(strict=True)
    except ValueError:  # a temperature without sampling cannot be saved
        settings.do_sample = True
    ids = tokenizer(answer_marks(tokenizer)[1], add_special_tokens=False).input_ids
    ends = [i for i in ids if i in stops]
    # some stop at the tokenizer's EOS alone, which its template may print elsewhere
    elsewhere = "eos_token" in tokenizer.chat_template
    if ends and tokenizer.eos_token_id not in ends and not elsewhere:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer


def training_ids(run: Run, tokenizer: Any, count: int) -> list[list[int]]:
    """Returns the token ids of the first rows that were trained on, in blocks."""
    config = run.config
    part = "train" if config.data.train else "problems"
    rows = read_rows(run.require(f"data/{part}.jsonl"))[:count]
    chats, size = to_conversations(rows, config.system_prompt)[0], config.max_length
    masked = mask_conversations(tokenizer, chats, config.loss_on, size, drop=True)
    ids = [*chain.from_iterable(masked.rows["input_ids"])]
    # each pass costs the same, whatever its length
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def write_4bit(source: str, folder: str, awq: bool, ids: list[list[int]]) -> None:
    """Writes a model in 4 bit by GPTQ, after AWQ's scaling if asked.

    Rounding to nearest alone costs small models their answers. Another process runs it.
    """
    import math

    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from torch import nn, tensor
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    dtype = "bfloat16" if awq else "auto"  # fp16 overflows in AWQ's search
    options: Any = {"dtype": dtype, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    widths = [layer.in_features for name, layer in layers if name != "lm_head"]
    if (size := math.gcd(128, *widths)) < 32:
        raise SystemExit("4 bit needs layers that are a multiple of 32 wide")
    scheme = preset_name_to_scheme("W4A16_ASYM", ["Linear"])
    scheme.weights.group_size = size
    rounding = GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])
    recipe: Any = [AWQModifier(), rounding] if awq else rounding
    data = DataLoader([{"input_ids": tensor(block)} for block in ids])
    oneshot(model=model, recipe=recipe, dataset=data, output_dir=folder)
