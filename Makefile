# make sweep    create .venv, install mlprune, run the quickstart sweep on the demo model
# make test     run every check and every test
# make check    run ruff and mypy
# make fuzz     run the fuzzers with 1,000 new cases each
# make chaos    run 30 sweeps in which processes are killed by chance
# make format   fix style and format with ruff
VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(shell command -v python3.11 || command -v python3)
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: sweep test check fuzz chaos format clean
.DELETE_ON_ERROR:

sweep: $(VENV)/.installed
	$(BIN)/mlprune sweep

test: check
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/.installed-dev
	FUZZ_CASES=1000 $(BIN)/pytest tests/fuzz -n 2 --timeout=7200

chaos: $(VENV)/.installed-dev
	CHAOS_ROUNDS=30 $(BIN)/pytest tests/test_chaos.py -v --timeout=1800

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
