# `make demo` and `make test` need nothing but Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo-baseline demo test lint types check demo-model vendor clean

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/med3dvlm demo

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n logical --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .

types: $(STAMP)
	$(BIN)/pyright

check: lint types test

# Trains the bundled demo model from nothing: phantoms, three stages, figures, model card.
demo-model: $(STAMP)
	$(BIN)/med3dvlm train contrastive recipes/demo/contrastive.yaml
	$(BIN)/med3dvlm train contrastive recipes/demo/longer.yaml
	$(BIN)/med3dvlm train contrastive recipes/demo/search.yaml
	$(BIN)/med3dvlm train alignment recipes/demo/alignment.yaml
	$(BIN)/med3dvlm train instruction recipes/demo/instruction.yaml
	$(BIN)/med3dvlm train instruction recipes/demo/letters.yaml
	$(BIN)/med3dvlm train instruction recipes/demo/letters.yaml start=runs/demo/letters \
		output=runs/demo/letters-longer training.max_minutes=12 training.seed=2
	$(BIN)/python recipes/demo/bundle.py
	$(BIN)/med3dvlm evaluate calibration --model demo --save

# The baseline at the demo model's budget, up to its first 20 minutes of letters: as many studies in
# each stage (docs/results.md). 102 minutes of training on two cores.
BASE := runs/demo-baseline
demo-baseline: $(STAMP)
	$(BIN)/med3dvlm train contrastive recipes/demo/baseline.yaml
	$(BIN)/med3dvlm train contrastive recipes/demo/search.yaml start=$(BASE)/contrastive \
		output=$(BASE)/search training.max_minutes=null training.max_steps=600
	$(BIN)/med3dvlm train alignment recipes/demo/alignment.yaml start=$(BASE)/contrastive \
		output=$(BASE)/alignment model.projector=linear \
		training.max_minutes=null training.max_steps=294
	$(BIN)/med3dvlm train instruction recipes/demo/instruction.yaml start=$(BASE)/alignment \
		output=$(BASE)/instruction training.max_minutes=null training.max_steps=1568
	$(BIN)/med3dvlm train instruction recipes/demo/letters.yaml start=$(BASE)/instruction \
		output=$(BASE)/letters training.max_minutes=null training.max_steps=1838

# Fetches again what the workstation's page carries from npm; needs npm and a network.
vendor:
	$(PYTHON) tools/vendor.py

clean:
	rm -rf $(VENV) runs med3dvlm-demo
