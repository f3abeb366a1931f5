# make demo   everything, then a real SAE trained in front of you     make up   the site and its workers
# make test   every test                                              make lint style, types, import order
# make peers  the second implementations that tests compare with, in .venv-peers
# make bench  every benchmark beside them, on the demo's own model; for a quiet machine
PYTHON ?= python3
PORT ?= 8000
HOST ?= 127.0.0.1
SERVE ?= 1
BIN := .venv/bin
RUN := $(BIN)/python manage.py
# Python compiles the modules it imports; compiling all there are takes longer than unpacking them.
PIP := pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo up test lint install peers bench clean

demo: .venv/.installed .venv/.demo
	$(RUN) up --host $(HOST) --port $(PORT) --then demo $(if $(filter 0,$(SERVE)),--leave)

up: .venv/.installed
	$(RUN) up --host $(HOST) --port $(PORT)

test: .venv/.installed .venv/.dev .venv/.demo lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/.installed .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy . || { rm -rf .mypy_cache; $(BIN)/mypy .; }  # with a cache of older sources it may crash
	$(BIN)/lint-imports

bench: .venv/.installed .venv/.demo peers
	for bench in tests/bench/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench || exit 1; done

install: .venv/.installed .venv/.dev .venv/.demo

.venv/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/$(PIP) -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.installed
	$(BIN)/$(PIP) -r requirements-dev.txt
	touch $@

.venv/.demo: requirements-demo.txt .venv/.installed
	$(BIN)/$(PIP) --no-deps -r requirements-demo.txt
	touch $@

peers: .venv-peers/.installed

# It sees the packages of .venv (the same torch, transformers, numpy) and adds what only the peers need.
SITE := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
.venv-peers/.installed: requirements-peers.txt requirements-peers-alone.txt .venv/.installed
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	$(BIN)/python $(SITE) > $$(.venv-peers/bin/python $(SITE))/saehub.pth
	.venv-peers/bin/$(PIP) -r requirements-peers.txt
	.venv-peers/bin/$(PIP) --no-deps -r requirements-peers-alone.txt
	touch $@

clean:
	rm -rf .venv .venv-peers .test-data .bench-data .pytest_cache .mypy_cache .ruff_cache
