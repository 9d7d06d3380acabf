# Each command prepares its own environment in .venv (Python 3.11 or newer; override with PYTHON=...).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
PAGES := .venv/pages
BROWSER := .venv/browser

.PHONY: help reproduce test test-slow test-browser test-grid soak lab edit explore bench book clean

help:
	@echo "make reproduce      run the chapters headless, rebuild figures and tables (ARGS='--preset paper --data cifar10')"
	@echo "make test           check notebooks, package and commands"
	@echo "make test-slow      what takes minutes: the chapters of the paper rebuilt byte for byte, attention compiled"
	@echo "make test-browser   the pages in a real browser (installs chromium where apt-get can)"
	@echo "make test-grid      trainings spread by Snakemake over a Slurm that is installed (as root) and started here"
	@echo "make soak           kill trainings, chapters and reproduce at 300 random moments, in half an hour; nothing may be lost"
	@echo "make lab            read and play: the chapters in JupyterLab, as copies that you may change"
	@echo "make edit           work on the chapters themselves in JupyterLab"
	@echo "make explore        play with the models on a page of this machine (ARGS='--weights FILE' for more weights)"
	@echo "make bench          measure the speed of naive, exact, block, top-1 and dense attention"
	@echo "make book           the pages, in book/html (ARGS='--data cifar10-part' reproduces their results first)"
	@echo "make clean          remove .venv, book/ and what the presets smoke and quick made; your copies in scratch/ stay"

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: give one with make PYTHON=/path/to/python3"; exit 1; }
	@echo "Preparing .venv (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --editable '.[dev,lab]' --constraint constraints.txt
	@touch $@

$(PAGES): $(STAMP)
	@$(BIN)/python -m pip install --quiet --editable '.[book]' --constraint constraints.txt
	@touch $@

$(BROWSER): $(PAGES)
	@$(BIN)/python -m pip install --quiet --editable '.[browser]' --constraint constraints.txt
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null
	@touch $@

reproduce: $(STAMP)
	$(BIN)/asamoe reproduce $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(ARGS)

test-browser: $(BROWSER)
	$(BIN)/asamoe book
	$(BIN)/python -m pytest tests/browser $(ARGS)

# Snakemake asks for an older `packaging` than the rest has, so it gets an environment of its own
.venv-grid/bin/snakemake: settings.ini
	@$(PYTHON) -m venv .venv-grid
	@.venv-grid/bin/pip install --quiet $$(sed -n 's/^grid_requirements = //p' settings.ini)
	@touch $@

test-grid: $(STAMP) .venv-grid/bin/snakemake
	@test -x /usr/sbin/slurmctld -a -x /usr/sbin/munged || { test $$(id -u) = 0 || { \
	  echo "Slurm is not installed: apt-get install slurm-wlm munge, or call this as root"; exit 1; }; \
	  apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
	  apt-get install -qq --no-install-recommends slurm-wlm munge > /dev/null; }
	PATH="$(CURDIR)/.venv-grid/bin:$$PATH" $(BIN)/python -m pytest -m grid tests/test_grid.py $(ARGS)

soak: $(STAMP)
	$(BIN)/python tests/soak.py $(ARGS)

lab: $(STAMP)
	$(BIN)/asamoe lab -- $(ARGS)

edit: $(STAMP)
	$(BIN)/asamoe lab --edit -- $(ARGS)

explore: $(STAMP)
	$(BIN)/asamoe explore $(ARGS)

bench: $(STAMP)
	$(BIN)/asamoe bench $(ARGS)

book: $(PAGES)
	$(BIN)/asamoe book $(ARGS)

clean:
	rm -rf .venv .venv-grid book figures/quick figures/smoke
