"""Whole runs: reproducible, killed and resumed, interrupted, copied, evaluated, logged."""

import functools
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import ppo_continuous
from helpers import SCRIPT, equal, read_checkpoint, read_jsonl, read_metrics, run_script, tiny_args, tiny_flags
from ppo_continuous import evaluate, load_checkpoint, train
from warm import Warm


@pytest.fixture
def command_line(run_here):
    """Words of `ppo_continuous.py words...` -> exit code, stdout, stderr."""
    return functools.partial(run_here, "ppo_continuous")


def test_same_seed_same_bits_other_seed_other_numbers():
    settings = {"env": "Hopper", "num_steps": 64, "total_timesteps": 3 * 128, "checkpoint_every": 2}
    for run_dir, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny_args(run_dir, seed=seed, **settings))
    assert read_metrics("a") == read_metrics("b")
    assert Path("a/episodes.jsonl").read_bytes() == Path("b/episodes.jsonl").read_bytes()
    assert len(read_jsonl("a/episodes.jsonl")) > 3
    a, b, c = (read_checkpoint(run_dir) for run_dir in "abc")
    for key in a.keys() - {"args", "log_sizes", "wandb_id"}:
        assert equal(a[key], b[key]), key
        if key not in ("kind", "script_sha256", "iteration", "global_step", "spaces"):
            assert not equal(a[key], c[key]), key
    assert [r["losses/value_loss"] for r in read_metrics("a")[1:]] != [r["losses/value_loss"] for r in read_metrics("c")[1:]]


def test_log_files():
    train(tiny_args())
    header, *records = read_jsonl("run/metrics.jsonl")
    assert header["args"]["seed"] == 1
    assert header["script"] == "ppo_continuous.py"
    assert header["versions"].keys() >= {"python", "torch", "numpy", "envpool", "gymnasium"}
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    assert [record["global_step"] for record in records] == [64, 128, 192, 256]
    np.testing.assert_allclose([r["charts/learning_rate"] for r in records], [3e-4, 2.25e-4, 1.5e-4, 0.75e-4])
    names = "policy_loss value_loss entropy approx_kl old_approx_kl clipfrac explained_variance grad_norm"
    for record in records:
        assert record.keys() >= {f"losses/{name}" for name in names.split()} | {"charts/SPS", "charts/seconds"}
    episodes = read_jsonl("run/episodes.jsonl")
    returns = [e["return"] for e in episodes if e["global_step"] <= 64]
    assert records[0]["charts/episodic_return"] == pytest.approx(np.mean(returns))
    assert Path("run/ppo_continuous.py").read_bytes() == SCRIPT.read_bytes()
    assert sorted(os.listdir("run")) == ["checkpoint.pt", "episodes.jsonl", "metrics.jsonl", "ppo_continuous.py"]


def test_episodic_return_is_the_mean_of_the_last_100_episodes():
    result = train(tiny_args(env="envs:Identity-v0", num_steps=256, total_timesteps=3 * 512))
    returns = [episode["return"] for episode in read_jsonl("run/episodes.jsonl")]
    assert len(returns) > 150
    assert result["episodes"] == 100
    assert result["episodic_return"] == pytest.approx(np.mean(returns[-100:]), rel=1e-12)
    assert result["episodic_return"] != pytest.approx(np.mean(returns), rel=1e-3)


def start(*words) -> Warm:
    """`ppo_continuous.py words...` in a process of its own, which writes into child.txt."""
    return Warm("ppo_continuous", [*map(str, words)], Path("."), "child.txt", "child.txt")


def wait_until(condition, child: Warm):
    deadline = time.monotonic() + 300
    while not condition():
        assert child.alive(), "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("checkpoint_every", [1, 4])
