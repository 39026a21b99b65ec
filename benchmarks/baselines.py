"""TRPO (sb3-contrib), A2C and PPO (Stable-Baselines3) on MuJoCo, logged like the scripts of this repository.

    python benchmarks/baselines.py --algorithm trpo --env Hopper --seed 1 --run-dir runs/trpo-hopper

Needs a Python with stable-baselines3, sb3-contrib and gymnasium[mujoco]; nothing else here does. The settings of TRPO and A2C
are those that rl-baselines3-zoo publishes for the -v4 tasks (hyperparams/trpo.yml at 13a3fe7, hyperparams/a2c.yml at
c6c209e); a task that it does not list gets what its listed MuJoCo tasks share. PPO has the defaults of ppo_continuous.py: the
peer that a surprising score of ours is compared with. Observations and rewards are normalized; the logged returns are raw.
"""

import argparse
import hashlib
import json
import platform
import re
import sys
import time
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import sb3_contrib
import stable_baselines3
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

# Beyond the defaults of the libraries; n_envs and gamma are passed on to the environments and their normalization.
SETTINGS: dict[str, dict] = {
    "trpo": {
        "n_envs": 2,
        "n_steps": 1024,
        "batch_size": 128,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "sub_sampling_factor": 1,
        "cg_max_steps": 25,
        "cg_damping": 0.1,
        "n_critic_updates": 20,
        "learning_rate": 1e-3,
    },
    "a2c": {"n_envs": 1, "n_steps": 5, "gamma": 0.99},  # n_steps and gamma are the library's defaults
    "ppo": {  # its own defaults otherwise; Adam's epsilon is 1e-5 there too
        "n_envs": 1,
        "n_steps": 2048,
        "batch_size": 64,
        "n_epochs": 10,
        "gamma": 0.99,
        "learning_rate": 3e-4,
        "anneal_lr": True,
        "clip_range_vf": 0.2,
        "vf_coef": 0.25,  # of the squared error without 1/2
    },
}
BY_TASK: dict[tuple[str, str], dict] = {
    ("trpo", "HalfCheetah"): {"target_kl": 0.04},
    ("trpo", "Swimmer"): {"gamma": 0.9999},
    ("a2c", "Swimmer"): {"gamma": 0.9999},
}
ALGORITHMS = {"trpo": sb3_contrib.TRPO, "a2c": stable_baselines3.A2C, "ppo": stable_baselines3.PPO}


class Log(BaseCallback):
    """Writes metrics.jsonl and episodes.jsonl in the format of the scripts; `warm` steps come before the clock of SPS."""

    def __init__(self, run_dir: Path, header: dict, warm: int):
        super().__init__()
        self.metrics, self.episodes = (open(run_dir / name, "w", buffering=1) for name in ("metrics.jsonl", "episodes.jsonl"))
        self.metrics.write(json.dumps(header) + "\n")
        self.warm, self.start = warm, time.perf_counter()
        self.warm_time, self.warm_step, self.last, self.iteration = self.start, 0, 0, 0

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                record = {"global_step": self.num_timesteps, "return": info["episode"]["r"], "length": info["episode"]["l"]}
                self.episodes.write(json.dumps(record, default=float) + "\n")
        return True

    def _on_rollout_start(self):
        if self.num_timesteps - self.last >= 2048:
            self.write()

    def write(self):
        now = time.perf_counter()
        if self.warm_step == 0 and self.num_timesteps >= self.warm:
            self.warm_time, self.warm_step = now, self.num_timesteps
        self.iteration, self.last = self.iteration + 1, self.num_timesteps
        sps = (self.num_timesteps - self.warm_step) / max(now - self.warm_time, 1e-9) if self.warm_step else 0
        record = {"iteration": self.iteration, "global_step": self.num_timesteps}
        record |= {"charts/SPS": round(sps), "charts/seconds": round(now - self.start, 3)}
        self.metrics.write(json.dumps(record) + "\n")


def train(algorithm: str, env: str, seed: int, total_timesteps: int, run_dir: Path):
    torch.set_num_threads(1)
    settings = SETTINGS[algorithm] | BY_TASK.get((algorithm, env), {})
    env_id = env if re.search(r"-v\d+$", env) else f"{env}-v4"
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    modules = (stable_baselines3, sb3_contrib, torch, gymnasium, mujoco, np)
    args = {"env": env, "seed": seed, "total_timesteps": total_timesteps, "algorithm": algorithm}
    args |= {"num_envs": settings["n_envs"], "num_steps": settings["n_steps"], "normalize": True, "settings": settings}
    header = {
        "args": args,
        "script": Path(__file__).name,
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "git_revision": None,
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules},
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "cpu_cores": 1,
        "gpu": None,
    }
    run_dir.mkdir(parents=True)
    envs = VecNormalize(make_vec_env(env_id, settings["n_envs"], seed=seed), gamma=settings["gamma"])
    own = {k: v for k, v in settings.items() if k not in ("n_envs", "anneal_lr")}
    if settings.get("anneal_lr"):
        own["learning_rate"] = LinearSchedule(settings["learning_rate"], 0.0, 1.0)
    model = ALGORITHMS[algorithm]("MlpPolicy", envs, seed=seed, device="cpu", **own)
    log = Log(run_dir, header, warm=2048)
    batch = settings["n_envs"] * settings["n_steps"]
    model.learn(total_timesteps // batch * batch, callback=log)  # whole rollouts, as the scripts count them
    log.write()
    log.metrics.close()
    log.episodes.close()
    envs.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=sorted(ALGORITHMS), required=True)
    parser.add_argument("--env", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--total-timesteps", type=int, default=1_000_000)
    parser.add_argument("--run-dir", type=Path, required=True)
    given = parser.parse_args()
    try:
        train(given.algorithm, given.env, given.seed, given.total_timesteps, given.run_dir)
    except FileExistsError:
        print(f"baselines.py: error: {given.run_dir} exists: choose another --run-dir", file=sys.stderr)
        sys.exit(2)
