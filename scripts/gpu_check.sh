#!/usr/bin/env bash
# What works on the NVIDIA GPU of this machine, and how fast: one command, one folder of results.
#
#   bash scripts/gpu_check.sh OUT [--parts NAME,NAME] [--wheels FOLDER] [--system-torch] [--model NAME]
#                                 [--batch-size B] [--minutes N]
#
# --parts         some of doctor, tests, eager, onnxruntime_cuda, tensorrt_rtx, tensorrt, inductor, forwards, compile,
#                 deep and vae; all of them by default. They run in this order. `deep` and `vae` are no parts of their
#                 own: they put `deep` steps and the VAE's decoder into the bundles, where time allows
# --wheels        install from a folder of wheels, without a network
# --system-torch  install no PyTorch: use the one that `python3`, or $HEMIOLA_PYTHON, has
# --model         an architecture that gets random weights, or a diffusers folder; dit-xl-2 by default
# --batch-size    may be given again; 1 and 8 by default. A single one halves what `inductor` takes to build
# --minutes       by then all has ended; 9 by default
#
# OUT gets doctor.txt, parts.txt, log.txt, and of scripts/bench_gpu.py results.json and table.md. All else goes to a
# temporary folder, which is removed. Exit code 1: a part failed that should have worked here; 2: wrong usage.
#
# --wheels FOLDER holds, for this Python, what it lacks of: hatchling editables pathspec trove-classifiers packaging
# pluggy (to install Hemiola); numpy scipy pillow tqdm cuda-bindings cuda-pathfinder; onnx onnx-ir onnxscript ml-dtypes
# protobuf; diffusers with huggingface-hub, safetensors, regex, requests, filelock, importlib-metadata, zipp and what
# these need; onnxruntime with flatbuffers, or in its place onnxruntime-gpu with CUDA's libraries and cuDNN; pytest
# iniconfig pygments (for `tests`); tensorrt or tensorrt-rtx-cu13 with libs and bindings, for these backends; torch with
# all it needs unless --system-torch.
set -uo pipefail

# Seconds: what is left must be at least the first number for a part to begin; the second is what it takes on an H200
# with 16 cores; at the third it is stopped. Both exports run beside the tests.
budgets='
setup              10   30  300
doctor              5    5   30
tests              30  110  180
export_onnx        30   65  180
export_torch       30   65  180
eager              20   35   70
onnxruntime_cuda   40   75  120
tensorrt_rtx       40   75  130
tensorrt           60  150  210
inductor           90  240  300
forwards           20   40   60
compile            40  110  160
deep                0   60    0
vae                 0   60    0
'
closing=12 # seconds that are kept for the last table

parts='' wheels='' system_torch='' model=dit-xl-2 sizes=() minutes=9 out=''
while [ $# -gt 0 ]; do
  case $1 in
    --parts | --wheels | --model | --batch-size | --minutes)
      [ $# -ge 2 ] || { echo "$1 takes a value (--help)" >&2; exit 2; } ;;
  esac
  case $1 in
    --parts) parts=${2:?}; shift ;;
    --wheels) wheels=$(realpath -m "${2:?}"); shift ;;
    --system-torch) system_torch=yes ;;
    --model) model=${2:?}; shift ;;
    --batch-size) sizes+=(--batch-size "${2:?}"); shift ;;
    --minutes) minutes=${2:?}; shift ;;
    -h | --help) sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "unknown argument: $1 (--help lists them)" >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "--minutes takes a whole number, not $minutes" >&2; exit 2; }
