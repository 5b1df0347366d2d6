#!/usr/bin/env bash
# Build .venv-frameworks: Transformer Engine (importable; no GPU needed), Megatron-Bridge, mcore-bridge and what they
# import, for tests/frameworks and tests/te. `make venv-frameworks` calls it. Does nothing when it is up to date; says how
# long each part took; keeps the wheel it builds in .venv-frameworks-wheels. PYTHON, UV, CUDA_HOME and MAX_JOBS override.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv-frameworks
BOOTSTRAP=.venv-bootstrap
STAMP=$VENV/.installed
NEWEST=12 # Megatron-Bridge 0.6.2 is for Python 3.12
. scripts/find_python.sh

TE=2.20.2
# Their requirements ask for Transformer Engine built elsewhere, or for packages that do not fit together.
UNBOUND="megatron-bridge==0.6.2 mcore-bridge==1.6.5 ms-swift==4.6.0 transformer_engine==$TE"

fingerprint() { cat requirements-frameworks.txt pyproject.toml scripts/frameworks_venv.sh | cksum; }
up_to_date() { [ -f $STAMP ] && [ "$(cat $STAMP)" = "$(fingerprint)" ] && suits $VENV/bin/python; }
run_python() { $VENV/bin/python "$@"; }

# part NAME COMMAND...: what it is, and how long it took
part() {
    local name=$1 start=$SECONDS
    shift
    say "$name …"
    "$@" || die "$name failed (see above)"
    say "$name: $((SECONDS - start)) s"
}

install() { "$uv" pip install $quiet --python $VENV/bin/python "$@"; }

packages() {
    suits $VENV/bin/python || "$uv" venv --quiet --clear --python "$python" $VENV
    # wheels that ask for glibc 2.39 and import with 2.36 too (nvidia-resiliency-ext)
    install --compile-bytecode --python-platform "$(uname -m)-manylinux_2_39" -r requirements-frameworks.txt
}

find_cuda() {
    local folder
    for folder in "${CUDA_HOME:-}" /usr/local/cuda /usr/local/cuda-13* /opt/cuda; do
        [ -n "$folder" ] && [ -x "$folder/bin/nvcc" ] && printf '%s\n' "$folder" && return
    done
    return 1
}

# The C++ half belongs to one torch and one Python: its wheel lies in a folder named after both.
transformer_engine() {
    local wheels nvidia cuda torch
    torch=$(run_python -c 'import importlib.metadata; print(importlib.metadata.version("torch"))')
    wheels=.venv-frameworks-wheels/torch-$torch
    if ! compgen -G "$wheels/transformer_engine_torch-$TE-*.whl" >/dev/null; then
        cuda=$(find_cuda) || die "Transformer Engine's PyTorch half is built here and asks for a CUDA 13 toolkit (nvcc and \
its headers; no GPU): given none in CUDA_HOME, /usr/local/cuda*, /opt/cuda; install one (Debian and NVIDIA: cuda-nvcc-13-0, \
cuda-cudart-dev-13-0), or put transformer_engine_torch-$TE-*.whl into $wheels"
        command -v c++ >/dev/null || die "no C++ compiler (c++): install g++"
        nvidia=$(run_python -c 'import nvidia; print(list(nvidia.__path__)[0])')
        say "building transformer_engine_torch $TE with $cuda: about 14 minutes on two cores"
        CPATH=$nvidia/cu13/include:$nvidia/cudnn/include:$nvidia/nccl/include CUDA_HOME=$cuda MAX_JOBS=${MAX_JOBS:-2} \
            NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE PATH="$PWD/$VENV/bin:$PATH" \
            run_python -m pip wheel --quiet --no-deps --no-build-isolation --no-binary transformer_engine_torch \
            -w "$wheels" "transformer_engine_torch==$TE" || return
    fi
    install --no-deps "$wheels"/transformer_engine_torch-$TE-*.whl
}

imports() {
    run_python -c 'import torch, transformer_engine.pytorch' || return
    run_python -c 'import megatron.bridge, modelopt, nvidia_resiliency_ext' || return
    run_python -c 'import mcore_bridge, swift'
}

up_to_date && exit 0
if command -v flock >/dev/null 2>&1; then # two targets at once: the second waits, then finds the work done
    exec 9>.venv.lock
    flock 9
    up_to_date && exit 0
fi
rm -f $STAMP

[ -t 2 ] && quiet= || quiet=--quiet
export UV_PYTHON_INSTALL_DIR="$PWD/$BOOTSTRAP/pythons" UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}"
unset VIRTUAL_ENV PYTHONHOME PYTHONPATH

find_python_and_uv
[ -n "$uv" ] || die "uv is needed here and could not be fetched: pip install uv, or set UV=/path/to/uv"
part "packages of requirements-frameworks.txt" packages
part "$UNBOUND" install --no-deps $UNBOUND
part "Transformer Engine" transformer_engine
part "regate_megatron" install --no-deps --no-build-isolation -e .
part "imports" imports
fingerprint >$STAMP
say "ready: $VENV, $SECONDS s in all"
