"""Executes copies of the notebooks for a recipe, below its run's folder.

python benchmarks/series.py [demo]      # what `make demo` does
python benchmarks/series.py smoke
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbclient
import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import recipes, runs, runtime  # noqa: E402
from helpers.__main__ import show  # noqa: E402
from helpers.errors import TunebookError  # noqa: E402


def execute(recipe: str) -> runs.Run:
    """Returns the recipe's run, after all notebooks that its stages need."""
    run, seconds = runs.save_run(recipes.load(recipe)), {}
    idle = [f"_{s}_" for s in ("sft", "grpo") if s not in run.config.stages]
    # a folder that is named keeps the notebooks from asking for Google Drive
    os.environ["TUNEBOOK_RUNS"] = str(run.path.parent.resolve())
    os.environ["TUNEBOOK_RUN"] = run.config.name
    (run.path / "notebooks").mkdir(exist_ok=True)
    for source in sorted((runtime.ROOT / "notebooks").glob("0*.ipynb")):
        if any(stage in source.stem for stage in idle):
            continue
        notebook, start = nbformat.read(source, as_version=4), time.perf_counter()
        options = {"kernel_name": "python3", "extra_arguments": ["--log-level=ERROR"]}
        try:
            nbclient.execute(notebook, cwd=str(source.parent), **options)
        except nbclient.exceptions.CellExecutionError as error:
            sys.exit(f"{source.name} failed\n{error}")
        finally:
            nbformat.write(notebook, run.path / "notebooks" / source.name)
        seconds[source.stem] = round(time.perf_counter() - start, 1)
        print(f"{source.name} {seconds[source.stem] / 60:.1f} min", flush=True)
    run.write_part("notebooks", {"seconds": seconds})
    return run


if __name__ == "__main__":
    try:
        show(execute(*sys.argv[1:] or ["demo"]))
    except TunebookError as error:
        sys.exit(f"{type(error).__name__}: {error}")
