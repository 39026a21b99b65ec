"""Runs suites and sweeps of the PPO scripts and keeps one small result file per run.

    python benchmarks/run.py base                    print the plan of a suite: what is left to run, expected time
    python benchmarks/run.py base --go               run it; started again after any interruption, it goes on
    python benchmarks/run.py sweep ppo_continuous.py --env Hopper Walker2d --clip-coef 0.1 0.2 0.3 --seed 1 2 3 --go
    python benchmarks/run.py table1 --go --ray auto  the same runs on a Ray cluster
    python benchmarks/run.py collect runs/NAME --suite base
    python benchmarks/run.py random                  scores of the random policy on the MuJoCo tasks

Each run is a process of the real script, pinned to its own cores. Exit code 1: a run failed twice, the disk is full, or
the suite is running already; 2: bad arguments.
"""

import argparse
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path

import suites
import tqdm
from results import (
    RESULTS,
    BadArguments,
    RunnerError,
    collect,
    is_finished,
    read_result,
    result_file,
    script_of,
    summarize,
    write_result,
)

ROOT = suites.ROOT
RUNS = ROOT / "benchmarks" / "runs"  # not in git
START_SECONDS = 15  # of a run before its first step, for the expected time
MIN_FREE = 200e6  # bytes of disk below which no run is started


# ---------------------------------------------------------------------------------------------------------------------
# One run


def steps_of(run: suites.Run) -> float:
    """Steps of a run: its flag, else the default in the text of its script; NaN where that is not to be found."""
    if "total_timesteps" in run.flags:
        steps = str(run.flags["total_timesteps"])
        if not re.fullmatch(r"[\d_]+", steps):
            raise BadArguments(f"--total-timesteps {steps}: steps are a whole number, such as 1000000")
        return int(steps)
    file = ROOT / run.script
    found = re.search(r"total.timesteps\D*?([0-9][0-9_]{3,})", file.read_text()) if file.is_file() else None
    return int(found.group(1)) if found else math.nan


def make_command(
    run: suites.Run, runs: Path, python: str, peer_python: str | None, threads: int, gpu: bool = False
) -> tuple[list[str], Path]:
    """Command that starts a run or goes on with it, and its run directory. On a GPU that is not there the script refuses.

    The text of the script is copied first, so that a run goes on with the text it began with, whatever is edited.
    """
    folder = runs / suites.slug(run.suite)
    run_dir, plan_file = folder / run.name, folder / f"{run.name}.json"
    if not (ROOT / run.script).is_file():
        raise RunnerError(f"{run.script} does not exist")
    text = (ROOT / run.script).read_bytes()
    if plan_file.is_file() and (run_dir / "checkpoint.pt").is_file():  # without a checkpoint there is nothing to go on with
        try:
            plan = dict(json.loads(plan_file.read_text()))
        except (ValueError, TypeError) as error:
            raise RunnerError(f"{plan_file} is damaged: delete it and {run_dir} to start this run anew") from error
        if plan["options"] != run.options() or Path(plan["script"]).name != Path(run.script).name:
            raise RunnerError(f"{run_dir} was started with other flags or another script: delete it to start this run anew")
        if (folder / plan["script"]).read_bytes() != text:
            told = f"{run.script} has changed, but {run.name} goes on with the text that it began with"
            tqdm.tqdm.write(f"{told}; to begin it anew delete {run_dir}", sys.stderr)
    else:
        shutil.rmtree(run_dir, ignore_errors=True)
        sha256 = hashlib.sha256(text).hexdigest()
        script = folder / "scripts" / sha256[:12] / Path(run.script).name
        if not script.is_file() or script.read_bytes() != text:
            script.parent.mkdir(parents=True, exist_ok=True)
            script.write_bytes(text)
        plan = {"script": str(script.relative_to(folder)), "options": run.options()}
        temporary = plan_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(plan) + "\n")
        os.replace(temporary, plan_file)
    command = [str(peer_python if run.peer else python), str(folder / plan["script"])]
    own = [] if run.peer or "num_threads" in run.flags else ["--num-threads", str(threads)]
    own += ["--device", "cuda"] if gpu and not run.peer and "device" not in run.flags else []
    if (run_dir / "checkpoint.pt").is_file():
        return [*command, "--resume", str(run_dir), *own], run_dir
    shutil.rmtree(run_dir, ignore_errors=True)  # cut before its first checkpoint, or without any
    if not run.peer and "eval_episodes" not in run.flags and not re.search("eval.every", Path(command[1]).read_text()):
        own += ["--eval-episodes", "0"]  # where a script evaluates while it trains, that is part of the result
    return [*command, *run.options(), *own, "--run-dir", str(run_dir)], run_dir


