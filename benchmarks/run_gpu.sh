#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU. Nothing is downloaded; every part has a time limit.
#
#   benchmarks/run_gpu.sh build    the package into build/gpu/site (ignored by git, used by the other two parts)
#   benchmarks/run_gpu.sh test     tests marked gpu, the fake driver's suite, compute-sanitizer over the kernels
#   benchmarks/run_gpu.sh bench    everything in benchmarks/gpu; JSON and a plot, a short table last
#
# --dry-run runs the same steps on the CPU with tiny sizes and a CPU-only build: it finds mistakes in the scripts
# and says nothing about speed. Results go to $OUT (default: benchmarks/results). PYTHON, JOBS and ARCHITECTURE
# (of the kernels, "90a-real"; as nvidia-smi says by default) can be set.
set -euo pipefail
cd "$(dirname "$0")/.."
repo=$PWD
part=${1:-}
dry=${2:-}
case "$part:$dry" in build: | test: | bench: | build:--dry-run | test:--dry-run | bench:--dry-run) ;; *)
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
  ;;
esac
python=${PYTHON:-python3}
jobs=${JOBS:-$(nproc)}
out=${OUT:-$repo/benchmarks/results}
work=$repo/build/gpu${dry:+-dry}
logs=${OUT:-$work}
site=$work/site
testing_site=$work/site-testing # the same package with the fake driver, without CUDA kernels
mkdir -p "$out" "$work"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Several processes share the card, and pools take their memory beside XLA's.
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
failed=()

step() { printf '\n=== %s (%ss)\n' "$1" "$SECONDS"; }

# try NAME SECONDS COMMAND...: a part that fails or runs over is named at the end; the others go on.
try() {
  local name=$1 limit=$2 status=0
  shift 2
  step "$name"
  printf '+ %s\n' "$*"
  timeout -k 10 "$limit" "$@" || status=$?
  case $status in
    0) ;;
    124 | 137) printf '%s: stopped after %s s\n' "$name" "$limit" && failed+=("$name (time)") ;;
    *) printf '%s: exit status %s\n' "$name" "$status" && failed+=("$name") ;;
  esac
}

finish() {
  step "$part done"
  if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
  fi
}

architecture() { # "90a" for compute capability 9.0: Hopper's own instructions need the "a"
  local capability
  [ -z "${ARCHITECTURE:-}" ] || { echo "$ARCHITECTURE" && return; }
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')
  if [ "$capability" -ge 90 ]; then echo "${capability}a-real"; else echo "$capability-real"; fi
}

# A target folder instead of a virtual environment: the interpreter may live in one whose packages a new one would not
# see. The build folder stays, so a second build compiles what changed.
install_package() { # TARGET, build folder, settings...
  local target=$1 folder=$2
  shift 2
  "$python" -m pip install -q --no-build-isolation --no-deps --upgrade --target "$target" \
    -Cbuild-dir="$work/$folder" "$@" -v "$repo" >"$work/build.log" 2>&1 || { tail -60 "$work/build.log"; exit 1; }
}

build() {
  local options=(-DJAX_KVPAGE_CUDA=OFF) setting settings=() begin=$SECONDS
  if [ -z "$dry" ]; then
    options=(-DJAX_KVPAGE_CUDA=ON "-DJAX_KVPAGE_CUDA_ARCHITECTURES=$(architecture)" -DJAX_KVPAGE_CUDA_REPORT=ON)
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv || echo "no nvidia-smi"
    nvcc --version | tail -2
  fi
  for setting in "${options[@]}"; do settings+=("-Ccmake.define.${setting#-D}"); done

  step "package"
  export CMAKE_BUILD_PARALLEL_LEVEL=$jobs
  printf '%s\n' "${options[@]}"
  install_package "$site" package "${settings[@]}"
  grep -E "warning" "$work/build.log" | head -20 || true
  if [ -z "$dry" ]; then
    "$python" cc/kernels/cuda/resource_usage.py table --json "$logs/registers.json" \
      "$work/package/CMakeFiles/kvpage_cuda_kernels.dir" >"$logs/registers.txt" || true
    head -60 "$logs/registers.txt"
  fi

  step "package for the tests on the fake driver"
  install_package "$testing_site" package-testing -Ccmake.define.JAX_KVPAGE_CUDA=OFF \
    -Ccmake.define.JAX_KVPAGE_TESTING=ON

  # Without the C++ tests, which need GoogleTest: cuda_driver_test does not.
  step "C++ tools"
  cmake -S "$repo" -B "$work/cc" -G Ninja -DCMAKE_BUILD_TYPE=Release -DJAX_KVPAGE_PYTHON=OFF \
    -DJAX_KVPAGE_CUDA=OFF -DJAX_KVPAGE_BENCHMARKS=ON -DJAX_KVPAGE_TESTS=OFF >"$work/cc.log" || { cat "$work/cc.log"; exit 1; }
  cmake --build "$work/cc" -j "$jobs" --target kvpage_driver_calls cuda_driver_test >>"$work/cc.log" 2>&1 ||
    { tail -40 "$work/cc.log"; exit 1; }

  step "doctor"
  PYTHONPATH=$site "$python" -P -m jax_kvpage
  printf 'built in %s s\n' $((SECONDS - begin))
}

