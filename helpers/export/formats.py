"""A trained stage as files for other programs: adapter, merged, GGUF, 4-bit, Space."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any, get_args

from helpers import estimate, runtime
from helpers.config import Format, RunConfig, Stage
from helpers.data.formats import ask
from helpers.data.preparation import parts_of
from helpers.errors import ConfigError, ModelError, nearest
from helpers.export import card, gguf, parity
from helpers.files import content_hash, new_folder, read_rows
from helpers.masking.dataset import mask_conversations
from helpers.masking.templates import answer_marks, render, stop_token_ids
from helpers.models import hub, load
from helpers.runs import Run
from helpers.training.inputs import require_stage

log = logging.getLogger(__name__)
FORMATS: tuple[Format, ...] = get_args(Format)
FOUR_BIT = {"w4a16": 0, "awq": 128}  # and how many training rows calibrate it
SHARD = "2GB"  # is written at a time: from a GPU, whole files are copied to RAM first


def export(
    run: Run,
    stage: Stage | None = None,
    formats: list[Format] | None = None,
    prompts: int = 64,
) -> dict[str, Any]:
    """Returns the report part of a stage's exported files, after writing them.

    Args:
        run: with the stage trained.
        stage: the run's last one by default.
        formats: by default the config's, or else adapter and merged. Each replaces its
            folder in `export/`; what is there of others stays.
        prompts: the number of held-out prompts to compare with the trained model.

    Raises:
        ConfigError, MissingInput: the run has no such stage or has not trained it, or
            a format cannot be written here.
        ModelError: a file does not behave as the trained model. All of them, their
            cards and the report are written nevertheless.
    """
    config, folder = run.config, run.path / "export"
    stage = stage or config.stages[-1]
    require_stage(config, stage)
    adapter = run.require(f"{stage}/adapter")
    formats = check_formats(formats or config.export or ["adapter", "merged"])
    if "space" in formats and not kinds_of(formats):
        formats = [*formats, "gguf:q4_k_m"]
    gguf.require_space(folder, *needed_space(config, formats))
    names = [name for name in FORMATS if name in formats and name != "space"]
    paths = {name: folder / name.replace(":", "-") for name in names}
    folder.mkdir(exist_ok=True)
    write_files(run, adapter, paths)
    rows, faults = parity.check(run, stage, paths, prompts)
    origin = {"stage": stage, "adapter": content_hash(adapter)}
    for name, path in paths.items():
        own = [fault for fault in faults if fault.startswith(f"{name}:")]
        rows[name] |= {"path": str(path), **origin, "faults": own}
    report = run.report()
    report["export"] = report.get("export", {}) | rows
    for name, path in paths.items():
        card.write_card(path, run, name, report)
    sound = [paths[n] for n in paths if "gguf" in n and not rows[n]["faults"]]
    if "space" in formats and sound:
        model = min(sound, key=lambda path: (path / "model.gguf").stat().st_size)
        card.write_space(folder / "space", run, model / "model.gguf")
        ...
    run.write_part("export", report["export"])
    log.info("%s", parity.parity_table(report).to_string())
    if faults:
        raise ModelError("\n".join(faults))
    return report["export"]


def check_formats(formats: list[Format]) -> list[Format]:
    """Returns the formats; ConfigError for one that cannot be written here."""
    for name in formats:
        if name not in FORMATS:
            known = f"{nearest(name, FORMATS)} (known: {', '.join(FORMATS)})"
            raise ConfigError(f"no format {name!r}{known}")
    if "awq" in formats and runtime.find_machine().device != "cuda":
        raise ConfigError("awq is calibrated on a GPU, and there is none: use w4a16")
    if {*FOUR_BIT} & {*formats} and not importlib.util.find_spec("llmcompressor"):
        remedy = "python helpers/install.py requirements-export.txt"
        raise ConfigError(f"w4a16 and awq need llmcompressor: {remedy}")
    return formats


def kinds_of(formats: list[Format]) -> list[str]:
    return [name.removeprefix("gguf:") for name in formats if "gguf:" in name]


def needed_space(config: RunConfig, formats: list[Format]) -> tuple[float, float]:
    """Returns the disk space and the memory, in GB, that the formats take at most."""
    if {*formats} == {"adapter"}:
        return 0.0, 0.0
    on_gpu = runtime.find_machine().device == "cuda"
    size, bits = estimate.skeleton(config.model).num_parameters(), 16 if on_gpu else 32
    kinds, four = kinds_of(formats), [name for name in FOUR_BIT if name in formats]
    merged = size * bits / 8e9
    disk, memory = gguf.needed_space(size, kinds, bits) if kinds else (merged, 0.0)
    disk += merged * len(four) / 2
    if "space" in formats:
        disk += size * gguf.BITS[kinds[-1]] / 8e9
    if four or not on_gpu:  # the weights are in RAM
        memory = max(memory, merged)
    return disk, memory


def write_files(run: Run, adapter: Path, paths: dict[Format, Path]) -> None:
    config, folder = run.config, run.path / "export"
    if "adapter" in paths:
        write_adapter(config, adapter, paths["adapter"])
    if paths.keys() <= {"adapter"}:
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".merged-") as scratch:
        merged = paths.get("merged", Path(scratch, "merged"))
        tokenizer = merge(config, adapter, merged)
        runtime.free_memory()
        chat: Any = {"system": config.system_prompt, "sampling": config.inference}
        if kinds := kinds_of([*paths]):
            for file in gguf.write_gguf(merged, folder, kinds).values():
                gguf.write_modelfile(file.parent, tokenizer, **chat)
        for name in [name for name in FOUR_BIT if name in paths]:
            rows = training_ids(run, tokenizer, FOUR_BIT[name])
            with new_folder(paths[name]) as new:
                parity.run_alone(quantize, str(merged), str(new), rows)


def write_adapter(config: RunConfig, adapter: Path, folder: Path) -> None:
    """Copies an adapter to a folder with tokenizer and settings of generation."""
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(hub.find_model(config.model))
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
        model.save_pretrained(scratch, max_shard_size=SHARD)
        tokenizer.save_pretrained(scratch)
    return tokenizer


def plain_tokenizer(config: RunConfig, settings: Any) -> Any:
    """Returns the tokenizer as other programs need it, and completes the settings."""
    options = {"template": config.template, "pad_token": config.pad_token}
    tokenizer = load.load_tokenizer(config.model, **options)
    tokenizer.chat_template = gguf.fix_date(tokenizer.chat_template)
    turns = [{"role": "user", "content": "?"}]
    text, plain = (
        render(tokenizer, turns),
        tokenizer.apply_chat_template(turns, tokenize=False),
    )
    if text != plain:  # other programs add no BOS to what a template prints
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    write_stops(tokenizer, settings)
    return tokenizer


def write_stops(tokenizer: Any, settings: Any) -> None:
    """Writes the end of an answer into what is exported, for other programs."""
    stops = settings.eos_token_id = stop_token_ids(tokenizer)
    settings.pad_token_id = tokenizer.pad_token_id
    ids = tokenizer(answer_marks(tokenizer)[1], add_special_tokens=False).input_ids
    ends = [i for i in ids if i in stops]
    # some stop at the tokenizer's EOS alone, which its template may print elsewhere
    elsewhere = "eos_token" in tokenizer.chat_template
    if ends and tokenizer.eos_token_id not in ends and not elsewhere:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])


def training_ids(run: Run, tokenizer: Any, count: int) -> list[list[int]]:
    """Returns the token ids of the first rows that were trained on, (rows, seq)."""
    config = run.config
    if not count:
        return []
    part = "train" if "train" in parts_of(config.data) else "problems"
    rows = read_rows(run.require(f"data/{part}.jsonl"))[:count]
    if part == "problems":
        for row in rows:
            answer = {"role": "assistant", "content": row["answer"]}
            row["messages"] = [*ask(row["question"], config.system_prompt), answer]
    chats = [row["messages"] for row in rows]
    limits = (config.loss_on, config.max_length)
    return mask_conversations(tokenizer, chats, *limits, drop=True).rows["input_ids"]


def quantize(source: str, folder: str, rows: list[list[int]]) -> None:
    """Writes a model in 4 bit, by AWQ if there are rows; in a process of its own."""
    import torch
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    layers = [(n, m) for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    widths = [layer.in_features for name, layer in layers if name != "lm_head"]
    sizes = [n for n in (128, 64, 32) if not any(width % n for width in widths)]
    if not sizes:
        raise SystemExit("layers that are no multiple of 32 wide have no 4-bit groups")
    scheme = preset_name_to_scheme("W4A16_ASYM", ["Linear"])
    scheme.weights.group_size = sizes[0]
    groups = {"group_0": scheme}
    recipe = [QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    data = None
    if rows:
        recipe.insert(0, AWQModifier())
        data = torch.utils.data.DataLoader(
            [{"input_ids": torch.tensor(r)} for r in rows]
        )
    oneshot(model=model, processor=tokenizer, recipe=recipe, dataset=data)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
