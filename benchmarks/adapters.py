"""What comes back of an adapter: trained, saved, loaded again, merged.

A model is trained for a few steps with each LoRA setting. Its logits are compared with
those of the saved adapter on a fresh base ("reloaded"), of the merged model in plain
transformers ("merged"), and of the adapter as PEFT alone saves it ("foreign"), all by
this project's loader; and with those of the saved adapter in
`AutoModelForCausalLM.from_pretrained`, which is not ours ("transformers"). What could
not come back is refused before training, with the reason.

    python benchmarks/adapters.py --out results/adapters.json     # both engines, CPU
    python benchmarks/adapters.py --engine unsloth --weights 4bit \\
        --base smollm2-135m-offline --out FILE                    # on a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.markdown import to_markdown  # noqa: E402

ENGINES = ("transformers", "unsloth")
LIMIT = 1e-4  # of a difference between logits of float32
STEPS = 4
FIGURES = ("reloaded", "merged", "foreign", "transformers")
PLAIN: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}
TIED = {"ensure_weight_tying": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 8}},
    "alpha pattern": {"alpha_pattern": {"layers.1.self_attn.v_proj": 64}},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA by fast SVD": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "Gaussian": {"init_lora_weights": "gaussian"},
    "LoftQ": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "EVA": {"init_lora_weights": "eva"},
    "embedding and head saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved, tied": {"modules_to_save": ["embed_tokens"], **TIED},
    "embedding as target": {"target_modules": ["q_proj", "embed_tokens"]},
    "head as target": {"target_modules": ["q_proj", "lm_head"]},
    "token rows": {"trainable_token_indices": [5, 17, 300]},
    "one layer": {"layers_to_transform": [1]},
    "regular expression": {"target_modules": r".*\.(q_proj|up_proj)$"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear but one": {
        "target_modules": "all-linear",
        "exclude_modules": ["down_proj"],
    },
    "LoRA bias": {"lora_bias": True},
    "layers replicated": {"layer_replication": [[0, 2], [1, 2]]},
    "DoRA, rsLoRA, patterns": {
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"v_proj": 3},
    },
    "PiSSA, rsLoRA, patterns, head": {
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"v_proj": 32},
        "modules_to_save": ["lm_head"],
    },
}


def make_base(folder: Path) -> Path:
    """Writes a random two-layer Llama with tied embeddings; returns its folder."""
    from helpers.models.load import OFFLINE, load_tokenizer
    from tests.tiny import save_tiny_model

    return save_tiny_model(
        "Llama", load_tokenizer(OFFLINE), folder, max_position_embeddings=512
    )


def train(model: Any, half: Any = None) -> None:
    """Trains the model for a few steps on fixed tokens; autocasts to `half`."""
    import torch

    from helpers.training.trainer import keep_lora_fp32

    keep_lora_fp32(model)
    device = next((p.device for p in model.parameters() if p.is_cuda), model.device)
    ids = torch.arange(3, 131, device=device).reshape(4, 32)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-2)
    model.train()
    for _ in range(STEPS):
        with torch.autocast(device.type, half, enabled=half is not None):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(
    setting: str, engine: str, weights: str, base: str, folder: Path
) -> dict[str, Any]:
    """Returns one setting's row: the largest differences of logits, or a reason."""
    import torch
    from transformers import AutoModelForCausalLM

    from helpers import export, recipes
    from helpers.config import changed
    from helpers.errors import ModelError
    from helpers.models import adapters
    from helpers.models import load as models

    row: dict[str, Any] = {"setting": setting, "engine": engine, "weights": weights}
    row |= dict.fromkeys((*FIGURES, "refused"))
    probe = torch.arange(40, 104).reshape(2, 32)
    options = {"engine": engine, "weights": weights}
    config = changed(recipes.load("demo"), model=base, **options)

    def reload(adapter: Path) -> Any:
        return models.load_model(base, adapter=adapter, **options)[0]

    def plain(path: Path) -> Any:
        dtype = half or torch.float32
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return model.to("cuda" if gpu else "cpu").eval()

    def far(model: Any) -> float:
        found = (adapters.last_logits(model, probe) - trained).abs().max().item()
        return float(f"{found:.2g}")

    model, _ = models.load_model(base, **options)
    try:
        model = adapters.add_lora(model, PLAIN | SETTINGS[setting], engine=engine)
    except ModelError as error:
        return row | {"refused": str(error)}
    gpu = torch.cuda.is_available()
    half = model.config.dtype if gpu else None
    trained = adapters.last_logits(model, probe)
    train(model, half)
    row["moved"], trained = far(model), adapters.last_logits(model, probe)
    row["logits"] = float(f"{trained.abs().max().item():.3g}")
    adapters.save_adapter(model, folder / "ours")
    model.save_pretrained(folder / "foreign")
    row["reloaded"] = far(reload(folder / "ours"))
    row["foreign"] = far(reload(folder / "foreign"))
    export.merge(config, folder / "ours", folder / "merged")
    row["merged"] = far(plain(folder / "merged"))
    if weights == "16bit":  # else on other weights than it was trained on
        row["transformers"] = far(plain(folder / "ours"))
    return row


