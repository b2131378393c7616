# make demo       render a small video dataset, train InTI and Naive on it, evaluate, predict, draw
# make test       run all tests
# make check      lint and the fast tests, before a commit
# make benchmark  measure speed and memory, check the targets: an hour on 2 cores
# make benchmark-gpu  the same of models on a GPU: minutes on an H100
# make survive    kill, break and split training runs, compare their ends: three quarters of an hour
# make fuzz       decode 100,000 broken videos: hours, resumable
# make mutants    change hf_inti/model/ line by line, expect a test to fail: hours, resumable
# make clean      remove what these made
#
# Each installs into .venv with pip first, with the versions in constraints.txt. Variables:
#   PYTHON       the interpreter for .venv, 3.11 or newer
#   TORCH_INDEX  where pip gets torch; https://download.pytorch.org/whl/cpu avoids CUDA on machines without a GPU
#   SEED         of the demo's videos and weights
#   RECORD       the file that the demo's accuracies are added to
#   AGAIN        --again: make mutants tries survivors again

PYTHON ?= python3
TORCH_INDEX ?=
SEED ?= 0
RECORD ?= demo/demo.json
PIP = .venv/bin/python -m pip install --disable-pip-version-check -q --no-compile -c constraints.txt
RUN = .venv/bin/python

# Python compiles what is imported, once, instead of pip all of it: a minute and a half less.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test benchmark benchmark-gpu survive fuzz mutants check lint clean

.venv/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: give make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into .venv: this takes a few minutes once"
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip  # newer ones resolve in half the time
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch)
	$(PIP) -e ".[test]"
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX),$(PIP)) --no-deps --upgrade --target .venv/torchvision torchvision
	@touch $@

