# `make serve` and `make test` work on a fresh clone: they need Python 3.11 or newer, make and git, and install the rest
# into .venv. Stamps in .venv make a second run quick.

PORT ?= 8000
ARGS ?=
JOBS ?= 2
TARGET ?= cuda
IMAGE ?= appliance
BUILDER ?= docker
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' appliance/__init__.py)
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: help serve install install-dev test test-image image lock lock-local lint format clean

help:
	@echo "make serve [PORT=8000] [ARGS=...]  install, then serve the built-in model (ARGS: see ./entrypoint.py serve --help)"
	@echo "make test [ARGS=...]               every test that needs no GPU (GPU tests too where there is one)"
	@echo "make lint                          ruff, mypy --strict, import-linter, hadolint"
	@echo "make image [TARGET=cuda]           build the image with docker (BUILDER=buildah: with buildah)"
	@echo "make test-image                    build it on Debian with buildah and run it (root; see tests/container)"
	@echo "make lock | lock-local             write requirements-cuda.lock | requirements-local.lock"
	@echo "make install | install-dev         only make the environment in .venv"
	@echo "make clean                         remove .venv and tool caches; the model cache stays"

serve: $(VENV)/.installed
	@$(PY) entrypoint.py serve --port $(PORT) $(ARGS)

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

test: $(VENV)/.installed-dev
	$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# Builds and runs the image; needs root, buildah, crun and debootstrap, and says what is missing.
test-image: $(VENV)/.installed-dev
	$(PY) -m pytest -m image tests/container $(ARGS)

# The image for NVIDIA GPUs from the committed lock; TARGET=local from requirements-local.lock. ARGS: more for the builder.
image:
	$(BUILDER) build $(if $(filter %buildah %podman,$(BUILDER)),--format docker) $(if $(BASE),--build-arg BASE=$(BASE)) --build-arg TARGET=$(TARGET) --build-arg VERSION=$(VERSION) \
	  --build-arg REVISION=$$(git rev-parse HEAD) --build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) \
	  --tag $(IMAGE):$(VERSION) $(ARGS) .

# Every wheel of the GPU image by hash, for any Python from 3.11 on, as the public index has them.
lock: $(VENV)/.installed-dev
	$(VENV)/bin/uv pip compile pyproject.toml --extra cuda --extra otel --extra pinned --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --quiet --output-file requirements-cuda.lock $(ARGS)

# What pip installs here, from the indexes that it is configured with, for the Python in .venv.
lock-local: $(VENV)/.installed-dev
	$(PY) tests/container/lock_local.py requirements-local.lock

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/hadolint Dockerfile

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
