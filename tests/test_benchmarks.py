"""The benchmark runner, its statistics and its report, on a stand-in script that trains in no time."""

import contextlib
import errno
import gzip
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "benchmarks"))
import figures  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
import report_rlhf  # noqa: E402
import report_table1  # noqa: E402
import results as result_files  # noqa: E402
import run  # noqa: E402
import stats  # noqa: E402
import suites  # noqa: E402

# A script with the command line and the files of the real ones. 10 iterations of 100 steps, one episode each, with a
# checkpoint after every second. CRASH always fails, FLAKY fails once, SLOW takes two seconds, STUCK hangs in its third
# iteration until it is killed and goes on when it is resumed.
STAND_IN = """
import argparse, json, os, sys, time
from pathlib import Path
p = argparse.ArgumentParser()
p.add_argument("--env"); p.add_argument("--seed", type=int); p.add_argument("--run-dir"); p.add_argument("--resume")
p.add_argument("--eval-episodes"); p.add_argument("--num-threads"); p.add_argument("--clip-coef", type=float, default=0.2)
p.add_argument("--total-timesteps", type=int, default=1_000)
a = p.parse_args()
d = Path(a.resume or a.run_dir)
if a.resume:
    c = json.loads((d / "checkpoint.pt").read_text())
    a = argparse.Namespace(**c["args"])
else:
    d.mkdir(parents=True)
    c = {"iteration": 0, "sizes": [0, 0], "args": vars(a)}
m, e = open(d / "metrics.jsonl", "a", buffering=1), open(d / "episodes.jsonl", "a", buffering=1)
m.truncate(c["sizes"][0]); e.truncate(c["sizes"][1])
with open(d.parent / "starts", "a") as f:
    f.write(f"{d.name} {c['iteration']}\\n")
def save(i):
    c.update(iteration=i, sizes=[m.tell(), e.tell()])
    t = d / "checkpoint.tmp"; t.write_text(json.dumps(c)); os.replace(t, d / "checkpoint.pt")
if not sys.argv[1:2] == ["--resume"]:
    args = vars(a) | {"num_envs": 1, "num_steps": 100}
    m.write(json.dumps({"args": args, "script": "ppo_continuous.py", "script_sha256": "0", "git_revision": None,
                        "versions": {"python": "3"}, "cpu": "test", "cpu_cores": 1, "gpu": None}) + "\\n")
    save(0)
for i in range(c["iteration"] + 1, a.total_timesteps // 100 + 1):
    if a.env == "SLOW":
        time.sleep(0.2)
    once = d.parent / f"{d.name}.once"
    if i == 5 and (a.env == "CRASH" or a.env == "FLAKY" and not once.exists()):
        once.touch()
        sys.exit("stopped: it went wrong")
    e.write(json.dumps({"global_step": i * 100, "return": float(i * a.seed), "length": 100}) + "\\n")
    m.write(json.dumps({"iteration": i, "global_step": i * 100, "charts/SPS": 1000, "charts/seconds": i * 0.1}) + "\\n")
    if i == 3 and a.env == "STUCK" and sys.argv[1:2] != ["--resume"]:
        time.sleep(120)
    if i % 2 == 0:
        save(i)
"""


@pytest.fixture
def repo(tmp_path):
    """A repository with the real runner and the stand-in as ppo_continuous.py."""
    (tmp_path / "benchmarks").mkdir()
    for name in ("run.py", "results.py", "ray_cluster.py", "suites.py", "stats.py"):
        shutil.copy(REPO / "benchmarks" / name, tmp_path / "benchmarks")
    (tmp_path / "ppo_continuous.py").write_text(STAND_IN)
    return tmp_path


def start(repo, *words, **options):
    command = [sys.executable, "benchmarks/run.py", *words]
    return subprocess.Popen(command, cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(repo, *words):
    process = start(repo, *words)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def sweep(*envs, seeds=("1",)):
    return "sweep", "ppo_continuous.py", "--env", *envs, "--seed", *seeds


def starts(repo):
    return [line.split() for line in (repo / "benchmarks/runs/sweep_ppo_continuous/starts").read_text().splitlines()]


def result_names(repo):
    return sorted(p.name for p in (repo / "benchmarks/results/sweep_ppo_continuous").glob("*"))


# ------------------------------------------------------------------------------------------------------------- statistics


def test_last_100():
    assert stats.last_100([1e9] + [float(i) for i in range(100)]) == 49.5
    assert stats.last_100([1.0, 2.0]) == 1.5
    assert np.isnan(stats.last_100([]))


def test_normalize_puts_random_at_0_and_best_at_1():
    low, high = np.array([-280.0, 10.0]), np.array([1720.0, 20.0])
    assert stats.normalize(np.array([low, high]), low, high).tolist() == [[0, 0], [1, 1]]
    assert stats.normalize(np.array([[-1280.0, 15.0]]), low, high).tolist() == [[-0.5, 0.5]]


@pytest.mark.parametrize(("runs", "tasks"), [(1, 1), (3, 1), (3, 7), (5, 2), (4, 4)])
def test_aggregates_against_plain_loops(runs, tasks):
    scores = np.random.default_rng(runs * tasks).normal(size=(runs, tasks))
    columns = [[row[j] for row in scores.tolist()] for j in range(tasks)]
    means = sorted(sum(column) / runs for column in columns)
    middle = means[tasks // 2] if tasks % 2 else (means[tasks // 2 - 1] + means[tasks // 2]) / 2
    flat = sorted(x for column in columns for x in column)
    kept = flat[len(flat) // 4 : len(flat) - len(flat) // 4]
    assert stats.mean(scores) == pytest.approx(sum(means) / tasks)
    assert stats.median(scores) == pytest.approx(middle)
    assert stats.iqm(scores) == pytest.approx(sum(kept) / len(kept))
    batch = np.stack([scores, scores + 1])  # as the bootstrap calls them
    for aggregate in (stats.mean, stats.median, stats.iqm):
        assert aggregate(batch) == pytest.approx([aggregate(scores), aggregate(scores) + 1])


def test_probability_of_improvement_against_plain_loops():
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=(4, 3)).astype(float), rng.integers(5, size=(6, 3)).astype(float)  # with ties
    wins = [(a > b) + 0.5 * (a == b) for j in range(3) for a in x[:, j] for b in y[:, j]]
    assert stats.probability_of_improvement(x, y) == pytest.approx(sum(wins) / len(wins))
    assert stats.probability_of_improvement(x + 10, y) == 1
    assert stats.probability_of_improvement(x, x) == 0.5
    low, high = stats.probability_of_improvement_interval(x, y)
    assert 0 <= low < stats.probability_of_improvement(x, y) < high <= 1


def test_interval_against_all_resamples():
    scores = np.array([[1.0, 10.0], [2.0, 40.0], [9.0, 70.0]])
    columns = [list(itertools.product(scores[:, j], repeat=3)) for j in range(2)]  # each task by itself: stratified
    exact = [(sum(a) + sum(b)) / 6 for a in columns[0] for b in columns[1]]
    assert stats.interval(scores) == pytest.approx(tuple(np.quantile(exact, [0.025, 0.975])), abs=1.0)
    assert stats.interval(scores) == stats.interval(scores)  # reproducible
    assert stats.interval(np.full((3, 2), 7.0)) == (7.0, 7.0)
    low, high = stats.difference_interval(scores + 100, scores)
    assert low < 100 < high


def test_interval_of_a_difference_resamples_both():
    """Where one of the two does not vary, it is the interval of the other."""
    scores, fixed = np.array([[1.0, 10.0], [2.0, 40.0], [9.0, 70.0]]), np.zeros((3, 2))
    low, high = stats.interval(scores)
    assert stats.difference_interval(scores, fixed) == (low, high)
    assert stats.difference_interval(fixed, scores) == pytest.approx((-high, -low), abs=1.0)
    assert stats.difference_interval(fixed + 7, fixed) == (7.0, 7.0)


def test_wilson_interval():
    assert stats.wilson(2, 10) == pytest.approx((0.0567, 0.5098), abs=1e-4)
    assert stats.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert stats.wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)  # this and the next: Newcombe 1998, Table I
    assert stats.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_statistics_against_rliable():
    """What rliable itself printed for two sets of scores (tests/rliable.json): its requirements are heavier than ours."""
    stored = json.loads((REPO / "tests/rliable.json").read_text())
    x, y = np.array(stored["x"]), np.array(stored["y"])
    for scores, aggregates in ((x, stored["x_aggregates"]), (y, stored["y_aggregates"])):
        for name, theirs in aggregates.items():
            aggregate = getattr(stats, name)
            assert aggregate(scores) == pytest.approx(theirs["value"])
            assert stats.interval(scores, aggregate) == pytest.approx(theirs["interval"], abs=0.02)  # two random bootstraps
    theirs = stored["probability_of_improvement"]
    assert stats.probability_of_improvement(x, y) == pytest.approx(theirs["value"])
    assert stats.probability_of_improvement_interval(x, y) == pytest.approx(theirs["interval"], abs=0.02)


# ----------------------------------------------------------------------------------------------------------- result files


def write_run(folder, steps=1000, env="Hopper", seed=1, returns=None, seconds=None):
    folder.mkdir(parents=True)
    args = {"env": env, "seed": seed, "total_timesteps": 1050, "num_envs": 1, "num_steps": 100, "run_dir": str(folder)}
    header = {"args": args, "script": "ppo_continuous.py", "script_sha256": "0" * 64, "git_revision": None}
    header |= {"versions": {"torch": "2"}, "cpu": "test", "cpu_cores": 1, "gpu": None}
    seconds = seconds or [i / 10 for i in range(1, steps // 100 + 1)]
    lines = [{"global_step": 100 * (i + 1), "charts/SPS": 900 + i, "charts/seconds": s} for i, s in enumerate(seconds)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [header, *lines]))
    returns = [float(i) for i in range(200)] if returns is None else returns
    ends = np.linspace(5, 1000, len(returns)).astype(int).tolist()
    episodes = [{"global_step": s, "return": r, "length": 5} for s, r in zip(ends, returns, strict=True) if s <= steps]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(x) + "\n" for x in episodes))
    return folder


def test_result_of_a_run(tmp_path):
    header, final, curve = result_files.summarize(write_run(tmp_path / "r"), "base", "default")
    assert (header["suite"], header["setting"], header["env"], header["seed"]) == ("base", "default", "Hopper", 1)
    assert str(tmp_path) not in json.dumps([header, final, curve])
    assert final == {
        "return": 149.5, "return_over_training": 99.5, "episodes": 200, "global_step": 1000, "seconds": 1.0, "sps": 909,
    }  # fmt: skip
    assert curve["global_step"] == [10 * k for k in range(1, 101)]
    episodes = result_files.read_jsonl(tmp_path / "r" / "episodes.jsonl")
    for step, value in zip(curve["global_step"], curve["return"], strict=True):
        assert value == pytest.approx(np.mean([e["return"] for e in episodes if e["global_step"] <= step][-100:]), abs=1e-4)