def test_killed_at_ten_moments_and_resumed(checkpoint_every):
    """checkpoint_every 1: a kill often hits the writing of a checkpoint; 4: most lose iterations that must come again."""
    iterations = 24
    settings = {
        "num_steps": 16,
        "num_minibatches": 1,
        "update_epochs": 1,
        "total_timesteps": iterations * 32,
        "checkpoint_every": checkpoint_every,
    }
    assert start(*tiny_flags("whole", **settings)).wait() == 0
    times = [record["charts/seconds"] for record in read_jsonl("whole/metrics.jsonl")[1:]]
    iteration_time = (times[-1] - times[0]) / (iterations - 1)

    rng, metrics, reached = random.Random(checkpoint_every), Path("killed/metrics.jsonl"), []
    words = tiny_flags("killed", **settings)
    for kill in range(10):
        child = start(*words)
        if kill == 0:
            wait_until(Path("killed/checkpoint.pt").exists, child)
        target = 2 * kill + rng.choice([0, 1])  # lines of the log to be there before the kill: it goes on from kill to kill
        wait_until(lambda target=target: metrics.read_bytes().count(b"\n") > target, child)
        time.sleep(rng.uniform(0, 1.5 * iteration_time))
        child.kill()
        reached.append(read_checkpoint("killed")["iteration"])
        words = ["--resume", "killed"]
    assert len(set(reached)) >= 3  # the kills hit different parts of the run
    assert start("--resume", "killed").wait() == 0, Path("child.txt").read_text()

    whole, killed = read_checkpoint("whole"), read_checkpoint("killed")
    assert killed["iteration"] == iterations
    for key in whole.keys() - {"args", "log_sizes"}:
        assert equal(whole[key], killed[key]), key
    assert Path("whole/episodes.jsonl").read_bytes() == Path("killed/episodes.jsonl").read_bytes()
    assert len(read_jsonl("whole/episodes.jsonl")) > 20
    assert read_metrics("whole") == read_metrics("killed")


def test_resume_of_a_finished_run_changes_nothing_and_evaluates(command_line):
    train(tiny_args(checkpoint_every=3))
    files = {path: path.read_bytes() for path in Path("run").iterdir() if path.name != "checkpoint.pt"}
    before = read_checkpoint("run")
    code, out, _ = command_line("--resume", "run", "--eval-episodes", 2)
    assert code == 0
    assert "over 2 episodes" in out
    assert {path: path.read_bytes() for path in files} == files
    assert equal(read_checkpoint("run"), before)


def test_resume_keeps_schedule_and_settings(command_line):
    """The flags of the first command need not be given again, and others than those of the machine must not be changed."""
    train(tiny_args(learning_rate=1e-3, seed=5))
    code, _, err = command_line("--resume", "run/checkpoint.pt", "--learning-rate", "0.1", "--seed", "6")
    assert code == 2
    assert "--seed" in err
    assert "--learning-rate" in err
    assert command_line("--resume", "run", "--no-compile", "--seed", "5")[0] == 0
    assert len(read_jsonl("run/metrics.jsonl")) == 5


def test_resume_reads_the_other_flags_with_the_saved_settings(command_line):
    train(tiny_args())  # 4 iterations of 64 steps, where the defaults would need 2048
    assert command_line("--resume", "run", "--total-timesteps", 6 * 64)[0] == 0
    assert [record["iteration"] for record in read_metrics("run")[1:]] == [1, 2, 3, 4, 5, 6]


def test_evaluation_has_frozen_statistics_and_repeats_itself():
    train(tiny_args(env="Hopper", num_steps=64, total_timesteps=3 * 128))
    before = Path("run/checkpoint.pt").read_bytes()
    checkpoint, _ = load_checkpoint("run")
    untouched = read_checkpoint("run")
    args = tiny_args(env="Hopper", eval_episodes=3)
    first, second = evaluate(args, checkpoint), evaluate(args, checkpoint)
    assert first == second
    assert equal(checkpoint, untouched)
    assert Path("run/checkpoint.pt").read_bytes() == before
    assert len(set(first["returns"])) == 3  # different environments
    sampled = tiny_args(env="Hopper", eval_episodes=3, eval_deterministic=False)
    assert evaluate(sampled, checkpoint) == evaluate(sampled, checkpoint) != first
    checkpoint["obs_rms"]["mean"] += 1.0
    assert evaluate(args, checkpoint) != first  # the statistics of training are used


