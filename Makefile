# Every target sets up its environment first (tools/python) and is quick about it when there is nothing to do.
.DEFAULT_GOAL := help
.PHONY: help demo test test-distributed test-versions test-gpu gpu gpu-cache golden drawings texts resources check format docs bench zoo fuzz faults clean

ARGS ?=

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 15

demo:  ## set up, then run a real vision transformer on photographs with k-NN attention
	@./tools/python examples examples/quickstart.py $(ARGS)

test:  ## set up, then run the tests (ARGS="-k name" and the like)
	@# tests run side by side, one thread each: torch's own threads would only fight over the cores
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} ./tools/python test -m pytest -n auto --maxprocesses 8 --dist loadgroup $(ARGS)

test-distributed:  ## set up, then run the tests of torch.distributed: 2 and 4 processes of gloo (`make test` has them too)
	@OMP_NUM_THREADS=1 ./tools/python test -m pytest tests/parallel $(ARGS)

test-versions:  ## the suite on the oldest and the newest torch, 5 GB each (ARGS="newest", "oldest -k name", "--changing")
	@for python in $(or $(PYTHON),python3 python3.11 python3.12 python3.13); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    exec "$$python" tools/versions.py $(ARGS); fi; done; \
	echo "test-versions: no Python 3.11 or newer on the PATH" >&2; exit 1

test-gpu:  ## on a machine with an NVIDIA GPU: set up, then run the tests that need it
	@./tools/python test -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make test-gpu: torch finds no GPU here')"
	@./tools/python test -m pytest -m gpu tests/triton/test_triton_gpu.py $(ARGS)

# its own Python where that has a torch for the GPU and all that is needed: a machine with a GPU may have no network
GPU_PYTHON := $(if $(PYTHON),$(PYTHON),python3)
GPU_RUN := $(if $(OUT),--out "$(OUT)") $(if $(PARTS),--parts "$(PARTS)") $(if $(SECONDS),--seconds $(SECONDS)) \
  $(if $(FROM),--from "$(FROM)") $(if $(CACHE),--cache "$(CACHE)") $(if $(DRY),--dry) $(if $(AGAIN),--again)

gpu:  ## nine minutes that check, tune, time and profile on a GPU; dry without one (OUT=, PARTS=a,b,d, SECONDS=, FROM=, CACHE=, DRY=1)
	@if $(GPU_PYTHON) benchmarks/gpu/fits.py 2>/dev/null; then $(GPU_PYTHON) -m benchmarks.gpu $(GPU_RUN) $(ARGS); \
	else ./tools/python test -m benchmarks.gpu $(GPU_RUN) $(ARGS); fi

gpu-cache:  ## compile the kernels of `make gpu` here, to carry them to a machine with a GPU (build/gpu-cache.tar.xz)
	@./tools/python test -m benchmarks.gpu.cache $(CACHE) $(ARGS)

golden:  ## write the golden sources of the Triton kernels anew, after a change to a template
	@./tools/python test tests/helpers/triton_specs.py

drawings:  ## draw the map of every selector anew for docs/selection.md
	@./tools/python test tests/helpers/selector_drawings.py

texts:  ## write anew what the finder says of each text of tests/canonical and tests/finding, after a change there
	@PYTHONPATH=tests/fuzz ./tools/python test tests/helpers/texts.py

resources:  ## compile every default Triton kernel for every GPU and write down what it uses (a quarter of an hour)
	@./tools/python test tests/helpers/triton_resources.py

check:  ## lint, format, types, import arrows and circles, file lengths
	@./tools/python dev -m ruff check .
	@./tools/python dev -m ruff format --check .
	@./tools/python dev -m mypy
	@./tools/python dev -c "from importlinter.cli import lint_imports_command as check; check()" --no-logo
	@./tools/python dev tools/long_files.py

format:  ## put the code into ruff's format
	@./tools/python dev -m ruff check --fix .
	@./tools/python dev -m ruff format .

docs:  ## write the reference pages and build the site into build/site, strictly
	@./tools/python docs tools/reference.py
	@NO_MKDOCS_2_WARNING=1 ./tools/python docs -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

bench:  ## run every benchmark of a CPU, or the demo's timings while there is none
	@set -e; for file in benchmarks/[!_]*.py; do \
	  if [ -e "$$file" ]; then ./tools/python examples "$$file" $(ARGS); \
	  else ./tools/python examples examples/quickstart.py --timings; fi; done

zoo:  ## judge every model of the zoo and write docs/zoo.md (about an hour)
	@./tools/python test -m benchmarks.zoo $(ARGS)

fuzz:  ## random attention spellings for an hour (ARGS="--minutes 5" and the like)
	@OMP_NUM_THREADS=1 ./tools/python test tests/fuzz/fuzz_long.py --minutes 60 $(ARGS)

faults:  ## kills, races, full disks, planted objects and hostile files, ten times as many as in CI (a quarter of an hour)
	@# an hour of random operator calls under sanitizers by itself: python tests/faults/op_fuzz.py
	@OMP_NUM_THREADS=1 KVT_FAULTS=$${KVT_FAULTS:-10} ./tools/python test -m pytest tests/faults $(ARGS)

clean:  ## remove the environment and everything generated
	rm -rf .venv .venvs .setup build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
