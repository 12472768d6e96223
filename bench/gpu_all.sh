#!/bin/sh
# Everything that only a GPU can show, in under 9 minutes on an H100: tests, sanitizers, figures.
#   sh bench/gpu_all.sh [python]
# Each part has a time limit, and a part that fails does not stop the next ones; the exit status tells.
cd "$(dirname "$0")/.." || exit 2
python=${1:-python}
status=0

part() {
  limit=$1
  shift
  echo "== $*"
  timeout "$limit" "$@" || { status=1; echo "== failed ($?): $*"; }
}

part 120 "$python" -m pytest -q -m gpu tests
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    part 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -m gpu tests/test_kernels.py \
      -k "convolutions_of_the_networks or batchnorm_relu or losses or norm or on_the_device"
  done
else
  status=1
  echo "== compute-sanitizer is not installed (it comes with the CUDA toolkit): nothing was sanitized"
fi
part 290 "$python" bench/gpu.py
exit $status
