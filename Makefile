# Every target makes what it needs by itself, with plain pip. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out/demo
# Much of the suite waits, for leases and deadlines: two of its files run side by side.
TEST_PROCESSES ?= 2
REPEAT ?= 1
# The oldest torch that pyproject.toml admits has an environment of its own, and runs what meets torch closely.
OLDEST_VENV  ?= .venv-oldest
OLDEST_TORCH := $(shell sed -nE 's/^ *"torch>=([0-9.]+),.*/\1/p' pyproject.toml)
OLDEST_TESTS := $(addprefix tests/,docs/test_install.py moe/test_experts.py moe/test_gradients.py moe/test_ranks.py \
	$(addprefix launcher/,test_agent.py test_mesh.py test_plugin.py test_torch_private.py test_torchrun.py) \
	$(addprefix storage/,test_checkpointer.py test_dcp.py test_exchange.py test_metadata.py test_sharded.py \
		test_state.py test_state_ranks.py test_stock.py test_torch_private.py))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The suite starts hundreds of processes: without bytecode on disk each would compile the project anew.
unexport PYTHONDONTWRITEBYTECODE

DEPLOY_TOOLS := slurmctld slurmd slurm-client systemd shellcheck

.PHONY: help demo test test-whole test-variants test-sim test-oldest test-upstream fuzz chaos check-deploy check-gpu bench-start bench-recovery bench-rendezvous bench-meeting bench-metadata bench-storage bench-stall bench-restore bench-tiny bench-plan bench-startup bench-train bench-hot check format lint types layers clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: `demo` installs no test tools, `dev` installs everything.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.demo

$(OLDEST_VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST_VENV)
	grep -v '^torch==' constraints.txt > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_VENV)/bin/pip install --quiet --constraint $(OLDEST_VENV)/constraints.txt \
		'torch==$(OLDEST_TORCH).*' --editable '.[dev]'
	@touch $@

demo: $(VENV)/.demo ## train a small MoE over two nodes, lose one, go on, take it back
	$(BIN)/elastic-moe demo --out $(OUT)

test: $(VENV)/.dev ## the whole test suite
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder # but by tests/order.py

test-whole: $(VENV)/.dev ## the suite with every case of the tables of which it takes a sample; 40 minutes on two cores
	SUITE_WHOLE=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-variants: $(VENV)/.dev ## all of tests/moe with layers that are computed again, and compiled; with inductor where a C++ compiler is; MOE_TESTS=PATH for some of them
	$(BIN)/python -m tests.moe --processes $(TEST_PROCESSES) $(MOE_TESTS)

test-sim: $(VENV)/.dev ## the membership through ten thousand lives with faults, under virtual time
	$(BIN)/python -m tests.sim 0 10000
	BUCKET_SEEDS=10000 $(BIN)/python -m pytest -q tests/launcher/test_bucket_journal.py

