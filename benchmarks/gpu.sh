#!/usr/bin/env bash
# What a machine with one GPU, no network and commands of ten minutes is used for. Each command ends in time by itself:
#   bash benchmarks/gpu.sh first                        smoke of all scripts, gpu tests, steps/s at N = 8, 128, 1024
#   bash benchmarks/gpu.sh games Breakout,Pong,BeamRider 10000000        starts the games, or goes on; they stay running
#   STOP=1 bash benchmarks/gpu.sh games Breakout,Pong,BeamRider 10000000   the same, but ends them: the last command of a loan
# Needs Python 3.12 with torch and numpy, and what the scripts import besides; for the tests pytest, pytest-xdist and hypothesis.
# Where that is missing, SITE names a folder that has it. OUT: results and checkpoints, in at most PARTS (4) parts of 16 MB; IN:
# the OUT of the machine before, to go on from.
# A game that was ended goes on from its last checkpoint; these are EVERY (200) iterations apart.
# Dry run without a GPU: DEVICE=cpu TINY=1 PY=python bash benchmarks/gpu.sh first
set -uo pipefail
LIMIT=${LIMIT:-590} DEVICE=${DEVICE:-cuda} PY=${PY:-python3} TINY=${TINY:-}
root=$(cd "$(dirname "$0")/.." && pwd)
work=${WORK:-${TMPDIR:-/tmp}/ppo_gpu}
mkdir -p "$work/runs" "${OUT:=$work/out}"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$root${SITE:+:$SITE} PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$work/inductor
cores=$($PY -c 'import os; print(len(os.sched_getaffinity(0)))') || exit 1
failed=0
cd "$root" || exit 1
left() { echo $((LIMIT - SECONDS)); }
say() { echo "[$SECONDS s] $*"; }
# a command with a time limit in seconds, its output in a file
try() { timeout -k 5 "$1" "${@:3}" >"$2" 2>&1 || { say "FAILED ($?): ${*:3}"; tail -n 3 "$2"; return 1; }; }

first() {
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || say "no GPU"
  say "$cores cores; smoke of all scripts"
  rm -rf "$work"/runs/smoke_*
  local short="--device $DEVICE --num-threads $((cores > 4 ? cores / 4 : 1)) --eval-episodes 1 --run-dir $work/runs/smoke"
  local steps=4096
  [ -n "$TINY" ] && short="--no-compile --num-envs 2 --num-steps 16 --num-minibatches 2 $short" steps=64
  try 240 "$OUT/smoke_continuous.txt" $PY ppo_continuous.py --env HalfCheetah --total-timesteps $steps ${short}_continuous &
  local waited=$!
  try 240 "$OUT/smoke_kl.txt" $PY ppo_kl_penalty.py --env Hopper --total-timesteps $steps ${short}_kl &
  waited+=" $!"
  try 240 "$OUT/smoke_shared.txt" $PY ppo_shared_params.py --total-timesteps $steps ${short}_shared &
  waited+=" $!"
  try 240 "$OUT/smoke_atari.txt" $PY ppo_atari.py --total-timesteps $steps --eval-steps 200 ${short}_atari &
  waited+=" $!"
  for pid in $waited; do wait "$pid" || failed=1; done
  # texts and a reward of its own, because the built-in data come from the network
  for i in {1..90}; do echo "This is the text of number $i, and it is $([ $((i % 2)) = 0 ] && echo fine || echo poor)."; done >"$work/texts.txt"
  printf 'def score(prompts, responses):\n    return [float(r.count("e")) for r in responses]\n' >"$work/letters.py"
  PYTHONPATH=$PYTHONPATH:$work try 240 "$OUT/smoke_rlhf.txt" $PY ppo_rlhf.py --env letters:score --data "$work/texts.txt" --vocabulary 300 \
    --width 32 --layers 1 --sft-epochs 2 --num-envs 8 --num-steps 8 --num-minibatches 2 --total-timesteps 128 --eval-episodes 4 \
    --device "$DEVICE" --run-dir "$work/runs/smoke_rlhf" || failed=1
  for log in "$OUT"/smoke_*.txt; do say "$(basename "$log"): $(grep -a ", seed 1: " "$log" | tail -n 1 | cut -c1-150)"; done
  say "gpu tests"
  local marked="gpu" code limit
  [ -n "$TINY" ] && marked="gpu and slow"  # none
  for tf32 in "" 0; do  # a failure without TF32, too, is no matter of digits
    limit=$(($(left) > 320 ? 200 : $(left) > 140 ? $(left) - 120 : 20))
    env ${tf32:+NVIDIA_TF32_OVERRIDE=$tf32} timeout -k 5 $limit $PY -m pytest -q -m "$marked" -n 4 -p no:cacheprovider \
      $(grep -l "mark.gpu" tests/test_*.py) >"$OUT/tests$tf32.txt" 2>&1
    code=$?  # 5: no test, as without a GPU
    tail -n 4 "$OUT/tests$tf32.txt"
    [ $code = 0 ] || { [ -n "$TINY" ] && [ $code = 5 ]; } && break
    failed=1
    say "FAILED ($code): the gpu tests${tf32:+, without TF32}"
  done
  say "speed"
  : >"$OUT/speed.txt"
  local n t precision iterations specs=("8 128" "128 128" "1024 16")
  [ -n "$TINY" ] && specs=("8 1" "16 1")
  for spec in "${specs[@]}"; do
    for precision in float32 bfloat16; do
      read -r n t <<<"$spec"
      iterations=$((40 * 1024 / (n * t)))
      [ $iterations -lt 6 ] && iterations=6
      [ -n "$TINY" ] && iterations=3
      [ "$(left)" -lt 150 ] && { say "no time for N = $n, $precision"; continue; }
      rm -rf "$work/runs/speed"
      TORCH_LOGS=perf_hints,cudagraphs try 110 "$work/speed.log" $PY ppo_atari.py --device "$DEVICE" --num-envs $n --num-steps $t --precision $precision \
        --total-timesteps $((iterations * n * t)) --eval-episodes 0 --run-dir "$work/runs/speed" ${TINY:+--no-compile} || failed=1
      if grep -hiE "skipping cudagraph|nodes, non-cudagraphable|runs uncompiled" "$work/speed.log" | sort -u | sed -n 1,3p | tee -a "$OUT/speed.txt" | grep .; then
        failed=1
      fi
      $PY - "$work/runs/speed/metrics.jsonl" "N = $n, T = $t, $precision" <<'P' | tee -a "$OUT/speed.txt"
import json, pathlib, sys
lines = pathlib.Path(sys.argv[1]).read_text().splitlines()[2:] if pathlib.Path(sys.argv[1]).is_file() else []
records = [json.loads(line) for line in lines]  # without the iteration that compiles
if records:
    mean = lambda key: sum(r[f"charts/{key}"] for r in records) / len(records)
    print(f"{sys.argv[2]}: {records[-1]['charts/SPS']} steps/s, environment {mean('env_share'):.0%}, update {mean('update_share'):.0%}")
P
    done
  done
}

