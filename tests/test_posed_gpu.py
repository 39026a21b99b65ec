"""The --device cuda path of the scripts, uncompiled, on a stand-in for a GPU (posed_gpu.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ppo_continuous
from helpers import read_checkpoint, read_jsonl

ROOT = Path(ppo_continuous.__file__).parent
T, ITERATIONS = 4, 3
COMMON = f"--num-envs 2 --num-steps {T} --total-timesteps {2 * T * ITERATIONS} --num-minibatches 2 --update-epochs 2"
COMMON += " --checkpoint-every 2 --eval-episodes 0 --num-threads 1 --env"
GAMES = "Skiing --max-episode-steps 3"  # games end
CASES = {
    "ppo_continuous.py": "Hopper",
    "ppo_kl_penalty.py": "Hopper --norm-adv batch",
    "ppo_shared_params.py": "CartPole-v1",
    "ppo_atari.py": f"{GAMES} --target-kl 0.1",
}


def run_posed(script: Path, flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(Path(__file__).with_name("posed_gpu.py")), str(script), *flags.split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("script", CASES)
def test_the_path_of_a_gpu_gives_the_parameters_of_the_cpu(script):
    flags = f"{COMMON} {CASES[script]} --run-dir"
    done = run_posed(ROOT / script, f"{flags} posed")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, str(ROOT / script), "--device", "cpu", "--no-compile", *flags.split(), "cpu"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    posed, cpu = read_checkpoint("posed"), read_checkpoint("cpu")
    assert posed["args"]["device"] == "cuda"
    assert posed["iteration"] == ITERATIONS
    assert torch.equal(posed["theta"], cpu["theta"])
    assert all(map(torch.equal, posed["adam"], cpu["adam"]))
    assert read_jsonl("posed/episodes.jsonl") == read_jsonl("cpu/episodes.jsonl")
    if script == "ppo_atari.py":
        assert read_jsonl("cpu/episodes.jsonl")
        events = json.loads(done.stdout.splitlines()[-1])
        assert events["to the host, waits"]["play"] == T * ITERATIONS  # once per step: for the actions
        assert events["to the device"] == {"play": T * ITERATIONS}  # frames, without waiting


@pytest.mark.parametrize(
    ("line", "edited", "error"),
    [
        ("order = torch.randperm(len(batch.valid)).to(args.device)", "order = torch.randperm(len(batch.valid))", "same device"),
        (
            "obs[t + 1].copy_(self.frames, non_blocking=True)",
            "obs[t + 1].copy_(self.frames, non_blocking=True); self.frames.zero_()",
            "overwritten before the device had read it",
        ),
        ("self.actions[t].cpu().numpy()", "self.actions[t].numpy()", "can't convert cuda:0 device type tensor to numpy"),
    ],
)
def test_the_stand_in_notices_what_a_gpu_would(line, edited, error):
    text = (ROOT / "ppo_atari.py").read_text()
    assert text.count(line) == 1
    Path("edited.py").write_text(text.replace(line, edited))
    done = run_posed(Path("edited.py"), f"{COMMON} {GAMES} --run-dir posed")
    assert done.returncode == 1
    assert error in done.stderr
