"""PPO (Schulman et al. 2017): clipped objective, one Nature-CNN for policy and value, for Atari.

    python ppo_atari.py --env Breakout
    python ppo_atari.py --env Pong --update-epochs 3 --anneal-clip --vf-coef 2  # Table 5
    torchrun --nproc-per-node 2 ppo_atari.py --env Breakout --num-envs 4        # data parallel
    python ppo_atari.py --evaluate runs/NAME --capture-video

- Breakout 20.4 [17.8, 23.7] after 1M steps (last 100 games, 3 seeds), 19.6 [18.1, 20.6] with --precision bfloat16
- 35.5 [27.9, 39.9] with --precision bfloat16 --learning-rate 5e-4 --clip-coef 0.2 --num-minibatches 8
- 395 steps/s on one core of an Intel Xeon with AVX-512, 833 in bfloat16 with its AMX (CleanRL: 232, Stable-Baselines3: 227)
- 652 and 1108 on two cores (CleanRL: 352); 190 and 370 in float32 on one and two of an AMD EPYC with AVX2
- in bfloat16 the update takes half of the time, the environment a third, the policy the rest; torch 2.13, envpool 1.2.5
- the path for a GPU (CUDA graphs for policy step and gradient, pinned copies) is written but untested: none was at hand
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
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

gc.disable()  # collecting garbage while torch and envpool are imported takes a second
import envpool
import gymnasium
import numpy as np
import torch
import torch.distributed as dist
import tqdm
import tyro
from envpool.registration import registry
from PIL import Image
from torch import nn
from torch.distributions import Categorical

gc.enable()
gc.freeze()  # what they loaded stays until the end, so it is never scanned
KIND = "ppo_atari"  # of checkpoints; stays when the file is renamed


class UsageError(Exception):
    """A mistake that the user can fix; the command line prints it as one sentence and exits with 2."""


class NonFiniteError(RuntimeError):
    """A loss, observation or reward is NaN or infinite; the command line prints it and exits with 1."""


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Args:
    # run
    env: str = "Breakout"
    """Atari game: Breakout, or the same as Breakout-v5 or BreakoutNoFrameskip-v4"""
    seed: int = 1
    """seed of networks, actions, minibatches and environments, at least 0"""
    total_timesteps: int = 10_000_000
    """environment steps of the run, over all environments, resets included; rounded down to whole rollouts"""
    run_dir: str = ""
    """directory of the run; empty: runs/<script>__<env>__<seed>__<time>"""
    checkpoint_every: int = 1000
    """iterations between checkpoints, at least 1; environments start afresh at each, so it should span many episodes"""
    resume: str = ""
    """continue the run of this checkpoint or run directory, with its settings, bit-identically; --total-timesteps may be
    changed with it, and annealing then runs to the new end"""
    evaluate: str = ""
    """only evaluate this checkpoint or run directory"""
    eval_episodes: int = 10
    """episodes of the evaluation that ends a run; 0: none, as for a task that never ends"""
    eval_deterministic: bool = False
    """evaluate the likeliest action, which in some games loops until the time limit; off: sampled actions"""
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
    num_envs: int = 8
    """parallel environments (N); under torchrun of each rank, so that 2 ranks of 4 are 8 in all"""
    num_steps: int = 128
    """steps of each environment per rollout (T)"""
    gamma: float = 0.99
    """discount, 0 to 1"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation, 0 to 1; 1: Monte Carlo, 0: one-step TD"""
    num_minibatches: int = 4
    """minibatches per epoch; must divide num_envs * num_steps; 1: whole batch"""
    update_epochs: int = 4
    """passes over a rollout (K)"""
    clip_coef: float = 0.1
    """clip range epsilon of ratio and value, above 0"""
    ent_coef: float = 0.01
    """weight of the entropy bonus (c2), at least 0"""
    vf_coef: float = 0.5
    """weight of the value loss 0.5 * mean squared error, at least 0; 2 is c1 = 1 of the paper"""
    max_grad_norm: float = 0.5
    """global gradient norm limit, above 0; inf: off"""
    target_kl: float | None = None
    """stop the epochs of an iteration when the mean approximate KL of one exceeds this; None: off"""

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
    noop_max: int = 30
    """[detail 14] a game starts with 1 to this many no-op frames (FIRE is one of them), at least 1; 1: off"""
    frame_skip: int = 4
    """[detail 15] frames that an action lasts, the maximum of the last two is seen, at least 1; 1: off"""
    episodic_life: bool = True
    """[detail 16] a lost life is a termination for the learner; scores are of whole games either way"""
    fire_reset: bool = True
    """[detail 17] press FIRE at the start of a game or life, where the game has FIRE"""
    clip_reward: bool = True
    """[detail 19] the learner gets the sign of the reward; scores are raw either way"""
    stack_num: int = 4
    """[detail 20] last frames that the network sees, at least 1; 1: off"""
    scale_obs: bool = True
    """[detail 22] pixels divided by 255 in the network"""
    full_action_space: bool = False
    """all 18 actions of the console; off: those with a meaning in this game"""
    repeat_action_probability: float = 0.0
    """sticky actions (Machado et al. 2018): probability that a frame repeats the action of the one before; 0.25 there"""
    max_episode_steps: int = 27_000
    """time limit of a game in agent steps, at least 1; 27,000 are 108,000 frames with frame_skip 4"""
    anneal_clip: bool = False
    """clip range falls linearly to 0 (baselines of August 2017)"""
    bootstrap_truncated: bool = True
    """[ours] a time limit is no termination: bootstrap from the final observation; off: as in 2017"""
    mask_resets: bool = True
    """[ours] the step that only resets an environment is left out of loss and statistics; off: learned from"""

    # speed
    compile: bool = True
    """compile policy step and update with torch.compile (needs a C++ compiler on a CPU; CUDA graphs on a GPU, but for Adam)"""
    device: str = "auto"
    """device of network and rollout: cpu, cuda, cuda:1; auto: a GPU if there is one. GPUs are untested"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the trunk: float32 (TF32 on a GPU), or bfloat16, which scores alike so far (benchmarks/RESULTS.md) and is twice as
    fast on a CPU with AMX"""
    num_threads: int = max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    """CPU threads of torch and of envpool, which take turns, of each rank, at least 1; default: the cores there are"""

    @property
    def world_size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun

    @property
    def rank(self) -> int:
        return int(os.environ.get("RANK", "0"))

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // (self.batch_size * self.world_size)

    def __post_init__(self):
        if not self.run_dir:
            env, now = self.env.replace(":", "."), time.strftime("%Y%m%d-%H%M%S")
            self.run_dir = f"runs/{Path(__file__).stem}__{env}__{self.seed}__{now}"
        at_least_1 = ("num_envs", "num_steps", "num_minibatches", "update_epochs", "checkpoint_every", "num_threads")
        for name in (*at_least_1, "noop_max", "frame_skip", "stack_num", "max_episode_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("learning_rate", "clip_coef", "max_grad_norm", "adam_eps"):
            if not getattr(self, name) > 0:  # also catches NaN
                raise UsageError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("ent_coef", "vf_coef", "seed", "eval_episodes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be finite and at least 0")
        for name in ("learning_rate", "clip_coef", "adam_eps"):
            if math.isinf(getattr(self, name)):
                raise UsageError(f"{name} is inf: it must be finite")
        for name in ("gamma", "gae_lambda", "repeat_action_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}: it must lie between 0 and 1")
        if self.target_kl is not None and not self.target_kl > 0:
            raise UsageError(f"target_kl is {self.target_kl}: it must be above 0, or None")
        if self.batch_size % self.num_minibatches:
            raise UsageError(
                f"num_envs * num_steps = {self.batch_size} does not divide into num_minibatches = "
                f"{self.num_minibatches}: change one of them"
            )
        if self.num_iterations < 1:
            raise UsageError(
                f"total_timesteps is {self.total_timesteps}, less than one rollout of num_envs * num_steps * ranks = "
                f"{self.batch_size * self.world_size} steps: raise it or shorten the rollout"
            )
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"device is {self.device}: use auto, cpu, cuda or cuda:1")
        gpus, local_rank = torch.cuda.device_count(), os.environ.get("LOCAL_RANK", "0")
        if self.device != "cpu" and int(self.device[5:] or local_rank) >= gpus:
            raise UsageError(f"device is {self.device}, but torch finds {gpus} GPU(s) here: use --device cpu")
        if ":" in self.device and self.world_size > 1:
            raise UsageError(f"device is {self.device}: under torchrun say cuda, and each rank takes its own GPU")
        if self.evaluate and self.world_size > 1:
            raise UsageError("evaluate runs in one process: start it with python, not with torchrun")
        if self.evaluate and self.eval_episodes < 1:
            raise UsageError("evaluate plays episodes: set eval_episodes to at least 1")
        if self.capture_video and self.eval_episodes < 1:
            raise UsageError("capture_video records an evaluation episode: set eval_episodes to at least 1")