# The checkpoints and logs of all games. They are copied first, because the games may go on: a log may be longer than at the
# checkpoint, but not shorter.
pack() {
  local game name parts
  rm -rf "$work/packed" && mkdir "$work/packed" || return 1
  for game in $(cd "$work/runs" && ls -d game_*/); do
    [ -f "$work/runs/$game/checkpoint.pt" ] || continue
    mkdir "$work/packed/$game" || return 1
    for name in checkpoint.pt metrics.jsonl episodes.jsonl ppo_atari.py; do cp "$work/runs/$game$name" "$work/packed/$game" || return 1; done
  done
  tar cz -C "$work/packed" . | split -b 15900000 - "$OUT/games.tgz." || return 1
  parts=$(ls "$OUT"/games.tgz.* | wc -l)
  [ "$parts" -le "${PARTS:-4}" ] || { say "FAILED: $parts parts, more than ${PARTS:-4}: run fewer games"; return 1; }
}

# All of them back again, or none.
unpack() {
  cat "$IN"/games.tgz.* | tar xz -C "$work/runs" && return
  rm -rf "$work"/runs/game_*
  say "FAILED: no whole games.tgz in $IN; nothing was started"
  return 1
}

games() {
  local names steps=$2 width i=0 game dir
  IFS=, read -ra names <<<"$1"
  width=$((cores / ${#names[@]}))
  [ $width -lt 1 ] && width=1
  if [ -n "${IN:-}" ] && ! ls -d "$work"/runs/game_* >/dev/null 2>&1; then unpack || exit 1; say "checkpoints taken over"; fi
  for game in "${names[@]}"; do
    dir=$work/runs/game_$game
    if [ -f "$dir.pid" ] && kill -0 "$(cat "$dir.pid")" 2>/dev/null; then say "$game is running"; i=$((i + 1)); continue; fi
    if [ -f "$dir/checkpoint.pt" ]; then
      set -- --resume "$dir" --total-timesteps "$steps"
    else
      rm -rf "$dir"
      set -- --env "$game" --total-timesteps "$steps" --precision bfloat16 --checkpoint-every "${EVERY:-200}" --run-dir "$dir" ${FLAGS:-}
    fi
    # a session of its own, so that it goes on after this command
    setsid taskset -c "$($PY -c "import os; c = sorted(os.sched_getaffinity(0)); print(','.join(str(c[($i * $width + k) % len(c)]) for k in range($width)))")" \
      $PY "$root/ppo_atari.py" "$@" --device "$DEVICE" --num-threads $width --eval-episodes 0 >>"$dir.log" 2>&1 </dev/null &
    echo $! >"$dir.pid"
    say "$game: ${1#--} on $width core(s)"
    i=$((i + 1))
  done
  local running=1
  while [ $running = 1 ] && [ "$(left)" -gt 30 ]; do
    running=0
    for game in "${names[@]}"; do kill -0 "$(cat "$work/runs/game_$game.pid")" 2>/dev/null && running=1; done
    [ $running = 1 ] && sleep 1
  done
  if [ -n "${STOP:-}" ]; then
    for game in "${names[@]}"; do kill -TERM "$(cat "$work/runs/game_$game.pid")" 2>/dev/null; done
    sleep 3
  fi
  for game in "${names[@]}"; do
    $PY - "$work/runs/game_$game" <<'P' || { failed=1; tail -n 2 "$work/runs/game_$game.log"; }
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
returns = [json.loads(line)["return"] for line in (run / "episodes.jsonl").read_text().splitlines()[-100:]]
score = f"{sum(returns) / len(returns):.1f}" if returns else "none"
print(f"{run.name}: step {last['global_step']}, return {score} over {len(returns)} games, {last['charts/SPS']} steps/s, "
      f"environment {last['charts/env_share']:.0%}")
P
  done
  rm -f "$OUT"/games.tgz.*
  pack || failed=1
  ls -l "$OUT"
}

case ${1:-} in
first) first ;;
games) games "${2:?games, such as Breakout,Pong}" "${3:-10000000}" ;;
*) sed -n '2,10p' "$root/benchmarks/gpu.sh"; exit 2 ;;
esac
say "$([ $failed = 0 ] && echo done || echo "done, with failures")"
exit $failed
