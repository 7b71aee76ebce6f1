"""Models that cannot be had: gated ones, against a server that answers as the hub."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.models import hub
from helpers.models.hub import MIRRORS, gated_model

ROOT = Path(__file__).resolve().parent.parent
LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
LOADS = """
import sys
from helpers import models

try:
    models.load_model(sys.argv[1], engine=sys.argv[2])
except models.ModelError as error:
    print("ModelError:", error)
"""


class GatedHub(http.server.BaseHTTPRequestHandler):
    """Every model is gated: 401 without a token, 403 with one."""

    def do_GET(self) -> None:
        known = "Authorization" in self.headers
        self.send_response(200 if self.path == "/" else 403 if known else 401)
        if self.path != "/":
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("X-Error-Message", "Access to this model is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), GatedHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def load(
    name: str, endpoint: str, home: Path, engine: str = "transformers", token: str = ""
) -> str:
    """What loading a model from a hub of ours says; read at import, so a new Python."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    environment |= {"HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1", "HF_TOKEN": token}
    if not token:
        del environment["HF_TOKEN"]
    done = subprocess.run(
        [sys.executable, "-c", LOADS, name, engine],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_a_gated_model_without_a_login_says_how_to_get_in(
    endpoint: str, tmp_path: Path
) -> None:
    assert load(LLAMA, endpoint, tmp_path) == (
        f"ModelError: model '{LLAMA}' is gated and you are not logged in: accept its "
        f"licence at https://huggingface.co/{LLAMA}, then log in with `hf auth login` "
        "or the variable HF_TOKEN (on Colab a secret of that name: the key on the "
        "left), or use the open mirror 'unsloth/Llama-3.2-1B-Instruct'"
    )


def test_a_gated_model_whose_licence_is_not_accepted_says_so(
    endpoint: str, tmp_path: Path
) -> None:
    assert load(LLAMA, endpoint, tmp_path, token="hf_mine") == (
        f"ModelError: model '{LLAMA}' is gated and your account has not been let in: "
        f"accept its licence at https://huggingface.co/{LLAMA} (with the account of "
        "your token), or use the open mirror 'unsloth/Llama-3.2-1B-Instruct'"
    )


def test_unsloth_says_the_same_of_a_gated_model(endpoint: str, tmp_path: Path) -> None:
    said = load(LLAMA, endpoint, tmp_path, engine="unsloth")
    assert "is gated and you are not logged in: accept its licence" in said


@pytest.mark.parametrize(("name", "mirror"), MIRRORS.items())
def test_every_gated_model_of_the_recipes_has_an_open_mirror(
    name: str, mirror: str
) -> None:
    assert str(gated_model(name, logged_in=False)).endswith(f"open mirror {mirror!r}")
    assert name.rpartition("/")[2] == mirror.rpartition("/")[2]


def test_a_gated_model_without_a_mirror_offers_none() -> None:
    assert "mirror" not in str(gated_model("google/gemma-3-1b-it", logged_in=True))


def test_another_error_of_loading_is_no_refusal() -> None:
    try:
        raise OSError("disk full") from ValueError("broken")
    except OSError as error:
        assert hub.refusal(error) is None
