#!/bin/sh
# Everything that only a GPU can show, in less than 9 minutes: tests, sanitizers, figures.
#   sh bench/gpu_all.sh [python]
# Each part has a time limit (530 s together), and a part that fails does not stop the next ones; the exit status tells.
# Figures: bench/results/<device>.json, written by bench/gpu.py after each of its sections. What became of the parts:
# bench/results/<device>-tests.txt, complete after each of them. Both also lie in $OUT where that is set, with the log.
# The first part compiles every kernel once, which takes CuPy a minute or more; pytest-xdist, if there, shares it out.
cd "$(dirname "$0")/.." || exit 2
python=${1:-$(command -v python || command -v python3)}
results=${RESULTS:-bench/results}
status=0

device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1)
name=$(printf %s "${device:-gpu}" | tr -cs 'A-Za-z0-9_' '-' | sed 's/^-*//; s/-*$//' | tr 'A-Z' 'a-z')
summary=$results/$name-tests.txt
log=$(mktemp -d) || exit 2
trap 'rm -rf "$log"' EXIT
mkdir -p "$results" ${OUT:+"$OUT"} || exit 2
device=${device:-no GPU that nvidia-smi knows}
echo "bench/gpu_all.sh on $device, $(date -u +%Y-%m-%dT%H:%MZ), $("$python" --version)" > "$summary"

note() {
  echo "== $*" | tee -a "$summary"
  if [ -n "$OUT" ]; then cp "$summary" "$OUT"; fi
}

# part LIMIT LINES COMMAND...: run it; the last LINES of what it prints go into the summary
part() {
  limit=$1 lines=$2
  shift 2
  echo "== $*"
  start=$(date +%s)
  { timeout -k 5 "$limit" "$@" 2>&1; echo $? > "$log/code"; } | tee "$log/part"
  code=$(cat "$log/code")
  if [ -n "$OUT" ]; then cat "$log/part" >> "$OUT/gpu_all.log"; fi
  tail -n "$lines" "$log/part" | cut -c 1-300 >> "$summary"
  case $code in
    0) outcome=passed ;;
    124 | 137) outcome="stopped after $limit s" status=1 ;;
    *) outcome="failed ($code)" status=1 ;;
  esac
  note "$outcome, $(($(date +%s) - start)) s: $*"
}

workers=
if "$python" -c "import xdist" 2> /dev/null; then workers="-n 8"; fi
# -W default: CuPy warns of what it does not find at import; that shall not fail a test.
# shellcheck disable=SC2086
part 190 12 "$python" -u -m pytest -q -W default -m gpu $workers tests
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    part 55 12 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -u -m pytest -q -W default -m gpu \
      tests/test_kernels.py -k "convolutions_of_the_networks or batchnorm_relu or losses or norm or on_the_device"
  done
else
  status=1
  note "compute-sanitizer is not installed (it comes with the CUDA toolkit): nothing was sanitized"
fi
part 230 0 "$python" -u bench/gpu.py --budget 215 --out "$results"
exit $status
