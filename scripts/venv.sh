#!/usr/bin/env bash
# Build .venv with everything this project needs; `make venv` calls it. Finds a suitable Python or brings one, uses uv
# or plain pip. Does nothing when .venv is up to date. PYTHON=/path/to/python3.12 and UV=/path/to/uv override the search.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
BOOTSTRAP=.venv-bootstrap # uv, and a Python of our own where the machine has none
STAMP=$VENV/.installed
SUITABLE='import sys, zlib, ssl, ctypes; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))'
CHANGE='install Python 3.12 (or set PYTHON=/path/to/python3.12) and run make venv again'

say() { printf 'venv: %s\n' "$*"; }
die() { printf 'venv: %s\n' "$*" >&2 && exit 1; }

# A shim may be on PATH and still fail, so candidates are judged by running them. `-I`: nothing of the caller's leaks in.
suits() { [ -n "$1" ] && command -v "$1" >/dev/null 2>&1 && "$1" -I -c "$SUITABLE" >/dev/null 2>&1 </dev/null; }

find_python() {
    local candidate
    for candidate in python3.12 python3.13 python3 python \
        "$HOME"/.pyenv/versions/3.12*/bin/python3 "$HOME"/.pyenv/versions/3.13*/bin/python3 \
        "$HOME"/{miniconda3,anaconda3,miniforge3,mambaforge,.conda}/bin/python3 /opt/{conda,miniconda3}/bin/python3 \
        "$HOME"/{miniconda3,anaconda3,miniforge3,mambaforge,.conda}/envs/*/bin/python3 /opt/conda/envs/*/bin/python3 \
        /usr/bin/python3.1[23] /usr/local/bin/python3.1[23] /opt/homebrew/bin/python3.1[23] /opt/python*/bin/python3; do
        if suits "$candidate"; then
            # the interpreter itself: a shim may resolve to another one in another folder
            "$candidate" -I -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

find_uv() {
    local candidate
    for candidate in "${UV:-}" uv "$BOOTSTRAP/bin/uv" "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv"; do
        if [ -n "$candidate" ] && "$candidate" --version >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

bootstrap_uv() { # any Python that can install a package will do
    local python
    for python in "${1:-}" python3 python /usr/bin/python3; do
        [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1 || continue
        # Debian's python3 comes without ensurepip but may have pip.
        if { "$python" -m venv "$BOOTSTRAP" && "$BOOTSTRAP/bin/python" -m pip install --quiet uv; } >/dev/null 2>&1 ||
            "$python" -m pip install --quiet --prefix "$PWD/$BOOTSTRAP" uv >/dev/null 2>&1; then
            "$BOOTSTRAP/bin/uv" --version >/dev/null 2>&1 && return
        fi
    done
    return 1
}

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

python=${PYTHON:-}
if [ -n "$python" ]; then
    suits "$python" || die "PYTHON=$python is not a working Python 3.12 or 3.13; $CHANGE"
else
    python=$(find_python) || python=
fi
uv=$(find_uv) || { say "fetching uv into $BOOTSTRAP" && bootstrap_uv "$python" && uv=$(find_uv); } || uv=
if [ -z "$python" ]; then
    [ -n "$uv" ] || die "found neither Python 3.12 or 3.13 nor a way to get uv; $CHANGE"
    python=$("$uv" python find --no-python-downloads '>=3.12,<3.14' 2>/dev/null) && suits "$python" || {
        say "no Python 3.12 or 3.13 here: fetching 3.12 into $BOOTSTRAP"
        "$uv" python install --no-bin 3.12 && python=$("$uv" python find 3.12)
    } || die "Python 3.12 could not be downloaded; $CHANGE"
fi
say "using $("$python" -I -c 'import sys; print("Python %d.%d.%d" % sys.version_info[:3])') at $python"

# pip also where uv fails: it knows mirrors and certificates from pip's own configuration
{ [ -n "$uv" ] && install_with_uv; } || install_with_pip ||
    die "the packages could not be installed (see above); check the network and free space (8 GB), run make venv again"
fingerprint >$STAMP
say "ready: $VENV"
