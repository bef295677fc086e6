#!/usr/bin/env bash
# Check the package on a CUDA GPU within ten minutes: the GPU tests, speed beside torchvision, and a short Table 1.
#
#   scripts/benchmarks/gpu_check.sh [FOLDER]
#
# FOLDER (default: $OUT if it is set, else results/gpu) gets:
#   steps.txt               exit code and seconds of each step
#   hardware.txt            nvidia-smi's description of the machine
#   tests.txt, tests.xml    pytest -m gpu
#   speed.txt, speed.json   speed.py --device cuda
#   table1.txt              Table 1 with recipe=gpu, one seed and fewer steps
#   records.tar.gz          the files of its runs, without weights and detections
#
# A step that fails or exceeds its time limit does not stop the next. Table 1 uses the remaining time; rows that are finished by
# then are kept in results/gpu/table1, where the same command continues. Exit code: 0, 1 if a step failed, 2 without a GPU.
# PYTHON names the interpreter (default: python). Needs GNU timeout.
set -uo pipefail

TOTAL=570 # seconds for all steps; up to GRACE more if the last has to be killed
GRACE=15  # seconds between SIGTERM and SIGKILL
TESTS=240
SPEED=150
# Named in the table: fewer steps and pictures than recipe=gpu, so that six rows fit.
SHORTER=(recipe.steps=500 recipe.pretrain.steps=500 data.train_images=1000 data.val_images=300)

python="${PYTHON:-python}"

refuse() {
  printf 'gpu_check.sh: %s\n' "$*" >&2
  exit 2
}

step() { # $1 name, $2 limit in seconds, then the command; the step's exit code
  local name="$1" limit="$2" began=$SECONDS code=0
  shift 2
  timeout --kill-after="$GRACE" "$limit" "$@" >"$folder/$name.txt" 2>&1 || code=$?
  printf '%s: exit code %s, %s s of at most %s\n' "$name" "$code" $((SECONDS - began)) "$limit" | tee -a "$folder/steps.txt"
  [ "$code" -eq 0 ] || tail -n 15 "$folder/$name.txt"
  return "$code"
}

finished_rows() {
  grep -rl --include=record.json '"status": "finished"' "$table1/runs" 2>/dev/null | wc -l | tr -d ' '
}

hardware=$(nvidia-smi 2>/dev/null) || refuse "nvidia-smi finds no NVIDIA GPU"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  refuse "torch is missing or sees no CUDA device ($python)"
root=$(cd "$(dirname "$0")/../.." && pwd)
folder="${1:-${OUT:-$root/results/gpu}}" table1="$root/results/gpu/table1"
if ! mkdir -p "$folder" 2>/dev/null || ! [ -w "$folder" ]; then refuse "$folder cannot be written"; fi
folder=$(cd "$folder" && pwd)
cd "$root" || exit 1

rm -f "$folder"/{tests,speed,table1}.txt "$folder"/{tests.xml,speed.json,records.tar.gz}
printf '%s\n' "$hardware" >"$folder/hardware.txt"
: >"$folder/steps.txt"
status=0
step tests "$TESTS" "$python" -m pytest -m gpu --junitxml="$folder/tests.xml" || status=1
step speed "$SPEED" "$python" scripts/benchmarks/speed.py --device cuda --seconds 10 --out "$folder/speed.json" || status=1
step table1 $((TOTAL - SECONDS)) "$python" -m fpn_ablate -m +experiments=table1 recipe=gpu seed=2 "${SHORTER[@]}" \
  device=cuda log.wandb=disabled out="$table1"
code=$?
rows=$(finished_rows)
printf 'table1: %s rows finished\n' "$rows" | tee -a "$folder/steps.txt"
# 124: the time is over, which is no failure if a row is finished.
[ "$code" -eq 0 ] || { [ "$code" -eq 124 ] && [ "$rows" -gt 0 ]; } || status=1
tar -czf "$folder/records.tar.gz" --exclude='*.pt' --exclude=detections.npz --exclude=.pictures -C "$table1" runs || status=1
exit "$status"
