# make chat: install into .venv and chat with the demo pair.    make test: install with the test tools and check.
# Works with macOS's make 3.81. Installs again only when pyproject.toml or this file changed.

VENV := .venv
PYTHON := $(VENV)/bin/python
SPEC := pyproject.toml Makefile
# A file's tests stay in one process, which makes its models once; four processes fit 16 GB.
PYTEST := $(PYTHON) -m pytest -q -n auto --maxprocesses 4 --dist loadfile

.PHONY: chat test test-all lint clean

chat: $(VENV)/.installed
	@$(VENV)/bin/mlx-mtp chat demo

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

$(PYTHON):
	@sh .ci/make-venv $(VENV)

$(VENV)/.installed: $(SPEC) | $(PYTHON)
	@sh .ci/install $(VENV) .
	@touch $@

$(VENV)/.installed-test: $(SPEC) | $(PYTHON)
	@sh .ci/install $(VENV) '.[test]'
	@touch $@ $(VENV)/.installed
