#!/usr/bin/env bash
# What this program does on a GPU, in one table: devices, agreement with diffusers and PEFT, exact resuming, time and memory
# of a training step, beside torch where it is there. Needs the program and the fixtures, nothing else.
#
#   tools/gpu-check.sh [--device NAME] [--program PATH] [--python PATH] [--seconds N] [--steps N] [--keep DIR]
#
# --device   cuda (default), wgpu, or any other that the program contains
# --program  flux-lora; by default the one in the folder above this script's, or in its target/release
# --python   what runs torch (default python3)
# --seconds  in all (default 480); every part has a limit too, which grows and shrinks with it
# --steps    timed steps of each variant (default 10)
# --keep     leaves what every part said, and the runs, in this folder
#
# Ends with 0 if all that was reached passed; what was not reached is said in its row.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
device=cuda program= python=python3 seconds=480 steps=10 keep=
while [ $# -gt 0 ]; do
  case $1 in
    --device | --program | --python | --seconds | --steps | --keep)
      [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"
      shift 2 ;;
    *) echo "error: unknown argument $1; see the head of $0" >&2; exit 2 ;;
  esac
done
if [ -z "$program" ]; then
  for program in "$root/flux-lora" "$root/target/release/flux-lora"; do [ -x "$program" ] && break; done
