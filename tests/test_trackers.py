"""Trackers: left out with a word where they cannot work, never asked for a login."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from helpers.training.trackers import choose_trackers

from helpers.runs import Run
from helpers.training import trackers
from helpers.training import trainer as train


@pytest.fixture(autouse=True)
def logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_none_is_no_tracker(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_trackers("none") == []
    assert capsys.readouterr().out == ""


def test_wandb_without_a_login_is_left_out_with_a_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert choose_trackers("wandb") == []
    assert capsys.readouterr().out == (
        "report_to: wandb is left out, nobody is logged in; set WANDB_API_KEY or "
        "WANDB_MODE=offline\n"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("WANDB_API_KEY", "x" * 40), ("WANDB_MODE", "offline")],
)
def test_wandb_is_taken_with_a_key_or_offline(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert choose_trackers(["wandb"]) == ["wandb"]


def test_wandb_is_taken_with_a_login_of_an_earlier_day(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    assert choose_trackers("wandb") == ["wandb"]


def test_a_login_at_another_host_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine example.org login user password key\n")
    assert choose_trackers("wandb") == []


def test_a_tracker_that_is_not_installed_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "KNOWN", ["no_such_tracker"])
    assert choose_trackers("no_such_tracker") == []
    assert "not installed; run `pip install no_such_tracker`" in capsys.readouterr().out


@pytest.fixture
def tracked(
    run_factory: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder in which the three real trackers logged a training, offline."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    wandb.teardown()  # it keeps the settings of earlier tests
    trackers = ["wandb", "tensorboard", "trackio"]
    run = run_factory(stages=["sft"], sft__max_steps=2, sft__report_to=trackers)
    train.train_stage(run, "sft")
    wandb.teardown()
    return tmp_path


def test_the_trackers_log_losses_and_memory_under_the_runs_name(tracked: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    board = event_accumulator.EventAccumulator(str(tracked / "tensorboard"))
    board.Reload()
    logged = {"train/loss", "train/memory_gb", "eval/loss"}
    assert logged <= set(board.Tags()["scalars"])
    assert [e.step for e in board.Scalars("train/loss")] == [1, 2]

    (database,) = Path(os.environ["TRACKIO_DIR"]).glob("tunebook*.db")
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in rows} == {"test-sft"}
    assert logged <= {key for _, metrics in rows for key in json.loads(metrics)}

    (offline,) = tracked.glob("wandb/offline-run-*/run-*.wandb")
    records = offline.read_bytes()
    assert [x for x in [*logged, "test-sft"] if x.encode() not in records] == []


def test_a_training_ends_the_wandb_run_that_it_began(
    run_factory: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "disabled")
    begun = []
    monkeypatch.setattr(
        wandb, "init", lambda *a, init=wandb.init, **k: begun.append(init(*a, **k))
    )
    run = run_factory(stages=["sft"], sft__max_steps=1, sft__report_to=["wandb"])
    train.train_stage(run, "sft")
    assert len(begun) == 1
    assert wandb.run is None


def test_a_wandb_run_that_was_open_before_a_training_stays_open() -> None:
    import wandb

    mine = wandb.init(mode="disabled")
    with trackers.one_run():
        assert wandb.run is mine
    assert wandb.run is mine
    mine.finish()
    assert wandb.run is None


def test_the_ones_that_work_stay_when_another_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_trackers(["mlflow", "wandb"]) == ["mlflow"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_trackers(["mlflow", "wandb"]) == ["mlflow", "wandb"]
