# Two commands, both for a fresh machine with Python 3.11 or newer and nothing else set up:
#   make demo   environment, then raw text -> tokenizer -> pretraining -> SFT -> DPO -> chat answers in out/demo
#   make test   environment with the test extras, then the tests
# Also: make coverage, make test-slow (everything, an hour), make pictures, make lint, make format, make clean.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Tests run in as many processes as there are cores, but not more than four: each takes a gigabyte.
WORKERS := -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test coverage test-slow pictures lint format clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -m "not slow" $(WORKERS)

coverage: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -m "not slow" $(WORKERS) --cov=nanophi --cov-report=term:skip-covered --cov-fail-under=92

test-slow: $(VENV)/.installed-test $(VENV)-457/.installed
	$(BIN)/python -m pytest -q

# Every picture of docs/: those of the pages are computed, those of the demo come from out/demo.
pictures: $(VENV)/.installed
	$(BIN)/python -m docs.draw

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-457 out build *.egg-info .coverage .pytest_cache .ruff_cache .hypothesis

# The stamps are what makes a second run install nothing; they age when the requirements change.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "nanophi needs Python 3.11 or newer; '$(PYTHON)' is older or missing. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "environment: creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "python's venv module is missing (Debian and Ubuntu: apt-get install python3-venv)"; exit 2; }

$(VENV)/.installed: setup.py constraints.txt | $(VENV)/bin/python
	@echo "environment: installing nanophi and what it needs (once; torch is the large part)"
	@$(PIP) -e '.[plot,serve]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "environment: installing the test extras (once)"
	@$(PIP) -e '.[test]'
	@touch $@

# transformers 4.57 in an environment of its own: the original's snippet calls what version 5 has dropped.
$(VENV)-457/.installed: constraints.txt | $(VENV)/bin/python
	@echo "environment: transformers 4.57 for the compatibility test (once)"
	@$(PYTHON) -m venv $(VENV)-457
	@$(VENV)-457/bin/python -m pip install --quiet --disable-pip-version-check \
	  'transformers==4.57.6' "$$(grep '^torch==' constraints.txt)" "$$(grep '^numpy==' constraints.txt)"
	@touch $@