def find_game(name: str) -> str:
    """Id in envpool of an Atari game, given as Breakout, Breakout-v5 or BreakoutNoFrameskip-v4."""
    games = {id.removesuffix("-v5") for id, (module, *_) in registry.specs.items() if module == "envpool.atari"}
    game = name.removesuffix("NoFrameskip-v4").removesuffix("-v5")
    if game not in games:
        near = difflib.get_close_matches(game, sorted(games), n=5, cutoff=0.5)
        raise UsageError(f"unknown game {name}; nearest names: {', '.join(near) or 'none'}")
    return f"{game}-v5"


def make_envs(args: Args, seeds: list[int], render: bool = False) -> tuple[Any, np.ndarray]:
    """Vectorized environment, one game per seed, freshly reset: (envs, first frames (N, stack_num, 84, 84) uint8).

    It resets on the *next* step: the step after a lost life or the end of a game ignores its action and returns the
    first observation of the next life or game, with reward 0.
    """
    envs = envpool.make(
        find_game(args.env),
        env_type="gymnasium",
        num_envs=len(seeds),
        seed=seeds,
        num_threads=min(args.num_threads, len(seeds)),
        noop_max=args.noop_max,  # [detail 14]
        frame_skip=args.frame_skip,  # [detail 15]
        episodic_life=args.episodic_life,  # [detail 16]
        use_fire_reset=args.fire_reset,  # [detail 17]
        img_height=84,  # [detail 18]
        img_width=84,  # [detail 18]
        gray_scale=True,  # [detail 18]
        use_inter_area_resize=True,  # [detail 18]
        reward_clip=args.clip_reward,  # [detail 19]
        stack_num=args.stack_num,  # [detail 20]
        full_action_space=args.full_action_space,
        repeat_action_probability=args.repeat_action_probability,
        max_episode_steps=args.max_episode_steps,
        render_mode="rgb_array" if render else None,
    )
    return envs, envs.reset()[0]


