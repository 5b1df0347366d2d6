# Finds a Python and uv, or brings them; sourced by venv.sh and frameworks_venv.sh, which set NEWEST (the last minor
# version that will do; the first is 12) and BOOTSTRAP (a folder for what is brought).

if [ "$NEWEST" = 12 ]; then WANTED='Python 3.12'; else WANTED="Python 3.12 or 3.$NEWEST"; fi
VERSIONS=">=3.12,<3.$((NEWEST + 1))"
SUITABLE="import sys, zlib, ssl, ctypes; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, $NEWEST))"
CHANGE="install Python 3.12 (or set PYTHON=/path/to/python3.12) and run this again"

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

# Sets python and uv (empty where only plain pip is left).
find_python_and_uv() {
    python=${PYTHON:-}
    if [ -n "$python" ]; then
        suits "$python" || die "PYTHON=$python is not a working $WANTED; $CHANGE"
    else
        python=$(find_python) || python=
    fi
    uv=$(find_uv) || { say "fetching uv into $BOOTSTRAP" && bootstrap_uv "$python" && uv=$(find_uv); } || uv=
    if [ -z "$python" ]; then
        [ -n "$uv" ] || die "found neither $WANTED nor a way to get uv; $CHANGE"
        python=$("$uv" python find --no-python-downloads "$VERSIONS" 2>/dev/null) && suits "$python" || {
            say "no $WANTED here: fetching 3.12 into $BOOTSTRAP"
            "$uv" python install --no-bin 3.12 && python=$("$uv" python find 3.12)
        } || die "Python 3.12 could not be downloaded; $CHANGE"
    fi
    say "using $("$python" -I -c 'import sys; print("Python %d.%d.%d" % sys.version_info[:3])') at $python"
}
