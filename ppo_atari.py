"""PPO (Schulman et al. 2017): clipped objective, one Nature-CNN for policy and value, for Atari.

    python ppo_atari.py --env Breakout
    python ppo_atari.py --env Pong --update-epochs 3 --anneal-clip --vf-coef 2  # Table 5
    torchrun --nproc-per-node 2 ppo_atari.py --env Breakout --num-envs 4        # data parallel
    python ppo_atari.py --evaluate runs/NAME --capture-video

Breakout 20.4 [17.8, 23.7] after 1M steps (last 100 games, 3 seeds), 19.6 [18.1, 20.6] with --precision bfloat16, and
35.5 [27.9, 39.9] with --precision bfloat16 --learning-rate 5e-4 --clip-coef 0.2 --num-minibatches 8.
395 steps/s on one core of an Intel Xeon with AVX-512, 833 in bfloat16 with its AMX; 190 in float32 on an AMD EPYC with AVX2.
The path for a GPU (CUDA graphs of policy step and update, pinned copies) has run on a stand-in only: none was at hand.

Map of this file, in the order in which it is read:
    Flags                 every setting, one line each
    PPO                   network, advantages, loss, update by one minibatch
    Rollout and training  play, make the batch, learn, and the loop
    Environments          how games are made, their frames
    Surroundings          run directory, ranks, evaluation, command line: nothing about PPO, alike in every script
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
import copy
import dataclasses
import difflib
import errno
import fcntl
import gc
import hashlib
import io
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
import weakref
import zipfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_type_hints

SOURCE = Path(__file__).read_bytes()  # the text that runs: what is edited while torch is imported comes too late
SIGNALS = [-math.inf]  # times of those that were heeded


def stop_at_signal(number, _):
    """Ctrl-C or SIGTERM interrupts; others within ten seconds do not disturb what is said then."""
    if "main" not in globals():  # torch is still being imported
        os.write(2, f"{Path(__file__).name}: interrupted before it began\n".encode())
        os._exit(128 + number)
    if time.monotonic() > SIGNALS[-1] + 10:
        SIGNALS.append(time.monotonic())
        raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop_at_signal)
    signal.signal(signal.SIGTERM, stop_at_signal)

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
SCRIPT_SHA256 = hashlib.sha256(SOURCE).hexdigest()
LESS_MEMORY = "lower num_envs or num_steps, or take more minibatches"


class UsageError(Exception):
    """A mistake that the user can fix; the command line prints it as one sentence and exits with 2."""


class NonFiniteError(RuntimeError):
    """A loss, observation or reward is NaN or infinite; the command line prints it and exits with 1."""


# ----------------------------------------------------------------------------------------------------------------------
# Flags. The help is the comment at the field. The bounds are in the type: in words, and as a test.

Count = Annotated[int, ("be at least 1", lambda x: x >= 1), ("be at most 2147483647", lambda x: x < 2**31)]
MOST_THREADS = 4 * (os.cpu_count() or 1)
Cores = Annotated[int, ("be at least 1", lambda x: x >= 1), ("be at most 4 per core", lambda x: x <= MOST_THREADS)]
Frames = Annotated[int, ("be at least 1", lambda x: x >= 1), ("be at most 10000", lambda x: x <= 10**4)]
Episodes = Annotated[int, ("be finite and at least 0", lambda x: x >= 0), ("be at most 1000000", lambda x: x <= 10**6)]
Seed = Annotated[int, ("be finite and at least 0", lambda x: x >= 0)]
Steps = Annotated[int, ("be below 2**63", lambda x: x < 2**63)]
Positive = Annotated[float, ("be above 0", lambda x: x > 0), ("be finite", math.isfinite)]  # NaN is not above 0
Limit = Annotated[float, ("be above 0", lambda x: x > 0)]
OptionalLimit = Annotated[float | None, ("be above 0, or None", lambda x: x is None or x > 0)]
Weight = Annotated[float, ("be finite and at least 0", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, ("lie between 0 and 1", lambda x: 0 <= x <= 1)]


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


CORES = max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # of each rank


@dataclass
class Args:
    env: str = "Breakout"  # Atari game: Breakout, or the same as Breakout-v5 or BreakoutNoFrameskip-v4
    seed: Seed = 1  # seed of networks, actions, minibatches and environments, at least 0
    total_timesteps: Steps = 10_000_000  # steps of all environments together, resets too; rounded down to whole rollouts
    run_dir: str = ""  # directory of the run; empty: runs/<script>__<env>__<seed>__<time>
    # iterations between checkpoints, at least 1; environments start afresh at each, so it should span many episodes
    checkpoint_every: Count = 250
    checkpoint_minutes: Limit = math.inf  # a checkpoint also after so many minutes; the run then depends on the clock
    # continue the run of this checkpoint or run directory, with its settings, bit-identically; --total-timesteps may be
    # changed with it, and annealing then runs to the new end
    resume: str = ""
    evaluate: str = ""  # only evaluate this checkpoint or run directory
    eval_episodes: Episodes = 10  # episodes of the evaluation that ends a run; 0: none
    eval_steps: Count = 100_000  # steps after which an evaluation episode is cut off
    eval_deterministic: bool = False  # evaluate the likeliest action, which in some games loops; off: sampled actions
    capture_video: bool = False  # record the first evaluation episode as evaluation.gif in the run directory
    track: bool = False  # log to Weights & Biases, too (WANDB_MODE=offline works)
    wandb_project_name: str = "ppo"  # project of --track
    wandb_entity: str | None = None  # team of --track
    tensorboard: bool = False  # write TensorBoard's event files into the run directory, too (needs pip install tensorboard)

    # PPO
    learning_rate: Positive = 2.5e-4  # Adam step size, above 0
    num_envs: Count = 8  # parallel environments (N); under torchrun of each rank, so that 2 ranks of 4 are 8 in all
    num_steps: Count = 128  # steps of each environment per rollout (T)
    gamma: Fraction = 0.99  # discount, 0 to 1
    gae_lambda: Fraction = 0.95  # lambda of generalized advantage estimation, 0 to 1; 1: Monte Carlo, 0: one-step TD
    num_minibatches: Count = 4  # minibatches per epoch; must divide num_envs * num_steps; 1: whole batch
    update_epochs: Count = 4  # passes over a rollout (K)
    clip_coef: Positive = 0.1  # clip range epsilon of ratio and value, above 0
    ent_coef: Weight = 0.01  # weight of the entropy bonus (c2), at least 0
    vf_coef: Weight = 0.5  # weight of the value loss 0.5 * mean squared error, at least 0; 2 is c1 = 1 of the paper
    max_grad_norm: Limit = 0.5  # global gradient norm limit, above 0; inf: off
    target_kl: OptionalLimit = None  # stop the epochs of an iteration when the mean approximate KL of one exceeds this

    # implementation details; numbers are those of DETAILS.md

    # [detail 02] orthogonal (sqrt 2, 0.01, 1), normc (1, 0.01, 1: baselines of 2017), or the default of torch
    weight_init: Literal["orthogonal", "normc", "torch"] = "orthogonal"
    adam_eps: Positive = 1e-5  # [detail 03] epsilon of Adam; 1e-8: default of torch
    anneal_lr: bool = True  # [detail 04] learning rate falls linearly to 0
    # [detail 07] advantages to mean 0 and deviation 1, per minibatch or over the whole batch
    norm_adv: Literal["minibatch", "batch", "none"] = "minibatch"
    clip_policy: bool = True  # [detail 08] clipped surrogate objective; off: ratio * advantage
    clip_vloss: bool = True  # [detail 09] value clipped to clip_coef around its old estimate; off: squared error
    noop_max: Frames = 30  # [detail 14] a game starts with 1 to this many no-op frames (FIRE is one of them); 1: off
    frame_skip: Frames = 4  # [detail 15] frames that an action lasts, the maximum of the last two is seen; 1: off
    episodic_life: bool = True  # [detail 16] a lost life is a termination for the learner; scores are of whole games
    fire_reset: bool = True  # [detail 17] press FIRE at the start of a game or life, where the game has FIRE
    clip_reward: bool = True  # [detail 19] the learner gets the sign of the reward; scores are raw either way
    stack_num: Frames = 4  # [detail 20] last frames that the network sees; 1: off
    scale_obs: bool = True  # [detail 22] pixels divided by 255 in the network
    full_action_space: bool = False  # all 18 actions of the console; off: those with a meaning in this game
    # sticky actions (Machado et al. 2018): probability that a frame repeats the action of the one before; 0.25 there
    repeat_action_probability: Fraction = 0.0
    max_episode_steps: Count = 27_000  # time limit of a game in steps; 27,000 are 108,000 frames with frame_skip 4
    anneal_clip: bool = False  # clip range falls linearly to 0 (baselines of August 2017)
    bootstrap_truncated: bool = True  # [ours] after a time limit bootstrap from the final observation; off: as in 2017
    mask_resets: bool = True  # [ours] leave steps that only reset out of loss and statistics; off: learn from them, too

    # speed

    # compile policy step and update with torch.compile (needs a C++ compiler on a CPU; CUDA graphs on a GPU)
    compile: bool = True
    device: str = "auto"  # device of network and rollout: cpu, cuda, cuda:1; auto: a GPU if there is one; they are untested
    # of the trunk: float32 (TF32 on a GPU), or bfloat16, whose difference in score is not known (benchmarks/RESULTS.md);
    # what it gains on this CPU stands above the flags
    precision: Literal["float32", "bfloat16"] = "float32"
    # CPU threads of each rank, at least 1, of torch and of envpool, which take turns; default: all cores that it may use
    num_threads: Cores = CORES

    @property
    def world_size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun

    @property
    def rank(self) -> int:
        return int(os.environ.get("RANK", "0"))

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps * self.world_size

    @property
    def minibatch_size(self) -> int:
        return self.num_envs * self.num_steps // self.num_minibatches  # of a rank

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

    def __post_init__(self):
        check_bounds(self)
        check_ranks()
        if not self.run_dir:
            env = re.sub(r"[^\w.-]+", ".", self.env)
            now = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
            self.run_dir = f"runs/{Path(__file__).stem}__{env}__{self.seed}__{now}"
        own_size = self.num_envs * self.num_steps
        if own_size % self.num_minibatches:
            sizes = f"num_envs * num_steps = {own_size} does not divide into num_minibatches = {self.num_minibatches}"
            raise UsageError(f"{sizes}: change one of them")
        if self.norm_adv != "none" and (own_size if self.norm_adv == "batch" else self.minibatch_size) < 2:
            raise UsageError(
                f"norm_adv {self.norm_adv} makes the advantage of a single step 0: take fewer minibatches, or none"
            )
        if self.num_iterations < 1:
            rollout = f"one rollout of num_envs * num_steps * ranks = {self.batch_size} steps"
            raise UsageError(f"total_timesteps is {self.total_timesteps}, less than {rollout}: raise it or shorten the rollout")
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
        if (self.evaluate or self.capture_video) and self.eval_episodes < 1:
            name = "evaluate plays episodes" if self.evaluate else "capture_video records an evaluation episode"
            raise UsageError(f"{name}: set eval_episodes to at least 1")


# ----------------------------------------------------------------------------------------------------------------------
# PPO


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


class Output(NamedTuple):
    """What the networks say of B observations and the actions taken there."""

    logprob: torch.Tensor  # (B,) log-probability of the action, nats
    entropy: torch.Tensor  # (B,) of the policy, nats
    value: torch.Tensor  # (B,) in units of reward


class Batch(NamedTuple):
    """The B = T * N steps of a rollout, flat, as the update reads them; step t of environment n is row t * N + n."""

    obs: torch.Tensor  # (B, 21, 21, 16 * stack_num) uint8, frames as blocks
    action: torch.Tensor  # (B,) int64
    logprob: torch.Tensor  # (B,) of the policy that acted, nats
    value: torch.Tensor  # (B,) before the update
    advantage: torch.Tensor  # (B,)
    return_: torch.Tensor  # (B,) advantage + value, the target of the value function
    valid: torch.Tensor  # (B,) 1, or 0 at a step that only reset its environment; such a step teaches nothing


class Step(NamedTuple):
    """What the agent does with B observations."""

    action: torch.Tensor  # (B,) int64
    logprob: torch.Tensor  # (B,) of that action, nats
    value: torch.Tensor  # (B,) in units of reward


class Agent(nn.Module):
    """Policy and value function as two heads of one Nature-CNN (Mnih et al. 2015).

    hidden, policy and value are the only definition of the network: act plays by them and forward learns by them.
    """

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

    def hidden(self, obs: torch.Tensor) -> torch.Tensor:
        """obs (B, 21, 21, 16 * stack_num) uint8, frames as blocks -> output of the trunk (B, 512), float32."""
        # channels stay last, which CPU and GPU are fastest with; frames are uint8 until here
        pixels = obs.permute(0, 3, 1, 2).to(self.dtype) / self.scale  # [detail 22]
        features = self.convolutions(pixels).permute(0, 2, 3, 1).flatten(1)
        return self.linear(features).relu().float()

    def policy(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (B, 512) -> logits of the policy (B, num_actions)."""
        return self.actor(hidden)

    def value(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (B, 512) -> value (B,), in units of reward."""
        return self.critic(hidden).squeeze(1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> Output:
        """obs, action (B,) int64 -> log-probability and entropy of the policy, value."""
        hidden = self.hidden(obs)
        policy = Categorical(logits=self.policy(hidden), validate_args=False)
        return Output(policy.log_prob(action), policy.entropy(), self.value(hidden))

    def act(self, obs: torch.Tensor, noise: torch.Tensor) -> Step:
        """obs, noise (B, num_actions) -> sampled action, its log-probability and the value.

        argmax(logits - log(noise)) is a sample of the policy for Exp(1) noise (Gumbel-max), its mode for noise 1.
        """
        hidden = self.hidden(obs)
        logprobs = self.policy(hidden).log_softmax(1)
        action = (logprobs - noise.log()).argmax(1)
        return Step(action, logprobs.gather(1, action[:, None]).squeeze(1), self.value(hidden))

    def flat(self) -> torch.Tensor:
        """A copy of all parameters as one float32 vector (P,)."""
        return nn.utils.parameters_to_vector(p.detach().float() for p in self.parameters())

    def load(self, theta: torch.Tensor):
        """Copies the flat vector of parameters into the network, whose trunk may be less precise."""
        parameters = list(self.parameters())
        for p, part in zip(parameters, theta.split([p.numel() for p in parameters]), strict=True):
            p.data.copy_(part.view_as(p))


@torch.no_grad()
def check_act(agent: Agent, obs_shape: torch.Size):
    """UsageError where Agent.act plays by another policy or value than Agent.forward learns by; obs_shape: (21, 21, ...)."""
    device = next(agent.parameters()).device
    probe = (torch.arange(3 * obs_shape.numel(), device=device) * 7 % 251).to(torch.uint8).view(3, *obs_shape)
    step = agent.act(probe, torch.ones_like(agent.policy(agent.hidden(probe))))
    learned = agent(probe, step.action)
    pairs = ((step.logprob, learned.logprob), (step.value, learned.value))
    if not all(torch.allclose(acting, learning, rtol=1e-5, atol=1e-5, equal_nan=True) for acting, learning in pairs):
        raise UsageError(
            "Agent.act, which plays, computes another policy or value than Agent.forward, which learns: change Agent.hidden, "
            "Agent.policy or Agent.value, which both go through"
        )


def perturbed(agent: Agent) -> Agent:
    """A copy with other parameters: at first many are near 0, where two different policies look alike."""
    other = copy.deepcopy(agent)
    for parameter in other.parameters():
        parameter.data += 0.3 * torch.arange(1, parameter.numel() + 1, device=parameter.device).sin().view_as(parameter)
    return other


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
    next-step autoreset values[t + 1] belongs to the true final observation where step t ended an episode; step t + 1 is
    then the reset. Returns advantages (T, N) in units of reward; those of reset steps mean nothing.
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
    new: Output,
    old: Batch,
    clip_coef: torch.Tensor,
    vf_coef: float = 0.5,
    ent_coef: float = 0.0,
    clip_policy: bool = True,
    clip_vloss: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss to minimize, the negative of eq. 9 with the clipped objective of eq. 7, and what is logged of it.

    new: what the networks say now; old: the minibatch; clip_coef: scalar tensor. Means run over the steps with valid = 1.
    """
    logratio = (new.logprob - old.logprob) * old.valid  # reset steps: ratio 1, so that nothing overflows there
    ratio = logratio.exp()
    policy_objective = ratio * old.advantage
    if clip_policy:  # [detail 08]
        policy_objective = torch.minimum(policy_objective, ratio.clamp(1 - clip_coef, 1 + clip_coef) * old.advantage)
    squared_error = (new.value - old.return_) ** 2
    if clip_vloss:  # [detail 09]
        clipped_value = old.value + (new.value - old.value).clamp(-clip_coef, clip_coef)
        squared_error = torch.maximum(squared_error, (clipped_value - old.return_) ** 2)
    policy_loss = -masked_mean(policy_objective, old.valid)
    value_loss = 0.5 * masked_mean(squared_error, old.valid)
    entropy = masked_mean(new.entropy, old.valid)
    info = {  # [detail 12]
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "old_approx_kl": masked_mean(-logratio, old.valid),
        "approx_kl": masked_mean(ratio - 1 - logratio, old.valid),  # never negative, of low variance (Schulman 2020)
        "clipfrac": masked_mean(((ratio - 1).abs() > clip_coef).float(), old.valid),
    }
    return policy_loss + vf_coef * value_loss - ent_coef * entropy, info  # [detail 10]


def make_update(agent: Agent, args: Args):
    """The update by one minibatch, as two functions that join_update puts together.

    compute_gradient(theta, batch, mb_inds, clip_coef) returns the gradient of the loss in the flat parameter vector
    theta and what is logged, each a scalar tensor. adam_step(theta, adam, gradient, step_size, bias2) changes theta and the
    Adam state (first moment, second moment) in place and returns the norm of the gradient. theta is one vector so that norm
    and Adam are single operations; functional_call runs the agent with its parts.
    """
    like = dict(agent.named_parameters())

    def loss(theta: torch.Tensor, minibatch: Batch, clip_coef: torch.Tensor):
        parts = theta.split([p.numel() for p in like.values()])
        parameters = {name: part.view_as(p).to(p.dtype) for (name, p), part in zip(like.items(), parts, strict=True)}
        new = torch.func.functional_call(agent, parameters, (minibatch.obs, minibatch.action))
        if args.norm_adv == "minibatch":  # [detail 07]
            minibatch = minibatch._replace(advantage=normalize_advantages(minibatch.advantage, minibatch.valid))
        return ppo_loss(new, minibatch, clip_coef, args.vf_coef, args.ent_coef, args.clip_policy, args.clip_vloss)

    def compute_gradient(theta, batch: Batch, mb_inds, clip_coef):
        minibatch = Batch(*(x[mb_inds] for x in batch))
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


def join_update(compute_gradient, adam_step, args: Args):
    """update(theta, adam, batch, mb_inds, hyper): both functions of make_update, between which ranks average their gradients.

    hyper (3,): clip range, and of Adam the step size and the bias of its second moment. Returns what is logged, as scalars.
    """

    def update(theta, adam, batch: Batch, mb_inds, hyper):
        clip_coef, step_size, bias2 = hyper.unbind()
        gradient, info = compute_gradient(theta, batch, mb_inds, clip_coef)
        if args.world_size > 1:
            gradient = average_gradient(gradient, batch.valid[mb_inds])  # [aux: data_parallel]
        return {**info, "grad_norm": adam_step(theta, adam, gradient, step_size, bias2)}

    return update


def average_gradient(gradient: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean of the gradients (P,) of all ranks, weighted by their numbers of valid steps; valid: (minibatch_size,).

    It is the gradient of the mean over the valid steps of all ranks. With --norm-adv each rank normalizes its own.
    """
    weight = valid.sum()
    total = torch.cat([gradient * weight, weight[None]])
    dist.all_reduce(total)
    return total[:-1] / total[-1].clamp(min=1)


# ----------------------------------------------------------------------------------------------------------------------
# Rollout and training


def upload(x: torch.Tensor, args: Args) -> torch.Tensor:
    """A tensor of the CPU on the device; through pinned memory, so that the host waits for nothing."""
    return x if args.device == "cpu" else x.contiguous().pin_memory().to(args.device, non_blocking=True)


def mark_step(args: Args):
    """What CUDA graphs returned before may be overwritten from here on."""
    if args.device != "cpu":  # where this would import the compiler for nothing
        torch.compiler.cudagraph_mark_step_begin()


def mark_static(args: Args, *tensors: torch.Tensor):
    """These stay where they are in memory: a CUDA graph reads and writes them there, without a copy."""
    for x in tensors if args.device != "cpu" else ():
        torch._dynamo.mark_static_address(x)


def make_act(agent: Agent, args: Args):
    """The policy step, as one function that torch.compile turns into one graph.

    act(frames, noise, row, memory) returns the actions (N,). It writes observations, actions, log-probabilities and values
    into this row (1,) of the four tensors of memory, (T + 1, N, ...) each. frames: (N, 21, 21, 16 * stack_num) uint8, blocks;
    on a GPU (N, stack_num, 84, 84), which become blocks there. noise: as for Agent.act.
    """

    @torch.no_grad()
    def act(frames, noise, row, memory):
        if args.device != "cpu":  # as to_blocks does
            frames = frames.unflatten(3, (21, 4)).unflatten(2, (21, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        step = agent.act(frames, noise)
        for rows, x in zip(memory, (frames, *step), strict=True):
            rows.index_copy_(0, row, x[None])
        return step.action

    return act


class Rollout(NamedTuple):
    """T steps of the N environments of this rank. Its arrays are the runner's own: the next rollout overwrites them."""

    # of T + 1 steps, on the device; of the last one only the value counts
    obs: torch.Tensor  # (T + 1, N, 21, 21, 16 * stack_num) uint8, frames as blocks
    actions: torch.Tensor  # (T + 1, N) int64
    logprobs: torch.Tensor  # (T + 1, N) of the actions, nats
    values: torch.Tensor  # (T + 1, N) of the observations
    rewards: np.ndarray  # (T, N) as the learner gets them
    terminated: np.ndarray  # (T, N) bool: a life was lost, or the game ended in a state without a future
    truncated: np.ndarray  # (T, N) bool: the game ended at its time limit
    valid: np.ndarray  # (T, N) bool: False at steps that only reset
    episodes: list[tuple[int, float, int]]  # games ended, of all ranks: global step, return (raw rewards summed), length
    env_seconds: float  # that the environments took


class Runner:
    """The environments of this rank, and the games under way."""

    def __init__(self, args: Args):
        self.args, T, N = args, args.num_steps, args.num_envs
        # 24 bytes for each number of an observation; here a pixel takes one, and about 20 while it is in a minibatch
        pixels = 84 * 84 * args.stack_num * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        check_memory(N, T, pixels * (1 + 20 // args.num_minibatches) // 24 + 1)
        self.mine = slice(args.rank * N, (args.rank + 1) * N)  # among the environments of all ranks
        self.envs, first_obs = make_envs(args, self.make_seeds(0), render=args.capture_video)
        if args.capture_video:
            draw(self.envs)  # fails now, not after the training
        self.spaces = Spaces.of(self.envs)
        self.global_step, self.recent_returns = 0, deque[float](maxlen=100)
        obs = torch.zeros(T + 1, *to_blocks(first_obs).shape, dtype=torch.uint8, device=args.device)
        actions = torch.zeros(T + 1, N, dtype=torch.int64, device=args.device)
        self.memory: Any = (obs, actions, *(torch.zeros(T + 1, N, device=args.device) for _ in range(2)))
        self.row = torch.arange(T + 1, device=args.device).split(1)
        if args.device != "cpu":  # raw frames on their way to the device
            self.pinned = torch.from_numpy(first_obs).pin_memory()
            self.frames = torch.zeros(first_obs.shape, dtype=torch.uint8, device=args.device)
        self.rewards, self.raw_rewards = np.zeros((T, N)), np.zeros((T, N))
        self.terminated, self.truncated, self.game_over = (np.zeros((T, N), dtype=bool) for _ in range(3))
        self.valid = np.ones((T + 1, N), dtype=bool)  # False at steps that only reset

    def make_seeds(self, iteration: int) -> list[int]:
        """Seeds of the environments of this rank, after seeding python, numpy and torch alike in all ranks."""
        return make_seeds(self.args.seed, iteration, self.args.num_envs * self.args.world_size)[self.mine]

    def state_dict(self) -> dict:
        """What survives an iteration and a restart of the environments."""
        return {
            "global_step": self.global_step,
            "recent_returns": list(self.recent_returns),
            "world_size": self.args.world_size,
        }

    def load_state_dict(self, state: dict):
        if state["world_size"] != self.args.world_size:
            ranks = f"the run has {state['world_size']} rank(s), not {self.args.world_size}"
            raise UsageError(f"{ranks}: resume it with as many")
        self.global_step = state["global_step"]
        self.recent_returns.extend(state["recent_returns"])

    def restart(self, iteration: int):
        """New environments, seeded by (seed, iteration) alone, so that a resumed run ends with the same bits."""
        args, N = self.args, self.args.num_envs
        self.envs.close()
        self.envs, first_obs = make_envs(args, self.make_seeds(iteration))
        self.show(first_obs)
        self.valid[-1], self.episode_return = True, np.zeros(N)
        self.episode_length = np.zeros(N, dtype=int)

    def show(self, frames: np.ndarray):
        """Frames (N, stack_num, 84, 84) that the next policy step will see."""
        if self.args.device == "cpu":
            self.frames = to_blocks(frames)
        else:  # done before pinned changes: the next action waits for it
            np.copyto(self.pinned.numpy(), frames)
            self.frames.copy_(self.pinned, non_blocking=True)

    def play(self, act) -> Rollout:
        """T steps of each environment; act: of make_act, compiled or not."""
        args, T, N, memory = self.args, self.args.num_steps, self.args.num_envs, self.memory
        self.valid[0] = self.valid[T]  # play begins with the frames that the last one ended with
        step_envs, env_seconds = make_game_step(self.envs), 0.0
        noise = upload(torch.empty(T, N * args.world_size, self.spaces.num_actions).exponential_()[:, self.mine], args)
        for t in range(T):  # [detail 01]
            mark_step(args)
            # one pass for all three: another over the rollout would cost as much as the rollout's
            action = act(self.frames, noise[t], self.row[t], memory).cpu().numpy()  # waits for the device
            start = time.perf_counter()
            seen = step_envs(action)
            env_seconds += time.perf_counter() - start
            self.rewards[t], self.terminated[t], self.truncated[t] = seen.reward, seen.terminated, seen.truncated
            self.raw_rewards[t], self.game_over[t] = seen.raw_reward, seen.game_over
            self.show(seen.obs)
        mark_step(args)
        act(self.frames, noise[0], self.row[T], memory)  # for the value; the next rollout begins with these frames
        self.valid[1:] = ~((self.terminated | self.truncated) & args.mask_resets)  # [ours: mask_resets]
        obs, actions, logprobs, values = memory
        steps = (obs, actions, logprobs, values, self.rewards, self.terminated, self.truncated, self.valid[:T])
        return Rollout(*steps, episodes=self.end_episodes(), env_seconds=env_seconds)

    def end_episodes(self) -> list[tuple[int, float, int]]:
        """Counts the steps of this rollout; (global step, return, length) of each game that ended in it, in any rank."""
        args, (T, N) = self.args, self.rewards.shape
        ended, first_step = [], np.zeros(N, dtype=int)
        for t, i in np.argwhere(self.game_over):
            self.episode_return[i] += self.raw_rewards[first_step[i] : t + 1, i].sum()
            self.episode_length[i] += self.valid[first_step[i] : t + 1, i].sum()
            step = self.global_step + int(t + 1) * N * args.world_size
            ended.append((step, float(self.episode_return[i]), int(self.episode_length[i])))
            self.episode_return[i], self.episode_length[i], first_step[i] = 0, 0, t + 1
        for i in range(N):  # of the games that go on
            self.episode_return[i] += self.raw_rewards[first_step[i] :, i].sum()
            self.episode_length[i] += self.valid[first_step[i] : T, i].sum()
        if args.world_size > 1:
            gathered: list = [None] * args.world_size
            dist.all_gather_object(gathered, ended)
            ended = sorted((game for games in gathered for game in games), key=lambda game: game[0])  # ties: by rank
        self.global_step += args.batch_size
        self.recent_returns.extend(r for _, r, _ in ended)
        return ended


def make_batch(rollout: Rollout, args: Args) -> Batch:
    """The rollout as the update reads it, with advantages and returns."""
    values = rollout.values.cpu()  # waits for the device, once for all that is computed here
    steps = (rollout.rewards, rollout.terminated, rollout.truncated, rollout.valid)
    rewards, terminated, truncated, valid = (torch.as_tensor(x, dtype=torch.float32) for x in steps)
    advantages = compute_gae(rewards, values, terminated, truncated, args.gamma, args.gae_lambda, args.bootstrap_truncated)
    advantage, return_, valid = upload(torch.stack([advantages, advantages + values[:-1], valid]), args).flatten(1)
    batch = Batch(
        obs=rollout.obs[:-1].flatten(0, 1),
        action=rollout.actions[:-1].flatten(),
        logprob=rollout.logprobs[:-1].flatten(),
        value=rollout.values[:-1].flatten(),
        advantage=advantage,
        return_=return_,
        valid=valid,
    )
    mark_static(args, batch.obs)
    if args.norm_adv == "batch":
        batch = batch._replace(advantage=normalize_advantages(batch.advantage, batch.valid))
    return batch


def explained_variance(batch: Batch) -> torch.Tensor:
    """Of the returns by the values of the rollout; 1 is perfect, 0 no better than a constant."""
    centered = batch.return_ - masked_mean(batch.return_, batch.valid)
    variance = masked_mean(centered**2, batch.valid)
    residual = batch.return_ - batch.value
    residual = masked_mean((residual - masked_mean(residual, batch.valid)) ** 2, batch.valid)
    return torch.where(variance > 0, 1 - residual / variance, 0.0)


def mean_of_ranks(x: torch.Tensor, args: Args) -> torch.Tensor:
    """Mean of x over the ranks."""
    if args.world_size > 1:
        dist.all_reduce(x)
    return x / args.world_size


def learn(
    update, theta, adam, batch: Batch, schedule: tuple[float, ...], updates: int, args: Args
) -> tuple[dict[str, float], int]:
    """All epochs over a batch: the means of what is logged, over the ranks too, and how many epochs there were.

    update: of join_update; schedule: learning rate and clip range of this iteration; updates: minibatches that Adam has seen
    before.
    """
    learning_rate, clip_coef = schedule
    # a tensor, because a compiled function would bake in the first value of a Python number; what Adam needs of its step
    # count comes from outside, because inside each parameter would compute the powers anew
    counts = updates + np.arange(1, args.update_epochs * args.num_minibatches + 1)
    columns = np.broadcast_arrays(clip_coef, learning_rate / (1 - 0.9**counts), 1 - 0.999**counts)
    hyper = upload(torch.from_numpy(np.stack(columns, axis=1).astype(np.float32)), args)  # (updates, 3)
    log: list[torch.Tensor] = []  # what is logged of each minibatch
    for _ in range(args.update_epochs):
        order = upload(torch.randperm(len(batch.valid)), args)  # [detail 06]
        for mb_inds in order.split(args.minibatch_size):
            mark_step(args)
            info = update(theta, adam, batch, mb_inds, hyper[len(log)])
            log.append(torch.stack(list(info.values())))  # a copy: CUDA graphs reuse their outputs
        if args.target_kl is not None:  # [aux: target_kl] of the whole epoch, not of its last minibatch
            kl = torch.stack([x[list(info).index("approx_kl")] for x in log[-args.num_minibatches :]]).mean()
            if mean_of_ranks(kl, args) > args.target_kl:  # waits for the device
                break
    means = torch.cat([torch.stack(log, 1).mean(1), explained_variance(batch)[None]])
    figures = mean_of_ranks(means, args).tolist()  # waits for the device
    return dict(zip([*info, "explained_variance"], figures, strict=True)), len(log) // args.num_minibatches


def train(args: Args) -> dict:
    """Trains as args say and returns the final figures: run_dir, global_step, episodic_return (last 100 games), ..."""
    set_up_torch(args)
    run = RunOfRanks(args) if args.world_size > 1 else Run(args)
    runner = Runner(args)
    agent = make_agent(args, runner.spaces)
    check_parameters(agent)
    for probed in (agent, perturbed(agent)):  # an edit of one alone stops here, before anything is written
        check_act(probed, runner.memory[0].shape[2:])
    theta = agent.flat()
    adam = (torch.zeros_like(theta), torch.zeros_like(theta))
    updates = 0  # minibatches that Adam has seen

    def state_dict() -> dict:
        return {"theta": theta, "adam": adam, "updates": updates, **runner.state_dict()}

    first_iteration = run.restore(state_dict(), runner.spaces) + 1
    if run.checkpoint:
        runner.load_state_dict(run.checkpoint)
        updates = run.checkpoint["updates"]
    run.open(state_dict(), agent if args.compile else None)
    slow = args.precision == "bfloat16" and args.device == "cpu" and not bfloat16_unit()
    say(f"{args.world_size} rank(s); {describe_cpu() if args.device == 'cpu' else 'GPUs are untested'}")
    if slow:
        say("warning: leave out --precision bfloat16, which is slow here")
    agent.load(theta)
    mark_static(args, theta, *adam, *runner.memory)
    act, (compute_gradient, adam_step) = make_act(agent, args), make_update(agent, args)
    if args.device != "cpu" and args.world_size == 1:  # one graph for the whole update
        act, update = compile_all([act, join_update(compute_gradient, adam_step, args)], args, cuda_graphs=True)
    else:  # on a CPU that has other bits, and ranks talk in between
        act, compute_gradient, adam_step = compile_all([act, compute_gradient, adam_step], args, args.device != "cpu")
        update = join_update(compute_gradient, adam_step, args)
    restart = True
    try:
        for iteration in range(first_iteration, args.num_iterations + 1):
            remaining = 1 - (iteration - 1) / args.num_iterations
            learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)  # [detail 04]
            clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)  # [aux: anneal_clip]

            start = time.perf_counter()
            if restart:  # [ours: checkpoint_every] after every checkpoint, so that a resumed run ends with the same bits
                runner.restart(iteration)
            rollout = runner.play(act)
            batch = make_batch(rollout, args)
            played = time.perf_counter()
            losses, epochs = learn(update, theta, adam, batch, (learning_rate, clip_coef), updates, args)
            agent.load(theta)
            updates += epochs * args.num_minibatches
            learned = time.perf_counter()

            charts = {"learning_rate": learning_rate, "clip_coef": clip_coef, "epochs": epochs}
            charts["env_share"] = round(rollout.env_seconds / (learned - start), 4)  # of the time of the iteration
            charts["update_share"] = round((learned - played) / (learned - start), 4)  # the policy has the rest
            run.log(iteration, runner, charts, losses, rollout.episodes)
            restart = run.is_checkpoint_due(iteration)
            if restart:
                run.save(iteration, state_dict())
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(*error.args, run.how_to_go_on(runner.global_step)) from None
    return run.finish(runner)


# ----------------------------------------------------------------------------------------------------------------------
# Environments: how they are made, their frames, their spaces.


def find_game(name: str) -> str:
    """Id in envpool of an Atari game, given as Breakout, ALE/Breakout-v5 or BreakoutNoFrameskip-v4."""
    games = {id.removesuffix("-v5") for id, (module, *_) in registry.specs.items() if module == "envpool.atari"}
    game = name.removeprefix("ALE/").removesuffix("NoFrameskip-v4").removesuffix("-v5")
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


class GameStep(NamedTuple):
    """What N games return for an action; each (N,) but the frames."""

    obs: np.ndarray  # (N, stack_num, 84, 84) uint8
    reward: np.ndarray  # as the learner gets it
    terminated: np.ndarray
    truncated: np.ndarray
    raw_reward: np.ndarray
    game_over: np.ndarray  # not where only a life was lost


def make_game_step(envs):
    """envs.step without its info: action (N,) -> GameStep.

    It calls the C++ layer (private; tested against envs.step): the Python layers above it take 0.2 ms.
    """
    ids = envs.all_env_ids
    names = ("obs", "reward", "done", "trunc", "info:reward", "info:terminated")
    places = [envs._state_keys.index(name) for name in names]

    def step(action: np.ndarray) -> GameStep:
        envs._send([ids, ids, action.astype(np.int32)])  # in the order of _action_keys: env_id, players.env_id, action
        state = envs._recv()
        obs, reward, done, truncated, raw_reward, game_over = [state[i] for i in places]
        return GameStep(obs, reward, done & ~truncated, truncated, raw_reward, (game_over == 1) | truncated)

    return step


def to_blocks(frames: np.ndarray) -> torch.Tensor:
    """Frames (N, C, 84, 84) uint8 -> (N, 21, 21, 16 C): each block of 4 x 4 pixels as the channels of one position.

    On them the first convolution, 8 x 8 with stride 4, is one of 2 x 2 with stride 1: the same sums in another order, which
    matrix units take half the time for.
    """
    fours = frames.view(np.int32).reshape(*frames.shape[:2], 21, 4, 21)  # 4 pixels side by side move as one number
    blocks = np.ascontiguousarray(fours.transpose(0, 2, 4, 1, 3))  # numpy takes half the time of torch
    return torch.from_numpy(blocks).view(torch.uint8).flatten(3)


def make_seeds(seed: int, iteration: int, count: int) -> list[int]:
    """Independent seeds for `count` environments that start at this iteration, after seeding python, numpy and torch."""
    sequence = np.random.SeedSequence([seed, iteration]).generate_state(count + 1) >> 1  # 31 bits
    random.seed(int(sequence[0]))
    np.random.seed(int(sequence[0]))
    torch.manual_seed(int(sequence[0]))
    return [int(s) for s in sequence[1:]]


class Spaces(NamedTuple):
    """What the script reads of an environment's spaces."""

    observation: gymnasium.Space  # frames (stack_num, 84, 84)
    num_actions: int

    @classmethod
    def of(cls, envs: Any) -> "Spaces":
        return cls(envs.single_observation_space, int(envs.single_action_space.n))

    def describe(self) -> dict[str, str]:
        return {"observation": str(self.observation), "action": f"Discrete({self.num_actions})"}


# ----------------------------------------------------------------------------------------------------------------------
# Surroundings. Nothing below is about PPO, and nearly all of it is the same text in every script.


def say(text: str):
    """A line on the terminal, above the progress bar; under torchrun of rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.tqdm.write(text, sys.stderr)


def check_bounds(args: Any):
    """The values of a dataclass against the types and bounds of its fields; UsageError at the first that is wrong."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value, origin = getattr(args, name), getattr(hint, "__origin__", hint)
        kind = hint if origin is Union else origin  # Optional[...] of an edited copy
        try:
            fits = value in hint.__args__ if kind is Literal else isinstance(value, kind)
        except TypeError as error:  # such as Weight | None
            ways = 'Annotated[float | None, ...] as OptionalLimit is, Literal["a", None] or tuple | None'
            raise UsageError(f"the type of {name} cannot be checked: write {ways}") from error
        if not isinstance(value, int | float | str | tuple | None):
            raise UsageError(f"{name} is {value!r}: a setting is a number, text, tuple or None, which a checkpoint can hold")
        if not fits and not (isinstance(value, int) and kind in (float, float | None)):
            raise UsageError(f"{name} is {value!r}, which is not of the type {kind}")
        for words, holds in getattr(hint, "__metadata__", ()):
            if not holds(value):
                raise UsageError(f"{name} is {value}: it must {words}")
        if isinstance(value, int) and not fits:  # 1 for 1.0
            setattr(args, name, float(value))


def check_parameters(agent: nn.Module):
    """UsageError where an edited network has what theta does not: theta is all that is trained and saved of it."""
    parameters = dict(agent.named_parameters(remove_duplicate=False))
    for name in parameters:
        if not parameters[name].requires_grad:
            raise UsageError(f"{name} is frozen, but all parameters are trained: make it a buffer with persistent=False")
    for name in agent.state_dict():
        if name not in parameters:
            raise UsageError(f"{name} is a buffer, which no checkpoint holds: if it never changes, set persistent=False")
    known, reached = set(map(id, parameters.values())), dict[int, Any]()
    copy.deepcopy(agent, reached)  # by id all that the network holds, in lists and dicts, too
    if any(isinstance(x, nn.Parameter) and key not in known for key, x in reached.items()):
        raise UsageError(
            "the network holds layers in a list or dict, which are not trained: use nn.ModuleList or nn.ModuleDict"
        )


def free_memory() -> float:
    """Bytes of memory that no process uses."""
    with contextlib.suppress(OSError):  # there is no such file outside Linux
        return float(re.findall(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def check_memory(num_envs: int, num_steps: int, obs_dim: int = 1, action_dim: int = 1):
    """Refuses sizes beyond the machine: about 1 MB for an environment, and the arrays of a rollout and its batch."""
    needed, free = num_envs * 1e6 + num_envs * num_steps * (24.0 * obs_dim + 16.0 * action_dim + 60), free_memory()
    if needed > free:
        raise UsageError(
            f"num_envs = {num_envs} and num_steps = {num_steps} need about {needed / 1e9:,.1f} GB of memory, and "
            f"{free / 1e9:,.1f} GB are free: lower one of them"
        )


def set_up_torch(args: Args):
    """Threads and device; on a GPU the same bits each time, and all products in TF32 like the convolutions."""
    torch.set_num_threads(args.num_threads)
    if args.device != "cpu":
        torch.cuda.set_device(args.device if ":" in args.device else f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.backends.cudnn.deterministic = True
        torch.set_float32_matmul_precision("high")


def bfloat16_unit() -> str:
    """Unit of this CPU that multiplies bfloat16; empty if it has none, which with AVX2 takes ten times as long as float32."""
    can, units = torch.cpu.get_capabilities(), {"amx_bf16": "AMX", "avx512_bf16": "avx512_bf16", "bf16": "bf16"}  # bf16: of ARM
    return next((unit for name, unit in units.items() if can.get(name)), "")


def describe_cpu() -> str:
    """What the CPU at hand can do for --precision bfloat16."""
    told = {
        "": "no instructions for bfloat16, which with AVX2 takes ten times as long as float32",
        "bf16": "bf16 (not measured)",
    }
    unit = bfloat16_unit()
    gain = f"{unit}, with which --precision bfloat16 is 1.4 to 2.1 times as fast as float32"
    return f"this CPU has {torch.backends.cpu.get_cpu_capability()} and {told.get(unit, gain)}"


def make_agent(args: Args, spaces: Spaces) -> Agent:
    scale = 255.0 if args.scale_obs else 1.0
    return Agent(args.stack_num, spaces.num_actions, args.weight_init, scale, args.precision).to(args.device)


def compile_all(functions: list, args: Args, cuda_graphs: bool = False) -> list:
    """The functions compiled, if that is wanted and can be done."""
    if not args.compile:
        return functions
    # a compiler (of C++; of C for a GPU) and the headers of Python
    named, usual = ("CXX", ["g++"]) if args.device == "cpu" else ("CC", ["gcc", "clang"])
    compilers = os.environ.get(named, "").split()[:1] or usual
    if not (any(map(shutil.which, compilers)) and Path(sysconfig.get_path("include"), "Python.h").is_file()):
        say("warning: no compiler or no Python.h found, so the update runs uncompiled, several times slower")
        return functions
    say("the first iteration compiles: half a minute the first time, seconds from the cache")
    torch.compiler.reset()
    # No guards: they re-check the arguments at every call, a fifth of its time. Here shapes and args never change; a
    # change would go unnoticed. The C++ wrapper calls the kernels from C++ instead of Python.
    options: Any = {"cpp_wrapper": args.device == "cpu", "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    options["deterministic"] = args.device != "cpu"  # kernels chosen without trying them out: the same bits each time
    options["triton.cudagraphs"] = cuda_graphs
    # a copy of the options for each, because torch takes the filter out of them
    return [torch.compile(f, fullgraph=True, dynamic=False, options=dict(options)) for f in functions]


def load_checkpoint(path: str | Path) -> tuple[dict, Path]:
    """Checkpoint of a file or run directory, and its file. Loads tensors and plain values only, no code."""
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UsageError(f"there is no checkpoint {file}")
    try:
        with zipfile.ZipFile(file) as archive:  # torch compresses nothing: what unpacks to more is no checkpoint
            if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
                raise ValueError("compressed")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise UsageError(f"{file} is not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != KIND or not isinstance(checkpoint.get("args"), dict):
        raise UsageError(f"{file} is not a checkpoint of {KIND}")
    return checkpoint, file


def check_checkpoint(saved: Any, expected: Any, spaces: Any, name: Any = "checkpoint"):
    """UsageError unless `saved` has the same spaces and all that `expected` has, with tensors of the same sizes."""
    ours = spaces.describe()
    if name == "checkpoint" and saved.get("spaces", ours) != ours:
        raise UsageError(f"the checkpoint was trained on the spaces {saved['spaces']}, but the environment has {ours}")
    if isinstance(expected, dict | tuple):
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            if not isinstance(saved, type(expected)) or (isinstance(key, int) and len(saved) != len(expected)):
                raise UsageError(f"the checkpoint is damaged: {name} is no {type(expected).__name__} of {len(expected)}")
            if isinstance(saved, dict) and key not in saved:
                raise UsageError(f"the {name} is incomplete: it has no {key}")
            check_checkpoint(saved[key], expected[key], spaces, f"{name}[{key}]" if isinstance(key, int) else key)
    elif isinstance(expected, torch.Tensor):
        if not isinstance(saved, torch.Tensor) or (saved.shape, saved.dtype) != (expected.shape, expected.dtype):
            size = tuple(getattr(saved, "shape", ()))
            raise UsageError(f"the checkpoint does not fit: {name} has the size {size}, {ours} need {tuple(expected.shape)}")
        if saved.is_floating_point() and not saved.isfinite().all():
            raise UsageError(f"the checkpoint is damaged: {name} is not finite")
    else:
        fits = isinstance(saved, float | int if isinstance(expected, float) else type(expected))
        numbers = saved if isinstance(saved, list) else [saved] if isinstance(saved, float | int) else []
        fits = fits and all(isinstance(x, float | int) and math.isfinite(x) for x in numbers)
        if not fits or (isinstance(expected, int) and saved < 0):  # such a number counts something
            raise UsageError(f"the checkpoint is damaged: {name} is {saved!r}")


def check_ranks():
    """UsageError where a variable of torchrun is set, but not as torchrun sets it."""
    given = {name: os.environ.get(name, default) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))}
    for name, number in given.items():
        if not re.fullmatch(r"\d{1,9}", number) or (name == "WORLD_SIZE" and int(number) < 1):
            raise UsageError(f"the environment variable {name} is {number!r}, no number as torchrun sets it: unset it")
    if int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        told = f"RANK is {given['RANK']}, but WORLD_SIZE is {given['WORLD_SIZE']}"
        raise UsageError(f"{told}: start it with torchrun, or unset both")


def storable(value: Any, name: str = "state") -> Any:
    """A value as a checkpoint can hold it, without numpy's numbers; UsageError where it is another object."""
    if isinstance(value, dict):
        return {key: storable(x, f"{name}[{key!r}]") for key, x in value.items()}
    if type(value) in (list, tuple):
        return type(value)(storable(x, f"{name}[{i}]") for i, x in enumerate(value))
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, torch.Tensor | int | float | str | None):
        raise UsageError(f"{name} is of type {type(value).__name__}: a checkpoint holds tensors, numbers and texts")
    return value


def write_atomically(file: Path, data: bytes):
    """After a crash at any moment the file is the old one or the new one; after an error nothing else is left."""
    temporary = file.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as f:  # x: never through a link that somebody put there
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def plain(args: Args) -> dict:
    """Settings as JSON can hold them: infinity as text."""
    return {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in dataclasses.asdict(args).items()}


def describe_run(args: Args) -> dict:
    """First record of metrics.jsonl: all that is needed to repeat the run as it was started, before any --resume."""
    git = (
        subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        if shutil.which("git")
        else None
    )
    info = ""
    with contextlib.suppress(OSError):  # there is no such file outside Linux
        info = Path("/proc/cpuinfo").read_text()
    model, family, number = (re.search(rf"{name}\s*: (.*)", info) for name in ("model name", "cpu family", "model\t"))
    versions = {"python": platform.python_version()}
    versions |= {m.__name__: m.__version__ for m in (torch, np, envpool, gymnasium)}
    return {
        "args": plain(args),
        "script": Path(__file__).name,
        "script_sha256": SCRIPT_SHA256,
        "git_revision": git.stdout.strip() or None if git else None,
        "versions": versions,
        "cpu": model.group(1) if model else platform.processor(),
        # what tells machines apart whose numbers differ: they have other kernels
        "cpu_kind": f"family {family.group(1)}, model {number.group(1)}" if family and number else platform.machine(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None,
    }


def constants(args: Args, network: nn.Module | None = None) -> dict[str, str]:
    """Settings, and numbers and texts of a network and of this file: a compiled function would keep the first ones."""
    owners: dict[str, Any] = {"args.": vars(args)}
    if network is not None:
        owners |= {f"agent.{name}.".replace("..", "."): vars(module) for name, module in network.named_modules()}
        owners |= {f"{type(network).__name__}.": vars(type(network)), "": globals()}
    kinds = int | float | str | tuple | list | dict | None
    return {
        f"{owner}{name}": repr(value)
        for owner, holder in owners.items()
        for name, value in holder.items()
        if isinstance(value, kinds) and not name.startswith("_") and name != "training"
    }


class Run:
    """Directory, lock, logs, checkpoints, W&B and progress of one training."""

    def __init__(self, args: Args):
        """Loads the checkpoint to resume, if there is one; writes nothing."""
        self.args, self.constants, self.start_time = args, constants(args), time.perf_counter()
        torch.set_num_threads(args.num_threads)
        self.wandb = load_wandb(args) if args.track else None
        self.tensorboard = load_tensorboard() if args.tensorboard else None
        self.dir, self.checkpoint, self.saved_step = Path(args.run_dir), None, 0
        if args.resume:
            self.dir = load_checkpoint(args.resume)[1].parent
            self.lock()
            self.checkpoint, _ = load_checkpoint(args.resume)  # under the lock, so that it is the last one

    def lock(self):
        """One process at a time writes here. The lock is of the directory itself and dies with its process."""
        directory = os.open(self.dir, os.O_RDONLY)
        self.unlock = weakref.finalize(self, os.close, directory)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise UsageError(f"another process is writing {self.dir}: wait for it or stop it first") from error

    def restore(self, state: dict, spaces: Any) -> int:
        """Copies the parameters and Adam's state of the checkpoint to resume into those of state; its iteration, or 0."""
        self.spaces, saved = spaces, self.checkpoint
        storable(state)  # what is none is refused now, and not after hours
        if saved is None:
            return 0
        check_checkpoint(saved, state | {"iteration": 0, "log_sizes": {"metrics.jsonl": 0, "episodes.jsonl": 0}}, spaces)
        if self.args.total_timesteps < saved["global_step"]:
            raise UsageError(
                f"total_timesteps is {self.args.total_timesteps}, but the run has done {saved['global_step']}: raise it"
            )
        for name, size in saved["log_sizes"].items():
            if not (self.dir / name).is_file() or (self.dir / name).stat().st_size < size:
                raise UsageError(f"{self.dir / name} is missing or shorter than at the checkpoint: --resume needs it")
        state["theta"].copy_(saved["theta"])
        for tensor, value in zip(state["adam"], saved["adam"], strict=True):
            tensor.copy_(value)
        return saved["iteration"]

    def refuse_foreign(self):
        """UsageError where the directory holds a run or an edited script, save a run killed before its first checkpoint."""
        files, copy = set(os.listdir(self.dir)), self.dir / Path(__file__).name
        lines = sum((self.dir / log).read_bytes().count(b"\n") for log in ("metrics.jsonl", "episodes.jsonl") if log in files)
        edited = "metrics.jsonl" not in files and copy.is_file() and copy.read_bytes() != SOURCE
        if lines > 1 or edited or not files <= {"metrics.jsonl", "episodes.jsonl", "checkpoint.tmp", copy.name, "wandb"}:
            resumable, name = (self.dir / "checkpoint.pt").is_file(), shlex.quote(str(self.dir))
            remedy = f"--resume {name} continues it, " if resumable else ""
            raise UsageError(f"{self.dir} exists: {remedy}another --run-dir starts anew")

    def make_directory(self):
        """A new directory, or one in which a run was killed before its first checkpoint."""
        made = [path for path in (self.dir, *self.dir.parents) if not os.path.exists(path)]
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock()
            self.refuse_foreign()
            if Path(__file__).resolve() != (self.dir / Path(__file__).name).resolve():
                Path(self.dir, Path(__file__).name).write_bytes(SOURCE)
        except OSError as error:
            if made:
                shutil.rmtree(self.dir, ignore_errors=True)
            for path in made[1:]:
                with contextlib.suppress(OSError):  # it was not made, or another process writes there
                    path.rmdir()
            raise UsageError(f"cannot write the run directory {self.dir}: {error.strerror}") from error

    def open(self, state: dict, compiled: nn.Module | None = None):
        """Directory, logs, the first checkpoint, W&B, the progress bar; compiled: the network, where it is."""
        args, saved, self.compiled = self.args, self.checkpoint or {}, compiled
        if not saved:
            self.make_directory()
        self.logs = {name: open(self.dir / name, "a", buffering=1) for name in ("metrics.jsonl", "episodes.jsonl")}
        for name, log in self.logs.items():
            log.truncate(saved.get("log_sizes", {}).get(name, 0))  # what came after the checkpoint is written again
            log.seek(0, os.SEEK_END)
        if not saved:
            self.write("metrics.jsonl", describe_run(args))
        self.wandb_id = saved.get("wandb_id") or (os.urandom(4).hex() if self.wandb else None)
        settled = saved and saved["args"]["total_timesteps"] == args.total_timesteps and saved.get("wandb_id") == self.wandb_id
        self.first_step, self.first_iteration = state["global_step"], saved.get("iteration", 0) + 1
        if not settled:
            self.save(self.first_iteration - 1, state)
        if self.wandb:
            open_wandb(self.wandb, args, self.dir, str(self.wandb_id))
        if self.tensorboard:  # a resumed run writes again what came after the checkpoint
            self.tensorboard = self.tensorboard(self.dir, purge_step=state["global_step"] + 1)
        say(
            f"{args.env}: {args.num_envs} x {args.num_steps} steps, {args.num_iterations} iterations, update on {args.device}, "
            f"{args.num_threads} thread(s); run directory {self.dir}"
        )
        self.saved_step, self.saved_time = self.first_step, time.perf_counter()
        self.told_time = self.warm_time = self.saved_time
        self.warm_step, self.ended_since_save = self.first_step, 0
        self.bar = tqdm.tqdm(
            total=args.num_iterations * args.batch_size, initial=self.first_step, unit="step", unit_scale=True, disable=None
        )

    def write(self, name: str, record: dict):
        self.logs[name].write(json.dumps(record, allow_nan=False, default=float) + "\n")

    def log(self, iteration: int, runner: Runner, charts: dict, losses: dict, episodes: list[tuple[int, float, int]]):
        """One record of metrics.jsonl, and one of episodes.jsonl for each episode that ended."""
        if not all(math.isfinite(x) for x in (*losses.values(), *charts.values())):
            raise NonFiniteError(f"non-finite losses or charts in iteration {iteration}: {losses | charts}")
        for name, value in constants(self.args, self.compiled).items():
            if self.constants.setdefault(name, value) != value:
                raise UsageError(f"{name} was changed in the loop: hand what changes to learn, as learning_rate is")
        now, step = time.perf_counter(), runner.global_step
        if iteration == self.first_iteration:  # it compiles
            self.warm_time, self.warm_step = now, step
            self.bar.initial, self.bar.start_t = step, time.time()
        record = {f"charts/{key}": value for key, value in charts.items()}
        if episodes:
            record["charts/episodic_return"] = float(np.mean([r for _, r, _ in episodes]))
            record["charts/episodic_length"] = float(np.mean([length for _, _, length in episodes]))
        record |= {"charts/SPS": round(self.steps_per_second(step)), "charts/seconds": round(now - self.start_time, 3)}
        record |= {f"losses/{key}": value for key, value in losses.items()}
        self.write("metrics.jsonl", {"iteration": iteration, "global_step": step, **record})
        for global_step, episode, length in episodes:
            self.write("episodes.jsonl", {"global_step": global_step, "return": episode, "length": length})
        self.chart(record, step)
        self.ended_since_save += len(episodes)
        self.show_progress(step, float(np.mean(runner.recent_returns)) if runner.recent_returns else math.nan)

    def chart(self, record: dict, step: int):
        """The figures of a record for W&B and TensorBoard, where these are wanted."""
        if self.wandb:
            self.wandb.log(record, step=step)
        if self.tensorboard:
            for name, value in record.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()

    def steps_per_second(self, step: int) -> float:
        """Of this process since its first iteration, which compiles; 0 in the first."""
        return (step - self.warm_step) / max(time.perf_counter() - self.warm_time, 1e-9)

    def show_progress(self, step: int, episodic_return: float):
        """The bar of a terminal; without one a line every half minute."""
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"return {episodic_return:.1f}")
        total, now = self.args.num_iterations * self.args.batch_size, time.perf_counter()
        due = now - self.told_time > 30 and step > self.warm_step  # the first iteration compiles: no speed yet
        if self.bar.disable and (due or step == total):
            self.told_time, rate = now, self.steps_per_second(step) or (step - self.first_step) / (now - self.start_time)
            left = tqdm.tqdm.format_interval((total - step) / rate)
            done = f"{step:,} of {total:,} steps ({step / total:.0%})"
            say(f"{done}, return {episodic_return:.1f}, {rate:,.0f} steps/s, {left} left")

    def is_checkpoint_due(self, iteration: int) -> bool:
        minutes = (time.perf_counter() - self.saved_time) / 60
        last = iteration == self.args.num_iterations
        return last or iteration % self.args.checkpoint_every == 0 or minutes > self.args.checkpoint_minutes

    def save(self, iteration: int, state: dict):
        """Replaces the checkpoint. It has no random states: they are set anew from (seed, iteration) after each one."""
        if not torch.stack([x.isfinite().all() for x in (state["theta"], *state["adam"])]).all():
            raise NonFiniteError(f"non-finite parameters, or moments of Adam, after iteration {iteration}")
        for log in self.logs.values():
            log.flush()
            os.fsync(log.fileno())
        checkpoint = {
            "kind": KIND,
            "script_sha256": SCRIPT_SHA256,
            "args": dataclasses.asdict(self.args),
            "spaces": self.spaces.describe(),
            "iteration": iteration,
            **state,
            "log_sizes": {name: log.tell() for name, log in self.logs.items()},
            "wandb_id": self.wandb_id,
        }
        data = io.BytesIO()  # torch would hide what a full disk raises
        torch.save(storable(checkpoint), data)
        write_atomically(self.dir / "checkpoint.pt", data.getvalue())
        if self.first_iteration <= iteration < self.args.num_iterations and not self.ended_since_save:
            steps = (state["global_step"] - self.saved_step) * self.args.num_steps // self.args.batch_size
            flags = "--checkpoint-every" + " and --checkpoint-minutes" * math.isfinite(self.args.checkpoint_minutes)
            say(f"warning: no episode ended within {steps} steps, after which environments start afresh: raise {flags}")
        self.saved_step, self.saved_time, self.ended_since_save = state["global_step"], time.perf_counter(), 0

    def how_to_go_on(self, step: int) -> str:
        lost = f", {step - self.saved_step:,} of which will be played again" if step > self.saved_step else ""
        command = shlex.join(["python", sys.argv[0], "--resume", str(self.dir)])
        return f"interrupted after {step:,} steps{lost}; go on from step {self.saved_step:,} with: {command}"

    def finish(self, runner: Runner) -> dict:
        """Reports the training, which is complete and saved, then plays the closing evaluation."""
        args, now = self.args, time.perf_counter()
        self.bar.close()
        for log in self.logs.values():
            log.close()
        recent, seconds = runner.recent_returns, now - self.start_time
        result: dict[str, Any] = {
            "run_dir": str(self.dir),
            "global_step": runner.global_step,
            "episodic_return": float(np.mean(recent)) if recent else math.nan,
            "episodes": len(recent),
            "seconds": seconds,
            "sps": self.steps_per_second(runner.global_step),
            "sps_with_startup": (runner.global_step - self.first_step) / seconds,
        }
        score = f"return {result['episodic_return']:.1f} over the last {len(recent)} episodes" if recent else "no episode ended"
        whole = f"{result['sps_with_startup']:.0f} steps/s with start-up" if result["sps_with_startup"] else ""
        speed = f", {result['sps']:.0f} steps/s ({whole})" if result["sps"] else f", {whole}" * bool(whole)
        print(
            f"{args.env}, seed {args.seed}: {score} after {runner.global_step:,} steps in {seconds:.0f} s{speed} "
            f"on {args.num_threads} thread(s)",
            flush=True,
        )
        runner.envs.close()  # before another is made: some simulators allow one instance
        result["evaluation"] = evaluate(args, load_checkpoint(self.dir)[0], closing=True) if args.eval_episodes else {}
        if self.wandb:
            log_evaluation(self.wandb, result)
            self.wandb.finish()
        self.unlock()
        return result


class RunOfRanks(Run):
    """The run under torchrun: rank 0 writes and decides, the others follow."""

    def __init__(self, args: Args):
        if not dist.is_initialized():
            try:
                dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
            except ValueError as error:  # WORLD_SIZE may be set by something else
                ranks = f"WORLD_SIZE is {args.world_size}, as if torchrun had started this"
                raise UsageError(f"{ranks}, but {error}: start it with torchrun, or unset WORLD_SIZE") from error
        if args.rank > 0:
            sys.stdout = open(os.devnull, "w")  # rank 0 reports
        super().__init__(args)

    def lock(self):
        if self.args.rank == 0:
            super().lock()

    def open(self, state: dict, compiled: nn.Module | None = None):
        refusal = [""]
        try:
            if self.args.rank == 0:
                super().open(state, compiled)
        except UsageError as error:
            refusal = [str(error)]
        dist.broadcast_object_list(refusal)
        if refusal[0]:
            raise UsageError(refusal[0])
        dist.broadcast(state["theta"], 0)

    def log(self, iteration: int, runner: Runner, charts: dict, losses: dict, episodes: list[tuple[int, float, int]]):
        if self.args.rank == 0:
            super().log(iteration, runner, charts, losses, episodes)
        elif not all(math.isfinite(x) for x in losses.values()):
            raise NonFiniteError(f"non-finite losses in iteration {iteration}")

    def is_checkpoint_due(self, iteration: int) -> bool:
        decision = [self.args.rank == 0 and super().is_checkpoint_due(iteration)]  # by the clock of rank 0
        dist.broadcast_object_list(decision)
        return decision[0]

    def save(self, iteration: int, state: dict):
        if self.args.rank == 0:
            super().save(iteration, state)

    def how_to_go_on(self, step: int) -> str:
        if self.args.rank > 0:
            return "interrupted"
        return super().how_to_go_on(step).replace(": python", f": torchrun --nproc-per-node {self.args.world_size}")

    def finish(self, runner: Runner) -> dict:
        dist.destroy_process_group()
        return super().finish(runner) if self.args.rank == 0 else {"evaluation": {}}


def load_tensorboard() -> Any:
    """What writes event files, before a run exists."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs a package besides: pip install tensorboard") from error
    return SummaryWriter


def load_wandb(args: Args) -> Any:
    """The module wandb, after checking what can be checked before a run exists."""
    import wandb

    mode: Any = os.environ.get("WANDB_MODE", "online")
    given: Any = {"WANDB_MODE": mode, "wandb_project_name": args.wandb_project_name}
    for name, option in (("WANDB_MODE", "mode"), ("wandb_project_name", "project")):
        try:
            wandb.Settings(**{option: given[name]})
        except (wandb.errors.Error, ValueError) as error:
            reason = error.errors()[0]["msg"] if hasattr(error, "errors") else error  # pydantic's are a page long
            raise UsageError(f"{name} is {given[name]}: {reason}") from error
    try:
        known = mode != "online" or wandb.login(prompt=False)
    except wandb.errors.Error as error:  # a wrong key, or no network
        raise UsageError(f"Weights & Biases refuses the login ({error}): set WANDB_MODE=offline to go without it") from error
    if not known:
        raise UsageError("--track needs a login: run `wandb login`, or set WANDB_MODE=offline")
    return wandb


def open_wandb(wandb: Any, args: Args, run_dir: Path, wandb_id: str):
    project, config = args.wandb_project_name, dataclasses.asdict(args)
    try:
        wandb.init(
            project=project,
            entity=args.wandb_entity,
            name=run_dir.name,
            id=wandb_id,
            resume="allow",
            dir=run_dir,
            config=config,
        )
    except wandb.errors.Error as error:  # what only the server knows: that there is no such entity, say
        without = f"--resume {shlex.quote(str(run_dir))} --no-track goes on without it"
        raise UsageError(f"Weights & Biases refuses the run: {error}; {without}") from error


def log_evaluation(wandb: Any, result: dict):
    """What the terminal says at the end, in the summary of the W&B run."""
    wandb.run.summary["final/episodic_return"] = result["episodic_return"]
    if result["evaluation"].get("returns"):
        wandb.run.summary["evaluation/return"] = float(np.mean(result["evaluation"]["returns"]))
        wandb.run.summary["evaluation/std"] = float(np.std(result["evaluation"]["returns"]))
    gif = Path(result["run_dir"]) / "evaluation.gif"
    if gif.is_file():
        wandb.log({"evaluation/video": wandb.Video(str(gif), format="gif")}, step=result["global_step"])


def make_policy(args: Args, checkpoint: dict, spaces: Spaces, rng: np.random.Generator | None = None):
    """A trained policy: frames of N games (N, stack_num, 84, 84) -> actions (N,), the likeliest or sampled by rng."""
    agent = make_agent(args, spaces)
    check_checkpoint(checkpoint, {"theta": agent.flat()}, spaces)
    agent.load(checkpoint["theta"])

    @torch.no_grad()
    def policy(frames: np.ndarray) -> np.ndarray:
        draws = np.ones if rng is None else rng.standard_exponential
        noise = torch.from_numpy(np.float32(draws((len(frames), spaces.num_actions))))
        return agent.act(to_blocks(frames).to(args.device), noise.to(args.device)).action.cpu().numpy()

    return policy


def load_policy(path: str | Path, rng: np.random.Generator | None = None):
    """The policy of a run directory or checkpoint: frames of N games (N, stack_num, 84, 84) uint8 -> actions (N,).

    The likeliest actions, or sampled ones where rng is given. Makes a game of the run to learn its spaces.
    """
    checkpoint, file = load_checkpoint(path)
    args = load_args(checkpoint, file, device="auto")
    envs, _ = make_envs(args, [0])
    spaces = Spaces.of(envs)
    envs.close()
    return make_policy(args, checkpoint, spaces, rng)


def draw(envs: Any) -> Image.Image:
    """Picture of the first of these environments, in 64 colours."""
    try:
        return Image.fromarray(envs.render()[0]).quantize(64)
    except Exception as error:  # of an environment: any kind; it may also have drawn nothing
        raise UsageError(f"capture_video needs an environment that draws itself, in bytes ({error!r})") from error


def play_episodes(
    args: Args, checkpoint: dict, seeds: list[int], rng: np.random.Generator, frames: list | None, problems: list
):
    """Plays one whole game from each seed, side by side; yields (return, length, cut off) of each as it ends.

    frames takes pictures of the first, at most 2000. Where it cannot be drawn any longer, the games go on.
    """
    N = len(seeds)
    set_up_torch(args)
    envs, raw_obs = make_envs(args, seeds, render=frames is not None)
    policy = make_policy(args, checkpoint, Spaces.of(envs), None if args.eval_deterministic else rng)
    step_envs = make_game_step(envs)
    returns, lengths, running = np.zeros(N), np.zeros(N, dtype=int), np.ones(N, dtype=bool)
    resetting = np.zeros(N, dtype=bool)  # such a step is not counted
    for step in range(args.eval_steps):
        if frames is not None and running[0] and step % 2 == 0 and len(frames) < 2000:  # every other step, 40 ms each
            try:
                frames.append(draw(envs))
            except UsageError as error:
                if not frames:
                    raise
                problems.append(f"the video ends early: {error}")
                frames = None
        seen = step_envs(policy(raw_obs))
        returns, lengths = returns + np.where(running, seen.raw_reward, 0), lengths + (running & ~resetting)
        raw_obs, resetting = seen.obs, seen.terminated | seen.truncated
        cut_off = step + 1 == args.eval_steps
        for i in np.flatnonzero(running & (seen.game_over | cut_off)):
            yield float(returns[i]), int(lengths[i]), not seen.game_over[i]
        running &= ~seen.game_over
        if not running.any():
            break
    envs.close()


def evaluate(args: Args, checkpoint: dict, closing: bool = False) -> dict:
    """Plays args.eval_episodes episodes with frozen observation statistics, at most num_envs at a time.

    Returns {"returns", "lengths", "cut_off", "deterministic", "problems"}: raw rewards summed, steps, how many episodes
    were cut off. Writes it to args.run_dir/evaluation.json; with args.capture_video the first episode goes to evaluation.gif
    beside it.
    closing: at the end of a training, which is saved; then whatever fails here is a problem to report, no error.
    """
    say(f"playing {args.eval_episodes} episodes to evaluate{', drawing the first' if args.capture_video else ''}")
    rng = np.random.default_rng([args.seed, 2**31])  # independent of what training draws
    seeds = rng.integers(2**31, size=args.eval_episodes).tolist()
    episodes: list[tuple[float, int, bool]] = []
    frames: list[Image.Image] = []
    problems: list[str] = []
    interrupt: KeyboardInterrupt | None = None
    try:
        for i in range(0, len(seeds), args.num_envs):
            drawn = frames if args.capture_video and i == 0 else None
            for episode in play_episodes(args, checkpoint, seeds[i : i + args.num_envs], rng, drawn, problems):
                episodes.append(episode)  # one by one: what was played before an error is kept
    except KeyboardInterrupt as error:
        if not episodes:
            raise
        interrupt = error
        problems.append(f"the evaluation was interrupted after {len(episodes)} of {len(seeds)} episodes")
    except Exception as error:  # of an environment: any kind
        if isinstance(error, UsageError) and not (closing or episodes):
            raise
        told = str(error) if isinstance(error, UsageError | NonFiniteError) else repr(error)
        problems.append(f"the evaluation stopped after {len(episodes)} of {len(seeds)} episodes: {told}")
    result: dict[str, Any] = {"returns": [r for r, *_ in episodes], "lengths": [length for _, length, _ in episodes]}
    result |= {"cut_off": sum(cut for *_, cut in episodes), "deterministic": args.eval_deterministic, "problems": problems}
    if result["cut_off"]:
        say(f"{result['cut_off']} evaluation episode(s) cut off after --eval-steps {args.eval_steps}")
    files = {"evaluation.json": json.dumps(result, allow_nan=False).encode() + b"\n"}
    if frames:
        gif = io.BytesIO()
        frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=40, loop=0)
        files["evaluation.gif"] = gif.getvalue()
    for name, data in files.items():
        try:
            write_atomically(Path(args.run_dir, name), data)
        except OSError as error:
            problems.append(f"cannot write {Path(args.run_dir, name)}: {error.strerror}")
    if interrupt:
        raise KeyboardInterrupt(*interrupt.args, "; ".join(problems))
    return result


# flags that people bring from CleanRL: what they are here, or why there is none
FOREIGN_FLAGS: dict[str, Any] = {
    "--env-id": ["--env"],
    "--gym-id": ["--env"],
    "--cuda": ["--device", "auto"],
    "--no-cuda": ["--device", "cpu"],
    "--no-norm-adv": ["--norm-adv", "none"],
    "--torch-deterministic": [],  # always
    "--no-torch-deterministic": "runs are always deterministic: leave it out",
    "--save-model": [],  # always, as checkpoint.pt
    "--no-save-model": "the model is always kept, as checkpoint.pt: leave it out",
    "--exp-name": "use --run-dir, which names the directory of a run",
    "--upload-model": "nothing is uploaded; --track logs to Weights & Biases",
    "--hf-entity": "nothing is uploaded; --track logs to Weights & Biases",
}


def translate(words: list[str]) -> list[str]:
    """A command line as CleanRL takes it, in words of this script: --env-id X, --cuda False, --anneal-lr True, ..."""
    switches = {f"--{f.name}".replace("_", "-") for f in dataclasses.fields(Args) if isinstance(f.default, bool)}
    switches |= {name for name in FOREIGN_FLAGS if not name.startswith("--no-")}
    translated: list[str] = []
    for word in [part for given in words for part in (given.split("=", 1) if given.startswith("--") else [given])]:
        before = translated[-1] if translated else ""
        name = word.replace("_", "-") if word.startswith("--") else ""
        if word.lower() in ("true", "false", "1", "0") and before in switches:
            translated[-1] = before if word.lower() in ("true", "1") else before.replace("--", "--no-", 1)
        elif word.lower() in ("true", "false") and before == "--norm-adv":
            translated.append("minibatch" if word.lower() == "true" else "none")
        else:
            translated.append(name if name in switches or name in FOREIGN_FLAGS else word)
    refused = [word for word in translated if isinstance(FOREIGN_FLAGS.get(word), str)]
    if refused:
        raise UsageError(f"there is no {refused[0]}: {FOREIGN_FLAGS[refused[0]]}")
    return [part for word in translated for part in FOREIGN_FLAGS.get(word, [word])]


def check_trust(env: str, named: str | None):
    """A checkpoint is data: it may be somebody else's, and so may the module that lies beside it."""
    if ":" in env and named != env:
        raise UsageError(f"this runs the code of {env}: if you trust it, add --env {shlex.quote(env)} (in Python env=...)")


def load_args(checkpoint: dict, file: Path, **changes) -> Args:
    """Settings of a checkpoint, as a script with its flags reads them."""
    if checkpoint.get("script_sha256", SCRIPT_SHA256) != SCRIPT_SHA256:  # an edited network may have as many parameters
        say(f"warning: {file} is of another version of this script")
    threads = checkpoint["args"].get("num_threads")
    if isinstance(threads, int) and threads > MOST_THREADS:
        few = f"but here are at most {MOST_THREADS}: the last digits may differ"
        say(f"warning: {file} is of a run with {threads} threads, {few}")
        changes = {"num_threads": MOST_THREADS} | changes
    try:
        return Args(**checkpoint["args"] | {"resume": "", "evaluate": "", "run_dir": str(file.parent)} | changes)
    except TypeError as error:
        raise UsageError(f"{file} was written by a version of this script with other flags: {error}") from error


def parse_args(words: list[str]) -> tuple[Args, dict | None]:
    """Arguments of the command line and the checkpoint that they name, whose settings are then the defaults."""
    words = translate(words)
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--resume", "--evaluate", "--device", "--env"):
        named.add_argument(name)
    given = named.parse_known_args(words)[0]
    if given.resume is not None and given.evaluate is not None:
        raise UsageError("resume continues a run, evaluate plays one: give one of them")
    path = given.evaluate if given.resume is None else given.resume
    if path is None:
        return tyro.cli(Args, args=words, description=__doc__, prog=Path(__file__).name), None
    if not path:
        raise UsageError("resume and evaluate need the path of a run directory: the one given is empty")
    checkpoint, file = load_checkpoint(path)
    changes = {}
    if given.device:
        changes["device"] = given.device
    elif given.evaluate and re.fullmatch(r"cuda(:\d+)?", str(checkpoint["args"].get("device"))):
        changes["device"] = "cpu"  # a run of a GPU is evaluated without one, but resumed with other bits only if asked for
    if given.evaluate and not checkpoint["args"].get("eval_episodes"):
        changes["eval_episodes"] = Args.eval_episodes  # the run was trained without an evaluation
    saved = load_args(checkpoint, file, **changes)
    if given.evaluate:
        check_trust(saved.env, given.env)
    args = tyro.cli(Args, args=words, description=__doc__, prog=Path(__file__).name, default=saved)
    free = {"resume", "evaluate", "total_timesteps", "eval_episodes", "eval_steps", "eval_deterministic", "capture_video"}
    free |= {"track", "wandb_project_name", "wandb_entity", "tensorboard", "compile", "device", "num_threads"}
    free |= {"checkpoint_minutes"}
    changed = [
        f.name for f in dataclasses.fields(Args) if f.name not in free and getattr(args, f.name) != getattr(saved, f.name)
    ]
    if changed:
        raise UsageError(
            f"a saved run keeps its settings: leave out --{' --'.join(changed).replace('_', '-')}, or start a new run"
        )
    return args, checkpoint


def tell_evaluation(args: Args, evaluation: dict):
    """The closing lines; exit code 1 where something of the evaluation is missing."""
    returns, lengths, name = evaluation["returns"], evaluation["lengths"], Path(__file__).name
    if returns:
        print(
            f"evaluation, {'likeliest' if args.eval_deterministic else 'sampled'} actions: return {np.mean(returns):.1f} "
            f"+- {np.std(returns):.1f}, length {np.mean(lengths):.0f} over {len(returns)} episodes"
        )
    if evaluation["problems"]:
        sys.exit(f"{name}: {'; '.join(evaluation['problems'])}")


def main():
    args, name = None, Path(__file__).name
    for stream in ("stdout", "stderr"):  # closed by >&-
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))
        elif isinstance(getattr(sys, stream), io.TextIOWrapper):  # a path may have letters that a terminal has not
            getattr(sys, stream).reconfigure(errors="backslashreplace")
    try:
        args, checkpoint = parse_args(sys.argv[1:])
        evaluation = evaluate(args, checkpoint) if checkpoint and args.evaluate else train(args)["evaluation"]
        print(f"run directory: {args.run_dir}", flush=True)
        if evaluation:
            tell_evaluation(args, evaluation)
    except UsageError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (NonFiniteError, OSError, MemoryError) as error:
        file = Path(args.run_dir, "checkpoint.pt") if args else None
        last = f"; the last checkpoint is {file}" if file and file.is_file() else ""
        print(f"{name}: stopped: {error or 'out of memory'}{last}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        compiler: Any = sys.modules.get("torch._dynamo.exc")
        if compiler and isinstance(error, compiler.TorchDynamoException):
            reason = f"torch.compile refuses the update ({textwrap.shorten(str(error), 400)}); --no-compile runs without it"
        elif re.search("out of memory|allocate memory", str(error)):  # of torch: no MemoryError
            reason = f"stopped: out of memory: {LESS_MEMORY}"
        elif getattr(args, "compile", False) and re.search(r"expected size \d+==\d+", str(error)):
            reason = "stopped: the compiled update takes minibatches of one size alone; --no-compile takes any"
        else:
            raise
        print(f"{name}: {reason}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        told = [part for part in error.args if isinstance(part, str)]
        if args and not told and not args.evaluate and Path(args.run_dir, "checkpoint.pt").is_file():
            told = [f"interrupted; go on with: {shlex.join(['python', sys.argv[0], '--resume', args.run_dir])}"]
        print(f"{name}: {told[0] if told else 'interrupted'}", file=sys.stderr)
        sys.exit(128 + next((part for part in error.args if isinstance(part, int)), 2))


if __name__ == "__main__":
    __doc__ = f"{__doc__}\n{describe_cpu()}\n"  # above the flags in --help
    main()
