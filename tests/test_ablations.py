"""Every switch of the groups PPO and implementation details changes what is learned; the defaults give stored checksums."""

import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from helpers import read_checkpoint

ROOT = Path(__file__).parents[1]
PATHS = sorted(set(ROOT.glob("ppo_*.py")) - {ROOT / "ppo_rlhf.py"})  # test_rlhf.py has the switches of that one
SCRIPTS = {path.stem: importlib.import_module(path.stem) for path in PATHS}

# two iterations in which every clip is active: steps are large, and so are some observations and rewards
TINY: dict[str, Any] = {
    "num_envs": 2,
    "num_steps": 64,
    "total_timesteps": 256,
    "num_minibatches": 2,
    "update_epochs": 3,
    "eval_episodes": 0,
    "compile": False,
}
HOT = TINY | {"learning_rate": 0.01}
OF_SCRIPT: dict[str, dict[str, Any]] = {
    "ppo_continuous": {"env": "Ablation-v0"},
    "ppo_kl_penalty": {"env": "Ablation-v0"},
    "ppo_shared_params": {"env": "AblationDiscrete-v0"},
    "ppo_atari": {"env": "Breakout", "device": "cpu", "num_threads": 1, "num_steps": 8, "total_timesteps": 32},
}
# lives are lost and time runs out only in a longer rollout; by default only the parts that Atari's loop has of its own run
LONGER = {"num_steps": 32, "total_timesteps": 128, "max_episode_steps": 20}
LIVES = {"num_steps": 64, "total_timesteps": 256}
SHOTS = LIVES | {"env": "SpaceInvaders"}  # pays 5 to 30
LONGER_OF_SWITCH = {"episodic_life": LIVES, "clip_reward": SHOTS, "clip_vloss": SHOTS}
QUICK_ON_ATARI = {"anneal_lr", "norm_adv", "target_kl", "scale_obs"}
SWITCHED: dict[str, list[Any]] = {
    "learning_rate": [0.011],
    "num_envs": [1],
    "num_steps": [16],
    "gamma": [0.9],
    "gae_lambda": [1.0, 0.0],
    "num_minibatches": [1],
    "update_epochs": [2],
    "clip_coef": [0.15],
    "ent_coef": [0.02],
    "vf_coef": [2.0],
    "max_grad_norm": [math.inf],
    "target_kl": [1e-9],
    "weight_init": ["normc", "torch"],
    "adam_eps": [1e-8],
    "anneal_lr": [False],
    "norm_adv": ["batch", "none"],
    "clip_policy": [False],
    "clip_vloss": [False],
    "state_independent_std": [False],
    "clip_actions": [False],
    "norm_obs": ["batch", "none"],
    "clip_obs": [math.inf],
    "norm_reward": [False],
    "clip_reward": [math.inf],
    "anneal_clip": [True],
    "bootstrap_truncated": [False],
    "mask_resets": [False],
}
SWITCHED_OF_SCRIPT: dict[str, dict[str, list[Any]]] = {
    "ppo_kl_penalty": {"clip_policy": [True], "kl_coef": [2.0], "kl_target": [100.0], "adaptive_kl": [False]},
    "ppo_shared_params": {
        "share_params": [False],
        "lstm": [True],
        "observe": [(0, 2)],
        "norm_obs": ["batch", "step"],
        "clip_obs": [1.0],
        "clip_reward": [1.0],
    },
    "ppo_atari": {
        "noop_max": [1],
        "frame_skip": [1],
        "episodic_life": [False],
        "fire_reset": [False],
        "clip_reward": [False],
        "stack_num": [1],
        "scale_obs": [False],
        "full_action_space": [True],
        "repeat_action_probability": [0.25],
        "max_episode_steps": [10],
    },
}
# parameters that a switch adds, for the sizes of the environments here
ADDED_PARAMETERS = {
    "state_independent_std": (64 * 2 + 2) - 2,  # deviations from the last layer, in place of two numbers
    "share_params": (3 * 64 + 64) + (64 * 64 + 64),  # a second trunk
    "lstm": 4 * 128 * (64 + 128) + 2 * 4 * 128 + (128 - 64) * (3 + 1),  # the cell, and heads that read its 128 units
    "observe": -64,  # one number less is observed
    "stack_num": -3 * 16 * 4 * 32,  # one frame is seen, not four
    "full_action_space": (18 - 4) * (512 + 1),
}
# not by these tests: what these flags do needs another environment
ELSEWHERE = {"ppo_shared_params": {"discretize_actions", "clip_actions"}}

# after the two iterations, with every flag but the sizes at its default, and in the hot setting: norm of the parameters,
# norm of Adam's first moment, sum of the roots of its second
CHECKSUMS: dict[str, dict[str, list[float]]] = json.loads((ROOT / "tests/golden.json").read_text())["checksums"]
PUBLISHED = {
    "ppo_continuous": {"num_envs": 1, "num_steps": 2048, "num_minibatches": 32, "update_epochs": 10, "learning_rate": 3e-4},
    "ppo_kl_penalty": {"num_envs": 1, "num_steps": 2048, "num_minibatches": 32, "update_epochs": 10, "learning_rate": 3e-4},
    "ppo_atari": {"num_envs": 8, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "learning_rate": 2.5e-4},
    "ppo_shared_params": {"num_envs": 4, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "learning_rate": 2.5e-4},
}