def last_words(text: str) -> str:
    """Last line of what a script wrote, without the progress bar; of a last box, which tyro draws, the first line."""
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()] or ["no output"]
    boxes = [i for i, line in enumerate(lines) if line.startswith("╭")]
    return lines[boxes[-1] + 1].strip("│ ") if boxes and lines[-1].startswith("╰") else lines[-1]


def die_with_parent(parent: int, cores: list[int]):
    """Called in a child process: pins it, and has the kernel kill it when the runner is gone (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def environment(threads: int, gpu: str | None) -> dict[str, str]:
    env = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}  # of exact.py
    return env if gpu is None else env | {"CUDA_VISIBLE_DEVICES": gpu}


# ---------------------------------------------------------------------------------------------------------------------
# All runs


def take_lock(file: Path):
    """An open file that holds a lock. Processes that inherit it hold it too: it is free when the last one is gone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = open(file, "a")
    for _ in range(20):  # the processes of a runner just killed need a moment to die
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        time.sleep(0.25)
    lock.close()
    raise RunnerError(f"{file.with_suffix('')} is running already (lock {file}): wait for it or stop it first")


def expected_seconds(runs: list[suites.Run], results: Path) -> float:
    """Time of all runs one after the other, at the speed of results of the same script and task, else suites.RATES."""
    measured: dict[tuple[str, str], list[float]] = {}
    for file in results.glob("*/*.jsonl.gz"):
        result = read_result(file)
        if result["final"]["sps"]:  # 0 where a run had a single iteration
            measured.setdefault((result["header"]["script"], result["header"]["env"]), []).append(result["final"]["sps"])
    total = 0.0  # NaN where the steps of a run are not known
    for run in runs:
        rate = measured.get((Path(run.script).name, run.env)) if not run.peer else None
        kind = run.flags["algorithm"] if run.peer else Path(run.script).stem
        total += START_SECONDS + steps_of(run) / max(statistics.median(rate) if rate else suites.RATES.get(kind, 3000), 1)
    return total


def clock(seconds: float) -> str:
    if math.isnan(seconds):
        return "unknown"
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"


class Progress:
    """The bar over runs, and what came of each."""

    def __init__(self, total: int, finished: int):
        self.bar = tqdm.tqdm(total=total, initial=finished, unit="run", disable=None, smoothing=0)
        self.attempts: Counter[str] = Counter()
        self.failed: list[str] = []

    def succeed(self, run: suites.Run, final: dict):
        self.bar.update()
        score = math.nan if final["return"] is None else final["return"]
        self.say(f"finished {run.suite}/{run.name}: return {score:.1f}, {final['seconds']:.0f} s, {final['sps']} steps/s")

    def fail(self, run: suites.Run, reason: str) -> bool:
        """Counts a failure; True if the run is to be tried again. What a script refuses, exit code 2, it refuses again."""
        key = f"{run.suite}/{run.name}"
        self.attempts[key] += 1
        again = self.attempts[key] < 2 and not reason.startswith("exit code 2:")
        self.say(f"{'failed, tried again' if again else 'FAILED'} {key}: {reason}")
        if not again:
            self.failed.append(f"{key}: {reason}")
        return again

    def say(self, text: str):
        tqdm.tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", sys.stderr)


