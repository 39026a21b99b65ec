"""Killed and interrupted at random moments, a run resumed to its end has the bits of an undisturbed one. Minutes, so slow.

pytest -m slow tests/test_kills.py
PPO_KILLS=100 PPO_KILLS_SEED=3 pytest -m slow tests/test_kills.py
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import TIMES, equal
from warm import CACHE, ROOT, SCRIPTS, Warm

KILLS = int(os.environ.get("PPO_KILLS", "25"))
SEED = int(os.environ.get("PPO_KILLS_SEED", "1"))

COMMON = "--num-minibatches 2 --update-epochs 2 --eval-episodes 0 --no-compile --seed 3 --num-envs 2"
SIZES = "--num-steps 32 --total-timesteps 2560 --checkpoint-every 5"
WORDS = {
    "ppo_continuous": f"{COMMON} {SIZES} --env envs:Point-v0",
    "ppo_kl_penalty": f"{COMMON} {SIZES} --env envs:Point-v0",
    "ppo_shared_params": f"{COMMON} {SIZES} --env CartPole-v1 --norm-obs step",
    "ppo_atari": f"{COMMON} --env Breakout --num-steps 8 --total-timesteps 384 --checkpoint-every 4 --max-episode-steps 30 "
    "--num-threads 1",
    "ppo_rlhf": f"--env human --data {ROOT}/tests/texts.tsv --num-envs 4 --num-steps 4 --num-minibatches 2 --update-epochs 2 "
    "--total-timesteps 640 --eval-episodes 3 --eval-every 7 --checkpoint-every 4 --vocabulary 270 --width 32 --layers 1 "
    "--sft-epochs 1 --num-comparisons 64",
}


def start(script: str, folder: Path, *words: str) -> Warm:
    return Warm(script, list(words), folder, env={"XDG_CACHE_HOME": str(CACHE)})


def next_words(script: str, folder: Path, run_dir: str = "run") -> list[str]:
    """Resumes where there is a checkpoint; else the first command again, which must do although the directory exists."""
    if (folder / run_dir / "checkpoint.pt").is_file():
        return ["--resume", run_dir]
    return [*WORDS[script].split(), "--run-dir", run_dir]


def read_log(file: Path) -> list[dict]:
    """Records without times and without the header."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records if "global_step" in record]


def assert_same_run(a: Path, b: Path):
    old, new = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b))
    assert old.keys() == new.keys()
    for key in old.keys() - {"args", "log_sizes", "wandb_id"}:
        assert equal(old[key], new[key]), key
    for name in ("episodes.jsonl", "evaluations.jsonl", "samples.jsonl"):  # the latter two are those of ppo_rlhf.py
        assert (a / name).is_file() == (b / name).is_file()
        assert not (a / name).is_file() or (a / name).read_bytes() == (b / name).read_bytes()
    assert read_log(a / "metrics.jsonl") == read_log(b / "metrics.jsonl")
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))  # no checkpoint.tmp either


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[str], tuple[Path, float]]:
    """Script -> run directory of its undisturbed run, and the seconds that it took."""
    made: dict[str, tuple[Path, float]] = {}

    def make(script: str) -> tuple[Path, float]:
        if script not in made:
            folder = tmp_path_factory.mktemp(script)
            for run_dir in ("warm", "run"):  # the first one also starts the process that the others are forked from
                begin = time.monotonic()
                child = start(script, folder, *WORDS[script].split(), "--run-dir", run_dir)
                assert child.wait() == 0, child.stderr.read_text()
            made[script] = folder / "run", time.monotonic() - begin
            assert len(read_log(folder / "run" / "episodes.jsonl")) > 10
        return made[script]

    return make


def wait_for_records(child: Warm, log: Path, count: int):
    """Until the log has grown that many times, or the child has ended."""
    size, changes = log.stat().st_size if log.is_file() else 0, 0
    while changes < count and child.alive():
        time.sleep(0.0005)
        now = log.stat().st_size if log.is_file() else 0
        changes, size = changes + (now != size), now


def last_line(child: Warm) -> str:
    return (["", *child.stderr.read_text().splitlines()])[-1]


