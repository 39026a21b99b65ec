#!/usr/bin/env bash
# What a machine with one GPU, no network and commands of ten minutes is used for. Each command ends in time by itself:
#   bash benchmarks/gpu.sh first                        smoke of all scripts, gpu tests, steps/s at N = 8, 128, 1024
#   bash benchmarks/gpu.sh games Breakout,Pong,BeamRider 10000000        starts the games, or goes on; they stay running
#   STOP=1 bash benchmarks/gpu.sh games Breakout,Pong,BeamRider 10000000   the same, but ends them: the last command of a loan
# Needs Python 3.12 with torch and numpy, and what the scripts import besides; where that is missing, SITE names a folder that
# has it. OUT: results and checkpoints, in parts of at most 16 MB; IN: the OUT of the machine before, to go on from.
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
try() { timeout -k 5 "$1" "${@:3}" >"$OUT/$2" 2>&1 || { say "FAILED ($?): ${*:3}"; tail -n 3 "$OUT/$2"; return 1; }; }

first() {
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || say "no GPU"
  say "$cores cores; smoke of all scripts"
  rm -rf "$work"/runs/smoke_*
  local short="--device $DEVICE --num-threads $((cores > 4 ? cores / 4 : 1)) --eval-episodes 1 --run-dir $work/runs/smoke"
  local steps=4096
  [ -n "$TINY" ] && short="--no-compile --num-envs 2 --num-steps 16 --num-minibatches 2 $short" steps=64
  try 240 smoke_continuous.txt $PY ppo_continuous.py --env HalfCheetah --total-timesteps $steps ${short}_continuous &
  local waited=$!
  try 240 smoke_kl.txt $PY ppo_kl_penalty.py --env Hopper --total-timesteps $steps ${short}_kl &
  waited+=" $!"
  try 240 smoke_shared.txt $PY ppo_shared_params.py --total-timesteps $steps ${short}_shared &
  waited+=" $!"
  try 240 smoke_atari.txt $PY ppo_atari.py --total-timesteps $steps --eval-steps 200 ${short}_atari &
  waited+=" $!"
  for pid in $waited; do wait "$pid" || failed=1; done
  # texts and a reward of its own, because the built-in data come from the network
  for i in {1..90}; do echo "This is the text of number $i, and it is $([ $((i % 2)) = 0 ] && echo fine || echo poor)."; done >"$work/texts.txt"
  printf 'def score(prompts, responses):\n    return [float(r.count("e")) for r in responses]\n' >"$work/letters.py"
  PYTHONPATH=$PYTHONPATH:$work try 240 smoke_rlhf.txt $PY ppo_rlhf.py --env letters:score --data "$work/texts.txt" --vocabulary 300 \
    --width 32 --layers 1 --sft-epochs 2 --num-envs 8 --num-steps 8 --num-minibatches 2 --total-timesteps 128 --eval-episodes 4 \
    --device "$DEVICE" --run-dir "$work/runs/smoke_rlhf" || failed=1
  for log in "$OUT"/smoke_*.txt; do say "$(basename "$log"): $(tail -n 1 "$log" | cut -c1-150)"; done
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
      try 110 speed.log $PY ppo_atari.py --device "$DEVICE" --num-envs $n --num-steps $t --precision $precision \
        --total-timesteps $((iterations * n * t)) --eval-episodes 0 --run-dir "$work/runs/speed" ${TINY:+--no-compile} || failed=1
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
  say "gpu tests"
  local marked="gpu"
  [ -n "$TINY" ] && marked="gpu and slow"  # none
  timeout -k 5 $(($(left) > 40 ? $(left) - 20 : 20)) $PY -m pytest -q -m "$marked" -n 4 -p no:cacheprovider tests >"$OUT/tests.txt" 2>&1
  local code=$?  # 5: no test, as without a GPU
  [ $code = 0 ] || { [ -n "$TINY" ] && [ $code = 5 ]; } || failed=1
  tail -n 4 "$OUT/tests.txt"
}

# The checkpoints and logs of all games, or back again.
pack() { tar cz -C "$work/runs" $(cd "$work/runs" && ls -d game_*/{checkpoint.pt,metrics.jsonl,episodes.jsonl,ppo_atari.py} 2>/dev/null) | split -b 15900000 - "$OUT/games.tgz."; }
unpack() { cat "$IN"/games.tgz.* | tar xz -C "$work/runs"; }

games() {
  local names steps=$2 width i=0 game dir
  IFS=, read -ra names <<<"$1"
  width=$((cores / ${#names[@]}))
  [ $width -lt 1 ] && width=1
  if [ -n "${IN:-}" ] && ! ls -d "$work"/runs/game_* >/dev/null 2>&1; then unpack && say "checkpoints taken over"; fi
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
*) sed -n '2,9p' "$root/benchmarks/gpu.sh"; exit 2 ;;
esac
say "$([ $failed = 0 ] && echo done || echo "done, with failures")"
exit $failed