def test_result_of_a_language_model_keeps_its_course_and_its_stages(tmp_path):
    folder, course = write_run(tmp_path / "r"), course_of((0, 0.2, 0), (20, 0.6, 4))["evaluations"]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(x) + "\n" for x in course))
    (folder / "evaluation.json").write_text(
        json.dumps({"reward_model_accuracy": 0.7, "supervised_nats": 4.1, "returns": [1.0]})
    )
    curve = result_files.summarize(folder, "rlhf-human", "default")[2]
    assert curve["evaluations"] == course
    assert curve["stages"] == {"reward_model_accuracy": 0.7, "supervised_nats": 4.1}


@pytest.mark.parametrize("updates", [10, 200])
def test_result_of_a_run_with_a_penalty_keeps_its_kl(tmp_path, updates):
    """Of each update, and for each point of the curve the mean over those since the last point, where there was one."""
    folder = write_run(tmp_path / "r", steps=100 * updates)
    header, *iterations = result_files.read_jsonl(folder / "metrics.jsonl")
    kls = [round(0.001 * (i % 7) + 0.0001 * i, 6) for i in range(updates)]
    records = [header, *(r | {"losses/kl": kl} for r, kl in zip(iterations, kls, strict=True))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    curve = result_files.summarize(folder, "table1", "adaptive KL 0.01")[2]
    assert curve["kl_of_updates"] == kls
    if updates == 200:  # two for each point
        assert curve["kl"] == pytest.approx(np.reshape(kls, (100, 2)).mean(axis=1), abs=1e-6)
    else:  # one for every tenth point
        assert curve["kl"] == [kls[k // 10 - 1] if k % 10 == 0 else None for k in range(1, 101)]


@pytest.mark.parametrize(("total", "finished"), [(1000, True), (1099, True), (1100, False)])
def test_a_run_is_finished_when_no_whole_rollout_is_left(tmp_path, capsys, total, finished):
    """After 1,000 steps in rollouts of 100."""
    folder = edit_logs(write_run(tmp_path / "r"), total_timesteps=total)
    assert collect(tmp_path, folder, "--suite", "s") == (0 if finished else 1)
    assert (f"is not finished: 1,000 of {total:,} steps" in capsys.readouterr().err) == (not finished)


def test_result_of_a_resumed_run_adds_up_the_time(tmp_path):
    seconds = [1.0, 2.0, 3.0, 4.0, 0.5, 1.5, 2.5, 0.25, 1.0, 2.0]
    final = result_files.summarize(write_run(tmp_path / "r", seconds=seconds), "base", "default")[1]
    assert final["seconds"] == 4.0 + 2.5 + 2.0


def test_result_bytes_are_reproducible_and_read_back(tmp_path):
    records = result_files.summarize(write_run(tmp_path / "r"), "base", "default")
    files = [tmp_path / name / "x.jsonl.gz" for name in ("a", "b")]
    for file in files:
        result_files.write_result(file, records)
        time.sleep(1.1 if file is files[0] else 0)  # another second in a gzip header would show
    assert files[0].read_bytes() == files[1].read_bytes()
    result = result_files.read_result(files[0])
    assert result["final"] == records[1]
    assert result["curve"] == records[2]
    assert result["header"]["script_commit"] is None  # no commit has this text


def test_commit_of_a_script_is_found():
    log = subprocess.run(["git", "-C", str(REPO), "log", "-1", "--format=%H", "--", "ppo_continuous.py"], capture_output=True)
    if log.returncode:
        pytest.skip("no git history here")
    commit = log.stdout.decode().strip()
    text = subprocess.run(["git", "-C", str(REPO), "show", f"{commit}:ppo_continuous.py"], capture_output=True).stdout
    assert result_files.find_commit("ppo_continuous.py", hashlib.sha256(text).hexdigest()) == commit
    assert result_files.find_commit("ppo_continuous.py", "0" * 64) is None


def collect(tmp_path, *words):
    return run.main(["collect", *map(str, words), "--results-dir", str(tmp_path / "res")])


def test_collect_leaves_out_what_is_not_finished(tmp_path, capsys):
    done, cut = write_run(tmp_path / "done"), write_run(tmp_path / "cut", steps=900)
    with open(cut / "metrics.jsonl", "a") as f:
        f.write('{"global_step": 10')  # a line cut off by a crash
    assert collect(tmp_path, done, cut, tmp_path / "none", "--suite", "sweep_x") == 1
    captured = capsys.readouterr()
    assert [p.name for p in (tmp_path / "res" / "sweep_x").iterdir()] == ["default__Hopper__1.jsonl.gz"]
    assert "cut is not finished: 900 of 1,050 steps" in captured.err
    assert "none is no run directory" in captured.err
    assert "Hopper, seed 1: 149.5 after 1,000 steps" in captured.out


def test_collect_refuses_a_run_of_other_settings(tmp_path, capsys):
    folder = write_run(tmp_path / "r")
    header, *_, last = result_files.read_jsonl(folder / "metrics.jsonl")

    def collect_with(**args):
        lines = [header | {"args": header["args"] | args}, last | {"global_step": args["total_timesteps"]}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        code = collect(tmp_path, folder, "--suite", "base")
        return code, capsys.readouterr().err

    assert collect_with(num_steps=2048, total_timesteps=1_000_000) == (0, "")
    code, err = collect_with(num_steps=2048, total_timesteps=1_000_000, clip_coef=0.9)
    assert (code, "default__Hopper__1 of the suite base has other settings: clip_coef 0.9 for 0.2" in err) == (1, True)
    assert "num_steps 100 for 2048" in collect_with(total_timesteps=1_000_000)[1]
    assert collect(tmp_path, folder, "--suite", "base", "--setting", "clipping 0.9") == 1
    assert "the suite base has no run clipping_0.9__Hopper__1" in capsys.readouterr().err


def test_every_stored_result_has_the_settings_of_its_suite():
    headers = [result_files.read_result(file)["header"] for file in (REPO / "benchmarks/results").glob("*/*.jsonl.gz")]
    assert headers
    for header in headers:
        if header["suite"] in suites.SUITES:
            assert result_files.planned_run(header["suite"], header["setting"], header).seed == header["seed"]


STORED = sorted((REPO / "benchmarks/results").glob("*/*.jsonl.gz"))


def identity(header):
    return header["suite"], header["setting"], header["env"], header["seed"]


def test_script_of_every_stored_result_is_in_the_history():
    headers = [result_files.read_result(file)["header"] for file in STORED]
    assert not [identity(h) for h in headers if h["script_commit"] is None]
    git = ["git", "-C", str(REPO)]
    shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True)
    if shallow.returncode or shallow.stdout.strip() != "false":
        pytest.skip("no whole git history here")
    texts = {(h["script_commit"], h["script"]): h["script_sha256"] for h in headers if h["script_commit"]}
    for (commit, script), sha256 in texts.items():
        path = f"benchmarks/{script}" if script == "baselines.py" else script
        text = subprocess.run([*git, "show", f"{commit}:{path}"], capture_output=True, check=True).stdout
        assert hashlib.sha256(text).hexdigest() == sha256, (commit, script)
    assert len({(h["script_commit"], h["script"], h["script_sha256"]) for h in headers if h["script_commit"]}) == len(texts)


def test_no_two_stored_results_are_identical():
    """But where a second suite has run the same flags again, on the same kind of CPU: a run of its own takes another time."""
    seen = {}
    for file in STORED:
        result = result_files.read_result(file)
        returns, final = result["curve"]["return"], result["final"]
        numbers = [final["return_over_training"], returns]
        if len(set(returns)) == 1:  # Acrobot without a goal in 500,000 steps: its returns are no numbers of its own
            numbers += [final["seconds"], final["sps"]]
        numbers = json.dumps(numbers)
        if numbers in seen:
            other = result_files.read_result(seen[numbers])
            again = all(result["header"][key] == other["header"][key] for key in ("flags", "env", "seed", "script", "versions"))
            again = again and result["header"]["suite"] != other["header"]["suite"]
            assert again and final["seconds"] != other["final"]["seconds"], (file, seen[numbers])
        seen[numbers] = file
    identities = [identity(result_files.read_result(file)["header"]) for file in STORED]
    assert len(set(identities)) == len(identities)


def test_stored_seeds_have_no_gap():
    """A seed that is missing among those of one setting and task would be a finished run left out."""
    seeds = {}
    for file in STORED:
        *key, seed = identity(result_files.read_result(file)["header"])
        seeds.setdefault(tuple(key), []).append(seed)
    for key, found in seeds.items():
        assert sorted(found) == list(range(min(found), max(found) + 1)), key
        assert min(found) == (4 if key[0] == "collapse" else 1), key


def test_collect_takes_a_stopped_run_if_told_to_and_the_runner_does_not_call_it_finished(tmp_path, capsys):
    cut = write_run(tmp_path / "cut", steps=900)
    records = result_files.summarize(cut, "s", "default", stopped=True)
    file = result_files.result_file(tmp_path / "res", "s", "default__Hopper__1")
    result_files.write_result(file, records)
    result = result_files.read_result(file)
    assert result["final"]["global_step"] == result["curve"]["global_step"][-1] == 900
    planned = suites.Run("s", "default", "ppo_continuous.py", "Hopper", 1, {})
    assert not result_files.is_finished(planned, tmp_path / "res")
    assert collect(tmp_path, write_run(tmp_path / "done"), "--suite", "s") == 0
    assert result_files.is_finished(planned, tmp_path / "res")
    assert result_files.collect([cut], "s", "default", tmp_path / "res", stopped=True) == 1  # the finished result stays
    assert "was stopped early and default__Hopper__1 has a finished result" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        collect(tmp_path, cut, "--suite", "base", "--stopped")


def test_jobs_at_a_time(monkeypatch):
    options = run.make_parser().parse_args(["base", "--gpus", "0,1", "--cores-per-run", "1"])
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert run.jobs_at_a_time(options) == 2
    options.runs_per_gpu = 3
    assert run.jobs_at_a_time(options) == 6
    options.gpus, options.cores_per_run = None, 4
    assert run.jobs_at_a_time(options) == 4
    options.jobs = 1
    assert run.jobs_at_a_time(options) == 1


@pytest.mark.parametrize(
    ("flags", "width", "jobs"),
    [
        ([], 1, 16),
        (["--gpus", "0"], 16, 1),
        (["--gpus", "0", "--runs-per-gpu", "3"], 5, 3),
        (["--gpus", "0,1"], 8, 2),
        (["--gpus", "0", "--jobs", "4"], 4, 4),
        (["--gpus", "0", "--cores-per-run", "2"], 2, 1),
        (["--gpus", "0", "--runs-per-gpu", "40"], 1, 16),
    ],
)
def test_runs_on_gpus_share_out_all_cores(monkeypatch, flags, width, jobs):
    seen = []
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(run, "execute", lambda runs, options: seen.append(options) or 0)
    assert run.main(["base", *flags]) == 0
    assert (seen[0].cores_per_run, run.jobs_at_a_time(seen[0])) == (width, jobs)


def test_damaged_result_is_named(tmp_path):
    with open(write_run(tmp_path / "r") / "metrics.jsonl", "a") as f:
        f.write('{"args": {}}\n')
    with pytest.raises(result_files.RunnerError, match="no run directory with readable logs"):
        result_files.summarize(tmp_path / "r", "base", "default")
    file = tmp_path / "x.jsonl.gz"
    file.write_bytes(gzip.compress(b"{}\n")[:-3])
    with pytest.raises(result_files.RunnerError, match="damaged"):
        result_files.read_result(file)


def edit_logs(folder, **args):
    """Changes the arguments that a run says it has."""
    header, *lines = result_files.read_jsonl(folder / "metrics.jsonl")
    records = [header | {"args": header["args"] | args}, *lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("episodes.jsonl", "[1, 2]\n"),
        ("episodes.jsonl", '{"global_step": 5, "return": "x", "length": 5}\n'),
        ("metrics.jsonl", '{"args": {"env": "Hopper", "seed": 1, "total_timesteps": 100}}\n{"global_step": 100}\n'),
        ("metrics.jsonl", "[]\n"),
        ("evaluations.jsonl", "{\n"),
    ],
)
def test_logs_that_are_damaged_are_left_out_with_a_sentence(tmp_path, capsys, name, text):
    damaged, whole = write_run(tmp_path / "damaged"), write_run(tmp_path / "whole")
    (damaged / name).write_text(text)
    assert collect(tmp_path, damaged, whole, "--suite", "s") == 1
    captured = capsys.readouterr()
    assert f"left out: {damaged} is no run directory with readable logs" in captured.err
    assert "149.5 after 1,000 steps" in captured.out  # the directories after it are still read


@pytest.mark.parametrize("change", ["flip", "list", "empty records"])
def test_result_files_of_another_content_are_damaged(tmp_path, change):
    file = tmp_path / "x.jsonl.gz"
    result_files.write_result(file, result_files.summarize(write_run(tmp_path / "r"), "s", "default"))
    if change == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 255
        file.write_bytes(bytes(data))
    else:
        file.write_bytes(gzip.compress(b"[]\n[]\n[]\n" if change == "list" else b"{}\n{}\n{}\n"))
    with pytest.raises(result_files.RunnerError, match="is damaged"):
        result_files.read_result(file)


def test_collect_overwrites_no_other_run(tmp_path, capsys):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", returns=[5.0] * 200)
    assert collect(tmp_path, first, second, "--suite", "s") == 1
    assert "is of another run: name another --setting, or delete it" in capsys.readouterr().err
    file = tmp_path / "res/s/default__Hopper__1.jsonl.gz"
    assert result_files.read_result(file)["final"]["return"] == 149.5
    assert collect(tmp_path, first, "--suite", "s") == 0  # the same run again
    assert collect(tmp_path, second, "--suite", "s", "--setting", "other") == 0


def test_collect_refuses_an_extended_run_as_one_of_a_suite(tmp_path, capsys):
    folder = edit_logs(write_run(tmp_path / "r"), num_steps=2048, total_timesteps=1_000_000)
    with open(folder / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"global_step": 2_000_000, "charts/SPS": 1, "charts/seconds": 9.0}) + "\n")
    assert collect(tmp_path, folder, "--suite", "base") == 1
    assert "was extended to 2,000,000 steps" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- suites


