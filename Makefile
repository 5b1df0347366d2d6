# Every target sets up what it needs. PYTEST_ARGS="-k plan -x" narrows the tests.
PYTHON_BIN := .venv/bin/python
PYTEST_ARGS ?=
# make has exit codes of its own; .ci/run asks for pytest's here
STATUS_FILE ?= /dev/null
pytest = $(PYTHON_BIN) -m pytest $(1) $(PYTEST_ARGS) || { status=$$?; echo $$status >$(STATUS_FILE); exit $$status; }

.DEFAULT_GOAL := help
.PHONY: help venv venv-frameworks test-frameworks demo demo-quick experiment test test-full lint bench bench-docs bench-balance docs clean

help: ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null || cat $(MAKEFILE_LIST)

venv: ## .venv with all packages; finds or fetches Python 3.12 (scripts/venv.sh)
	@scripts/venv.sh

venv-frameworks: ## .venv-frameworks: Transformer Engine (importable), Megatron-Bridge, mcore-bridge; says how long
	@scripts/frameworks_venv.sh

demo: venv ## train a small vision-language model with and without ReGATE; report in out/demo
	$(PYTHON_BIN) examples/demo/run.py

demo-quick: venv ## the same in a few minutes
	$(PYTHON_BIN) examples/demo/run.py --quick

experiment: venv ## the learning experiment: real weights, three seeds, about half an hour on two free cores; results in out/experiments
	$(PYTHON_BIN) examples/experiments/run.py

test: venv ## the tests that take seconds each, two files at a time
	@$(call pytest,-n 2 --dist loadfile)

test-full: venv ## all tests
	@$(call pytest,-m "full or not full")

test-frameworks: venv venv-frameworks ## the tests of Megatron-Bridge, mcore-bridge and Transformer Engine, in it; and of MIMO
	@$(subst $(PYTHON_BIN),.venv-frameworks/bin/python,$(call pytest,-m "full or not full" tests/frameworks tests/te))
	@$(call pytest,-k mimo tests/multiprocess)

lint: venv ## style and formatting
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .

bench: venv ## step time, alternatives, planning, balance, teacher, memory: one table, results in out/bench
	$(PYTHON_BIN) benchmarks/run.py

bench-docs: venv ## put the last results of `make bench` into docs/benchmarks.md and README.md
	$(PYTHON_BIN) benchmarks/run.py --write-docs

bench-balance: venv ## positions run over simulated data-parallel ranks, per budget; table and picture in out/bench
	$(PYTHON_BIN) benchmarks/balance.py

docs: venv ## links resolve, tables agree with the code
	$(PYTHON_BIN) docs/check.py

clean: ## remove results and caches; .venv stays
	rm -rf out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
