# make book and make test are all that a newcomer needs; each sets up .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
RESULTS ?= $(basename $(notdir $(wildcard book/tools/*_cells.py)))
# Two test processes of one thread each are faster on two cores than one process of two threads.
TWO_PROCESSES := -n 2 --dist worksteal
export PAPERLIB_PROFILE ?= smoke
# Python keeps what it has compiled (__pycache__), so that the next run does not compile all tests again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help book html figures test lint unit notebooks-test pages-test test-long test-gpu execute results lab bench \
        bench-pages screenshots colab student solutions student-book slides figures-png \
        readme-pictures lock clean

help:
	@echo "make book       build the rendered book from the committed outputs"
	@echo "make test       lint, unit tests, every notebook, the book, the browser"
	@echo "make lab        open the notebooks in JupyterLab"
	@echo "make execute    re-run the notebooks whose code changed, and stamp them (FORCE=1: all of them)"
	@echo "make figures    draw the figures of the paper pages whose code changed"
	@echo "make results    train and measure what is too long for a notebook (hours; RESULTS=padim_cells: one of them)"
	@echo "make lint       ruff (style, import order), and the wording check"
	@echo "make bench      speed of paperlib beside its peers (quick; FULL=1: larger sizes and curves; CURVES=1: curves only)"
	@echo "make bench-pages  how heavy the built pages are, how soon they show, how long a warm build takes"
	@echo "make screenshots  each page at two widths, light and dark, in _build/screenshots"
	@echo "make colab      self-contained copies of the notebooks in _build/colab"
	@echo "make student    the same without solutions, in _build/student (SEED=2027: with other numbers in exercises)"
	@echo "make solutions  the same with solutions, for the teacher, in _build/solutions (SEED=2027)"
	@echo "make student-book  the book without solutions, in _build/student-book/_build/html"
	@echo "make slides     a deck with speaker notes and a prediction sheet per chapter, in _build/slides"
	@echo "make figures-png  every figure as PNG, with captions and licences in index.csv, in _build/figures (Chromium)"
	@echo "make readme-pictures  the pictures of README, from the built book and an inspection of solar cells (Chromium)"
	@echo "make test-long  tests of several minutes"
	@echo "make test-gpu   tests that need a CUDA device, then the bench on it (PYTHON=python3: without .venv)"
	@echo "make lock       pin every package again, with hashes (UPGRADE=1: at its newest version)"
	@echo "make clean      remove what was built (not .venv)"

# ---- set-up ---------------------------------------------------------------------------------------------------------
# Two steps, so that reading the book does not install the test tools.
$(VENV)/.ready-book: pyproject.toml $(wildcard requirements/*.txt) book/tools/set_up.py
	$(PYTHON) book/tools/set_up.py $(VENV) book
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready-book
	$(PYTHON) book/tools/set_up.py $(VENV) book test
	@touch $@

# Needs the package index. constraints.txt keeps its versions where pyproject.toml still allows them; UPGRADE=1 takes
# the newest. The locks hold OpenCV without windows, which needs no library of a screen and owns the same files.
COMPILE := $(BIN)/uv pip compile --quiet --system-certs --universal --python-version 3.11 --fork-strategy fewest \
    --no-annotate --custom-compile-command "make lock"
PIN := $(COMPILE) --constraints constraints.txt --generate-hashes --no-emit-package opencv-python
lock: $(VENV)/.ready-book
	$(COMPILE) pyproject.toml --extra test --group setup -o constraints.txt $(if $(UPGRADE),--upgrade) >/dev/null
	$(PIN) pyproject.toml --extra book --group lock -o requirements/book.txt >/dev/null
	$(PIN) pyproject.toml --extra test --group lock -o requirements/test.txt >/dev/null \
	    $$(sed -n 's/^\([a-z0-9.-]*\)==.*/--no-emit-package \1/p' requirements/book.txt)
	$(PIN) --group uv -o requirements/uv.txt >/dev/null

# ---- the book -------------------------------------------------------------------------------------------------------
html: $(VENV)/.ready-book
	@mkdir -p _build
	$(BIN)/jupyter-book build . --toc book/_toc.yml -W -n --keep-going >_build/html.log 2>&1 || { cat _build/html.log; exit 1; }

book: html
	@echo "The book is at _build/html/index.html: open that file in a browser,"
	@echo "or run   $(BIN)/python -m http.server -d _build/html   and open http://localhost:8000"

execute: $(VENV)/.ready-book
	$(BIN)/python book/tools/run_notebooks.py $(if $(FORCE),--force)

figures: $(VENV)/.ready-book
	$(BIN)/python book/figures/draw.py $(if $(FORCE),--force)

results: $(VENV)/.ready-test
	for name in $(RESULTS); do $(BIN)/python book/tools/$$name.py $(if $(FORCE),--force) || exit 1; done

lab: $(VENV)/.ready-book
	$(BIN)/jupyter lab --notebook-dir=notebooks $(JUPYTER_ARGUMENTS)

colab: $(VENV)/.ready-book
	$(BIN)/python book/tools/export_colab.py _build/colab $(NOTEBOOKS)

student: $(VENV)/.ready-book
	$(BIN)/python book/tools/student.py notebooks _build/student $(if $(SEED),--seed $(SEED)) $(NOTEBOOKS)

solutions: $(VENV)/.ready-book
	$(BIN)/python book/tools/student.py solutions _build/solutions $(if $(SEED),--seed $(SEED)) $(NOTEBOOKS)

# Built from a copy of the sources that holds no solutions: what is not there can't be published.
student-book: $(VENV)/.ready-book
	$(BIN)/python book/tools/student.py sources _build/student-book/sources $(if $(SEED),--seed $(SEED))
	bin="$$(cd "$(BIN)" && pwd)" && cd _build/student-book/sources && \
	"$$bin/jupyter-book" build . --toc book/_toc.yml -W -n --keep-going --path-output .. \
	    >../build.log 2>&1 || { cat ../build.log; exit 1; }
	$(BIN)/python book/tools/student.py check _build/student-book/_build/html
	@echo "The book for students is at _build/student-book/_build/html/index.html"

slides: $(VENV)/.ready-book
	$(BIN)/python book/tools/slides.py decks _build/slides
	$(BIN)/python book/tools/student.py check _build/slides
	@echo "The decks are at _build/slides/index.html: open that file in a browser. n shows the speaker notes."

figures-png: $(VENV)/.ready-book
	$(BIN)/python book/tools/slides.py png _build/figures $(if $(CHROMIUM),--chromium $(CHROMIUM))

readme-pictures: $(VENV)/.ready-test html
	$(BIN)/python book/tools/readme_pictures.py

# ---- tests ----------------------------------------------------------------------------------------------------------
lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python book/tools/wording.py

unit: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests --ignore=tests/book $(TWO_PROCESSES)

# The cells of a notebook share a kernel, so a notebook is the unit of work. The longest comes first, by the stamps, so
# that both processes end at about the same time.
LONGEST_FIRST = $(shell grep -o '"seconds": [0-9.]*' $(NOTEBOOKS) | sort -t: -k3 -rn | cut -d: -f1)
notebooks-test: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --nbval-lax --nbval-current-env --nbval-cell-timeout=600 -p no:cacheprovider \
	    $(LONGEST_FIRST) $(filter-out $(LONGEST_FIRST),$(NOTEBOOKS)) -n 2 --dist loadscope --no-loadscope-reorder

define look-for-chromium
@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || test -n "$(CHROMIUM)" || \
    echo "No chromium: the browser tests will be skipped. Debian and Ubuntu: apt-get install chromium." \
    "Elsewhere: install Chromium and set CHROMIUM=<path of its program>."
endef

pages-test: $(VENV)/.ready-test html
	$(look-for-chromium)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -rs tests/book $(TWO_PROCESSES)

screenshots: $(VENV)/.ready-test html
	rm -rf _build/screenshots
	SCREENSHOTS=1 $(BIN)/pytest -q tests/book/test_browser.py -k test_page_is_complete -n 2

# The book is built by one process, so the notebooks run beside it; then unit and pages-test in one session.
test: $(VENV)/.ready-test
	$(MAKE) --jobs=2 lint html notebooks-test
	$(look-for-chromium)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -rs tests $(TWO_PROCESSES)
	@echo "make test: everything passed"

test-long: $(VENV)/.ready-test html
	$(BIN)/pytest -q -rs -m long tests

# PYTHON=… on the command line: an interpreter that has PyTorch already; nothing is installed.
GIVEN_PYTHON := $(if $(filter command line,$(origin PYTHON)),$(PYTHON))
test-gpu: $(if $(GIVEN_PYTHON),,$(VENV)/.ready-test)
	$(or $(GIVEN_PYTHON),$(BIN)/python) tests/run_gpu.py $(if $(FULL),--full)

bench: $(VENV)/.ready-test
	$(BIN)/python tests/bench $(if $(FULL),--full) $(if $(CURVES),--curves)

bench-pages: $(VENV)/.ready-test html
	$(BIN)/python -m tests.bench.bench_pages --build

clean:
	rm -rf _build