def test_suites_have_the_sizes_of_the_paper():
    sizes = {name: len(suites.make_suite(name)) for name in suites.SUITES}
    assert sizes["table1"] == sizes["table1-normalized"] == sizes["table1-details"] == 11 * 7 * 3
    assert sizes["base"] == 7 * 10 + 20
    assert sizes["unlimited"] == 7 * 3
    assert sizes["collapse"] == 2 * 17
    assert sizes["figure3"] == 3 * 7 * 3
    assert sizes["peer"] == 7 * 3
    assert sizes["discrete"] == 7 * 5 + 3 * 3
    assert sizes["objective"] == 2 * 3 * 5
    assert sizes["limits"] == 2 * 7 * 10
    assert sizes["double-pendulum"] == 5 * 5
    assert sizes["unclipped"] == 3 * 10
    assert sizes["table6"] == 49 * 3
    assert sizes["atari-short"] == 2 + 3 * 3
    assert sizes["details"] == 3 * 3 * len(suites.DETAILS)
    for name in suites.SUITES:
        runs = suites.make_suite(name)
        assert len({(r.suite, r.name) for r in runs}) == len(runs)
        own = [r.seed for r in runs if r.suite == name and r.env in suites.SECOND_HAND]
        assert own == sorted(own)  # whole seeds first
    with open(REPO / "benchmarks/reference/ppo_paper_atari_table6.csv") as f:
        assert sorted(line.split(",")[0] for line in list(f)[1:]) == sorted(suites.ATARI)


@pytest.mark.parametrize("script", ["ppo_continuous", "ppo_kl_penalty"])
def test_every_flag_of_the_suites_is_understood(script):
    tyro = pytest.importorskip("tyro")
    module = importlib.import_module(script)
    options = {tuple(r.options()): r for name in suites.SUITES for r in suites.make_suite(name) if r.script == f"{script}.py"}
    changed = set()
    for words, r in options.items():
        if r.seed > 1 or r.env != "HalfCheetah":
            continue
        args = tyro.cli(module.Args, args=list(words))
        for key, value in r.flags.items():
            assert str(getattr(args, key)) == str(float(value) if value == "inf" else value), (r.setting, key)
        if r.flags:
            default = module.Args(run_dir="x")
            changed.add(r.setting)
            assert any(getattr(args, key) != getattr(default, key) for key in r.flags), f"{r.setting} changes nothing"
    assert changed


def test_sweep_is_the_product_grid():
    words = ["--env", "Hopper", "Walker2d", "--clip-coef", "0.1", "0.2", "--anneal-lr", "True", "False", "--seed", "1", "2"]
    runs = suites.make_sweep("s", "ppo_continuous.py", words)
    assert len(runs) == len({r.name for r in runs}) == 2 * 2 * 2 * 2
    assert [r.seed for r in runs] == [1] * 8 + [2] * 8
    assert runs[0].options() == ["--env", "Hopper", "--seed", "1", "--clip-coef", "0.1", "--anneal-lr"]
    assert "--no-anneal-lr" in runs[-1].options()
    assert runs[0].name == "clip_coef=0.1,anneal_lr=True__Hopper__1"
    flag = suites.make_sweep("s", "x.py", ["--env=my_module:MyEnv-v0", "--no-clip-policy", "--target-kl=0.1"])[0]
    assert flag.options() == ["--env", "my_module:MyEnv-v0", "--seed", "1", "--no-clip-policy", "--target-kl", "0.1"]
    assert "/" not in flag.name
    assert ":" not in flag.name
    for words, message in (
        ("x", "belongs to no flag"),
        ("--seed 1", "names its environments"),
        ("--env --seed 1", "names its environments"),
        ("--env A A", "two runs default__A__1: it is named twice"),
        ("--env A --env B", "twice"),
        ("--env A --seed", "--seed without a value: a seed is a whole number"),
        ("--env A --seed x", "--seed x: a seed is a whole number"),
        ("--env A --no-anneal-lr True False", "--no-anneal-lr takes no value: --anneal-lr True False does"),
        ("--env A --clip-coef True 0.2", "--clip-coef has both True or False and other values"),
        ("--env A --total-timesteps 10 20", "--total-timesteps 10 and 20 are not told apart in its name"),
        ("--env A --data a/b a_b", "--data a/b and a_b are not told apart in its name"),
    ):
        with pytest.raises(ValueError, match=message):
            suites.make_sweep("s", "x.py", words.split())


def test_sweep_takes_lists_and_long_settings():
    runs = suites.make_sweep("s", "x.py", ["--env", "A", "--observe", "0,2", "0"])
    assert [r.options()[4:] for r in runs] == [["--observe", "0", "2"], ["--observe", "0"]]
    assert [r.name for r in runs] == ["observe=0_2__A__1", "observe=0__A__1"]
    words = ["--env", "A", *(word for i in range(40) for word in (f"--a-long-name-{i}", "1"))]
    first, second = suites.make_sweep("s", "x.py", [*words, "--last", "1", "2"])
    assert len(first.name) == len(second.name) == suites.LONGEST
    assert first.name != second.name


def test_runner_flags_are_kept_from_the_script_of_a_sweep():
    own, others = run.split_sweep(["--env", "A", "B", "--jobs", "2", "--clip-coef", "0.1", "--go", "--name=x", "--seed", "1"])
    assert own == ["--jobs", "2", "--go", "--name=x"]
    assert others == ["--env", "A", "B", "--clip-coef", "0.1", "--seed", "1"]
    known = {option for action in run.make_parser()._actions for option in action.option_strings}
    assert set(run.RUNNER_FLAGS) <= known


