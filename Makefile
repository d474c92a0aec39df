PYTHON ?= python3
PY = .venv/bin/python

.PHONY: setup demo test base
setup: .venv/.done

.venv/.done: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup
	$(PY) data/shapes/demo.py

test: setup
	$(PY) -m pytest -q tests

base: setup
	$(PY) data/shapes/pretrain.py
