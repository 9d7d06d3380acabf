# Each command prepares its own environment in .venv (Python 3.11 or newer; override with PYTHON=...).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help reproduce test lab bench clean

help:
	@echo "make reproduce   run the chapters headless, rebuild figures and tables (ARGS='--preset paper --data cifar10')"
	@echo "make test        check notebooks, package and commands"
	@echo "make lab         open the notebooks in JupyterLab"
	@echo "make bench       measure the speed of naive, exact, block, top-1 and dense attention"

$(STAMP): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: give one with make PYTHON=/path/to/python3"; exit 1; }
	@echo "Preparing .venv (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --editable '.[dev,lab]'
	@touch $@

reproduce: $(STAMP)
	$(BIN)/asamoe reproduce $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir nbs $(ARGS)

bench: $(STAMP)
	$(BIN)/asamoe bench $(ARGS)

clean:
	rm -rf .venv figures/quick figures/smoke
