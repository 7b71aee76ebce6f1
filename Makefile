# `make` alone offers these. All set up .venv first; PYTHON=python3.12 chooses another
# interpreter.
define MENU
  setup      install everything into .venv
  try        notebooks 00 to 04 in the smallest sizes, then a table (4 minutes)
  demo       the series on the offline model, then its table (21 minutes)
  train      your rows, a config, or a recipe of docs/recipes.md:   FROM=mine.jsonl
  evaluate   the models of a run on its held-out rows:              RUN=demo
  chat       a web page to talk to a run's model:                   RUN=demo
  lab        the notebooks in JupyterLab (VS Code: open the folder, choose .venv)
  test       lint, types, tests, and every notebook
endef
export MENU

PYTHON ?= python3
RUN ?= demo
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: menu setup try demo train evaluate outputs site chat lab test lint notebooks-test repository clean

menu:
	@$(PYTHON) -c "import sys; v = sys.version_info; print(f'Python {v[0]}.{v[1]}', \
	  '' if (3, 11) <= v < (3, 14) else '- 3.11 to 3.13 is needed: PYTHON=python3.12')"
	@test -x $(BIN)/python && echo ".venv is there" || echo ".venv will be made"
	@echo "$$MENU"
	@if [ -t 0 ]; then printf "which one? "; read -r choice; if [ -n "$$choice" ]; \
	  then $(MAKE) --no-print-directory $$choice; fi; fi

setup: $(BIN)/python
	@$(BIN)/python helpers/install.py requirements-gguf.txt

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

try: setup
	@$(BIN)/python benchmarks/series.py smoke

train: setup
	@test -n "$(FROM)" || { echo "give FROM=mine.jsonl, a config or a recipe"; exit 2; }
	@$(BIN)/python -m helpers train $(FROM)

evaluate: setup
	@$(BIN)/python -m helpers evaluate $(RUN)

lab: setup
	@$(BIN)/python helpers/install.py requirements-dev.txt
	@$(BIN)/python -m jupyterlab --LabApp.default_url=/lab/tree/notebooks \
	  $(if $(filter 0,$(shell id -u)),--allow-root)

demo: setup
	@$(BIN)/python benchmarks/series.py demo

# the demo's outputs into notebooks/*.ipynb, cleaned
outputs: demo
	@$(BIN)/python helpers/install.py requirements-dev.txt
	@TQDM_DISABLE=1 $(BIN)/python -m nbconvert --log-level=ERROR --execute --to notebook \
	  --output-dir runs/demo/notebooks notebooks/quickstart.ipynb
	@$(BIN)/python benchmarks/outputs.py runs/demo

# notebooks and docs as pages, in site/
site: $(BIN)/python
	@$(BIN)/python helpers/install.py requirements-dev.txt
	@$(BIN)/python benchmarks/pages.py

chat: $(BIN)/python
	@$(BIN)/python helpers/install.py requirements-chat.txt requirements-gguf.txt
	@$(BIN)/python -m helpers chat $(RUN)

test: $(BIN)/python
	@$(BIN)/python helpers/install.py requirements-dev.txt requirements-gguf.txt \
	  requirements-export.txt requirements-chat.txt
	@$(MAKE) --no-print-directory lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
	@$(MAKE) --no-print-directory notebooks-test

lint:
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# the notebooks themselves, in order, with the answers to their exercises, on the real
# offline model with every size cut down
notebooks-test:
	@rm -rf runs/smoke runs/smoke-notebooks
	@$(BIN)/python -m tests.lessons runs/smoke-notebooks
	@TUNEBOOK_RUN=smoke $(BIN)/python -m pytest --nbmake --nbmake-timeout=1800 \
	  -p no:cacheprovider runs/smoke-notebooks

# writes the address everywhere: that of git's origin, or URL=https://github.com/me/tunebook;
# the figures' too, as Colab has no files beside a notebook
repository: URL ?= $(patsubst git@github.com:%,%,$(patsubst %.git,%,$(ORIGIN)))
repository: ORIGIN = $(shell git remote get-url origin 2>/dev/null)
repository:
	@old=$$(sed -n 's/^Repository = "\(.*\)"/\1/p' pyproject.toml); \
	old=$${old#https://github.com/}; new=$(patsubst https://github.com/%,%,$(URL)); \
	echo "$$new" | grep -Eqx '[^/]+/[^/]+' \
	  || { echo "give URL=https://github.com/owner/name"; exit 2; }; \
	raw=https://raw.githubusercontent.com; \
	sed -i "s#github.com/$$old#github.com/$$new#g; s#github/$$old/#github/$$new/#g; \
	  s#$$raw/$$old/#$$raw/$$new/#g" pyproject.toml README.md docs/*.md notebooks/*.ipynb; \
	sed -i "s#](figures/#]($$raw/$$new/main/notebooks/figures/#g" notebooks/*.ipynb

clean:
	rm -rf $(VENV) runs