def measure_all(
    engine: str, settings: list[str], weights: str = "16bit", base: str | None = None
) -> list[dict[str, Any]]:
    """Returns the rows of an engine; run it in a process of its own."""
    from helpers import runtime

    runtime.start(engine)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        name = base or str(make_base(folder / "base"))
        for number, setting in enumerate(settings):
            rows.append(measure(setting, engine, weights, name, folder / str(number)))
    return rows


def is_wrong(row: dict[str, Any]) -> bool:
    """Returns whether our own figures of a row are beyond what arithmetic explains."""
    from helpers.models.adapters import TOLERANCE

    if row["refused"]:
        return False
    limit = LIMIT if row["weights"] == "16bit" else TOLERANCE["cuda"] * row["logits"]
    return not max(row[name] for name in FIGURES[:3]) <= limit


def table() -> list[str]:
    """Returns the committed rows as lines of Markdown."""
    rows = json.loads((ROOT / "results" / "adapters.json").read_text())["rows"]
    lines = ["Largest difference of logits from the trained model's, by"]
    lines[0] += " `python benchmarks/adapters.py`; `refused`: before training."
    cells = []
    for row in rows:
        figures = ["-" if row[name] is None else f"{row[name]:g}" for name in FIGURES]
        figures = ["refused"] * len(FIGURES) if row["refused"] else figures
        place = {name: row[name] for name in ("setting", "engine", "weights")}
        cells.append(place | dict(zip(FIGURES, figures, strict=True)))
    return [*lines, "", to_markdown(cells)]


def main() -> None:
    """Measures, prints a table, and writes the rows.

    Raises:
        SystemExit: something came back otherwise than it was trained.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=ENGINES, help="both by default")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), metavar="NAME")
    parser.add_argument("--weights", choices=["16bit", "4bit"], default="16bit")
    parser.add_argument("--base", help="a model; a tiny random one by default")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    settings = given.settings or list(SETTINGS)
    if given.engine:
        rows = measure_all(given.engine, settings, given.weights, given.base)
    else:
        rows = []
        with tempfile.TemporaryDirectory() as scratch:
            for engine in ENGINES:
                out = Path(scratch) / f"{engine}.json"
                command = [sys.executable, __file__, "--engine", engine, "--out", out]
                more = {"UNSLOTH_COMPILE_LOCATION": str(Path(scratch) / "compiled")}
                subprocess.run(
                    [*map(str, command), "--settings", *settings],
                    check=True,
                    env={**os.environ, **more},
                    stdout=subprocess.DEVNULL,
                )
                rows += json.loads(out.read_text())["rows"]
    for row in rows:
        figures = [row[name] for name in FIGURES]
        print(f"{row['engine']:12} {row['setting']:30}", row["refused"] or figures)
    if given.out:
        given.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if wrong := sum(map(is_wrong, rows)):
        sys.exit(f"{wrong} of {len(rows)} came back otherwise than trained")


if __name__ == "__main__":
    main()
