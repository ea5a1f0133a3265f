# Every command a person needs. `make help` lists them.
#
# Two environments: .venv is what a user has (the wheel, no torch), .venv-dev is what a developer
# has (an editable install, the oracles of the tests). Files under .stamps/ in them remember what
# has been done, so that a second run does only what has changed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
USER := .venv
DEV := .venv-dev
PIP := -m pip --disable-pip-version-check install --quiet
QUESTION ?= Why is the sky blue? Answer in two sentences.
PICTURE ?= a red circle above a blue square
PAINTER := packages/fuserve-demo-diffusion

NATIVE := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt pyproject.toml
PAINTING := $(shell find $(PAINTER) -type f -not -name '*.pyc' 2>/dev/null)
PACKAGE := $(shell find src -type f -not -name '*.pyc') README.md
WHEEL := dist/.stamp

.PHONY: help demo serve test bench serving soak kernels lint format lock footprint build clean

help:  ## List the commands.
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(USER)/.stamps/fuserve $(USER)/.stamps/demo  ## Install fuserve, let small models answer and paint.
	@$(USER)/bin/fuserve generate --model demo --chat --temperature 0 --max-tokens 200 "$(QUESTION)" </dev/null
	@mkdir -p build
	@$(USER)/bin/fuserve image --model demo-diffusion --guidance-scale 2 --seed 7 --out build/demo.png "$(PICTURE)" </dev/null

serve: $(USER)/.stamps/fuserve $(USER)/.stamps/demo  ## Serve the small model, with a web page to try it.
	@$(USER)/bin/fuserve serve --model demo

test: $(DEV)/.stamps/fuserve  ## Run all tests (T=... selects some).
	$(DEV)/bin/python -m pytest $(T)

bench: $(DEV)/.stamps/fuserve  ## Print fuserve beside its peers (builds llama.cpp, installs OpenVINO once).
	$(DEV)/bin/python benchmarks/llm_peers.py --write-readme

serving: $(DEV)/.stamps/fuserve  ## Print fuserve's server beside llama.cpp's and beside static batches.
	$(DEV)/bin/python benchmarks/serving_peers.py --write-docs

soak: $(DEV)/.stamps/fuserve  ## Use a server in every way for some minutes; nothing may grow (M=15).
	$(DEV)/bin/python benchmarks/soak.py --minutes $(or $(M),15)

kernels: $(DEV)/.stamps/fuserve  ## Print each kernel beside the machine's ceilings and torch (Q=--quick).
	$(DEV)/bin/python benchmarks/kernels.py $(Q)

lint: $(DEV)/.stamps/fuserve  ## Check style, types and who imports whom.
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports
	! git grep -nE '^(<{7} |>{7} )'  # a merge left half done
	find csrc -name '*.cpp' -o -name '*.h' | xargs -r $(DEV)/bin/clang-format --dry-run -Werror

format: $(DEV)/.stamps/tools  ## Rewrite the sources in the project's style.
	$(DEV)/bin/ruff check --fix --exit-zero .
	$(DEV)/bin/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' | xargs -r $(DEV)/bin/clang-format -i

lock: $(DEV)/.stamps/tools  ## Pin the versions that are installed now.
	$(DEV)/bin/python requirements/lock.py

build: $(WHEEL)  ## Build the wheel into dist/.

footprint: $(WHEEL)  ## Measure what an installation takes on disk; fails over the limit.
	$(PYTHON) .ci/footprint.py dist/fuserve-*.whl --limit-mb 150 --serve-limit-mb 165

clean:  ## Remove everything that was built or installed here.
	rm -rf $(USER) $(DEV) build dist .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(USER)/.stamps/created $(DEV)/.stamps/created:
	$(PYTHON) -m venv $(dir $(@D))
	mkdir -p $(@D)
	touch $@

# The wheel is built apart from both environments, as anyone's pip would build it.
$(WHEEL): $(NATIVE) $(PACKAGE) requirements/build.txt | $(USER)/.stamps/created
	rm -rf dist
	PIP_CONSTRAINT=requirements/build.txt $(USER)/bin/python -m pip \
	  --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	touch $@

$(USER)/.stamps/core: requirements/core.txt requirements/serve.txt | $(USER)/.stamps/created
	$(USER)/bin/python $(PIP) -r requirements/serve.txt
	touch $@

$(USER)/.stamps/demo: requirements/demo.txt requirements/image.txt $(PAINTING) | $(USER)/.stamps/created
	$(USER)/bin/python $(PIP) -r requirements/image.txt
	$(USER)/bin/python $(PIP) --no-deps -r requirements/demo.txt ./$(PAINTER)
	touch $@

$(USER)/.stamps/fuserve: $(WHEEL) $(USER)/.stamps/core
	$(USER)/bin/python $(PIP) --no-deps --force-reinstall dist/fuserve-*.whl
	touch $@

$(DEV)/.stamps/tools: requirements/core.txt requirements/serve.txt requirements/dev.txt requirements/demo.txt requirements/torch.txt | $(DEV)/.stamps/created
	$(DEV)/bin/python $(PIP) -r requirements/torch.txt
	$(DEV)/bin/python $(PIP) -r requirements/dev.txt
	$(DEV)/bin/python $(PIP) --no-deps -r requirements/demo.txt --editable ./$(PAINTER)
	touch $@

# Editable: Python files are used where they lie, the native core is rebuilt when it changes.
$(DEV)/.stamps/fuserve: $(NATIVE) $(DEV)/.stamps/tools
	PATH="$(abspath $(DEV))/bin:$$PATH" $(DEV)/bin/python $(PIP) --no-deps --no-build-isolation \
	  --config-settings=build-dir=build/editable --editable .
	touch $@
