# Everything a contributor needs, for GNU make 3.81 and newer. Each target sets up .venv by itself, with the
# dependency groups of pyproject.toml that it uses. Without make: docs/contributing.md has the plain lines.

PYTHON ?= python3 python3.13 python3.12 python3.11 python
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
BENCH ?= limits http idle inbound fanout mixed groups deflate storm wait latency redis presence
PAGE ?= docs/benchmarks.md

.PHONY: help demo test soak lint docs bench
.PRECIOUS: $(VENV)/.python $(VENV)/.ready-%

help:
	@echo "make demo    run the chat on http://$(HOST):$(PORT)/ (HOST=, PORT= change the address)"
	@echo "make test    run the unit and system tests and say what was skipped and why (ARGS=\"-k presence\")"
	@echo "make soak    run the tests that take minutes: recovery under a hostile broker, a million mutated frames"
	@echo "make lint    check style and types: ruff, mypy, pyright"
	@echo "make docs    build the documentation into site/; a broken link is an error"
	@echo "make bench   run the benchmarks and put what they find into $(PAGE), for about an hour:"
	@echo "             $(BENCH)"
	@echo "             (BENCH=\"fanout idle\" picks, ARGS=\"--rounds 3\" goes to each, PAGE= writes nothing)"
	@echo
	@echo "The first run of each installs what it needs into $(VENV) (PYTHON=/path/to/python picks the Python)."

demo: $(VENV)/.ready-demo
	@echo "The chat is on http://$(HOST):$(PORT)/ - open it in two windows; Ctrl-C stops it."
	@exec $(VENV)/bin/python -m uvicorn --app-dir docs/examples/chat app:app --host "$(HOST)" --port "$(PORT)" $(ARGS)

test: $(VENV)/.ready-test
	$(VENV)/bin/python -m pytest -m "unit or system" -rs $(ARGS)

soak: $(VENV)/.ready-test
	$(VENV)/bin/python -m pytest -m soak -rs -s $(ARGS)

# --verifytypes does not follow an editable install, hence the path.
lint: $(VENV)/.ready-lint
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/python -m pyright --pythonpath $(VENV)/bin/python
	PYTHONPATH="$(CURDIR)" PATH="$(CURDIR)/$(VENV)/bin:$$PATH" pyright --verifytypes starlette_rt --ignoreexternal

# The theme announces its successor at every build; the variable keeps that out of the log.
docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# Two of them only print: their figures stand in the text of the page.
bench: $(VENV)/.ready-bench
	@set -e; for name in $(BENCH); do \
	  echo "== $$name"; \
	  case "$$name" in limits|http) page= ;; *) page="$(addprefix --write ,$(PAGE))" ;; esac; \
	  $(VENV)/bin/python -m tests.benchmarks.$$name $$page $(ARGS); \
	done

# A stamp per dependency group, so that each target installs its own and nothing twice.
$(VENV)/.ready-%: $(VENV)/.python pyproject.toml
	@echo "Installing the package with its '$*' dependencies into $(VENV) ..."
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable . --group $*
	@touch $@

# PYTHON is a list; the first that starts and is new enough is taken (a name on the PATH need not start).
# pip knows dependency groups since 25.1, which is newer than the one that Python brings.
$(VENV)/.python:
	@found=; for python in $(PYTHON); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "starlette_rt needs Python 3.11 or newer, and none was found (tried: $(PYTHON))."; \
	  echo "Install one, or say where it is: make PYTHON=/path/to/python3.11"; exit 1; \
	fi; \
	if ! $$found -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$$found has no venv module. Debian and Ubuntu keep it apart: apt install python3-venv"; exit 1; \
	fi; \
	$$found -m venv $(VENV) && \
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1" && touch $@
