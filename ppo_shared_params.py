"""PPO (Schulman et al. 2017): one trunk for policy and value (eq. 9), discrete actions, LSTM.

    python ppo_shared_params.py --env CartPole-v1
    python ppo_shared_params.py --env CartPole-v1 --lstm --observe 0 2
    python ppo_shared_params.py --env BipedalWalker-v3 --discretize-actions 7 --norm-obs step

- CartPole-v1 500 (seeds 1 to 5), Acrobot-v1 -84.8 (1 to 3) after 500,000 steps (last 100 episodes)
- half a minute a run on one core of an AMD EPYC with torch 2.13 and envpool 1.2.5
- rewards are scaled: the value loss of unscaled ones takes all of a shared trunk's clipped gradient
  (CartPole then reaches 234 instead of 500, or 495 with --vf-coef 0.01)
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "envpool==1.2.5",
#     "gymnasium==1.4.0",
#     "numpy==2.4.6",
#     "pillow==13.0.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
#     "wandb==0.31.0",
# ]
# ///
import argparse
import contextlib
import ctypes
import ctypes.util
import dataclasses
import difflib
import gc
import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

gc.disable()  # collecting garbage while torch and envpool are imported takes a second
with contextlib.suppress(OSError):  # envpool draws MuJoCo only where the system's OpenGL was loaded before it
    ctypes.CDLL("libEGL.so.1", mode=ctypes.RTLD_GLOBAL)
import envpool
import gymnasium
import numpy as np
import torch
import tqdm
import tyro
from PIL import Image
from torch import nn

gc.enable()
gc.freeze()  # what they loaded stays until the end, so it is never scanned
warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")  # gymnasium, on every float64 Box


KIND = "ppo_shared_params"  # of checkpoints; stays when the file is renamed
MASK_KEYS = ("action_mask", "legal_action_mask")  # of an observation or info: True where an action is valid
MASKED_LOGIT = -1e8  # finite, so that 0 * log(0) does not arise; its exponential is exactly 0
LSTM_SIZE = 128


class UsageError(Exception):
    """A mistake that the user can fix; the command line prints it as one sentence and exits with 2."""


class NonFiniteError(RuntimeError):
    """A loss, observation or reward is NaN or infinite; the command line prints it and exits with 1."""


@dataclass
class Args:
    # run
    env: str = "CartPole-v1"
    """environment: an envpool or Gymnasium id, or my_module:MyEnv-v0"""
    seed: int = 1
    """seed of networks, actions, minibatches and environments, at least 0"""
    total_timesteps: int = 500_000
    """environment steps of the run, over all environments, resets included; rounded down to whole rollouts"""
    run_dir: str = ""
    """directory of the run; empty: runs/<script>__<env>__<seed>__<time>"""
    checkpoint_every: int = 200
    """iterations between checkpoints, at least 1; environments start afresh at each, so it should span many episodes"""
    resume: str = ""
    """continue the run of this checkpoint or run directory, with its settings, bit-identically; --total-timesteps may be
    changed with it, and annealing then runs to the new end"""
    evaluate: str = ""
    """only evaluate this checkpoint or run directory, with frozen observation statistics"""
    eval_episodes: int = 10
    """episodes of the evaluation that ends a run; 0: none, as for a task that never ends"""
    eval_deterministic: bool = True
    """evaluate the likeliest action; off: sampled actions"""
    capture_video: bool = False
    """record the first evaluation episode as evaluation.gif in the run directory"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline works)"""
    wandb_project_name: str = "ppo"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""

    # PPO
    learning_rate: float = 2.5e-4
    """Adam step size, above 0"""
    num_envs: int = 4
    """parallel environments (N)"""
    num_steps: int = 128
    """steps of each environment per rollout (T)"""
    gamma: float = 0.99
    """discount, 0 to 1"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation, 0 to 1; 1: Monte Carlo, 0: one-step TD"""
    num_minibatches: int = 4
    """minibatches per epoch; must divide num_envs * num_steps, with --lstm num_envs; 1: whole batch"""
    update_epochs: int = 4
    """passes over a rollout (K)"""
    clip_coef: float = 0.2
    """clip range epsilon of ratio and value, above 0"""
    ent_coef: float = 0.01
    """weight of the entropy bonus (c2), at least 0"""
    vf_coef: float = 0.5
    """weight of the value loss 0.5 * mean squared error, at least 0; 2 is c1 = 1 of the paper"""
    max_grad_norm: float = 0.5
    """global gradient norm limit, above 0; inf: off"""
    target_kl: float | None = None
    """stop the epochs of an iteration when the mean approximate KL of one exceeds this; None: off"""

    # networks, observations and actions
    share_params: bool = True
    """[detail 13] one trunk for policy and value; off: separate networks"""
    lstm: bool = False
    """[detail 32-36] LSTM layer of 128 units after the trunk; minibatches are whole environments, nothing is compiled"""
    observe: tuple[int, ...] = ()
    """indices of the observation components to keep (CartPole without velocities: 0 2); empty: all"""
    discretize_actions: int | None = None
    """[detail 37] bins per action of a Box action space, evenly spaced from bound to bound, at least 2"""

    # implementation details; numbers are those of DETAILS.md
    weight_init: Literal["orthogonal", "normc", "torch"] = "orthogonal"
    """[detail 02] orthogonal (sqrt 2, 0.01, 1), normc (1, 0.01, 1: baselines of 2017), or the default of torch"""
    adam_eps: float = 1e-5
    """[detail 03] epsilon of Adam; 1e-8: default of torch"""
    anneal_lr: bool = True
    """[detail 04] learning rate falls linearly to 0"""
    norm_adv: Literal["minibatch", "batch", "none"] = "minibatch"
    """[detail 07] advantages to mean 0 and deviation 1, per minibatch or over the whole batch"""
    clip_policy: bool = True
    """[detail 08] clipped surrogate objective; off: ratio * advantage"""
    clip_vloss: bool = True
    """[detail 09] value clipped to clip_coef around its old estimate; off: squared error"""
    norm_obs: Literal["step", "batch", "none"] = "none"
    """[detail 28] observations by running mean and variance, updated every step or once per rollout (2017)"""
    clip_obs: float = math.inf
    """[detail 29] observations limited to +-this after normalization, above 0; inf: off"""
    norm_reward: bool = True
    """[detail 30] rewards divided by the running deviation of the discounted return"""
    clip_reward: float = math.inf
    """[detail 31] rewards limited to +-this after scaling, above 0; inf: off"""
    anneal_clip: bool = False
    """clip range falls linearly to 0 (baselines of August 2017)"""
    bootstrap_truncated: bool = True
    """[ours] a time limit is no termination: bootstrap from the final observation; off: as in 2017"""
    mask_resets: bool = True
    """[ours] the step that only resets an environment is left out of loss and statistics; off: learned from"""

    # speed
    compile: bool = True
    """compile the update with torch.compile (needs a C++ compiler on a CPU)"""
    device: str = "cpu"
    """device of the update: cpu, cuda, cuda:1; the policy acts on the CPU, where one observation is fastest"""
    num_threads: int = 1
    """CPU threads of torch and of envpool, at least 1"""

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

    def __post_init__(self):
        if not self.run_dir:
            env, now = self.env.replace(":", "."), time.strftime("%Y%m%d-%H%M%S")
            self.run_dir = f"runs/{Path(__file__).stem}__{env}__{self.seed}__{now}"
        for name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "checkpoint_every", "num_threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("learning_rate", "clip_coef", "max_grad_norm", "adam_eps", "clip_obs", "clip_reward"):
            if not getattr(self, name) > 0:  # also catches NaN
                raise UsageError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("ent_coef", "vf_coef", "seed", "eval_episodes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be finite and at least 0")
        for name in ("learning_rate", "clip_coef", "adam_eps"):
            if math.isinf(getattr(self, name)):
                raise UsageError(f"{name} is inf: it must be finite")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}: it must lie between 0 and 1")
        if self.target_kl is not None and not self.target_kl > 0:
            raise UsageError(f"target_kl is {self.target_kl}: it must be above 0, or None")
        if self.batch_size % self.num_minibatches:
            raise UsageError(
                f"num_envs * num_steps = {self.batch_size} does not divide into num_minibatches = "
                f"{self.num_minibatches}: change one of them"
            )
        if self.lstm and self.num_envs % self.num_minibatches:
            raise UsageError(
                f"lstm needs minibatches of whole environments, but num_envs = {self.num_envs} does not divide into "
                f"num_minibatches = {self.num_minibatches}: change one of them"
            )
        if self.discretize_actions is not None and self.discretize_actions < 2:
            raise UsageError(f"discretize_actions is {self.discretize_actions}: it must be at least 2, or None")
        if any(index < 0 for index in self.observe) or len(set(self.observe)) < len(self.observe):
            raise UsageError(f"observe is {self.observe}: its indices must be different and at least 0")
        if self.num_iterations < 1:
            raise UsageError(
                f"total_timesteps is {self.total_timesteps}, less than one rollout of num_envs * num_steps = "
                f"{self.batch_size} steps: raise it or shorten the rollout"
            )
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"device is {self.device}: use cpu, cuda or cuda:1")
        gpus = torch.cuda.device_count()
        if self.device != "cpu" and int(self.device[5:] or 0) >= gpus:
            raise UsageError(f"device is {self.device}, but torch finds {gpus} GPU(s) here: use --device cpu")
        if self.evaluate and self.eval_episodes < 1:
            raise UsageError("evaluate plays episodes: set eval_episodes to at least 1")
        if self.capture_video and self.eval_episodes < 1:
            raise UsageError("capture_video records an evaluation episode: set eval_episodes to at least 1")


