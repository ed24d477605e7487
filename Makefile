# make demo      train, sparsify to 90 % while training, report   (DATA=digits|fashion-mnist|pets, ARGS='--schedule cos')
# make test      notebooks in sync with modules, notebook tests, pytest
# make lint      ruff, and the rules of docs/house.py: order of folders, public names, width, a definition per cell
# make sanitize  tests of the kernels over builds that watch memory and threads (g++, a minute and a half)
# make export    write modules and README from the notebooks, and the picture of the folders
# make docs      the static site, in docs/_build/html
# make bench     speed and memory beside fasterai and fastsparse; writes benchmarks/*.md
#                (the other scripts in benchmarks/ train for an hour, most of them on Fashion-MNIST)
PYTHON ?= python3
DATA   ?= digits
ARGS   ?=
BIN    := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test sync lint sanitize export docs bench clean
.DEFAULT_GOAL := test

demo: .venv/core.done
	fasterai-sparse-demo --data $(DATA) $(ARGS)

# Two processes with one thread each
test: export OMP_NUM_THREADS = 1
test: .venv/dev.done sync lint
	nbdev-test --n-workers 2 --do-print
	python -m pytest tests -n 2 --dist loadfile

# Clean + export in a copy, so that the check changes nothing in the checkout
sync: .venv/dev.done
	python tests/check_sync.py

lint: .venv/dev.done
	ruff check .
	python docs/house.py --check

# A build of the C++ in a folder of its own; that of the package stays
sanitize: .venv/dev.done
	python tests/sanitize.py

# After a change to a notebook: what it exports
export: .venv/dev.done
	nbdev-clean
	nbdev-export
	python docs/readme.py
	python docs/picture.py

docs: .venv/docs.done
	$(MAKE) -C docs html

bench: .venv/bench.done
	python benchmarks/one_shot.py
	python benchmarks/training.py
	python benchmarks/dynamic_cost.py

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fasterai_sparse needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv

.venv/core.done: EXTRA =
.venv/dev.done: EXTRA = [dev]
.venv/docs.done: EXTRA = [docs]
.venv/bench.done: EXTRA = [bench]
.venv/%.done: settings.ini setup.py pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q --no-warn-script-location -c constraints.txt -e '.$(EXTRA)'
	touch $@

clean:
	rm -rf _proc _docs docs/_build docs/_src demo_out
