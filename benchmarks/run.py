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
import dataclasses
import fcntl
import functools
import gzip
import hashlib
import io
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
from typing import Any

import stats
import suites
import tqdm

ROOT = suites.ROOT
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "benchmarks" / "runs"  # not in git
CURVE_POINTS = 100
START_SECONDS = 15  # of a run before its first step, for the expected time
MIN_FREE = 200e6  # bytes of disk below which no run is started
# Arguments that are no part of a setting: where a run stands and what it shows, and what it runs on.
LOCAL = {"run_dir", "resume", "evaluate", "track", "wandb_project_name", "wandb_entity", "capture_video", "eval_episodes"}
MACHINE = {"num_threads", "device", "compile"}


class RunnerError(Exception):
    """What the user can put right; printed as one sentence."""


# ---------------------------------------------------------------------------------------------------------------------
# Result files


def read_jsonl(file: Path) -> list[dict]:
    """Records of a log; a last line that was cut off by a crash is left out."""
    text = file.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def is_stopped_early(args: dict, last_step: int) -> bool:
    """Whether a run with these arguments had another whole rollout to do after last_step."""
    return last_step + args["num_envs"] * args["num_steps"] <= args["total_timesteps"]


def summarize(run_dir: Path, suite: str, setting: str, flags: dict | None = None, stopped: bool = False) -> list[dict]:
    """The three records of a result file, from the logs of a finished run: header, final scores, thinned curve.

    The curve is the mean return of the last 100 episodes that had ended by each of 100 evenly spaced steps; None before
    the first. Runs with a KL penalty also keep their measured KL: means between these steps, and that of every update.
    stopped: a run that was stopped early will do too.
    """
    try:
        header, *iterations = read_jsonl(run_dir / "metrics.jsonl")
        episodes = read_jsonl(run_dir / "episodes.jsonl")
        args = header["args"]
        steps, returns = [e["global_step"] for e in episodes], [e["return"] for e in episodes]
        last_step = iterations[-1]["global_step"] if iterations else 0
        seconds = [record["charts/seconds"] for record in iterations]
    except (OSError, ValueError, KeyError) as error:
        raise RunnerError(f"{run_dir} is no run directory with readable logs: {error!r}") from error
    if is_stopped_early(args, last_step) and not (stopped and iterations):
        raise RunnerError(f"{run_dir} is not finished: {last_step:,} of {args['total_timesteps']:,} steps")
    # the clock of a run starts at 0 again where it was resumed
    total_seconds = sum(a for a, b in zip(seconds, seconds[1:] + [0.0], strict=True) if b < a)
    curve: dict[str, list] = {"global_step": [], "return": []}
    ended = 0
    penalized = bool(iterations) and "losses/kl" in iterations[0]  # ppo_kl_penalty.py: the exact KL of each update
    if penalized:
        curve["kl"], curve["kl_of_updates"] = [], [round(r["losses/kl"], 6) for r in iterations]
    for k in range(1, CURVE_POINTS + 1):
        step = last_step * k // CURVE_POINTS
        while ended < len(steps) and steps[ended] <= step:
            ended += 1
        curve["global_step"].append(step)
        curve["return"].append(round(stats.last_100(returns[:ended]), 4) if ended else None)
        if penalized:  # mean over the updates since the last point
            since = last_step * (k - 1) // CURVE_POINTS
            kls = [r["losses/kl"] for r in iterations if since < r["global_step"] <= step]
            curve["kl"].append(round(statistics.fmean(kls), 6) if kls else None)
    measured = run_dir / "evaluations.jsonl"  # of ppo_rlhf.py: KL, an independent measure, ... in the course of training
    if measured.is_file():
        curve["evaluations"] = read_jsonl(measured)
    return [
        {
            "suite": suite,
            "setting": setting,
            "env": args["env"],
            "seed": args["seed"],
            **{k: v for k, v in header.items() if k != "args"},
            "args": {k: v for k, v in args.items() if k not in LOCAL},
            "flags": flags,
        },
        {
            "return": stats.last_100(returns) if returns else None,  # mean of the last 100 episodes
            "return_over_training": statistics.fmean(returns) if returns else None,
            "episodes": len(returns),
            "global_step": last_step,
            "seconds": round(total_seconds, 1),
            "sps": iterations[-1]["charts/SPS"],  # of the last process, without start-up and compilation
        },
        curve,
    ]


