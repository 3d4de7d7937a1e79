# Every target works on a fresh clone: it makes .venv and installs into it what it needs, once.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Byte code is kept: tests start hundreds of interpreters, and each would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE
# Two test workers on two cores: more threads in each, spinning for work, only stand in each other's way.
ALONE := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all fuzz lint format bench claims readme apply-patches unapply-patches check-patches export-patches rebase-patches clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  %-16s %s\n' "$$name" "$$text"; done

$(PY):
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "make: $(PYTHON) is not installed (3.10 or newer is needed; another one: make PYTHON=python3.12)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 10) and sys.exit("make: $(PYTHON) is Python %d.%d, 3.10 or newer is needed (another one: make PYTHON=python3.12)" % sys.version_info[:2])' || exit 2
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv module (Debian: apt-get install python3-venv)"; exit 2; }
	@$(PYTHON) -m venv $(VENV)

setup: $(PY) ## make .venv with the pinned stack (GPU=1 or CPU=1 to choose; else by nvidia-smi)
	@$(PY) requirements/install.py $(if $(GPU),--gpu) $(if $(CPU),--cpu)

demo: setup ## a real QLoRA run, pristine Unsloth beside Unsloth + unsloth_ext, and the report of both
	@$(PY) -m unsloth_ext train --compare

test: setup lint ## every part: package, patches, upstream tests on both faces, a short run (12 minutes on 2 cores)
	@$(ALONE) $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not extended' $(PYTEST)

test-all: setup lint ## the same with every case of each test
	@$(ALONE) $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

fuzz: setup ## the searching tests (parser, guard, NF4 states), on texts that no run has tried
	@UNSLOTH_EXT_FUZZ=1 $(PY) -m pytest -n 2 --dist loadfile tests/tools tests/nf4 $(PYTEST)

lint: setup ## ruff, lint and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: setup ## let ruff mend what it can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: setup ## run the benchmarks that this machine can run, and write benchmarks/data
	@for file in benchmarks/bench_*.py; do $(PY) $$file || exit 1; done

claims: setup ## every claim of benchmarks/data in one table; fails where one does not hold
	@$(PY) benchmarks/claims.py

readme: setup ## write the README's generated tables again
	@$(PY) benchmarks/readme.py

apply-patches: require-checkout setup ## UNSLOTH=path, ZOO=path or both: apply the patch series to a checkout or an unpacked wheel
	@$(PY) -m unsloth_ext patches apply $(trees)

unapply-patches: require-checkout setup ## UNSLOTH=path, ZOO=path or both: take them out again
	@$(PY) -m unsloth_ext patches unapply $(trees)

check-patches: setup ## apply to the pristine wheels, export again, find no difference
	@$(PY) -m unsloth_ext patches check

export-patches: setup ## [UNSLOTH=path] [ZOO=path]: write patches/ from a patched checkout, or from the rooms' code
	@$(PY) -m unsloth_ext patches export $(trees)

rebase-patches: require-VERSION setup ## VERSION=2026.10.8 [WRITE=1]: try the series on another release
	@$(PY) -m unsloth_ext patches rebase $(VERSION) $(if $(WRITE),--write)

require-checkout:
	@test -n "$(UNSLOTH)$(ZOO)" || { echo "make: UNSLOTH= or ZOO= is missing. For example: make $(firstword $(MAKECMDGOALS)) UNSLOTH=~/src/unsloth"; exit 2; }

require-%:
	@test -n "$($*)" || { echo "make: $*= is missing. For example: make $(firstword $(MAKECMDGOALS)) $*=$(example-$*)"; exit 2; }

example-VERSION = 2026.10.8

clean: ## remove what runs and builds left here (not .venv, not the cache)
	@rm -rf runs build dist .pytest_cache .ruff_cache *.egg-info unsloth_compiled_cache

trees = $(if $(UNSLOTH),--unsloth "$(UNSLOTH)") $(if $(ZOO),--zoo "$(ZOO)")
