# Two commands on a fresh machine (Python ≥ 3.11 and make): `make demo` and `make test`.
PYTHON ?= python3
MODEL ?= toy
DEMO_ARGS ?=
WORKERS ?= 2
PROMPTS ?= 24
PARTS ?=
# Small models run fastest on one thread; tests share the cores among workers. A real model takes all cores.
export OMP_NUM_THREADS ?= $(if $(filter toy planted,$(MODEL)),1,$(shell getconf _NPROCESSORS_ONLN))
export OMP_WAIT_POLICY ?= PASSIVE

# SmolLM2 needs two more packages, to read its weights and to merge the adapter.
EXTRA := $(if $(findstring smollm2,$(MODEL)),smollm2,demo)
PYTEST := -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: demo test check contract docs notebooks bench evidence evidence-oracles evidence-statistics evidence-heads evidence-neurons evidence-circuits evidence-checkpoints evidence-freezing evidence-views evidence-sharing evidence-sizing clean

demo: .venv/ready-$(EXTRA)
	@# 3: the study ran and stopped at its gate, which is an answer
	.venv/bin/rim-lens demo --model $(MODEL) $(DEMO_ARGS) || [ $$? -eq 3 ]

test: check .venv-tl3/ready-dev
	.venv/bin/python $(PYTEST)
	.venv-tl3/bin/python $(PYTEST)

check: .venv/ready-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

# The same numbers on the oldest supported TransformerLens.
contract: .venv-tl2/ready-dev
	.venv-tl2/bin/python $(PYTEST) -m family_contract

# The documentation, as docs/_build/index.html, with the notebooks run; a warning is an error.
docs: .venv/ready-docs
	.venv/bin/sphinx-build -W --keep-going -q docs docs/_build

# The notebooks as .ipynb files that have been run, for Jupyter.
notebooks: .venv/ready-docs
	.venv/bin/python docs/run_notebooks.py runs/notebooks

# Figures of speed beside their rivals, as docs/evidence/bench.json and docs/speed.md. Alone on one thread, or ratios are noise.
# PARTS="capture-1024 streaming" runs those alone (tests/benchmarks/__main__.py names all); the others' figures stay.
# Parts that end in -hooked run on TransformerLens 3, which has a HookedTransformer.
bench: TIMED := OMP_NUM_THREADS=1
bench: HOOKED := $(if $(PARTS),$(filter %-hooked,$(PARTS)),last-row-hooked all-rows-hooked)
bench: OTHERS := $(filter-out %-hooked,$(PARTS))
bench: .venv/ready-dev .venv-tl3/ready-dev
	$(if $(PARTS),$(if $(OTHERS),$(TIMED) .venv/bin/python -m tests.benchmarks --prompts $(PROMPTS) $(OTHERS)),$(TIMED) .venv/bin/python -m tests.benchmarks --prompts $(PROMPTS))
	$(if $(HOOKED),$(TIMED) .venv-tl3/bin/python -m tests.benchmarks --prompts $(PROMPTS) $(HOOKED))
	$(if $(PARTS),,$(TIMED) .venv/bin/python -m tests.benchmarks.recall)
	$(if $(PARTS),,$(TIMED) .venv/bin/python -m tests.benchmarks.growth)

