# Everything runs in .venv, made on the first use. `make demo` shows the library, `make test` tests it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := $(VENV)/transformers-5.14
LMCACHE := $(VENV)/lmcache
LMCACHE_PINS := tests/integrations/lmcache.txt

.PHONY: demo test check test-oldest test-lmcache lint types layers slow bench-quality bench-attention bench-memory bench-latency tables clean

demo: $(READY)
	@$(BIN)/kvcomp generate --compare

test: $(READY)
	$(BIN)/pytest

check: lint types layers test test-oldest test-lmcache

# The integration under the oldest transformers that is supported; the constraints pin the newest.
test-oldest: $(OLDEST)/.ready
	PYTHONPATH=$(OLDEST) $(BIN)/pytest tests/integrations

# The adapter under LMCache, which brings so much that it gets a directory of its own.
test-lmcache: $(LMCACHE)/.ready
	KVCOMP_REQUIRE_LMCACHE=1 PYTHONPATH=$(LMCACHE) $(BIN)/pytest tests/integrations/test_lmcache.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

slow: $(READY)
	$(BIN)/pytest -m slow

bench-%: $(READY)
	$(BIN)/python benchmarks/$(if $(filter attention,$*),attention_cpu,$*).py

tables: $(READY)
	$(BIN)/python benchmarks/tables.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("kvcomp needs Python 3.11 or later; try: make PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || (echo "making $(VENV) failed; on Debian and Ubuntu: apt-get install python3-venv" && false)
	@echo "setting up $(VENV), once"
	@$(BIN)/pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cli,plots,serve]' --group dev
	@touch $@

$(OLDEST)/.ready: $(READY)
	@$(BIN)/pip install --quiet --disable-pip-version-check --target $(OLDEST) transformers==5.14.0 'numpy==$(shell sed -n s/^numpy==//p constraints.txt)'
	@touch $@

$(LMCACHE)/.ready: $(READY) $(LMCACHE_PINS)
	@rm -rf $(LMCACHE)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(LMCACHE) --requirement $(LMCACHE_PINS)
	@touch $@

clean:
	rm -rf $(VENV)
