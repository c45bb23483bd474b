# Everything a newcomer needs; each target builds .venv itself when it is missing or its pins have changed.
PYTHON ?= python3
BIN := .venv/bin
# The tests start many processes: each module is compiled once for all of them, wherever this variable is set.
unexport PYTHONDONTWRITEBYTECODE

demo: .venv/installed  ## draw a picture with the bundled model
	$(BIN)/mezzotint generate "a lemon on a blue background" --seed 7 --out demo.png

test: .venv/installed-all  ## the tests (eight to ten minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/installed-all build/schemathesis/bin/schemathesis  ## the long tests; Ray, 150 MB, is installed for them alone
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[scale]'
	SCHEMATHESIS=$(CURDIR)/build/schemathesis/bin/schemathesis $(BIN)/python -m pytest -m slow

serve: .venv/installed-serve  ## the server with the bundled model; prints its URL
	$(BIN)/mezzotint serve

test-page: .venv/installed-all build/axe/axe.min.js  ## the page in a browser (about three minutes); needs chromium, chromium-driver and npm
	$(BIN)/python -m pytest -m browser -n 2 --dist loadfile tests/server

screenshots: .venv/installed-all  ## take the screenshots of the page in docs/images again; needs chromium and chromium-driver
	PYTHONPATH=tests/server $(BIN)/python tests/server/screenshots.py

build/schemathesis/bin/schemathesis:  # in an environment of its own: its pins are not ours
	$(PYTHON) -m venv build/schemathesis
	build/schemathesis/bin/python -m pip install --quiet schemathesis==4.32.5

build/axe/axe.min.js:
	mkdir -p build/axe
	cd build/axe && npm pack --silent axe-core@4.10.3 && tar -xzf axe-core-4.10.3.tgz --strip-components=1 package/axe.min.js
	touch $@

docs: .venv/installed-all  ## the documentation, in build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: .venv/installed-all  ## lint, types, floor plan
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed-all  ## the benchmarks; results go to benchmarks/results
	$(BIN)/python benchmarks/run.py

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard src/mezzotint/kernels/*.[ch]) | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-serve: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[serve]'
	touch $@

.venv/installed-all: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,report,serve,test,docs,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt k-diffusion  # an oracle; only one file of it is read
	touch $@

.PHONY: demo serve docs test test-slow check bench test-page screenshots