@functools.cache
def find_commit(script: str, sha256: str) -> str | None:
    """The newest commit that holds exactly this text of a script."""
    git = ["git", "-C", str(ROOT)]
    path = f"benchmarks/{script}" if script == "baselines.py" else script
    if not shutil.which("git"):
        return None
    log = subprocess.run([*git, "log", "--format=%H", "--", path], capture_output=True, text=True, check=False)
    for commit in log.stdout.split():
        text = subprocess.run([*git, "show", f"{commit}:{path}"], capture_output=True, check=False).stdout
        if hashlib.sha256(text).hexdigest() == sha256:
            return commit
    return None


def write_result(file: Path, records: list[dict]):
    """Atomic, and the same bytes for the same records."""
    header = records[0] | {"script_commit": find_commit(records[0]["script"], records[0]["script_sha256"])}
    text = "".join(json.dumps(record, sort_keys=True) + "\n" for record in [header, *records[1:]])
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, buffer, mtime=0) as f:
        f.write(text.encode())
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(buffer.getvalue())
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_result(file: Path) -> dict[str, dict]:
    """{"header", "final", "curve"} of a result file."""
    try:
        header, final, curve = (json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines())
    except (OSError, EOFError, ValueError, gzip.BadGzipFile) as error:
        raise RunnerError(f"{file} is damaged ({type(error).__name__}): delete it and run again") from error
    return {"header": header, "final": final, "curve": curve}


def result_file(results: Path, suite: str, name: str) -> Path:
    return results / suites.slug(suite) / f"{name}.jsonl.gz"


def planned_run(suite: str, setting: str, header: dict) -> suites.Run:
    """The run of a stored suite that a result is of; RunnerError where its arguments are not those of the plan."""
    name = suites.Run(suite, setting, header["script"], header["env"], header["seed"]).name
    planned = next((r for r in suites.make_suite(suite) if (r.suite, r.name) == (suite, name)), None)
    if planned is None:
        raise RunnerError(f"the suite {suite} has no run {name}")
    expected = planned.flags
    if not planned.peer:
        import tyro

        script = suites.load_script(Path(planned.script).stem)
        args = tyro.cli(script.Args, args=[*planned.options(), "--run-dir", "none"])
        expected = json.loads(json.dumps(dataclasses.asdict(args)))  # as a log has them
    other = [k for k in sorted(set(expected) & set(header["args"]) - LOCAL - MACHINE) if expected[k] != header["args"][k]]
    if other or header["script"] != Path(planned.script).name:
        differing = ", ".join(f"{k} {header['args'][k]} for {expected[k]}" for k in other) or header["script"]
        raise RunnerError(f"{name} of the suite {suite} has other settings: {differing}")
    return planned


def collect(run_dirs: list[Path], suite: str, setting: str, results: Path, stopped: bool = False) -> int:
    """Writes the result files of finished run directories; returns how many it left out.

    stopped: also of runs that were stopped early, where there is no finished one.
    """
    left_out = 0
    for run_dir in run_dirs:
        try:
            records = summarize(run_dir, suite, setting, stopped=stopped)
            header, final = records[:2]
            run = suites.Run(suite, setting, header["script"], header["env"], header["seed"])
            if suite in suites.SUITES:
                run = planned_run(suite, setting, header)
                header["flags"] = run.flags
            if is_stopped_early(header["args"], final["global_step"]) and is_finished(run, results):
                raise RunnerError(f"{run_dir} was stopped early and {run.name} has a finished result")
        except RunnerError as error:
            print(f"left out: {error}", file=sys.stderr)
            left_out += 1
            continue
        file = result_file(results, suite, run.name)
        write_result(file, records)
        score = math.nan if final["return"] is None else final["return"]
        print(f"{run.env}, seed {run.seed}: {score:.1f} after {final['global_step']:,} steps -> {file.name}")
    return left_out


# ---------------------------------------------------------------------------------------------------------------------
# One run


def default_steps(script: str) -> int:
    """Default of --total-timesteps in the text of a script."""
    file = ROOT / script
    if not file.is_file():
        return 10_000_000 if "atari" in script else 1_000_000
    found = re.search(r"total.timesteps\D*?([0-9][0-9_]{3,})", file.read_text())
    if not found:
        raise RunnerError(f"{script} has no default of total_timesteps")
    return int(found.group(1))


def steps_of(run: suites.Run) -> int:
    return int(run.flags.get("total_timesteps", default_steps(run.script)))