[ -z "$wheels" ] || [ -d "$wheels" ] || { echo "there is no folder $wheels" >&2; exit 2; }
[ -n "$out" ] || { echo "name a folder for the results (--help)" >&2; exit 2; }
known=$(awk 'NF && $1 !~ /^(setup|export.*)$/ { printf "%s%s", comma, $1; comma = "," }' <<<"$budgets")
parts=,${parts:-$known},
for part in ${parts//,/ }; do
  [[ ,$known, == *,$part,* ]] || { echo "unknown part: $part; known are $known" >&2; exit 2; }
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

work=$(mktemp -d "${TMPDIR:-/tmp}/hemiola-gpu.XXXXXX")
mkdir "$work/tmp" "$work/logs" "$work/records"
export TMPDIR=$work/tmp TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor PYTHONUNBUFFERED=1
rm -f "$out"/{doctor,parts,log}.txt "$out"/{results.json,table.md}

wants() { [[ $parts == *,$1,* ]]; }
budget() { awk -v part="$1" -v column="$2" '$1 == part { print $column }' <<<"$budgets"; }
left() { echo $((60 * minutes - closing - SECONDS)); }
note() { printf '%-18s%s\n' "$1" "$2" | tee -a "$out/parts.txt"; }

# Bring what there is so far to OUT, so that it stands there whatever happens next.
refresh() {
  (cd "$work/logs" && for log in *.log; do [ -f "$log" ] && echo "== ${log%.log}" && tail -c 1000000 "$log"; done) \
    >"$out/log.txt"
  compgen -G "$work/records/*.json" >/dev/null || return 0
  python scripts/bench_gpu.py table --records "$work/records" --out "$out" >"$work/logs/table.log" 2>&1
}

finish() {
  local jobs
  mapfile -t jobs < <(jobs -p)
  [ ${#jobs[@]} -eq 0 ] || kill "${jobs[@]}" 2>/dev/null
  refresh 2>/dev/null
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 143' TERM INT

# part NAME COMMAND…: run a command within the part's bound. @half stands for half of the bound, in seconds.
part() {
  local name=$1 least bound begun=$SECONDS code
  shift
  least=$(budget "$name" 2) bound=$(budget "$name" 4)
  [ "$(left)" -ge "$least" ] || { note "$name" "skipped: $(left) s are left, and it needs $least"; return 0; }
  [ "$bound" -le "$(left)" ] || bound=$(left)
  timeout --kill-after=5 "$bound" "${@//@half/$((bound / 2))}" >"$work/logs/$name.log" 2>&1 &
  wait $! # in the background and waited for, so that a signal to this script is heard at once
  code=$?
  case $code in
    0) note "$name" "ok, $((SECONDS - begun)) s" ;;
    124 | 137) note "$name" "timed out after $((SECONDS - begun)) s" ;;
    *) note "$name" "failed with exit code $code after $((SECONDS - begun)) s: $(tail -n 1 "$work/logs/$name.log")" ;;
  esac
  return $code
}

# Make a virtual environment in the temporary folder with Hemiola and what the chosen backends need.
setup() {
  local backend constraints=$work/constraints.txt outer pip=(python -m pip --disable-pip-version-check --no-input)
  local -A extra_of=([onnxruntime_cuda]=gpu [tensorrt_rtx]=tensorrt-rtx [tensorrt]=tensorrt [inductor]=inductor)
  set -e
  "$base" -m venv ${system_torch:+--system-site-packages} "$work/venv" || {
    "$base" -m venv --without-pip ${system_torch:+--system-site-packages} "$work/venv"
    pip=("$base" -m pip --python "$work/venv/bin/python" --disable-pip-version-check --no-input)
  }
  export PATH=$work/venv/bin:$PATH
  cp scripts/constraints.txt "$constraints"
  if [ -n "$system_torch" ]; then # whose Python may be in a virtual environment itself, which a new one does not see
    outer=$("$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$outer')" \
      >"$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system.pth"
    sed -i "s/^torch==.*/torch==$(python -c 'from importlib.metadata import version; print(version("torch"))')/" \
      "$constraints"
  fi
  if [ -n "$wheels" ]; then
    "${pip[@]}" install --no-index --no-deps "$wheels"/*.whl
    "${pip[@]}" install --no-index --no-deps --no-build-isolation --editable .
    return
  fi
  "${pip[@]}" install --constraint "$constraints" --editable '.[dev]'
  for backend in "${!extra_of[@]}"; do
    if wants "$backend"; then # one that cannot be installed is not here, and the doctor will say so
      "${pip[@]}" install --constraint "$constraints" --editable ".[${extra_of[$backend]}]" || true
    fi
  done
  if wants onnxruntime_cuda && "${pip[@]}" show --quiet onnxruntime-gpu; then # it and onnxruntime are the same files
    "${pip[@]}" uninstall --yes onnxruntime
    "${pip[@]}" install --force-reinstall --no-deps --constraint "$constraints" onnxruntime-gpu
  fi
}

bench() {
  part "$1" python scripts/bench_gpu.py "${@:2}" --model "$model" "${sizes[@]}" --seconds 10 --out "$work/records"
}

works_here() { grep -q "^backend $1: builds here and runs here" "$out/doctor.txt"; }

base=${HEMIOLA_PYTHON:-python3}
export -f setup wants
export base parts system_torch wheels work
part setup bash -c setup || exit 1
export PATH=$work/venv/bin:$PATH

part doctor bash -c 'hemiola doctor; [ $? -le 1 ]'
cp "$work/logs/doctor.log" "$out/doctor.txt"
! command -v nvidia-smi >/dev/null || nvidia-smi >>"$out/doctor.txt" 2>&1
has_gpu=$(grep -q '^GPU: none' "$out/doctor.txt" || echo yes)
sees_gpu=$(python -c 'import torch; print("yes" if torch.cuda.is_available() else "")' 2>/dev/null)

expected=$SECONDS backends=() formats=()
for name in tests eager forwards compile; do
  wants "$name" && expected=$((expected + $(budget "$name" 3)))
done
for name in onnxruntime_cuda tensorrt_rtx tensorrt inductor; do
  wants "$name" || continue
  { [ -n "$has_gpu" ] && works_here "$name"; } || { note "$name" "not here: see doctor.txt"; continue; }
  backends+=("$name") expected=$((expected + $(budget "$name" 3)))
  if [ "$name" = inductor ]; then formats+=(torch); else formats+=(onnx); fi
done
extras=()
for extra in deep vae; do
  if wants "$extra" && [ ${#backends[@]} -gt 0 ]; then
    expected=$((expected + $(budget "$extra" 3)))
    if [ "$expected" -le $((60 * minutes - closing)) ]; then
      extras+=("--$extra")
    else
      note "$extra" "left out: no time"
    fi
  fi
done

exports=()
for format in $(printf '%s\n' "${formats[@]}" | sort -u); do
  # Out of the GPU's sight: the tests beside it look at how much of its memory is free.
  (
    trap 'kill $(jobs -p)' TERM
    export CUDA_VISIBLE_DEVICES=''
    bench "export_$format" export --format "$format" --graphs "$work/$format" "${extras[@]}"
  ) &
  exports+=($!)
done
if wants tests; then
  mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
  if [ -n "$has_gpu" ]; then
    part tests python -m pytest -m gpu -W default -p no:cacheprovider --durations 10 "${files[@]}"
  else
    note tests "not here: this machine has no NVIDIA GPU that can be used, see doctor.txt"
  fi
fi
[ ${#exports[@]} -eq 0 ] || wait "${exports[@]}" # what is measured from here on is measured alone
refresh

in_pytorch() {
  wants "$1" || return 0
  if [ -n "$sees_gpu" ]; then bench "$@"; else note "$1" "not here: PyTorch sees no GPU"; fi
  refresh
}

in_pytorch eager baseline eager
for name in "${backends[@]}"; do
  format=onnx
  [ "$name" != inductor ] || format=torch
  if [ -f "$work/$format/graphs.json" ]; then
    bench "$name" backend "$name" --graphs "$work/$format" --verify
  else
    note "$name" "failed: there are no graphs"
  fi
  refresh
done
in_pytorch forwards forwards "${extras[@]}"
in_pytorch compile baseline compile --compile-seconds @half

refresh
echo
cat "$out/parts.txt"
[ ! -f "$out/table.md" ] || cat "$out/table.md"
! grep -qE '^\S+ +(failed|timed out)' "$out/parts.txt"
