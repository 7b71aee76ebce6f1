"""A stage's folder: its training arguments, what it was made from, its panel."""

import base64
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import TrainerCallback

from helpers import files, runtime
from helpers.config import RunConfig, Stage, defaults
from helpers.errors import ConfigError
from helpers.files import content_hash, fingerprint, read_json, set_aside, write_json
from helpers.masking.templates import template_text
from helpers.runs import Run

log = logging.getLogger(__name__)
NOTE = "made_from.json"  # the inputs, and whether the stage was trained to its end
# decide no result; what is logged may decide which adapter is the best
REPORTING = ("report_to", "save_steps", "save_strategy", "save_total_limit", "run_name")
# what a config leaves open is TRL's own default: Unsloth has others
TRL_OPEN = """per_device_train_batch_size gradient_accumulation_steps packing optim
    learning_rate lr_scheduler_type warmup_steps weight_decay max_steps beta loss_type
    num_train_epochs mask_truncated_completions gradient_checkpointing""".split()
SIZES = """per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps""".split()
PANELS = {  # titles, and regular expressions of what is logged
    "loss": "^(eval_)?loss$",
    "reward by component (band: spread)": "^rewards/.*/mean$|^eval_reward$",
    "share of groups": "^frac_reward_zero_std$|^groups/",
    "completion length, tokens": "^completions/(mean|max)_length$",
    "share of answers cut off": "^completions/clipped_ratio$",
    "nats a token": "^(entropy|kl)$",
    "learning rate": "^learning_rate$",
    "optimiser": "^(grad_norm|skipped_steps)$",
}


def require_stage(config: RunConfig, stage: Stage) -> None:
    if stage not in config.stages:
        raise ConfigError(f"run {config.name!r} has no {stage} stage: {config.stages}")


def inputs_of(run: Run, stage: Stage) -> dict[str, Any]:
    """Returns all that decides a stage's result, data and adapters by their content."""
    config = run.config
    require_stage(config, stage)
    names = {"engine", "weights", "double_quant", "dtype", "pad_token", "seed"}
    own = {"max_length", "loss_on", "best_by"}
    if config.layout == "compiled":  # packs the rows
        own.add("layout")
    if stage == "grpo":
        own = {"grpo_minutes", "grpo_held_out", "sampler", "rewards"}
        own |= {"max_prompt_length", "system_prompt"}
    inputs = config.model_dump(include=names | own | {"special_tokens", "thinking"})
    inputs["model"] = content_hash(config.model)
    inputs["template"] = fingerprint(template_text(config.template))
    rows = run.report().get("data", {}).get("fingerprints", {})
    parts = ("train" if stage == "sft" else "problems", "eval")
    inputs |= {f"data.{name}": rows[name] for name in parts if name in rows}
    values = getattr(config, stage).items()
    inputs |= {f"{stage}.{name}": v for name, v in values if name not in REPORTING}
    if stage == "grpo" and config.sft_adapter:
        return inputs | {"sft_adapter": content_hash(config.sft_adapter)}
    if stage == "grpo" and "sft" in config.stages:
        return inputs | {"sft": fingerprint(inputs_of(run, "sft"))}
    return inputs | {f"lora.{name}": value for name, value in config.lora.items()}


def copies_name(run: Run, stage: Stage) -> str:
    return f"{run.config.name}/{stage}-{fingerprint(inputs_of(run, stage))}"


def open_stage(run: Run, stage: Stage) -> Path:
    """Returns a stage's folder, after renaming one that was made from other inputs."""
    folder, inputs = run.path / stage, inputs_of(run, stage)
    note = read_json(folder / NOTE)
    if note and note["fingerprint"] != fingerprint(inputs):
        old, new = note["inputs"], json.loads(json.dumps(inputs))  # as it was written
        names = sorted(k for k in old | new if old.get(k) != new.get(k))
        aside = set_aside(folder, "before")
        log.info(f"{stage}: {', '.join(names)} changed; former result: {aside}")
    if (place := os.environ.get("TUNEBOOK_KEEP")) and not folder.exists():
        name = copies_name(run, stage)
        if files.fetch_copy(place, name, folder):
            log.info(f"{stage}: brought back from {place}/{name}")
    if not (folder / NOTE).exists():
        note = {"fingerprint": fingerprint(inputs), "finished": False, "inputs": inputs}
        write_json(folder / NOTE, note)
    return folder


def finished_part(run: Run, stage: Stage) -> dict[str, Any] | None:
    """Returns the report of a stage that was trained to its end and has its adapter."""
    folder, part = open_stage(run, stage), run.report().get(stage)
    has_all = (folder / "adapter").exists() and read_json(folder / NOTE)["finished"]
    if not (part and has_all):
        return None
    log.info(f"{stage} is finished; to train again, move {folder} away")
    return part


