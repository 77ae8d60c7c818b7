# make setup       virtual environment, packages, a Vulkan driver that draws (quick when done)
# make train       PAIR-VLA with its defaults; e.g. make train BACKBONE=pi05-flat ARGS="--iterations 10"
# make test        lint and tests; make test-slow: the tests that take minutes
# make results     the studies' tables and figures once more, from the committed records
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
PYTHON ?= python3
BACKBONE ?=
ARGS ?=

.PHONY: setup mesa train test test-slow lint results clean

setup: .venv/ready

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || {
		echo "error: Python 3.11 or 3.12 is needed (mani_skill asks for mplib==0.1.1, which has no wheel for later ones)"\
			"and $(PYTHON) is another or missing: make setup PYTHON=python3.12" >&2; exit 2; }
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv || {
		rm -rf .venv; echo "error: no virtual environment could be made: apt-get install python3-venv" >&2; exit 2; }
	.venv/bin/pip install --disable-pip-version-check -r requirements.txt
	if .venv/bin/python envs.py --check || { make --no-print-directory mesa && .venv/bin/python envs.py --check; }; then touch $@
	else echo "warning: no scene can be drawn here, so that only Flatland runs: make train BACKBONE=pi05-flat" >&2; fi

# Mesa's CPU renderer lavapipe, for machines where envs.py cannot draw yet. Mesa before 24.3 is no use to SAPIEN.
mesa:
	@ID=unknown; VERSION_CODENAME=; test ! -r /etc/os-release || . /etc/os-release
	packages="mesa-vulkan-drivers libvulkan1 libegl1 libgl1 libx11-6 libglib2.0-0"
	commands="apt-get update && apt-get install -y $$packages"
	if [ "$$ID $$VERSION_CODENAME" = "debian bookworm" ]; then # its own Mesa is 22.3; the backports have 25.0
		mirror=$$(grep -rhosE 'https?://[^ ]+/debian/?( |$$)' /etc/apt/sources.list /etc/apt/sources.list.d | head -n 1 || true)
		line="deb $$mirror bookworm-backports main"
		commands="apt-get update && apt-get install -y -t bookworm-backports $$packages"
		grep -qrs "bookworm-backports" /etc/apt/sources.list /etc/apt/sources.list.d ||
			commands="echo '$$line' > /etc/apt/sources.list.d/bookworm-backports.list && $$commands"
	fi
	become=none
	if [ "$$(id -u)" = 0 ]; then become=
	elif command -v sudo > /dev/null && sudo -n true 2> /dev/null; then become=sudo; fi
	if [ "$$become" = none ] || { [ "$$ID" != debian ] && [ "$$ID" != ubuntu ]; }; then
		echo "error: this machine cannot draw yet, and make may not install packages here. As root, run" >&2
		if [ "$$ID" = debian ] || [ "$$ID" = ubuntu ]; then echo "    $$commands" >&2
		else echo "    the packages of Mesa 24.3 or later with lavapipe (Fedora: dnf install mesa-vulkan-drivers vulkan-loader libX11;" >&2
			echo "    Arch: pacman -S vulkan-swrast vulkan-icd-loader libx11)" >&2; fi
		echo "then make setup again." >&2
		exit 2
	fi
	echo "installing Mesa's lavapipe: $$commands"
	$$become env DEBIAN_FRONTEND=noninteractive bash -c "$$commands"

train: setup
	@.venv/bin/python ppo_pair.py $(if $(BACKBONE),--backbone $(BACKBONE)) $(ARGS)

test: setup lint
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile

test-slow: setup
	@.venv/bin/python -m pytest -m slow

lint: setup
	@.venv/bin/ruff check .
	.venv/bin/ruff format --check .

results: setup
	@for file in results/*/*.jsonl; do name=$$(basename $$file .jsonl)
		.venv/bin/python tools/study.py --backbone $$(echo $$name | cut -d- -f1,2) --name $$name --table > /dev/null; done

clean:
	@rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
