"""The callbacks that watch a GRPO run, on states as the trainer has them."""

from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pandas
import pytest
import torch
from transformers import TrainerControl, TrainerState, get_scheduler

from helpers import runtime
from helpers.config import changed
from helpers.files import write_json
from helpers.grpo import monitor
from helpers.runs import Run
from helpers.training import inputs
from helpers.training.inputs import Panel

ARGUMENTS = SimpleNamespace(eval_strategy="steps", warmup_steps=2)


@pytest.fixture
def seconds(monkeypatch):
    """A clock that passes when a test says so: its `now`."""
    passed = SimpleNamespace(now=1000.0)
    clock = SimpleNamespace(monotonic=lambda: passed.now)
    monkeypatch.setattr(monitor, "time", clock)
    return passed


def train(
    clock, seconds, *, step_s, evaluation_s=0.0, start=0, kill_at=None, kind="linear"
):
    """Steps a clock as the trainer does: last step, learning rates, evaluations."""
    state = TrainerState(global_step=start, max_steps=monitor.ENDLESS)
    control, rates, evaluations = TrainerControl(), [], 0
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, 2, monitor.ENDLESS)
    clock.on_train_begin(ARGUMENTS, state, control, lr_scheduler=scheduler)
    while not control.should_training_stop:
        seconds.now += step_s * (1 if state.global_step else 3)  # the first compiles
        optimizer.step()
        scheduler.step()
        state.global_step += 1
        rates.append(scheduler.get_last_lr()[0])
        control.should_evaluate = False
        clock.on_step_end(ARGUMENTS, state, control)
        if state.global_step == kill_at:
            break
        if control.should_evaluate:
            seconds.now += evaluation_s
            evaluations += 1
            clock.on_evaluate(ARGUMENTS, state, control)
    else:  # with an evaluation and a checkpoint, and no step to go
        assert control.should_evaluate and control.should_save
        assert state.max_steps == state.global_step
    return state.global_step, rates, evaluations


@pytest.mark.parametrize("step_s", [0.5, 20.0])
@pytest.mark.parametrize("evaluation_s", [0.0, 12.0, 50.0])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_run_takes_its_minutes_and_its_schedule_ends_with_them(
    tmp_path, seconds, caplog, step_s, evaluation_s, kind
):
    clock = monitor.Clock(tmp_path, 10)
    steps, rates, evaluations = train(
        clock, seconds, step_s=step_s, evaluation_s=evaluation_s, kind=kind
    )
    assert clock.used_s == pytest.approx(600, rel=0.1)
    assert 2 <= evaluations <= 9 and evaluations * evaluation_s <= 180
    assert rates[0] == 0.5 and rates[1] == 1.0  # the warm-up counts steps
    assert rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] < 0.15
    assert "10 minutes of grpo_minutes are used" in clock.reason
    text = f"{step_s} s a step: about "
    (planned,) = (m for m in caplog.messages if m.startswith(text))
    aside = 600 - evaluations * evaluation_s  # the sentence is without evaluations
    number = int(planned.removeprefix(text).split()[0])
    assert number * aside / 600 == pytest.approx(steps, rel=0.2)


def test_the_time_before_a_kill_counts(tmp_path, seconds):
    first = monitor.Clock(tmp_path, 2)
    assert train(first, seconds, step_s=5, kill_at=14)[0] == 14
    seconds.now += 3600  # nothing runs meanwhile
    again = monitor.Clock(tmp_path, 2)
    steps, *_ = train(again, seconds, step_s=5, start=10)
    assert steps == 18  # of 22, four were lost
    assert again.used_s == pytest.approx(120, abs=2.5)


# the panel


def write_completions(run, step, rows):
    """Writes what TRL writes of a logged step: all groups, one after the other."""
    folder = run.path / "grpo" / "checkpoints" / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    names = ["prompt", "completion", "correctness", "advantage"]
    frame = pandas.DataFrame(rows, columns=names)
    frame.to_parquet(folder / f"completions_{step:05d}.parquet")


@pytest.fixture
def grpo_run(run_factory):
    """A run whose last logged step has a group of equal rewards, and a mixed one."""
    run = run_factory(rewards={"correctness": 2.0}, grpo__num_generations=2)
    write_completions(run, 0, [])
    write_completions(run, 1, [("a", "1", 0.0, -1.0), ("a", "2", 1.0, 1.0)])
    rows = [("b", "3", 1.0, 0.0), ("b", "4", 1.0, 0.0)]
    write_completions(run, 12, [*rows, ("c", "5", None, -0.7), ("c", "6", 1.0, 0.7)])
    return run


def test_the_group_with_the_largest_spread_is_shown_best_first(grpo_run):
    group = monitor.read_group(grpo_run)
    assert list(group["completion"]) == ["6", "5"]
    assert list(group["reward"]) == [2.0, 0.0]
    assert list(monitor.read_group(grpo_run, 1)["completion"]) == ["2", "1"]
    assert monitor.read_group(grpo_run, 0).empty
    assert monitor.read_group(grpo_run, 2).empty
    # a trainer with other rewards than the config's
    other = changed(grpo_run.config, rewards={"closeness": 1.0})
    group = monitor.read_group(Run(grpo_run.path, other), 1)
    assert list(group["reward"]) == [0.0, 0.0]


