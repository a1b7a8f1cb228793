#!/usr/bin/env bash
# One command for a machine with a GPU: see --help, and docs/cuda.md for what it proves.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly steps=(check build tests sanitize bench)
readonly home=build/gpu # what is installed and logged

usage() {
  cat <<END
usage: bench/gpu.sh [--quick] [--dry-run] [step ...]

Builds secateur's CUDA kernels against the torch that is installed, and checks and measures them on
the GPU of this machine. A step that fails does not stop the next one; the exit status tells.

steps, all by default:
  check     torch >= 2.10 with CUDA, a GPU of compute capability 8.0 or higher, nvcc >= 12.0
  build     install secateur with its CUDA kernels, and what is missing to test it
  tests     every op on CPU and GPU against its reference; streams, graphs, devices; the build
  sanitize  compute-sanitizer (memcheck, racecheck) over a part of these, where it is installed
  bench     against dense torch, its sparse products, and what it takes there to select and to mask

options:
  --quick    short benchmarks, to $home/results instead of bench/results/<name of the GPU>
  --dry-run  print the commands and run none
  --help     this text

Nothing is installed into the Python that runs it: all goes to $home. What a step prints is also in
$home/<step>.log. Of the environment it takes PYTHON (default: python3) and CUDA_HOME (default:
where nvcc on PATH is, else /usr/local/cuda).
END
}

dry='' quick=() chosen=()
for argument in "$@"; do
  case $argument in
    --help | -h)
      usage
      exit
      ;;
    --quick) quick=(--quick) ;;
    --dry-run) dry=yes ;;
    *)
      if [[ " ${steps[*]} " != *" $argument "* ]]; then
        echo "expected a step (${steps[*]}), --quick, --dry-run or --help, got '$argument'" >&2
        exit 2
      fi
      chosen+=("$argument")
      ;;
  esac
done
((${#chosen[@]})) || chosen=("${steps[@]}")

readonly python=${PYTHON:-python3} site=$PWD/$home/site
mkdir -p "$site"
# What is installed here comes first, then what the user has.
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
cuda=${CUDA_HOME:-${nvcc%/bin/nvcc}}
export PATH=$site/bin:$cuda/bin:$PATH:$cuda/compute-sanitizer

# Prints a command and runs it; its status is the command's.
run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ -n $dry ]] || "$@"
}

step_check() {
  run "$python" -m bench.gpu check
}

step_build() {
  local wanted=("scikit-build-core>=0.11" "pybind11>=3.0" cmake ninja
    "safetensors>=0.4.3" "tqdm>=4.66" "numpy>=1.26" "pytest>=8" "hypothesis>=6.100")
  command -v cuobjdump >/dev/null || wanted+=(nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)
  # Into a folder of its own and without torch: what is installed stays as it is.
  local install=("$python" -m pip --disable-pip-version-check install --quiet --upgrade
    --target "$site")
  local found needs=()
  found=$("$python" -m bench.gpu missing "${wanted[@]}") || return 1
  if [[ -n $found ]]; then
    mapfile -t needs <<<"$found"
    run "${install[@]}" "${needs[@]}" || return 1
  fi
  run "${install[@]}" --no-deps --no-build-isolation . \
    -C cmake.define.SECATEUR_CUDA=ON -C build-dir="$home/{wheel_tag}" || return 1
  run "$python" -m bench.gpu loaded
}

step_tests() {
  run "$python" -m bench.gpu gpu || return 1
  run "$python" -m pytest -k "not EMULATED" \
    tests/test_ops.py tests/test_cuda_device.py tests/test_cuda_build.py
}

step_sanitize() {
  run "$python" -m bench.gpu gpu || return 1
  if [[ -z $dry ]] && ! command -v compute-sanitizer >/dev/null; then
    echo "skipped: no compute-sanitizer on PATH or under CUDA_HOME"
    return 0
  fi
  local tool failed=0
  for tool in memcheck racecheck; do
    # Every tensor has memory of its own then: what is beyond it is out of bounds.
    run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 10 \
      "$python" -m pytest -x tests/test_ops.py \
      -k 'matches_reference and CUDA and not EMULATED and (float32 or bfloat16 or bool)' || failed=1
  done
  return "$failed"
}

step_bench() {
  run "$python" -m bench.gpu gpu || return 1
  local results="$home/results" name='<name of the GPU>' bench failed=0
  if ((${#quick[@]} == 0)); then
    [[ -n $dry ]] || name=$("$python" -m bench.gpu name) || return 1
    results="bench/results/$name"
  fi
  for bench in scores topk nm mask block_sparse; do
    run "$python" -m "bench.$bench" --device cuda "${quick[@]}" --csv "$results/$bench.csv" ||
      failed=1
  done
  if ((${#quick[@]} == 0)); then # what a selection takes beside its masks
    run "$python" -m bench.topk --device cuda --alone --numel 1000000000 \
      --csv "$results/topk_alone.csv" || failed=1
  fi
  return "$failed"
}

summary=() failed=()
for step in "${chosen[@]}"; do
  echo "== $step"
  began=$SECONDS log=$home/$step.log
  [[ -z $dry ]] || log=/dev/null # that of a real run stays
  if "step_$step" 2>&1 | tee "$log"; then
    result=${dry:+planned}
    result=${result:-passed}
    ! grep -q '^skipped: ' "$log" || result=skipped
  else
    result=FAILED
    failed+=("$step")
  fi
  summary+=("$(printf '%-9s %-8s %5d s  %s' "$step" "$result" $((SECONDS - began)) "${log#/dev/null}")")
done

echo "== summary"
printf '%s\n' "${summary[@]}"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}; to run that again: bench/gpu.sh ${failed[*]}"
  exit 1
fi
