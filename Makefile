# make demo   install into .venv, fetch small real data, pretrain and probe on two CPU cores
# make test   install the test tools too, and run all tests but those of the next line
# make lint   ruff only
# make test-integration  fifteen fairseq-hydra-train runs, as written and under d2v-fast run; 3 minutes of one core
# make ci     both at once
# make gpu-check  extension, GPU tests and all benchmarks with the Python that has PyTorch for CUDA (PYTHON=...), within 8 minutes
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MODALITY ?= all
OUT ?= runs/demo
WORKERS ?= 2
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# tests of what runs Triton kernels: test_OP.py and test_OP_*.py of all ops but two, less those of the CUDA bindings
INTERPRETED := $(filter-out tests/test_conv0%.py tests/test_strided_conv%.py tests/test_%_bindings.py, \
	$(sort $(wildcard $(foreach op,$(patsubst d2v_fast/ops/%.py,%,$(wildcard d2v_fast/ops/[a-z]*.py)), \
	tests/test_$(op).py tests/test_$(op)_*.py)))) \
	tests/test_data2vec.py tests/test_encoder.py tests/test_optim.py tests/test_teacher.py \
	tests/test_chunks.py tests/test_launch.py tests/test_rows.py tests/test_train_step_kernels.py
PATHS := $(if $(SPEECH),--speech "$(SPEECH)") $(if $(IMAGE),--image "$(IMAGE)") $(if $(TEXT),--text "$(TEXT)")

.DELETE_ON_ERROR:
.PHONY: demo test ci test-integration lint gpu-check clean

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed; say which with make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: no venv module; on Debian/Ubuntu: apt-get install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.demo: $(VENV)/.created requirements/demo.txt requirements/constraints.txt pyproject.toml setup.py
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) -r requirements/demo.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.demo requirements/test.txt requirements/peers.txt
	@$(PIP) -r requirements/test.txt
	@$(PIP) --no-deps -r requirements/peers.txt
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/python -m d2v_fast.demo --modality $(MODALITY) --out $(OUT) $(PATHS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The interpreter is a property of the process, so the same op tests run twice: on the reference, and on the kernels.
# A file's tests stay together, for what they share; files in the order of tests/conftest.py.
test: export OMP_NUM_THREADS := 1
test: lint
	$(PYTEST) $(RUNS) tests/test_*.py
	$(BIN)/python benchmarks/cpu_frontend.py --threads 2 --budget 1
	$(BIN)/python benchmarks/bench_train_step.py --smoke --threads 2
	TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED)

ci: RUNS := tests/integration/fairseq_runs.py
ci: test

# Real speech and text of the demo: loss, gradient norm and every tensor of the checkpoints, resumed by the other too.
test-integration: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -s tests/integration/fairseq_runs.py

# No virtual environment: the pinned PyTorch may not be the one that drives this GPU, and nothing need be installed.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
