#!/usr/bin/env bash
# The main job: measure what every forward costs here, search a schedule, export the graphs, build the engines, compare
# and report.
#
#   bash scripts/build_engines.sh [--model FOLDER_OR_HUB_ID] [--out FOLDER] [--steps T] [--budget B] [--effort E]
#                                 [--guidance-scale G] [--scheduler NAME] [--max-batch-size N]
#                                 [--backend NAME] [--precision P] [--layout separate|segmented] [--random-weights]
#
# Without arguments: the digits model, 50 steps of DDIM, 17 of them full, guidance 2, for ONNX Runtime on the CPU, into
# out/digits. --model examples/shapes draws prompts: 20 steps of DPM-Solver++, 7 of them full, guidance 3. The precision
# is fp32 on the CPU, fp16 for onnxruntime_cuda and bf16 elsewhere. With --random-weights, --model is the name of a known
# architecture (dit-xl-2, pixart-xl-2-512); its schedules are ProCache's published ones, since on noise nothing can be
# judged.
# Costs and report need a machine on which the engines run; elsewhere the search goes by FLOPs.
set -euo pipefail

model=examples/digits steps= budget= effort=quick guidance= scheduler= max_batch_size=8 out=
backend=onnxruntime precision= layout=separate random_weights=
while [ $# -gt 0 ]; do
  case $1 in
    --random-weights) random_weights=--random-weights; shift; continue ;;
    -h | --help) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 0 ;;
  esac
  [ $# -ge 2 ] || { echo "$1 takes a value (--help lists them)" >&2; exit 2; }
  case $1 in
    --model) model=${2:?} ;;
    --out) out=${2:?} ;;
    --steps) steps=${2:?} ;;
    --budget) budget=${2:?} ;;
    --effort) effort=${2:?} ;;
    --guidance-scale) guidance=${2:?} ;;
    --scheduler) scheduler=${2:?} ;;
    --max-batch-size) max_batch_size=${2:?} ;;
    --backend) backend=${2:?} ;;
    --precision) precision=${2:?} ;;
    --layout) layout=${2:?} ;;
    *) echo "unknown argument: $1 (--help lists them)" >&2; exit 2 ;;
  esac
  shift 2
done

case $backend in
  onnxruntime) extras=search,cpu format=onnx; precision=${precision:-fp32} ;;
  onnxruntime_cuda) extras=search,gpu format=onnx; precision=${precision:-fp16} ;;
  tensorrt | tensorrt_rtx) extras=search,${backend//_/-} format=onnx; precision=${precision:-bf16} ;;
  inductor) extras=search,inductor format=torch; precision=${precision:-bf16} ;;
  *) echo "unknown backend: $backend" >&2; exit 2 ;;
esac
case $(basename "$model") in  # what the examples were trained and judged with
  digits) guidance=${guidance:-2} ;;
  shapes) guidance=${guidance:-3} ;;
esac
EXTRAS=$extras
source "$(dirname "$0")/environment.sh"
out=${out:-out/$(basename "$model")}

search() {
  # shellcheck disable=SC2086  # an absent flag is no argument
  hemiola search "$model" $random_weights ${steps:+--steps "$steps"} ${budget:+--budget "$budget"} \
    ${guidance:+--guidance-scale "$guidance"} ${scheduler:+--scheduler "$scheduler"} "$@"
}

schedules=()
if [ -n "$random_weights" ]; then
  for selective in tokens deep; do
    search --strategy published --selective "$selective" --out "$out/$selective.json"
    schedules+=(--schedule "$selective=$out/$selective.json")
  done
else
  search --probes "$out/probes"
  hemiola export "$model" --schedule "$out/probes/deep.json" --no-reference --format "$format" \
    --precision "$precision" --out "$out/probes/graphs"
  hemiola build "$out/probes/graphs" --backend "$backend" --max-batch-size "$max_batch_size" --out "$out/probes/bundle"
  costs=()
  if hemiola doctor "$out/probes/bundle"; then
    hemiola measure "$out/probes/bundle"
    costs=(--costs "$out/probes/bundle")
  fi
  search "${costs[@]}" --effort "$effort" --out "$out/schedule.json"
  schedules+=(--schedule "$out/schedule.json")
  for file in "$out"/baselines/*.json; do schedules+=(--schedule "$file"); done
fi
# shellcheck disable=SC2086
hemiola export "$model" $random_weights ${random_weights:+--no-reference} "${schedules[@]}" \
  --format "$format" --precision "$precision" --out "$out/graphs"
hemiola build "$out/graphs" --backend "$backend" --layout "$layout" --max-batch-size "$max_batch_size" \
  --out "$out/bundle"
hemiola inspect "$out/bundle"
if [ -z "$random_weights" ] && hemiola doctor "$out/bundle"; then
  hemiola report "$out/bundle" --search "$out/search.json" --out "$out/report.html"
fi
