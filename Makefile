# Needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
comma := ,
# the tests start hundreds of processes, and importing torch takes more than twice as long without bytecode
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo format lint test test-all test-page docs bench bench-all gpu gpu-pack
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: demo/results.json  ## train one small model at N = 1, 2 and 4, export it and draw the comparison in demo/
	@echo "the demo is in demo/; remove that folder to run it again"

demo/results.json: | .venv/installed
	$(BIN)/zoo demo

format: .venv/installed  ## format the code and apply the safe fixes of the linter
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lint: .venv/installed  ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint  ## lint, then run every test that is fast enough for every change
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
	@echo "not run: the server's page in a browser (make test-page)"

# kernels for every GPU architecture and beside those of other projects, adapters to other libraries, streams that run for long
test-all: test .venv/extended .venv/triton-server  ## also run the slow tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m extended

test-page: .venv/installed  ## test the page of the server in Chromium, which must be installed with its driver
	$(BIN)/pytest -m page

docs: .venv/installed  ## build the documentation site in build/site; any warning or broken link is an error
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs -d build/doctrees . build/site
	@echo "open build/site/index.html"

# beside transformers; writes benchmarks/results/ and docs/performance.md
bench: .venv/bench  ## run the CPU benchmarks, in half an hour
	$(BIN)/python -m benchmarks

bench-all: .venv/bench  ## run the CPU benchmarks, those that take long too
	$(BIN)/python -m benchmarks --all

# docs/gpu.md: on a GPU with the python3 found there, whose packages stay as they are; DRY=1 rehearses on the CPU
gpu:  ## run the GPU benchmarks, or STAGES=a,b of them, for at most SECONDS; DRY=1: tiny, on the CPU
ifdef DRY
	rm -rf build/gpu/dry
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu --dry --seconds $(or $(SECONDS),580) $(subst $(comma), ,$(STAGES))
else
	PYTHONPATH=build/gpu/site $(PYTHON) -m benchmarks.gpu --seconds $(or $(SECONDS),470) $(subst $(comma), ,$(STAGES))
endif

gpu-pack: .venv/installed  ## prepare in build/gpu what a GPU machine without a package registry lacks
	$(BIN)/python -m benchmarks.gpu.pack

.venv/bench: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

.venv/extended: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[integrations,peers]'
	touch $@

# a Triton Inference Server; its Python client, which no test needs, wants an older NumPy
.venv/triton-server: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps nvidia-pytriton==0.7.0
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev,docs,onnx,serve,tensorrt-rtx,triton]'
	touch $@
