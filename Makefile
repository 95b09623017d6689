# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow train calibrate lint clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python demo/demo.py

# Two processes of one thread each: compilers and Python keep both cores of a small machine busy.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

train: $(STAMP)
	$(BIN)/python demo/train.py --resume

calibrate: $(STAMP)
	$(BIN)/python demo/train.py --write-training build/stdlib.txt
	$(BIN)/qmamba calibrate demo/tiny-mamba2 --data build/stdlib.txt --out demo/tiny-mamba2/calibration.safetensors \
		--flush-interval 1 --esr-batch 8

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and pinned: a range lets pip take a newer build with gigabytes of CUDA packages.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --progress-bar off --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
