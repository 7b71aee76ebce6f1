"""Model cards say what the report says, and uploads send one folder alone."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from helpers import export, recipes, runs, stages
from helpers.config import changed
from helpers.evaluation import evaluator
from helpers.export import card
from helpers.runs import Run

CHANGES = {
    "name": "Carded",
    "stages": ["sft"],
    "max_length": 256,
    "sft__max_steps": 2,
    "sft__eval_steps": 2,
    "evaluation__max_new_tokens": 4,
    **{f"data__{name}_rows": 4 for name in ("train", "eval", "test", "test_new")},
}


@pytest.fixture(scope="module")
def exported(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
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
def copy(exported: Run, tmp_path: Path) -> Run:
    return Run(shutil.copytree(exported.path, tmp_path / "copy"), exported.config)


def test_the_front_matter_has_the_numbers_of_the_report(exported: Run) -> None:
    values = ModelCard.load(exported.path / "export" / "merged" / "README.md").data
    rate = exported.report()["eval"]["sft"]["accuracy"]
    results = {
        (r.dataset_type, r.metric_type): r.metric_value for r in values.eval_results
    }
    test = "data_samples/word_problems/test.jsonl"
    assert results[test, "accuracy"] == rate["k"] / rate["n"]
    assert results["data_samples/word_problems/eval.jsonl", "loss"] > 1
    assert (values.library_name, values.pipeline_tag) == (
        "transformers",
        "text-generation",
    )
    assert values.license is None and values.base_model is None  # of a local folder


def test_the_text_says_data_settings_results_and_licences(exported: Run) -> None:
    report = exported.report()
    for name in ("adapter", "merged"):
        text = (exported.path / "export" / name / "README.md").read_text("utf-8")
        for part, fingerprint in report["data"]["fingerprints"].items():
            assert f"| {part} | {report['data'][part]} | {fingerprint} |" in text
        assert "| sft learning_rate | 0.001 |" in text and "| LoRA r | 16 |" in text
        assert "| sft steps | 2 |" in text and "0/4 = 0.0 % [0.0, 49.0]" in text
        assert "- data_samples/sharegpt.jsonl: apache-2.0" in text
        assert "unknown: a local file" in text and "<|im_start|>" in text
        assert (
            str(exported.path.parent) not in text and exported.config.model not in text
        )
        assert f"| {name} |" in text.partition("Compared with")[2]
        assert ("vllm serve ." in text) == (name == "merged")


def test_what_was_not_measured_is_left_out(copy: Run) -> None:
    report, folder = copy.report(), copy.path / "export" / "merged"
    del report["eval"]
    card.write_card(folder, copy, "merged", report)
    text = (folder / "README.md").read_text("utf-8")
    assert "Held-out" not in text and "model-index" not in text
    assert " % [" not in text


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_the_python_of_a_card_runs_in_its_folder(exported: Run, name: str) -> None:
    folder = exported.path / "export" / name
    text = (folder / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    command = [sys.executable, "-c", code[1].replace("128", "4")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]


def test_a_gguf_is_served_by_ollama_and_llama_cpp(copy: Run) -> None:
    report, folder = copy.report(), copy.path / "export" / "gguf-q8_0"
    report["export"]["gguf:q8_0"] = report["export"]["merged"]
    folder.mkdir()
    card.write_card(folder, copy, "gguf:q8_0", report)
    text = (folder / "README.md").read_text("utf-8")
    assert "ollama create carded -f Modelfile" in text
    assert "llama-server -m model.gguf --jinja" in text
    assert "```python" not in text and "vllm" not in text


def test_licences_are_the_hubs_or_unknown_with_a_link(monkeypatch: Any) -> None:
    assert card.origin_of("smollm2-135m-offline", "model")[1] == "apache-2.0"
    name, licence = card.origin_of("openai/gsm8k/main:train", "dataset")
    assert name == "openai/gsm8k"
    assert licence == "unknown: look at https://huggingface.co/datasets/openai/gsm8k"


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's API, as far as an upload asks for it; `server.calls` has what came."""

    def answer(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.calls.append((self.path, self.headers.get("Authorization"), body))
        url, values = f"http://127.0.0.1:{server.server_port}", dict[str, Any]()
        if self.path.endswith("/repos/create"):
            values = {"url": f"{url}/o/n"}
        elif "/preupload/" in self.path:
            files = [
                {**f, "uploadMode": "lfs" if ".safe" in f["path"] else "regular"}
                for f in json.loads(body)["files"]
            ]
            values = {"files": [f | {"shouldIgnore": False} for f in files]}
        elif self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{url}/lfs/{each['oid']}"}}
            values = {"objects": objects}
        elif "/commit/" in self.path:
            values = {"commitUrl": f"{url}/o/n/commit/1", "commitOid": "1"}
        elif self.path.startswith("/api/models/o/"):
            values = {"id": "o/n", "private": "public" not in self.path}
            values["cardData"] = {"license": "other", "license_name": "llama3.2"}
        text = json.dumps(values).encode()
        self.send_response(403 if "/o/denied" in self.path else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *_: object) -> None:
        pass


PUSHES = """
import sys
from pathlib import Path
from helpers.errors import ModelError
from helpers.export import card

print(card.origin_of("o/base", "model"))
for name in ("o/n", "o/public", "o/denied"):
    try:
        print(card.push_to_hub(Path(sys.argv[1]), name, token="hf_secret"))
    except ModelError as error:
        print(error)
"""


def test_an_upload_is_private_and_sends_the_folder_and_the_token_alone(
    exported: Run, tmp_path: Path, run_python: Any
) -> None:
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
    assert licence == "('o/base', 'llama3.2')" and address == f"{url}/o/n"
    assert "o/public exists and is public" in public and "403" in denied
    assert "hf_secret" not in done.stdout + done.stderr
    created = next(json.loads(body) for path, _, body in calls if "create" in path)
    assert created["visibility"] == "private"
    tokens = {t for path, t, _ in calls if path.startswith("/api/models/o/n")}
    assert tokens == {"Bearer hf_secret"}
    commits = [body for path, _, body in calls if "/commit/" in path]
    lines = [json.loads(line) for line in commits[0].splitlines()]
    sent = {
        v["path"]: base64.b64decode(v["content"])
        for v in (line["value"] for line in lines if line["key"] == "file")
    }
    stored = {
        path.name: body
        for path, _, body in ((Path(p), t, b) for p, t, b in calls)
        if path.parent.name == "lfs"
    }
    for line in lines:
        if line["key"] == "lfsFile":
            sent[line["value"]["path"]] = stored[line["value"]["oid"]]
    assert len(commits) == 1
    assert sent == {f.name: f.read_bytes() for f in folder.iterdir()}
    assert all(hashlib.sha256(body).hexdigest() == oid for oid, body in stored.items())
