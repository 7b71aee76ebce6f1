"""Model cards say what the report says, and uploads send one folder alone."""

import base64
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from typing import Any

import pytest
from huggingface_hub import ModelCard

from helpers import export, recipes, runs, stages
from helpers.config import changed
from helpers.errors import MissingInput, ModelError
from helpers.evaluation import evaluator
from helpers.export import card
from helpers.export.parity import parity_table
from helpers.runs import Run

CHANGES = {
    "name": "Carded",
    "stages": ["sft"],
    "max_length": 256,
    "sft__max_steps": 2,
    "sft__eval_steps": 2,
    "evaluation__max_new_tokens": 4,
    "data__general": None,
    **{f"data__{name}_rows": 4 for name in ("train", "eval", "test", "test_new")},
}


@pytest.fixture(scope="module")
def exported(tiny_model_folder, tmp_path_factory):
    """A run of the tiny model: trained, evaluated, exported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEBOOK_RUNS", str(tmp_path_factory.mktemp("runs")))
        changes = CHANGES | {"model": str(tiny_model_folder)}
        run = runs.save_run(changed(recipes.load("smoke"), **changes))
        stages.train_stage(run, "sft")
        evaluator.evaluate(run, "sft", run.path / "sft" / "adapter")
        export.export(run, prompts=2)
        yield run


@pytest.fixture
def copy(exported, tmp_path):
    return Run(shutil.copytree(exported.path, tmp_path / "copy"), exported.config)


def test_a_card_says_what_the_report_says(exported):
    report, config = exported.report(), exported.config
    for name, library in (("adapter", "peft"), ("merged", "transformers")):
        file = exported.path / "export" / name / "README.md"
        text, values = file.read_text("utf-8"), ModelCard.load(file).data
        results = {
            (r.dataset_type, r.metric_type): r.metric_value for r in values.eval_results
        }
        test, rate = config.data.test, report["eval"]["sft"]["test"]["correct"]
        assert results[str(test), "accuracy"] == rate["k"] / rate["n"]
        assert (
            results[str(config.data.eval), "loss"] == report["eval"]["sft"]["eval_loss"]
        )
        known = values.to_dict()
        assert known["library_name"] == library
        assert known["pipeline_tag"] == "text-generation"
        assert known["license"] == "unknown"  # of a local folder
        assert "base_model" not in known
        for part, fingerprint in report["data"]["fingerprints"].items():
            assert f"| {part} | {report['data'][part]} | {fingerprint} |" in text
        for line in ("sft learning_rate | 0.001", "LoRA r | 16", "sft steps | 2", name):
            assert f"| {line} |" in text
        assert "0/4 = 0.0 % [0.0, 49.0]" in text and "<|im_start|>" in text
        assert "- sharegpt.jsonl of tunebook: apache-2.0" in text
        assert "unknown: a local file" in text
        assert ("vllm serve ." in text) == (name == "merged")
        assert str(exported.path.parent) not in text and config.model not in text


def test_what_was_not_measured_is_left_out(copy):
    report, folder = copy.report(), copy.path / "export" / "merged"
    del report["eval"]
    card.write_card(folder, copy, "merged", report, parity_table(report))
    text = (folder / "README.md").read_text("utf-8")
    assert "Held-out" not in text and "model-index" not in text
    assert " % [" not in text


def test_a_card_names_a_rank_that_serves_the_saved_adapter_and_a_licence_by_its_id(
    copy, monkeypatch
):
    report, folder = copy.report(), copy.path / "export" / "adapter"
    values = {"r": 12, "rank_pattern": {"q_proj": 40}}  # PiSSA's is twice the config's
    (folder / "adapter_config.json").write_text(json.dumps(values))
    monkeypatch.setattr(
        card, "origin_of", lambda *_: ("o/base", "other: qwen-research")
    )
    card.write_card(folder, copy, "adapter", report, parity_table(report))
    text = (folder / "README.md").read_text("utf-8")
    assert "--max-lora-rank 64 " in text
    known = ModelCard.load(folder / "README.md").data
    assert (known.license, known.license_name) == ("other", "qwen-research")


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_the_python_of_a_card_runs_in_its_folder(exported, name):
    folder = exported.path / "export" / name
    text = (folder / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    command = [sys.executable, "-c", code[1].replace("128", "4")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]


def test_a_gguf_is_served_by_ollama_and_llama_cpp(copy):
    report, folder = copy.report(), copy.path / "export" / "gguf-q8_0"
    report["export"]["gguf:q8_0"] = report["export"]["merged"]
    folder.mkdir()
    for has_modelfile in (False, True):
        card.write_card(folder, copy, "gguf:q8_0", report, parity_table(report))
        text = (folder / "README.md").read_text("utf-8")
        assert ("ollama create carded -f Modelfile" in text) is has_modelfile
        assert "\nllama-server -m model.gguf --jinja\n" in text
        (folder / "Modelfile").touch()
    assert "```python" not in text and "vllm" not in text


def test_licences_are_the_hubs_or_unknown_with_a_link(monkeypatch):
    assert card.origin_of("smollm2-135m-offline", "model")[1] == "apache-2.0"
    name, licence = card.origin_of("openai/gsm8k/main:train", "dataset")
    assert name == "openai/gsm8k"
    assert licence == "unknown: look at https://huggingface.co/datasets/openai/gsm8k"


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's API, as far as uploads ask for it; `server.calls` has what came."""

    def answer(self):
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.calls.append((self.path, self.headers.get("Authorization"), body))
        url, values = f"http://127.0.0.1:{server.server_port}", dict[str, Any]()
        values |= {
            "url": f"{url}/o/n",
            "commitUrl": f"{url}/o/n/commit/1",
            "commitOid": "1",
        }
        values |= {"id": "o/n", "private": "public" not in self.path}
        values["cardData"] = {"license": "other", "license_name": "llama3.2"}
        if "/preupload/" in self.path:
            values["files"] = json.loads(body)["files"]
            for file in values["files"]:
                mode = "lfs" if ".safetensors" in file["path"] else "regular"
                file |= {"uploadMode": mode, "shouldIgnore": False}
        if self.path.endswith("/objects/batch"):
            values["objects"] = json.loads(body)["objects"]
            for each in values["objects"]:
                each["actions"] = {"upload": {"href": f"{url}/lfs/{each['oid']}"}}
        text = json.dumps(values).encode()
        self.send_response(403 if "/o/denied" in self.path else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *_):
        pass


