# One command per purpose; `make help` lists them. Every command installs the environment first when it is
# missing or out of date, unless PYTHON names an interpreter to use as it is.

SHELL := /bin/bash
.DEFAULT_GOAL := help
PROFILE ?= mini

ifdef PYTHON
ENVIRONMENT :=
else
ENVIRONMENT := $(if $(shell command -v conda 2>/dev/null),.conda,.venv)
PYTHON := $(CURDIR)/$(ENVIRONMENT)/bin/python
endif

# The code of this folder is what runs, whatever else is installed in the environment.
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
export PROFILE
export SOURCE_DATE_EPOCH := 0
# Notebooks choose their own backend, and no kernel from outside the environment may answer for python3.
unexport MPLBACKEND JUPYTER_PATH
export JUPYTER_PREFER_ENV_PATH := 1

NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb)) $(wildcard notebooks/explorer.ipynb)
RUNS := $(NOTEBOOKS:notebooks/%.ipynb=run-%)
FIRST_RUN := $(filter run-01_%,$(RUNS))

.PHONY: help env new figures test notebooks check fetch reset rehearsal mini-clip mini-artifacts lab lint clean

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '  make %-15s %s\n' "$$name" "$$text"; done
	@echo '  Options: PROFILE=mini (default), paper or your own; PYTHON=<interpreter> uses that instead of make env'

env:  ## install the environment into .venv (into .conda where conda is installed)
	@tools/make_env.sh $(or $(ENVIRONMENT),--check "$(PYTHON)")

new: | env  ## look at your images and write a profile for them (NAME= IMAGES=, and as you like MODEL= MASKS=)
	@"$(PYTHON)" -m patchsae new "$(NAME)" --images "$(IMAGES)" $(if $(MODEL),--model "$(MODEL)") \
		$(if $(MASKS),--masks "$(MASKS)") $(if $(YES),--yes)

figures: $(RUNS)  ## recompute every figure whose code or inputs changed

# run-01_train_sae and so on; tools/run_notebook.py decides by content whether there is anything to do.
.PHONY: $(RUNS) ready
$(RUNS): run-%: notebooks/%.ipynb | ready
	@"$(PYTHON)" tools/run_notebook.py $<
$(filter-out $(FIRST_RUN),$(RUNS)): $(FIRST_RUN)

# What is missing is said before the first notebook starts, and nothing is written.
ready: | env
	@"$(PYTHON)" -B -m patchsae check --quiet

check: | env  ## say what the profile needs, what is missing, and what it will cost
	@"$(PYTHON)" -B -m patchsae check

fetch: | env  ## download the profile's weights and images as far as the hub has them (YES=1: however large)
	"$(PYTHON)" -m patchsae fetch $(if $(YES),--yes)

reset: | env  ## put data and figures back as they were committed and remove what runs left, after a question (YES=1: none)
	@"$(PYTHON)" -B -m patchsae reset $(if $(YES),--yes)

rehearsal: | env  ## run every notebook in the paper's dimensions on random weights and drawn images
	"$(PYTHON)" -m patchsae rehearsal make
	$(MAKE) figures PROFILE=rehearsal
	"$(PYTHON)" -m patchsae rehearsal report

# Progress bars are left out: nbval reads a cell's messages when the cell is done, and a long bar's would overflow.
test: | env  ## run the unit tests, then every notebook from top to bottom
	"$(PYTHON)" -m pytest -q -p no:cacheprovider tests
	$(if $(NOTEBOOKS),PATCHSAE_FIGURES="$(CURDIR)/build/test-figures" \
		IPYTHONDIR="$(CURDIR)/build/ipython" TQDM_DISABLE=1 \
		"$(PYTHON)" -m pytest -q --nbval-lax --nbval-current-env --nbval-cell-timeout 1200 -p no:cacheprovider $(NOTEBOOKS))

.PHONY: test-gpu
test-gpu: | env  ## what a GPU does differently, in a process of its own; skipped in a sentence where there is none
	TRITON_INTERPRET=0 "$(PYTHON)" -m pytest -q -rs -p no:cacheprovider tests/test_gpu.py

notebooks: | env  ## execute every notebook and store its outputs in notebooks/
	@"$(PYTHON)" tools/run_notebook.py --in-place $(NOTEBOOKS)
	@"$(PYTHON)" tools/make_verdicts.py

mini-clip: | env  ## train the small CLIP of data/mini/ again
	"$(PYTHON)" -m patchsae mini-clip

mini-artifacts: | env  ## train again what the notebooks only show: sweeps, seeds, many adaptations (YES=1: no question)
	"$(PYTHON)" -m patchsae artifacts $(if $(YES),--yes)

lab: | env  ## open the notebooks in JupyterLab
	"$(PYTHON)" -m jupyterlab notebooks

lint: | env  ## check the code with ruff
	"$(PYTHON)" -m ruff check src tests tools

clean:  ## remove build/ (the environment and everything committed stay)
	rm -rf build
	@echo 'Removed build/; the environment, data/ and figures/ were left alone.'

.PHONY: cache bench-cache stress
cache: | env  ## write the activations of the training images to the disk, after a question (CACHE=--yes, --verify)
	@"$(PYTHON)" -m patchsae cache $(CACHE)

bench-cache: | env  ## time the cache of activations against an Arrow cache (a minute)
	"$(PYTHON)" tools/bench_cache.py

stress: | env  ## damage caches in 200 ways, kill 20 cachings and 20 trainings, compare what is left (3 minutes)
	"$(PYTHON)" tools/stress_cache.py
	"$(PYTHON)" tools/stress_training.py

.PHONY: fuzz
fuzz: | env  ## call every public function, setting and command with odd arguments, some 9,800 cases (3 minutes; SEED=)
	"$(PYTHON)" tools/fuzz.py --seed $(or $(SEED),0)

.PHONY: bench bench-gpu
bench: | env  ## time everything at the paper's size against the published algorithms; docs/performance.md (8 minutes)
	"$(PYTHON)" tools/bench.py --write-docs
	"$(PYTHON)" tools/bench_cache.py

bench-gpu: | env  ## the same on one CUDA device, in bfloat16
	"$(PYTHON)" tools/bench.py --device cuda --write-docs

.PHONY: bench-ablation
bench-ablation: | env  ## time top-k masking at the paper's size against its slow twin (a few minutes)
	"$(PYTHON)" tools/bench_ablation.py

.PHONY: app dashboard bench-explorer stress-app
app: | env  ## serve the explorer at http://127.0.0.1:8866 (APP_HOST=, APP_PORT=, APP_HOSTS=, APP_VISITORS=)
	@IPYTHONDIR="$(CURDIR)/build/ipython" "$(PYTHON)" -m patchsae app --host "$(or $(APP_HOST),127.0.0.1)" \
		--port "$(or $(APP_PORT),8866)" --visitors "$(or $(APP_VISITORS),8)" $(addprefix --allow-host ,$(APP_HOSTS))

dashboard: | env  ## write figures/<profile>/dashboard/, a page per latent (LATENTS=0-99,512 for some)
	"$(PYTHON)" -m patchsae dashboard --latents "$(LATENTS)"

bench-explorer: | env  ## time the explorer and the dashboard at 4,096 latents (a few minutes)
	"$(PYTHON)" tools/bench_explorer.py

stress-app: | env  ## fifty visitors at once, hostile frames and foreign hosts at the explorer (three minutes)
	"$(PYTHON)" tools/stress_app.py

.PHONY: bench-mono
bench-mono: | env  ## time the monosemanticity score against its quadratic definition (a minute)
	"$(PYTHON)" tools/bench_monosemanticity.py
