"""Command lines as CleanRL's documentation and benchmark scripts give them: each runs, or one sentence says what to use.

The scripts run in this process, with short rollouts after the line's own flags; W&B is switched off where a line tracks.
"""

import re
from pathlib import Path

import pytest
import torch

from helpers import read_checkpoint

CONTINUOUS, SHARED, ATARI = "ppo_continuous", "ppo_shared_params", "ppo_atari"
SHORT = "--num-steps 16 --num-minibatches 2 --update-epochs 1 --total-timesteps 256 --eval-episodes 0 --no-compile"
SHORT += " --num-threads 1 --run-dir run"
BOTH = "--env-id {} --seed 1 --cuda False --track"  # what benchmark.py makes of its --env-ids and --command
NEW = "--env_id {} --seed 1 --no_cuda --track"


@pytest.fixture
def command_line(monkeypatch, run_here):
    """Runs `script.py words...` in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return run_here


RUN = [
    # the lines of its MuJoCo, classic control and Atari benchmarks, today's spelling and that of the years before
    (CONTINUOUS, BOTH.format("HalfCheetah-v4"), {"env": "HalfCheetah-v4", "device": "cpu", "track": True}),
    (CONTINUOUS, NEW.format("HalfCheetah-v4") + " --total_timesteps 512", {"env": "HalfCheetah-v4", "total_timesteps": 512}),
    *((CONTINUOUS, BOTH.format(f"{name}-v4"), {"env": f"{name}-v4"}) for name in ("Walker2d", "Hopper", "InvertedPendulum")),
    *((CONTINUOUS, NEW.format(f"{name}-v4"), {"env": f"{name}-v4"}) for name in ("Humanoid", "Pusher", "Ant")),
    (CONTINUOUS, "--env-id Hopper-v4 --num-envs 1 --num-steps 64 --total-timesteps 128", {"num_steps": 64}),
    ("ppo_kl_penalty", BOTH.format("Hopper-v4"), {"env": "Hopper-v4", "device": "cpu"}),
    *((SHARED, BOTH.format(name), {"env": name}) for name in ("CartPole-v1", "Acrobot-v1", "MountainCar-v0")),
    (SHARED, "--no_cuda --track --env-id CartPole-v1 --seed 2", {"env": "CartPole-v1", "seed": 2}),
    *(
        (ATARI, BOTH.format(f"{name}NoFrameskip-v4"), {"env": f"{name}NoFrameskip-v4"})
        for name in ("Pong", "BeamRider", "Breakout")
    ),
    (ATARI, NEW.format("Breakout-v5") + " --num-envs 2", {"env": "Breakout-v5", "num_envs": 2}),
    # the usage of ppo.md and of the README
    (SHARED, "--env-id CartPole-v1 --track --wandb-project-name cleanRL", {"wandb_project_name": "cleanRL"}),
    (SHARED, "--seed 1 --env-id CartPole-v1 --total-timesteps 512 --track --wandb-entity me", {"wandb_entity": "me"}),
    (CONTINUOUS, "--env-id Hopper-v4 --torch-deterministic True --cuda True", {"env": "Hopper-v4"}),
    (CONTINUOUS, "--env_id=Hopper-v4 --torch_deterministic --cuda=False --capture_video=False", {"capture_video": False}),
    (CONTINUOUS, "--env-id Hopper-v4 --cuda --no-track --no-capture-video", {"track": False}),
    (CONTINUOUS, "--env-id Hopper-v4 --save-model", {"env": "Hopper-v4"}),
    (CONTINUOUS, "--env-id Hopper-v4 --save_model True", {"env": "Hopper-v4"}),
    # settings of an algorithm, with truth values as words
    (CONTINUOUS, "--env-id Hopper-v4 --anneal-lr False --clip-vloss False", {"anneal_lr": False, "clip_vloss": False}),
    (CONTINUOUS, "--env-id Hopper-v4 --anneal_lr true --no_clip_vloss", {"anneal_lr": True, "clip_vloss": False}),
    (CONTINUOUS, "--env-id Hopper-v4 --norm-adv False", {"norm_adv": "none"}),
    (CONTINUOUS, "--env-id Hopper-v4 --norm-adv True", {"norm_adv": "minibatch"}),
    (CONTINUOUS, "--env-id Hopper-v4 --no-norm-adv", {"norm_adv": "none"}),
    (CONTINUOUS, "--env-id Hopper-v4 --no_norm_adv", {"norm_adv": "none"}),
    (
        CONTINUOUS,
        "--env-id Hopper-v4 --learning_rate 3e-4 --gae_lambda 0.9 --clip_coef 0.1 --ent_coef 0.01 --vf_coef 0.4 "
        "--max_grad_norm 1.0 --target_kl 0.02 --gamma 0.98",
        {"gae_lambda": 0.9, "clip_coef": 0.1, "ent_coef": 0.01, "vf_coef": 0.4, "target_kl": 0.02, "gamma": 0.98},
    ),
]


def without_short(words: list[str]) -> list[str]:
    """SHORT without the flags that the line has itself."""
    own = {word.split("=")[0].replace("_", "-") for word in words}
    short = re.findall(r"--\S+(?: [^-]\S*)?", SHORT)
    return [part for flag in short if flag.split()[0] not in own for part in flag.split()]


@pytest.mark.parametrize(("script", "line", "settings"), RUN, ids=lambda x: x if isinstance(x, str) else "")
def test_a_line_that_runs(command_line, script, line, settings):
    words = line.split()
    code, _, err = command_line(script, *words, *without_short(words))
    assert code == 0, err
    saved = read_checkpoint("run")
    assert {name: saved["args"][name] for name in settings} == settings
    assert saved["iteration"] > 0
    if "--cuda False" in line or "--no_cuda" in line:
        assert saved["args"]["device"] == "cpu"


def test_cuda_true_takes_a_gpu_where_there_is_one(command_line):
    assert command_line(SHARED, "--env-id", "CartPole-v1", "--cuda", "True", *without_short([]))[0] == 0
    assert read_checkpoint("run")["args"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


REFUSED = [
    ("--exp-name test", r"--exp-name.*--run-dir"),
    ("--exp_name=test", r"--exp-name.*--run-dir"),
    ("--torch-deterministic False", r"deterministic.*always|always.*deterministic"),
    ("--no-torch-deterministic", r"deterministic.*always|always.*deterministic"),
    ("--no_save_model", r"model.*always"),
    ("--upload-model", r"--upload-model.*upload"),
    ("--hf-entity cleanrl", r"--hf-entity.*upload"),
    ("--save-model --upload-model --hf-entity cleanrl", r"upload"),
]


@pytest.mark.parametrize("script", [CONTINUOUS, "ppo_kl_penalty", SHARED, ATARI])
@pytest.mark.parametrize(("line", "said"), REFUSED, ids=lambda x: x if x.startswith("--") else "")
def test_a_flag_that_is_refused_with_what_to_use(command_line, script, line, said):
    code, out, err = command_line(script, *line.split())
    assert (code, out, list(Path().iterdir())) == (2, "", []), err
    assert err.count("\n") == 1, err
    assert re.match(rf"{script}\.py: error: ", err)
    assert re.search(said, err), err


@pytest.mark.parametrize(
    ("script", "name", "said"),
    [
        (CONTINUOUS, "HalfCheetah-v2", r"HalfCheetah-v[345]"),  # of mujoco-py, before 2023
        (CONTINUOUS, "dm_control/cheetah-run-v0", r"CheetahRun-v1"),
        (CONTINUOUS, "dm_control/cartpole-balance_sparse-v0", r"CartpoleBalanceSparse-v1"),
        (CONTINUOUS, "dm_control/humanoid-walk-v0", r"HumanoidWalk-v1"),
        (CONTINUOUS, "CartPole-v1", r"ppo_shared_params\.py"),
        (CONTINUOUS, "BreakoutNoFrameskip-v4", r"ppo_atari\.py|Breakout-v5"),
        (SHARED, "BreakoutNoFrameskip-v4", r"ppo_atari\.py|Breakout-v5"),
        (ATARI, "CartPole-v1", r"unknown game CartPole-v1"),
        (ATARI, "HalfCheetah-v4", r"unknown game HalfCheetah-v4"),
    ],
)
def test_an_environment_of_its_benchmarks_that_has_another_name_or_script_here(command_line, script, name, said):
    code, out, err = command_line(script, "--env-id", name, *without_short([]))
    assert (code, out) == (2, ""), err
    assert err.splitlines()[-1].startswith(f"{script}.py: error: ")
    assert re.search(said, err.splitlines()[-1]), err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("script", "name"), [(CONTINUOUS, "InvertedPendulum-v4"), (SHARED, "CartPole-v1"), (ATARI, "BreakoutNoFrameskip-v4")]
)
def test_capture_video_draws_or_says_what_is_missing(command_line, script, name):
    """Its benchmarks record videos; here that needs OpenGL for MuJoCo, and pygame for classic control."""
    line = BOTH.format(name) + " --capture_video --eval-episodes 1"
    line += " --max-episode-steps 40" if script == ATARI else ""
    code, _, err = command_line(script, *line.split(), *without_short(line.split()))
    if code:
        assert code == 2, err
        assert re.match(rf"{script}\.py: error: capture_video needs .*\n", err), err
        assert list(Path().iterdir()) == []
    else:
        assert Path("run/evaluation.gif").stat().st_size > 0
