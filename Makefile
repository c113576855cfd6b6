# Everything sets up what it needs, and works twice.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: help demo test chaos check unit bench clean

help:
	@echo "make demo    a containerd comes up and an image is pulled into it (IMAGE=... to choose)"
	@echo "make test    everything that must hold: formatting, types, all tests"
	@echo "make chaos   pulls through a thousand plans of faults, killed at all moments, of a thousand stacks"
	@echo "make check   formatting and types only"
	@echo "make unit    the tests that need no servers"
	@echo "make bench   speed and memory, side by side with what you would use instead"
	@echo "make clean   remove what the above made in this directory"

# One stamp per state of the requirements: a changed pin installs again, an unchanged one costs
# nothing.
$(VENV)/stamp: pyproject.toml constraints.txt scripts/venv
	scripts/venv $(PYTHON) $(VENV)

demo: $(VENV)/stamp
	scripts/need containerd:containerd runc:runc docker-registry:docker-registry busybox:busybox-static \
		iptables:iptables /usr/lib/cni/bridge:containernetworking-plugins
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
	$(BIN)/python -m pytest $(ARGS); code=$$?; echo $$code >.cache/pytest-exit; exit $$code

# Of these, 'make test' runs a slice.
chaos: $(VENV)/stamp
	scripts/setup-tests
	SERPENTINE_TEST_CHAOS=1000 SERPENTINE_TEST_KILLS=100 SERPENTINE_TEST_DAEMON_KILLS=30 \
		SERPENTINE_TEST_STACKS=1000 \
		$(BIN)/python -m pytest tests/integration/test_chaos.py \
		tests/integration/test_unpack_parallel.py \
		tests/integration/test_pull_killed.py \
		tests/integration/daemon/test_container_killed.py $(ARGS)

bench: $(VENV)/stamp
	scripts/setup-tests
	scripts/need igzip:isal zstd:zstd
	scripts/buildkit
	PYTHONPATH=. $(BIN)/python -m bench $(ARGS)

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
	find . -name __pycache__ -prune -exec rm -rf {} +
