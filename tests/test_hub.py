"""Gated models, against a server that answers as the hub does."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.models.hub import MIRRORS, gated_model, unknown_model

LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
LOADS = """
import sys
from helpers import errors, models

try:
    models.load_model(sys.argv[1], engine=sys.argv[2])
except errors.ModelError as error:
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


@pytest.mark.parametrize(
    ("engine", "token"),
    [("transformers", ""), ("transformers", "hf_a"), ("unsloth", "")],
)
def test_a_gated_model_says_how_to_get_access(
    endpoint: str, tmp_path: Path, run_python: Any, engine: str, token: str
) -> None:
    # read when the libraries are imported, so a Python of its own
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
    variables |= {"HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
    variables |= {"HF_TOKEN": token} if token else {}
    done = run_python("-c", LOADS, LLAMA, engine, **variables)
    assert done.stdout.strip().splitlines()[-1] == (
        f"ModelError: model '{LLAMA}' is gated and your login has no access: accept "
        f"its licence at https://huggingface.co/{LLAMA} and log in with the same "
        "account, by `hf auth login` or the variable HF_TOKEN (on Colab a secret of "
        "that name: the key on the left), or use the open mirror "
        "'unsloth/Llama-3.2-1B-Instruct'"
    )


@pytest.mark.parametrize(("name", "mirror"), MIRRORS.items())
def test_every_gated_model_of_the_recipes_has_an_open_mirror(
    name: str, mirror: str
) -> None:
    assert str(gated_model(name)).endswith(f"open mirror {mirror!r}")
    assert name.rpartition("/")[2] == mirror.rpartition("/")[2]


def test_a_gated_model_without_a_mirror_offers_none() -> None:
    assert "mirror" not in str(gated_model("google/gemma-3-1b-it"))


def test_another_error_of_loading_is_not_taken_for_a_gate() -> None:
    try:
        raise OSError("disk full") from ValueError("broken")
    except OSError as error:
        assert "gated" not in str(unknown_model("a/b", error))