def make_command(run: suites.Run, runs: Path, python: str, peer_python: str | None, threads: int) -> tuple[list[str], Path]:
    """Command that starts a run or goes on with it, and its run directory.

    The text of the script is copied first, so that a run goes on with the text it began with, whatever is edited.
    """
    folder = runs / suites.slug(run.suite)
    run_dir, plan_file = folder / run.name, folder / f"{run.name}.json"
    if not (ROOT / run.script).is_file():
        raise RunnerError(f"{run.script} does not exist")
    if run.peer and not peer_python:
        raise RunnerError("the runs of TRPO and A2C need --peer-python PATH, a Python that has sb3-contrib (see README.md)")
    if plan_file.is_file() and run_dir.is_dir():
        plan = json.loads(plan_file.read_text())
        if plan["options"] != run.options():
            raise RunnerError(f"{run_dir} was started with other flags: delete it to start this run anew")
    else:
        shutil.rmtree(run_dir, ignore_errors=True)
        text = (ROOT / run.script).read_bytes()
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
    if (run_dir / "checkpoint.pt").is_file():
        return [*command, "--resume", str(run_dir), *own], run_dir
    shutil.rmtree(run_dir, ignore_errors=True)  # cut before its first checkpoint, or without any
    own += [] if run.peer or run.evaluates else ["--eval-episodes", "0"]
    return [*command, *run.options(), *own, "--run-dir", str(run_dir)], run_dir


def last_words(log: Path) -> str:
    """Last line of a run's log, without the progress bar."""
    lines = [line.strip() for line in re.split(r"[\r\n]", log.read_text(errors="replace")) if line.strip()]
    return lines[-1] if lines else "no output"


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


def is_finished(run: suites.Run, results: Path) -> bool:
    """Whether the result of a finished run is there; a result of other flags under its name is an error."""
    file = result_file(results, run.suite, run.name)
    if not file.is_file():
        return False
    result = read_result(file)
    header = result["header"]
    planned = json.loads(json.dumps(run.flags))
    if header["flags"] is not None:
        same = header["flags"] == planned
    else:  # collected by hand: compare with what the run says of itself
        same = all(
            str(header["args"].get(k)) in (str(v), str(float(v)) if is_number(v) else str(v)) for k, v in planned.items()
        )
    if not same:
        raise RunnerError(f"{file} is of other flags than the plan: delete it or use another --name or --results-dir")
    return not is_stopped_early(header["args"], result["final"]["global_step"])


def is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def expected_seconds(runs: list[suites.Run], results: Path) -> float:
    """Time of all runs one after the other, at the speed of results of the same script and task, else suites.RATES."""
    measured: dict[tuple[str, str], list[float]] = {}
    for file in results.glob("*/*.jsonl.gz"):
        result = read_result(file)
        measured.setdefault((result["header"]["script"], result["header"]["env"]), []).append(result["final"]["sps"])
    total = 0.0
    for run in runs:
        rate = measured.get((Path(run.script).name, run.env)) if not run.peer else None
        kind = run.flags["algorithm"] if run.peer else Path(run.script).stem
        total += START_SECONDS + steps_of(run) / max(statistics.median(rate) if rate else suites.RATES.get(kind, 3000), 1)
    return total


def clock(seconds: float) -> str:
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
        """Counts a failure; True if the run is to be tried again."""
        key = f"{run.suite}/{run.name}"
        self.attempts[key] += 1
        again = self.attempts[key] < 2
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
                    command, run_dir = make_command(run, options.runs_dir, sys.executable, options.peer_python, width)
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
                        raise RunnerError(f"exit code {process.returncode}: {last_words(log)} (log {log})")
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


def run_ray_task(task: dict) -> tuple[list[dict] | None, str]:
    """One run on a node of a Ray cluster, in the copy of the repository that Ray unpacked: (records, failure)."""
    sys.path.insert(0, str(Path.cwd() / "benchmarks"))
    import run as here

    run, runs_dir = here.suites.Run(**task["run"]), Path(task["runs_dir"])
    try:
        folder = runs_dir / here.suites.slug(run.suite)
        lock = here.take_lock(folder / f"{run.name}.lock")  # of the node: that of the suite is held by the driver alone
        here.check_disk(folder)
        command, run_dir = here.make_command(run, runs_dir, sys.executable, task["peer_python"], task["threads"])
        log = run_dir.with_name(run_dir.name + ".log")
        cores = here.allowed_cores()
        with open(log, "ab") as output:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=here.environment(task["threads"], None),  # Ray sets CUDA_VISIBLE_DEVICES itself
                pass_fds=[lock.fileno()],
                preexec_fn=functools.partial(here.die_with_parent, os.getpid(), cores),
                check=False,
            ).returncode
        lock.close()
        if code:
            return None, f"exit code {code}: {here.last_words(log)} (log {log})"
        return here.summarize(run_dir, run.suite, run.setting, run.flags), ""
    except (here.RunnerError, OSError) as error:
        return None, str(error)