PUSHES = """
import sys
from pathlib import Path
from helpers.errors import ModelError
from helpers.export import card
from helpers.export.parity import parity_table

print(card.origin_of("o/base", "model"))
for name in ("o/n", "o/public", "o/denied"):
    try:
        print(card.push_to_hub(Path(sys.argv[1]), name, token="hf_secret"))
    except ModelError as error:
        print(error)
"""


def test_an_upload_is_private_and_sends_the_folder_and_the_token_alone(
    exported, tmp_path, run_python
):
    folder = exported.path / "export" / "merged"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        calls = server.calls = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        variables = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        variables |= {"no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
        done = run_python("-c", PUSHES, str(folder), **variables)
        server.shutdown()
    licence, address, public, denied = done.stdout.splitlines()
    assert licence == "('o/base', 'other: llama3.2')" and address == f"{url}/o/n"
    assert "o/public was not uploaded: it is public" in public and "403" in denied
    assert "hf_secret" not in done.stdout + done.stderr
    created = next(json.loads(body) for path, _, body in calls if "create" in path)
    assert created["visibility"] == "private"
    own = [(path, token) for path, token, _ in calls if "/models/o/n" in path]
    assert {token for _, token in own} == {"Bearer hf_secret"}
    commits = [body for path, _, body in calls if "/o/n/commit/" in path]
    lines = [json.loads(line) for line in commits.pop().splitlines()]
    stored = {path[5:]: body for path, _, body in calls if path.startswith("/lfs/")}
    sent = {}
    for value in [line["value"] for line in lines if "ile" in line["key"]]:
        oid = value.get("oid")
        sent[value["path"]] = stored[oid] if oid else base64.b64decode(value["content"])
    assert sent == {f.name: f.read_bytes() for f in folder.iterdir()} and not commits


def test_what_is_not_sound_or_of_no_use_to_others_is_not_uploaded(copy):
    report, folder = copy.report(), copy.path / "export" / "merged"
    with pytest.raises(ModelError, match="local folder: push `merged`"):
        export.push_to_hub(folder.with_name("adapter"), "o/n", token="t")
    (folder / "link").symlink_to(copy.path / "config.json")
    with pytest.raises(ModelError, match="link is a link"):
        export.push_to_hub(folder, "o/n", token="t")
    report["export"]["merged"]["faults"] = ["merged: another template"]
    copy.write_part("export", report["export"])
    with pytest.raises(ModelError, match="not uploaded: merged: another template"):
        export.push_to_hub(folder, "o/n", token="t")
    (folder / "README.md").unlink()
    with pytest.raises(MissingInput, match="no model card or no report"):
        export.push_to_hub(folder, "o/n", token="t")
