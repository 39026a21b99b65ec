"""The --device cuda path of the scripts, uncompiled, on a stand-in for a GPU (posed_gpu.py)."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import posed_gpu
import ppo_continuous
from helpers import read_checkpoint, read_jsonl
from warm import CONTEXT, Warm, run_child

ROOT = Path(ppo_continuous.__file__).parent
T, ITERATIONS = 4, 3
COMMON = f"--num-envs 2 --num-steps {T} --total-timesteps {2 * T * ITERATIONS} --num-minibatches 2 --update-epochs 2"
COMMON += " --checkpoint-every 2 --eval-episodes 1 --eval-steps 20 --num-threads 1 --env"
GAMES = "Skiing --max-episode-steps 3"  # games end
CASES = {
    "ppo_continuous.py": "Hopper",
    "ppo_kl_penalty.py": "Hopper --norm-adv batch",
    "ppo_shared_params.py": "CartPole-v1",
    "ppo_atari.py": GAMES,
}


# of ppo_atari.py: once a step for the actions; once an iteration for the values and the losses; once at each of the three
# checkpoints, to see that all is finite; and in the evaluation of three steps twice to hand over what a policy needs, and once
# for its actions
WAITS = {"play": T * ITERATIONS, "make_batch": ITERATIONS, "learn": ITERATIONS, "save": 3, "policy": 3 * 3}


# functions that every minibatch calls: there a wait would cost most
IN_A_MINIBATCH = {"update", "loss", "compute_gradient", "flat_gradient", "adam_step", "ppo_loss", "masked_mean"}
IN_A_MINIBATCH |= {"normalize_advantages", "gaussian_kl", "forward", "hidden"}


def run_posed(script: Path, flags: str) -> subprocess.CompletedProcess:
    """posed_gpu.py SCRIPT flags..., forked from a process that has imported torch."""
    files = [Path("posed.out"), Path("posed.err")]
    for file in files:
        file.write_bytes(b"")
    words = (str(script), *flags.split())
    process = CONTEXT.Process(target=run_child, args=(posed_gpu.main, words, os.getcwd(), *map(str, files)))
    process.start()
    process.join(600)
    return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in files))


def run_edited(line: str, edited: str, run_dir: str = "posed", more: str = "") -> subprocess.CompletedProcess:
    """ppo_atari.py with a change, on the stand-in."""
    text = (ROOT / "ppo_atari.py").read_text()
    assert text.count(line) == 1
    Path("edited.py").write_text(text.replace(line, edited))
    return run_posed(Path("edited.py"), f"{COMMON} {CASES['ppo_atari.py']} --run-dir {run_dir} {more}")


def events_of(done: subprocess.CompletedProcess) -> dict[str, dict[str, int]]:
    return json.loads(done.stdout.splitlines()[-1])


def waits_in(done: subprocess.CompletedProcess) -> dict[str, int]:
    """Function of the script -> how often the host waited for the device in it."""
    counts: dict[str, int] = {}
    for kind, of_functions in events_of(done).items():
        for name, count in of_functions.items() if "waits" in kind else ():
            counts[name] = counts.get(name, 0) + count
    return counts


def waits_of(done: subprocess.CompletedProcess) -> dict[str, int]:
    """The same of ppo_atari.py, from the first rollout on."""
    counts = waits_in(done)
    for before in ("make_agent", "load", "<genexpr>"):  # where parameters are set, and compared
        del counts[before]
    return counts


def same_results(posed: Path | str, cpu: Path | str):
    a, b = read_checkpoint(posed), read_checkpoint(cpu)
    assert (a["args"]["device"], a["iteration"]) == ("cuda", ITERATIONS)
    assert torch.equal(a["theta"], b["theta"])
    assert all(map(torch.equal, a["adam"], b["adam"]))
    assert read_jsonl(f"{posed}/episodes.jsonl") == read_jsonl(f"{cpu}/episodes.jsonl")
    evaluations = [json.loads(Path(run, "evaluation.json").read_text()) for run in (posed, cpu)]
    assert evaluations[0] == evaluations[1]
    assert evaluations[0]["problems"] == []


def run_on_cpu(script: str, flags: str):
    words = ["--device", "cpu", "--no-compile", *flags.split(), "--run-dir", "cpu"]
    assert Warm(Path(script).stem, words, Path.cwd(), "cpu.out", "cpu.err").wait() == 0, Path("cpu.err").read_text()


@pytest.mark.parametrize("script", CASES)
def test_the_path_of_a_gpu_gives_the_parameters_of_the_cpu(script):
    flags = f"{COMMON} {CASES[script]}"
    done = run_posed(ROOT / script, f"{flags} --run-dir posed")
    assert done.returncode == 0, done.stderr
    run_on_cpu(script, flags)
    same_results("posed", "cpu")
    assert not IN_A_MINIBATCH & waits_in(done).keys()
    if script == "ppo_atari.py":
        assert read_jsonl("cpu/episodes.jsonl")
        assert waits_of(done) == WAITS
        assert set(events_of(done)["to the device"]) == {"show", "upload"}  # without waiting


@pytest.mark.skipif(not shutil.which("gcc"), reason="no compiler here")
def test_as_cuda_graphs_it_gives_the_parameters_of_the_cpu_too(monkeypatch):
    """With --target-kl, for which the host waits once an epoch."""
    monkeypatch.setenv("CC", "gcc")
    flags = f"{COMMON} {GAMES} --target-kl 1"
    done = run_posed(ROOT / "ppo_atari.py", f"{flags} --run-dir posed --compile")
    assert done.returncode == 0, done.stderr
    run_on_cpu("ppo_atari.py", flags)
    same_results("posed", "cpu")
    assert waits_of(done) == WAITS | {"learn": (1 + 2) * ITERATIONS}
    events = events_of(done)
    assert events["compiled"] == {f"{f}: triton.cudagraphs, deterministic": 1 for f in ("act", "update")}
    assert events["device set"] == {"cuda:0": 2}  # to train and to evaluate
    assert events["settings"] == {"products high": 1, "cudnn deterministic True": 1}


@pytest.mark.skipif(not shutil.which("gcc"), reason="no compiler here")
@pytest.mark.parametrize(
    ("line", "edited", "error"),
    [
        ("mark_static(args, theta, *adam, *runner.memory)", "pass", "act would copy inputs that are not static"),
        ("mark_static(args, theta, *adam,", "mark_static(args, *adam,", "update would copy inputs that are not static"),
        ("*adam, *runner.memory)", "*adam, runner.memory[0])", "act changes inputs that are not static"),
        ("mark_static(args, batch.obs)", "pass", "update would copy inputs that are not static"),
        ("mark_step(args)\n            # one", "# one", "act is called twice without a mark"),
        ("mark_step(args)\n        act(", "act(", "act is called twice without a mark"),
        ("mark_step(args)\n            info", "info", "update is called twice without a mark"),
        ("torch.stack(list(info.values())))", "info['approx_kl'].expand(7))", "'grad_norm': nan"),  # no copy
    ],
)
def test_the_stand_in_notices_what_a_cuda_graph_would_not_do(monkeypatch, line, edited, error):
    monkeypatch.setenv("CC", "gcc")
    done = run_edited(line, edited, more="--compile")
    assert done.returncode == 1
    assert error in done.stderr


@pytest.mark.parametrize(
    ("line", "edited", "error"),
    [
        ("order = upload(torch.randperm(len(batch.valid)), args)", "order = torch.randperm(len(batch.valid))", "same device"),
        (
            "self.frames.copy_(self.pinned, non_blocking=True)",
            "self.frames.copy_(self.pinned, non_blocking=True); self.pinned.zero_()",
            "overwritten before the device had read it",
        ),
        ("memory).cpu().numpy()", "memory).numpy()", "can't convert cuda:0 device type tensor to numpy"),
        ("memory).cpu().numpy()", "memory).to('cpu', non_blocking=True).numpy()", "overwritten before"),
        ("(means, args).tolist()", "(means, args).to('cpu', non_blocking=True).tolist()", "'grad_norm': nan"),
        (
            "x.contiguous().pin_memory().to(",
            "globals().setdefault(f'{x.shape} {x.dtype}', x.contiguous().pin_memory()).copy_(x).to(",
            "overwritten before the device had read it",
        ),
    ],
)
def test_the_stand_in_notices_what_a_gpu_would(line, edited, error):
    done = run_edited(line, edited)
    assert done.returncode == 1
    assert error in done.stderr


@pytest.mark.parametrize(
    ("line", "edited", "more"),
    [
        ("info = update(theta", "float(theta[0]); info = update(theta", {"learn": 4 * ITERATIONS}),
        ("pin_memory().to(args.device, non_blocking=True)", "to(args.device)", {"upload": (3 + 2) * ITERATIONS}),
        ("self.frames.copy_(self.pinned, non_blocking=True)", "self.frames.copy_(self.pinned)", {"show": T * ITERATIONS + 2}),
        (
            "return torch.where(variance",
            "assert variance > -1; return torch.where(variance",
            {"explained_variance": ITERATIONS},
        ),
        ("mark_static(args, batch.obs)", "batch.advantage[batch.valid > 0].mean()", {"make_batch": ITERATIONS}),
    ],
)
def test_an_additional_wait_is_counted(line, edited, more):
    done = run_edited(line, edited)
    assert done.returncode == 0, done.stderr
    assert waits_of(done) == {name: WAITS.get(name, 0) + more.get(name, 0) for name in WAITS | more}


@pytest.mark.parametrize(
    ("line", "edited"),
    [
        (".permute(0, 2, 4, 1, 3, 5)", ".permute(0, 2, 4, 1, 5, 3)"),
        ("np.copyto(self.pinned.numpy(), frames)", "np.copyto(self.pinned.numpy()[:1], frames[:1])"),
    ],
)
def test_other_frames_give_other_parameters(line, edited):
    for run_dir, change in (("as_it_is", line), ("edited", edited)):
        done = run_edited(line, change, run_dir)
        assert done.returncode == 0, done.stderr
    assert not torch.equal(read_checkpoint("edited")["theta"], read_checkpoint("as_it_is")["theta"])