fi
[ -x "$program" ] || { echo "error: no program at $program: name it with --program" >&2; exit 2; }
case $program in /*) ;; *) program=$PWD/$program ;; esac

# Where CUDA is found; NVRTC compiles with the headers below CUDA_PATH.
if [ -d /usr/local/cuda ]; then
  export CUDA_PATH=${CUDA_PATH:-/usr/local/cuda}
  export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}:$CUDA_PATH/lib64:/usr/local/nvidia/lib64
fi

if [ -n "$keep" ]; then work=$keep; mkdir -p "$work"; else work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; fi
work=$(cd "$work" && pwd)
began=$SECONDS
failed=0

# So many seconds there are for a part that may take $1 of 480.
left() {
  local rest=$((seconds - SECONDS + began)) share=$(($1 * seconds / 480))
  [ "$rest" -lt "$share" ] && echo "$rest" || echo "$share"
}

# row PART RESULT SEEN SINCE
row() {
  printf '| %-34s | %-11s | %-78s | %5s |\n' "$1" "$2" "$3" "$((SECONDS - $4))"
  case $2 in FAIL*) failed=1 ;; esac
}

# The last line of a log, for a table.
last_of() { tail -n 1 "$1" | tr '|' '/' | cut -c 1-240; }

devices() {
  local since=$SECONDS limit
  limit=$(left 40)
  timeout "$limit" "$program" devices >"$work/devices.log" 2>"$work/devices.err"
  local line
  line=$(grep "^$device " "$work/devices.log" | tr '|' '/')
  case $line in
    *"no device found"* | *"not in this binary"* | "")
      row device FAIL "${line:-$device: $(last_of "$work/devices.err")}" "$since"
      return 1 ;;
    *) row device ok "$(echo "$line" | tr -s ' ')" "$since" ;;
  esac
}

# Cases whose kind is one of $2, at $3 times twice their tolerance, in a process of their own; they go at the same time, since most of it
# is the compilation of kernels.
parity() {
  local name=$1 kinds=$2 scale=$3 limit=$4 log=$work/parity-${1//[^a-z]/-}.log cases=() file
  while read -r file; do
    grep -qE "\"kind\": *\"($kinds)\"" "$file" && cases+=("$(dirname "$file")")
  done < <(find "$root/tests/fixtures/parity" -name case.json | sort)
  echo "${#cases[@]}" >"$log.cases"
  timeout "$limit" "$program" parity --device "$device" --tolerance-scale "$((2 * scale))" "${cases[@]}" >"$log" 2>"$log.err"
  echo $? >"$log.code"
}

# The row of what `parity` of the same name found; $2 is when it began.
parity_row() {
  local name=$1 since=$2 log=$work/parity-${1//[^a-z]/-}.log code
  code=$(cat "$log.code" 2>/dev/null || echo 124)
  # A line without indent begins a case; one with, has a name, what was found, what is allowed, and the verdict.
  awk -v all="$(cat "$log.cases")" -v code="$code" '
    /^[^ ].* \(.*\)$/ { cases++; name = $1 }
    /^  FAIL / { bad++; if (bad == 1) first = name ":" substr($0, 7, 90) }
    /^  .* (ok|FAIL)$/ {
      tensors++
      found = $(NF - 2); allowed = $(NF - 1)
      if ($NF == "FAIL") { bad++; if (bad == 1) first = name "/" $1 " off by " found ", allowed " allowed }
      if (allowed > 0 && found / allowed > worst) { worst = found / allowed; where = name "/" $1 " off by " found ", allowed " allowed }
    }
    END {
      seen = cases " of " all " cases, " tensors + 0 " tensors"
      if (bad) seen = seen "; " bad " too far off; first " first
      else if (where) seen = seen "; worst: " where
      if (code == 124) seen = seen "; cut for time"
      if (!bad && !code && !tensors) { bad++; seen = "nothing was compared" }
      verdict = bad ? "FAIL" : code == 124 ? "not reached" : code ? "FAIL (" code ")" : "ok"
      if (!bad && code && code != 124) seen = "the program ended with " code
      print verdict "\t" seen
    }' "$log" >"$log.row"
  local verdict seen
  IFS=$'\t' read -r verdict seen <"$log.row"
  [ "$seen" = "the program ended with $code" ] && seen="$seen: $(last_of "$log.err")"
  row "parity: $name" "$verdict" "$seen" "$since"
}

# A run in the background, which makes a folder of this name.
train() {
  local run=$1
  shift
  "$program" train "$work/run.toml" --device "$device" --output "$work/$run" "$@" >"$work/$run.log" 2>&1 &
  disown # or the shell reports that it was killed
}

# Waits until run $1 has saved after step 4, then sends its process $3 the signal $2; fails if it ended before.
interrupt() {
  local run=$1 signal=$2 pid=$3 until=$4
  while [ ! -d "$work/$run/ckpt-0000000004" ]; do
    kill -0 "$pid" 2>/dev/null && [ "$SECONDS" -lt "$until" ] || return 1
    sleep 0.02
  done
  kill "-$signal" "$pid" 2>/dev/null
  while kill -0 "$pid" 2>/dev/null; do
    [ "$SECONDS" -lt "$until" ] || return 1
    sleep 0.05
  done
  [ ! -d "$work/$run/ckpt-0000000040" ] # else it came too late
}

# One run through, one stopped and one killed after some steps, both resumed: adapters, moments and losses byte by byte. The
# runs go at the same time, since most of it is the compilation of kernels.
exactness() {
  local since=$SECONDS limit until
  limit=$(left "$1")
  until=$((SECONDS + limit))
  if [ "$limit" -lt 20 ]; then row "resuming" "not reached" "" "$since"; return; fi
  cat >"$work/run.toml" <<TOML
[model]
path = "$root/tests/fixtures/parity/pipeline_dev/model"
[dataset]
path = "$root/examples/ink"
resolution = 64
bucket_step = 16
caption_dropout = 0.2
max_sequence_length = 16
[lora]
r = 4
lora_dropout = 0.1
[optimizer]
learning_rate = 2e-3
[train]
steps = 40
batch_size = 2
gradient_accumulation_steps = 2
seed = 7
[checkpoint]
every = 2
keep = 100
TOML
  train straight; local straight=$!
  train stopped; local stopped=$!
  train killed; local killed=$!
  interrupt stopped INT "$stopped" "$until" & local stopping=$!
  interrupt killed KILL "$killed" "$until" & local killing=$!
  local run when_stopped when_killed
  wait "$stopping"; when_stopped=$?
  wait "$killing"; when_killed=$?
  while kill -0 "$straight" 2>/dev/null && [ "$SECONDS" -lt "$until" ]; do sleep 0.1; done
  if [ ! -f "$work/straight/lora.safetensors" ]; then
    if [ "$SECONDS" -lt "$until" ]; then row resuming FAIL "the run failed: $(last_of "$work/straight.log")" "$since"
    else row resuming "not reached" "cut after $limit s and $(cat "$work/straight/metrics.jsonl" 2>/dev/null | wc -l) of 40 steps" "$since"; fi
    kill -9 "$straight" "$stopped" "$killed" 2>/dev/null
    return
  fi
  local pids=()
  for run in stopped killed; do train $run --resume; pids+=($!); done
  while kill -0 "${pids[@]}" 2>/dev/null && [ "$SECONDS" -lt "$until" ]; do sleep 0.1; done
  for run in stopped killed; do
    local when=$when_stopped part differs=""
    [ $run = killed ] && when=$when_killed
    if [ "$when" != 0 ]; then row "resuming: $run" "not shown" "the run was over before it was $run" "$since"; continue; fi
    if [ ! -f "$work/$run/lora.safetensors" ]; then
      if [ "$SECONDS" -lt "$until" ]; then row "resuming: $run" FAIL "$(last_of "$work/$run.log")" "$since"
      else row "resuming: $run" "not reached" "cut after $limit s" "$since"; fi
      continue
    fi
    for part in lora.safetensors metrics.jsonl ckpt-0000000040/lora.safetensors ckpt-0000000040/optimizer.safetensors; do
      cmp -s "$work/straight/$part" "$work/$run/$part" || differs="$differs $part"
    done
    if [ -z "$differs" ]; then row "resuming: $run, then resumed" ok "40 steps: adapter, moments and losses have the bits of the uninterrupted run" "$since"
    else row "resuming: $run, then resumed" FAIL "other bits than the uninterrupted run in$differs" "$since"; fi
  done
  kill -9 "${pids[@]}" 2>/dev/null
}

# The card's number for nvidia-smi.
case $device in *:*) card=${device#*:} ;; *) card=0 ;; esac

# MiB of the card in use, every fifth of a second, until killed.
watch_memory() {
  while true; do nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -i "$card" | grep -E '^[0-9]+$'; sleep 0.2; done
}

# bench NAME LIMIT COMMAND...: runs a benchmark, with the card's memory beside it; what it says is its last line.
bench() {
  local name=$1 since=$SECONDS limit log="$work/bench-${1//[^a-z]/-}.log"
  limit=$(left "$2")
  shift 2
  if [ "$limit" -lt 10 ]; then row "$name" "not reached" "" "$since"; return; fi
  local watcher="" before=0
  if [[ $device == cuda* ]] && command -v nvidia-smi >/dev/null; then
    watch_memory >"$log.mib" 2>/dev/null &
    watcher=$!
    sleep 0.5
    before=$(head -n 1 "$log.mib")
  fi
  timeout "$limit" "$@" >"$log" 2>"$log.err"
  local code=$? memory=""
  if [ -n "$watcher" ]; then
    kill "$watcher" 2>/dev/null
    wait "$watcher" 2>/dev/null
    [ -s "$log.mib" ] && memory="; GPU memory $(($(sort -n "$log.mib" | tail -n 1) - ${before:-0})) MiB"
  fi
  case $code in
    0) row "$name" ok "$(last_of "$log" | sed 's/^.*; step/step/')$memory" "$since" ;;
    124) row "$name" "not reached" "cut after $limit s" "$since" ;;
    *) row "$name" "FAIL ($code)" "$(last_of "$log.err")" "$since" ;;
  esac
}

# Recompute must not change a bit: losses are printed with all their digits.
same_losses() {
  local since=$SECONDS plain recompute
  plain=$(grep -o 'loss .*' "$work/bench-step--plain.log" 2>/dev/null)
  recompute=$(grep -o 'loss .*' "$work/bench-step--recompute.log" 2>/dev/null)
  if [ -z "$plain" ] || [ -z "$recompute" ]; then row "recompute: same losses" "not reached" "" "$since"
  elif [ "$plain" = "$recompute" ]; then row "recompute: same losses" ok "$plain with and without, in two processes" "$since"
  else row "recompute: same losses" FAIL "$plain without, $recompute with" "$since"; fi
}

# The same steps in torch: $1 is the model, then its variants.
torch() {
  local since=$SECONDS why model=$1
  shift
  if [[ $device != cuda* ]]; then row "torch: step, $model" "-" "asked for on cuda alone" "$since"; return; fi
  if ! why=$("$python" -c 'import torch, peft; assert torch.cuda.is_available(), "torch sees no GPU"' 2>&1); then
    row "torch: step, $model" "-" "not measured: $(echo "$why" | tail -n 1)" "$since"
    return
  fi
  for variant in "$@"; do
    bench "torch: step, $model, $variant" 60 "$python" "$root/tools/gpu-check-torch.py" --model "$model" --variant "$variant" --steps "$steps"
  done
}

# One step of a model of real dimensions, in bf16, all blocks computed again, if the card has memory for it.
real_size() {
  local model=$1 needs=$2 since=$SECONDS total
  shift 2
  total=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits -i "$card" 2>/dev/null | grep -E '^[0-9]+$' | head -n 1)
  if [[ $device != cuda* ]]; then row "step: $model" "-" "asked for on cuda alone" "$since"; return 1; fi
  if [ "${total:-0}" -lt "$needs" ]; then row "step: $model" "-" "needs $needs MiB, and the card has ${total:-an unknown number of}" "$since"; return 1; fi
  bench "step: $model${*:+, $*}" 60 "$program" bench step --device "$device" --model "$model" --compute bf16 --variant recompute --steps 3 "$@"
}

printf '%s, %s, %s\n\n' "$("$program" --version)" "$(date -u +%Y-%m-%d)" "$(nproc) CPU cores"
printf '| %-34s | %-11s | %-78s | %5s |\n|---|---|---|---|\n' part result seen s
if devices; then
  # What must be right first, all at the same time: most of it is the compilation of kernels. Then what takes how long, one by one.
  began_parity=$SECONDS
  limit=$(left 150)
  parity "networks" "transformer_forward|single_file_transformer" 1 "$limit" &
  parity "adapters" "lora_forward|lora_format" 1 "$limit" &
  parity "training" "train" 1 "$limit" &
  parity "text encoders" "clip_text|t5_encoder|qwen3_text" 1 "$limit" &
  # Convolutions are TF32 on a card that has it, as they are in torch by default: three digits.
  with_convolutions=1
  if [[ $device == cuda* ]]; then with_convolutions=10; fi
  parity "autoencoders" "vae|single_file_vae|tiny_vae" "$with_convolutions" "$limit" &
  parity "pipelines" "pipeline" "$with_convolutions" "$limit" &
  parity "optimizers" "optimizer" 1 "$limit" &
  exactness 170
  wait
  for name in "networks" "adapters" "training" "text encoders" "autoencoders" "pipelines" "optimizers"; do
    parity_row "$name" "$began_parity"
  done
  bench "step: plain" 60 "$program" bench step --device "$device" --variant plain --steps "$steps"
  bench "step: recompute" 60 "$program" bench step --device "$device" --variant recompute --steps "$steps"
  same_losses
  if [[ $device == cuda* ]]; then
    bench "step: bf16" 60 "$program" bench step --device "$device" --variant plain --compute bf16 --steps "$steps"
  fi
  torch baseline f32 f32-checkpointing bf16
  real_size klein-4b 14000 --batch 2
  steps=3
  real_size dev 30000 && torch dev bf16-checkpointing
fi
printf '\n%s s in all\n' "$((SECONDS - began))"
exit $failed
