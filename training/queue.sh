#!/usr/bin/env bash
# The classifiers that are to ship beside the others, one after another, each with its head, restorer and gates; some
# four hours on two cores:
#   nohup nice training/queue.sh RUNS CIFAR10 >> queue.log 2>&1 &
# RUNS is a folder for the runs, the other an image folder. A run that was ended goes on from its state; finished ones
# are skipped. One without a state goes on from its averaged weights in training/unfinished, where there are some.
# PYTHON chooses the interpreter.
set -euo pipefail
runs=$1 cifar10=$2
cd "$(dirname "$0")/.."
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296}

train() { # NAME DATA EPOCHS, then options
  local name=$1 data=$2 epochs=$3
  shift 3
  test -f "$runs/$name/checkpoint/card.json" && grep -q '"pgd_accuracy"' "$runs/$name/checkpoint/card.json" && return
  local unfinished=training/unfinished/$name begun=$runs/$name.begun
  if ! test -f "$runs/$name/state.pt" && test -f "$unfinished/ema.safetensors"; then
    echo "--resume-from $unfinished/ema.safetensors --epoch $(sed -n '$s/^{"epoch": \([0-9]*\).*/\1/p' "$unfinished/log.jsonl")" > "$begun"
  fi
  test -f "$begun" && read -ra more < "$begun" && set -- "$@" "${more[@]}"
  echo "$(date -u +%FT%TZ) $name"
  "${PYTHON:-python3}" -m unperturb.training classifier --data "$data" --out "$runs/$name" --id "$name" --epochs "$epochs" "$@" \
    2> "$runs/$name.err"
}

finish() { # NAME DATA: head, restorer and gates; what ships is $runs/$name-restorer/checkpoint
  local name=$1 data=$2 card=$runs/$1-restorer/checkpoint/card.json
  test -f "$card" && grep -q clean_left "$card" && return
  echo "$(date -u +%FT%TZ) $name: head, restorer, gates"
  {
    test -f "$runs/$name-head/checkpoint/card.json" ||
      "${PYTHON:-python3}" -m unperturb.training head --classifier "$runs/$name/checkpoint" --data "$data" \
        --batch-size 512 --epochs 6 --out "$runs/$name-head"
    test -f "$card" ||
      "${PYTHON:-python3}" -m unperturb.training restorer --checkpoint "$runs/$name-head/checkpoint" --data "$data" \
        --images 20000 --epochs 6 --out "$runs/$name-restorer"
    "${PYTHON:-python3}" -m unperturb.training gate --checkpoint "$runs/$name-restorer/checkpoint" --data "$data"
  } 2>> "$runs/$name.err"
}

mkdir -p "$runs"
train cifar10-large "$cifar10" 8 --classifier default --widen 2 --method n-fgsm --lr 0.06 --warmup 0.1
finish cifar10-large "$cifar10"
echo "$(date -u +%FT%TZ) done"
