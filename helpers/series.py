"""Executes the notebooks in order, unchanged, and prints the run's table.

    python -m helpers series demo

The executed copies go to `runs/<name>/notebooks/`; a notebook that fails leaves its
copy there too, and the command ends with the cell's own error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from helpers import runtime
from helpers.config import RunConfig

CELL_TIMEOUT_S = 3600


def notebooks() -> list[Path]:
    """Returns the numbered notebooks of the series, in order.

    Raises:
        FileNotFoundError: the helpers are installed, not run in the project's folder.
    """
    folder = runtime.ROOT / "notebooks"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no {folder}: pip installs the helpers without the notebooks. Run the "
            "series in a clone of the repository"
        )
    return sorted(folder.glob("0*.ipynb"))


def notebooks_for(config: RunConfig) -> list[Path]:
    """Returns the notebooks that have something to do for a run.

    Those of stages that it lacks are left out, and the evaluation where no rows are
    held out.
    """
    from helpers import stages
    from helpers.evaluation import evaluator as evaluation

    idle = {
        name for stage, name in stages.NOTEBOOKS.items() if stage not in config.stages
    }
    if not evaluation.held_out(config):
        idle.add("04_evaluation")
    return [path for path in notebooks() if path.stem not in idle]


def execute(source: Path, copy: Path) -> float:
    """Executes a notebook in a kernel of this Python; returns the seconds it took.

    Args:
        source: the notebook, which is not changed.
        copy: where the executed copy goes, also when a cell fails.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(source, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        coalesce_streams=True,  # an answer that was streamed stays one text
        resources={"metadata": {"path": str(source.parent)}},
    )
    started = time.perf_counter()
    try:
        # what cells write to stderr is in the copy; this is the kernel's own chatter
        client.execute(stderr=subprocess.DEVNULL)
    finally:
        copy.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, copy)
    return time.perf_counter() - started


def main(recipe: str) -> int:
    """Runs the series with a recipe, in the run of its name; returns the exit status.

    Stages that this run has finished with the same settings are not trained again.
    """
    from nbclient.exceptions import CellExecutionError

    from helpers import recipes, runs
    from helpers.evaluation import tables

    config = recipes.load(recipe)
    os.environ["TUNEBOOK_RUN"] = config.name
    os.environ["TUNEBOOK_DRIVE"] = "0"  # nobody is there to give access
    run = runs.save_run(config)
    seconds = {}
    for source in notebooks_for(config):
        print(f"{source.name} ...", end=" ", flush=True)  # noqa: T201
        try:
            spent = execute(source, run.path / "notebooks" / source.name)
        except CellExecutionError as error:
            print(f"failed\n{error}", file=sys.stderr)  # noqa: T201
            return 1
        seconds[source.stem] = round(spent, 1)
        print(f"{spent / 60:.1f} min", flush=True)  # noqa: T201
    run.write_part("notebooks", {"seconds": seconds})
    total = sum(seconds.values()) / 60
    print(f"\n{total:.1f} minutes; outputs and executed notebooks in {run.path}\n")  # noqa: T201
    if "eval" in run.report():
        print(tables.results_table(run.report()).to_string())  # noqa: T201
    return 0
