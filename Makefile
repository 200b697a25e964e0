# make serve     the item service, http://127.0.0.1:8080; options are in ARGS='--listen 9000'
# make test      the tests, in minutes; databases that are not installed are skipped
# make test-all  the long ones, too, storms, killed servers, browsers; the others with coverage
# make test-matrix  the library on the other Pythons here, and on the oldest SQLAlchemy
# make check     ruff, mypy and a wheel that is built, installed and used
# make suites    other projects' test suites, with every application wrapped
# make docs      the documentation, as pages in build/docs
# make bench     what a request costs, beside other ways, in build/bench.md; PARTS=limits for a part
# make storm     clients that hang up, workers that are killed: is each payment made once?
# make field     servers, engines and applications in combination, for a quarter of an hour
# make fuzz      schemathesis against the service on PostgreSQL, for minutes

# Hundreds of Pythons are started, and each imports the same modules.
unexport PYTHONDONTWRITEBYTECODE

# SQLite waits for the disk at each COMMIT.  Tests kill processes, not machines, so memory will do.
ROOMY := $(shell df -Pm /dev/shm 2>/dev/null | awk 'END { if ($$4 > 1000) print "/dev/shm" }')
ifneq ($(ROOMY),)
export PYTEST_DEBUG_TEMPROOT ?= $(ROOMY)
endif

PYTHON ?= python3
BIN := .venv/bin
PYTEST := pytest -q --numprocesses 4 --dist loadgroup --ignore tests/packaging
.DEFAULT_GOAL := help
.PHONY: help serve test test-all check suites docs bench storm field fuzz test-matrix clean

help:
	@sed -n 's/^# make /make /p' Makefile

serve: .venv/installed-app
	$(BIN)/python serve.py $(ARGS)

test: .venv/installed-dev
	$(BIN)/$(PYTEST) -m 'not long'

test-all: .venv/installed-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m $(PYTEST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=100 --precision=2

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --no-header -q tests/packaging

suites: .venv/installed-dev
	$(BIN)/python tests/transparency_suites.py --known $(SUITES)

docs: .venv/installed-docs
	$(BIN)/sphinx-build -n -W --keep-going -b html docs build/docs
	@echo "The site is in build/docs: open file://$(CURDIR)/build/docs/index.html"

storm: .venv/installed-dev
	PYTHONPATH=. $(BIN)/python tests/storm.py

field: .venv/installed-dev
	PYTHONPATH=. $(BIN)/python tests/field.py

fuzz: .venv/installed-dev
	PYTHONPATH=. $(BIN)/python tests/fuzz.py

bench: .venv/installed-bench
	PYTHONPATH="$(CURDIR):$(CURDIR)/tests" $(BIN)/python benchmarks/run.py $(PARTS)

LIBRARY := after_commit app_context attempts confirm doomed flask_sqlalchemy forks hooks idempotency \
	idempotency_keeping idempotency_races idempotency_views keyed lost_work outcome receipt \
	replayable session_ends stage streams testing whose_session
test-matrix: .venv/installed-dev
	$(BIN)/python tests/matrix.py $(LIBRARY:%=tests/test_%.py)

# A stamp, not the folder: a failed installation leaves half of one behind.
.venv/installed-%: setup.py $(wildcard sessionscope/*.py)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.13 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "Python's venv module is missing; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@

clean:
	rm -rf .venv .venv-3.* build dist *.egg-info .coverage* .hypothesis
