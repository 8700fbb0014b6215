# make help lists the targets.
PYTHON ?= python3
PIP_FLAGS ?=
OUT ?= bench/results
VENV := .venv
BIN := $(VENV)/bin
comma := ,
PINS := pyproject.toml setup.py constraints.txt kernels/block_update_cpu.cpp

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench report gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

# --no-compile: of the 16,000 modules that this installs, a few thousand are ever imported.
define install
	@echo "Installing .[$(1)] into $(VENV): torch is large, this takes a minute or more."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(PIP_FLAGS) -c constraints.txt -e ".[$(1)]"
endef

# A failed installation leaves no stamp, so that the next call takes it up again.
$(VENV)/demo.stamp: $(PINS)
	$(call install,demo)
	touch $@

$(VENV)/test.stamp: $(PINS)
	$(call install,demo$(comma)test$(comma)lint)
	touch $(VENV)/demo.stamp $@

demo: $(VENV)/demo.stamp ## grow a network on real images beside a small and a big one; plots in out/demo
	$(BIN)/python -m fastgrow.demo

lint: $(VENV)/test.stamp ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint, then every test on two cores, on a machine without a GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

bench: $(VENV)/test.stamp ## benchmarks on the CPU, rows into OUT (bench/results)
	$(BIN)/python -m bench --device cpu --out $(OUT)

report: $(VENV)/test.stamp ## docs/performance.md from the rows in bench/results
	$(BIN)/python -m bench report

gpu: ## GPU tests, then GPU benchmarks into OUT, with PYTHON as it is (no .venv)
	$(PYTHON) -c "import fastgrow.kernels" || $(PYTHON) -m pip install --no-deps --no-build-isolation -e .
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m bench --device cuda --out $(OUT)

clean: ## remove .venv, caches, build folders and out
	rm -rf $(VENV) out build dist *.egg-info kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
