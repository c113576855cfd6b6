# Everything sets up what it needs, and works twice.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: help demo test check unit bench clean

help:
	@echo "make demo    a containerd comes up and an image is pulled into it (IMAGE=... to choose)"
	@echo "make test    everything that must hold: formatting, types, all tests"
	@echo "make check   formatting and types only"
	@echo "make unit    the tests that need no servers"
	@echo "make bench   speed and memory, side by side with ctr"
	@echo "make clean   remove what the above made in this directory"

# One stamp per state of the requirements: a changed pin installs again, an unchanged one costs
# nothing.
$(VENV)/stamp: pyproject.toml constraints.txt scripts/venv
	scripts/venv $(PYTHON) $(VENV)

demo: $(VENV)/stamp
	scripts/need containerd:containerd runc:runc docker-registry:docker-registry busybox:busybox-static
	PYTHONPATH=. $(BIN)/python scripts/demo.py

check: $(VENV)/stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin
	$(BIN)/mypy --platform win32

unit: $(VENV)/stamp
	$(BIN)/python -m pytest tests/unit $(ARGS)

test: check
	scripts/setup-tests
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/stamp
	scripts/need containerd:containerd runc:runc docker-registry:docker-registry
	PYTHONPATH=. $(BIN)/python -m bench $(ARGS)

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
	find . -name __pycache__ -prune -exec rm -rf {} +