require_build() {
  [ -d "$site/jax_kvpage" ] || { echo "run '$0 build${dry:+ $dry}' first: $site is empty"; exit 1; }
  export PYTHONPATH=$site
}

# in_background NAME SECONDS COMMAND...: like try, beside what follows; `gather` waits and reports.
in_background() {
  local name=$1 limit=$2
  shift 2
  printf '+ %s &\n' "$*"
  timeout -k 10 "$limit" "$@" >"$logs/${name// /-}.log" 2>&1 &
  waiting+=("$!:$name:$limit")
}

gather() {
  local entry pid name limit status
  for entry in "${waiting[@]}"; do
    IFS=: read -r pid name limit <<<"$entry"
    status=0
    wait "$pid" || status=$?
    step "$name"
    tail -n "${1:-6}" "$logs/${name// /-}.log"
    [ "$status" = 0 ] || failed+=("$name (exit status $status of at most $limit s): see ${name// /-}.log")
  done
  waiting=()
}

run_tests() {
  local platform=cuda workers=10 sanitizer spread=() guard=()
  waiting=()
  require_build
  [ -n "$dry" ] && platform=cpu && workers=2
  "$python" -c "import xdist" 2>/dev/null && spread=(-n "$workers" --dist worksteal)
  "$python" -c "import pytest_timeout" 2>/dev/null && guard=(--timeout 200)
  try "driver" 60 "$work/cc/cc/tests/cuda_driver_test" ${dry:+--fake}
  # The fake driver's tests need no GPU: they run on the other cores meanwhile.
  in_background "fake driver" 330 env JAX_PLATFORMS=cpu JAX_KVPAGE_REQUIRE_FAKE_DRIVER=1 PYTHONPATH="$testing_site" \
    "$python" -P -m pytest -q -p no:cacheprovider ${spread:+-n 4} tests/test_fake_driver*.py
  try "tests marked gpu" 300 "$python" -P -m pytest -q -m gpu --exhaustive --gpu-platform "$platform" "${spread[@]}" "${guard[@]}" \
    -p no:cacheprovider --durations 5 --junitxml "$logs/gpu-tests.xml" tests/gpu
  gather 3
  for sanitizer in memcheck racecheck; do
    local command=("$python" benchmarks/gpu/sanitize.py --platform "$platform")
    if [ -z "$dry" ]; then
      command=(compute-sanitizer --tool "$sanitizer" --kernel-name kernel_substring=kvpage --error-exitcode 9
        --print-limit 20 "${command[@]}")
    fi
    in_background "$sanitizer" 120 "${command[@]}"
  done
  gather 12
}

bench() {
  require_build
  local platform=(--platform cuda)
  [ -n "$dry" ] && platform=(--platform cpu --dry-run)
  try "benchmarks" 560 "$python" benchmarks/gpu/run.py "${platform[@]}" --out "$out" --log "$logs/bench.log" --seconds 530 \
    --driver-calls "$work/cc/benchmarks/gpu/kvpage_driver_calls"
}

case $part in
  build) build ;;
  test) run_tests ;;
  bench) bench ;;
esac
finish
