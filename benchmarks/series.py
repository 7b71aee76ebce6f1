"""Executes copies of the notebooks for a recipe, below its run's folder.

python benchmarks/series.py [demo]      # what `make demo` does
python benchmarks/series.py smoke       # `make try`: 00 to 04
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import nbclient
import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import files, recipes, runs, runtime  # noqa: E402
from helpers.__main__ import show  # noqa: E402
from helpers.errors import TunebookError  # noqa: E402


def published_seconds() -> dict[str, float]:
    """Returns how long each notebook of the demo took on two CPU cores."""
    report = files.read_json(runtime.ROOT / "results" / "demo_cpu.json")
    return report.get("notebooks", {}).get("seconds", {})


def cut_down(notebook: Any) -> None:
    """Gives constants in cells the small values that the tests of notebooks take."""
    for cell in notebook.cells:
        for name, value in cell.metadata.get("nbmake", {}).get("mock", {}).items():
            cell.source += f"\n{name} = {value!r}  # smaller, for a try"


def execute(recipe: str) -> runs.Run:
    """Returns the recipe's run, after all notebooks that its stages need."""
    run, seconds = runs.save_run(recipes.load(recipe)), {}
    idle = [f"_{s}_" for s in ("sft", "grpo") if s not in run.config.stages]
    # a folder that is named keeps the notebooks from asking for Google Drive
    place = {"TUNEBOOK_RUNS": str(run.path.parent.resolve())}
    place["TUNEBOOK_RUN"] = run.config.name
    variables = os.environ | place | {"TQDM_DISABLE": "1"}  # no bars in the copies
    (run.path / "notebooks").mkdir(exist_ok=True)
    sources = sorted((runtime.ROOT / "notebooks").glob("0*.ipynb"))
    sources = [s for s in sources if not any(stage in s.stem for stage in idle)]
    if recipe == "smoke":  # export and chat would take a third of the minutes
        sources = [s for s in sources if s.stem < "05"]
    known = published_seconds() if recipe == "demo" else {}
    ahead = {s.stem: known.get(s.stem, 60.0) for s in sources}
    options: Any = {"extra_arguments": ["--log-level=CRITICAL"]}
    # Ctrl-C is KeyboardInterrupt: nbclient's handler ends in errors of its own
    options["on_notebook_start"] = lambda **_: (
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    )
    for source in sources:
        notebook, start = nbformat.read(source, as_version=4), time.perf_counter()
        if recipe == "smoke":
            cut_down(notebook)
        cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        bar = runtime.progress(None, source.stem, total=cells)
        options["on_cell_executed"] = lambda bar=bar, **_: bar.update()
        options["resources"] = {"metadata": {"path": str(source.parent)}}
        client = nbclient.NotebookClient(notebook, kernel_name="python3", **options)
        try:
            with bar:
                client.execute(env=variables)
        except nbclient.exceptions.CellExecutionError as error:
            sys.exit(f"{source.name} failed\n{error}")
        finally:
            nbformat.write(notebook, run.path / "notebooks" / source.name)
        seconds[source.stem] = round(time.perf_counter() - start, 1)
        pace = sum(seconds.values()) / sum(ahead[name] for name in seconds)
        left = pace * sum(s for name, s in ahead.items() if name not in seconds) / 60
        line = f"{seconds[source.stem] / 60:.1f} min, about {left:.0f} min left"
        print(f"{source.name} {line}", flush=True)
    run.write_part("notebooks", {"seconds": seconds})
    return run


if __name__ == "__main__":
    try:
        show(execute(*sys.argv[1:] or ["demo"]))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from what is saved")
    except TunebookError as error:
        sys.exit(f"{type(error).__name__}: {error}")