@pytest.mark.slow
@pytest.mark.parametrize("script", [*SCRIPTS, "ppo_rlhf"])
def test_killed_at_random_moments(script, whole, tmp_path):
    """SIGKILL after a random time, or shortly after a random iteration: start, updates and checkpoints are hit."""
    reference, seconds = whole(script)
    rng, kills, runs, moments = random.Random(f"{SEED} {script}"), 0, 0, []
    while kills < KILLS:
        folder = tmp_path / f"{runs}"
        folder.mkdir()
        runs += 1
        code = None
        while code != 0:
            child = start(script, folder, *next_words(script, folder))
            if kills < KILLS:
                if rng.random() < 0.6:
                    wait_for_records(child, folder / "run" / "metrics.jsonl", rng.randrange(1, 8))
                    child.process.join(rng.uniform(0, 0.01) * seconds)
                else:
                    child.process.join(rng.uniform(0, 1) * seconds)
                child.process.kill()
            code = child.wait()
            assert code in (0, -signal.SIGKILL), child.stderr.read_text()
            if code:
                kills += 1
                there = (folder / "run" / "checkpoint.pt").is_file()
                steps = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)["global_step"] if there else -1
                moments.append(steps)
        assert_same_run(reference, folder / "run")
    print(f"{script}: {kills} kills in {runs} runs; steps of the last checkpoint (-1: none): {moments}")
    assert len(set(moments)) > 2, "the kills hit different parts of the run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["INT", "TERM", "INT2"]
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupted_at_random_moments(script, signals, whole, tmp_path):
    """One sentence says where it goes on; its command, pasted, goes on from there. The path has a space and a quote."""
    reference, seconds = whole(script)
    rng, folder, run_dir, hits = random.Random(f"{SEED} {script} {signals}"), tmp_path / "a b", "it's a run", 0
    while hits < 5:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        Path(f"{folder}.err").unlink(missing_ok=True)
        words, code = [*WORDS[script].split(), "--run-dir", run_dir], None
        for _ in range(3):
            child = start(script, folder, *words)
            child.process.join(rng.uniform(0.1, 0.9) * seconds)
            for number in signals:
                if child.alive():
                    child.send(number)
                    time.sleep(rng.choice([0, 0.001, 0.02]))
            code = child.wait()
            err = child.stderr.read_text()
            assert "Traceback" not in err
            if code == 0:
                break
            assert code == 128 + signals[0], err
            said = last_line(child)
            assert said.startswith(f"{script}.py: interrupted"), err
            command = re.search(r"with: (.*)$", said)
            if command is None:  # nothing there to go on with
                assert not (folder / run_dir / "checkpoint.pt").exists(), err
                continue
            hits += 1
            _, path, *words = shlex.split(command.group(1))
            assert Path(path) == ROOT / f"{script}.py"
            assert words == ["--resume", run_dir]
            step = re.search(r"from step ([\d,]+)", said)
            saved = torch.load(folder / run_dir / "checkpoint.pt", weights_only=True)["global_step"]
            assert step is None or int(step.group(1).replace(",", "")) == saved, err
            if played := re.search(r"after ([\d,]+) steps(?:, ([\d,]+) of which will be played again)?", said):
                after, again = (int((group or "0").replace(",", "")) for group in played.groups())
                assert after - again == saved, err
        if code:
            last = start(script, folder, *next_words(script, folder, run_dir))
            assert last.wait() == 0, last.stderr.read_text()
        assert_same_run(reference, folder / run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupted_in_the_closing_evaluation(script, whole, tmp_path):
    """The training is done, saved and reported before; nothing of it is lost."""
    reference, _ = whole(script)
    folder = tmp_path / "folder"
    folder.mkdir()
    child = start(script, folder, *WORDS[script].split(), "--run-dir", "run", "--eval-episodes", "5000")
    while child.alive() and "playing" not in child.stderr.read_text():
        time.sleep(0.005)
    time.sleep(0.2)
    child.send(signal.SIGINT)
    assert child.wait() == 130, child.stderr.read_text()
    assert "Traceback" not in child.stderr.read_text()
    assert last_line(child).startswith(f"{script}.py: interrupted")
    assert re.match(r".*, seed 3: return \S+ over the last \d+ episodes after [\d,]+ steps", child.stdout.read_text())
    assert sorted(path.suffix for path in (folder / "run").iterdir() if path.suffix == ".tmp") == []
    again = start(script, folder, "--resume", "run", "--eval-episodes", "0")
    assert again.wait() == 0, again.stderr.read_text()
    assert_same_run(reference, folder / "run")


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal (Linux)."""
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return mask is not None and bool(int(mask.group(1), 16) >> (number - 1) & 1)


def run_process(script: Path, folder: Path, *words: str) -> subprocess.Popen:
    """A process of its own, with the signals as a terminal's command has them."""

    def reset():
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    err = open(f"{folder}.err", "wb")
    command = [sys.executable, str(script), *words]
    return subprocess.Popen(command, cwd=folder, stdout=err, stderr=err, preexec_fn=reset, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["INT", "TERM", "INT2"]
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupted_during_the_imports(script, signals, tmp_path):
    """From the moment on when the script handles signals, which must be long before torch is imported."""
    rng, folder = random.Random(f"{SEED} {script} {signals}"), tmp_path / "folder"
    folder.mkdir()
    for attempt in range(2):
        process, begin = run_process(ROOT / f"{script}.py", folder, "--help"), time.monotonic()
        while not catches(process.pid, signal.SIGTERM) and time.monotonic() < begin + 10 and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05) if attempt else rng.uniform(0, 1))
        assert process.poll() is None
        for number in signals:
            process.send_signal(number)
            time.sleep(rng.choice([0, 0.001, 0.05]))
        code, err = process.wait(60), Path(f"{folder}.err").read_text()
        assert "Traceback" not in err
        assert code == 128 + signals[0], err
        assert re.fullmatch(rf"{script}\.py: interrupted.*\n", err)
        assert os.listdir(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_sentence_pasted_into_a_shell(script, whole, tmp_path):
    """Script and run directory in paths with spaces; the command runs as it stands, where `python` is this Python."""
    reference, _ = whole(script)
    folder = tmp_path / "a folder"
    folder.mkdir()
    copy = folder / "my copy.py"
    shutil.copy(ROOT / f"{script}.py", copy)
    process = run_process(copy, folder, *WORDS[script].split(), "--run-dir", "my run")
    log = folder / "my run" / "metrics.jsonl"
    while not (log.is_file() and log.read_bytes().count(b"\n") > 6):
        assert process.poll() is None, Path(f"{folder}.err").read_text()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, Path(f"{folder}.err").read_text()
    said = Path(f"{folder}.err").read_text().splitlines()[-1]
    command = re.search(r"with: (.*)$", said)
    assert command, said
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", "-c", command.group(1)], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = folder / "my run"
    (result / "my copy.py").rename(result / f"{script}.py")
    assert_same_run(reference, result)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_on_one_run_directory(script, whole, tmp_path):
    """Started or resumed beside a running one, or both at once: one runs, the other refuses in one sentence."""
    reference, _ = whole(script)
    first = [*WORDS[script].split(), "--run-dir", "run"]

    def assert_refused(child: Warm):
        assert child.wait() == 2, child.stderr.read_text()
        assert re.fullmatch(rf"{script}\.py: error: .*\n", child.stderr.read_text())

    for together in (False, True):
        folder = tmp_path / f"{together}"
        folder.mkdir()
        one = start(script, folder, *first)
        if not together:
            while not (folder / "run" / "checkpoint.pt").exists():
                time.sleep(0.002)
            for words in (["--resume", "run"], first, ["--resume", "run/checkpoint.pt"]):
                assert_refused(Warm(script, words, folder, stderr=f"{folder}.{len(words)}.second"))
                Path(f"{folder}.{len(words)}.second").unlink()
            assert one.wait() == 0, one.stderr.read_text()
        else:
            two = Warm(script, first, folder, stderr=f"{folder}.second")
            codes = {one.wait(), two.wait()}
            assert codes == {0, 2}, one.stderr.read_text() + two.stderr.read_text()
        assert_same_run(reference, folder / "run")
    folder = tmp_path / "resumed"
    folder.mkdir()
    one = start(script, folder, *first)
    while not (folder / "run" / "checkpoint.pt").exists():
        time.sleep(0.002)
    one.process.kill()
    one.wait()
    both = [Warm(script, ["--resume", "run"], folder, stderr=f"{folder}.{i}.err") for i in range(2)]
    codes = {child.wait() for child in both}
    assert codes == {0, 2}, [child.stderr.read_text() for child in both]
    assert_same_run(reference, folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_runs_started_in_the_same_second_have_directories_of_their_own(script, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    children = [Warm(script, WORDS[script].split(), folder, stderr=f"{folder}.{i}") for i in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0], [child.stderr.read_text() for child in children]
    assert len(list(folder.glob("runs/*/checkpoint.pt"))) == 3
