#!/usr/bin/env bash
# Correctness of the GPU kernels, then the kernel table. Needs a checkout of this repository and a Python with torch and
# triton, nothing else; under eight minutes. What follows the command goes to benchmarks/gpu_kernels.py.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
timeout 200 "$PYTHON" -m tests.kernels.triton_grid
timeout 270 "$PYTHON" -m benchmarks.gpu_kernels "$@"
