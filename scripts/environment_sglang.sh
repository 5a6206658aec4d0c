#!/usr/bin/env bash
# Makes the virtual environment in which SGLang runs, once: VENV (default .venv-sglang), from PYTHON. vLLM and SGLang pin
# different versions of the same packages, so each has an environment of its own. Without an NVIDIA GPU it holds what
# SGLang needs for text models on a CPU, and the tests' platform; see environment.sh for the stamp.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv-sglang}
CPU_TORCH=2.13.0+cpu # SGLang 0.5.23 names 2.14.1 and works with this one, which vLLM's environment has, too
log=$VENV/install.log stamp=$VENV/mem_triton.stamp

. scripts/environment_common.sh

if nvidia-smi -L >/dev/null 2>&1; then engine=sglang; else engine=sglang-cpu; fi
key=$(made_from "$engine" pyproject.toml tests/sglang_platform/pyproject.toml scripts/sglang_cpu_requirements.txt \
  scripts/environment_sglang.sh scripts/environment_common.sh)
is_made "$key" && exit 0

say "setting up $VENV with $engine; this happens once and takes a few minutes"
begin "$engine"
ours=(-e ".[demo-real,test-engine]" -e tests/sglang_platform)
if [ "$engine" = sglang ]; then
  step "sglang 0.5.23, mem_triton and its tools" "${pip[@]}" install "sglang==0.5.23" "${ours[@]}" || failed "pip install"
else
  install_cpu_torch "a build of torch for CPUs that SGLang works with"
  # By themselves: their metadata ask for CUDA builds of torch, which these parts of them do not need.
  step "sglang 0.5.23" "${pip[@]}" install --no-deps sglang==0.5.23 torchvision==0.28.0 xgrammar==0.2.7 soundfile==0.13.1 \
    apache-tvm-ffi==0.1.11 || failed "pip install sglang"
  step "its other parts, mem_triton and its tools" "${pip[@]}" install "torch==$CPU_TORCH" \
    -r scripts/sglang_cpu_requirements.txt "${ours[@]}" || failed "pip install"
  # Executed by every Python of this environment as it starts, SGLang's spawned processes among them.
  "$VENV/bin/python" -c 'import pathlib, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "torch_cpu_platform.pth").write_text("import torch_cpu_platform.torchvision_schemas\n")'
fi
install_real_model

SGLANG_PLATFORM=torch_cpu "$VENV/bin/python" - >>"$log" 2>&1 <<'PY' || failed "importing what was installed"
from importlib.metadata import entry_points
import torchvision  # what SGLang imports first, and fails at
import mem_triton, mem_triton_sglang, sglang.srt.server_args
assert "mem_triton" in entry_points(group="sglang.srt.plugins").names, "the SGLang plugin is not registered"
assert "torch_cpu" in entry_points(group="sglang.srt.platforms").names, "the test platform is not registered"
PY
printf '%s' "$key" >"$stamp"
say "$VENV is ready"
