"""Tests of helpers.doctor: what works here is said, and a remedy for what does not."""

import time

import torch

from helpers import doctor


def test_a_machine_on_which_the_tests_run_is_fine(runs_home, caplog):
    caplog.set_level("INFO", "helpers")
    table = doctor.diagnose()
    assert [*table.index] == [*doctor.CHECKS]
    assert [*table["verdict"]] == ["fine"] * len(table)
    assert any(x in table["found"]["machine"] for x in ("no GPU", "capability"))
    assert "GiB of RAM free; torch." in table["found"]["machine"]
    assert "in 3 steps" in table["found"]["training step"]
    assert "no chat template" not in caplog.text
    assert table["seconds"].sum() < 60


def test_what_fails_is_named_with_its_remedy_and_the_rest_goes_on(
    runs_home, monkeypatch, tmp_path
):
    pins = tmp_path / "requirements.txt"
    pins.write_text("torch>=99  # too new\nnothing-of-this-name==1\n")
    monkeypatch.setattr(doctor, "STACK", pins)
    monkeypatch.setattr(doctor, "LEAST_GB", 10**9)
    monkeypatch.setenv("TUNEBOOK_DTYPE", "int8")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "secretsecretsecretsecret")
    table = doctor.diagnose()
    assert (
        "expected >=99; nothing-of-this-name is missing, expected ==1"
        in table["found"]["versions"]
    )
    assert (
        table["verdict"]["versions"]
        == "failed: run `make setup`, or restart the runtime on Colab"
    )
    assert "not float16" in table["found"]["machine"]
    assert table["verdict"]["machine"] == "failed: do as it says"
    assert "are needed" in table["found"]["disk"]
    assert table["verdict"]["4-bit product"] == "fine"
    assert "a token is set" in table["found"]["hub"]
    assert "secret" not in table.to_string()


def test_a_machine_with_too_little_memory_is_told_what_is_there(runs_home, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_MEMORY_GB", 10**9)
    row = doctor.diagnose().loc["machine"]
    assert "of RAM free: 1000000000 and half of it are needed" in row["found"]
    assert row["verdict"].startswith("failed: close other programs")


def test_on_the_command_line_the_doctor_is_quick_and_no_library_adds_noise(
    runs_home, run_python
):
    began = time.monotonic()
    done = run_python("-m", "helpers", "doctor")
    assert done.stdout.count("fine") == len(doctor.CHECKS)
    assert time.monotonic() - began < 60  # twice what it takes, on a busy machine
    assert max(map(len, done.stdout.splitlines())) < 200
    if not torch.cuda.is_available():  # Unsloth has its banner
        assert done.stderr == ""