@pytest.mark.parametrize("file", sorted((REPO / "benchmarks/sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_wandb_sweeps_name_flags_of_their_script(file):
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load(file.read_text())
    assert config["program"] == f"{file.stem}.py"
    assert config["metric"]["name"] == "charts/episodic_return"
    if not (REPO / config["program"]).is_file():
        pytest.skip(f"{config['program']} is not here yet")
    fields = importlib.import_module(file.stem).Args.__dataclass_fields__
    # every setting on the same tasks and seeds: a random search would compare settings on different ones
    assert config["method"] == "grid"
    assert len(config["parameters"]) == 3
    assert len(config["parameters"]["seed"]["values"]) >= 3
    assert len(config["parameters"]["env"]["values"]) >= 2
    for name, values in config["parameters"].items():
        assert name in fields, name
        for value in values.get("values", [values.get("value")]):
            assert not isinstance(value, bool), "wandb writes --flag=True, which no script takes"


# ----------------------------------------------------------------------------------------------------------------- runner


def test_plan_starts_nothing(repo):
    code, out, _ = finish(repo, *sweep("A", "B"))
    assert code == 0
    assert "2 runs, 0 finished, 2 left" in out
    assert "expected time" in out
    assert "nothing was started" in out
    assert not (repo / "benchmarks/runs").exists()


@pytest.mark.parametrize(("unit", "gpus", "warned"), [("avx512_bf16", [], False), ("", [], True), ("", ["--gpus", "0"], False)])
def test_a_plan_says_that_bfloat16_is_slow_here(monkeypatch, capsys, tmp_path, unit, gpus, warned):
    monkeypatch.setattr(suites.load_script("ppo_atari"), "bfloat16_unit", lambda: unit)
    for suite, settings in (("table6", True), ("dm_control", False)):
        assert run.main([suite, "--results-dir", str(tmp_path), *gpus]) == 0
        assert ("no instructions for bfloat16" in capsys.readouterr().err) == (warned and settings)


def test_sweep_runs_and_skips_what_is_finished(repo):
    code, out, err = finish(repo, *sweep("A", "B", seeds=("1", "2")), "--go", "--jobs", "2")
    assert (code, "4 of 4 runs finished, 0 failed" in out) == (0, True), err
    assert result_names(repo) == [f"default__{env}__{seed}.jsonl.gz" for env in "AB" for seed in (1, 2)]
    result = result_files.read_result(repo / "benchmarks/results/sweep_ppo_continuous/default__B__2.jsonl.gz")
    assert result["final"]["return"] == 2 * 5.5
    code, out, _ = finish(repo, *sweep("A", "B", "C"), "--go")  # one more environment
    assert code == 0
    assert "3 runs, 2 finished, 1 left" in out
    assert len(starts(repo)) == 5


def test_failed_run_is_retried_once_and_reported(repo):
    code, out, err = finish(repo, *sweep("A", "CRASH", "FLAKY"), "--go", "--jobs", "1")
    assert code == 1
    assert "2 of 3 runs finished, 1 failed" in out
    assert "FAILED sweep_ppo_continuous/default__CRASH__1: exit code 1: stopped: it went wrong" in err
    assert result_names(repo) == ["default__A__1.jsonl.gz", "default__FLAKY__1.jsonl.gz"]
    counts = {name: [int(i) for n, i in starts(repo) if n == name] for name, _ in starts(repo)}
    assert counts == {"default__A__1": [0], "default__CRASH__1": [0, 4], "default__FLAKY__1": [0, 4]}  # second: resumed
    result = result_files.read_result(repo / "benchmarks/results/sweep_ppo_continuous/default__FLAKY__1.jsonl.gz")
    assert result["final"]["episodes"] == 10  # none lost, none doubled


def command_lines():
    """Of all processes."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield file.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="the processes of a killed runner die with it on Linux only")
def test_killed_runner_goes_on_where_it_was(repo):
    """Killed twice, when the two runs that it has begun stand between their first checkpoint and their second."""
    words = (*sweep("STUCK", seeds=("1", "2", "3", "4")), "--go", "--jobs", "2")
    runs = repo / "benchmarks/runs/sweep_ppo_continuous"

    def begun():
        return {name for name, _ in starts(repo)} if (runs / "starts").exists() else set()

    def episodes(name):
        return len((runs / name / "episodes.jsonl").read_text().splitlines())

    for count in (2, 4):
        process = start(repo, *words, start_new_session=True)
        deadline = time.monotonic() + 120
        while len(cut := [name for name in begun() if episodes(name) == 3]) < 2 or len(begun()) < count:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)  # only the runner, not its group
        process.wait()
        process.stdout.close()
        process.stderr.close()
        deadline = time.monotonic() + 30
        while any(str(runs) in command for command in command_lines()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert [episodes(name) for name in cut] == [3, 3]
    code, out, err = finish(repo, *words)
    assert (code, "4 of 4 runs finished" in out) == (0, True), err
    for seed in (1, 2, 3, 4):
        name = f"default__STUCK__{seed}"
        assert [int(i) for n, i in starts(repo) if n == name] == [0, 2]  # from the start, and from its checkpoint
        lines = result_files.read_jsonl(runs / name / "episodes.jsonl")
        assert [e["global_step"] for e in lines] == [100 * i for i in range(1, 11)]
    assert len(result_names(repo)) == 4


def test_run_goes_on_with_the_script_that_it_began_with(repo):
    assert finish(repo, *sweep("CRASH"), "--go")[0] == 1
    script = repo / "ppo_continuous.py"
    script.write_text(script.read_text().replace("it went wrong", "edited meanwhile"))
    code, _, err = finish(repo, *sweep("CRASH"), "--go")
    assert code == 1
    assert "it went wrong" in err
    assert "edited meanwhile" not in err


def test_duplicate_start_is_refused(repo):
    first = start(repo, *sweep("SLOW", seeds=("1", "2", "3", "4", "5", "6", "7")), "--go", "--jobs", "1")
    try:
        deadline = time.monotonic() + 120
        while not (repo / "benchmarks/runs/sweep_ppo_continuous/starts").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        code, _, err = finish(repo, *sweep("SLOW", seeds=("1", "2")), "--go")
        assert code == 1
        assert "sweep_ppo_continuous is running already" in err
    finally:
        out, err = first.communicate(timeout=240)
    assert (first.returncode, "7 of 7 runs finished, 0 failed" in out) == (0, True), err
    assert len(starts(repo)) == 7


def test_other_flags_under_the_same_name_are_refused(repo):
    assert finish(repo, *sweep("A"), "--total-timesteps", "500", "--go")[0] == 0
    code, _, err = finish(repo, *sweep("A"), "--go")
    assert code == 1
    assert "is of other flags than the plan" in err


def test_full_disk_stops_the_suite_with_one_sentence(repo, monkeypatch, capsys):
    monkeypatch.setattr(run, "ROOT", repo)
    usage = shutil.disk_usage(repo)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda folder: usage._replace(free=1_000_000))
    words = [*sweep("A"), "--go", "--runs-dir", str(repo / "runs"), "--results-dir", str(repo / "results")]
    assert run.main(words) == 1
    assert "is full (1 MB left" in capsys.readouterr().err
    assert not list((repo / "runs").glob("*/default*"))


def test_result_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    records = result_files.summarize(write_run(tmp_path / "r"), "base", "default")
    file = tmp_path / "res" / "x.jsonl.gz"
    result_files.write_result(file, records)
    before = file.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        result_files.write_result(file, [records[0], records[1] | {"return": 0.0}, records[2]])
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == ["x.jsonl.gz"]


def test_bad_arguments(repo):
    for words, message in (
        (["sweep", "none.py", "--env", "A"], "sweep needs one script"),
        (["sweep", "ppo_continuous.py", "--seed", "1"], "names its environments"),
        (["nonsense"], "invalid choice"),
        (["base", "--jobs", "0"], "at least 1"),
        (["base", "--total-timesteps", "5000"], "a --results-dir and a --runs-dir of their own"),
        (["base", "--total-timesteps", "5000", "--results-dir", "mine"], "a --results-dir and a --runs-dir of their own"),
        (["sweep", "ppo_continuous.py", "--env", "A", "--name", "base"], "is a stored suite"),
        (["sweep", "ppo_continuous.py", "--env", "A", "--name", ".."], "names a folder"),
        (["sweep", "ppo_continuous.py", "--env", "A", "--only-seed", "3"], "--only-seed is for suites"),
        (["sweep", "benchmarks", "--env", "A"], "sweep needs one script"),
        (["base", "--total-timesteps", "0"], "at least 1"),
        (["base", "--only-env", "Hopper", "Walker"], "--only-env: no run has Walker; there are HalfCheetah, Hopper,"),
        (["base", "--only-seed", "1", "99"], "--only-seed: no run has 99; there are 1, 2, 3,"),
        (["figure3", "--go"], "need --peer-python PATH"),
        (["random", "Hopper"], "random takes its tasks from --only-env"),
        (["random", "--episodes", "1"], "at least 2 --episodes"),
    ):
        code, _, err = finish(repo, *words)
        assert code == 2
        assert message in err


def test_ray_without_ray_is_one_sentence(repo):
    if importlib.util.find_spec("ray"):
        pytest.skip("Ray is installed")
    code, _, err = finish(repo, *sweep("A"), "--go", "--ray", "local")
    assert code == 1
    assert "--ray needs Ray: pip install ray" in err


def test_another_script_under_the_same_name_is_refused(repo):
    shutil.copy(repo / "ppo_continuous.py", repo / "mine.py")
    assert finish(repo, *sweep("A"), "--go")[0] == 0
    other = ("sweep", "mine.py", "--name", "sweep_ppo_continuous", "--env", "A", "CRASH", "--go")
    code, _, err = finish(repo, *other)
    assert (code, "is of ppo_continuous.py: delete it or use another --name" in err) == (1, True), err
    assert finish(repo, *sweep("CRASH"), "--go")[0] == 1
    (repo / "benchmarks/results/sweep_ppo_continuous/default__A__1.jsonl.gz").unlink()
    code, _, err = finish(repo, *other[:5], "CRASH", "--go")
    assert (code, "was started with other flags or another script" in err) == (1, True), err


def test_finished_runs_of_another_version_are_told(repo):
    script = repo / "ppo_continuous.py"
    now = hashlib.sha256(script.read_bytes()).hexdigest()
    assert finish(repo, *sweep("A"), "--go")[0] == 0
    told = "1 of the finished runs are of another version of ppo_continuous.py"
    assert told in finish(repo, *sweep("A"))[1]  # the stand-in says that its text is "0"
    file = repo / "benchmarks/results/sweep_ppo_continuous/default__A__1.jsonl.gz"
    result = result_files.read_result(file)
    result_files.write_result(file, [result["header"] | {"script_sha256": now}, result["final"], result["curve"]])
    assert told not in finish(repo, *sweep("A"))[1]


def test_damaged_plan_of_a_run_is_one_sentence(repo):
    assert finish(repo, *sweep("CRASH"), "--go")[0] == 1
    (repo / "benchmarks/runs/sweep_ppo_continuous/default__CRASH__1.json").write_text("")
    code, _, err = finish(repo, *sweep("CRASH"), "--go")
    assert (code, "default__CRASH__1.json is damaged: delete it" in err) == (1, True), err


def test_what_a_script_refuses_is_not_tried_again(repo):
    code, _, err = finish(repo, *sweep("A"), "--clip-ceof", "0.1", "--go")
    assert code == 1
    assert len(re.findall(r"exit code 2: .*unrecognized arguments: --clip-ceof 0.1", err)) == 2  # as it fails, and in the end
    box = "loading\n╭─ Unrecognized options ───╮\n│ Unrecognized options: --x   │\n│ ─── │\n│ More: --help │\n╰──────╯\n"
    assert run.last_words(box) == "Unrecognized options: --x"
    assert run.last_words("a\rb\n\n") == "b"
    assert run.last_words("") == "no output"


def test_evaluations_of_a_sweep_are_those_asked_for(repo):
    def evaluated(*words):
        runs = suites.make_sweep("s", "ppo_continuous.py", ["--env", "A", *words])
        command, _ = run.make_command(runs[0], repo / "runs", "python", None, 1)
        return [command[i + 1] for i, word in enumerate(command) if word == "--eval-episodes"]

    assert evaluated() == ["0"]
    assert evaluated("--eval-episodes", "3") == ["3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ROOT", repo)
        (repo / "ppo_continuous.py").write_text("eval_every: int = 10")  # a copy of ppo_rlhf.py
        assert evaluated() == []


def test_runs_of_suites_of_language_models_evaluate(tmp_path):
    """benchmarks/exact.py, too, which runs ppo_rlhf.py: its result is made of evaluations."""
    for suite, flag in (("rlhf-exact", False), ("rlhf-human", False), ("base", True)):
        command, _ = run.make_command(suites.make_suite(suite)[0], tmp_path, "python", None, 1)
        assert ("--eval-episodes" in command) == flag, suite


def test_a_run_without_a_checkpoint_begins_with_the_text_of_now(repo):
    """Another would fail for ever, although its mistake is mended."""
    good = (repo / "ppo_continuous.py").read_text()
    (repo / "ppo_continuous.py").write_text("raise ValueError('my mistake')")
    code, _, err = finish(repo, *sweep("A"), "--go")
    assert (code, "my mistake" in err) == (1, True)
    (repo / "ppo_continuous.py").write_text(good)
    assert finish(repo, *sweep("A"), "--go")[0] == 0


def test_a_run_that_goes_on_with_an_older_text_says_so(repo):
    assert finish(repo, *sweep("A"), "--go")[0] == 0
    with open(repo / "ppo_continuous.py", "a") as script:
        script.write("# edited\n")
    code, _, err = finish(repo, *sweep("A"), "--results-dir", "other", "--go")
    assert code == 0
    told = "ppo_continuous.py has changed, but default__A__1 goes on with the text that it began with; to begin it anew delete"
    assert told in err


@pytest.mark.parametrize("steps", ["1e6", "abc", "1,2", "-5"])
def test_steps_of_a_sweep_are_a_whole_number(repo, steps):
    code, _, err = finish(repo, *sweep("A"), f"--total-timesteps={steps}")
    assert code == 2
    assert "steps are a whole number, such as 1000000" in err.splitlines()[-1]


def test_speeds_of_single_iterations_do_not_make_the_expected_time(tmp_path):
    for seed, sps in ((1, 0), (2, 1000)):
        records = result_files.summarize(write_run(tmp_path / f"r{seed}", seed=seed), "base", "default")
        records[1]["sps"] = sps
        result_files.write_result(result_files.result_file(tmp_path / "results", "base", f"default__Hopper__{seed}"), records)
    runs = [r for r in suites.make_suite("base") if r.env == "Hopper"][:1]
    assert run.expected_seconds(runs, tmp_path / "results") == pytest.approx(run.START_SECONDS + run.steps_of(runs[0]) / 1000)


def test_a_run_on_a_gpu_asks_for_it(repo):
    """So that it is refused where there is none, and not run on the CPU without a word."""
    for words, gpu, devices in (([], False, []), ([], True, ["cuda"]), (["--device", "cpu"], True, ["cpu"])):
        runs = suites.make_sweep("s", "ppo_continuous.py", ["--env", "A", *words])
        command, _ = run.make_command(runs[0], repo / "runs", "python", None, 1, gpu)
        assert [command[i + 1] for i, word in enumerate(command) if word == "--device"] == devices


def test_default_steps_are_read_or_unknown(repo, monkeypatch):
    monkeypatch.setattr(run, "ROOT", repo)
    for text, steps in (("total_timesteps: Steps = 1_500_000  # 3", 1_500_000), ("total_timesteps: int = int(1e6)", None)):
        (repo / "x.py").write_text(text)
        runs = suites.make_sweep("s", "x.py", ["--env", "A"])
        assert run.steps_of(runs[0]) == steps or (steps is None and np.isnan(run.steps_of(runs[0])))
        assert (run.clock(run.expected_seconds(runs, repo)) == "unknown") == (steps is None)
    assert run.steps_of(suites.make_sweep("s", "x.py", ["--env", "A", "--total-timesteps", "70"])[0]) == 70


def test_random_scores_replace_no_others(tmp_path, capsys):
    words = ["random", "--results-dir", str(tmp_path), "--only-env"]
    assert run.main([*words, "InvertedPendulum", "--episodes", "3"]) == 0
    file = tmp_path / "random" / "InvertedPendulum.json"
    stored = file.read_text()
    assert json.loads(stored)["episodes"] == 3
    assert run.main([*words, "InvertedPendulum", "--episodes", "2"]) == 2
    assert "InvertedPendulum.json is not of 2 episodes: delete it" in capsys.readouterr().err
    assert file.read_text() == stored
    for env, message in (("NoSuchTask", "unknown environment NoSuchTask"), ("CartPole-v1", "the action space is Discrete(2)")):
        assert run.main([*words, env, "--episodes", "2"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_ray_runs_retries_and_reports(repo):
    pytest.importorskip("ray")
    code, out, err = finish(repo, *sweep("A", "B", "CRASH", "FLAKY"), "--go", "--ray", "local", "--jobs", "2")
    assert code == 1
    assert "3 of 4 runs finished, 1 failed" in out, err
    assert "default__CRASH__1: exit code 1: stopped: it went wrong" in err
    assert result_names(repo) == [f"default__{env}__1.jsonl.gz" for env in ("A", "B", "FLAKY")]


# ----------------------------------------------------------------------------------------------------------------- report


@pytest.fixture
def reported(tmp_path):
    """Results of two tasks and seeds, a README with a marker, and the options that point there."""
    results = tmp_path / "results"
    for env, seed in itertools.product(("Hopper", "Reacher"), (1, 2)):
        level = 1000 * seed if env == "Hopper" else -5 - seed
        records = result_files.summarize(
            write_run(tmp_path / env / str(seed), env=env, seed=seed, returns=[level] * 200), "base", "default"
        )
        result_files.write_result(result_files.result_file(results, "base", f"default__{env}__{seed}"), records)
    readme, page = tmp_path / "README.md", tmp_path / "RESULTS.md"
    readme.write_text("before\n<!-- table:base -->\nold\n<!-- /table -->\nafter\n")
    page.write_text(
        "".join(f"<!-- table:{name} -->\n<!-- /table -->\n" for name in [*report.TABLES, "plot_curves", "plot_table1"])
    )
    options = ["--results-dir", results, "--readme", readme, "--results-md", page, "--plots-dir", tmp_path / "plots"]
    return tmp_path, [str(x) for x in options]


def test_report_writes_and_checks(reported, capsys):
    folder, options = reported
    assert report.main([*options, "--check"]) == 1
    assert "stale: README.md" in capsys.readouterr().out
    assert "old" in (folder / "README.md").read_text()  # a check writes nothing
    assert not (folder / "plots").exists()
    assert report.main(options) == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("before\n<!-- table:base -->\n| task |")
    assert text.endswith("<!-- /table -->\nafter\n")
    assert "| Hopper-v4 | 1500 [1000, 2000] | 1, 2 | 1,000 |" in text
    assert "| Reacher-v4 | -6.50 [-7.00, -6.00] | 1, 2 |" in text
    assert "| Walker2d-v4 |  |  |  |" in text  # not run: empty
    page = (folder / "RESULTS.md").read_text()
    assert "![Learning curves of PPO, TRPO and A2C](plots/curves.svg)" in page
    assert "| no clipping or penalty | -0.39 |  |  |  |  |" in page
    assert report.main([*options, "--check"]) == 0
    first = (folder / "plots" / "curves.svg").read_bytes()
    (folder / "plots" / "curves.svg").unlink()
    assert report.main([*options, "--check"]) == 1
    assert report.main(options) == 0
    assert (folder / "plots" / "curves.svg").read_bytes() == first  # the same drawing every time


def test_report_notices_new_results_and_edited_tables(reported):
    folder, options = reported
    report.main(options)
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("1500 [", "2500 ["))
    assert report.main([*options, "--check"]) == 1
    report.main(options)
    assert report.main([*options, "--check"]) == 0
    (folder / "results/base/default__Hopper__2.jsonl.gz").unlink()
    assert report.main([*options, "--check"]) == 1
    report.main(options)
    assert "| Hopper-v4 | 1000 | 1 | 1,000 |" in readme.read_text()  # one seed: no interval


def test_report_refuses_broken_markers(reported, capsys):
    folder, options = reported
    for text, message in (
        ("<!-- table:nonsense -->\n<!-- /table -->\n", "there is no table nonsense"),
        ("<!-- table:base -->\n", "do not pair up"),
    ):
        (folder / "README.md").write_text(text)
        assert report.main(options) == 1
        assert message in capsys.readouterr().err


def test_report_refuses_seeds_of_different_length(reported, capsys):
    folder, options = reported
    file = folder / "results/base/default__Hopper__2.jsonl.gz"
    result = result_files.read_result(file)
    result_files.write_result(file, [result["header"], result["final"] | {"global_step": 500}, result["curve"]])
    assert report.main(options) == 1
    assert "another number of steps" in capsys.readouterr().err


def test_report_refuses_results_that_stand_twice_or_elsewhere(reported, capsys):
    folder, options = reported
    file = folder / "results/base/default__Hopper__2.jsonl.gz"
    shutil.copy(file, file.with_name("again.jsonl.gz"))
    assert report.main(options) == 1
    assert "is of the setting, task and seed of another file" in capsys.readouterr().err
    file.with_name("again.jsonl.gz").unlink()
    (folder / "results/peer").mkdir()
    shutil.copy(file, folder / "results/peer")
    assert report.main(options) == 1
    assert "is a result of base: it does not belong in this folder" in capsys.readouterr().err


def test_report_takes_no_sweep_for_a_suite(reported):
    folder, options = reported
    report.main(options)
    (folder / "results/sweep_mine").mkdir()
    (folder / "results/sweep_mine/x.jsonl.gz").write_bytes(b"of a user")
    assert report.main([*options, "--check"]) == 0


@pytest.mark.parametrize("option", ["--results-dir", "--readme", "--results-md"])
def test_report_refuses_a_path_that_is_not_there(reported, capsys, option):
    folder, options = reported
    report.main(options)
    plots = sorted((folder / "plots").iterdir())
    for check in ([], ["--check"]):
        with pytest.raises(SystemExit) as stop:
            report.main([*options, option, str(folder / "typo"), *check])
        assert stop.value.code == 2
        assert "typo" in capsys.readouterr().err
    assert plots
    assert sorted((folder / "plots").iterdir()) == plots


@pytest.mark.parametrize("name", ["random/Hopper.json", "speed/x.jsonl"])
def test_report_names_damaged_measurements(reported, capsys, name):
    folder, options = reported
    (folder / "results" / name).parent.mkdir()
    (folder / "results" / name).write_text("{}\n[\n")
    assert report.main(options) == 1
    assert f"{name} is damaged (JSONDecodeError)" in capsys.readouterr().err


def fake_results(folder, suite, settings, envs, seeds, score, args=None, course=None):
    """Result files whose score is score(setting, env, seed), and over the whole training half of it.

    course(setting, env, seed): further parts of the curve.
    """
    for setting, env, seed in itertools.product(settings, envs, seeds):
        header = {"suite": suite, "setting": setting, "env": env, "seed": seed, "script": "ppo_continuous.py", "flags": {}}
        header |= {"script_sha256": "0" * 64, "versions": {"torch": "2"}, "cpu": "test", "gpu": None, "args": args or {}}
        value = float(score(setting, env, seed))
        final = {"return": value, "return_over_training": value / 2, "episodes": 1, "global_step": 1000, "seconds": 1, "sps": 1}
        name = suites.Run(suite, setting, "x.py", env, seed).name
        curve = {"global_step": [1000], "return": [value], **(course(setting, env, seed) if course else {})}
        result_files.write_result(result_files.result_file(folder, suite, name), [header, final, curve])


def fake_random(folder, mean):
    (folder / "random").mkdir(parents=True)
    for env in suites.MUJOCO:
        (folder / "random" / f"{env}.json").write_text(
            json.dumps({"env": env, "id": env, "mean": mean, "std": 1, "episodes": 1})
        )


def test_table1_normalization_by_both_readings(tmp_path):
    levels = dict.fromkeys(suites.TABLE1, 50) | {"no clipping or penalty": -50, "clipping 0.2": 90}
    fake_results(tmp_path, "table1", levels, suites.MUJOCO, (1, 2, 3), lambda s, e, seed: levels[s] + 10 * (seed - 2))
    fake_random(tmp_path, -10.0)
    results = report.Results(tmp_path)
    by_run = report_table1.table1_scores(results, "table1", "run")
    by_setting = report_table1.table1_scores(results, "table1", "setting")
    for setting, level in levels.items():
        assert by_run[setting].mean() == pytest.approx((level + 10) / 110)
        assert by_setting[setting].mean() == pytest.approx((level + 10) / 100)
    text = report_table1.table_table1(results)
    assert re.search(
        r"\| clipping 0.2 \| 0.82 \| 0.91 \[0.8\d, 0.9\d\] \| 1.00 \[0.9\d, 1.0\d\] \| 0.91 \[.*\| 1, 2, 3 \|", text
    )


def test_table1_takes_whole_seeds_only_and_waits_for_all_settings(tmp_path):
    most = [s for s in suites.TABLE1 if s != "fixed KL 10"]
    fake_random(tmp_path, -10.0)
    fake_results(tmp_path, "table1", most, suites.MUJOCO, (1, 2), lambda s, e, seed: 10)
    fake_results(tmp_path, "table1", most, ("Hopper",), (3,), lambda s, e, seed: 90)
    results = report.Results(tmp_path)
    assert results.complete_seeds("table1", "clipping 0.2", suites.MUJOCO) == [1, 2]
    assert report_table1.table1_scores(results, "table1", "run") == {} == report_table1.table1_data(results)
    assert "| clipping 0.2 | 0.82 |  |  |  | 1, 2 |" in report_table1.table_table1(results)
    fake_results(tmp_path, "table1", ["fixed KL 10"], suites.MUJOCO, (1,), lambda s, e, seed: 0)
    by_run = report_table1.table1_scores(report.Results(tmp_path), "table1", "run")
    assert by_run["clipping 0.2"].tolist() == [[1.0] * 7]  # seed 1 alone, and Hopper's 90 is of no whole seed
    assert by_run["fixed KL 10"].tolist() == [[0.5] * 7]


def test_short_table1_has_both_configurations_beside_the_paper(tmp_path):
    fake_random(tmp_path, 0.0)
    fake_results(tmp_path, "table1", suites.TABLE1, suites.MUJOCO, (1, 2), lambda s, e, seed: 100 if "0.2" in s else 50)
    text = report_table1.table_table1_short(report.Results(tmp_path))
    assert "| Table 1 | paper | observations normalized (n 0) | as printed (n 2) |" in text
    assert "| clipping 0.2 | 0.82 |  | 1.00 [1.00, 1.00] |" in text
    assert "| fixed KL 10 | 0.69 |  | 0.50 [0.50, 0.50] |" in text
    assert len(text.splitlines()) == 2 + len(suites.TABLE1)


def test_plot_of_table1_cuts_off_a_setting_that_diverged(tmp_path):
    import matplotlib.pyplot as plt

    level = dict.fromkeys(suites.TABLE1, 50) | {"no clipping or penalty": -910}
    fake_results(tmp_path, "table1", level, suites.MUJOCO, (1, 2), lambda s, e, seed: level[s] + 10 * (seed - 1))
    fake_random(tmp_path, -40.0)
    figure = figures.draw_table1(report_table1.table1_data(report.Results(tmp_path)), plt)
    axis = figure.axes[0]
    assert axis.get_ylim()[0] == figures.TABLE1_BOTTOM
    (text,) = axis.texts
    assert re.fullmatch(r" -8.65 \[-8.[67]\d, -8.[56]\d\]", text.get_text())  # (-905 + 40) / 100
    plt.close(figure)


def test_modes_levels_and_collapse(tmp_path):
    fake_random(tmp_path, 0.0)
    fake_results(tmp_path, "base", ["default"], ["HalfCheetah"], range(1, 11), lambda s, e, seed: 4000 if seed > 8 else 1700)
    fake_results(tmp_path, "table1-normalized", ["clipping 0.2"], ["Walker2d"], (1, 2), lambda s, e, seed: 3000 + seed)
    none = "no clipping or penalty"
    fake_results(tmp_path, "table1-normalized", [none], ["Walker2d"], (1, 2, 3), lambda s, e, seed: -100)
    fake_results(tmp_path, "collapse", [none], ["Walker2d"], range(4, 11), lambda s, e, seed: 200 if seed == 4 else 1500)
    r = report.Results(tmp_path)
    assert "| above 2400 | 2 of 10, 20% [6%, 51%] | 4000 to 4000 |" in report.table_modes(r)
    assert "| Walker2d-v4 | ~3460 | 3000 |  |  | 3002 [3001, 3002] |  | 0, 0, 2, 0 |" in report_table1.table_levels(r)
    row = "| observations normalized | Walker2d-v4 | 3 of 10, 30% [11%, 60%] | 4 of 10, 40% [17%, 69%] | 1500 (-100 to 1500) |"
    assert row in report_table1.table_collapse(r)


def test_distance_from_the_paper(tmp_path):
    """Scores that are the paper's on the scale of 0 to 1 have distance 0; the zero point of the initial policy is another."""
    paper = {row["setting"]: float(row["score"]) for row in report.Results(tmp_path).csv("table1.csv")}
    top = max(paper.values())
    fake_results(tmp_path, "table1", paper, suites.MUJOCO, (1, 2), lambda s, e, seed: 100 * paper[s] / top)
    fake_random(tmp_path, 0.0)
    off = np.array(list(paper.values())) * (1 / top - 1)
    ten = off[[s != "no clipping or penalty" for s in paper]]
    rms = [f"{np.sqrt(np.mean(x**2)):.2f}" for x in (off, ten)]
    text = report_table1.table_distance(report.Results(tmp_path))
    assert f"| as printed | uniform | best setting | {rms[0]} | {rms[1]} | -0.48 [-0.48, -0.48] | 2 |" in text
    assert "| as printed | initial | best setting |  |  |  |  |" in text
    assert f"Nearest over the eleven rows: as printed, uniform policy 0, best run 1 ({rms[0]})." in text
    fake_results(tmp_path, "initial", ["as printed"], suites.MUJOCO, (1,), lambda s, e, seed: -200)
    text = report_table1.table_distance(report.Results(tmp_path))
    assert re.search(r"\| as printed \| initial \| best run \| 0.\d\d \| 0.\d\d \| 0.26 \[0.26, 0.26\] \| 2 \|", text)


def test_sentences_of_the_readme_follow_the_results(tmp_path):
    assert report.table_measured(report.Results(tmp_path)) == ""
    fake_random(tmp_path, -10.0)
    fake_results(tmp_path, "base", ["default"], suites.MUJOCO, range(1, 11), lambda s, e, seed: 4000 if seed > 8 else 1700)
    fake_results(
        tmp_path, "figure3", ["TRPO"], ("Hopper", "Swimmer"), (1, 2, 3), lambda s, e, seed: 5000 * (e == "Hopper") + 2000
    )
    for suite in ("table1", "table1-normalized"):
        fake_results(tmp_path, suite, suites.TABLE1, suites.MUJOCO, (1, 2), lambda s, e, seed: 90 if "0.2" in s else 50)
    fake_results(tmp_path, "collapse", ["no clipping or penalty"], ["Reacher"], (4, 5), lambda s, e, seed: -100)
    settings = ["bfloat16, larger updates", "bfloat16"]
    fake_results(tmp_path, "atari-short", settings, ["Breakout"], (1, 2, 3), lambda s, e, seed: 30 if "larger" in s else 20)
    fake_results(tmp_path, "unclipped", ["no policy clipping"], suites.DETAILS_TASKS, (1, 2), lambda s, e, seed: 160)
    text = report.table_measured(report.Results(tmp_path))
    for part in (
        "No policy clipping minus all details on: HalfCheetah -2000 [-2690, -1540] (n 2, 10), Hopper -2000",
        "2 of 10, 20% [6%, 51%], end above 2400.",
        "as printed 90.0 [90.0, 90.0], observations normalized 90.0 [90.0, 90.0], difference 0.00 [0.00, 0.00] (n 2, 2);",
        "runs on Reacher that end below random: 2 of 4, 50% [15%, 85%].",
        "Hopper 4840 [",
        " (n 3, 10); not known on Swimmer (-160 [-850, 300]; n 3, 10).",
        "minus defaults: 10.00 [10.00, 10.00] (n 3, 3).",
    ):
        assert part in text
    assert len(text.split()) <= 150
    real = (REPO / "README.md").read_text().split("<!-- table:measured -->")[1].split("<!--")[0]
    assert len(real.split()) <= 150


def test_differences_are_given_with_their_runs(tmp_path):
    fake_results(tmp_path, "base", ["default"], ["Hopper"], (1, 2), lambda s, e, seed: 100)
    fake_results(tmp_path, "figure3", ["TRPO"], ["Hopper", "Swimmer"], (1, 2, 3), lambda s, e, seed: 130)
    text = report.table_differences(report.Results(tmp_path))
    assert "| TRPO minus PPO | Hopper | 3 and 2 | 30.0 [30.0, 30.0] |" in text
    assert "Swimmer" not in text


def test_effect_of_details(tmp_path):
    """Each task counts alike, whatever the size of its returns: half of one of three is lost."""
    fake_random(tmp_path, 0.0)
    on = {"HalfCheetah": 100, "Hopper": 200, "Walker2d": 50}
    fake_results(tmp_path, "base", ["default"], on, (1, 2, 3), lambda s, env, seed: on[env])
    worse, better = list(suites.DETAILS)[:2]
    level = {worse: on | {"HalfCheetah": 50}, better: {env: 1.05 * x for env, x in on.items()}}
    fake_results(tmp_path, "details", level, on, (1, 2, 3), lambda s, env, seed: level[s][env])
    text = report.table_details(report.Results(tmp_path))
    cells = "50.0 [50.0, 50.0] | 200 [200, 200] | 50.0 [50.0, 50.0] | 1, 2, 3 |"
    assert f"| {worse} | -0.17 [-0.17, -0.17] | 0.33 [0.33, 0.33] | {cells}" in text
    assert f"| {better} | +0.05 [+0.05, +0.05] | 1.00 [1.00, 1.00] |" in text


def test_effect_of_details_is_the_mean_of_the_points_in_the_plot(tmp_path):
    """Also where one task has more seeds with all details on than the others."""
    fake_random(tmp_path, 0.0)
    on = {"HalfCheetah": 100, "Hopper": 200, "Walker2d": 50}
    fake_results(tmp_path, "base", ["default"], on, (1, 2, 3), lambda s, env, seed: on[env])
    fake_results(tmp_path, "base", ["default"], {"HalfCheetah": 0}, (4, 5), lambda s, env, seed: 700)
    worse = next(iter(suites.DETAILS))
    fake_results(tmp_path, "details", [worse], on, (1, 2), lambda s, env, seed: on[env] / 2)
    data = report.details_data(report.Results(tmp_path))
    assert data["effects"][worse]["mean"] == -0.5
    assert [data["tasks"][env][worse] for env in on] == [[0.5, 0.5]] * 3
    assert "| 100 [100, 100] | 200 [200, 200] | 50.0 [50.0, 50.0] | 1, 2, 3 |" in report.table_details(report.Results(tmp_path))


def test_table_of_the_kl_penalty(tmp_path):
    """Of the updates only those after the first tenth of training count."""
    fake_random(tmp_path, 10.0)
    level = {"Hopper": (210, 110), "Reacher": (60, 40)}
    near, far = [9.0] * 2 + [0.002] * 3 + [0.012] * 9 + [0.04] * 6, [0.01] * 2 + [0.1] * 18
    fake_results(tmp_path, "base", ["default"], level, (1, 2), lambda s, env, seed: level[env][0])
    kls = {"Hopper": {"kl": [0.012], "kl_of_updates": near}, "Reacher": {"kl": [0.1], "kl_of_updates": far}}
    settings = [report.KL_SETTING]
    fake_results(
        tmp_path,
        "table1-details",
        settings,
        level,
        (1, 2),
        lambda s, env, seed: level[env][1],
        course=lambda s, env, _: kls[env],
    )
    text = report.table_kl_penalty(report.Results(tmp_path))
    assert "| Hopper-v4 | 210 [210, 210] | 110 [110, 110] | -100 [-100, -100] | 50.0% | 0.0120 | 50.0% |" in text
    assert "| Reacher-v4 | 60.0 [60.0, 60.0] | 40.0 [40.0, 40.0] | -20.0 [-20.0, -20.0] | 60.0% | 0.1000 | 0.0% |" in text
    assert "| Swimmer-v4 |  |  |  |  |  |  |" in text


def test_published_scores_outside_of_our_interval_are_named(tmp_path):
    level = {"Hopper": (2000, 2350), "Swimmer": (90, 120)}
    fake_results(tmp_path, "base", ["default"], level, (1, 2), lambda s, env, seed: level[env][seed - 1])
    fake_results(tmp_path, "base", ["default"], ["Reacher"], (1,), lambda *_: -300)  # one run has no interval
    fake_results(tmp_path, "peer", ["SB3 PPO"], ["Hopper"], (1,), lambda *_: 500)
    text = report.table_published(report.Results(tmp_path))
    published = "~2330 | 2316.2 | 1912.9 | 2382.9±271.7 | baselines trpo_mpi v2, CleanRL v4 |"
    assert f"| Hopper | 2175 [2000, 2350] | 500 | {published}" in text
    assert "| Swimmer | 105 [90.0, 120] |  | ~108 | 111.2 | 95.0 |  |  |" in text
    assert "| Reacher | -300 |  | ~-7 | -6.7 | -4.8 |  |  |" in text


def test_table_of_shared_networks_on_mujoco(tmp_path):
    fake_results(tmp_path, "shared-mujoco", ["shared"], ["HalfCheetah", "Hopper"], (1, 2, 3), lambda *_: 100)
    fake_results(tmp_path, "shared-mujoco", ["separate"], ["HalfCheetah"], (1, 2), lambda *_: 140)
    text = report.table_shared_mujoco(report.Results(tmp_path))
    assert "| HalfCheetah-v4 | 100 [100, 100] | 140 [140, 140] | -40.0 [-40.0, -40.0] | 3 and 2 |" in text
    assert "| Hopper-v4 | 100 [100, 100] |  |  | 3 and 0 |" in text


def test_table_of_discrete_actions(tmp_path):
    fake_results(tmp_path, "discrete", ["shared, unscaled rewards"], ["CartPole-v1"], (1, 2), lambda *_: 300)
    text = report.table_discrete(report.Results(tmp_path))
    cells = "300 [300, 300] | 150 [150, 150] | 1, 2 | 1,000 | --no-norm-reward |"
    assert f"| shared, unscaled rewards | CartPole-v1 | {cells}" in text
    assert (
        "| LunarLander | LunarLander-v3 |  |  |  |  | --num-envs 16 --num-steps 1024 --num-minibatches 64 --gamma 0.999" in text
    )
    assert "--total-timesteps" not in text


def test_plot_of_details_has_a_panel_for_each_task_that_was_run(tmp_path):
    fake_random(tmp_path, 0.0)
    fake_results(tmp_path, "base", ["default"], suites.DETAILS_TASKS, (1, 2, 3), lambda s, e, seed: 98 + seed)
    assert report.details_data(report.Results(tmp_path)) == {}  # nothing switched off yet
    worse = next(iter(suites.DETAILS))
    fake_results(tmp_path, "details", [worse], ["HalfCheetah"], (1,), lambda s, e, seed: 80)
    data = report.details_data(report.Results(tmp_path))
    assert data == {"tasks": {"HalfCheetah": {report.ALL_ON: [0.99, 1.0, 1.01], worse: [0.8]}}, "effects": {}}
    fake_results(tmp_path, "details", [worse], suites.DETAILS_TASKS, (1, 2), lambda s, e, seed: 80)
    data = report.details_data(report.Results(tmp_path))
    assert list(data["tasks"]) == list(suites.DETAILS_TASKS)
    assert data["effects"] == {
        worse: {"mean": -0.2, "low": pytest.approx(-0.21, abs=0.01), "high": pytest.approx(-0.19, abs=0.01)}
    }
    figures.draw_plot(tmp_path / "details.svg", data, figures.draw_details)
    text = (tmp_path / "details.svg").read_text()
    assert all(f"{env}: score of each run" in text for env in suites.DETAILS_TASKS)
    assert "effect, mean over the tasks" in text


def test_terms_of_the_objective_are_added_one_after_the_other(tmp_path):
    levels = {"clip": 20, "clip + value": 300}
    fake_results(tmp_path, "objective", levels, ["CartPole-v1"], (1, 2), lambda s, *_: levels[s])
    fake_results(tmp_path, "discrete", ["shared"], ["CartPole-v1"], (1, 2, 3), lambda *_: 290)
    text = report.table_objective(report.Results(tmp_path))
    cells = "20.0 [20.0, 20.0] | 300 [300, 300] | 290 [290, 290] | 280 [280, 280] | -10.00 [-10.00, -10.00] | 2, 2, 3 |"
    assert f"| CartPole-v1 | {cells}" in text
    assert "| Acrobot-v1 |  |  |  |  |  | 0, 0, 0 |" in text


def course_of(*points):
    """Evaluations of a language model, from (KL, VADER, score)."""
    rest = {"ended": 1.0, "length": 10.0, "distinct_2": 0.5}
    return {"evaluations": [{"kl": kl, "vader": vader, "score": score, **rest} for kl, vader, score in points]}


def test_over_optimization_is_read_from_the_course_of_training(tmp_path):
    courses = {"beta 0": course_of((0, 0.2, 0), (50, 0.9, 4), (100, 0.6, 6)), "beta 0.05": course_of((0, 0.2, 0), (25, 0.8, 3))}
    fake_results(tmp_path, "rlhf-overopt", courses, ["labels"], (1, 2), lambda *_: 0, course=lambda s, *_: courses[s])
    text = report_rlhf.table_rlhf_overopt(report.Results(tmp_path))
    assert "| rlhf-overopt, beta 0 | 2 | 0.90 | 4.00 | 50.00 | 0.60 | 6.00 | 100.00 | 0.30 |" in text
    assert "| rlhf-overopt, beta 0.05 | 1 | 0.80 | 3.00 | 25.00 | 0.80 | 3.00 | 25.00 | 0.00 |" in text
    assert "fell by 0.30 [0.30, 0.30] without the penalty and 0.00 [0.00, 0.00] with it" in text
    assert "difference 0.30 [0.30, 0.30]; by more than 0.15 in 2 of 2, 100% [34%, 100%] and 0 of 2, 0% [0%, 66%]." in text
    assert "at the same KL: +0.25 [+0.25, +0.25] (n 2)" in text  # 0.8 against 0.55, half of the way from 0.2 to 0.9
    assert "rlhf-human:" not in text


def test_readme_tells_of_language_models_what_was_run(tmp_path):
    args = {"env": "human", "num_comparisons": 16000, "head_init": "original", "reward_pool": "last"}
    stages = {"stages": {"supervised_nats": 4.0, "reward_model_accuracy": 0.7}}
    on, off = course_of((0, 0.2, 0), (20, 0.6, 4)) | stages, course_of((0, 0.2, 0), (50, 0.5, 4), (80, 0.3, 6)) | stages
    assert report_rlhf.table_rlhf_told(report.Results(tmp_path)) == "Nothing was run yet.\n"
    for setting, course in (("KL target 10", on), ("beta 0", off)):
        fake_results(tmp_path, "rlhf-human", [setting], ["human"], (1, 2), lambda *_: 0, args, lambda *_, c=course: c)
    text = " ".join(report_rlhf.table_rlhf_told(report.Results(tmp_path)).split())
    assert text.startswith("With 2 seeds PPO raised the score from 0.00 to 4.00 [4.00, 4.00], in deviations")
    assert "at a KL of 20.00 [20.00, 20.00] nats. VADER is a lexicon" in text
    assert "never saw its scores. They rose from 0.20 to 0.60 [0.60, 0.60]. The texts" in text
    assert "the others alone" not in text
    assert "reached 80.00 [80.00, 80.00]. VADER ended at 0.30 [0.30, 0.30], 0.20 [0.20, 0.20] below its highest value" in text
    assert "minus that without is 0.30 [0.30, 0.30] (2 and 2 seeds). The reward models (2 seeds)" in text
    assert "agree with people on 70.0% [70.0%, 70.0%]" in text
    new = course_of((0, 0.2, 0), (10, 0.7, 3)) | stages
    fake_results(tmp_path, "rlhf-human", ["KL target 10"], ["human"], (3, 4, 5), lambda *_: 0, args, lambda *_: new)
    text = " ".join(report_rlhf.table_rlhf_told(report.Results(tmp_path)).split())
    assert "seeds 1 to 3 known; the others alone: score 3.00 [3.00, 3.00], VADER 0.70 [0.70, 0.70], KL 10.00" in text


def test_effects_of_details_of_language_models(tmp_path):
    off = next(iter(suites.RLHF_DETAILS))
    on, changed = course_of((0, 0.2, 0), (20, 0.6, 4)), course_of((0, 0.2, 0), (30, 0.5, 3))
    fake_results(tmp_path, "rlhf-human", ["beta 0.05"], ["human"], (1, 2), lambda *_: 0, course=lambda *_: on)
    fake_results(tmp_path, "rlhf-details", [off], ["human"], (1,), lambda *_: 0, course=lambda *_: changed)
    text = report_rlhf.table_rlhf_details(report.Results(tmp_path))
    assert "| all on, beta 0.05 | 4.00 |  | 20.00 |  | 1.00 |  | 0.60 | 0.50 | 1, 2 |" in text
    assert f"| {off} | 3.00 | -1.00 | 30.00 | +10.00 | 1.00 | +0.00 | 0.50 | 0.50 | 1 |" in text  # no interval of a single seed


def test_reward_models_are_told_once_per_seed(tmp_path):
    args = {"env": "human", "num_comparisons": 16000, "head_init": "original", "reward_pool": "last"}
    for suite, setting in (("rlhf-human", "beta 0"), ("rlhf-details", next(iter(suites.RLHF_DETAILS)))):
        stages = {"stages": {"supervised_nats": 4.0, "reward_model_accuracy": 0.7}}
        fake_results(tmp_path, suite, [setting], ["human"], (1, 2), lambda *_: 0, args=args, course=lambda *_, x=stages: x)
    text = report_rlhf.table_rlhf_stages(report.Results(tmp_path))
    assert "| 16,000 comparisons by people's ratings | 4.00 [4.00, 4.00] | 0.700 [0.700, 0.700] | 1, 2 |" in text


def test_games_won(tmp_path):
    published = {"Alien": 2000, "Amidar": 500, "Assault": 4653.8}  # more than both, between them, a tie with ACER
    fake_results(tmp_path, "table6", ["bfloat16"], published, (1,), lambda s, game, seed: published[game])
    text = report.table_games_won(report.Results(tmp_path))
    assert "| paper | 1 | 28 | 19 | 1 | 49 | 0.69 |" in text
    assert "| ours against the paper's A2C and ACER | 0 | 1 | 1 | 1 | 3 |  |" in text  # no median before all 49 are there


def test_speed_table(tmp_path):
    (tmp_path / "speed").mkdir()
    header = {"env": "HalfCheetah", "steps": 1000, "cpu": "test", "cores": [0], "threads": 1, "load": 0.1}
    header["versions"] = {"torch": "2"}
    rates = [("ours", 1, 3000), ("SB3", 1, 500), ("ours", 2, 4000), ("SB3", 2, 500)]
    lines = [header, *({"contestant": c, "round": r, "sps": s} for c, r, s in rates)]
    (tmp_path / "speed" / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report.table_speed(report.Results(tmp_path))
    assert "| SB3 | 500 [500, 500] | 7.00 [6.00, 8.00] | 2 |" in text
    assert "pinned to 1 core(s), 1 thread(s)" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "x"], "x.jsonl holds measurements: choose another --name or delete it"),
        (["--cores", "9999"], "--cores: this process may use"),
        (["--peer-python", "/nowhere/python"], "/nowhere/python is no Python that can be started"),
    ],
)
def test_speed_refuses_what_it_cannot_do(tmp_path, words, message):
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "x.jsonl").write_text("{}\n")
    command = [sys.executable, str(REPO / "benchmarks" / "speed.py"), "--results-dir", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert (tmp_path / "speed" / "x.jsonl").read_text() == "{}\n"


def test_short_speed_table_pairs_the_alternations(tmp_path):
    (tmp_path / "speed").mkdir()
    lines: list[dict] = [{"env": "HalfCheetah"}]
    for round_number, factor in ((1, 1.0), (2, 2.0)):  # the second alternation on a machine twice as fast
        for envs in ("1 env", "8 envs"):
            for name, rate in (("ours", 500), ("CleanRL", 50), ("Stable-Baselines3", 100), ("sbx", 250)):
                lines.append({"round": round_number, "contestant": f"{name}, {envs}", "sps": rate * factor})
    (tmp_path / "speed" / "mujoco.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report.table_speed_short(report.Results(tmp_path))
    rates = "750 [500, 1000] | 75 [50, 100] | 150 [100, 200] | 375 [250, 500]"
    assert f"| 1 env | {rates} | 10.0 [10.0, 10.0] | 5.0 [5.0, 5.0] | 2.0 [2.0, 2.0] |" in text
    without = [x for x in lines if "sbx" not in x.get("contestant", "")]
    (tmp_path / "speed" / "mujoco.jsonl").write_text("".join(json.dumps(line) + "\n" for line in without))
    text = report.table_speed_short(report.Results(tmp_path))
    assert "| 8 envs | 750 [500, 1000] | 75 [50, 100] | 150 [100, 200] |  | 10.0 [10.0, 10.0] | 5.0 [5.0, 5.0] |  |" in text
    (tmp_path / "speed" / "mujoco.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert report.table_speed_short(report.Results(tmp_path)) == "Nothing was measured yet.\n"


# ------------------------------------------------------------------------------------------------------------------- plot


def write_setting(folder, setting, env, seed, level, **args):
    """A run directory with these arguments, whose episodes all return `level`."""
    return edit_logs(write_run(folder / f"{setting}__{env}__{seed}", env=env, seed=seed, returns=[level] * 200), **args)


def test_plot_of_a_sweep_of_two_settings(tmp_path, capsys):
    for clip, env, seed in itertools.product((0.2, 0.1), ("Hopper", "Reacher"), (1, 2, 3)):
        write_setting(tmp_path, f"clip={clip}", env, seed, 100.0 * seed + 1000 * clip, clip_coef=clip)
    (tmp_path / "clip=0.2__Hopper__1.log").write_text("beside the runs, as run.py leaves it")
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    assert plot.main([*paths, "--out", str(tmp_path / "a.svg")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Hopper clip_coef=0.1 3 300 200 400 1,000" in out
    assert "Hopper clip_coef=0.2 3 400 300 500 1,000" in out
    low, high = map(
        float, re.findall(r"each setting minus clip_coef=0.1 .*Reacher clip_coef=0.2 3 and 3 100 (\S+) (\S+)", out)[0]
    )
    assert -100 <= low < 100 < high <= 300
    svg = (tmp_path / "a.svg").read_text()
    assert "Hopper (3 seeds)" in svg
    assert "clip_coef=0.2" in svg
    assert plot.main([*paths, "--baseline", "clip_coef=0.2", "--out", str(tmp_path / "a.png")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "each setting minus clip_coef=0.2 task setting n difference low high Hopper clip_coef=0.1 3 and 3 -100" in out


def test_plot_of_stored_results_and_of_runs_of_different_length(tmp_path, capsys):
    fake_results(tmp_path, "base", ["default", "other"], ["Hopper"], (1, 2), lambda s, e, seed: 10 * seed)
    assert plot.main([str(tmp_path / "base"), "--by", "setting", "--out", str(tmp_path / "b.png")]) == 0
    assert "Hopper other 2 15.00 10.00 20.0" in " ".join(capsys.readouterr().out.split())
    curves = [{"global_step": [10, 20, 30], "return": [None, 2, 3]}, {"global_step": [15, 25, 50], "return": [1, 2, 4.5]}]
    assert plot.band(curves) | {"low": 0, "high": 0} == {
        "steps": [20, 30],
        "mean": [1.75, 2.75],
        "low": 0,
        "high": 0,
        "seeds": 2,
    }


def test_plot_says_what_it_leaves_out_and_what_is_wrong(tmp_path, capsys):
    first = write_setting(tmp_path / "a", "x", "Hopper", 1, 5.0)
    again = write_setting(tmp_path / "b", "x", "Hopper", 1, 5.0)
    cut = write_run(tmp_path / "c" / "x", steps=900, seed=2)
    out = str(tmp_path / "x.png")
    assert plot.main([str(first), str(again), str(cut), "--out", out]) == 0
    err = capsys.readouterr().err
    assert f"left out: {again} has the setting, task and seed of another run" in err
    assert f"not finished: {cut}, 900 of 1,050 steps" in err
    for words, message in (
        ([str(tmp_path / "none")], "none does not exist"),
        ([str(first / "episodes.jsonl")], "no run directory and no result file"),
        ([str(first), "--by", "nonsense"], "no run has an argument nonsense; they differ in: nothing"),
        ([str(first), "--baseline", "nonsense"], "there is no setting nonsense; settings: all runs"),
    ):
        assert plot.main([*words, "--out", out]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot.main([str(first), "--out", "plot.doc"])


def plotted(capsys, *words):
    """Exit code, and what plot.py prints, with single spaces."""
    code = plot.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err


def test_plot_tells_apart_what_only_some_scripts_have(tmp_path, capsys):
    for seed, target in ((1, 0.003), (2, 0.003), (1, 0.3), (2, 0.3)):
        write_setting(tmp_path, f"kl{target}", "Hopper", seed, 100 * target, kl_target=target, script_is="penalty")
    write_setting(tmp_path, "none", "Hopper", 1, 7.0, script_is="clip")
    write_setting(tmp_path, "unset", "Hopper", 1, 8.0, script_is="clip", target_kl=None)
    write_setting(tmp_path, "set", "Hopper", 1, 9.0, script_is="clip", target_kl=0.1)
    code, out, err = plotted(capsys, tmp_path, "--out", tmp_path / "x.png")
    assert (code, err) == (0, "")
    for row in (
        "kl_target=-, script_is=clip, target_kl=- 1 7.00",
        "kl_target=-, script_is=clip, target_kl=None 1 8.00",
        "kl_target=-, script_is=clip, target_kl=0.1 1 9.00",
        "kl_target=0.003, script_is=penalty, target_kl=- 2 0.30",
        "kl_target=0.3, script_is=penalty, target_kl=- 2 30.0",
    ):
        assert row in out
    assert plotted(capsys, tmp_path, "--by", "kl-target", "--out", tmp_path / "x.png")[0] == 0


def test_plot_warns_of_settings_that_it_was_told_to_mix(tmp_path, capsys):
    for seed, clip in ((1, 0.1), (2, 0.2)):
        write_setting(tmp_path, "x", "Hopper", seed, 1.0, clip_coef=clip, gamma=0.9)
    _, out, err = plotted(capsys, tmp_path, "--by", "gamma", "--out", tmp_path / "x.png")
    assert "Hopper gamma=0.9 2" in out
    assert "warning: gamma=0.9 mixes runs that differ in clip_coef" in err
    edited = tmp_path / "x__Hopper__2" / "metrics.jsonl"
    edited.write_text(edited.read_text().replace('"clip_coef": 0.2', '"clip_coef": 0.1').replace("0" * 64, "1" * 64))
    assert "all runs: from 2 versions of the script" in plotted(capsys, tmp_path, "--out", tmp_path / "x.png")[2]


def test_plot_takes_the_attempt_that_came_further_and_tells_extended_runs_apart(tmp_path, capsys):
    write_run(tmp_path / "a", steps=500, returns=[1.0] * 200)
    write_run(tmp_path / "b", returns=[2.0] * 200)
    _, out, err = plotted(capsys, tmp_path, "--out", tmp_path / "x.png")
    assert "all runs 1 2.00" in out
    assert f"left out: {tmp_path / 'a'} has" in err
    edit_logs(write_run(tmp_path / "c", seed=2), total_timesteps=300)
    assert "total_timesteps=1000 1 150 " in plotted(capsys, tmp_path, "--out", tmp_path / "x.png")[1]


def test_plot_of_runs_that_share_no_steps_or_tasks(tmp_path, capsys):
    done, cut = write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=100, seed=2)
    episodes = result_files.read_jsonl(done / "episodes.jsonl")
    late = [e for e in episodes if e["global_step"] > 500]
    (done / "episodes.jsonl").write_text("".join(json.dumps(e) + "\n" for e in late))
    code, out, err = plotted(capsys, done, cut, "--out", tmp_path / "x.png")
    assert (code, "no curve of all runs on Hopper: its runs have no steps in common" in err) == (0, True)
    assert "2 runs -> no plot" in out
    other = write_setting(tmp_path, "x", "Reacher", 1, 1.0, clip_coef=0.5)
    first = edit_logs(done, clip_coef=0.1)
    assert "each setting minus clip_coef=0.1 no task has both" in plotted(capsys, first, other, "--out", tmp_path / "x.png")[1]


def test_plot_gives_small_returns_their_digits(tmp_path, capsys):
    for seed, level in ((1, 0.0012), (2, 0.0034)):
        write_setting(tmp_path, "x", "Hopper", seed, level)
    assert "all runs 2 0.00230 0.00120 0.00340" in plotted(capsys, tmp_path, "--out", tmp_path / "x.png")[1]
