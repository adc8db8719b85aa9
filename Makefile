# make train   install into .venv, then the quick start: minutes, on all GPUs or on two CPU ranks
# make test    install into .venv, then run the tests; some of them: make test ARGS="tests/unit -k norm"
# make test-all  the same with those that take minutes each (docs/development.md)
# make test-changed  the nearest tests of what the working tree changes (ARGS=COMMIT)
# make mutate  what the tests of a room do not notice: ARGS="engine/zero --number 20 --seed 1"
# make check   style and types: ruff, mypy
# make coverage  what the unit tests run, by file; the workflow prints it
# make size    code lines by room, and what the working tree changes (ARGS=COMMIT)
# make docs    docs/recipes.md and docs/recipes/ from docstrings, and the site in site/
# make dist    wheel and source archive of the last commit in dist/, built twice to the same bytes
# make lock    requirements/: the newest packages that pyproject.toml allows, each by its hashes
PYTHON ?= python3
# An index from which torch and torchvision alone are taken, and from no other; without it, torch
# comes from where the other packages come from. An extra index would offer each of their names too.
TORCH_INDEX ?=
BIN := .venv/bin

# Each rank of a test would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-all test-changed mutate check size coverage docs dist lock

# Hashes of all packages: a file of requirements/ for this Python and machine, where CI names one.
LOCK ?=

# One stamp an extra: the quick start does without the tests' packages. Errors alone are shown: a
# build in place warns about a folder of the package's name, at length.
.venv/%: pyproject.toml $(LOCK)
	@echo "Installing the packages of fd_large[$*], torch among them, into .venv: it takes minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifdef LOCK
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet $(addprefix --index-url ,$(TORCH_INDEX)) \
		--requirement requirements/torch.txt
	$(BIN)/python -m pip install --quiet --quiet --no-deps --no-build-isolation --editable .
else
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --index-url $(TORCH_INDEX) torch torchvision)
	$(BIN)/python -m pip install --quiet --quiet --editable '.[$*]'
endif
	touch $@

# Without a GPU, two CPU ranks; with some, the launcher starts one rank on each.
train: .venv/quickstart
	if $(BIN)/python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; \
	then ranks=; else ranks="--num_accelerators 2"; export DS_ACCELERATOR=cpu; fi; \
	$(BIN)/deepspeed --quiet $$ranks fd_large/train.py --deepspeed_config ds_configs/zero3.json $(ARGS)

# For two cores: first the tests of one process, then those that start ranks, these by whole files in
# the order of tests/integration/conftest.py. Three run at once, since some wait.
test: export OMP_NUM_THREADS := 1
test: .venv/test
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	status=0; \
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal $(MARK) tests/unit || status=1; \
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile \
		--no-loadscope-reorder $(MARK) tests/integration || status=1; \
	exit $$status
endif

# An empty expression takes back the default one, which leaves the sweep out.
test-all:
	$(MAKE) test MARK="-m ''"

test-changed mutate: export OMP_NUM_THREADS := 1

test-changed: .venv/test
	$(BIN)/python .ci/changed.py $(ARGS)

mutate: .venv/test
	$(BIN)/python .ci/mutate.py $(ARGS)

check: .venv/check
	$(BIN)/ruff check fd_large tests benchmarks examples .ci
	$(BIN)/mypy

coverage: export OMP_NUM_THREADS := 1
coverage: .venv/coverage
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal --cov fd_large \
		--cov-report term:skip-covered $(ARGS) tests/unit

size:
	@$(PYTHON) .ci/size.py $(ARGS)

docs: .venv/docs
	$(BIN)/python -m fd_large.report.recipe_page
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: .venv/dist
	$(BIN)/python .ci/dist.py $(ARGS)
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
		--output-file dist/sbom.cdx.json requirements/cuda.txt

# UV_FIND_LINKS or UV_INDEX says where torch's build for CPUs is: without it, the files for CPUs would
# hold CUDA's libraries.
COMPILE = $(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-annotate --no-emit-index-url \
	--no-emit-find-links --custom-compile-command "make lock" --python-version 3.11 \
	--python-platform x86_64-unknown-linux-gnu --constraint requirements/torch.txt pyproject.toml
WITHOUT_TORCH = --no-emit-package torch --no-emit-package torchvision
OF_A_RUN = --extra quickstart --extra open_clip --extra offload --extra detection

lock: .venv/lock
	$(COMPILE) $(WITHOUT_TORCH) --extra check --extra coverage --extra dist --extra docs \
		--output-file requirements/ci.txt
	$(COMPILE) $(WITHOUT_TORCH) $(OF_A_RUN) --constraint requirements/ci.txt \
		--output-file requirements/cpu.txt
	env -u UV_FIND_LINKS -u UV_INDEX $(COMPILE) $(OF_A_RUN) --constraint requirements/cpu.txt \
		--output-file requirements/cuda.txt
