#!/bin/sh
# Everything that only a GPU can show. Parts, in order of importance, each with a time limit and useful by itself:
#   check      the self-test: which kernels compile, launch, end and are right here; tiles     75 s
#   figures    whole steps, kernels and attacks, beside PyTorch                               230 s
#   tests      every test that is marked gpu                                                  300 s
#   sanitize   memcheck and racecheck on some of them, where compute-sanitizer is allowed     2 x 55 s
#   compile    PyTorch's compiled steps, which the ratio needs                                240 s
#   sh bench/gpu_all.sh [python]             all of them
#   PARTS="check figures" sh bench/gpu_all.sh
# A part that fails does not stop the next ones; the exit status tells. It ends with a report to paste into an issue:
# bench/results/<device>.md, of <device>.json (bench/gpu.py, after each of its sections) and <device>-tests.txt (what
# became of the parts, after each). They also lie in $OUT where that is set, with the log.
# pytest-xdist, if there (pip install pytest-xdist), shares out the tests: each compiles kernels.
cd "$(dirname "$0")/.." || exit 2
[ -n "$PARTS" ]; some=$?  # 0: not all of them, so that what earlier calls found stays
PARTS=${PARTS:-check figures tests sanitize compile}
# The Python that has CuPy, and PyTorch if one of them has both.
python=
for modules in "cupy, torch" cupy sys; do
  for candidate in ${1:-python python3}; do
    if [ -z "$python" ] && "$candidate" -c "import $modules" 2> /dev/null; then python=$candidate; fi
  done
done
if [ -z "$python" ]; then echo "there is no Python called ${1:-python or python3}" >&2; exit 2; fi
results=${RESULTS:-bench/results}
status=0

device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1)
name=$(printf %s "${device:-gpu}" | tr -cs 'A-Za-z0-9_' '-' | sed 's/^-*//; s/-*$//' | tr 'A-Z' 'a-z')
summary=$results/$name-tests.txt
log=$(mktemp -d) || exit 2
trap 'rm -rf "$log"' EXIT
mkdir -p "$results" ${OUT:+"$OUT"} || exit 2
device=${device:-no GPU that nvidia-smi knows}
if [ $some -ne 0 ]; then : > "$summary"; fi
echo "bench/gpu_all.sh on $device, $(date -u +%Y-%m-%dT%H:%MZ), $("$python" --version): $PARTS" >> "$summary"

note() {
  echo "== $*" | tee -a "$summary"
  if [ -n "$OUT" ]; then cp "$summary" "$OUT"; fi
}

wanted() {
  case " $PARTS " in *" $1 "*) return 0 ;; esac
  return 1
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

# -W default, below: CuPy warns of what it does not find at import; that shall not fail a test.
if wanted check; then part 75 70 "$python" -u -m nanomr.backend --test; fi
if wanted figures; then part 230 0 "$python" -u bench/gpu.py --budget 215 --out "$results"; fi
if wanted tests; then
  workers=
  if "$python" -c "import xdist" 2> /dev/null; then workers="-n 8"; fi
  # shellcheck disable=SC2086
  part 300 12 "$python" -u -m pytest -q -W default -m gpu $workers tests
fi
if wanted sanitize; then
  if compute-sanitizer --version > /dev/null 2>&1; then
    for tool in memcheck racecheck; do
      part 55 12 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -u -m pytest -q -W default -m gpu \
        tests/test_kernels.py -k "convolutions_of_the_networks or batchnorm_relu or losses or norm or on_the_device"
    done
  else
    note "compute-sanitizer is not here, or not allowed (it comes with the CUDA toolkit): nothing was sanitized"
  fi
fi
if wanted compile; then
  part 240 0 "$python" -u bench/gpu.py --budget 225 --only "torch compile" --out "$results"
fi
"$python" bench/gpu_report.py "$results" "$name" | tee "$results/$name.md"
if [ -n "$OUT" ]; then cp "$results/$name.md" "$OUT"; fi
exit $status