def share_rows(values: dict[str, Any], count: int) -> dict[str, Any]:
    """Returns the sizes with which processes share the rows of an optimiser step."""
    micro, evaluation, passes = (values[name] for name in SIZES)
    rows, rest = divmod(micro * passes, count)
    if rest:
        text = f"{micro} x {passes} rows a step are not to be shared by {count} GPUs"
        raise ConfigError(f"{text}: make {SIZES[0]} x {SIZES[2]} a multiple of {count}")
    size = math.gcd(micro, rows)
    # together they score the rows of one batch: a loss is a mean over its tokens
    sizes = size, max(1, evaluation // count), rows // size
    shared = dict(zip(SIZES, sizes, strict=True))
    if batches := values.get("steps_per_generation"):
        shared |= {"generation_batch_size": batches * micro}
        shared["steps_per_generation"] = None
    return shared


def training_arguments(run: Run, stage: Stage, folder: Path) -> dict[str, Any]:
    config, default, machine = run.config, defaults(stage), runtime.find_machine()
    dtype, _ = runtime.choose_dtype(machine, config.dtype)
    on_gpu, count = machine.device == "cuda", runtime.count_processes()
    values = {n: default[n] for n in TRL_OPEN if default.get(n) is not None}
    values = {"report_to": "none", **values, **getattr(config, stage)}
    values.setdefault(SIZES[1], values[SIZES[0]])
    if runtime.is_sharded() and values["optim"] != "adamw_torch":
        log.info(f"adamw_torch, not {values['optim']}, which takes no shared weights")
        values["optim"] = "adamw_torch"
    if "wandb" in values["report_to"] or "all" in values["report_to"]:
        import wandb

        if "WANDB_MODE" not in os.environ and wandb.api.api_key is None:  # it would ask
            wandb.setup(settings=wandb.Settings(mode="offline"))
            log.info("wandb: nobody is logged in; `wandb sync` uploads the run later")
    return {
        "output_dir": str(folder / "checkpoints"),
        "run_name": f"{config.name}-{stage}",
        "project": "tunebook",
        "disable_tqdm": True,  # `Panel` shows the losses and the time left
        "seed": config.seed,
        "save_total_limit": 2,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would log a loss of 0.0 for NaN
        "fp16": on_gpu and str(dtype) == "torch.float16",
        "bf16": on_gpu and str(dtype) == "torch.bfloat16",
        "use_cpu": not on_gpu,
        "data_seed": config.seed,  # the same order of rows in all processes
        "ddp_find_unused_parameters": False,
        **values,
        **(share_rows(values, count) if count > 1 else {}),
        "gradient_checkpointing": on_gpu and values["gradient_checkpointing"],
    }


def draw_diagnostics(history: list[dict[str, Any]], path: Path | None = None) -> Figure:
    """Returns the curves of what a trainer logged, and saves them where told."""
    logged = pd.DataFrame(history).groupby("step").first().select_dtypes("number")
    # steps and evaluations are logged in entries of their own
    logged = logged.dropna(axis=1, how="all").interpolate(limit_area="inside")
    if "reward" in logged:  # GRPO's loss is zero by construction
        logged = logged.drop(columns="loss", errors="ignore")
    tables = {title: logged.filter(regex=names) for title, names in PANELS.items()}
    tables = {title: table for title, table in tables.items() if table.size}
    columns = -(-len(tables) // 2)
    figure = Figure(figsize=(3.8 * columns, 6.4), layout="constrained")
    for number, (title, table) in enumerate(tables.items(), start=1):
        axes = figure.add_subplot(2, columns, number)
        table.plot(ax=axes, title=title, xlabel="optimiser step", grid=True, marker=".")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), fontsize="small")
        for name in table.filter(regex="^rewards/"):
            mean, spread = table[name], logged.get(name.replace("/mean", "/std"), 0)
            axes.fill_between(table.index, mean - spread, mean + spread, alpha=0.12)
    if path is not None:
        figure.savefig(path, dpi=80)
    return figure


class Panel(TrainerCallback):
    """Shows a stage's step, its time left, what its logs mean, and their curves.

    In a notebook it is shown in its place from the first logged step on, else told:
    words every 10 seconds, curves as often as takes half a percent of the time.

    Args:
        folder: of the stage, for `curves.png`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.due, self.curves_due = folder, 0.0, 0.0

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and time.monotonic() >= self.due:
            self.show(state)

    def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            self.show(state, last=True)

    def report(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        return {}

    def title(self, state: Any) -> str:
        step, text = state.global_step, f"step {state.global_step} of {state.max_steps}"
        used_s = max((e.get("seconds", 0.0) for e in state.log_history), default=0.0)
        left_s = used_s * (state.max_steps - step) / max(1, step)
        return f"{text}, {tqdm.format_interval(left_s)} left" if step else text

    def explain(self, history: list[dict[str, Any]]) -> list[str]:
        """Returns what the logs mean, most urgent first."""
        losses = [entry["loss"] for entry in history if "loss" in entry]
        held = [(e["eval_loss"], e["step"]) for e in history if "eval_loss" in e]
        lines = [f"Loss {losses[0]:.3f} -> {losses[-1]:.3f}."] if losses else []
        if len(held) > 1:
            (start, _), (last, _), (best, at) = held[0], held[-1], min(held)
            text = f"Held-out loss {start:.3f} at first, {best:.3f} at best, step {at}"
            rise = f"; it rises to {last:.3f}: fewer epochs, or more rows"
            lines.append(text + (rise if last > best else "") + ".")
        return lines

    def page(self) -> str:
        """Returns what else a notebook shows, as HTML."""
        return ""

    def show(self, state: Any, last: bool = False) -> None:
        is_notebook, now = runtime.in_notebook(), time.monotonic()
        path, shown, self.due = self.folder / "curves.png", self.due > 0, now + 10
        lines = [self.title(state), *self.explain(state.log_history)]
        if not is_notebook:
            log.info("\n".join(lines) if last else ": ".join(lines[:2]))
        if last or (is_notebook and now >= self.curves_due):
            draw_diagnostics(state.log_history, path)
            self.curves_due = now + 200 * (time.monotonic() - now)
        if is_notebook:
            picture = base64.b64encode(path.read_bytes()).decode()
            page = "".join(f"<li>{line}</li>" for line in lines)
            page += f'<img src="data:image/png;base64,{picture}">{self.page()}'
            display(HTML(page), display_id=str(id(self)), update=shown)
