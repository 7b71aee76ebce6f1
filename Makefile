# make demo    the whole series on the offline model, then its table
# make chat    a web page to talk to a run's model, the demo's or RUN=name
# make test    lint, types, tests, and every notebook
# All set up .venv first; PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
RUN ?= demo
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo outputs site chat test lint notebooks-test repository clean

setup: $(BIN)/python
	@$(BIN)/python helpers/install.py requirements-gguf.txt

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

demo: setup
	@$(BIN)/python -m helpers demo

# the demo's outputs into notebooks/*.ipynb, cleaned
outputs: demo
	@$(BIN)/python helpers/install.py requirements-dev.txt
	@$(BIN)/python benchmarks/outputs.py runs/demo

# notebooks and docs as pages, in site/
site: $(BIN)/python
	@$(BIN)/python helpers/install.py requirements-dev.txt
	@$(BIN)/python benchmarks/site.py

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

# make repository URL=https://github.com/me/tunebook  writes the address everywhere; the
# figures' too, as Colab has no files beside a notebook
repository:
	@old=$$(sed -n 's/^Repository = "\(.*\)"/\1/p' pyproject.toml); \
	old=$${old#https://github.com/}; new=$(patsubst https://github.com/%,%,$(URL)); \
	test -n "$$new" || { echo "give URL=https://github.com/owner/name"; exit 2; }; \
	raw=https://raw.githubusercontent.com; \
	sed -i "s#github.com/$$old#github.com/$$new#g; s#github/$$old/#github/$$new/#g; \
	  s#$$raw/$$old/#$$raw/$$new/#g" pyproject.toml README.md notebooks/*.ipynb; \
	sed -i "s#](figures/#]($$raw/$$new/main/notebooks/figures/#g" notebooks/*.ipynb

clean:
	rm -rf $(VENV) runs