def find_env(name: str) -> tuple[str, bool]:
    """Full id of an environment and whether envpool has it. A bare name means version 4, else the newest one."""
    if ":" in name:
        if not re.fullmatch(r"[^\W\d][\w.]*:[^:]+", name):
            raise UsageError(f"unknown environment {name}: an environment of your own is my_module:MyEnv-v0")
        return name, False
    known = set(envpool.list_all_envs()) | set(gymnasium.registry)
    versions = sorted(
        (id for id in known if re.fullmatch(re.escape(name) + r"-v\d+", id)), key=lambda id: int(id.rsplit("-v", 1)[1])
    )
    found = name if name in known else f"{name}-v4" if f"{name}-v4" in versions else versions[-1] if versions else None
    if found is None:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        raise UsageError(f"unknown environment {name}; nearest names: {', '.join(near) or 'none'}")
    return found, found in envpool.list_all_envs()


def make_envs(name: str, seeds: list[int], num_threads: int, render: bool = False) -> tuple[Any, Any, dict]:
    """Vectorized environment, one per seed, freshly reset: (envs, first observations (N, ...), first info).

    envpool where it has the id, else gymnasium.make_vec. Both reset on the *next* step: the step after an episode
    end ignores its action and returns the first observation of the next episode, with reward 0.
    """
    env_id, in_envpool = find_env(name)
    drawn: dict[str, Any] = {"render_mode": "rgb_array"} if render else {}
    if in_envpool:
        if render and sys.platform == "linux" and not ctypes.util.find_library("EGL"):
            raise UsageError("capture_video needs OpenGL: install libEGL (on Debian: apt-get install libegl1)")
        size = {"render_width": 320, "render_height": 240} if render else {}
        try:
            envs: Any = envpool.make(
                env_id,
                env_type="gymnasium",
                num_envs=len(seeds),
                seed=seeds,
                num_threads=min(num_threads, len(seeds)),
                **drawn,
                **size,
            )
        except (ImportError, RuntimeError, OSError) as error:
            raise UsageError(f"cannot make environment {name}: {error}") from error
    else:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # my_module:MyEnv-v0 may lie in the current directory
        try:
            envs = gymnasium.make_vec(env_id, len(seeds), vectorization_mode="sync", **drawn)
        except (ImportError, gymnasium.error.Error) as error:
            raise UsageError(f"cannot make environment {name}: {error}") from error
        except TypeError as error:
            if not render:
                raise
            raise UsageError(f"capture_video needs an environment that draws itself: {error}") from error
    obs, info = envs.reset(**({} if in_envpool else {"seed": seeds}))
    if in_envpool and len(info["players"]["env_id"]) != len(seeds):
        raise UsageError(f"{env_id} is a game of several players; this script trains a single one")
    return envs, obs, info


def action_components(space: gymnasium.Space, bins: int | None) -> tuple[list[int], np.ndarray]:
    """Number of choices of each action component (C,), and what the space holds for each choice (C, K), K the most choices.

    A Box of floats is divided into bins, from bound to bound; a Box of integers has one choice for each value.
    """
    spaces = gymnasium.spaces
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        if bins is None:
            raise UsageError(f"the action space is {space}: add --discretize-actions 7, or use ppo_continuous.py")
        low, high = space.low.flatten().astype(float), space.high.flatten().astype(float)
        if not np.isfinite(high - low).all():
            raise UsageError(f"the action space {space} has no finite bounds to divide: use ppo_continuous.py")
        return [bins] * low.size, np.linspace(low, high, bins, axis=1).astype(space.dtype)
    if bins is not None:
        raise UsageError(f"the action space {space} is discrete already: leave out --discretize-actions")
    if isinstance(space, spaces.Discrete):
        nvec, first = np.array([space.n]), np.array([space.start])
    elif isinstance(space, spaces.MultiDiscrete):
        nvec, first = space.nvec.flatten(), space.start.flatten()
    elif isinstance(space, spaces.Box):
        first = space.low.flatten().astype(int)
        nvec = space.high.flatten().astype(int) - first + 1
        if not ((nvec > 0) & (nvec <= 1000)).all():
            raise UsageError(f"the action space {space} has components of more than 1000 values")
    else:
        raise UsageError(f"the action space is {space}; this script needs Discrete, MultiDiscrete or Box")
    return nvec.tolist(), (first[:, None] + np.arange(nvec.max())).astype(space.dtype)


def flatten_obs(obs: Any, space: gymnasium.Space, observe: tuple[int, ...] = ()) -> np.ndarray:
    """Observations as vectors (N, obs_dim): dictionaries joined (without their action mask), Discrete as one-hot."""
    spaces = gymnasium.spaces
    if isinstance(space, spaces.Dict):
        parts = [flatten_obs(obs[key], part) for key, part in space.items() if key not in MASK_KEYS]
        if not parts:
            raise UsageError(f"there is nothing to observe in {space} but the action mask")
        vectors = np.concatenate(parts, axis=1)
    elif isinstance(space, spaces.Discrete):
        vectors = np.eye(int(space.n))[obs - space.start]
    elif isinstance(space, spaces.Box | spaces.MultiBinary | spaces.MultiDiscrete):
        vectors = obs.reshape(len(obs), -1)
    else:
        raise UsageError(f"this script cannot read observations of {space}")
    return vectors[:, observe] if observe else vectors