def test_evaluation_against_playing_by_hand():
    """Torch instead of numpy for the policy, one Gymnasium environment instead of a vector; actions beyond the bounds."""
    train(tiny_args())
    checkpoint = read_checkpoint("run")
    agent = ppo_continuous.Agent(2, 1)
    torch.nn.utils.vector_to_parameters(checkpoint["theta"], agent.parameters())
    assert agent.log_std is not None
    with torch.no_grad():
        for parameter in agent.actor[-1].parameters():
            parameter.mul_(100)
        agent.log_std.fill_(-1)
    checkpoint["theta"] = torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
    rms = {key: np.asarray(value) for key, value in checkpoint["obs_rms"].items()}
    for deterministic in (True, False):
        args = tiny_args(eval_episodes=2, eval_deterministic=deterministic)
        rng = np.random.default_rng([args.seed, 2**31])
        seeds = rng.integers(2**31, size=2).tolist()
        # step, episode, action
        noise = np.zeros((20, 2, 1)) if deterministic else rng.standard_normal((20, 2, 1), dtype=np.float32)
        returns, lengths, means = [], [], []
        for episode, seed in enumerate(seeds):
            env = ppo_continuous.gymnasium.make("envs:Point-v0")
            obs, _ = env.reset(seed=seed)
            total, length, done = 0.0, 0, False
            while not done:
                x = np.clip((obs - rms["mean"]) / np.sqrt(rms["m2"] / rms["count"] + 1e-8), -10, 10)
                with torch.no_grad():
                    mean = agent.actor(torch.as_tensor(x, dtype=torch.float32)).numpy()
                action = np.clip(mean + math.exp(-1) * noise[length, episode], -1, 1)
                obs, reward, terminated, truncated, _ = env.step(action)
                total, length, done = total + float(reward), length + 1, terminated or truncated
                means.append(mean.item())
            returns.append(total)
            lengths.append(length)
        assert max(map(abs, means)) > 1
        evaluation = evaluate(args, checkpoint)
        assert evaluation["lengths"] == lengths
        np.testing.assert_allclose(evaluation["returns"], returns, rtol=1e-4)


def test_evaluate_command_writes_a_gif(command_line):
    train(tiny_args(env="envs:Identity-v0"))
    before = Path("run/checkpoint.pt").read_bytes()
    code, out, _ = command_line("--evaluate", "run", "--env", "envs:Identity-v0", "--capture-video", "--eval-episodes", 2)
    assert code == 0
    assert "evaluation, likeliest actions: return" in out
    with Image.open("run/evaluation.gif") as gif:
        assert gif.size == (64, 32)
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
    assert Path("run/checkpoint.pt").read_bytes() == before
    env = ppo_continuous.gymnasium.make("envs:Identity-v0", render_mode="rgb_array")
    env.reset(seed=np.random.default_rng([1, 2**31]).integers(2**31, size=2).tolist()[0])
    expected = []
    for step in range(8):
        if step % 2 == 0:
            expected.append(env.render())
        env.step(np.zeros(1, np.float32))
    np.testing.assert_array_equal(frames, expected)


@pytest.mark.skipif(ppo_continuous.ctypes.util.find_library("EGL") is None, reason="MuJoCo draws with OpenGL: no libEGL")
def test_gif_of_mujoco(command_line):
    train(tiny_args(env="InvertedPendulum"))
    assert command_line("--evaluate", "run", "--capture-video", "--eval-episodes", 1)[0] == 0
    with Image.open("run/evaluation.gif") as gif:
        assert gif.size == (320, 240)
        assert np.asarray(gif.convert("L")).std() > 1  # shows something


