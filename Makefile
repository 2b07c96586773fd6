# `make serve` and `make test` work on a fresh clone: they need Python 3.11 or newer, make and git, and install the rest
# into .venv. Stamps in .venv make a second run quick.

PORT ?= 8000
ARGS ?=
JOBS ?= 2
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: help serve install install-dev test lint format clean

help:
	@echo "make serve [PORT=8000] [ARGS=...]  install, then serve the built-in model (ARGS: see ./entrypoint.py serve --help)"
	@echo "make test [ARGS=...]               every test that needs no GPU (GPU tests too where there is one)"
	@echo "make lint                          ruff, mypy --strict, import-linter"
	@echo "make install | install-dev         only make the environment in .venv"
	@echo "make clean                         remove .venv and tool caches; the model cache stays"

serve: $(VENV)/.installed
	@$(PY) entrypoint.py serve --port $(PORT) $(ARGS)

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

test: $(VENV)/.installed-dev
	$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info

# The first Python that is new enough and can make environments; PYTHON=... chooses one.
$(PY):
	@for python in $(PYTHON) python3 python3.12 python3.11 python3.13; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $(VENV) with $$("$$python" --version)"; "$$python" -m venv --clear $(VENV); exit; \
	  fi; \
	done; \
	echo "error: no Python 3.11 or newer with the venv module; install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
	exit 1

$(VENV)/.installed: pyproject.toml | $(PY)
	@echo "installing into $(VENV) (torch is large: this takes minutes the first time)"
	$(PY) -m pip install --disable-pip-version-check -e ".[pinned]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(PY)
	@echo "installing into $(VENV) (torch is large: this takes minutes the first time)"
	$(PY) -m pip install --disable-pip-version-check -e ".[pinned,dev]"
	@touch $(VENV)/.installed $@
