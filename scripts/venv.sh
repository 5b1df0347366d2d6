#!/usr/bin/env bash
# Build .venv with everything this project needs; `make venv` calls it. Finds a suitable Python or brings one, uses uv
# or plain pip. Does nothing when .venv is up to date. PYTHON=/path/to/python3.12 and UV=/path/to/uv override the search.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
BOOTSTRAP=.venv-bootstrap # uv, and a Python of our own where the machine has none
STAMP=$VENV/.installed
NEWEST=13
. scripts/find_python.sh

fingerprint() { cat requirements.txt pyproject.toml setup.py | cksum; }

up_to_date() { [ -f $STAMP ] && [ "$(cat $STAMP)" = "$(fingerprint)" ] && suits $VENV/bin/python; }

install_with_uv() {
    suits $VENV/bin/python || "$uv" venv --quiet --clear --python "$python" $VENV || return
    say "installing requirements.txt with uv (PyTorch brings several GB: minutes on the first run)"
    # bytecode now, not in every process of every test: some shells set PYTHONDONTWRITEBYTECODE
    "$uv" pip install $quiet --compile-bytecode --python $VENV/bin/python -r requirements.txt || return
    "$uv" pip install --quiet --python $VENV/bin/python --no-deps --no-build-isolation -e .
}

install_with_pip() {
    "$python" -m venv --clear $VENV || return
    say "installing requirements.txt with pip (PyTorch brings several GB: many minutes on the first run)"
    $VENV/bin/python -m pip install --quiet -r requirements.txt || return
    $VENV/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
}

up_to_date && exit 0
if command -v flock >/dev/null 2>&1; then # two targets at once: the second waits, then finds the work done
    exec 9>.venv.lock
    flock 9
    up_to_date && exit 0
fi
rm -f $STAMP

[ -t 2 ] && quiet= || quiet=--quiet # progress is for people, not for logs
export UV_PYTHON_INSTALL_DIR="$PWD/$BOOTSTRAP/pythons" UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}"
unset VIRTUAL_ENV PYTHONHOME PYTHONPATH

find_python_and_uv

# pip also where uv fails: it knows mirrors and certificates from pip's own configuration
{ [ -n "$uv" ] && install_with_uv; } || install_with_pip ||
    die "the packages could not be installed (see above); check the network and free space (8 GB), run make venv again"
fingerprint >$STAMP
say "ready: $VENV"