def test_evaluation_of_a_run_without_one_plays_the_default_number(command_line):
    train(tiny_args(eval_episodes=0))
    code, out, _ = command_line("--evaluate", "run", "--env", "envs:Point-v0")
    assert code == 0
    assert "over 10 episodes" in out


@pytest.mark.parametrize("deterministic", [True, False])
def test_actions_are_of_the_type_of_the_action_space(deterministic):
    """In training and evaluation; the environment refuses numbers of a wider type."""
    result = train(tiny_args(env="envs:StrictActions-v0", eval_episodes=2, eval_deterministic=deterministic))
    assert result["evaluation"]["lengths"] == [8, 8]


def test_killed_after_an_extension_a_run_goes_on_to_its_new_end(command_line):
    """Killed as soon as the checkpoint has the new end, of which the run is still 36 iterations away."""
    end = 40 * 64
    train(tiny_args("whole"))
    train(tiny_args("run"))
    assert command_line("--resume", "whole", "--total-timesteps", end)[0] == 0
    child = start("--resume", "run", "--total-timesteps", end)
    wait_until(lambda: read_checkpoint("run")["args"]["total_timesteps"] == end, child)
    child.kill()
    assert read_checkpoint("run")["iteration"] < 40
    assert command_line("--resume", "run")[0] == 0
    assert read_checkpoint("run")["iteration"] == 40
    assert equal(read_checkpoint("run")["theta"], read_checkpoint("whole")["theta"])
    assert read_metrics("run") == read_metrics("whole")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_of_a_gpu_is_evaluated_without_one_but_resumed_only_if_told_to(command_line):
    train(tiny_args())
    checkpoint = read_checkpoint("run")
    checkpoint["args"]["device"] = "cuda:1"
    torch.save(checkpoint, "run/checkpoint.pt")
    code, _, err = command_line("--resume", "run", "--total-timesteps", 5 * 64)
    assert code == 2
    assert "device is cuda:1, but torch finds 0 GPU(s) here: use --device cpu" in err
    assert command_line("--evaluate", "run", "--env", "envs:Point-v0", "--eval-episodes", 1)[0] == 0
    assert command_line("--resume", "run", "--total-timesteps", 5 * 64, "--device", "cpu")[0] == 0
    assert read_checkpoint("run")["args"]["device"] == "cpu"


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_without_a_compiler_one_line_warns_and_the_run_is_the_eager_one(command_line, monkeypatch, missing):
    train(tiny_args("eager"))
    if missing == "compiler":
        monkeypatch.setenv("CXX", "/nonexistent")
    else:
        monkeypatch.setenv("CXX", "")  # the default one
        monkeypatch.setattr(ppo_continuous.sysconfig, "get_path", lambda name: "/nonexistent")
    code, _, err = command_line(*tiny_flags("run", compile=True))
    assert code == 0
    assert [line for line in err.splitlines() if "compil" in line] == [
        "warning: no compiler or no Python.h found, so the update runs uncompiled, several times slower"
    ]
    assert torch.equal(read_checkpoint("run")["theta"], read_checkpoint("eager")["theta"])


def test_renamed_copy_alone_in_an_empty_directory():
    shutil.copy(SCRIPT, "my_experiment.py")
    words = tiny_flags("", env="InvertedPendulum", eval_episodes=1)
    words = words[: words.index("--run-dir")] + words[words.index("--run-dir") + 2 :]
    done = run_script(*words, script="my_experiment.py", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir()) == ["my_experiment.py", "runs"]
    (run_dir,) = Path("runs").iterdir()
    assert run_dir.name.startswith("my_experiment__InvertedPendulum__1__")
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoint.pt",
        "episodes.jsonl",
        "evaluation.json",
        "metrics.jsonl",
        "my_experiment.py",
    ]
    assert read_jsonl(run_dir / "metrics.jsonl")[0]["script"] == "my_experiment.py"
    assert f"run directory: {run_dir}" in done.stdout
    assert "evaluation, likeliest actions" in done.stdout
    assert done.stdout.startswith("InvertedPendulum, seed 1: return ")