def read_masks(obs: Any, info: dict, real: np.ndarray) -> np.ndarray:
    """Which actions are valid, (N, C, K), from the observation or else the info; real itself where neither says it.

    A mask is an array of all choices, component after component, or a tuple or list with one part for each component. real
    (C, K) is False where component c has no choice k. Where an environment allows nothing, as after the end of a game, all
    real choices count as valid, so that a distribution exists.
    """
    places = [place[key] for place in (obs, info) if isinstance(place, dict) for key in MASK_KEYS if key in place]
    if not places:
        return real
    flat: Any = places[0]
    if isinstance(flat, tuple):  # of the components, in an observation
        flat = np.concatenate([np.reshape(part, (len(part), -1)) for part in flat], axis=1)
    if flat.dtype == object:  # tuples, lists or arrays; 0 or None where an environment gave none
        flat = [np.hstack(list(mask)) if isinstance(mask, tuple | list | np.ndarray) else np.zeros(real.sum()) for mask in flat]
    sizes = {np.size(mask) for mask in flat}
    if sizes != {real.sum()}:
        raise UsageError(f"the environment gives masks of {sizes} entries, but there are {real.sum()} choices to mask")
    masks = np.zeros((len(flat), *real.shape), dtype=bool)
    masks[:, real] = np.reshape(flat, (len(flat), -1))
    return np.where(masks.any(axis=2, keepdims=True), masks, real)


def make_step(envs):
    """envs.step without its info: action (N, ...) -> obs (N, ...), reward, terminated, truncated (N,).

    For envpool it calls the C++ layer (private; tested against envs.step): with one environment the Python layers
    above it take a third of the time of a step.
    """
    if not hasattr(envs, "_send"):
        return lambda action: envs.step(action)[:4]
    ids = envs.all_env_ids
    dtype = envs.spec.action_array_spec["action"].dtype
    places = [envs._state_keys.index(key) for key in ("obs", "reward", "done", "trunc")]

    def step(action):
        envs._send([ids, ids, action.astype(dtype)])  # in the order of _action_keys: env_id, players.env_id, action
        state = envs._recv()
        obs, reward, done, truncated = [state[i] for i in places]
        return obs, reward, done & ~truncated, truncated

    return step


def make_seeds(seed: int, iteration: int, count: int) -> list[int]:
    """Different seeds for `count` environments that start at this iteration, after seeding python, numpy and torch."""
    sequence = np.random.SeedSequence([seed, iteration]).generate_state(count + 1) >> 1  # 31 bits
    random.seed(int(sequence[0]))
    np.random.seed(int(sequence[0]))
    torch.manual_seed(int(sequence[0]))
    return [int(s) for s in sequence[1:]]


class RunningMeanStd:
    """Mean and variance of all data seen, over the first axis, in float64 (Chan et al. 1979)."""

    def __init__(self, shape: tuple[int, ...]):
        self.mean, self.m2, self.count = np.zeros(shape), np.full(shape, 1e-4), 1e-4  # mean 0, variance 1, count 1e-4

    def update(self, x: np.ndarray):
        """x: (n, *shape), n may be 0."""
        delta = x - self.mean
        self.count += len(x)
        shift = np.add.reduce(delta) / self.count  # has half the overhead of delta.sum(axis=0)
        self.mean = self.mean + shift
        self.m2 = self.m2 + np.add.reduce(delta * delta) - shift * shift * self.count

    @property
    def var(self) -> np.ndarray:
        return self.m2 / self.count

    def state_dict(self) -> dict:
        return {"mean": torch.as_tensor(self.mean), "m2": torch.as_tensor(self.m2), "count": float(self.count)}

    def load_state_dict(self, state: dict):
        self.mean, self.m2, self.count = state["mean"].numpy(), state["m2"].numpy(), state["count"]


def normalize_obs(obs: np.ndarray, rms: RunningMeanStd, args: Args) -> np.ndarray:
    """Normalized (unless switched off) and clipped observations, of the shape of obs, in float32."""
    if args.norm_obs != "none":
        obs = (obs - rms.mean) / np.sqrt(rms.var + 1e-8)
    return np.minimum(np.maximum(obs, -args.clip_obs), args.clip_obs).astype(np.float32)  # [detail 29]


