"""What a result file is: the header, the final scores and the thinned curve of one run, in three lines of JSON.

A run directory becomes a result with summarize() and write_result(); read_result() gives it back. planned_run() and
is_finished() compare a result with the plan of its suite.
"""

import dataclasses
import functools
import gzip
import hashlib
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import stats
import suites

RESULTS = suites.ROOT / "benchmarks" / "results"
CURVE_POINTS = 100
HEADER = ("suite", "setting", "env", "seed", "script", "args", "flags")  # what is read of every header
# Arguments that are no part of a setting: where a run stands, what it shows, how it is evaluated, and what it runs on.
LOCAL = {"run_dir", "resume", "evaluate", "track", "wandb_project_name", "wandb_entity", "tensorboard", "capture_video"}
LOCAL |= {"eval_episodes", "eval_steps", "eval_deterministic"}
MACHINE = {"num_threads", "device", "compile"}


class RunnerError(Exception):
    """What the user can put right; printed as one sentence."""


class BadArguments(RunnerError):
    """A command line that asks for what is not there."""


UNREADABLE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, zlib.error)  # of files that are damaged


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
        return make_records(run_dir, suite, setting, flags, stopped)
    except UNREADABLE as error:
        raise RunnerError(f"{run_dir} is no run directory with readable logs: {error!r}") from error


def make_records(run_dir: Path, suite: str, setting: str, flags: dict | None, stopped: bool) -> list[dict]:
    """summarize(), but for the error that damaged logs raise."""
    header, *iterations = read_jsonl(run_dir / "metrics.jsonl")
    episodes = read_jsonl(run_dir / "episodes.jsonl")
    args = header["args"]
    steps, returns = [e["global_step"] for e in episodes], [float(e["return"]) for e in episodes]
    last_step = iterations[-1]["global_step"] if iterations else 0
    seconds = [record["charts/seconds"] for record in iterations]
    if is_stopped_early(args, last_step) and not (stopped and iterations):
        raise RunnerError(f"{run_dir} is not finished: {last_step:,} of {args['total_timesteps']:,} steps")
    # the clock of a run starts at 0 again where it was resumed
    total_seconds = sum(a for a, b in zip(seconds, seconds[1:] + [0.0], strict=True) if b < a)
    curve: dict[str, Any] = {"global_step": [], "return": []}
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
        last = json.loads((run_dir / "evaluation.json").read_text()) if (run_dir / "evaluation.json").is_file() else {}
        curve["stages"] = {k: last[k] for k in ("supervised_nats", "reward_model_accuracy") if k in last}
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
    git = ["git", "-C", str(suites.ROOT)]
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
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
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
        for record, keys in ((header, HEADER), (final, ("return", "global_step", "sps")), (curve, ("global_step", "return"))):
            for key in keys:
                record[key]  # KeyError or TypeError where it is no such record
    except UNREADABLE as error:
        raise RunnerError(f"{file} is damaged ({type(error).__name__}): delete it and run again") from error
    return {"header": header, "final": final, "curve": curve}


def settings_of(args: dict) -> dict:
    """Arguments that make a setting. Infinity, which newer logs write as a word, is a word in all."""
    kept = {k: v for k, v in args.items() if k not in LOCAL | MACHINE | {"seed"}}
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in kept.items()}


def differing(first: dict, second: dict) -> list[str]:
    """Names of the settings that two runs do not share, of those that both know: newer scripts have further ones."""
    a, b = settings_of(first), settings_of(second)
    return [k for k in sorted(a.keys() & b.keys()) if a[k] != b[k]]


def result_file(results: Path, suite: str, name: str) -> Path:
    return results / suites.slug(suite) / f"{name}.jsonl.gz"


@functools.cache
def read_flags(script: str, *flags: str) -> dict:
    """Settings of a script with these flags, as a log has them."""
    import tyro

    args = tyro.cli(suites.load_script(script).Args, args=[*flags, "--run-dir", "none"])
    return json.loads(json.dumps(dataclasses.asdict(args)))


def planned_run(suite: str, setting: str, header: dict) -> suites.Run:
    """The run of a stored suite that a result is of; RunnerError where its arguments are not those of the plan."""
    name = suites.Run(suite, setting, header["script"], header["env"], header["seed"]).name
    planned = next((r for r in suites.make_suite(suite) if (r.suite, r.name) == (suite, name)), None)
    if planned is None:
        raise RunnerError(f"the suite {suite} has no run {name}")
    expected = planned.flags
    if not planned.peer and planned.script != suites.EXACT:
        _, _, _, _, *flags = planned.options()  # task and seed come first
        expected = read_flags(Path(planned.script).stem, *flags) | {"env": planned.env, "seed": planned.seed}
    other = differing(expected, header["args"])
    if other or header["script"] != script_of(planned):
        text = ", ".join(f"{k} {header['args'][k]} for {expected[k]}" for k in other) or header["script"]
        raise RunnerError(f"{name} of the suite {suite} has other settings: {text}")
    return planned


def is_finished(run: suites.Run, results: Path) -> bool:
    """Whether the result of a finished run is there; a result of other flags under its name is an error."""
    file = result_file(results, run.suite, run.name)
    if not file.is_file():
        return False
    result = read_result(file)
    header = result["header"]
    if header["script"] != script_of(run):
        raise RunnerError(f"{file} is of {header['script']}: delete it or use another --name or --results-dir")
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


def script_of(run: suites.Run) -> str:
    """Name of the script that a run says it is of."""
    return "ppo_rlhf.py" if run.script == suites.EXACT else Path(run.script).name


def is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def is_of_another_run(file: Path, records: list[dict]) -> bool:
    """Whether a result file holds a finished run other than that of the records."""
    old = read_result(file)
    if is_stopped_early(old["header"]["args"], old["final"]["global_step"]):
        return bool(differing(old["header"]["args"], records[0]["args"]))
    return old["curve"] != json.loads(json.dumps(records[2]))


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
                if final["global_step"] > header["args"]["total_timesteps"]:
                    raise RunnerError(f"{run_dir} was extended to {final['global_step']:,} steps, which the suite is not")
            file = result_file(results, suite, run.name)
            if is_stopped_early(header["args"], final["global_step"]) and is_finished(run, results):
                raise RunnerError(f"{run_dir} was stopped early and {run.name} has a finished result")
            if file.is_file() and is_of_another_run(file, records):
                raise RunnerError(f"{run_dir}: {file} is of another run: name another --setting, or delete it")
        except RunnerError as error:
            print(f"left out: {error}", file=sys.stderr)
            left_out += 1
            continue
        write_result(file, records)
        score = math.nan if final["return"] is None else final["return"]
        print(f"{run.env}, seed {run.seed}: {score:.1f} after {final['global_step']:,} steps -> {file.name}")
    return left_out
