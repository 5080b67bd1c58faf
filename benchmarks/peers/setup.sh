#!/usr/bin/env bash
# setup.sh VENV [TORCH]: an environment for TRL alone. TORCH: a wheel file or requirement (default torch==2.13.0+cpu;
# from PyTorch's CPU wheel index, as the Makefile says). Uses uv when it is there, else pip.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:?usage: setup.sh VENV [TORCH]}
torch=${2:-torch==2.13.0+cpu}
if command -v uv >/dev/null; then
  uv venv --python "${PYTHON:-python3.11}" "$venv"
  uv pip install --python "$venv/bin/python" "$torch" -r "$here/requirements-trl.txt"
else
  "${PYTHON:-python3.11}" -m venv "$venv"
  "$venv/bin/pip" install "$torch" -r "$here/requirements-trl.txt"
fi