def check_disk(folder: Path):
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE:
        raise RunnerError(
            f"the disk of {folder} is full ({free / 1e6:.0f} MB left, {MIN_FREE / 1e6:.0f} MB needed): no further run is "
            f"started; free some space and start again, nothing is lost"
        )


def allowed_cores() -> list[int]:
    """Cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def default_cores_per_run(options: argparse.Namespace) -> int:
    """One core a run; with --gpus all cores of this machine, shared out among the runs at a time."""
    if not options.gpus or options.ray:
        return 1
    jobs = options.jobs or len(options.gpus.split(",")) * options.runs_per_gpu
    return max(len(allowed_cores()) // jobs, 1)


def jobs_at_a_time(options: argparse.Namespace) -> int:
    """Runs on this machine at a time: --jobs, else what its cores carry, and its GPUs where --gpus names them."""
    most = max(len(allowed_cores()) // options.cores_per_run, 1)
    if options.gpus:
        most = min(most, len(options.gpus.split(",")) * options.runs_per_gpu)
    return options.jobs or most


def run_here(waiting: deque[suites.Run], options: argparse.Namespace, progress: Progress, locks: list):
    """Runs all, `--jobs` at a time, each on its own cores and, with `--gpus`, on the GPU of its slot."""
    cores = allowed_cores()
    width = options.cores_per_run
    gpus = options.gpus.split(",") if options.gpus else [None]
    free = [
        ([cores[(slot * width + k) % len(cores)] for k in range(width)], gpus[slot % len(gpus)])
        for slot in range(jobs_at_a_time(options))
    ]
    active: list[tuple[suites.Run, subprocess.Popen, tuple[list[int], str | None], Path, Path]] = []
    stop: RunnerError | None = None
    try:
        while (waiting and not stop) or active:
            while waiting and free and not stop:
                run = waiting[0]
                try:
                    check_disk(options.runs_dir)
                    paths = options.runs_dir, sys.executable, options.peer_python
                    command, run_dir = make_command(run, *paths, width, gpu=bool(options.gpus))
                    log = run_dir.with_name(run_dir.name + ".log")
                    output = open(log, "ab")
                except RunnerError as error:
                    stop = error
                    break
                except OSError as error:
                    stop = RunnerError(f"cannot write {options.runs_dir}: {error.strerror}")
                    break
                waiting.popleft()
                slot = free.pop(0)
                with output:
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=environment(width, slot[1]),
                        pass_fds=[lock.fileno() for lock in locks],
                        preexec_fn=functools.partial(die_with_parent, os.getpid(), slot[0]),
                    )
                active.append((run, process, slot, run_dir, log))
            time.sleep(0.1)
            for entry in [entry for entry in active if entry[1].poll() is not None]:
                active.remove(entry)
                run, process, slot, run_dir, log = entry
                free.append(slot)
                try:
                    if process.returncode:
                        raise RunnerError(
                            f"exit code {process.returncode}: {last_words(log.read_text(errors='replace'))} (log {log})"
                        )
                    records = summarize(run_dir, run.suite, run.setting, run.flags)
                    write_result(result_file(options.results_dir, run.suite, run.name), records)
                except RunnerError as error:
                    if progress.fail(run, str(error)):
                        waiting.append(run)
                except OSError as error:
                    stop = RunnerError(f"cannot write the result of {run.name}: {error.strerror}; its run is kept")
                else:
                    progress.succeed(run, records[1])
            progress.bar.refresh()
    finally:
        for _, process, *_ in active:  # Ctrl-C: the scripts stop where their next resume begins
            process.send_signal(signal.SIGINT)
        for _, process, *_ in active:
            process.wait()
    if stop:
        raise stop


def tell_other_versions(runs: list[suites.Run], results: Path):
    """A line where finished runs of a sweep are of another text of the script than that of now."""
    if not runs:
        return
    script = script_of(runs[0]) if runs[0].script == suites.EXACT else runs[0].script  # a sweep has one
    now = hashlib.sha256((ROOT / script).read_bytes()).hexdigest()
    stored = [read_result(result_file(results, run.suite, run.name))["header"].get("script_sha256") for run in runs]
    if other := sum(sha256 != now for sha256 in stored):
        print(f"{other} of the finished runs are of another version of {script_of(runs[0])}: --name NAME begins a new set")


def tell_slow_bfloat16(runs: list[suites.Run], options: argparse.Namespace):
    """A warning where runs would take bfloat16 on a CPU that has no instructions for it."""
    half = any(run.flags.get("precision") == "bfloat16" for run in runs)
    if half and not (options.gpus or options.ray or suites.load_script("ppo_atari").bfloat16_unit()):
        slow = "this CPU has no instructions for bfloat16, so these runs may take ten times as long"
        print(f"warning: {slow}; in float32: python benchmarks/run.py sweep ppo_atari.py --env GAME", file=sys.stderr)


def execute(runs: list[suites.Run], options: argparse.Namespace) -> int:
    """Prints the plan or carries it out; returns the exit code."""
    for flag, given, known in (
        ("env", options.only_env, {run.env for run in runs}),
        ("seed", options.only_seed, {run.seed for run in runs}),
        ("setting", options.only_setting, {run.setting for run in runs}),
    ):
        if unknown := [str(x) for x in given or [] if x not in known]:
            there = ", ".join(map(str, sorted(known)))
            raise BadArguments(f"--only-{flag}: no run has {', '.join(unknown)}; there are {there}")
    if options.total_timesteps:
        runs = [
            suites.Run(r.suite, r.setting, r.script, r.env, r.seed, r.flags | {"total_timesteps": options.total_timesteps})
            for r in runs
        ]
    runs = [r for r in runs if not options.only_env or r.env in options.only_env]
    runs = [r for r in runs if not options.only_seed or r.seed in options.only_seed]
    runs = [r for r in runs if not options.only_setting or r.setting in options.only_setting]
    if not runs:
        raise BadArguments("no run of the suite is left by --only-env, --only-seed and --only-setting")
    left = [run for run in runs if not is_finished(run, options.results_dir)]
    if options.go and not options.peer_python and any(run.peer for run in left):
        raise BadArguments("the runs of TRPO and A2C need --peer-python PATH, a Python that has sb3-contrib (see README.md)")
    if options.suite == "sweep":
        tell_other_versions([run for run in runs if run not in left], options.results_dir)
    jobs = jobs_at_a_time(options)
    seconds = expected_seconds(left, options.results_dir) / max(min(jobs, len(left)), 1)
    where = f"on the Ray cluster {options.ray}" if options.ray else f"{jobs} at a time"
    expected = f"expected time {clock(seconds)}{' (by the speed of CPUs)' if options.gpus and left else ''}"
    print(f"{len(runs)} runs, {len(runs) - len(left)} finished, {len(left)} left, {where}, {expected}")
    tell_slow_bfloat16(left, options)
    if not options.go:
        for run in left:
            cut = (options.runs_dir / suites.slug(run.suite) / run.name / "checkpoint.pt").is_file()
            print(f"  {'go on ' if cut else ''}{run.suite}: {run.script} {' '.join(run.options())}")
        if left:
            print("nothing was started: --go starts it")
        return 0
    locks = [take_lock(options.runs_dir / f"{suites.slug(suite)}.lock") for suite in sorted({run.suite for run in runs})]
    left = [run for run in runs if not is_finished(run, options.results_dir)]  # of now, under the lock
    progress = Progress(len(runs), len(runs) - len(left))
    try:
        if options.ray:
            import ray_cluster

            ray_cluster.run_on_ray(deque(left), options, progress)
        else:
            run_here(deque(left), options, progress, locks)
    finally:
        progress.bar.close()
        done = sum(is_finished(run, options.results_dir) for run in runs)
        print(f"{done} of {len(runs)} runs finished, {len(progress.failed)} failed")
        for line in progress.failed:
            print(f"  {line}", file=sys.stderr)
        for lock in locks:
            lock.close()
    return 1 if progress.failed else 0


# ---------------------------------------------------------------------------------------------------------------------
# Random policy


def random_scores(envs: list[str], episodes: int, results: Path):
    """Scores of actions drawn uniformly within their bounds: the first episode of each of `episodes` environments.

    Environment i has the seed i (from 1), the actions are drawn with seed 0.
    """
    import numpy as np

    script = suites.load_script("ppo_continuous")
    for env in envs:
        seeds, file = list(range(1, episodes + 1)), results / "random" / f"{suites.slug(env)}.json"
        if file.is_file() and f'"episodes": {episodes},' not in file.read_text():
            raise BadArguments(f"{file} is not of {episodes} episodes: delete it, or give another --results-dir")
        try:
            vector, *_ = script.make_envs(env, seeds, 1)
            box = script.Spaces.of(vector).action
        except script.UsageError as error:
            raise BadArguments(str(error)) from error
        if not (np.isfinite(box.low).all() and np.isfinite(box.high).all()):
            raise BadArguments(f"the actions of {env} have no bounds, within which they could be drawn: {box}")
        space, rng = vector.single_action_space, np.random.default_rng(0)
        returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
        while running.any():
            actions = rng.uniform(space.low, space.high, (episodes, *space.shape))
            _, reward, terminated, truncated, _ = vector.step(actions)
            returns += reward * running
            running &= ~(terminated | truncated)
        vector.close()
        env_id = script.find_env(env)[0]
        record = {
            "env": env,
            "id": env_id,
            "mean": float(returns.mean()),
            "std": float(returns.std(ddof=1)),
            "episodes": episodes,
            "seeds": f"environments 1 to {episodes}, actions 0",
            "policy": "uniform within the bounds of the action space",
            "versions": {"envpool": script.envpool.__version__, "numpy": np.__version__},
            "returns": [round(float(x), 4) for x in returns],
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record) + "\n")
        print(f"{env_id}: {record['mean']:.2f} +- {record['std']:.2f} over {episodes} episodes")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("suite", choices=[*suites.SUITES, "sweep", "collect", "random"])
    parser.add_argument("names", nargs="*", help="sweep: the script; collect: run directories")
    parser.add_argument("--go", action="store_true", help="run; without it only the plan is printed")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: as many as the cores allow")
    parser.add_argument(
        "--cores-per-run", type=int, help="cores that a run is pinned to; default: 1, or all shared out with --gpus"
    )
    parser.add_argument("--gpus", help="GPUs to share out, such as 0,1")
    parser.add_argument(
        "--runs-per-gpu", type=int, default=1, help="with --gpus: runs that share a GPU, but no more than there are cores"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="use a Ray cluster: local, auto, or an address")
    parser.add_argument("--peer-python", help="Python with Stable-Baselines3 and sb3-contrib, for figure3 and peer")
    parser.add_argument("--name", help="sweep: name of its results; default: sweep_<script>")
    parser.add_argument("--suite", dest="collect_suite", help="collect: suite of the results")
    parser.add_argument("--setting", default="default", help="collect: setting of the results")
    parser.add_argument("--stopped", action="store_true", help="collect: also runs that were stopped early")
    parser.add_argument("--only-env", nargs="+", help="only these tasks of a suite; random: these tasks")
    parser.add_argument("--only-seed", nargs="+", type=int, help="only these seeds of a suite")
    parser.add_argument("--only-setting", nargs="+", help="only these settings of a suite")
    parser.add_argument("--total-timesteps", type=int, help="steps of every run of a suite instead of its own")
    parser.add_argument("--episodes", type=int, default=100, help="random: episodes of each task")
    parser.add_argument("--results-dir", type=Path, default=RESULTS)
    parser.add_argument("--runs-dir", type=Path, default=RUNS)
    return parser


# The flags that a sweep does not pass on to its script, and how many words follow each.
RUNNER_FLAGS = {"--go": 0, "--jobs": 1, "--cores-per-run": 1, "--gpus": 1, "--runs-per-gpu": 1, "--ray": 1}
RUNNER_FLAGS |= {"--peer-python": 1, "--name": 1, "--results-dir": 1, "--runs-dir": 1}


def split_sweep(words: list[str]) -> tuple[list[str], list[str]]:
    """Words after `sweep SCRIPT`, parted into those of the runner and those of the script."""
    own, others, words = [], [], list(words)
    while words:
        word = words.pop(0)
        if word.split("=")[0] not in RUNNER_FLAGS:
            others.append(word)
            continue
        own.append(word)
        if "=" not in word:
            own += [words.pop(0) for _ in range(min(RUNNER_FLAGS[word], len(words)))]
    return own, others


def main(argv: list[str]) -> int:
    parser = make_parser()
    others: list[str] = []
    if argv[:1] == ["sweep"] and len(argv) > 1 and not argv[1].startswith("-"):
        own, others = split_sweep(argv[2:])
        argv = [*argv[:2], *own]
    options = parser.parse_args(argv)
    options.results_dir, options.runs_dir = options.results_dir.resolve(), options.runs_dir.resolve()
    if any(x is not None and x < 1 for x in (options.jobs, options.cores_per_run, options.runs_per_gpu)):
        parser.error("--jobs, --cores-per-run and --runs-per-gpu must be at least 1")
    if options.total_timesteps is not None and options.total_timesteps < 1:
        parser.error("--total-timesteps must be at least 1")
    options.cores_per_run = options.cores_per_run or default_cores_per_run(options)
    try:
        if options.suite == "collect":
            if not options.names or not options.collect_suite:
                parser.error("collect needs run directories and --suite NAME")
            if options.stopped and options.collect_suite != "atari-short":
                parser.error("--stopped is for the suite atari-short, whose table says how far a run came")
            names = [Path(name) for name in options.names]
            left_out = collect(names, options.collect_suite, options.setting, options.results_dir, options.stopped)
            return 1 if left_out else 0
        if options.suite == "random":
            if options.names or options.episodes < 2:
                parser.error("random takes its tasks from --only-env, and at least 2 --episodes")
            random_scores(options.only_env or list(suites.MUJOCO), options.episodes, options.results_dir)
            return 0
        if options.suite == "sweep":
            script = ROOT / options.names[0] if len(options.names) == 1 else ROOT
            if not script.is_file() or script.suffix != ".py":
                parser.error("sweep needs one script of the repository, such as ppo_continuous.py")
            if foreign := [word for word in others if word.startswith("--only-")]:
                parser.error(f"{foreign[0]} is for suites: a sweep names its tasks and seeds by --env and --seed")
            name = options.name or f"sweep_{Path(options.names[0]).stem}"
            if name in suites.SUITES:
                parser.error(f"--name {name} is a stored suite: choose another name for the sweep")
            if name != suites.slug(name) or not name.strip("."):
                parser.error(f"--name {name} names a folder: letters, digits and _ - = + . may be in it")
            try:
                runs = suites.make_sweep(name, options.names[0], others)
            except ValueError as error:
                parser.error(str(error))
        else:
            if options.names:
                parser.error(f"unexpected: {' '.join(options.names)}")
            if options.total_timesteps and (options.results_dir == RESULTS.resolve() or options.runs_dir == RUNS.resolve()):
                parser.error(
                    "--total-timesteps makes other runs than those of the suite: give them a --results-dir and a --runs-dir "
                    "of their own"
                )
            runs = suites.make_suite(options.suite)
        return execute(runs, options)
    except (RunnerError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadArguments) else 1
    except KeyboardInterrupt:
        print("run.py: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
