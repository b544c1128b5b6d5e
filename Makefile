# `make demo` compiles a real exported model and shows the speed-up; `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint fuzz cuda-matrix clean
demo: $(VENV)/ready
	$(RUN) examples/demo.py

test: $(VENV)/ready
	$(RUN) -m pytest

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet -c constraints.txt -e '.[dev,torch,examples]'
	touch $@

N ?= 100000
fuzz: $(VENV)/ready
	$(RUN) -m tests.passes.fuzz $(N)

# Every CUDA kernel family for every architecture: registers, spills and instructions. Needs nvcc 13 and patience.
cuda-matrix: $(VENV)/ready
	$(RUN) -m pytest -m cuda_matrix tests/schedules

clean:
	rm -rf $(VENV) build dist *.egg-info