def test_of_a_trainer_that_samples_its_own_prompts_no_count_is_reported(run):
    part = monitor.LivePanel(run).report([{"reward": 0.5}])
    assert (part["prompts_left_out"], part["sampler"]) == (None, None)
    assert part["reward_last"] == 0.5


def test_outside_a_notebook_the_most_urgent_is_logged_and_all_at_the_end(
    grpo_run, caplog
):
    panel = monitor.LivePanel(grpo_run)
    state = TrainerState(global_step=0)
    for step in (1, 2):
        logs = {"step": step, "reward": 0.25, "completions/clipped_ratio": 0.5}
        state.log_history.append(logs)
        panel.on_log(ARGUMENTS, state, None)
    assert caplog.text.count("50% of the answers are cut") == 1
    caplog.clear()
    panel.on_train_end(ARGUMENTS, state, None)
    assert "50% of the answers" in caplog.text
    assert "near zero by construction" in caplog.text
    assert (grpo_run.path / "grpo/curves.png").stat().st_size > 5_000


def test_the_title_shows_the_time_left_by_steps_or_by_the_clock(run_factory, tmp_path):
    history = [{"step": 4, "loss": 2.0, "seconds": 60.0}]
    state = TrainerState(global_step=4, max_steps=10, log_history=history)
    assert Panel(tmp_path).title(state) == "step 4 of 10, 01:30 left"
    run = run_factory(grpo_minutes=5.0)
    assert monitor.LivePanel(run).title(state) == "step 4 of 10, 01:30 left"
    write_json(run.path / "grpo" / "clock.json", {"used_s": 100.0})
    state.max_steps = monitor.ENDLESS
    assert monitor.LivePanel(run).title(state) == "step 4, 03:20 left"


def test_the_panel_tells_sfts_loss_and_when_the_held_out_one_rises(tmp_path):
    history = [{"step": 1, "loss": 2.0}]
    assert Panel(tmp_path).explain(history) == ["Loss 2.000 -> 2.000."]
    for step, held in ((1, 1.5), (2, 1.25), (3, 1.75)):
        history += [{"step": step, "loss": 1.0}, {"step": step, "eval_loss": held}]
    held_out = "Held-out loss 1.500 at first, 1.250 at best, step 2; it rises to 1.750"
    lines = ["Loss 2.000 -> 1.000.", f"{held_out}: fewer epochs, or more rows."]
    assert Panel(tmp_path).explain(history) == lines
    assert Panel(tmp_path).explain(history[:-1])[1].endswith("at best, step 2.")


CELL = """
from pathlib import Path
from types import SimpleNamespace
from helpers.training.inputs import Panel
panel, history = Panel(Path.cwd()), []
state = SimpleNamespace(is_world_process_zero=True, max_steps=3, log_history=history)
for state.global_step in (1, 2):
    step = state.global_step
    history.append({"step": step, "loss": 3.0 - step, "seconds": 60.0 * step})
    panel.on_log(None, state, None)
    if step == 2: panel.on_train_end(None, state)
"""


def test_in_a_notebook_the_curve_is_drawn_in_one_place(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.execute(notebook, cwd=str(tmp_path), kernel_name="python3")
    outputs = notebook.cells[0].outputs  # among them what loaders write to stderr
    (output,) = (o for o in outputs if o.output_type == "display_data")
    assert "step 2 of 3, 01:00 left" in output.data["text/html"]
    assert "Loss 2.000 -> 1.000." in output.data["text/html"]
    assert "data:image/png;base64" in output.data["text/html"]


def test_the_panel_tells_the_time_left_more_often_than_it_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "in_notebook", lambda: True)
    shown = []
    monkeypatch.setattr(inputs, "display", lambda page, **_: shown.append(page.data))
    panel, state = Panel(tmp_path), TrainerState(max_steps=3)
    pictures = []
    for state.global_step in (1, 2):
        state.log_history.append({"step": state.global_step, "loss": 1.0})
        panel.due = 0.0  # ten seconds later
        panel.on_log(ARGUMENTS, state, TrainerControl())
        pictures.append((tmp_path / "curves.png").read_bytes())
    assert all(f"step {n} of 3" in page for n, page in enumerate(shown, start=1))
    assert pictures[0] == pictures[1]  # its second drawing is due a minute later
    panel.on_train_end(ARGUMENTS, state)
    assert (tmp_path / "curves.png").read_bytes() != pictures[1]


def test_a_run_whose_reward_collapses_is_stopped_with_the_reason(run, caplog):
    panel, control = monitor.LivePanel(run), TrainerControl()
    state = TrainerState(log_history=[{"reward": 0.5} for _ in range(20)])
    state.global_step = 20
    while not control.should_training_stop:
        state.global_step += 1
        state.log_history.append({"reward": 0.0})
        panel.on_log(ARGUMENTS, state, control)
    assert state.global_step == 28
    assert "stopped at step 28: the reward collapsed from 0.50 to 0.10" in panel.reason
    assert caplog.messages.count(panel.reason) == 1