class Ablation(gymnasium.Env):
    """Ends by termination and truncation, pays for actions; once, observation and reward are 1,000 times as big."""

    def __init__(self, render_mode: str | None = None):
        self.observation_space = Box(-np.inf, np.inf, (3,))
        self.action_space: Any = Box(-0.2, 0.3, (2,))
        self.steps_taken = 0

    def observe(self):
        obs = np.array([self.level, self.time / 10, self.np_random.standard_normal()], np.float32)
        return obs * np.float32(1000) if self.steps_taken == 90 else obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.level, self.time = self.np_random.standard_normal(), 0
        return self.observe(), {}

    def step(self, action):
        self.steps_taken += 1
        self.time += 1
        push = float(np.sum(action))
        self.level = 0.8 * self.level + push
        reward = 1 - self.level**2 - push**2
        if self.steps_taken == 100:
            reward *= 1000
        return self.observe(), reward, self.time == 11 and self.level > 0, self.time == 13, {}


class AblationDiscrete(Ablation):
    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode)
        self.action_space = Discrete(3)

    def step(self, action):
        return super().step(np.array([0.4 * (int(action) - 1)]))


gymnasium.register("Ablation-v0", "test_ablations:Ablation")
gymnasium.register("AblationDiscrete-v0", "test_ablations:AblationDiscrete")


def switches(name: str) -> list[str]:
    """Fields of Args between the headings of the groups PPO and speed."""
    body = (ROOT / f"{name}.py").read_text().split("class Args:")[1].split("    # PPO\n")[1].split("    # speed\n")[0]
    return re.findall(r"^    (\w+): ", body, re.M)


def run(name: str, run_dir: Path, **flags) -> dict:
    """Checkpoint at the end of a run."""
    script = SCRIPTS[name]
    script.train(script.Args(**(OF_SCRIPT[name] | {"run_dir": str(run_dir)} | flags)))
    return read_checkpoint(run_dir)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """reference(script, **flags): parameters learned with nothing switched, made once."""
    cache: dict[tuple, torch.Tensor] = {}

    def get(name: str, **flags) -> torch.Tensor:
        key = (name, *flags.items())
        if key not in cache:
            cache[key] = run(name, tmp_path_factory.mktemp(name) / "run", **HOT | OF_SCRIPT[name] | flags)["theta"]
        return cache[key]

    return get


def cases():
    for name in SCRIPTS:
        table = SWITCHED | SWITCHED_OF_SCRIPT.get(name, {})
        for switch in switches(name):
            slow = name == "ppo_atari" and switch not in QUICK_ON_ATARI
            for value in [] if switch in ELSEWHERE.get(name, set()) else table.get(switch, []):
                marks = [pytest.mark.slow] if slow else []
                yield pytest.param(
                    name,
                    switch,
                    value,
                    LONGER_OF_SWITCH.get(switch, LONGER) if slow else {},
                    id=f"{name}-{switch}-{value}",
                    marks=marks,
                )


@pytest.mark.parametrize(("name", "switch", "value", "longer"), list(cases()))
def test_switch_changes_what_is_learned(reference, tmp_path, name, switch, value, longer):
    flags = HOT | OF_SCRIPT[name] | longer
    assert getattr(SCRIPTS[name].Args(**flags), switch) != value
    before = reference(name, **longer)
    after = run(name, tmp_path / "run", **flags | {switch: value})["theta"]
    assert torch.isfinite(after).all()
    assert len(after) - len(before) == ADDED_PARAMETERS.get(switch, 0)
    if switch not in ADDED_PARAMETERS:
        assert (before - after).norm() > 1e-6 * before.norm()


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_switch_is_covered(name):
    covered = set(SWITCHED | SWITCHED_OF_SCRIPT.get(name, {})) | ELSEWHERE.get(name, set())
    assert set(switches(name)) <= covered


def checksum(checkpoint: dict) -> tuple[float, float, float]:
    first_moment, second_moment, _ = checkpoint["adam"]
    return (
        checkpoint["theta"].double().norm().item(),
        first_moment.double().norm().item(),
        second_moment.double().sqrt().sum().item(),
    )


def checksum_of(name: str, setting: str, run_dir: Path) -> tuple[float, float, float]:
    flags = (HOT if setting == "hot" else TINY) | OF_SCRIPT[name]
    return checksum(run(name, run_dir, **flags))


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name in CHECKSUMS for setting in CHECKSUMS[name]])
def test_checksum(tmp_path, name, setting):
    """Noise of 3e-7 in the first weights moves these numbers by 1e-7; no sums of Atari's: there it changes actions."""
    assert checksum_of(name, setting, tmp_path / "run") == pytest.approx(CHECKSUMS[name][setting], rel=2e-4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_default_sizes_are_the_published_ones(name):
    """The checksums run with smaller ones."""
    args = SCRIPTS[name].Args()
    assert {key: getattr(args, key) for key in PUBLISHED[name]} == PUBLISHED[name]
