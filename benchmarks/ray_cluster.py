"""The runs of run.py on a Ray cluster: python benchmarks/run.py table1 --go --ray auto

Every node works in the copy of the repository that Ray unpacks there.
"""

import argparse
import functools
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import run as runner
import suites
from results import RunnerError, result_file, summarize, write_result


def run_task(task: dict) -> tuple[list[dict] | None, str]:
    """One run on a node: (records, failure)."""
    run, runs_dir = suites.Run(**task["run"]), Path(task["runs_dir"])
    try:
        folder = runs_dir / suites.slug(run.suite)
        lock = runner.take_lock(folder / f"{run.name}.lock")  # of the node: that of the suite is held by the driver alone
        runner.check_disk(folder)
        paths = runs_dir, sys.executable, task["peer_python"]
        command, run_dir = runner.make_command(run, *paths, task["threads"], task["gpu"])
        log = run_dir.with_name(run_dir.name + ".log")
        with open(log, "ab") as output:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=runner.environment(task["threads"], None),  # Ray sets CUDA_VISIBLE_DEVICES itself
                pass_fds=[lock.fileno()],
                preexec_fn=functools.partial(runner.die_with_parent, os.getpid(), runner.allowed_cores()),
                check=False,
            ).returncode
        lock.close()
        if code:
            return None, f"exit code {code}: {runner.last_words(log.read_text(errors='replace'))} (log {log})"
        return summarize(run_dir, run.suite, run.setting, run.flags), ""
    except (RunnerError, OSError) as error:
        return None, str(error)


def run_on_ray(waiting: deque[suites.Run], options: argparse.Namespace, progress: runner.Progress):
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
            runtime_env={"working_dir": str(suites.ROOT), "excludes": excludes},
            include_dashboard=False if options.ray == "local" else None,
            log_to_driver=False,
        )
    except Exception as error:  # Ray raises many kinds, plain Exception among them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunnerError(f"the Ray cluster {options.ray} cannot be used: {reason}") from error

    def on_node(task: dict):
        sys.path.insert(0, str(Path.cwd() / "benchmarks"))
        import ray_cluster

        return ray_cluster.run_task(task)

    gpus = 1 / options.runs_per_gpu if options.gpus else 0
    remote = ray.remote(num_cpus=options.cores_per_run, num_gpus=gpus, max_retries=0)(on_node)

    def submit(run: suites.Run):
        task = {"run": vars(run), "runs_dir": str(options.runs_dir), "threads": options.cores_per_run}
        return remote.remote(task | {"peer_python": options.peer_python, "gpu": bool(options.gpus)})

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
