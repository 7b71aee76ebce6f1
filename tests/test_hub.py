"""Gated models, against a server that answers as the hub does."""

import http.server
import threading

import pytest

LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
TOKEN = "hf_" + "expired" * 5
LOADS = """
import sys
from helpers import errors, models

try:
    models.load_model(sys.argv[1], engine=sys.argv[2])
except errors.ModelError as error:
    print(error)
"""


class GatedHub(http.server.BaseHTTPRequestHandler):
    """Every model is gated."""

    def do_GET(self):
        self.send_response(200 if self.path == "/" else 401)
        if self.path != "/":
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("X-Error-Message", "Access to this model is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), GatedHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_a_gated_model_says_how_to_get_access(endpoint, tmp_path, run_python, engine):
    # read when the libraries are imported, so a Python of its own
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
    variables |= {"HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
    done = run_python("-c", LOADS, LLAMA, engine, **variables)
    assert f"model {LLAMA!r} could not be loaded: " in done.stdout
    address = f"https://huggingface.co/{LLAMA}"
    assert f"gated repo. Make sure to have access to it at {address}" in done.stdout


def test_the_doctor_names_a_token_that_the_hub_refuses(endpoint, tmp_path, run_python):
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
    variables |= {"HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
    script = "from helpers import doctor; print(doctor.diagnose().loc['hub'].to_list())"
    done = run_python("-c", script, **variables)
    assert "failed: check the network, and the token in HF_TOKEN" in done.stdout
    assert TOKEN not in done.stdout