def run_on_ray(waiting: deque[suites.Run], options: argparse.Namespace, progress: Progress):
    """Runs all on a Ray cluster, as many at a time as it has room for. Run directories are those of its nodes."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise RunnerError("--ray needs Ray: pip install ray") from error
    excludes = [".git", ".venv", "runs", "wandb", "benchmarks/runs", "benchmarks/results", "benchmarks/plots"]
    try:
        ray.init(
            address=None if options.ray == "local" else options.ray,
            num_cpus=options.jobs * options.cores_per_run if options.jobs and options.ray == "local" else None,
            runtime_env={"working_dir": str(ROOT), "excludes": excludes},
            include_dashboard=False if options.ray == "local" else None,
            log_to_driver=False,
        )
    except Exception as error:  # Ray raises many kinds, plain Exception among them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunnerError(f"the Ray cluster {options.ray} cannot be used: {reason}") from error
    gpus = 1 / options.runs_per_gpu if options.gpus else 0
    remote = ray.remote(num_cpus=options.cores_per_run, num_gpus=gpus, max_retries=0)(run_ray_task)

    def submit(run: suites.Run):
        task = {"run": vars(run), "runs_dir": str(options.runs_dir), "threads": options.cores_per_run}
        return remote.remote(task | {"peer_python": options.peer_python})

    pending = {submit(run): run for run in waiting}
    waiting.clear()
    try:
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=1)
            progress.bar.refresh()
            for reference in done:
                run = pending.pop(reference)
                try:
                    records, failure = ray.get(reference)
                except ray.exceptions.RayError as error:  # a node or a worker died
                    records, failure = None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
                if records:
                    write_result(result_file(options.results_dir, run.suite, run.name), records)
                    progress.succeed(run, records[1])
                elif progress.fail(run, failure):
                    pending[submit(run)] = run
    finally:
        ray.shutdown()


def execute(runs: list[suites.Run], options: argparse.Namespace) -> int:
    """Prints the plan or carries it out; returns the exit code."""
    if options.total_timesteps:
        runs = [
            suites.Run(r.suite, r.setting, r.script, r.env, r.seed, r.flags | {"total_timesteps": options.total_timesteps})
            for r in runs
        ]
    runs = [r for r in runs if not options.only_env or r.env in options.only_env]
    runs = [r for r in runs if not options.only_seed or r.seed in options.only_seed]
    runs = [r for r in runs if not options.only_setting or r.setting in options.only_setting]
    if not runs:
        raise RunnerError("no run of the suite is left by --only-env, --only-seed and --only-setting")
    left = [run for run in runs if not is_finished(run, options.results_dir)]
    jobs = jobs_at_a_time(options)
    seconds = expected_seconds(left, options.results_dir) / max(min(jobs, len(left)), 1)
    where = f"on the Ray cluster {options.ray}" if options.ray else f"{jobs} at a time"
    print(f"{len(runs)} runs, {len(runs) - len(left)} finished, {len(left)} left, {where}, expected time {clock(seconds)}")
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
            run_on_ray(deque(left), options, progress)
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
        seeds = list(range(1, episodes + 1))
        vector, _ = script.make_envs(env, seeds, 1)
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
        (results / "random").mkdir(parents=True, exist_ok=True)
        (results / "random" / f"{env}.json").write_text(json.dumps(record) + "\n")
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
    parser.add_argument("--cores-per-run", type=int, default=1, help="cores that a run is pinned to")
    parser.add_argument("--gpus", help="GPUs to share out, such as 0,1")
    parser.add_argument("--runs-per-gpu", type=int, default=1, help="with --gpus: runs that share a GPU")
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
    if options.cores_per_run < 1 or (options.jobs is not None and options.jobs < 1):
        parser.error("--jobs and --cores-per-run must be at least 1")
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
            random_scores(options.only_env or list(suites.MUJOCO), options.episodes, options.results_dir)
            return 0
        if options.suite == "sweep":
            if len(options.names) != 1 or not (ROOT / options.names[0]).is_file():
                parser.error("sweep needs one script of the repository, such as ppo_continuous.py")
            name = options.name or f"sweep_{Path(options.names[0]).stem}"
            if name in suites.SUITES:
                parser.error(f"--name {name} is a stored suite: choose another name for the sweep")
            try:
                runs = suites.make_sweep(name, options.names[0], others)
            except ValueError as error:
                parser.error(str(error))
        else:
            if options.names:
                parser.error(f"unexpected: {' '.join(options.names)}")
            if options.total_timesteps and options.results_dir == RESULTS.resolve():
                parser.error(
                    "--total-timesteps makes other runs than those of the suite: give them a --results-dir of their own"
                )
            runs = suites.make_suite(options.suite)
        return execute(runs, options)
    except (RunnerError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run.py: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
