# Targets of the checkout; `make help` lists them. One environment, .venv, made by the first target that needs it; the site
# has a small one of its own, .venv-docs, so that the demo installs nothing for it.
SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := help
.PHONY: help setup demo up down status test test-slow test-servers test-gpu coverage check docs clean

VENV := .venv
PYTHON := $(VENV)/bin/python
# A checksum, not a time stamp, says whether the environment is up to date: git does not keep times.
VERSIONS := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.ready-$(VERSIONS)
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.ready-$(VERSIONS)
ROOT ?= runs/demo
RECIPE ?= demo
# What the training continues: the recipe demo a small trained TRIP, other recipes their base.
FROM ?= $(if $(filter demo,$(RECIPE)),examples/demo_trip/weights,base)

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the pinned versions (once)

$(STAMP):
	@TRIP_PYTHON="$(TRIP_PYTHON)" bash infra/setup.sh $(VENV)
	@touch $@

demo: $(STAMP) ## draw clips, prepare, train, evaluate, register, animate a photo (under 15 minutes on 2 cores)
	@$(PYTHON) -m flows reproduce --recipe $(RECIPE) --root $(ROOT) --from $(FROM)

up: $(STAMP) ## start PostgreSQL or SQLite, Prefect, MLflow, Ray, a worker and the model service on this machine
	@$(PYTHON) -m flows up

status: $(STAMP) ## the state and the address of each of these services
	@$(PYTHON) -m flows status

down: $(STAMP) ## stop these services; their data stays in runs/up
	@$(PYTHON) -m flows down

# Two processes, each with whole files, in the order of the folders: the long files are not the last.
test: $(STAMP) ## the tests that finish in minutes, without a GPU or a network
	@$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not network"

test-slow: $(STAMP) ## the tests with servers, kills and several processes
	@$(PYTHON) -m pytest -m "slow and not gpu and not network"

test-servers: $(STAMP) ## of the slow tests those of Prefect, MLflow, `make up`, alerts, the pages in Chromium and PostgreSQL
	@$(PYTHON) -m pytest tests/flows/test_prepare_pages.py tests/infra/test_tracking.py tests/serve/test_web_ui.py tests/study/test_rating_page.py tests/study/test_votes.py tests/register/test_promotion.py tests/flows/test_stack.py tests/infra/test_metrics.py -m "slow and not gpu and not network"

test-gpu: $(STAMP) ## the tests that need a CUDA device
	@$(PYTHON) -m pytest -m "gpu and not network"

coverage: $(STAMP) ## the tests of `make test` with line and branch coverage; the report is htmlcov/index.html
	@$(PYTHON) -m pytest -m "not slow and not gpu and not network" --cov --cov-report=term:skip-covered --cov-report=html

check: $(STAMP) ## ruff and the type checker
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m pyright --pythonpath $(PYTHON)

docs: $(DOCS_STAMP) ## build the site of docs/ into site/, warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "docs: open site/index.html"

$(DOCS_STAMP):
	@TRIP_PYTHON="$(TRIP_PYTHON)" bash infra/setup.sh $(DOCS_VENV) docs
	@touch $@

clean: ## remove the environments, caches, the site and runs/
	rm -rf $(VENV) $(DOCS_VENV) site htmlcov .coverage* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
