"""Copies of a stage in a second place: sent whole or not at all, and brought back."""

import base64
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest
from transformers import TrainerState, TrainingArguments

from helpers import files, stages
from helpers.errors import TunebookError
from helpers.training import callbacks
from tests.test_card import Hub

FEW = {"sft__max_steps": 4, "sft__save_steps": 2, "sft__eval_steps": 2}
ROOT = Path(__file__).resolve().parent.parent


def fill(folder, text):
    (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "checkpoint-2" / "state.bin").write_text(text * 10_000)
    (folder / "best.json").write_text(json.dumps(text))
    return folder


@pytest.fixture
def place(tmp_path):
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def bring_back(place):
    """The text of the copy that is brought back from a place."""
    back = place.with_name("back")
    assert files.fetch_copy(str(place), "sft", back)
    return json.loads((back / "best.json").read_text())


def weights(run):
    return files.hash_file(run.path / "sft" / "adapter" / "adapter_model.safetensors")


def test_the_newest_whole_copy_is_brought_back_and_two_stay(tmp_path, place):
    assert not files.fetch_copy(str(place), "sft", tmp_path / "back")
    for text in "abc":
        files.send_copy(fill(tmp_path / text, text), str(place), "sft")
    names = sorted(path.name for path in (place / "sft").iterdir())
    assert names == ["copy-000002", "copy-000003"]
    assert bring_back(place) == "c"
    assert files.list_sums(tmp_path / "back") == files.list_sums(tmp_path / "c")


@pytest.mark.parametrize(
    "fault", ["no manifest", "cut manifest", "cut", "other", "less"]
)
def test_a_copy_that_is_not_whole_is_passed_over(tmp_path, place, fault):
    for text in "ab":
        files.send_copy(fill(tmp_path / text, text), str(place), "sft")
    copy = place / "sft" / "copy-000002"
    manifest, state = copy / files.MANIFEST, copy / "checkpoints/checkpoint-2/state.bin"
    if fault == "no manifest":
        manifest.unlink()
    elif fault == "less":
        state.unlink()
    else:
        file, text = (manifest if "manifest" in fault else state), state.read_text()
        file.write_text("c" * len(text) if fault == "other" else file.read_text()[:9])
    assert bring_back(place) == "a"


SENDS = """
import sys
from pathlib import Path
from helpers import files
print("ready", flush=True)
files.send_copy(Path(sys.argv[1]), sys.argv[2], "sft")
"""


def test_a_kill_amid_a_copy_leaves_the_one_before(tmp_path, place):
    big = tmp_path / "big"
    files.send_copy(fill(tmp_path / "a", "a"), str(place), "sft")
    big.mkdir()
    for number in range(300):
        (big / f"{number:03}.bin").write_bytes(os.urandom(100_000))
    command = [sys.executable, "-c", SENDS, str(big), str(place)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    half = place / "sft" / "copy-000002" / "010.bin"
    while not half.exists() and child.poll() is None:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert half.exists() and not (half.parent / files.MANIFEST).exists()
    assert bring_back(place) == "a"
    files.send_copy(fill(tmp_path / "b", "b"), str(place), "sft")
    assert not (place / "sft" / "copy-000002" / "010.bin").exists()


def test_a_place_that_is_not_there_stops_a_restore_with_a_sentence(tmp_path):
    with pytest.raises(TunebookError, match="no folder: mount it.*unset TUNEBOOK_KEEP"):
        files.fetch_copy(str(tmp_path / "gone"), "sft", tmp_path / "back")


@pytest.mark.parametrize("fault", ["removed", "a file"])
def test_a_place_lost_amid_a_training_is_said_once_and_stops_nothing(
    tmp_path, place, fault, caplog
):
    args = TrainingArguments(output_dir=str(fill(tmp_path / "a", "a") / "checkpoints"))
    second = callbacks.SecondPlace(str(place), "sft", tmp_path / "a")
    for step in (1, 2, 3, 4):
        state = TrainerState(global_step=step)
        second.on_save(args, state)
        second.on_train_end(args, state)
        if step == 2:
            shutil.rmtree(place)
        if step == 2 and fault == "a file":
            place.write_text("")
    assert caplog.text.count("no second copy in") == 1
    assert "is no folder: mount it, or make it" in caplog.text
    place.unlink(missing_ok=True)
    place.mkdir()
    second.on_save(args, TrainerState(global_step=5))
    second.on_train_end(args, TrainerState(global_step=5))
    assert bring_back(place) == "a"


def test_a_run_goes_on_bit_identically_from_the_second_place_alone(
    run_factory, place, monkeypatch
):
    whole = run_factory(**FEW)
    stages.train_stage(whole, "sft")
    expected, report = weights(whole), whole.report()["sft"]
    shutil.rmtree(whole.path)
    monkeypatch.setenv("TUNEBOOK_KEEP", str(place))
    run, end = run_factory(**FEW), time.monotonic() + 300

    def die(self, args, state, *_, **__):
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.SecondPlace, "on_step_end", die, raising=False)
        with pytest.raises(KeyboardInterrupt):
            stages.train_stage(run, "sft")
    while not list(place.rglob(files.MANIFEST)):
        assert time.monotonic() < end
        time.sleep(0.05)
    shutil.rmtree(run.path)  # another machine
    run = run_factory(**FEW)
    stages.train_stage(run, "sft")
    assert weights(run) == expected
    assert run.report()["sft"]["loss_last"] == report["loss_last"]
    shutil.rmtree(run.path)  # and when it was finished
    run = run_factory(**FEW)
    stages.train_stage(run, "sft")
    assert weights(run) == expected


