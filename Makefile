# Every target sets up what it needs by itself; `make help` lists them.

PYTHON ?= python3
# An additional index to take torch from, such as https://download.pytorch.org/whl/cpu: on Linux, pip's default torch
# brings gigabytes of CUDA libraries along.
TORCH_INDEX ?=
# The torch that `make test-oldest` runs on; see constraints-oldest.txt.
OLDEST_TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
# A video file that `make demo` also classifies; the shell reads it from the environment, whatever is in its name.
VIDEO ?=
export VIDEO

# Two processes, each on one thread; a file's tests stay together, because they share what is slow to make.
PYTEST = python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)
define CHECK_PYTHON
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	"Python 3.10 or newer is needed, and $(PYTHON) is " + sys.version.split()[0] + ": set PYTHON=")'
endef
# torch first and by itself, so that nothing else decides which build of it is taken.
INSTALL_TORCH = python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help test test-benchmarks test-engines demo app bench readme docs docs-serve test-docs lint format test-oldest clean

help:
	@echo 'make test          run the tests'
	@echo 'make test-benchmarks  run the benchmark scripts on tiny sizes (five minutes)'
	@echo 'make test-engines  run what needs Spark, Ray, torchao or stand-ins for cloud stores (six minutes; needs Java)'
	@echo 'make demo          train a small ViViT on videos of moving shapes and classify held-out ones (two minutes)'
	@echo 'make demo VIDEO=x  the same, and then classify the video file x'
	@echo 'make app           open a page to try a model on videos'
	@echo 'make bench         measure speed against the machine and the peers (BENCH_ARGS=--quick: what has a target)'
	@echo 'make readme        put what the code of README.md and docs/ prints and draws today into pages and notebooks'
	@echo 'make docs          build the documentation into site/; a dead link fails (Python 3.11 or newer)'
	@echo 'make docs-serve    show it at http://127.0.0.1:8000, and again after each change'
	@echo 'make test-docs     play the newcomer: fresh clone, new environments, all code of the pages (half an hour)'
	@echo 'make lint          check style and types'
	@echo 'make format        rewrite the code in that style'
	@echo 'make test-oldest   run the tests on the oldest supported versions'
	@echo 'make clean         remove virtual environments, caches and builds'
	@echo
	@echo 'PYTHON=python3.11  the interpreter to use, 3.10 or newer'
	@echo 'TORCH_INDEX=https://download.pytorch.org/whl/cpu  on Linux without a GPU: the small build of torch'
	@echo 'PYTEST_ARGS, DEMO_ARGS  passed on to pytest and to examples/demo.py'

.venv/ready: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv
	.venv/bin/$(INSTALL_TORCH) -c constraints.txt torch
	.venv/bin/python -m pip install -c constraints.txt -e '.[all]'
	@touch .venv/ready-demo $@

# One stamp per torch, so that another OLDEST_TORCH is really installed.
OLDEST_READY = .venv-oldest/ready-$(OLDEST_TORCH)

$(OLDEST_READY): pyproject.toml constraints-oldest.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/$(INSTALL_TORCH) -c constraints-oldest.txt torch==$(OLDEST_TORCH)
	.venv-oldest/bin/python -m pip install -c constraints-oldest.txt -e '.[conversion,export,search,training,probe,serve,app,test]'
	@touch $@

test: .venv/ready
	.venv/bin/$(PYTEST) -m "not benchmarks and not engines"

test-benchmarks: .venv/ready
	.venv/bin/$(PYTEST) -m benchmarks

.venv-engines/ready: pyproject.toml constraints.txt tests/engines/requirements.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-engines
	.venv-engines/bin/$(INSTALL_TORCH) -c constraints.txt torch
	grep -v '^python-dateutil==' constraints.txt > .venv-engines/constraints.txt  # botocore takes an older one
	.venv-engines/bin/python -m pip install -c .venv-engines/constraints.txt -e '.[test]' -r tests/engines/requirements.txt
	@touch $@

test-engines: .venv-engines/ready
	@command -v java > /dev/null || { echo 'Spark needs Java: apt-get install default-jre-headless'; exit 1; }
	.venv-engines/bin/python -m pytest $(PYTEST_ARGS) -m engines tests/engines

# What the demo needs alone, without the tools of `make test`, which sees that its own stamp is missing and adds them.
.venv/ready-demo: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv
	.venv/bin/$(INSTALL_TORCH) -c constraints.txt torch
	.venv/bin/python -m pip install -c constraints.txt -e .
	@touch $@

demo: .venv/ready-demo
	.venv/bin/python examples/demo.py $(if $(VIDEO),--video "$$VIDEO") $(DEMO_ARGS)

app: .venv/ready
	.venv/bin/python examples/app.py

bench: .venv/ready
	.venv/bin/python benchmarks/run.py $(BENCH_ARGS)

readme: .venv/ready
	.venv/bin/python tests/docs/update_pages.py
	.venv/bin/python docs/pictures/draw.py
	.venv/bin/python docs/notebooks/run.py

.venv/ready-docs: .venv/ready-demo
	.venv/bin/python -m pip install -c constraints.txt -e '.[docs]'
	@touch $@

docs: .venv/ready-docs
	.venv/bin/python -m properdocs build --strict --config-file properdocs.yml

docs-serve: .venv/ready-docs
	.venv/bin/python -m properdocs serve --config-file properdocs.yml

test-docs:
	@$(CHECK_PYTHON)
	TORCH_INDEX=$(TORCH_INDEX) $(PYTHON) tests/docs/newcomer.py

lint: .venv/ready
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

format: .venv/ready
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

test-oldest: $(OLDEST_READY)
	.venv-oldest/bin/python -m pip freeze
	.venv-oldest/bin/$(PYTEST) -m "not benchmarks and not engines"

clean:
	rm -rf .venv .venv-engines .venv-oldest build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