def make_game_step(envs):
    """envs.step without its info: action (N,) -> frames (N, stack_num, 84, 84), then each (N,): reward, terminated,
    truncated, raw reward, game over (not where only a life was lost).

    It calls the C++ layer (private; tested against envs.step): the Python layers above it take 0.2 ms.
    """
    ids = envs.all_env_ids
    names = ("obs", "reward", "done", "trunc", "info:reward", "info:terminated")
    places = [envs._state_keys.index(name) for name in names]

    def step(action):
        envs._send([ids, ids, action.astype(np.int32)])  # in the order of _action_keys: env_id, players.env_id, action
        state = envs._recv()
        obs, reward, done, truncated, raw_reward, game_over = [state[i] for i in places]
        return obs, reward, done & ~truncated, truncated, raw_reward, (game_over == 1) | truncated

    return step


def to_blocks(frames: np.ndarray) -> torch.Tensor:
    """Frames (N, C, 84, 84) uint8 -> (N, 21, 21, 16 C): each block of 4 x 4 pixels as the channels of one position.

    On them the first convolution, 8 x 8 with stride 4, is one of 2 x 2 with stride 1: the same sums in another order, which
    matrix units take half the time for.
    """
    fours = torch.from_numpy(frames).view(torch.int32)  # 4 pixels side by side move as one number
    return fours.unflatten(2, (21, 4)).permute(0, 2, 4, 1, 3).contiguous().view(torch.uint8).flatten(3)


def make_seeds(seed: int, iteration: int, count: int) -> list[int]:
    """Different seeds for `count` environments that start at this iteration, after seeding python, numpy and torch."""
    sequence = np.random.SeedSequence([seed, iteration]).generate_state(count + 1) >> 1  # 31 bits
    random.seed(int(sequence[0]))
    np.random.seed(int(sequence[0]))
    torch.manual_seed(int(sequence[0]))
    return [int(s) for s in sequence[1:]]


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