# What takes long. Its outputs are committed under docs/evidence, with command, versions and date.
evidence: .venv/ready-dev .venv/ready-docs evidence-oracles evidence-statistics evidence-heads evidence-neurons evidence-circuits evidence-checkpoints evidence-freezing evidence-views evidence-sharing evidence-sizing
	.venv/bin/python $(PYTEST) -m long
	.venv/bin/rim-lens organism toy --seeds 0-5 --out docs/evidence
	.venv/bin/rim-lens organism smollm2 --seeds 0-2 --out docs/evidence
	.venv/bin/rim-lens organism smollm2 --newline --seeds 0 --adapters runs/smollm2-newline --out docs/evidence
	.venv/bin/rim-lens measures smollm2-refusal --requests 24 --max-cot-tokens 96 --out docs/evidence
	.venv/bin/rim-lens measures smollm2 --requests 12 --no-twins --max-cot-tokens 48 --condition off --condition careful \
	  --condition filler --condition unrelated --out docs/evidence
	.venv/bin/rim-lens measures runs/smollm2-newline/seed-0 --requests 24 --name smollm2-newline --out docs/evidence
	.venv/bin/rim-lens direction smollm2-refusal --requests 24 --controls 30 --candidates 32 --out docs/evidence
	.venv/bin/rim-lens heads smollm2-refusal --requests 16 --n-test 270 --no-probes --no-removing --no-statistics --out runs/heads-smollm2-refusal
	cp runs/heads-smollm2-refusal/report.md docs/evidence/heads_smollm2-refusal.md
	cp runs/heads-smollm2-refusal/heads/heads.json docs/evidence/heads_smollm2-refusal.json
	.venv/bin/rim-lens circuit smollm2-refusal --heads L1H5,L1H3,L14H2,L3H5,L27H5 --n-heads 14 --n-neurons 2048 --neuron-layers 14 \
	  --min-share 0.05 --requests 8 --confirm 30 --random-circuits 12 --random-nodes 1 --max-new-tokens 8 --out runs/circuit-smollm2-refusal
	cp runs/circuit-smollm2-refusal/circuit_smollm2-refusal.md runs/circuit-smollm2-refusal/circuit_smollm2-refusal.json docs/evidence/
	.venv/bin/rim-lens compare smollm2-refusal --train careful,heuristic --control heuristic --seeds 0-2 --steps 36 --requests 12 \
	  --max-cot-tokens 48 --out runs/compare-smollm2-refusal
	cp runs/compare-smollm2-refusal/report.md docs/evidence/checkpoints_smollm2-refusal.md
	cp runs/compare-smollm2-refusal/comparison/comparison.json docs/evidence/checkpoints_smollm2-refusal.json
	.venv/bin/python docs/run_notebooks.py docs/evidence smollm2

# The largest difference of each editor from an independent computation, in every family and version.
evidence-oracles: .venv/ready-dev .venv-tl3/ready-dev .venv-tl2/ready-dev
	rm -f docs/evidence/oracles.json
	for venv in .venv .venv-tl3 .venv-tl2; do \
	  $$venv/bin/python -m pytest -q -m oracle --oracles docs/evidence/oracles.json tests/hooks || exit 1; done
	.venv/bin/python -m tests.oracles

# How often the tests cry wolf, and whether they see what was planted.
evidence-statistics: .venv/ready-dev
	.venv/bin/python -m tests.calibration

# What verdicts on heads are worth: planted truth, models without refusal, toys of six seeds.
evidence-heads: .venv/ready-dev
	.venv/bin/python -m tests.verdicts

# The same of neurons, and of p of entanglement.
evidence-neurons: .venv/ready-dev
	.venv/bin/python -m tests.entanglement_nulls
	.venv/bin/python -m tests.neuron_verdicts

# What edges and shares of circuits are worth: planted truth, models without refusal, toys.
evidence-circuits: .venv/ready-dev
	.venv/bin/python -m tests.circuit_verdicts

# What fine-tuning does to refusal in toys of six seeds, and whether entanglement follows it.
evidence-checkpoints: .venv/ready-dev
	.venv/bin/python -m tests.checkpoint_verdicts

# Whether freezing the found neurons in training keeps refusal.
evidence-freezing: .venv/ready-dev
	.venv/bin/python -m tests.freezing_verdicts

# How large each kind of page is and how long it takes to open, in headless Chromium.
evidence-views: .venv/ready-dev
	.venv/bin/python -m tests.view_sizes

# A worker is killed in the middle of a run of two processes, and three go on.
evidence-sharing: .venv/ready-dev
	.venv/bin/python -m tests.killed_worker

# What large models take, by counts that are held against small ones.
evidence-sizing: .venv/ready-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.sizing

# .venv* / ready-<extra>: the package, editable, with that extra and this TransformerLens' constraints.
.venv/ready-%: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,$*)
.venv-tl3/ready-%: pyproject.toml constraints-tl3.txt
	$(call install,.venv-tl3,constraints-tl3.txt,$*)
.venv-tl2/ready-%: pyproject.toml constraints-tl2.txt
	$(call install,.venv-tl2,constraints-tl2.txt,$*)

define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) -e ".$(if $(filter demo,$(3)),,[$(3)])"
	touch $@
endef

clean:
	rm -rf .venv .venv-tl3 .venv-tl2 .cache .mypy_cache .ruff_cache
