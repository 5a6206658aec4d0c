#!/usr/bin/env bash
# Makes the small environment in which the kernels are compiled and interpreted under another Triton, once: VENV, with
# TRITON (a version, such as 3.6.0). Called by `make test-triton`; no engine, no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

TRITON=${TRITON:?a version of Triton, such as 3.6.0}
VENV=${VENV:-.venv-triton-$TRITON}
CPU_TORCH=2.13.0+cpu # it brings no Triton of its own
log=$VENV/install.log stamp=$VENV/mem_triton.stamp

. scripts/environment_common.sh

key=$(made_from "triton-$TRITON" scripts/environment_triton.sh scripts/environment_common.sh)
is_made "$key" && exit 0

say "setting up $VENV with Triton $TRITON; this happens once and takes about a minute"
begin "triton-$TRITON"
install_cpu_torch "which the tests of the kernels run on"
# numpy 2.5 refuses what the interpreter of Triton before 3.9 does with loop bounds that lie in memory.
step "Triton $TRITON and the tests' tools" "${pip[@]}" install "triton==$TRITON" "numpy<2.5" "hypothesis>=6.100" \
  "packaging>=23" "pytest>=8" "pytest-timeout>=2.3" "pytest-xdist>=3.6" "setuptools" || failed "pip install"
printf '%s' "$key" >"$stamp"
say "$VENV is ready"