def test_interrupt_leaves_a_checkpoint_and_says_how_to_go_on():
    settings = {"total_timesteps": 64 * 1000, "checkpoint_every": 2}
    child = start(*tiny_flags("run", **settings))
    wait_until(Path("run/checkpoint.pt").exists, child)
    wait_until(lambda: Path("run/metrics.jsonl").read_bytes().count(b"\n") > 3, child)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    err = Path("child.txt").read_text()
    said = re.fullmatch(r".*: interrupted after ([\d,]+) steps(.*); go on from step ([\d,]+) with: (.*)", err.splitlines()[-1])
    assert said is not None
    reached, lost, saved = (int(x.replace(",", "") or 0) for x in (said[1], re.sub(r"[^\d,]", "", said[2]), said[3]))
    assert reached - saved == lost
    assert saved == read_checkpoint("run")["global_step"]
    assert said[4] == f"python {SCRIPT} --resume run"
    assert "Traceback" not in err
    reached = read_checkpoint("run")["iteration"]
    assert reached >= 2

    # it can be resumed: to an end that is near
    words = ["--resume", "run", "--total-timesteps", str(64 * (reached + 40))]
    assert start(*words).wait() == 0, Path("child.txt").read_text()
    assert read_checkpoint("run")["iteration"] == reached + 40
    assert [r["iteration"] for r in read_jsonl("run/metrics.jsonl")[1:]] == list(range(1, reached + 41))


def test_restarts_that_leave_no_time_for_an_episode_are_reported(command_line):
    """The episodes of Point last up to 20 steps, those of ConstantReward 8."""
    short = {"env": "envs:ConstantReward-v0", "num_steps": 4, "total_timesteps": 4 * 8, "checkpoint_every": 1}
    code, _, err = command_line(*tiny_flags("short", **short))
    assert code == 0
    told = "warning: no episode ended within 4 steps, after which environments start afresh: raise --checkpoint-every"
    assert err.count(f"{told}\n") == 3
    code, _, err = command_line(*tiny_flags("long", **short | {"checkpoint_every": 3}))
    assert "no episode ended" not in err
    code, _, err = command_line(*tiny_flags("clock", **short | {"checkpoint_every": 3, "checkpoint_minutes": 1e-9}))
    assert err.count(f"{told} and --checkpoint-minutes\n") == 3


def test_wandb_offline():
    done = run_script(*tiny_flags("run", track=True), WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    (record,) = Path("run/wandb").glob("offline-run-*/run-*.wandb")
    text = record.read_bytes()
    for key in ("losses/value_loss", "losses/approx_kl", "charts/learning_rate", "charts/episodic_return", "charts/SPS"):
        assert key.encode() in text, key
    assert len(read_jsonl("run/metrics.jsonl")) == 5


def test_wandb_run_has_an_id_of_its_own_that_a_resumed_run_keeps():
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for folder in ("a/same_name", "b/same_name"):
        assert run_script(*tiny_flags(folder, track=True), **offline).returncode == 0
    ids = [read_checkpoint(folder)["wandb_id"] for folder in ("a/same_name", "b/same_name")]
    assert ids[0] != ids[1]
    done = run_script("--resume", "a/same_name", "--total-timesteps", "320", **offline)
    assert done.returncode == 0, done.stderr
    assert read_checkpoint("a/same_name")["wandb_id"] == ids[0]
    runs = Path("a/same_name/wandb").glob("offline-run-*")
    assert {run.name.rsplit("-", 1)[1] for run in runs} == {ids[0]}
