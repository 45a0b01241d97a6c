#!/usr/bin/env bash
# Install this checkout, editable, into the environment of an interpreter.
#
#   scripts/install.sh PYTHON [EXTRAS]      e.g. scripts/install.sh .venv/bin/python train,eval,dev
#
# Without an NVIDIA GPU: the CPU build of torch, the versions of constraints.txt, and lmms-eval
# without its own requirements (they bring torchvision's CUDA build, which breaks on CPU torch).
# With a GPU: the ordinary extras, unconstrained. A second run with nothing changed does nothing.
set -euo pipefail

python=${1:?usage: scripts/install.sh PYTHON [EXTRAS]}
extras=${2:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

"$python" - <<'PY' || exit 2
import sys
if sys.version_info < (3, 10):
    sys.exit(f"error: mllm needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}")
PY

stamp=$("$python" -c 'import sys; print(sys.prefix)')/.mllm-installed
key=$(printf '%s\n' "$root" "$extras" | cat - pyproject.toml constraints.txt scripts/install.sh | sha256sum)
if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then
    exit 0
fi

"$python" -I scripts/check_import_name.py

say() { printf 'install: %s\n' "$*" >&2; }
# pip's warnings about places that hold no package would bury its errors, hence -qq.
pip() { "$python" -m pip --disable-pip-version-check install -qq "$@"; }

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }
wants() { [[ ",$extras," == *",$1,"* ]]; }

if has_gpu; then
    say "GPU found: the ordinary packages (extras: ${extras:-none})"
    # With CUDA torch nothing stands against lmms-eval's own requirements.
    extras=$(printf '%s' ",$extras," | sed 's/,eval,/,eval-full,/; s/^,//; s/,$//')
    pip -e ".${extras:+[$extras]}"
else
    say "no GPU found: CPU torch and the versions of constraints.txt (extras: ${extras:-none})"
    if [[ $(uname -s) == Linux ]]; then
        version=$(sed -n 's/^torch==//p' constraints.txt)
        if ! pip -c constraints.txt "torch==$version+cpu" 2>/dev/null; then
            say "pip finds no CPU build of torch $version and will take the default one, which can" \
                "bring gigabytes of CUDA; point pip at PyTorch's CPU wheels to avoid that"
        fi
    fi
    say "the package and its requirements (a minute or two)"
    # Compiled DeepSpeed operators are for GPUs; without them its wheel is pure Python.
    DS_BUILD_OPS=0 pip -c constraints.txt -e ".${extras:+[$extras]}"
    if wants eval; then
        pip --no-deps -c constraints.txt lmms-eval
    fi
fi

"$python" -I scripts/check_import_name.py
printf '%s' "$key" >"$stamp"
say "done"