class Repository(Hub):
    """A hub that keeps what is committed to `o/n`, and gives it back."""

    def answer(self):
        server = self.server
        path, _, query = unquote(self.path).partition("?")
        if self.command == "GET" and "/tree/main" in path:
            folder = path.partition("/tree/main")[2].strip("/")
            entries = self.list_tree(folder, "recursive=true" in query.lower())
            if not entries:
                return self.send(b"{}", 404)
            return self.send(json.dumps(entries).encode())
        if "/paths-info/" in path:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            (name,) = parse_qs(body)["paths"]
            parent = name.rpartition("/")[0]
            entries = [e for e in self.list_tree(parent, False) if e["path"] == name]
            return self.send(json.dumps(entries).encode())
        if "/resolve/main/" in path:
            name = path.partition("/resolve/main/")[2]
            body = server.files.get(name)
            return self.send(body or b"", 200 if body is not None else 404)
        super().answer()
        body = server.calls[-1][2]
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                self.take(line["key"], line["value"])

    def take(self, key, value):
        server = self.server
        stored = {p[5:]: body for p, _, body in server.calls if p.startswith("/lfs/")}
        if key == "file":
            server.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            server.files[value["path"]] = stored[value["oid"]]
        elif key.startswith("deleted"):
            for name in [n for n in server.files if n.startswith(value["path"])]:
                del server.files[name]

    def list_tree(self, folder, recursive):
        files, below = self.server.files, f"{folder}/" if folder else ""
        folders = {str(p) for name in files for p in Path(name).parents} - {"."}
        kinds = dict.fromkeys(folders, "directory") | dict.fromkeys(files, "file")
        return [
            {"type": kind, "path": path, "oid": "1", "size": len(files.get(path, b""))}
            for path, kind in kinds.items()
            if path.startswith(below)
            and (recursive or "/" not in path.removeprefix(below))
        ]

    def send(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "1")
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = answer


KEEPS = """
import sys
from pathlib import Path
from transformers import TrainerState, TrainingArguments
from helpers import files
from helpers.training import callbacks
from tests.test_card import Hub

folder, back = Path(sys.argv[1]), Path(sys.argv[2])
args = TrainingArguments(output_dir=str(folder / "checkpoints"))
second = callbacks.SecondPlace("hub:o/n", "run/sft", folder)
for step in (1, 2, 3):
    (folder / "best.json").write_text(str(step))
    second.on_save(args, TrainerState(global_step=step))
    second.on_train_end(args, TrainerState(global_step=step))
print("ERROR", second.error)
print(files.fetch_copy("hub:o/n", "run/sft", back))
second = callbacks.SecondPlace("hub:o/public", "run/sft", folder)
second.on_save(args, TrainerState(global_step=1))
second.on_train_end(args, TrainerState(global_step=1))
print("ERROR", second.error)
"""


def test_copies_go_to_a_private_repository_in_single_commits_and_come_back(
    tmp_path, run_python
):
    folder = fill(tmp_path / "a", "a")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Repository) as server:
        calls, server.files = [], {}
        server.calls = calls
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        variables = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        variables |= {"HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
        variables |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_secret"}
        back = tmp_path / "back"
        done = run_python("-c", KEEPS, str(folder), str(back), **variables)
        server.shutdown()
    assert done.stdout.splitlines() == [
        "ERROR ",
        "True",
        "ERROR it is public: name a private one",
    ], done.stdout + done.stderr
    assert (back / "best.json").read_text() == "3"
    assert files.list_sums(back) == files.list_sums(folder)
    created = next(json.loads(body) for path, _, body in calls if "create" in path)
    assert created["visibility"] == "private"
    names = {"/".join(name.split("/")[:3]) for name in server.files}
    assert names == {"run/sft/copy-000002", "run/sft/copy-000003"}
    assert "hf_secret" not in done.stdout + done.stderr
