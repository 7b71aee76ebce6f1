"""Our Unsloth calls, run for real under its CPU backend."""

import json

from helpers.data import preparation as data

SERIES = """
import unsloth
from helpers import export, runs, stages
from helpers.evaluation import evaluator

run = runs.open_run("test")
for stage in ("sft", "grpo"):
    print(stages.train_stage(run, stage))
evaluator.evaluate(run, "grpo", run.path / "grpo" / "adapter")
print(export.export(run, "grpo", prompts=2))
"""


def test_the_series_runs_with_unsloth_as_the_engine(run_factory, run_python):
    # the real model: Unsloth's loader wants a real architecture's complete folder
    run = run_factory(
        model="smollm2-135m-offline",
        engine="unsloth",
        max_length=128,
        sft__max_steps=2,
        sft__eval_steps=2,
        grpo__max_steps=1,
        grpo__max_completion_length=8,
        evaluation__max_new_tokens=8,
    )
    data.prepare(run)
    done = run_python("-c", SERIES)
    assert "we will set it" not in done.stdout  # but what the config says
    report = run.report()
    assert report["environment"]["engine"] == "unsloth"
    assert report["sft"]["steps"] == 2 and report["sft"]["loss_last"] > 0
    assert report["export"]["adapter"]["tokens_agree"] == 1.0


WEIGHTS = """
import unsloth
import json
from helpers.errors import ModelError
from helpers.models.load import load_model

def load(**options):
    return load_model("smollm2-135m-offline", engine="unsloth", **options)[0]

dtypes = {}
for bits in ("4bit", "16bit"):
    model = load(weights=bits, dtype="bfloat16")
    dtypes[bits] = str(model.model.layers[0].mlp.up_proj.weight.dtype)
for name, options in {
    "8bit": {"weights": "8bit"},
    "single": {"weights": "4bit", "double_quant": False},
}.items():
    try:
        load(**options)
    except ModelError as error:
        dtypes[name] = str(error)
print(json.dumps(dtypes))
"""


def test_unsloth_without_a_gpu_says_which_weights_it_does_not_load(run_python):
    done = run_python("-c", WEIGHTS)
    weights = json.loads(done.stdout.splitlines()[-1])
    assert (weights["4bit"], weights["16bit"]) == ("torch.uint8", "torch.float32")
    assert "unsloth cannot load weights='8bit'" in weights["8bit"]
    assert "weights='4bit' with double_quant=False" in weights["single"]


LORA = """
import unsloth
import sys
from pathlib import Path
from helpers import recipes
from helpers.models import adapters, load
from tests.tiny import save_family

for name in ("gemma3-4b", "qwen3-4b", "smollm3-3b"):
    config = recipes.load(name)
    folder = save_family(config.model, Path(sys.argv[1], name))
    options = load.options(config) | {"weights": "16bit", "engine": "unsloth"}
    model, _ = load.load_model(str(folder), **options)
    tuned = adapters.add_lora(model, config.lora, engine="unsloth")
    names = [n for n, p in tuned.named_parameters() if p.requires_grad]
    print(name, len(names), sum("vision" in n for n in names))
"""


def test_unsloth_trains_the_language_layers_of_todays_models(tmp_path, run_python):
    done = run_python("-c", LORA, str(tmp_path))
    for name in ("gemma3-4b", "qwen3-4b", "smollm3-3b"):
        assert f"{name} 28 0\n" in done.stdout  # A and B of 2 layers, 7 modules