class Agent(nn.Module):
    """Policy and value function as two heads of one Nature-CNN (Mnih et al. 2015)."""

    def __init__(
        self,
        stack_num: int,
        num_actions: int,
        weight_init: str = "orthogonal",
        scale: float = 255.0,
        precision: str = "float32",
    ):
        super().__init__()
        gain = math.sqrt(2)
        self.convolutions = nn.Sequential(  # [detail 21]
            layer_init(nn.Conv2d(16 * stack_num, 32, 2), gain, weight_init),  # of blocks: 8 x 8 pixels, stride 4
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2), gain, weight_init),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3), gain, weight_init),
            nn.ReLU(),
        )
        self.linear = layer_init(nn.Linear(64 * 7 * 7, 512), gain, weight_init)
        self.actor = layer_init(nn.Linear(512, num_actions), 0.01, weight_init)
        self.critic = layer_init(nn.Linear(512, 1), 1.0, weight_init)  # [detail 13] shares the trunk
        self.scale = scale
        self.dtype: torch.dtype = getattr(torch, precision)
        self.convolutions.to(self.dtype)
        self.linear.to(self.dtype)

    def load(self, theta: torch.Tensor):
        """Copies the flat vector of parameters into the network, whose trunk may be less precise."""
        parameters = list(self.parameters())
        for p, part in zip(parameters, theta.split([p.numel() for p in parameters]), strict=True):
            p.data.copy_(part.view_as(p))

    def hidden(self, obs: torch.Tensor) -> torch.Tensor:
        """obs (B, 21, 21, 16 * stack_num) uint8, frames as blocks -> output of the trunk (B, 512), float32."""
        # channels stay last, which CPU and GPU are fastest with; frames are uint8 until here
        pixels = obs.permute(0, 3, 1, 2).to(self.dtype) / self.scale  # [detail 22]
        features = self.convolutions(pixels).permute(0, 2, 3, 1).flatten(1)
        return self.linear(features).relu().float()

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """obs uint8 blocks, action (B,) int64 -> log-probability, entropy and value, each (B,), in nats."""
        hidden = self.hidden(obs)
        policy = Categorical(logits=self.actor(hidden), validate_args=False)
        return policy.log_prob(action), policy.entropy(), self.critic(hidden).squeeze(1)

    def act(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """obs uint8 blocks, noise (B, num_actions) -> sampled action, its log-probability and the value, each (B,).

        argmax(logits - log(noise)) is a sample of the policy for Exp(1) noise (Gumbel-max), its mode for noise 1.
        """
        hidden = self.hidden(obs)
        logprobs = self.actor(hidden).log_softmax(1)
        action = (logprobs - noise.log()).argmax(1)
        return action, logprobs.gather(1, action[:, None]).squeeze(1), self.critic(hidden).squeeze(1)


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
    """The update by one minibatch, as two functions that torch.compile turns into one graph each.

    compute_gradient(theta, batch, mb_inds, clip_coef) returns the gradient of the loss in the flat parameter vector
    theta and what is logged, each a scalar tensor. adam_step(theta, adam, gradient, step_size, bias2) changes theta and the
    Adam state (first moment, second moment) in place and returns the norm of the gradient. Ranks average their gradients
    in between.
    """
    like = dict(agent.named_parameters())

    def loss(theta, minibatch, clip_coef):
        obs, action, old_logprob, old_value, advantage, return_, valid = minibatch
        parts = theta.split([p.numel() for p in like.values()])
        parameters = {name: part.view_as(p).to(p.dtype) for (name, p), part in zip(like.items(), parts, strict=True)}
        logprob, entropy, value = torch.func.functional_call(agent, parameters, (obs, action))
        if args.norm_adv == "minibatch":
            advantage = normalize_advantages(advantage, valid)  # [detail 07]
        return ppo_loss(
            logprob, entropy, value, old_logprob, old_value, advantage, return_, valid, clip_coef,
            args.vf_coef, args.ent_coef, args.clip_policy, args.clip_vloss,
        )  # fmt: skip

    def compute_gradient(theta, batch, mb_inds, clip_coef):
        minibatch = [x[mb_inds] for x in batch]
        gradient, (_, info) = torch.func.grad_and_value(loss, has_aux=True)(theta, minibatch, clip_coef)
        return gradient, info

    def adam_step(theta, adam, gradient, step_size, bias2):
        grad_norm = torch.linalg.vector_norm(gradient)
        gradient = gradient * (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)  # [detail 11]
        # Adam (Kingma & Ba 2015, algorithm 1), written out because torch.optim.Adam would break the graph
        first_moment, second_moment = adam
        first_moment.lerp_(gradient, 1 - 0.9)
        second_moment.lerp_(gradient * gradient, 1 - 0.999)
        theta.sub_(step_size * first_moment / ((second_moment / bias2).sqrt() + args.adam_eps))  # [detail 03]
        return grad_norm

    return compute_gradient, adam_step


def average_gradient(gradient: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean of the gradients (P,) of all ranks, weighted by their numbers of valid steps; valid: (minibatch_size,).

    It is the gradient of the mean over the valid steps of all ranks. With --norm-adv each rank normalizes its own.
    """
    weight = valid.sum()
    total = torch.cat([gradient * weight, weight[None]])
    dist.all_reduce(total)
    return total[:-1] / total[-1].clamp(min=1)


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


def set_up_torch(device: str, num_threads: int):
    """Threads; on a GPU convolutions that add up in the same order each time, and all products in TF32 like theirs."""
    torch.set_num_threads(num_threads)
    if device.startswith("cuda"):
        torch.backends.cudnn.deterministic = True
        torch.set_float32_matmul_precision("high")


def evaluate(args: Args, checkpoint: dict) -> dict:
    """Plays args.eval_episodes whole games, each in an environment of its own.

    Returns {"returns": [...], "lengths": [...], "deterministic": bool}, raw rewards summed and agent steps, and writes it
    to args.run_dir/evaluation.json; with args.capture_video the first game goes to evaluation.gif beside it.
    """
    set_up_torch(args.device, args.num_threads)
    drawing = ", drawing the first" if args.capture_video else ""
    tqdm.tqdm.write(f"playing {args.eval_episodes} episodes to evaluate{drawing}", sys.stderr)
    rng = np.random.default_rng([args.seed, 2**31])  # independent of what training draws
    seeds = rng.integers(2**31, size=args.eval_episodes).tolist()
    envs, obs = make_envs(args, seeds, render=args.capture_video)
    num_actions = int(envs.single_action_space.n)
    agent = Agent(args.stack_num, num_actions, args.weight_init, 255.0 if args.scale_obs else 1.0, args.precision)
    agent.to(args.device).load(checkpoint["theta"])
    returns, lengths, frames = np.zeros(len(seeds)), np.zeros(len(seeds), dtype=int), []
    running, resetting = np.ones(len(seeds), dtype=bool), np.zeros(len(seeds), dtype=bool)
    step_envs = make_game_step(envs)
    while running.any():
        if args.capture_video and running[0] and lengths[0] % 2 == 0:  # every other step, 40 ms each
            frames.append(draw(envs))
        noise = np.ones if args.eval_deterministic else rng.standard_exponential
        with torch.no_grad():
            tensors = (to_blocks(obs), torch.from_numpy(np.float32(noise((len(seeds), num_actions)))))
            action = agent.act(*(x.to(args.device) for x in tensors))[0].cpu().numpy()
        obs, _, terminated, truncated, raw_reward, game_over = step_envs(action)
        returns += raw_reward * running
        lengths += running & ~resetting
        running &= ~game_over
        resetting = terminated | truncated
    envs.close()
    if args.capture_video:
        frames[0].save(Path(args.run_dir) / "evaluation.gif", save_all=True, append_images=frames[1:], duration=40, loop=0)
    result = {"returns": returns.tolist(), "lengths": lengths.tolist(), "deterministic": args.eval_deterministic}
    (Path(args.run_dir) / "evaluation.json").write_text(json.dumps(result) + "\n")
    return result


def train(args: Args) -> dict:
    """Trains as args say and returns the final figures: run_dir, global_step, episodic_return (last 100 games), ..."""
    start_time = time.perf_counter()
    set_up_torch(args.device, args.num_threads)
    rank, world_size, device = args.rank, args.world_size, args.device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    if args.track and rank == 0:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise UsageError("--track needs a login: run `wandb login`, or set WANDB_MODE=offline")
        try:
            wandb.Settings(project=args.wandb_project_name)
        except wandb.errors.Error as error:
            raise UsageError(f"wandb_project_name is {args.wandb_project_name}: {error}") from error

    # the environment's spaces give the sizes of everything below
    T, N = args.num_steps, args.num_envs
    mine = slice(rank * N, (rank + 1) * N)  # environments of this rank among those of all
    envs, first_obs = make_envs(args, make_seeds(args.seed, 0, N * world_size)[mine])
    num_actions = int(envs.single_action_space.n)
    agent = Agent(args.stack_num, num_actions, args.weight_init, 255.0 if args.scale_obs else 1.0, args.precision).to(device)
    theta = nn.utils.parameters_to_vector(p.detach().float() for p in agent.parameters())  # float32; the agent gets copies
    adam = (torch.zeros_like(theta), torch.zeros_like(theta))
    act: Any = torch.no_grad()(agent.act)
    compute_gradient, adam_step = make_update(agent, args)
    compiling = args.compile and can_compile(args.device)
    if args.compile and not compiling:
        tqdm.tqdm.write("warning: no compiler or no Python.h found, so all runs uncompiled, which is slower", sys.stderr)
    elif compiling:
        # No guards, which re-check the arguments at every call: here shapes and args never change; a
        # change would go unnoticed. The C++ wrapper calls the kernels from C++ instead of Python.
        torch.compiler.reset()
        options: Any = {"cpp_wrapper": not on_gpu, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        options["triton.cudagraphs"] = on_gpu
        options["deterministic"] = on_gpu  # kernels chosen without trying them out: the same bits each time
        act, compute_gradient, adam_step = (  # a copy of the options for each, because torch takes the filter out of them
            torch.compile(f, fullgraph=True, dynamic=False, options=dict(options)) for f in (act, compute_gradient, adam_step)
        )
    start_iteration, global_step, updates, log_sizes = 0, 0, 0, {}
    recent_returns: deque[float] = deque(maxlen=100)

    checkpoint = None
    if args.resume:
        checkpoint, file = load_checkpoint(args.resume)
        if checkpoint["world_size"] != world_size:
            raise UsageError(f"the run has {checkpoint['world_size']} rank(s), not {world_size}: resume it with as many")
        run_dir = file.parent
        theta.copy_(checkpoint["theta"])
        for tensor, saved in zip(adam, checkpoint["adam"], strict=True):
            tensor.copy_(saved)
        start_iteration, global_step, log_sizes = checkpoint["iteration"], checkpoint["global_step"], checkpoint["log_sizes"]
        updates = checkpoint["updates"]
        for name, size in log_sizes.items():
            if not (run_dir / name).is_file() or (run_dir / name).stat().st_size < size:
                raise UsageError(f"{run_dir / name} is missing or shorter than at the checkpoint: --resume needs it")
        recent_returns.extend(checkpoint["recent_returns"])
    else:
        run_dir = Path(args.run_dir)
        try:
            if rank == 0:
                run_dir.mkdir(parents=True)
                shutil.copy(__file__, run_dir)
        except FileExistsError as error:
            raise UsageError(f"{run_dir} exists: --resume {run_dir} continues it, another --run-dir starts anew") from error
        except OSError as error:
            raise UsageError(f"cannot write the run directory {run_dir}: {error.strerror}") from error
    if world_size > 1:
        dist.broadcast(theta, 0)
    agent.load(theta)
    names = ("metrics.jsonl", "episodes.jsonl") if rank == 0 else ()
    logs = {name: open(run_dir / name, "a", buffering=1) for name in names}
    for name, log in logs.items():
        log.truncate(log_sizes.get(name, 0))  # what a killed run wrote after its checkpoint is written again
        log.seek(0, os.SEEK_END)
    if rank == 0 and not checkpoint:
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
            "world_size": world_size,
            "iteration": iteration,
            "global_step": global_step,
            "theta": theta,
            "adam": adam,
            "updates": updates,
            "recent_returns": list(recent_returns),
            "log_sizes": {name: log.tell() for name, log in logs.items()},
            "wandb_id": wandb_id,
        }  # no random states: they are set anew from (seed, iteration) after every checkpoint
        save_checkpoint(run_dir / "checkpoint.pt", state)

    if rank == 0:
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
        speed = (
            "GPUs are untested"
            if on_gpu
            else "expect about 200 steps/s per core with AVX2, 400 with AVX-512, 800 with AMX and bfloat16"
        )
        tqdm.tqdm.write(
            f"{args.env}: {N} x {T} steps, {world_size} rank(s), {args.num_iterations} iterations on {device}, "
            f"{args.num_threads} thread(s) a rank; {speed}; run directory {run_dir}",
            sys.stderr,
        )
    frames = to_blocks(first_obs).pin_memory() if on_gpu else to_blocks(first_obs)
    obs = torch.zeros(T + 1, *frames.shape, dtype=torch.uint8, device=device)
    actions = torch.zeros(T, N, dtype=torch.int64, device=device)
    logprobs, values = torch.zeros(T, N, device=device), torch.zeros(T + 1, N, device=device)
    rewards, raw_rewards = np.zeros((T, N)), np.zeros((T, N))
    terminated, truncated, game_over = (np.zeros((T, N), dtype=bool) for _ in range(3))
    valid = np.ones((T + 1, N), dtype=bool)  # False at steps that only reset
    bar = tqdm.tqdm(
        total=args.num_iterations * N * T * world_size,
        initial=global_step,
        unit="step",
        unit_scale=True,
        disable=None if rank == 0 else True,
    )
    first_iteration, first_step_of_process, ended_since_restart = start_iteration + 1, global_step, 0
    warm_time, warm_step = time.perf_counter(), global_step

    for iteration in range(first_iteration, args.num_iterations + 1):
        # 1 anneal
        remaining = 1 - (iteration - 1) / args.num_iterations
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)  # [detail 04]
        clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)  # [aux: anneal_clip]

        # 2 rollout
        if iteration == first_iteration and compiling and rank == 0:
            tqdm.tqdm.write("compiling: a minute the first time, seconds from the cache", sys.stderr)
        iteration_time, env_seconds = time.perf_counter(), 0.0
        if iteration == first_iteration or (iteration - 1) % args.checkpoint_every == 0:
            # [ours: checkpoint_every] environments start afresh, so that a resumed run ends with the same bits
            if iteration > first_iteration and not ended_since_restart and rank == 0:
                few = f"no episode ended within {args.checkpoint_every * T} steps, after which environments start afresh"
                tqdm.tqdm.write(f"warning: {few}: raise --checkpoint-every", sys.stderr)
            ended_since_restart = 0
            envs.close()
            envs, first_obs = make_envs(args, make_seeds(args.seed, iteration, N * world_size)[mine])
            obs[0].copy_(to_blocks(first_obs))
            valid[0] = True
            episode_return, episode_length = np.zeros(N), np.zeros(N, dtype=int)
        else:
            obs[0].copy_(obs[T])
            valid[0] = valid[T]
        step_envs = make_game_step(envs)
        noise = torch.empty(T, N * world_size, num_actions).exponential_()[:, mine].to(device)
        for t in range(T):  # [detail 01]
            torch.compiler.cudagraph_mark_step_begin()
            # one pass for all three: another over the rollout would cost as much as the rollout's
            actions[t], logprobs[t], values[t] = act(obs[t], noise[t])
            action = actions[t].cpu().numpy()  # waits for the device
            start = time.perf_counter()
            next_obs, rewards[t], terminated[t], truncated[t], raw_rewards[t], game_over[t] = step_envs(action)
            env_seconds += time.perf_counter() - start
            frames.copy_(to_blocks(next_obs))
            obs[t + 1].copy_(frames, non_blocking=True)  # done before frames changes: the next action waits for it
        torch.compiler.cudagraph_mark_step_begin()
        values[T] = act(obs[T], noise[0])[2]
        done = terminated | truncated
        valid[1:] = ~(done & args.mask_resets)  # [ours: mask_resets]
        ended, first_step = [], np.zeros(N, dtype=int)  # (global step, return, length) of each game
        for t, i in np.argwhere(game_over):
            episode_return[i] += raw_rewards[first_step[i] : t + 1, i].sum()
            episode_length[i] += valid[first_step[i] : t + 1, i].sum()
            ended.append((global_step + int(t + 1) * N * world_size, float(episode_return[i]), int(episode_length[i])))
            episode_return[i], episode_length[i], first_step[i] = 0, 0, t + 1
        for i in range(N):  # of the games that go on
            episode_return[i] += raw_rewards[first_step[i] :, i].sum()
            episode_length[i] += valid[first_step[i] : T, i].sum()
        global_step += N * T * world_size

        # 3 advantages
        steps = (rewards, terminated, truncated, valid[:T])
        r, term, trunc, v = (torch.as_tensor(x, dtype=torch.float32, device=device) for x in steps)
        advantages = compute_gae(r, values, term, trunc, args.gamma, args.gae_lambda, args.bootstrap_truncated)
        b_returns, b_advantages, b_valid = (advantages + values[:-1]).flatten(), advantages.flatten(), v.flatten()
        if args.norm_adv == "batch":
            b_advantages = normalize_advantages(b_advantages, b_valid)
        b_obs, b_actions, b_logprobs, b_values = (x[:T].flatten(0, 1) for x in (obs, actions, logprobs, values))
        batch = (b_obs, b_actions, b_logprobs, b_values, b_advantages, b_returns, b_valid)

        # 4 update
        update_time = time.perf_counter()
        # tensors, because a compiled function would bake in the first value of a Python number; what Adam needs of its step
        # count comes from outside, because inside each parameter would compute the powers anew
        counts = updates + np.arange(1, args.update_epochs * args.num_minibatches + 1)
        step_sizes, biases2 = learning_rate / (1 - 0.9**counts), 1 - 0.999**counts
        clip_range, *hyper = (torch.as_tensor(np.float32(x), device=device) for x in (clip_coef, step_sizes, biases2))
        infos: list[dict[str, torch.Tensor]] = []
        for _ in range(args.update_epochs):
            order = torch.randperm(T * N).to(device)  # [detail 06]
            for mb_inds in order.split(args.minibatch_size):
                torch.compiler.cudagraph_mark_step_begin()
                gradient, losses = compute_gradient(theta, batch, mb_inds, clip_range)
                if world_size > 1:
                    gradient = average_gradient(gradient, b_valid[mb_inds])  # [aux: data_parallel]
                losses = {**losses, "grad_norm": adam_step(theta, adam, gradient, *(x[len(infos)] for x in hyper))}
                infos.append({key: value.clone() for key, value in losses.items()})  # CUDA graphs reuse their outputs
            if args.target_kl is not None:  # [aux: target_kl] of the whole epoch, not of its last minibatch
                kl = torch.stack([info["approx_kl"] for info in infos[-args.num_minibatches :]]).mean()
                if world_size > 1:
                    dist.all_reduce(kl)
                if kl / world_size > args.target_kl:
                    break

        agent.load(theta)
        updates += len(infos)

        # 5 log and save; reading the losses waits for the device
        means = {key: torch.stack([info[key] for info in infos]).mean() for key in infos[0]}
        residual = b_returns - b_values
        variances = [masked_mean((x - masked_mean(x, b_valid)) ** 2, b_valid) for x in (residual, b_returns)]
        means["explained_variance"] = torch.where(variances[1] > 0, 1 - variances[0] / variances[1], 0.0)
        means_of_ranks = torch.stack(list(means.values()))
        if world_size > 1:
            dist.all_reduce(means_of_ranks)
            gathered: list = [None] * world_size
            dist.all_gather_object(gathered, ended)
            ended = sorted(game for games in gathered for game in games)
        losses = dict(zip(means, (means_of_ranks / world_size).tolist(), strict=True))
        if not all(math.isfinite(x) for x in losses.values()):
            raise NonFiniteError(f"non-finite losses in iteration {iteration}: {losses}")
        now = time.perf_counter()
        iteration_seconds, update_seconds = now - iteration_time, now - update_time
        if iteration == first_iteration:
            warm_time, warm_step = now, global_step
        seconds = now - start_time
        sps = (global_step - warm_step) / max(now - warm_time, 1e-9)  # without start-up and compilation
        recent_returns.extend(r for _, r, _ in ended)
        ended_since_restart += len(ended)
        record = {
            "charts/learning_rate": learning_rate,
            "charts/clip_coef": clip_coef,
            "charts/epochs": len(infos) // args.num_minibatches,
            "charts/env_share": round(env_seconds / iteration_seconds, 4),  # of the time of the iteration
            "charts/update_share": round(update_seconds / iteration_seconds, 4),  # the policy has the rest
        }
        if ended:
            record["charts/episodic_return"] = float(np.mean([r for _, r, _ in ended]))
            record["charts/episodic_length"] = float(np.mean([length for _, _, length in ended]))
        record |= {"charts/SPS": round(sps), "charts/seconds": round(seconds, 3)}
        record |= {f"losses/{key}": value for key, value in losses.items()}
        if rank == 0:
            logs["metrics.jsonl"].write(json.dumps({"iteration": iteration, "global_step": global_step, **record}) + "\n")
            for step, episode, length in ended:
                logs["episodes.jsonl"].write(json.dumps({"global_step": step, "return": episode, "length": length}) + "\n")
            if args.track:
                wandb.log(record, step=global_step)
            if iteration % args.checkpoint_every == 0 or iteration == args.num_iterations:
                save(iteration)
        bar.update(N * T * world_size)
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
    if world_size > 1:
        dist.destroy_process_group()
    result["evaluation"] = evaluate(args, load_checkpoint(run_dir)[0]) if args.eval_episodes and rank == 0 else {}
    for log in logs.values():
        log.close()
    if args.track and rank == 0:
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
            if args.rank > 0:
                return
            print(
                f"{args.env}, seed {args.seed}: return {result['episodic_return']:.1f} over the last "
                f"{result['episodes']} games after {result['global_step']:,} steps in "
                f"{result['seconds']:.0f} s, {result['sps']:.0f} steps/s "
                f"({result['sps_with_startup']:.0f} with start-up) on {args.num_threads} thread(s)"
            )
        if evaluation:
            returns, lengths = evaluation["returns"], evaluation["lengths"]
            print(
                f"evaluation, {'likeliest' if args.eval_deterministic else 'sampled'} actions: return {np.mean(returns):.1f} "
                f"+- {np.std(returns):.1f}, length {np.mean(lengths):.0f} over {len(returns)} games"
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
