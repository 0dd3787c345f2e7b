#!/usr/bin/env bash
# The main job: search a schedule, export the graphs, build the engines, compare and report.
#
#   bash scripts/build_engines.sh [--model FOLDER_OR_HUB_ID] [--out FOLDER] [--steps T] [--budget B]
#                                 [--guidance-scale G] [--scheduler NAME] [--max-batch-size N]
#
# Without arguments: the digits model, 50 steps of DDIM, 17 of them full, guidance 2, into out/digits.
set -euo pipefail

model=examples/digits steps=50 budget=17 guidance=2 scheduler= max_batch_size=8 out=
while [ $# -gt 0 ]; do
  case $1 in
    --model) model=${2:?} ;;
    --out) out=${2:?} ;;
    --steps) steps=${2:?} ;;
    --budget) budget=${2:?} ;;
    --guidance-scale) guidance=${2:?} ;;
    --scheduler) scheduler=${2:?} ;;
    --max-batch-size) max_batch_size=${2:?} ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "unknown argument: $1 (--help lists them)" >&2; exit 2 ;;
  esac
  shift 2
done

EXTRAS=search
source "$(dirname "$0")/environment.sh"
out=${out:-out/$(basename "$model")}

hemiola search "$model" --steps "$steps" --budget "$budget" --guidance-scale "$guidance" \
  ${scheduler:+--scheduler "$scheduler"} --out "$out/schedule.json"
baselines=()
for file in "$out"/baselines/*.json; do baselines+=(--schedule "$file"); done
hemiola export "$model" --schedule "$out/schedule.json" "${baselines[@]}" --out "$out/graphs"
hemiola build "$out/graphs" --max-batch-size "$max_batch_size" --out "$out/bundle"
hemiola report "$out/bundle" --search "$out/search.json" --out "$out/report.html"
