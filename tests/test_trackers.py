"""Trackers: left out with a word where they cannot work, never asked for a login."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from helpers import trackers
from helpers.trackers import choose_trackers


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


def test_tensorboard_is_taken_where_it_is_installed() -> None:
    installed = importlib.util.find_spec("tensorboard") is not None
    assert choose_trackers("tensorboard") == (["tensorboard"] if installed else [])


def test_the_ones_that_work_stay_when_another_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_trackers(["mlflow", "wandb"]) == ["mlflow"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_trackers(["mlflow", "wandb"]) == ["mlflow", "wandb"]