def scale_rewards(
    rewards: np.ndarray, done: np.ndarray, valid: np.ndarray, discounted_return: np.ndarray, rms: RunningMeanStd, gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards (T, N) over the running deviation of the discounted return, and that return (N,) after the last step.

    The return of each environment is ret = ret * gamma + r, zeroed after an episode end; the statistics take in each
    step's returns before they scale its rewards. Reset steps (valid = 0) stay out.
    """
    returns = np.empty_like(rewards)
    for t in range(len(rewards)):
        returns[t] = discounted_return * gamma + rewards[t]
        discounted_return = returns[t] * ~done[t]
    # RunningMeanStd.update after every step t, for all t at once
    deltas = (returns - rms.mean) * valid
    counts = rms.count + valid.sum(axis=1).cumsum()
    shifts = deltas.sum(axis=1).cumsum() / counts
    m2s = rms.m2 + (deltas * deltas).sum(axis=1).cumsum() - shifts * shifts * counts
    rms.mean, rms.m2, rms.count = rms.mean + shifts[-1], m2s[-1], counts[-1]
    return rewards / np.sqrt(m2s / counts + 1e-8)[:, None], discounted_return  # [detail 30]


def layer_init(layer: nn.Linear | nn.Conv2d, gain: float, scheme: str) -> nn.Module:
    """Initializes weight and bias (zero) of a layer in place and returns it."""
    if scheme == "orthogonal":
        nn.init.orthogonal_(layer.weight, gain)  # [detail 02]
    if scheme == "normc":  # the weights of each unit have this norm, as in baselines of 2017
        weight = torch.randn_like(layer.weight)
        norm = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)
        layer.weight.data = min(gain, 1.0) * weight / norm
    if scheme != "torch" and layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class LSTMSteps(torch.autograd.Function):
    """T steps of an LSTM layer with the gradient written out, for speed (autograd agrees with it).

    inputs (T, n, 4H): W_x x + b for the gates i, f, g, o; weight W_h (4H, H); keep (T, n, 1): 0 at the first step of an
    episode; state (n, 2, H): h and c before. Each step: a = inputs + W_h h, c = sigmoid(a_f) c + sigmoid(a_i) tanh(a_g),
    h = sigmoid(a_o) tanh(c). Returns h, c (T, n, H) and the gates (T, n, 4H); gradients go through h to inputs and weight.
    """

    @staticmethod
    def forward(inputs, weight, keep, state):
        h, c = state.unbind(1)
        hs, cs, gates = [], [], []
        for t in range(len(inputs)):  # [detail 36]
            h, c = h * keep[t], c * keep[t]  # [detail 34]
            i, f, g, o = (inputs[t] + h @ weight.T).chunk(4, dim=1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + i * g
            h = o * c.tanh()
            hs.append(h)
            cs.append(c)
            gates.append(torch.cat([i, f, g, o], dim=1))
        return torch.stack(hs), torch.stack(cs), torch.stack(gates)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[1:], *output)

    @staticmethod
    @torch.no_grad()
    def backward(ctx, d_hs, *_):
        weight, keep, state, hs, cs, gates = ctx.saved_tensors
        h_before = torch.cat([state[None, :, 0], hs[:-1]]) * keep
        c_before = torch.cat([state[None, :, 1], cs[:-1]]) * keep
        (i, f, g, o), tanh_c = gates.chunk(4, dim=2), cs.tanh()
        c_by_a = torch.cat([g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g)], dim=2)  # by a_i, a_f, a_g
        h_by_c, h_by_a = o * (1 - tanh_c * tanh_c), tanh_c * o * (1 - o)
        d_h, d_c, d_inputs = torch.zeros_like(hs[0]), torch.zeros_like(hs[0]), torch.empty_like(gates)
        for t in range(len(hs) - 1, -1, -1):
            d_h = d_h + d_hs[t]
            d_c = d_c + d_h * h_by_c[t]
            d_a = torch.cat([d_c.repeat(1, 3) * c_by_a[t], d_h * h_by_a[t]], dim=1)
            d_inputs[t] = d_a
            d_h, d_c = (d_a @ weight) * keep[t], d_c * f[t] * keep[t]
        return d_inputs, d_inputs.flatten(0, 1).T @ h_before.flatten(0, 1), None, None


def unroll_lstm(cell: Any, x: torch.Tensor, first: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs an LSTM layer over T steps of n environments: outputs (T * n, H) and the state (n, 2, H) after them.

    x: (T * n, inputs), time-major; first: (T * n,), 1 at the first observation of an episode; state: (n, 2, H), output
    and memory cell before the first step.
    """
    inputs = nn.functional.linear(x, cell.weight_ih, cell.bias_ih + cell.bias_hh).view(-1, len(state), 4 * LSTM_SIZE)
    hs, cs, _ = LSTMSteps.apply(inputs, cell.weight_hh, (1 - first).view(-1, len(state), 1), state)
    return hs.flatten(0, 1), torch.stack([hs[-1], cs[-1]], dim=1)


class Agent(nn.Module):
    """Policy and value as linear heads on a trunk of 64 and 64 tanh units, and an LSTM of 128 if wanted, or on one each."""

    def __init__(
        self, obs_dim: int, nvec: list[int], weight_init: str = "orthogonal", share_params: bool = True, lstm: bool = False
    ):
        """nvec: number of choices of each of the C action components; K is the largest, the rest is masked."""
        super().__init__()

        def trunk() -> nn.Sequential:
            return nn.Sequential(
                layer_init(nn.Linear(obs_dim, 64), math.sqrt(2), weight_init),
                nn.Tanh(),
                layer_init(nn.Linear(64, 64), math.sqrt(2), weight_init),
                nn.Tanh(),
            )

        def cell() -> nn.LSTMCell:
            layer = nn.LSTMCell(64, LSTM_SIZE)
            for parameter in layer.parameters():
                if weight_init != "torch" and parameter.dim() == 2:
                    nn.init.orthogonal_(parameter, 1.0)  # [detail 32]
                elif weight_init != "torch":
                    nn.init.zeros_(parameter)
            return layer

        features = LSTM_SIZE if lstm else 64
        self.trunks = nn.ModuleList(trunk() for _ in range(1 if share_params else 2))  # [detail 13] the policy's first
        self.cells = nn.ModuleList(cell() for _ in self.trunks) if lstm else None
        self.critic = layer_init(nn.Linear(features, 1), 1.0, weight_init)
        self.actor = layer_init(nn.Linear(features, len(nvec) * max(nvec)), 0.01, weight_init)

    def initial_state(self, n: int) -> torch.Tensor:
        """State of n environments: (n, trunks, 2, H), not read without an LSTM."""
        return torch.zeros(n, len(self.trunks), 2, LSTM_SIZE, device=next(self.parameters()).device)  # [detail 33]

    def features(self, obs: torch.Tensor, first: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """obs (T * n, obs_dim), first (T * n,), state (n, trunks, 2, H) -> inputs of actor and critic, state after."""
        outputs = [trunk(obs) for trunk in self.trunks]
        if self.cells is not None:
            runs = [unroll_lstm(cell, outputs[i], first, state[:, i]) for i, cell in enumerate(self.cells)]
            outputs, state = [output for output, _ in runs], torch.stack([after for _, after in runs], dim=1)
        return outputs[0], outputs[-1], state

    def value(self, obs: torch.Tensor, first: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Value (T * n,) alone, in units of reward; arguments as in features."""
        return self.critic(self.features(obs, first, state)[1]).squeeze(1)

    def forward(
        self, obs: torch.Tensor, action: torch.Tensor, mask: torch.Tensor, first: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """action (T * n, C), mask (T * n, C, K), others as in features -> log-probability, entropy, value, state after.

        The first three are (T * n,), in nats.
        """
        actor_input, critic_input, state = self.features(obs, first, state)
        logits = torch.where(mask, self.actor(actor_input).view(mask.shape), MASKED_LOGIT)  # [aux: action_masks]
        logprobs = logits.log_softmax(2)
        # [detail 37] the components are independent: log-probabilities and entropies add up
        logprob = logprobs.gather(2, action.unsqueeze(2)).squeeze(2).sum(1)
        entropy = -(logprobs.exp() * logprobs).sum((1, 2))
        return logprob, entropy, self.critic(critic_input).squeeze(1), state


def numpy_policy(agent: Agent):
    """The current policy network in numpy: obs (N, obs_dim), state (N, 2, H) -> logits (N, C * K), state after the step.

    Takes 10 us for one observation where torch takes 65 or more. Has to be made again after every update.
    """
    layers = []
    for module in [*agent.trunks[0].children(), agent.actor]:
        if isinstance(module, nn.Linear):
            weight, bias = (x.detach().cpu().numpy() for x in (module.weight, module.bias))
            layers.append((np.ascontiguousarray(weight.T), bias))
        elif not isinstance(module, nn.Tanh):
            raise UsageError(f"numpy_policy does not know {module}: write its forward pass there")
    if agent.cells is not None:
        w_x, w_h, b_x, b_h = (x.detach().cpu().numpy() for x in agent.cells[0].parameters())
        w_x, w_h, b = np.ascontiguousarray(w_x.T), np.ascontiguousarray(w_h.T), b_x + b_h

    def policy(obs: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for weight, bias in layers[:-1]:
            obs = np.tanh(obs @ weight + bias)
        if agent.cells is not None:
            gates = obs @ w_x + state[:, 0] @ w_h + b
            i, f, _, o = np.split(0.5 + 0.5 * np.tanh(0.5 * gates), 4, axis=1)  # the sigmoid
            c = f * state[:, 1] + i * np.tanh(gates[:, 2 * LSTM_SIZE : 3 * LSTM_SIZE])
            obs = o * np.tanh(c)
            state = np.stack([obs, c], axis=1)
        return obs @ layers[-1][0] + layers[-1][1], state

    return policy


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    gamma: float,
    gae_lambda: float,
    bootstrap_truncated: bool = True,
) -> torch.Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16; PPO paper, eq. 11-12).

    rewards, terminated, truncated: (T, N), of step t; values: (T + 1, N), of the observation before step t. With
    next-step autoreset values[t + 1] belongs to the true final observation where step t ended an episode. Returns
    advantages (T, N) in units of reward; those of reset steps mean nothing.
    """
    # [ours: bootstrap_truncated] only a termination has no future; after a time limit the final observation's value counts
    no_future = terminated if bootstrap_truncated else torch.maximum(terminated, truncated)
    deltas = rewards + gamma * values[1:] * (1 - no_future) - values[:-1]
    decays = gamma * gae_lambda * (1 - torch.maximum(terminated, truncated))  # the sum is cut at any episode end
    # numpy runs the recursion ten times as fast as torch; for a GPU's tensors this waits once per rollout
    advantages, delta, decay = np.empty(deltas.shape, np.float32), deltas.cpu().numpy(), decays.cpu().numpy()
    advantage = np.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        advantages[t] = advantage = delta[t] + decay[t] * advantage  # [detail 05]
    return torch.as_tensor(advantages, device=rewards.device)


def masked_mean(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean of x over the steps with valid = 1; 0 where there is none."""
    return (x * valid).sum() / valid.sum().clamp(min=1)


def normalize_advantages(advantages: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(A - mean) / (std + 1e-8) over the valid steps, population standard deviation."""
    centered = advantages - masked_mean(advantages, valid)
    return centered / (masked_mean(centered * centered, valid).sqrt() + 1e-8)


def ppo_loss(
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    value: torch.Tensor,
    old_logprob: torch.Tensor,
    old_value: torch.Tensor,
    advantage: torch.Tensor,
    return_: torch.Tensor,
    valid: torch.Tensor,
    clip_coef: torch.Tensor,
    vf_coef: float = 0.5,
    ent_coef: float = 0.0,
    clip_policy: bool = True,
    clip_vloss: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss to minimize, the negative of eq. 9 with the clipped objective of eq. 7, and what is logged of it.

    All tensors (B,), clip_coef a scalar tensor; means run over the steps with valid = 1; log-probabilities, entropy and
    KL in nats.
    """
    logratio = (logprob - old_logprob) * valid  # reset steps: ratio 1, so that nothing overflows there
    ratio = logratio.exp()
    policy_objective = ratio * advantage
    if clip_policy:  # [detail 08]
        policy_objective = torch.minimum(policy_objective, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage)
    squared_error = (value - return_) ** 2
    if clip_vloss:  # [detail 09]
        clipped_value = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
        squared_error = torch.maximum(squared_error, (clipped_value - return_) ** 2)
    policy_loss = -masked_mean(policy_objective, valid)
    value_loss = 0.5 * masked_mean(squared_error, valid)
    entropy_loss = masked_mean(entropy, valid)
    info = {  # [detail 12]
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy_loss,
        "old_approx_kl": masked_mean(-logratio, valid),
        "approx_kl": masked_mean(ratio - 1 - logratio, valid),  # never negative, of low variance (Schulman 2020)
        "clipfrac": masked_mean(((ratio - 1).abs() > clip_coef).float(), valid),
    }
    return policy_loss + vf_coef * value_loss - ent_coef * entropy_loss, info  # [detail 10]


def make_update(agent: Agent, args: Args):
    """The update by one minibatch, as one function that torch.compile turns into one graph.

    update(theta, adam, batch, start_state, mb_inds, learning_rate, clip_coef) changes the flat parameter vector theta and
    the Adam state (first moment, second moment, step count) in place and returns what is logged, each a scalar tensor.
    """
    names, shapes = zip(*((name, p.shape) for name, p in agent.named_parameters()), strict=True)

    def loss(theta, minibatch, state, clip_coef):
        obs, action, mask, first, old_logprob, old_value, advantage, return_, valid = minibatch
        parts = theta.split([shape.numel() for shape in shapes])
        parameters = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        logprob, entropy, value, _ = torch.func.functional_call(agent, parameters, (obs, action, mask, first, state))
        if args.norm_adv == "minibatch":
            advantage = normalize_advantages(advantage, valid)  # [detail 07]
        return ppo_loss(
            logprob, entropy, value, old_logprob, old_value, advantage, return_, valid, clip_coef,
            args.vf_coef, args.ent_coef, args.clip_policy, args.clip_vloss,
        )  # fmt: skip

    def update(theta, adam, batch, start_state, mb_inds, learning_rate, clip_coef):
        minibatch = [x[mb_inds] for x in batch]
        if args.lstm:  # the minibatch is time-major, so it begins with the environments at t = 0
            start_state = start_state[mb_inds[: args.minibatch_size // args.num_steps]]
        gradient, (_, info) = torch.func.grad_and_value(loss, has_aux=True)(theta, minibatch, start_state, clip_coef)
        grad_norm = torch.linalg.vector_norm(gradient)
        gradient = gradient * (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)  # [detail 11]
        # Adam (Kingma & Ba 2015, algorithm 1), written out because torch.optim.Adam would break the graph
        first_moment, second_moment, step = adam
        step.add_(1)
        first_moment.lerp_(gradient, 1 - 0.9)
        second_moment.lerp_(gradient * gradient, 1 - 0.999)
        step_size = (learning_rate / (1 - 0.9 ** step.double())).float()  # 1 - 0.999 loses digits in float32
        bias2 = (1 - 0.999 ** step.double()).float()
        theta.sub_(step_size * first_moment / ((second_moment / bias2).sqrt() + args.adam_eps))  # [detail 03]
        return {**info, "grad_norm": grad_norm}

    return update


def load_checkpoint(path: str | Path) -> tuple[dict, Path]:
    """Checkpoint of a file or run directory, and its file. Loads tensors and plain values only, no code."""
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UsageError(f"there is no checkpoint {file}")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise UsageError(f"{file} is not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != KIND:
        raise UsageError(f"{file} is not a checkpoint of {KIND}")
    return checkpoint, file


def save_checkpoint(file: Path, checkpoint: dict):
    """Atomic: after a crash at any moment the file is the old checkpoint or the new one."""
    temporary = file.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, file)


def describe_run(args: Args) -> dict:
    """First record of metrics.jsonl: all that is needed to repeat the run as it was started, before any --resume."""
    git = (
        subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        if shutil.which("git")
        else None
    )
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    versions = {"python": platform.python_version()}
    versions |= {m.__name__: m.__version__ for m in (torch, np, envpool, gymnasium)}
    return {
        "args": dataclasses.asdict(args),
        "script": Path(__file__).name,
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "git_revision": git.stdout.strip() or None if git else None,
        "versions": versions,
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None,
    }


def can_compile(device: str) -> bool:
    """Whether torch.compile finds a compiler (of C++; of C for a GPU) and the headers of Python, both of which it needs."""
    named, usual = ("CXX", ["g++"]) if device == "cpu" else ("CC", ["gcc", "clang"])
    compilers = os.environ.get(named, "").split()[:1] or usual
    return any(map(shutil.which, compilers)) and Path(sysconfig.get_path("include"), "Python.h").is_file()


def draw(envs: Any) -> Image.Image:
    """Picture of the first of these environments, in 64 colours."""
    try:
        frames = envs.render()
        if frames is None or frames[0] is None:
            raise UsageError("capture_video needs an environment that draws itself, with render_mode rgb_array")
        return Image.fromarray(frames[0]).quantize(64)
    except (RuntimeError, OSError, TypeError, ValueError, AttributeError, gymnasium.error.Error) as error:
        raise UsageError(f"capture_video needs an environment that draws itself, in bytes ({error!r})") from error


def evaluate(args: Args, checkpoint: dict) -> dict:
    """Plays args.eval_episodes episodes, each in an environment of its own, with frozen observation statistics.

    Returns {"returns": [...], "lengths": [...], "deterministic": bool}, raw rewards summed and steps, and writes it to
    args.run_dir/evaluation.json; with args.capture_video the first episode goes to evaluation.gif beside it.
    """
    drawing = ", drawing the first" if args.capture_video else ""
    tqdm.tqdm.write(f"playing {args.eval_episodes} episodes to evaluate{drawing}", sys.stderr)
    rng = np.random.default_rng([args.seed, 2**31])  # independent of what training draws
    seeds = rng.integers(2**31, size=args.eval_episodes).tolist()
    envs, raw_obs, info = make_envs(args.env, seeds, args.num_threads, render=args.capture_video)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    nvec, choices = action_components(action_space, args.discretize_actions)
    real = np.arange(max(nvec)) < np.array(nvec)[:, None]
    agent = Agent(flatten_obs(raw_obs, obs_space, args.observe).shape[1], nvec, args.weight_init, args.share_params, args.lstm)
    nn.utils.vector_to_parameters(checkpoint["theta"], agent.parameters())
    obs_rms = RunningMeanStd(())
    obs_rms.load_state_dict(checkpoint["obs_rms"])
    policy, state = numpy_policy(agent), agent.initial_state(len(seeds))[:, 0].numpy()
    returns, lengths, frames = np.zeros(len(seeds)), np.zeros(len(seeds), dtype=int), []
    running = np.ones(len(seeds), dtype=bool)
    while running.any():
        if args.capture_video and running[0] and lengths[0] % 2 == 0:  # every other step, 40 ms each
            frames.append(draw(envs))
        obs = normalize_obs(flatten_obs(raw_obs, obs_space, args.observe), obs_rms, args)
        logits, state = policy(obs, state)
        logits = np.where(read_masks(raw_obs, info, real), logits.reshape(-1, *real.shape), MASKED_LOGIT)
        if not args.eval_deterministic:
            logits = logits + rng.gumbel(size=logits.shape)
        action = choices[np.arange(len(nvec)), logits.argmax(axis=2)].reshape(len(seeds), *action_space.shape)
        raw_obs, reward, terminated, truncated, info = envs.step(action)
        returns += reward * running
        lengths += running
        running &= ~(terminated | truncated)
    envs.close()
    if args.capture_video:
        frames[0].save(Path(args.run_dir) / "evaluation.gif", save_all=True, append_images=frames[1:], duration=40, loop=0)
    result = {"returns": returns.tolist(), "lengths": lengths.tolist(), "deterministic": args.eval_deterministic}
    (Path(args.run_dir) / "evaluation.json").write_text(json.dumps(result) + "\n")
    return result


def train(args: Args) -> dict:
    """Trains as args say and returns the final figures: run_dir, global_step, episodic_return (last 100 episodes), ..."""
    start_time = time.perf_counter()
    torch.set_num_threads(args.num_threads)
    if args.track:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise UsageError("--track needs a login: run `wandb login`, or set WANDB_MODE=offline")
        try:
            wandb.Settings(project=args.wandb_project_name)
        except wandb.errors.Error as error:
            raise UsageError(f"wandb_project_name is {args.wandb_project_name}: {error}") from error

    # the environment's spaces give the sizes of everything below
    T, N = args.num_steps, args.num_envs
    envs, first_obs, info = make_envs(args.env, make_seeds(args.seed, 0, N), args.num_threads, render=args.capture_video)
    if args.capture_video:
        draw(envs)  # fails now, not after the training
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    obs_dim = flatten_obs(first_obs, obs_space).shape[1]
    if any(index >= obs_dim for index in args.observe):
        raise UsageError(f"observe is {args.observe}, but {args.env} has {obs_dim} observation components")
    obs_dim = len(args.observe) or obs_dim
    nvec, choices = action_components(action_space, args.discretize_actions)
    C, K, components = len(nvec), max(nvec), np.arange(len(nvec))  # action components, choices of the largest
    real = np.arange(K) < np.array(nvec)[:, None]
    # the fast step of envpool has neither info nor several arrays; Gymnasium's environments may give masks at any step
    fast_step = hasattr(envs, "_send") and not isinstance(obs_space, gymnasium.spaces.Dict)
    fast_step &= read_masks(first_obs, info, real) is real
    agent = Agent(obs_dim, nvec, args.weight_init, args.share_params, args.lstm).to(args.device)
    theta = nn.utils.parameters_to_vector(agent.parameters()).detach().clone()
    nn.utils.vector_to_parameters(theta, agent.parameters())  # the parameters are now views of theta
    adam = (torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros((), device=args.device))
    obs_rms = RunningMeanStd((obs_dim,))  # stays as it is with --norm-obs none
    return_rms = RunningMeanStd(())
    update = make_update(agent, args)
    wanted = args.compile and not args.lstm  # the steps of an LSTM, unrolled, take many minutes to compile
    compiling = wanted and can_compile(args.device)
    if wanted and not compiling:
        tqdm.tqdm.write(
            "warning: no compiler or no Python.h found, so the update runs uncompiled, several times slower", sys.stderr
        )
    elif compiling:
        # No guards: they re-check the arguments at every call, a fifth of its time. Here shapes and args never change; a
        # change would go unnoticed. The C++ wrapper calls the kernels from C++ instead of Python.
        torch.compiler.reset()
        options: Any = {"cpp_wrapper": args.device == "cpu", "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        options["deterministic"] = args.device != "cpu"  # kernels chosen without trying them out: the same bits each time
        update = torch.compile(update, fullgraph=True, dynamic=False, options=options)
    start_iteration, global_step, log_sizes = 0, 0, {}
    recent_returns: deque[float] = deque(maxlen=100)

    checkpoint = None
    if args.resume:
        checkpoint, file = load_checkpoint(args.resume)
        run_dir = file.parent
        theta.copy_(checkpoint["theta"])
        for tensor, saved in zip(adam, checkpoint["adam"], strict=True):
            tensor.copy_(saved)
        obs_rms.load_state_dict(checkpoint["obs_rms"])
        return_rms.load_state_dict(checkpoint["return_rms"])
        start_iteration, global_step, log_sizes = checkpoint["iteration"], checkpoint["global_step"], checkpoint["log_sizes"]
        for name, size in log_sizes.items():
            if not (run_dir / name).is_file() or (run_dir / name).stat().st_size < size:
                raise UsageError(f"{run_dir / name} is missing or shorter than at the checkpoint: --resume needs it")
        recent_returns.extend(checkpoint["recent_returns"])
    else:
        run_dir = Path(args.run_dir)
        try:
            run_dir.mkdir(parents=True)
            shutil.copy(__file__, run_dir)
        except FileExistsError as error:
            raise UsageError(f"{run_dir} exists: --resume {run_dir} continues it, another --run-dir starts anew") from error
        except OSError as error:
            raise UsageError(f"cannot write the run directory {run_dir}: {error.strerror}") from error
    logs = {name: open(run_dir / name, "a", buffering=1) for name in ("metrics.jsonl", "episodes.jsonl")}
    for name, log in logs.items():
        log.truncate(log_sizes.get(name, 0))  # what a killed run wrote after its checkpoint is written again
        log.seek(0, os.SEEK_END)
    if not checkpoint:
        logs["metrics.jsonl"].write(json.dumps(describe_run(args)) + "\n")
    wandb_id = checkpoint.get("wandb_id") if checkpoint else None
    if args.track and not wandb_id:
        wandb_id = os.urandom(4).hex()

    def save(iteration: int):
        for log in logs.values():
            log.flush()
            os.fsync(log.fileno())
        state = {
            "kind": KIND,
            "args": dataclasses.asdict(args),
            "iteration": iteration,
            "global_step": global_step,
            "theta": theta,
            "adam": adam,
            "obs_rms": obs_rms.state_dict(),
            "return_rms": return_rms.state_dict(),
            "recent_returns": list(recent_returns),
            "log_sizes": {name: log.tell() for name, log in logs.items()},
            "wandb_id": wandb_id,
        }  # no random states: they are set anew from (seed, iteration) after every checkpoint
        save_checkpoint(run_dir / "checkpoint.pt", state)

    if not checkpoint or checkpoint["args"]["total_timesteps"] != args.total_timesteps:
        save(start_iteration)
    if args.track:
        try:
            wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                name=run_dir.name,
                id=wandb_id,
                resume="allow",
                dir=run_dir,
                config=dataclasses.asdict(args),
            )
        except wandb.errors.CommError as error:  # what only the server knows: that there is no such entity, say
            without = f"--resume {run_dir} --no-track goes on without it"
            raise UsageError(f"Weights & Biases refuses the run: {error}; {without}") from error
    tqdm.tqdm.write(
        f"{args.env}: {N} x {T} steps, {args.num_iterations} iterations, update on {args.device}, {args.num_threads} "
        f"thread(s); run directory {run_dir}",
        sys.stderr,
    )
    raw_obs = np.zeros((T + 1, N, obs_dim))
    obs = np.zeros((T + 1, N, obs_dim), dtype=np.float32)
    actions, masks = np.zeros((T, N, C), dtype=np.int64), np.tile(real, (T + 1, N, 1, 1))
    rewards = np.zeros((T, N))
    terminated, truncated = np.zeros((T, N), dtype=bool), np.zeros((T, N), dtype=bool)
    valid = np.ones((T + 1, N), dtype=bool)  # False at steps that only reset
    # after the step that ends an episode comes the one that resets, and after that the first one of the next episode
    resets, first = np.zeros((T + 1, N), dtype=bool), np.zeros((T + 1, N), dtype=bool)
    state = agent.initial_state(N)
    bar = tqdm.tqdm(total=args.num_iterations * N * T, initial=global_step, unit="step", unit_scale=True, disable=None)
    first_iteration, first_step_of_process, ended_since_restart = start_iteration + 1, global_step, 0
    warm_time, warm_step = time.perf_counter(), global_step

    for iteration in range(first_iteration, args.num_iterations + 1):
        # 1 anneal
        remaining = 1 - (iteration - 1) / args.num_iterations
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)  # [detail 04]
        clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)  # [aux: anneal_clip]

        # 2 rollout
        if iteration == first_iteration or (iteration - 1) % args.checkpoint_every == 0:
            # [ours: checkpoint_every] environments start afresh, so that a resumed run ends with the same bits
            if iteration > first_iteration and not ended_since_restart:
                few = f"no episode ended within {args.checkpoint_every * T} steps, after which environments start afresh"
                tqdm.tqdm.write(f"warning: {few}: raise --checkpoint-every", sys.stderr)
            ended_since_restart = 0
            envs.close()
            envs, first_obs, info = make_envs(args.env, make_seeds(args.seed, iteration, N), args.num_threads)
            raw_obs[0] = flatten_obs(first_obs, obs_space, args.observe)
            masks[0] = read_masks(first_obs, info, real)
            resets[0], first[0], state = False, True, agent.initial_state(N)
            if args.norm_obs == "step":
                obs_rms.update(raw_obs[0])
            obs[0], valid[0] = normalize_obs(raw_obs[0], obs_rms, args), True
            discounted_return, episode_return, episode_length = np.zeros(N), np.zeros(N), np.zeros(N, dtype=int)
        else:
            raw_obs[0], obs[0], valid[0], masks[0] = raw_obs[T], obs[T], valid[T], masks[T]
            resets[0], first[0] = resets[T], first[T]
        step_envs, policy = make_step(envs) if fast_step else envs.step, numpy_policy(agent)
        start_state, policy_state = state, state[:, 0].cpu().numpy()
        # the largest of the logits with this noise is a sample of their distribution (Gumbel)
        noise = -torch.rand(T, N, C, K).clamp(min=1e-30).log().neg().log().numpy()
        for t in range(T):  # [detail 01]
            # only the action is needed now; log-probabilities, values and scaled rewards follow for the whole rollout
            if args.lstm:
                policy_state = policy_state * ~first[t, :, None, None]  # [detail 34]
            logits, policy_state = policy(obs[t], policy_state)
            logits = logits.reshape(N, C, K)
            if not (fast_step and real.all()):
                logits = np.where(masks[t], logits, MASKED_LOGIT)  # [aux: action_masks]
            actions[t] = choice = (logits + noise[t]).argmax(axis=2)
            action = choices[components, choice].reshape(N, *action_space.shape)
            next_obs, rewards[t], terminated[t], truncated[t], *step_info = step_envs(action)
            if not fast_step:
                masks[t + 1] = read_masks(next_obs, step_info[0], real)
            raw_obs[t + 1] = flatten_obs(next_obs, obs_space, args.observe)
            resets[t + 1], first[t + 1] = terminated[t] | truncated[t], resets[t]
            if args.norm_obs == "step":
                obs_rms.update(raw_obs[t + 1])  # [detail 28] updated before use
            obs[t + 1] = normalize_obs(raw_obs[t + 1], obs_rms, args)
        for name, x in (("observation", raw_obs), ("reward", rewards)):
            if not np.isfinite(x).all():
                t = int(np.argwhere(~np.isfinite(x))[0, 0])
                raise NonFiniteError(f"{args.env} returned a non-finite {name} in iteration {iteration}, step {t}")
        done = terminated | truncated
        valid[1:] = ~(done & args.mask_resets)  # [ours: mask_resets]
        rewards[~valid[:T]] = 0  # what an environment returns for a reset is no reward
        # as in baselines of 2017, once per rollout: the actions came from the previous statistics, the update and its old
        # log-probabilities and values use the new ones
        if args.norm_obs == "batch":
            obs_rms.update(raw_obs[:T].reshape(T * N, obs_dim))
            obs[:] = normalize_obs(raw_obs, obs_rms, args)
        scaled_rewards = rewards
        if args.norm_reward:
            scaled_rewards, discounted_return = scale_rewards(
                rewards, done, valid[:T], discounted_return, return_rms, args.gamma
            )
        scaled_rewards = scaled_rewards.clip(-args.clip_reward, args.clip_reward)  # [detail 31]
        ended, first_step = [], np.zeros(N, dtype=int)  # (global step, return, length) of each episode
        for t, i in np.argwhere(done):
            episode_return[i] += rewards[first_step[i] : t + 1, i].sum()
            episode_length[i] += valid[first_step[i] : t + 1, i].sum()
            ended.append((global_step + int(t + 1) * N, float(episode_return[i]), int(episode_length[i])))
            episode_return[i], episode_length[i], first_step[i] = 0, 0, t + 1
        for i in range(N):  # of the episodes that go on
            episode_return[i] += rewards[first_step[i] :, i].sum()
            episode_length[i] += valid[first_step[i] : T, i].sum()
        global_step += N * T

        # 3 advantages
        played = (obs, actions, masks[:T], first.astype(np.float32))
        b_obs, b_actions, b_masks, b_first = (torch.as_tensor(x).flatten(0, 1).to(args.device) for x in played)
        with torch.no_grad():
            b_logprobs, _, b_values, state = agent(b_obs[: T * N], b_actions, b_masks, b_first[: T * N], start_state)
            last_values = agent.value(b_obs[T * N :], b_first[T * N :], state)
            values = torch.cat([b_values, last_values]).view(T + 1, N)
            steps = (scaled_rewards, terminated, truncated, valid[:T])
            r, term, trunc, v = (torch.as_tensor(x, dtype=torch.float32, device=args.device) for x in steps)
            advantages = compute_gae(r, values, term, trunc, args.gamma, args.gae_lambda, args.bootstrap_truncated)
            b_returns, b_advantages, b_valid = (advantages + values[:-1]).flatten(), advantages.flatten(), v.flatten()
            if args.norm_adv == "batch":
                b_advantages = normalize_advantages(b_advantages, b_valid)
        learned = (b_logprobs, b_values, b_advantages, b_returns, b_valid)
        batch = (b_obs[: T * N], b_actions, b_masks, b_first[: T * N], *learned)

        # 4 update
        if iteration == first_iteration and compiling:
            tqdm.tqdm.write("compiling the update: half a minute the first time, seconds from the cache", sys.stderr)
        # tensors, because the compiled function would bake in the first value of a Python number
        hyper = [torch.tensor(x, dtype=torch.float64, device=args.device) for x in (learning_rate, clip_coef)]
        infos = []
        for _ in range(args.update_epochs):
            if args.lstm:  # [detail 35] whole environments in order of time; row: the steps of one minibatch
                order = torch.arange(T)[:, None] * N + torch.randperm(N).view(args.num_minibatches, 1, -1)
            else:
                order = torch.randperm(T * N)  # [detail 06]
            minibatches = order.view(args.num_minibatches, args.minibatch_size).to(args.device)
            infos += [update(theta, adam, batch, start_state, mb_inds, *hyper) for mb_inds in minibatches]
            if args.target_kl is not None:  # [aux: target_kl] of the whole epoch, not of its last minibatch
                if torch.stack([info["approx_kl"] for info in infos[-args.num_minibatches :]]).mean() > args.target_kl:
                    break

        # 5 log and save; reading the losses waits for the device
        losses = {key: torch.stack([info[key] for info in infos]).mean().item() for key in infos[0]}
        if not all(math.isfinite(x) for x in losses.values()):
            raise NonFiniteError(f"non-finite losses in iteration {iteration}: {losses}")
        variance = masked_mean((b_returns - masked_mean(b_returns, b_valid)) ** 2, b_valid)
        residual = b_returns - b_values
        residual = masked_mean((residual - masked_mean(residual, b_valid)) ** 2, b_valid)
        losses["explained_variance"] = (1 - residual / variance).item() if variance > 0 else 0.0
        if iteration == first_iteration:
            warm_time, warm_step = time.perf_counter(), global_step
        seconds = time.perf_counter() - start_time
        sps = (global_step - warm_step) / max(time.perf_counter() - warm_time, 1e-9)  # without start-up and compilation
        recent_returns.extend(r for _, r, _ in ended)
        ended_since_restart += len(ended)
        record = {
            "charts/learning_rate": learning_rate,
            "charts/clip_coef": clip_coef,
            "charts/epochs": len(infos) // args.num_minibatches,
        }
        if ended:
            record["charts/episodic_return"] = float(np.mean([r for _, r, _ in ended]))
            record["charts/episodic_length"] = float(np.mean([length for _, _, length in ended]))
        record |= {"charts/SPS": round(sps), "charts/seconds": round(seconds, 3)}
        record |= {f"losses/{key}": value for key, value in losses.items()}
        logs["metrics.jsonl"].write(json.dumps({"iteration": iteration, "global_step": global_step, **record}) + "\n")
        for step, episode, length in ended:
            logs["episodes.jsonl"].write(json.dumps({"global_step": step, "return": episode, "length": length}) + "\n")
        if args.track:
            wandb.log(record, step=global_step)
        if iteration % args.checkpoint_every == 0 or iteration == args.num_iterations:
            save(iteration)
        bar.update(N * T)
        bar.set_postfix_str(f"return {np.mean(recent_returns) if recent_returns else math.nan:.1f}")

    bar.close()
    envs.close()
    seconds = time.perf_counter() - start_time
    result: dict[str, Any] = {
        "run_dir": str(run_dir),
        "global_step": global_step,
        "episodic_return": float(np.mean(recent_returns)) if recent_returns else math.nan,
        "episodes": len(recent_returns),
        "seconds": seconds,
        "sps": (global_step - warm_step) / max(time.perf_counter() - warm_time, 1e-9),
        "sps_with_startup": (global_step - first_step_of_process) / seconds,
    }
    result["evaluation"] = evaluate(args, load_checkpoint(run_dir)[0]) if args.eval_episodes else {}
    for log in logs.values():
        log.close()
    if args.track:
        wandb.finish()
    return result


def parse_args() -> tuple[Args, dict | None]:
    """Arguments of the command line and the checkpoint that they name, whose settings are then the defaults."""
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--resume", default="")
    named.add_argument("--evaluate", default="")
    named.add_argument("--device", default="")
    paths = named.parse_known_args()[0]
    if paths.resume and paths.evaluate:
        raise UsageError("resume continues a run, evaluate plays one: give one of them")
    if not (paths.resume or paths.evaluate):
        return tyro.cli(Args, description=__doc__, prog=Path(__file__).name), None
    checkpoint, file = load_checkpoint(paths.resume or paths.evaluate)
    try:
        settings = checkpoint["args"] | {"resume": "", "evaluate": "", "run_dir": str(file.parent)}
        if paths.device:
            settings["device"] = paths.device
        elif paths.evaluate and int(settings.get("device", "")[5:] or 0) >= torch.cuda.device_count():
            settings["device"] = "cpu"  # a run of a GPU is evaluated without one, but resumed with other bits only if asked for
        if paths.evaluate and not settings.get("eval_episodes"):
            settings["eval_episodes"] = Args.eval_episodes  # the run was trained without an evaluation
        saved = Args(**settings)
    except TypeError as error:
        raise UsageError(f"{file} was written by a version of this script with other flags: {error}") from error
    args = tyro.cli(Args, description=__doc__, prog=Path(__file__).name, default=saved)
    free = {"resume", "evaluate", "total_timesteps", "eval_episodes", "eval_deterministic", "capture_video"}
    free |= {"track", "wandb_project_name", "wandb_entity", "compile", "device", "num_threads"}
    changed = [
        f.name for f in dataclasses.fields(Args) if f.name not in free and getattr(args, f.name) != getattr(saved, f.name)
    ]
    if changed:
        raise UsageError(
            f"a saved run keeps its settings: leave out --{' --'.join(changed).replace('_', '-')}, or start a new run"
        )
    return args, checkpoint


def main():
    args = None
    try:
        args, checkpoint = parse_args()
        if args.evaluate:
            assert checkpoint is not None
            evaluation = evaluate(args, checkpoint)
        else:
            result = train(args)
            evaluation = result["evaluation"]
            print(
                f"{args.env}, seed {args.seed}: return {result['episodic_return']:.1f} over the last "
                f"{result['episodes']} episodes after {result['global_step']:,} steps in "
                f"{result['seconds']:.0f} s, {result['sps']:.0f} steps/s "
                f"({result['sps_with_startup']:.0f} with start-up) on {args.num_threads} thread(s)"
            )
        if evaluation:
            returns, lengths = evaluation["returns"], evaluation["lengths"]
            print(
                f"evaluation, {'likeliest' if args.eval_deterministic else 'sampled'} actions: return {np.mean(returns):.1f} "
                f"+- {np.std(returns):.1f}, length {np.mean(lengths):.0f} over {len(returns)} episodes"
            )
        print(f"run directory: {args.run_dir}")
    except UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (NonFiniteError, OSError) as error:
        file = Path(args.run_dir, "checkpoint.pt") if args else None
        last = f"; the last checkpoint is {file}" if file and file.is_file() else ""
        print(f"{Path(__file__).name}: stopped: {error}{last}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        where = f"; continue with: python {sys.argv[0]} --resume {args.run_dir}" if args else ""
        print(f"{Path(__file__).name}: interrupted{where}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
