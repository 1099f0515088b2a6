#!/usr/bin/env bash
# Tests and benchmark on a machine with an accelerator, with or without network (docs/gpu.md).
#
#   gpu/run.sh put FOLDER    take the bundle's pieces that FOLDER holds; others may follow
#   gpu/run.sh check         which pieces are there, missing or damaged
#   gpu/run.sh test [ARGS]   the tests marked gpu; ARGS go to pytest
#   gpu/run.sh bench [ARGS]  benchmarks/gpu.py; ARGS go to it
#   gpu/run.sh train [ARGS]  a recipe for some minutes, from and into OUT/train; ARGS go to gpu/recipe.py
#   gpu/run.sh all [ARGS]    test and bench, the benchmark also after a test failed; ARGS go to the benchmark
#
# COMETLM_GPU_HOME is where pieces and packages are kept (/tmp/cometlm-gpu), OUT where the log and the
# JSON go (out), PYTHON the interpreter (.venv's, else python3), DEVICE what torch calls the device (the
# accelerator, else cpu). Exit code 2: the bundle is not whole, and nothing was installed or run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
home=${COMETLM_GPU_HOME:-/tmp/cometlm-gpu}
python=${PYTHON:-$([[ -x $root/.venv/bin/python ]] && echo "$root/.venv/bin/python" || echo python3)}

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

unpack() { "$python" "$root/gpu/unpack.py" "$@"; }

# The sources beside this script come first: tests, benchmark and library are of one commit.
prepare() {
  site=$(unpack install "$home")
  export PYTHONPATH="$root/src${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  if [[ -n $site ]]; then
    echo "with the bundle's packages in $site"
    export COMETLM_CACHE="${COMETLM_CACHE:-$home/cache}"
    if [[ -d $site/texts ]]; then  # corpora, where the library looks for them
      mkdir -p "$COMETLM_CACHE/texts"
      cp -rn "$site/texts/." "$COMETLM_CACHE/texts"
    fi
  else
    echo "no bundle in $home: with what is installed"
  fi
  out=${OUT:-$root/out}
  mkdir -p "$out"
  out=$(cd "$out" && pwd)
  cd "$root"
}

# Files without the mark are not even collected: that takes time, and some import trl and datasets,
# which may be missing here.
run_tests() {
  local files=() argument
  for argument in "$@"; do
    [[ ! -e ${argument%%::*} ]] || files=("$@")  # a path: the caller chose
  done
  if ((!${#files[@]})); then
    mapfile -t files < <(grep -rlE 'mark\.gpu\b' --include='test_*.py' tests | sort)
    ((${#files[@]})) || { echo "no test is marked gpu" >&2; return 5; }
    files+=("$@")
  fi
  "$python" -m pytest -m gpu -q "${files[@]}" 2>&1 | tee "$out/gpu-tests.log"
}

device() { echo "${DEVICE:-$("$python" -c 'from cometlm.device import default_device as d; print(d())')}"; }

run_benchmark() {
  local on
  on=$(device) || return
  "$python" benchmarks/gpu.py --device "$on" --out "$out/gpu.json" "$@"
}

run_training() {
  local on
  on=$(device) || return
  "$python" gpu/recipe.py --device "$on" --out "$out/train" "$@" 2>&1 | tee -a "$out/gpu-train.log"
}

(($#)) || usage
verb=$1
shift
case $verb in
  put)
    (($# == 1)) || usage
    unpack put "$1" "$home"
    ;;
  check)
    (($# == 0)) || usage
    unpack check "$home"
    ;;
  test)
    prepare
    run_tests "$@"
    ;;
  bench)
    prepare
    run_benchmark "$@"
    ;;
  train)
    prepare
    run_training "$@"
    ;;
  all)
    prepare
    status=0
    run_tests || status=$?
    run_benchmark "$@" || status=$?
    exit "$status"
    ;;
  *) usage ;;
esac
