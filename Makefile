# Everything a developer runs, from a machine that has Python 3.11 or later and nothing else. `make help` lists it.

PYTHON ?= python3
VENV := .venv
VENV_PROTOS := .venv-protos
BIN := $(VENV)/bin
PIP_FLAGS := -qq --disable-pip-version-check
STAMP := $(VENV)/.stamp
STAMP_PROTOS := $(VENV_PROTOS)/.stamp
PIP_PIN := $(shell grep '^pip==' constraints.txt)
# what `make test` leaves out; `make test PYTEST_ARGS=tests/tree` runs less, `PYTEST_ARGS=` runs all
PYTEST_ARGS ?= -m "not soak and not e2e"
# how many processes `make test` runs tests in; 0: in its own, for a debugger or output as it comes
TEST_JOBS ?= 2
# what `make soak` does: SIGKILLs in all, and the longest that it may take (timeout's notation)
SOAK_KILLS ?= 500
SOAK_TIME ?= 60m
# the longest that all tests of real engines together may take
E2E_TIME ?= 25m

.DEFAULT_GOAL := help
.PHONY: help venv demo test soak e2e lint format protos protos-check wheel-test bench gpu clean

help: ## list these targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/\1|\2/' | awk -F'|' '{printf "  make %-13s %s\n", $$1, $$2}'

venv: $(STAMP) ## create or refresh .venv: the package (editable), torch, the development tools

demo: $(STAMP) ## start a sidecar with a client beside it and show what it does
	$(BIN)/hicache demo

test: $(STAMP) ## run the tests (all but soak and e2e)
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

soak: $(STAMP) ## run the soak tests: 500 x kill -9, power cuts, churn, long walks (SOAK_TIME=60m at most)
	HICACHE_TEST_KILLS=$(SOAK_KILLS) timeout --foreground $(SOAK_TIME) $(BIN)/python -m pytest -s -m soak --timeout 3600

e2e: $(STAMP) ## make .venv-vllm and its like, run the tests with real engines in them (E2E_TIME=25m at most)
	tests/engines/venvs/setup
	@timeout --foreground $(E2E_TIME) $(BIN)/python -m pytest -m e2e tests/engines; rc=$$?; \
	if [ $$rc != 1 ]; then exit $$rc; fi; \
	echo "[e2e] once more, what failed: engines have deadlines, and this machine other work"; \
	timeout --foreground 8m $(BIN)/python -m pytest -m e2e --last-failed --last-failed-no-failures none tests/engines

lint: $(STAMP) protos-check ## check format, style, types, floors and generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## format the code and apply the safe fixes
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

protos: $(STAMP_PROTOS) ## generate hicache/rpc/pb from protos/
	$(VENV_PROTOS)/bin/python protos/generate.py

protos-check: $(STAMP_PROTOS) ## fail where hicache/rpc/pb is not what protos/ generates
	$(VENV_PROTOS)/bin/python protos/generate.py --check

wheel-test: $(STAMP) ## build sdist and wheel, install the wheel without torch elsewhere, try it
	.ci/wheel-test

bench: $(STAMP) ## measure our side (bench/README.md tells how to put peers beside it)
	$(BIN)/python bench/engine.py
	$(BIN)/python bench/tree.py --only ours --name tree-ours
	$(BIN)/python bench/host.py
	$(BIN)/python bench/start.py
	$(BIN)/python bench/rpc.py --no-peer
	$(BIN)/python bench/codec.py --no-peers --cases gauss zeros bytes --name codec-ours
	$(BIN)/python bench/disk.py --no-peers --kind gauss
	$(BIN)/python bench/recovery.py
	$(BIN)/python bench/restart.py --repetitions 1
	$(BIN)/python bench/churn.py
	$(BIN)/python bench/replay.py --name replay-ours

# Not .venv: its torch has no CUDA. GPU_PYTHON is one that has torch with CUDA, triton and pytest.
GPU_PYTHON ?= python3
gpu: ## on a machine with a GPU: its tests, then its benches (docs/GPU.md)
	@$(GPU_PYTHON) -c "import torch; torch.cuda.is_available() or print('[gpu] no GPU here: the tests run without one, then the bench ends with an error')"
	PYTHONPATH=. $(GPU_PYTHON) -m pytest -p no:cacheprovider tests/gpu tests/device tests/stores -m "not soak"
	PYTHONPATH=. $(GPU_PYTHON) bench/gpu.py

clean: ## remove environments, caches and build output
	rm -rf $(VENV) .venv-* build dist .coverage htmlcov .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Rebuilt when the dependencies change; the install is editable, so a source edit needs nothing.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hicache needs Python 3.11 or later; set PYTHON=")'
	@test -x $(BIN)/python || { echo "[env] creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "[env] pip itself"
	@$(BIN)/python -m pip install $(PIP_FLAGS) $(PIP_PIN)
	@echo "[env] hicache with torch, transformers and the development tools (the first time takes minutes)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt --build-constraint constraints.txt -e '.[torch,transformers,events]' --group dev
	@touch $@
	@echo "[env] $(VENV) is ready"

$(STAMP_PROTOS): constraints-protos.txt
	@echo "[protos] creating $(VENV_PROTOS)"
	@test -x $(VENV_PROTOS)/bin/python || $(PYTHON) -m venv $(VENV_PROTOS)
	@$(VENV_PROTOS)/bin/python -m pip install $(PIP_FLAGS) -r constraints-protos.txt
	@touch $@
