# Each command sets itself up on a machine that has only Python 3.11, pip, make and gcc:
#   make demo        text -> shards -> a model that learns, is killed, resumes, and writes a few lines
#   make demo-chat   pre-training, SFT and DPO, and what each stage changed
#   make test        lint, types, import layers, and every test

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo demo-chat test lint types layers pytest format clean

demo: .venv/.installed
	$(BIN)/python -m minimind_cli.demos.pretrain

demo-chat: .venv/.installed
	$(BIN)/python -m minimind_cli.demos.chat

test: lint types layers pytest

lint: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.installed-dev
	$(BIN)/mypy

layers: .venv/.installed-dev
	$(BIN)/lint-imports

pytest: .venv/.installed-dev
	$(BIN)/pytest --numprocesses 2 --dist loadfile

format: .venv/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs/demo runs/demo-chat

.venv/.pip: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip
	touch $@

.venv/.installed: .venv/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@