test-oldest: $(OLDEST_VENV)/.dev ## the core of the suite on the oldest torch that is supported; PyPI's is some gigabytes
	$(OLDEST_VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile \
		-W 'ignore:TypedStorage is deprecated:UserWarning' $(OLDEST_TESTS) # stock DCP's writer in 2.10 says so

fuzz: $(VENV)/.dev ## 10,000 damages to the files of a run: right bytes, the older checkpoint, or an error of our own
	$(BIN)/python -W ignore -m tests.fuzz

chaos: $(VENV)/.dev ## real faults against nodes and checkpoint services, on every kind of etcd; REPEAT=5 does it five times
	for i in $$(seq $(REPEAT)); do SUITE_WHOLE=1 CHAOS_STORES=plain,secure,beside CHAOS_AWAY_S=30 $(BIN)/python -m pytest -n $(TEST_PROCESSES) tests/chaos || exit 1; \
		SUITE_WHOLE=1 CHAOS_STORES=folder,s3 $(BIN)/python -m pytest -n $(TEST_PROCESSES) tests/chaos/test_nodes.py || exit 1; \
		SUITE_WHOLE=1 CHAOS_SAVES=service,direct $(BIN)/python -m pytest -n $(TEST_PROCESSES) tests/chaos/test_nodes.py || exit 1; done
	SUITE_WHOLE=1 FAULTS_SAVED_BY=service $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile tests/storage/test_s3_faults.py tests/storage/test_s3_fault_ranks.py
	SUITE_WHOLE=1 SERVICE_KILLS=20 SERVICE_SAVES=1000 ODD_SEEDS=2000 $(BIN)/python -m pytest -n $(TEST_PROCESSES) tests/storage/test_service_deaths.py tests/storage/test_service_growth.py tests/storage/test_service_odd.py

check-deploy: $(VENV)/.dev ## the files in deploy/, on a real Slurm and by systemd's own analysis; installs those from Debian
	dpkg --status $(DEPLOY_TOOLS) >/dev/null 2>&1 || \
		{ apt-get update && apt-get install --yes --no-install-recommends $(DEPLOY_TOOLS); }
	ELASTIC_MOE_CHECK_DEPLOY=1 $(BIN)/python -m pytest tests/deploy

test-upstream: $(VENV)/.dev ## torch's own tests of DCP on our storage: make test-upstream TORCH_SOURCES=/path/to/pytorch
	TORCH_SOURCES="$(TORCH_SOURCES)" $(BIN)/python -m tests.upstream

check-gpu: $(if $(GPU_PYTHON),,$(VENV)/.dev) ## what needs a GPU to be seen, in at most 6 minutes without a network; GPU_PYTHON=python3 takes that one as it is
	$(or $(GPU_PYTHON),$(BIN)/python) -m tests.gpu

bench-start: $(VENV)/.dev ## from the command to the end of a job that does nothing, ours and torchrun in turn
	$(BIN)/python -m tests.bench.start

bench-recovery: $(VENV)/.dev ## from a fault to the next step, ours and stock torchrun in turn; what the real trainer does again
	$(BIN)/python -m tests.bench.recovery
	$(BIN)/python -m tests.bench.trainer_recovery

bench-rendezvous: $(VENV)/.dev ## how fast 8 to 512 nodes form a round, beside torch's c10d
	$(BIN)/python -m tests.bench.rendezvous

bench-meeting: $(VENV)/.dev ## nodes that meet in a folder and on S3: how fast rounds form, losses are mended, and what it costs
	$(BIN)/python -m tests.bench.meeting

bench-metadata: $(VENV)/.dev ## from an index of 256k entries to every rank's plan, beside stock DCP
	$(BIN)/python -m tests.bench.metadata

bench-storage: $(VENV)/.dev ## saves to S3 and loads from it, beside stock DCP on s3fs, s3torchconnector and raw GETs
	$(BIN)/python -m tests.bench.storage

bench-stall: $(VENV)/.dev ## what a save costs a training that goes on, ours and dcp.async_save in turn
	$(BIN)/python -m tests.bench.stall

bench-tiny: $(VENV)/.dev ## how far a job of defaults comes in ten minutes, and whether all of its experts are used
	$(BIN)/python -m tests.bench.tiny_loss

bench-restore: $(VENV)/.dev ## a state out of its node's memory, another node's, and S3
	$(BIN)/python -m tests.bench.restore_tiers
	$(BIN)/python -m tests.bench.join_pause

bench-plan: $(VENV)/.dev ## what the planner says of memory and step times, and what is measured
	$(BIN)/python -m tests.bench.plan

bench-startup: $(VENV)/.dev ## from a worker's start to its first step, resumed and not, by the model's size
	$(BIN)/python -m tests.bench.startup

bench-train: $(VENV)/.dev ## our layer of experts and our step beside transformers', a loop and a dense model; QUICK=--quick in three minutes
	$(BIN)/python -W ignore -m tests.bench.train $(QUICK)

bench-hot: $(VENV)/.dev ## steps where few experts get most tokens, with and without replicas of these
	$(BIN)/python -W ignore -m tests.bench.hot_experts

check: lint types layers test ## what CI runs

format: $(VENV)/.dev ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports

clean: ## remove the virtual environment and every generated file
	rm -rf $(VENV) $(OLDEST_VENV) out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
