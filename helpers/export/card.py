"""Model cards of exported folders, and the upload of such folders to the hub."""

import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from httpx import HTTPError
from huggingface_hub import CardData, EvalResult, HfApi, ModelCard, ModelCardData

from helpers import runtime
from helpers.config import HELD_OUT, RunConfig, complete
from helpers.data.formats import ask
from helpers.data.sources import HUB_NAME
from helpers.errors import MissingInput, ModelError
from helpers.evaluation import tables
from helpers.files import new_folder, read_json, write_json, write_lines
from helpers.inference import chat
from helpers.install import ROOT
from helpers.models.load import OFFLINE, resolve_weights
from helpers.runs import Run

ADAPTER = "adapter_config.json"
OFFLINE_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # ours is a 4-bit file of it


def write_card(
    folder: Path, run: Run, name: str, report: dict[str, Any], parity: Any
) -> None:
    """Writes an exported folder's README.md, of what a run and its report hold."""
    libraries = {"adapter": "peft", "gguf": "gguf"}
    config, stage = run.config, report["export"][name]["stage"]
    stages = config.stages[: config.stages.index(stage) + 1]
    base, licence = origin_of(config.model, "model")
    licence_id, _, licence_name = licence.partition(": ")
    sources: list[Any] = [*config.data.train] if "sft" in stages else []
    sources += [config.data.problems] if "grpo" in stages else []
    origins = dict(origin_of(str(source), "dataset") for source in sources)
    results = held_out_results(config, report.get("eval", {}).get(stage, {}))
    values = ModelCardData(
        model_name=config.name if results else None,
        base_model=base if "/" in base else None,
        base_model_relation="adapter" if name == "adapter" else "finetune",
        license=licence_id,
        license_name=licence_name if licence_id == "other" else None,
        datasets=[name for name in origins if "/" in name] or None,
        library_name=libraries.get(name.partition(":")[0], "transformers"),
        pipeline_tag="text-generation",
        tags=["tunebook", "lora", *stages, name.replace(":", "-")],
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
    )
    template, saved = (folder / name for name in ("chat_template.jinja", ADAPTER))
    lora = read_json(saved)
    ranks = lora.get("r") or 0, *lora.get("rank_pattern", {}).values()
    ModelCard.from_template(
        values,
        str(Path(__file__).with_name("card.jinja")),
        format=name,
        config=config,
        report=report,
        stages=stages,
        base=base,
        messages=ask("What do 4 pens at 3 euros cost?", config.system_prompt),
        weights=resolve_weights(config.weights),
        settings={each: complete(config, each) for each in stages},
        results=[tables.results_table(report), tables.scores_table(report)],
        parity=parity.filter(items=[name], axis=0),
        licences={base: licence, **origins},
        template=template.read_text("utf-8") if template.exists() else "",
        modelfile=(folder / "Modelfile").exists(),
        rank=max(8, 1 << (max(ranks) - 1).bit_length()),  # one that vLLM knows
    ).save(folder / "README.md")


def origin_of(name: str, kind: str) -> tuple[str, str]:
    """Returns the name of a model or dataset, and its licence where that is known."""
    if name == OFFLINE:
        return OFFLINE_BASE, "apache-2.0"
    if name.startswith("data_samples/"):
        return f"{Path(name).name} of tunebook", "apache-2.0"
    if runtime.find_local(name):
        return Path(name).name, "unknown: a local file or folder"
    if match := HUB_NAME.fullmatch(name):
        name = match[1]
    if runtime.hub_reachable():
        with suppress(HTTPError):
            info: Any = HfApi().repo_info(name, repo_type=kind, timeout=10)
            card = info.card_data or {}
            if licence := card.get("license"):
                named = card.get("license_name")
                return name, f"{licence}: {named}" if named else str(licence)
    place = "datasets/" if kind == "dataset" else ""
    return name, f"unknown: look at https://huggingface.co/{place}{name}"


def held_out_results(config: RunConfig, part: dict[str, Any]) -> list[Any]:
    """Returns the `EvalResult`s of a model's part of the report's `eval`."""
    results = []
    for name in HELD_OUT:
        values = part.get("eval_text" if name == "eval" else name, {})
        rates = {k: v for k, v in values.items() if isinstance(v, dict) and "n" in v}
        numbers = {k: v.get("mean", v.get("k", 0) / v["n"]) for k, v in rates.items()}
        numbers = {k.replace("correct", "accuracy"): v for k, v in numbers.items()}
        if name == "eval" and "eval_loss" in part:
            numbers["loss"] = part["eval_loss"]
        source = str(getattr(config.data, name, None) or [*config.data.train, ""][0])
        places = "text-generation", source, f"{source} ({name})"
        results += [EvalResult(*places, k, round(v, 4)) for k, v in numbers.items()]
    return results


def write_space(folder: Path, config: RunConfig, model: Path) -> None:
    """Writes a Gradio Space that chats with a GGUF file on a free CPU."""
    licence, files = origin_of(config.model, "model")[1], ("chat", "gguf")
    texts = [(ROOT / f"requirements-{x}.txt").read_text("utf-8") for x in files]
    pins = re.findall(r"^(?:gradio|xllamacpp)==[\d.]+", "\n".join(texts), re.M)
    card: Any = {"title": config.name, "license": licence.partition(":")[0]}
    card |= {"sdk": "gradio", "sdk_version": pins[0].partition("==")[2]}
    card |= {"python_version": "3.12", "app_file": "app.py"}
    settings: Any = {"title": config.name, "system_prompt": config.system_prompt}
    settings |= {"sampling": config.inference, "model": model.name}
    with new_folder(folder) as new:
        shutil.copy(chat.__file__, new / "app.py")
        write_lines(new / "requirements.txt", [f"{pin}\n" for pin in pins])
        shutil.copy(model, new)
        write_json(new / "settings.json", settings)
        text = f"---\n{CardData(**card)}\n---\n\n# {config.name}\n"
        write_lines(new / "README.md", [text])


def push_to_hub(folder: Path, repo_id: str, *, token: str, private: bool = True) -> str:
    """Returns the address of an exported folder on the hub, after its upload.

    Args:
        folder: one of a run's `export/`.
        repo_id: OWNER/NAME; it is made where it does not exist.
        token: one that may write there; no message shows it.
        private: False makes a new repository public.

    Raises:
        MissingInput: the folder has no model card, or no row in the report.
        ModelError: the folder has faults, the repository is public against `private`,
            or the hub refuses.
    """
    rows = read_json(folder.parent.parent / "report.json").get("export", {})
    row = rows.get(folder.name.replace("-", ":", 1))
    if row is None or not (folder / "README.md").exists():
        raise MissingInput(f"{folder} has no model card or no report: export it first")
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    faults = [f"{f} is a link" for f in folder.rglob("*") if f.is_symlink()]
    if base and Path(base).is_dir():
        faults = ["nobody else has its base model, a local folder: push `merged`"]
    if faults := row["faults"] + faults:
        raise ModelError(f"{folder} is not uploaded: {faults[0]}")
    kind = "space" if folder.name == "space" else "model"
    sdk = "gradio" if kind == "space" else None
    api, place = HfApi(token=token), dict[str, Any](repo_id=repo_id, repo_type=kind)
    try:
        url = api.create_repo(**place, private=private, space_sdk=sdk, exist_ok=True)
        if private and not api.repo_info(**place).private:  # it existed
            raise ValueError("it is public: choose another, or public")
        api.upload_folder(**place, folder_path=folder)
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).replace(token, "***").split())[:300]
        raise ModelError(f"{repo_id} was not uploaded: {reason}") from None
    return str(url)
