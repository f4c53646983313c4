# `make demo` and `make test` start from a bare clone with python3, make and a package index.

BIN := .venv/bin
DEMO := build/demo
DEMO_SCENE := build/demo-scene

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo demo-scene test test-slow chaos soak netns lint benchmark clean

install: $(BIN)/.installed

# pip compiles on one core; files that are no Python of this version, such as templates, are left as they are.
$(BIN)/.installed: pyproject.toml constraints.txt
	python3 -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@

# Labels 96 drawn scenes that the committed checkpoint never saw, and says how right it was.
demo: install
	rm -rf $(DEMO)
	python -m segray.demo $(DEMO)/scenes --num-scenes 96 --first-seed 1000000
	python jobs/label.py $(DEMO)/scenes/images $(DEMO)/labels --model segray/demo.safetensors
	python jobs/evaluate.py $(DEMO)/labels $(DEMO)/scenes/targets
	python jobs/report.py $(DEMO)/labels

# Labels a drawn scene with a place on Earth, window by window, and writes what any GIS opens.
demo-scene: install
	rm -rf $(DEMO_SCENE)
	python -m segray.demo $(DEMO_SCENE) --num-scenes 16 --format raster
	python jobs/label.py $(DEMO_SCENE)/rasters $(DEMO_SCENE)/labels --model segray/demo.safetensors --scenes.size 512
	python jobs/export.py $(DEMO_SCENE)/labels $(DEMO_SCENE)/maps
	python jobs/evaluate.py $(DEMO_SCENE)/labels $(DEMO_SCENE)/targets
	python jobs/report.py $(DEMO_SCENE)/labels
	@echo "Label map (GeoTIFF): $$(ls $(DEMO_SCENE)/maps/*/*/*.tif)"
	@echo "Polygons (GeoParquet): $$(ls $(DEMO_SCENE)/maps/*/*/*.parquet)"

# The longest first, so that both processes end at about the same time.
LONGEST := $(patsubst %,tests/test_%.py,label train label_scenes cluster chaos jobs)

test: lint
	pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(LONGEST) tests

# The long forms: CamVid at full size, each architecture by heart; trainings that are stopped, lost nodes, models on
# pretended GPUs.
test-slow: install
	pytest -m slow

# Fifty runs, each with a fault, each run again and verified.
chaos: install
	python -m tests.chaos

# A million small images through the whole job; memory and images per second.
soak: install
	python -m tests.soak

# Several hosts, which are network namespaces, and two of them cut off while jobs run; root only.
netns: install
	python -m tests.netns

lint: install
	ruff check
	ruff format --check
	mypy
	lint-imports

# Each stage of an image; images per second of labelling, against bare loops, a DataLoader, Ray's documented recipe and
# Daft, with tables and a plot in build/benchmark; of training, against its step; a scene of 30,000 × 30,000 pixels, its
# memory, and its windows per second against a bare loop; many models, a slow sink, and what all but the model takes.
# Without the extra's packages Daft and plots are left out.
benchmark: install
	-$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[benchmark]'
	python -m tests.benchmarks.stages
	python -m tests.benchmarks.throughput
	python -m tests.benchmarks.training
	python -m tests.benchmarks.throughput --model deeplabv3_resnet50
	python -m tests.benchmarks.scenes
	python -m tests.benchmarks.scale
	python -m tests.benchmarks.overhead

clean:
	rm -rf build
