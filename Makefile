# Two commands of a new user: `make demo` and `make test`. Both make .venv first if need be.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test bench check format clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/ready  ## make .venv with the tested versions of everything

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, this is ' + sys.version)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## train on drawn shapes and evaluate, some minutes on two cores
	$(BIN)/rpn-train

test: setup  ## run the tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

bench: setup  ## time the parts beside torchvision, pycocotools and Pillow, some minutes on two cores
	cd scripts && for command in \
		"benchmark_model.py" \
		"benchmark_step.py --boxes 8" \
		"benchmark_step.py --boxes 60" \
		"benchmark_step.py --backbone resnet18_fpn" \
		"benchmark_inference.py" \
		"benchmark_assignment.py" \
		"benchmark_scaling.py --size 256 256 --repeats 2" \
		"benchmark_index.py" \
		"benchmark_recall.py --images 500 --objects 3600 --pycocotools"; \
	do echo; echo "$$command"; ../$(BIN)/python $$command || exit 1; done

check: setup  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv and caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
