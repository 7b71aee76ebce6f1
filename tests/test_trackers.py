"""Trackers: W&B never asks for a login, and all log under the run's name."""

import json
import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import wandb

from helpers import stages
from helpers.training.inputs import training_arguments


@pytest.fixture(autouse=True)
def logged_out(tmp_path, monkeypatch, caplog):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "")  # restored afterwards
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "helpers")
    wandb.teardown()  # it keeps the settings of earlier tests


@pytest.mark.parametrize("login", [None, "key", "netrc", "mode"])
def test_wandb_stays_offline_with_a_word_where_nobody_is_logged_in(
    monkeypatch, tmp_path, caplog, login, run_factory
):
    if login == "key":
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    elif login == "netrc":
        entry = f"machine api.wandb.ai login user password {'x' * 40}\n"
        (tmp_path / ".netrc").write_text(entry)
    elif login == "mode":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    training_arguments(run_factory(sft__report_to="wandb"), "sft", tmp_path)
    modes = {None: "offline", "mode": "disabled"}
    assert wandb.setup().settings.mode == modes.get(login, "online")
    assert ("nobody is logged in" in caplog.text) == (login is None)


def test_the_real_trackers_log_losses_under_the_runs_name(
    run_factory, tmp_path, monkeypatch
):
    from tensorboard.backend.event_processing import event_accumulator

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    trackers = ["wandb", "tensorboard", "trackio"]
    run = run_factory(stages=["sft"], sft__max_steps=2, sft__report_to=trackers)
    stages.train_stage(run, "sft")
    assert wandb.run is None  # ended with the training that began it
    wandb.teardown()

    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    logged = {"train/loss", "eval/loss"}
    assert logged <= set(board.Tags()["scalars"])
    assert [e.step for e in board.Scalars("train/loss")] == [1, 2]

    (database,) = Path(os.environ["TRACKIO_DIR"]).glob("tunebook*.db")
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in rows} == {"test-sft"}
    assert logged <= {key for _, metrics in rows for key in json.loads(metrics)}

    (offline,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = offline.read_bytes()
    assert [x for x in [*logged, "test-sft"] if x.encode() not in records] == []