demo: .venv/installed
	rm -rf demo
	$(RUN) scripts/make_demo_data.py --output_dir demo/data --seed $(SEED)
	$(RUN) scripts/pretrain_demo_tower.py --output_dir demo/tower --seed $(SEED)
	$(RUN) scripts/train.py scripts/recipes/demo.yaml --seed $(SEED) --compression none --output_dir demo/naive
	$(RUN) scripts/train.py scripts/recipes/demo.yaml --seed $(SEED) --output_dir demo/inti
	$(RUN) scripts/evaluate.py demo/naive/last --data_dir demo/data
	$(RUN) scripts/evaluate.py demo/inti/last --data_dir demo/data
	$(RUN) scripts/predict.py demo/inti/last demo/data/test/*/000.mp4 --top_k 2
	$(RUN) scripts/visualize.py demo/inti/last demo/data/test/slides_right/000.mp4 --output demo/figure4.png
	$(RUN) scripts/report_demo.py --seed $(SEED) --record $(RECORD)

# Files in the order of tests/conftest.py, each in one process.
SPREAD = -n auto --dist loadfile --no-loadscope-reorder

TORCHVISION_TESTS = tests/test_host_costs.py tests/test_host_vectors.py tests/test_hosts_mvit.py tests/test_hosts_videoswin.py \
	tests/test_training_hosts.py tests/test_recipes_hosts.py tests/test_comparison_hosts.py

test: .venv/installed
	$(RUN) -m pytest $(SPREAD)
	HF_INTI_TORCHVISION=$(CURDIR)/.venv/torchvision $(RUN) -m pytest $(SPREAD) $(TORCHVISION_TESTS)

BENCHMARK = $(RUN) scripts/benchmark.py
PAIR = $(BENCHMARK) models scripts/benchmarks/naive_
OUT = --output_dir results/benchmarks
TORCHVISION = HF_INTI_TORCHVISION=$(CURDIR)/.venv/torchvision PYTHONPATH=tests/torchvision_path $(BENCHMARK)

# Where a dash stands, a missed target does not keep the rest from running: some hosts are close to theirs.
benchmark: .venv/installed
	$(PAIR)b16.yaml --matmul_precision medium $(OUT)/naive_b16_plain
	$(BENCHMARK) models scripts/benchmarks/limit.yaml $(OUT)/limit
	$(PAIR)b16.yaml --optimize true --precision bf16 $(OUT)/naive_b16_bf16
	$(PAIR)b16.yaml --optimize true --matmul_precision medium --compile true $(OUT)/naive_b16_compiled
	$(PAIR)l14.yaml --optimize true --matmul_precision medium $(OUT)/naive_l14
	$(PAIR)l14.yaml --optimize true --precision bf16 $(OUT)/naive_l14_bf16
	$(BENCHMARK) models scripts/benchmarks/training_b16.yaml $(OUT)/training_b16
	$(BENCHMARK) models scripts/benchmarks/peers.yaml $(OUT)/peers
	-$(BENCHMARK) models scripts/benchmarks/hosts.yaml $(OUT)/hosts
	-$(BENCHMARK) models scripts/benchmarks/hosts.yaml --precision bf16 $(OUT)/hosts_bf16
	-$(TORCHVISION) models scripts/benchmarks/hosts_torchvision.yaml $(OUT)/hosts_torchvision
	-$(TORCHVISION) models scripts/benchmarks/hosts_torchvision.yaml --precision bf16 $(OUT)/hosts_torchvision_bf16
	$(BENCHMARK) decoding scripts/benchmarks/decoding.yaml $(OUT)/decoding
	$(BENCHMARK) prediction scripts/benchmarks/prediction.yaml $(OUT)/prediction
	$(BENCHMARK) bulk scripts/benchmarks/bulk.yaml
	$(BENCHMARK) export scripts/benchmarks/export.yaml $(OUT)/export
	$(BENCHMARK) growth scripts/benchmarks/growth.yaml $(OUT)/growth

GPU = --precision bf16 $(OUT)/gpu_
benchmark-gpu: .venv/installed
	-$(PAIR)b16.yaml --optimize true --batch_size 16 $(GPU)naive_b16
	-$(PAIR)b16.yaml --optimize true --compile true --batch_size 16 $(GPU)naive_b16_compiled
	-$(PAIR)l14.yaml --optimize true --batch_size 8 $(GPU)naive_l14
	-$(BENCHMARK) models scripts/benchmarks/training_b16.yaml --batch_size 16 $(GPU)training_b16
	-$(PAIR)l14.yaml --mode training --memory true --batch_size 8 $(GPU)training_l14
	-$(BENCHMARK) models scripts/benchmarks/peers.yaml --batch_size 8 $(GPU)peers
	-$(BENCHMARK) models scripts/benchmarks/hosts.yaml --batch_size 8 $(GPU)hosts
	-$(TORCHVISION) models scripts/benchmarks/hosts_torchvision.yaml --batch_size 8 $(GPU)hosts_torchvision

RELIABILITY = results/reliability

survive: .venv/installed
	$(RUN) tests/reliability/kills.py --kills 50 --output $(RELIABILITY)/kills.json
	$(RUN) tests/reliability/faults.py --output $(RELIABILITY)/faults.json
	$(RUN) tests/reliability/processes.py --output $(RELIABILITY)/processes.json
	$(RUN) tests/reliability/fsdp.py --output $(RELIABILITY)/fsdp.json
	$(RUN) tests/reliability/steady.py --output $(RELIABILITY)/steady.json
	$(RUN) tests/reliability/lengths.py --output $(RELIABILITY)/lengths.json
	$(RUN) tests/reliability/bulk.py --kills 20 --output $(RELIABILITY)/bulk.json
	$(RUN) tests/reliability/nodes.py --kills 10 --output $(RELIABILITY)/nodes.json
	$(RUN) tests/reliability/report.py

fuzz: .venv/installed
	$(RUN) tests/fuzz/run.py --cases 100000 $(if $(HF_INTI_TEST_DATA),--videos $(HF_INTI_TEST_DATA)/videos) \
		--output outputs/fuzz.json

mutants: .venv/installed
	$(PIP) -e ".[test,mutants]"
	$(RUN) tests/mutation/run.py $(AGAIN)

lint: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

check: lint
	$(RUN) -m pytest $(SPREAD) -m "not slow"

clean:
	rm -rf .venv demo build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
