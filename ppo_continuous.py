"""PPO (Schulman et al. 2017): clipped objective, separate networks, Gaussian policy, for MuJoCo.

    python ppo_continuous.py --env HalfCheetah
    python ppo_continuous.py --env my_module:MyEnv-v0 --num-envs 8 --num-steps 256 --track
    python ppo_continuous.py --evaluate runs/NAME --capture-video

HalfCheetah 2348 [2016, 2728], Hopper 2378 [2147, 2590], Walker2d 3562 [3114, 3969] after 1M steps: last 100 episodes, 95%
intervals over 30, 10 and 10 seeds. Two to eight minutes on a core.

Map of this file, in the order in which it is read:
    Flags                 every setting, one line each
    PPO                   networks, advantages, loss, update by one minibatch
    Rollout and training  play, make the batch, learn, and the loop
    Environments          normalization, how they are made, their spaces
    Surroundings          run directory, evaluation, command line: nothing about PPO, alike in every script
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "envpool==1.2.5",
#     "gymnasium==1.4.0",
#     "numba==0.68.1",
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
import ctypes
import ctypes.util
import dataclasses
import difflib
import errno
import fcntl
import gc
import hashlib
import inspect
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
import warnings
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
with contextlib.suppress(OSError):  # envpool draws MuJoCo only where the system's OpenGL was loaded before it
    ctypes.CDLL("libEGL.so.1", mode=ctypes.RTLD_GLOBAL)
import envpool
import gymnasium
import numba
import numpy as np
import torch
import tqdm
import tyro
from PIL import Image
from torch import nn
from torch.distributions import Normal

gc.enable()
gc.freeze()  # what they loaded stays until the end, so it is never scanned
warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")  # gymnasium, on every float64 Box

KIND = "ppo_continuous"  # of checkpoints; stays when the file is renamed
SCRIPT_SHA256 = hashlib.sha256(SOURCE).hexdigest()
LESS_MEMORY = "lower num_envs or num_steps, or take more minibatches"
INFO_KEYS: tuple[str, ...] = ()  # what it reads of the infos of an environment


class UsageError(Exception):
    """A mistake that the user can fix; the command line prints it as one sentence and exits with 2."""


class NonFiniteError(RuntimeError):
    """A loss, observation or reward is NaN or infinite; the command line prints it and exits with 1."""


# ----------------------------------------------------------------------------------------------------------------------
# Flags. The help is the comment at the field. The bounds are in the type: in words, and as a test.

Count = Annotated[int, ("be at least 1", lambda x: x >= 1), ("be at most 2147483647", lambda x: x < 2**31)]
MOST_THREADS = 4 * (os.cpu_count() or 1)
Cores = Annotated[int, ("be at least 1", lambda x: x >= 1), ("be at most 4 per core", lambda x: x <= MOST_THREADS)]
Episodes = Annotated[int, ("be finite and at least 0", lambda x: x >= 0), ("be at most 1000000", lambda x: x <= 10**6)]
Seed = Annotated[int, ("be finite and at least 0", lambda x: x >= 0)]
Steps = Annotated[int, ("be below 2**63", lambda x: x < 2**63)]
Positive = Annotated[float, ("be above 0", lambda x: x > 0), ("be finite", math.isfinite)]  # NaN is not above 0
Limit = Annotated[float, ("be above 0", lambda x: x > 0)]
OptionalLimit = Annotated[float | None, ("be above 0, or None", lambda x: x is None or x > 0)]
Weight = Annotated[float, ("be finite and at least 0", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, ("lie between 0 and 1", lambda x: 0 <= x <= 1)]


@dataclass
class Args:
    env: str = "HalfCheetah"  # environment: a name (HalfCheetah means HalfCheetah-v4), an id, or my_module:MyEnv-v0
    seed: Seed = 1  # seed of networks, actions, minibatches and environments, at least 0
    total_timesteps: Steps = 1_000_000  # steps of all environments together, resets too; rounded down to whole rollouts
    run_dir: str = ""  # directory of the run; empty: runs/<script>__<env>__<seed>__<time>
    # iterations between checkpoints, at least 1; environments start afresh at each, so it should span many episodes
    checkpoint_every: Count = 50
    checkpoint_minutes: Limit = math.inf  # a checkpoint also after so many minutes; the run then depends on the clock
    # continue the run of this checkpoint or run directory, with its settings, bit-identically; --total-timesteps may be
    # changed with it, and annealing then runs to the new end
    resume: str = ""
    evaluate: str = ""  # only evaluate this checkpoint or run directory, with frozen observation statistics
    eval_episodes: Episodes = 10  # episodes of the evaluation that ends a run; 0: none
    eval_steps: Count = 100_000  # steps after which an evaluation episode is cut off
    eval_deterministic: bool = True  # evaluate the likeliest action; off: sampled actions
    capture_video: bool = False  # record the first evaluation episode as evaluation.gif in the run directory
    track: bool = False  # log to Weights & Biases, too (WANDB_MODE=offline works)
    wandb_project_name: str = "ppo"  # project of --track
    wandb_entity: str | None = None  # team of --track
    tensorboard: bool = False  # write TensorBoard's event files into the run directory, too (needs pip install tensorboard)

    # PPO
    learning_rate: Positive = 3e-4  # Adam step size, above 0
    num_envs: Count = 1  # parallel environments (N)
    num_steps: Count = 2048  # steps of each environment per rollout (T)
    gamma: Fraction = 0.99  # discount, 0 to 1
    gae_lambda: Fraction = 0.95  # lambda of generalized advantage estimation, 0 to 1; 1: Monte Carlo, 0: one-step TD
    num_minibatches: Count = 32  # minibatches per epoch; must divide num_envs * num_steps; 1: whole batch
    update_epochs: Count = 10  # passes over a rollout (K)
    clip_coef: Positive = 0.2  # clip range epsilon of ratio and value, above 0
    ent_coef: Weight = 0.0  # weight of the entropy bonus (c2), at least 0
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
    state_independent_std: bool = True  # [detail 24] one log standard deviation per action; off: an output of the network
    clip_actions: bool = True  # [detail 27] the environment gets actions clipped to its bounds, the learner the unclipped
    # [detail 28] observations by running mean and variance, updated every step or once per rollout (2017)
    norm_obs: Literal["step", "batch", "none"] = "step"
    clip_obs: Limit = 10.0  # [detail 29] observations limited to +-this, after normalization if there is any; inf: off
    norm_reward: bool = True  # [detail 30] rewards divided by the running deviation of the discounted return
    clip_reward: Limit = 10.0  # [detail 31] rewards limited to +-this after scaling, above 0; inf: off
    anneal_clip: bool = False  # clip range falls linearly to 0 (baselines of August 2017)
    bootstrap_truncated: bool = True  # [ours] after a time limit bootstrap from the final observation; off: as in 2017
    mask_resets: bool = True  # [ours] leave steps that only reset out of loss and statistics; off: learn from them, too

    # speed
    compile: bool = True  # compile the update with torch.compile (needs a C++ compiler on a CPU)
    device: str = "cpu"  # device of the update: cpu, cuda, cuda:1; the policy acts on the CPU, where one step is fastest
    num_threads: Cores = 1  # CPU threads of torch and of envpool, at least 1

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
        check_bounds(self)
        if not self.run_dir:
            env = re.sub(r"[^\w.-]+", ".", self.env)
            now = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
            self.run_dir = f"runs/{Path(__file__).stem}__{env}__{self.seed}__{now}"
        if self.batch_size % self.num_minibatches:
            sizes = f"num_envs * num_steps = {self.batch_size} does not divide into num_minibatches = {self.num_minibatches}"
            raise UsageError(f"{sizes}: change one of them")
        if self.norm_adv != "none" and (self.batch_size if self.norm_adv == "batch" else self.minibatch_size) < 2:
            raise UsageError(
                f"norm_adv {self.norm_adv} makes the advantage of a single step 0: take fewer minibatches, or none"
            )
        if self.num_iterations < 1:
            rollout = f"one rollout of num_envs * num_steps = {self.batch_size} steps"
            raise UsageError(f"total_timesteps is {self.total_timesteps}, less than {rollout}: raise it or shorten the rollout")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"device is {self.device}: use cpu, cuda or cuda:1")
        gpus = torch.cuda.device_count()
        if self.device != "cpu" and int(self.device[5:] or 0) >= gpus:
            raise UsageError(f"device is {self.device}, but torch finds {gpus} GPU(s) here: use --device cpu")
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

    obs: torch.Tensor  # (B, obs_dim) normalized
    action: torch.Tensor  # (B, action_dim) as sampled, before clipping to the bounds
    logprob: torch.Tensor  # (B,) of the policy that acted, nats
    value: torch.Tensor  # (B,) before the update
    advantage: torch.Tensor  # (B,)
    return_: torch.Tensor  # (B,) advantage + value, the target of the value function
    valid: torch.Tensor  # (B,) 1, or 0 at a step that only reset its environment; such a step teaches nothing


class Agent(nn.Module):
    """Policy and value function as two MLPs with two hidden layers of 64 tanh units (section 6.1).

    policy and value are the only definition of the networks; numpy_policy copies policy for the rollout.
    """

    def __init__(self, obs_dim: int, action_dim: int, weight_init: str = "orthogonal", state_independent_std: bool = True):
        super().__init__()
        self.obs_dim = obs_dim

        def mlp(out_dim: int, out_gain: float) -> nn.Sequential:
            return nn.Sequential(
                layer_init(nn.Linear(obs_dim, 64), math.sqrt(2), weight_init),
                nn.Tanh(),
                layer_init(nn.Linear(64, 64), math.sqrt(2), weight_init),
                nn.Tanh(),
                layer_init(nn.Linear(64, out_dim), out_gain, weight_init),
            )

        self.critic = mlp(1, 1.0)  # [detail 13] [detail 26] shares nothing with the policy
        self.actor = mlp(action_dim if state_independent_std else 2 * action_dim, 0.01)
        self.log_std = nn.Parameter(torch.zeros(action_dim)) if state_independent_std else None  # [detail 24]

    def policy(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (B, obs_dim) -> mean and standard deviation of the Gaussian policy, each (B, action_dim)."""
        mean, log_std = self.actor(obs), self.log_std
        if log_std is None:
            mean, log_std = mean.chunk(2, dim=1)
        return mean, log_std.expand_as(mean).exp()

    def value(self, obs: torch.Tensor) -> torch.Tensor:
        """obs (B, obs_dim) -> value (B,), in units of reward."""
        return self.critic(obs).squeeze(1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> Output:
        """obs (B, obs_dim), action (B, action_dim) -> log-probability and entropy of the policy, value."""
        policy = Normal(*self.policy(obs), validate_args=False)  # [detail 23]
        # [detail 25] the components are independent: log-probabilities and entropies add up
        return Output(policy.log_prob(action).sum(1), policy.entropy().sum(1), self.value(obs))


def numpy_policy(agent: Agent):
    """Agent.policy in numpy, with the current parameters: obs (N, obs_dim) -> mean, standard deviation.

    Takes 10 us for one observation where torch takes 65 or more. Has to be made again after every update. Compared with
    Agent.policy and Agent.forward each time, so that no edit lets another policy act than the one that learns.
    """
    activations: dict[type, Any] = {nn.Tanh: np.tanh, nn.ReLU: lambda x: np.maximum(x, 0)}
    layers: list[Any] = []
    for _, module in agent.actor.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Sequential):
            continue  # its parts follow
        if isinstance(module, nn.Linear):
            weight = np.ascontiguousarray(module.weight.detach().cpu().numpy().T)
            layers.append((weight, 0 if module.bias is None else module.bias.detach().cpu().numpy()))
        elif type(module) in activations:
            layers.append(activations[type(module)])
        else:
            raise UsageError(f"numpy_policy does not know {type(module).__name__}: write its forward pass there")
    if not all(np.isfinite(x).all() for layer in layers if type(layer) is tuple for x in layer):
        raise NonFiniteError("the parameters of the policy are not finite")
    std = None if agent.log_std is None else np.exp(agent.log_std.detach().cpu().numpy())

    def policy(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for layer in layers:
            obs = obs @ layer[0] + layer[1] if type(layer) is tuple else layer(obs)
        if std is not None:
            return obs, std
        mean, state_log_std = np.split(obs, 2, axis=1)
        return mean, np.exp(state_log_std)

    def acting(obs: np.ndarray):  # mean, standard deviation, log-density at the mean: as the rollout samples
        mean, std = policy(obs)
        return mean, std, -np.log(np.broadcast_to(std, mean.shape) * math.sqrt(2 * math.pi)).sum(1)

    def learning(obs: torch.Tensor):  # the same, as the update computes it
        mean, std = agent.policy(obs)
        new = agent(obs, mean)
        return (mean, std, new.logprob), (new.value, agent.value(obs))

    check_copy(acting, learning, agent.obs_dim, next(agent.parameters()).device)
    return policy


def check_copy(acting, learning, obs_dim: int, device: torch.device):
    """Compares the policy that acts, in numpy, with the one that learns, in torch, on observations of three sizes."""
    probe = np.sin(np.arange(3 * obs_dim, dtype=np.float32)).reshape(3, obs_dim) * np.array([[1], [4], [16]], np.float32)
    try:
        with torch.no_grad():
            outputs, (forward_value, value) = learning(torch.as_tensor(probe, device=device))
            expected = [x.cpu().numpy() for x in outputs]
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:  # shapes that do not fit, another kind of layer
        raise UsageError(f"Agent.policy or Agent.forward fails: {error}") from error
    try:
        with np.errstate(all="ignore"):
            pairs = zip(acting(probe), expected, strict=True)
            rows = [(np.broadcast_to(a, b.shape).reshape(3, -1), b.reshape(3, -1)) for a, b in pairs]
            acted, learned = (np.concatenate(x, axis=1) for x in zip(*rows, strict=True))  # (3, numbers)
            largest = np.abs(learned).max(axis=1, keepdims=True)
            close = np.abs(acted - learned) <= 1e-4 + 1e-3 * np.abs(learned) + 1e-5 * largest
        # a large observation may overflow, but then it does so in both
        same = close[np.isfinite(learned).all(axis=1)].all() and not (np.isnan(learned) & np.isfinite(acted)).any()
    except ValueError:  # as above
        same = False
    if not same:
        raise UsageError(
            "numpy_policy, which acts in the rollout, computes another policy than Agent.policy or Agent.forward, which "
            "learn: change it in the same way"
        )
    if not torch.allclose(forward_value, value, rtol=1e-3, atol=1e-4, equal_nan=True):  # value: of the end of a rollout
        raise UsageError(
            "Agent.forward and Agent.value give different values of the same observation: change them in the same way"
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
    """The update by one minibatch, as one function that torch.compile turns into one graph.

    update(theta, adam, batch, mb_inds, learning_rate, clip_coef) changes the flat parameter vector theta and the Adam
    state (first moment, second moment, step count) in place and returns what is logged, each a scalar tensor.
    theta is one vector so that norm and Adam are single operations; functional_call runs the agent with its parts.
    """
    names, shapes = zip(*((name, p.shape) for name, p in agent.named_parameters()), strict=True)

    def loss(theta: torch.Tensor, minibatch: Batch, clip_coef: torch.Tensor):
        parts = theta.split([shape.numel() for shape in shapes])
        parameters = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        new = torch.func.functional_call(agent, parameters, (minibatch.obs, minibatch.action))
        if args.norm_adv == "minibatch":  # [detail 07]
            minibatch = minibatch._replace(advantage=normalize_advantages(minibatch.advantage, minibatch.valid))
        return ppo_loss(new, minibatch, clip_coef, args.vf_coef, args.ent_coef, args.clip_policy, args.clip_vloss)

    def update(theta, adam, batch: Batch, mb_inds, learning_rate, clip_coef):
        minibatch = Batch(*(x[mb_inds] for x in batch))
        gradient, (_, info) = torch.func.grad_and_value(loss, has_aux=True)(theta, minibatch, clip_coef)
        grad_norm = torch.linalg.vector_norm(gradient)
        gradient = gradient * (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)  # [detail 11]
        # Adam (Kingma & Ba 2015, algorithm 1), written out because torch.optim.Adam would break the graph
        first_moment, second_moment, step = adam
        step.add_(1)
        first_moment.lerp_(gradient, 1 - 0.9)
        second_moment.lerp_(gradient * gradient, 1 - 0.999)
        step_size = (learning_rate / (1 - 0.9 ** step.double())).float()
        bias2 = (1 - 0.999 ** step.double()).float()  # 1 - 0.999 loses digits in float32
        theta.sub_(step_size * first_moment / ((second_moment / bias2).sqrt() + args.adam_eps))  # [detail 03]
        return {**info, "grad_norm": grad_norm}

    return update


# ----------------------------------------------------------------------------------------------------------------------
# Rollout and training


class Rollout(NamedTuple):
    """T steps of N environments. The arrays are the runner's own: the next rollout overwrites them."""

    obs: np.ndarray  # (T + 1, N, obs_dim) float32, normalized; the last one only for its value
    actions: np.ndarray  # (T, N, action_dim) float32, as sampled
    rewards: np.ndarray  # (T, N) scaled and clipped
    terminated: np.ndarray  # (T, N) bool: the episode ended in a state without a future
    truncated: np.ndarray  # (T, N) bool: the episode ended at its time limit
    valid: np.ndarray  # (T, N) bool: False at steps that only reset
    episodes: list[tuple[int, float, int]]  # ended: global step, return (raw rewards summed), length


class Runner:
    """The environments, what is known of their observations and rewards, and the episodes under way."""

    def __init__(self, args: Args):
        self.args, T, N = args, args.num_steps, args.num_envs
        check_memory(N, T)
        self.envs, *_ = make_envs(args.env, make_seeds(args.seed, 0, N), args.num_threads, render=args.capture_video)
        if args.capture_video:
            draw(self.envs)  # fails now, not after the training
        self.spaces = Spaces.of(self.envs)
        obs_dim, action_dim = self.spaces.obs_dim, self.spaces.action.low.size
        check_memory(N, T, obs_dim, action_dim)
        self.obs_rms = RunningMeanStd((obs_dim,))  # stays as it is with --norm-obs none
        self.return_rms = RunningMeanStd(())
        self.global_step, self.recent_returns = 0, deque[float](maxlen=100)
        self.raw_obs = np.zeros((T + 1, N, obs_dim))
        self.obs = np.zeros((T + 1, N, obs_dim), dtype=np.float32)
        self.actions = np.zeros((T, N, action_dim), dtype=np.float32)
        self.rewards = np.zeros((T, N))
        self.terminated, self.truncated = np.zeros((T, N), dtype=bool), np.zeros((T, N), dtype=bool)
        self.valid = np.ones((T + 1, N), dtype=bool)  # False at steps that only reset

    def state_dict(self) -> dict:
        """What survives an iteration and a restart of the environments."""
        return {
            "global_step": self.global_step,
            "obs_rms": self.obs_rms.state_dict(),
            "return_rms": self.return_rms.state_dict(),
            "recent_returns": list(self.recent_returns),
        }

    def load_state_dict(self, state: dict):
        self.global_step = state["global_step"]
        self.obs_rms.load_state_dict(state["obs_rms"])
        self.return_rms.load_state_dict(state["return_rms"])
        self.recent_returns.extend(state["recent_returns"])

    def restart(self, iteration: int):
        """New environments, seeded by (seed, iteration) alone, so that a resumed run ends with the same bits."""
        args, N = self.args, self.args.num_envs
        self.envs.close()
        self.envs, first_obs, _ = make_envs(args.env, make_seeds(args.seed, iteration, N), args.num_threads)
        self.raw_obs[-1] = flatten_obs(first_obs, self.spaces.observation)  # play begins with the last of before
        if args.norm_obs == "step":
            self.obs_rms.update(self.raw_obs[-1])
        self.obs[-1], self.valid[-1] = normalize_obs(self.raw_obs[-1], self.obs_rms, args), True
        where = f"at the start of iteration {iteration}"
        check_finite(f"{args.env} returned", where, observation=self.raw_obs[-1], normalized_observation=self.obs[-1])
        self.discounted_return, self.episode_return = np.zeros(N), np.zeros(N)
        self.episode_length = np.zeros(N, dtype=int)

    def play(self, agent: Agent, iteration: int) -> Rollout:
        """T steps of each environment with the agent's policy."""
        args, T, N = self.args, self.args.num_steps, self.args.num_envs
        raw_obs, obs, actions, rewards = self.raw_obs, self.obs, self.actions, self.rewards
        raw_obs[0], obs[0], self.valid[0] = raw_obs[T], obs[T], self.valid[T]
        step_envs, policy, space = make_step(self.envs), numpy_policy(agent), self.spaces.observation
        box, what, where = self.spaces.action, f"{args.env} returned", f"in iteration {iteration}"
        low, high, shape = box.low.flatten(), box.high.flatten(), (N, *box.shape)
        noise = torch.randn(actions.shape).numpy()
        for t in range(T):  # [detail 01]
            # only the action is needed now; log-probabilities, values and scaled rewards follow for the whole rollout
            mean, std = policy(obs[t])
            actions[t] = action = mean + std * noise[t]
            if args.clip_actions:
                action = np.minimum(np.maximum(action, low), high)  # [detail 27] half the time of np.clip; as in make_policy
            step = step_envs(action.reshape(shape).astype(box.dtype, copy=False))
            next_obs, rewards[t], self.terminated[t], self.truncated[t] = step
            raw_obs[t + 1] = flatten_obs(next_obs, space)
            if args.norm_obs == "step":
                self.obs_rms.update(raw_obs[t + 1])  # [detail 28] updated before use
            obs[t + 1] = normalize_obs(raw_obs[t + 1], self.obs_rms, args)
            if not (all_finite(obs[t + 1]) and all_finite(rewards[t : t + 1])):
                check_finite(what, f"{where}, step {t}", reward=rewards[t])
                check_finite(what, f"{where}, step {t + 1}", observation=raw_obs[t + 1], normalized_observation=obs[t + 1])
        self.valid[1:] = ~((self.terminated | self.truncated) & args.mask_resets)  # [ours: mask_resets]
        rewards[~self.valid[:T]] = 0  # what an environment returns for a reset is no reward
        # as in baselines of 2017, once per rollout: the actions came from the previous statistics, the update and its old
        # log-probabilities and values use the new ones
        if args.norm_obs == "batch":
            self.obs_rms.update(raw_obs[:T].reshape(T * N, -1))
            obs[:] = normalize_obs(raw_obs, self.obs_rms, args)
        episodes, scaled = self.end_episodes(), self.scale_rewards()
        check_finite(what, where, observation=raw_obs, normalized_observation=obs, scaled_reward=scaled)
        # 1e155 is finite, its square is not
        check_finite(what, where, variance_of_observations=self.obs_rms.var, variance_of_returns=self.return_rms.var)
        return Rollout(obs, actions, scaled, self.terminated, self.truncated, self.valid[:T], episodes)

    def scale_rewards(self) -> np.ndarray:
        """The rewards of this rollout as the learner gets them, (T, N)."""
        args, rewards = self.args, self.rewards
        if args.norm_reward:
            done = self.terminated | self.truncated
            rewards, self.discounted_return = scale_rewards(
                rewards, done, self.valid[:-1], self.discounted_return, self.return_rms, args.gamma
            )
        return rewards.clip(-args.clip_reward, args.clip_reward)  # [detail 31]

    def end_episodes(self) -> list[tuple[int, float, int]]:
        """Counts the steps of this rollout; (global step, return, length) of each episode that ended in it."""
        T, N = self.rewards.shape
        ended, first_step = [], np.zeros(N, dtype=int)
        for t, i in np.argwhere(self.terminated | self.truncated):
            self.episode_return[i] += self.rewards[first_step[i] : t + 1, i].sum()
            self.episode_length[i] += self.valid[first_step[i] : t + 1, i].sum()
            ended.append((self.global_step + int(t + 1) * N, float(self.episode_return[i]), int(self.episode_length[i])))
            self.episode_return[i], self.episode_length[i], first_step[i] = 0, 0, t + 1
        for i in range(N):  # of the episodes that go on
            self.episode_return[i] += self.rewards[first_step[i] :, i].sum()
            self.episode_length[i] += self.valid[first_step[i] : T, i].sum()
        self.global_step += T * N
        self.recent_returns.extend(r for _, r, _ in ended)
        return ended


@torch.no_grad()
def make_batch(agent: Agent, rollout: Rollout, args: Args) -> Batch:
    """What the agent thinks of the rollout before it learns from it: log-probabilities, values, advantages."""
    T, N = rollout.rewards.shape
    obs, action = (torch.as_tensor(x).flatten(0, 1).to(args.device) for x in (rollout.obs, rollout.actions))
    old = agent(obs[: T * N], action)
    values = torch.cat([old.value, agent.value(obs[T * N :])]).view(T + 1, N)
    steps = (rollout.rewards, rollout.terminated, rollout.truncated, rollout.valid)
    rewards, terminated, truncated, valid = (torch.as_tensor(x, dtype=torch.float32, device=args.device) for x in steps)
    advantages = compute_gae(rewards, values, terminated, truncated, args.gamma, args.gae_lambda, args.bootstrap_truncated)
    batch = Batch(
        obs=obs[: T * N],
        action=action,
        logprob=old.logprob,
        value=old.value,
        advantage=advantages.flatten(),
        return_=(advantages + values[:-1]).flatten(),
        valid=valid.flatten(),
    )
    if args.norm_adv == "batch":
        batch = batch._replace(advantage=normalize_advantages(batch.advantage, batch.valid))
    return batch


def explained_variance(batch: Batch) -> float:
    """Of the returns by the values of the rollout; 1 is perfect, 0 no better than a constant."""
    centered = batch.return_ - masked_mean(batch.return_, batch.valid)
    variance = masked_mean(centered**2, batch.valid)
    residual = batch.return_ - batch.value
    residual = masked_mean((residual - masked_mean(residual, batch.valid)) ** 2, batch.valid)
    return (1 - residual / variance).item() if variance > 0 else 0.0


def learn(update, theta, adam, batch: Batch, schedule: tuple[float, ...], args: Args) -> tuple[dict[str, float], int]:
    """All epochs over a batch: the means of what is logged, and how many epochs there were.

    schedule: what update takes besides, as it is in this iteration: learning rate, clip range.
    """
    # tensors, because the compiled function would bake in the first value of a Python number
    hyper = [torch.tensor(x, dtype=torch.float64, device=args.device) for x in schedule]
    infos = []
    for _ in range(args.update_epochs):
        order = torch.randperm(args.batch_size).to(args.device)  # [detail 06]
        infos += [update(theta, adam, batch, mb_inds, *hyper) for mb_inds in order.split(args.minibatch_size)]
        if args.target_kl is not None:  # [aux: target_kl] of the whole epoch, not of its last minibatch
            if torch.stack([info["approx_kl"] for info in infos[-args.num_minibatches :]]).mean() > args.target_kl:
                break
    losses = {key: torch.stack([info[key] for info in infos]).mean().item() for key in infos[0]}  # waits for the device
    return losses | {"explained_variance": explained_variance(batch)}, len(infos) // args.num_minibatches


def make_agent(args: Args, spaces: "Spaces") -> Agent:
    return Agent(spaces.obs_dim, spaces.action.low.size, args.weight_init, args.state_independent_std)


def train(args: Args) -> dict:
    """Trains as args say and returns the final figures: run_dir, global_step, episodic_return (last 100 episodes), ..."""
    run = Run(args)
    runner = Runner(args)
    agent = make_agent(args, runner.spaces)
    check_parameters(agent)
    numpy_policy(perturbed(agent))  # an edit that it does not follow stops here, before anything is written
    agent.to(args.device)
    theta = nn.utils.parameters_to_vector(agent.parameters()).detach().clone()
    nn.utils.vector_to_parameters(theta, agent.parameters())  # the parameters are now views of theta
    adam = (torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros((), device=args.device))

    def state_dict() -> dict:
        return {"theta": theta, "adam": adam, **runner.state_dict()}

    first_iteration = run.restore(state_dict(), runner.spaces) + 1
    if run.checkpoint:
        runner.load_state_dict(run.checkpoint)
    run.open(state_dict(), agent if args.compile else None)
    (update,) = compile_all([make_update(agent, args)], args)
    restart = True
    try:
        for iteration in range(first_iteration, args.num_iterations + 1):
            remaining = 1 - (iteration - 1) / args.num_iterations
            learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)  # [detail 04]
            clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)  # [aux: anneal_clip]

            if restart:  # [ours: checkpoint_every] after every checkpoint, so that a resumed run ends with the same bits
                runner.restart(iteration)
            rollout = runner.play(agent, iteration)
            batch = make_batch(agent, rollout, args)
            losses, epochs = learn(update, theta, adam, batch, (learning_rate, clip_coef), args)

            charts = {"learning_rate": learning_rate, "clip_coef": clip_coef, "epochs": epochs}
            run.log(iteration, runner, charts, losses, rollout.episodes)
            restart = run.is_checkpoint_due(iteration)
            if restart:
                run.save(iteration, state_dict())
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(*error.args, run.how_to_go_on(runner.global_step)) from None
    return run.finish(runner)


# ----------------------------------------------------------------------------------------------------------------------
# Environments: normalization of what they return, how they are made, their spaces.


@numba.njit
def all_finite(x) -> bool:
    """Whether no entry of x (n, dim) is NaN or infinite; a tenth of the time of numpy on a few numbers."""
    for i in range(len(x)):
        for j in range(x.shape[1]):
            if not np.isfinite(x[i, j]):
                return False
    return True


def check_finite(what: str, where: str, **arrays: np.ndarray):
    """NonFiniteError with the name of the first array that has a NaN or an infinity."""
    for name, x in arrays.items():
        if not np.isfinite(x).all():
            raise NonFiniteError(f"{what} a non-finite {name.replace('_', ' ')} {where}")


@numba.njit
def add_rows(x, mean, m2, count):
    """Adds the rows of x (n, dim) to mean and m2 (dim,), in place; count: with these rows (Chan et al. 1979)."""
    for j in range(len(mean)):
        total = squares = 0.0
        for i in range(len(x)):
            delta = x[i, j] - mean[j]
            total += delta
            squares += delta * delta
        shift = total / count
        mean[j] += shift
        m2[j] = m2[j] + squares - shift * shift * count


@numba.njit
def normalize(x, mean, var, limit):
    """x (n, dim) float64 -> (x - mean) / sqrt(var + 1e-8), limited to +-limit, float32."""
    normalized = np.empty(x.shape, np.float32)
    for i in range(len(x)):
        for j in range(len(mean)):
            z = (x[i, j] - mean[j]) / np.sqrt(var[j] + 1e-8)
            normalized[i, j] = limit if z > limit else -limit if z < -limit else z  # [detail 29]
    return normalized


class RunningMeanStd:
    """Mean and variance of all data seen, over the first axis, in float64."""

    def __init__(self, shape: tuple[int, ...]):
        self.mean, self.m2, self.count = np.zeros(shape), np.full(shape, 1e-4), 1e-4  # mean 0, variance 1, count 1e-4

    def update(self, x: np.ndarray):
        """x: (n, dim) float64, n may be 0."""
        self.count += len(x)
        add_rows(x, self.mean, self.m2, self.count)

    @property
    def var(self) -> np.ndarray:
        return self.m2 / self.count

    def state_dict(self) -> dict:
        return {"mean": torch.tensor(self.mean), "m2": torch.tensor(self.m2), "count": float(self.count)}

    def load_state_dict(self, state: dict):
        self.mean, self.m2, self.count = state["mean"].numpy().copy(), state["m2"].numpy().copy(), state["count"]


def normalize_obs(obs: np.ndarray, rms: RunningMeanStd, args: Args) -> np.ndarray:
    """Normalized (unless switched off) and clipped observations, of the shape of obs, in float32."""
    if args.norm_obs == "none":
        return np.minimum(np.maximum(obs, -args.clip_obs), args.clip_obs).astype(np.float32)  # [detail 29]
    rows = np.ascontiguousarray(obs, dtype=np.float64).reshape(-1, len(rms.mean))
    return normalize(rows, rms.mean, rms.var, args.clip_obs).reshape(obs.shape)


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
    # RunningMeanStd.update after every step t, for all t at once: the sums over steps 0 to t are cumulative sums
    deltas = (returns - rms.mean) * valid
    counts = rms.count + valid.sum(axis=1).cumsum()
    shifts = deltas.sum(axis=1).cumsum() / counts
    m2s = rms.m2 + (deltas * deltas).sum(axis=1).cumsum() - shifts * shifts * counts
    rms.mean, rms.m2, rms.count = rms.mean + shifts[-1], m2s[-1], counts[-1]
    return rewards / np.sqrt(m2s / counts + 1e-8)[:, None], discounted_return  # [detail 30]


def find_env(name: str) -> tuple[str, bool]:
    """Full id of an environment and whether envpool has it. A bare name means version 4, else the newest one."""
    if not name:
        raise UsageError("env is empty: give the name of an environment")
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
        own = f"; an environment of your own is my_module:{name}, with the module that registers it"
        raise UsageError(f"unknown environment {name}; nearest names: {', '.join(near) or 'none'}{own}")
    return found, found in envpool.list_all_envs()


class KeepInfo(gymnasium.Wrapper):
    """Hands on only those infos that the script reads: others may have any shape, which the vector environment refuses.

    Says in a sentence where an environment does not keep to gymnasium's API, as far as the first step shows it.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.stepped = False
        try:
            with contextlib.suppress(ValueError):  # one that is not written in Python may have no signature
                inspect.signature(env.unwrapped.reset).bind(seed=0, options=None)
        except TypeError as error:
            raise UsageError(f"reset of the environment must take seed and options: {error}") from error

    def reset(self, **options):
        result = self.env.reset(**options)
        if not (isinstance(result, tuple) and len(result) == 2):  # of the Gym before 0.26
            raise UsageError(f"reset of the environment returned {result!r:.80}: it must return (observation, info)")
        self.check_obs(result[0])
        return result[0], self.keep(result[1])

    def step(self, action):
        reward: Any
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except ValueError as error:
            if "unpack (expected 5" not in str(error):
                raise
            wanted = "observation, reward, terminated, truncated and info"
            raise UsageError(f"step of the environment must return {wanted}: {error}") from error
        if np.ndim(reward):
            raise UsageError(f"step of the environment returned the reward {reward!r:.80}: it must be a number")
        if not self.stepped:
            self.check_obs(obs)
        self.stepped = True
        return obs, reward, terminated, truncated, self.keep(info)

    def check_obs(self, obs: Any):
        """UsageError where the observation cannot be put among others of its space."""
        space, vector = self.observation_space, gymnasium.vector.utils
        together: Any = vector.create_empty_array(space, 1)
        try:
            vector.concatenate(space, [obs], together)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            seen = textwrap.shorten(repr(obs), 80)
            raise UsageError(f"the environment returned {seen}, which does not fit its space {space}: {error!r}") from error

    def keep(self, info: dict) -> dict:  # arrays in tuples: the vector environment refuses arrays of several sizes
        kept = {key: info[key] for key in INFO_KEYS if key in info}
        return {key: (x,) if isinstance(x, np.ndarray) else x for key, x in kept.items()}


def make_envs(name: str, seeds: list[int], num_threads: int, render: bool = False) -> tuple[Any, Any, dict]:
    """Vectorized environment, one per seed, freshly reset: (envs, first observations (N, ...), first info).

    envpool where it has the id, else gymnasium.make_vec. Both reset on the *next* step: the step after an episode
    end ignores its action and returns the first observation of the next episode, with reward 0.
    """
    env_id, in_envpool = find_env(name)
    options: dict[str, Any] = {"render_mode": "rgb_array"} if render else {}
    if in_envpool:
        if render and sys.platform == "linux" and not ctypes.util.find_library("EGL"):
            raise UsageError("capture_video needs OpenGL: install libEGL (on Debian: apt-get install libegl1)")
        options |= {"render_width": 320, "render_height": 240} if render else {}
        options |= {"num_envs": len(seeds), "seed": seeds, "num_threads": min(num_threads, len(seeds))}
        try:
            envs: Any = envpool.make(env_id, env_type="gymnasium", **options)
        except (ImportError, RuntimeError, OSError) as error:
            raise UsageError(f"cannot make environment {name}: {error}") from error
    else:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # my_module:MyEnv-v0 may lie in the current directory
        try:
            envs = gymnasium.make_vec(env_id, len(seeds), vectorization_mode="sync", wrappers=(KeepInfo,), **options)
        except (ImportError, AssertionError, gymnasium.error.Error) as error:  # it asserts what a space may be
            newer = re.sub(r"-v[23]$", "-v4", env_id)
            hint = f"; envpool has {newer}" if newer in envpool.list_all_envs() else ""
            raise UsageError(f"cannot make environment {name}: {str(error) or repr(error)}{hint}") from error
        except (AttributeError, TypeError) as error:
            if re.search(r"gymnasium\.Env class|must specify an", str(error)):  # of its checks
                raise UsageError(f"cannot make environment {name}: {error}") from error
            if not render or isinstance(error, AttributeError):
                raise
            raise UsageError(f"capture_video needs an environment that draws itself: {error}") from error
    obs, info = envs.reset(**({} if in_envpool else {"seed": seeds}))
    if in_envpool and len(info["players"]["env_id"]) != len(seeds):
        raise UsageError(f"{env_id} is a game of several players; this script trains a single one")
    return envs, obs, info


def make_step(envs):
    """envs.step without its info: action (N, ...) -> obs (N, ...), reward, terminated, truncated (N,).

    For envpool it calls the C++ layer (private; tested against envs.step): with one environment the Python layers
    above it take a third of the time of a step.
    """
    if not hasattr(envs, "_send") or "obs" not in envs._state_keys:
        return lambda action: envs.step(action)[:4]
    ids = envs.all_env_ids
    dtype = envs.spec.action_array_spec["action"].dtype
    places = [envs._state_keys.index(key) for key in ("obs", "reward", "done", "trunc")]

    def step(action):
        envs._send([ids, ids, action.astype(dtype)])  # in the order of _action_keys: env_id, players.env_id, action
        state = envs._recv()
        obs, reward, done, truncated = [state[i] for i in places]
        return obs, reward, done & ~truncated, truncated  # envpool is done at a time limit, too

    return step


def make_seeds(seed: int, iteration: int, count: int) -> list[int]:
    """Independent seeds for `count` environments that start at this iteration, after seeding python, numpy and torch."""
    sequence = np.random.SeedSequence([seed, iteration]).generate_state(count + 1) >> 1  # 31 bits
    random.seed(int(sequence[0]))
    np.random.seed(int(sequence[0]))
    torch.manual_seed(int(sequence[0]))
    return [int(s) for s in sequence[1:]]


def flatten_obs(obs: Any, space: gymnasium.Space) -> np.ndarray:
    """Observations of N environments as vectors (N, obs_dim), in the order of gymnasium.spaces.flatten_space."""
    spaces = gymnasium.spaces
    if isinstance(space, spaces.Box):  # first and plain, because it is called at every step
        return obs.reshape(len(obs), -1)
    if isinstance(space, spaces.MultiBinary):
        return np.reshape(obs, (len(obs), -1))
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):  # one-hot; sizes (C,), values (N, C)
        sizes = np.ravel(space.n if isinstance(space, spaces.Discrete) else space.nvec)
        values = np.reshape(obs, (len(obs), -1)) - np.ravel(space.start)
        if not ((values >= 0) & (values < sizes)).all():
            raise UsageError(f"the environment returned {obs.tolist()}, which is not in its observation space {space}")
        vectors = np.zeros((len(obs), sizes.sum()), dtype=np.float32)
        vectors[np.arange(len(obs))[:, None], values + sizes.cumsum() - sizes] = 1
        return vectors
    both: Any = space  # a Dict or a Tuple
    parts = both.items() if isinstance(space, spaces.Dict) else enumerate(both)
    return np.concatenate([flatten_obs(obs[key], part) for key, part in parts], axis=1)


def count_entries(space: gymnasium.Space) -> int:
    """Size of a flattened observation; UsageError where it has none."""
    spaces = gymnasium.spaces
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return math.prod(space.shape)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return int(space.n if isinstance(space, spaces.Discrete) else space.nvec.sum())
    if isinstance(space, spaces.Dict | spaces.Tuple) and len(space):
        return sum(map(count_entries, space.values() if isinstance(space, spaces.Dict) else space))
    raise UsageError(f"observations of {space} have no fixed size: make them a Box with gymnasium.ObservationWrapper")


class Spaces(NamedTuple):
    """What the script reads of an environment's spaces."""

    observation: gymnasium.Space
    action: gymnasium.spaces.Box
    obs_dim: int  # of the flattened observation

    @classmethod
    def of(cls, envs: Any) -> "Spaces":
        observation, action, spaces = envs.single_observation_space, envs.single_action_space, gymnasium.spaces
        if not isinstance(action, spaces.Box) or not np.issubdtype(action.dtype, np.floating):
            discrete = isinstance(action, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary)
            wrap = "make it a Box or MultiDiscrete with gymnasium.ActionWrapper, which no script here does by itself"
            remedy = "use ppo_shared_params.py" if discrete else wrap
            raise UsageError(f"the action space is {action}; this script needs a Box of floats: {remedy}")
        obs_dim = count_entries(observation)
        if not (obs_dim and math.prod(action.shape or ())):
            raise UsageError(f"the spaces are {observation} and {action}: neither may be empty")
        return cls(observation, action, obs_dim)

    def describe(self) -> dict[str, str]:
        return {"observation": str(self.observation), "action": str(self.action)}


# ----------------------------------------------------------------------------------------------------------------------
# Surroundings. Nothing below is about PPO, and nearly all of it is the same text in every script.


def say(text: str):
    """A line on the terminal, above the progress bar."""
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
    """A trained policy: raw observations of N environments -> actions (N, ...), the likeliest or sampled by rng."""
    agent = make_agent(args, spaces)
    obs_rms = RunningMeanStd((spaces.obs_dim,))
    theta = nn.utils.parameters_to_vector(agent.parameters()).detach()
    check_checkpoint(checkpoint, {"theta": theta, "obs_rms": obs_rms.state_dict()}, spaces)
    nn.utils.vector_to_parameters(checkpoint["theta"], agent.parameters())
    obs_rms.load_state_dict(checkpoint["obs_rms"])  # frozen from here on
    distribution, box = numpy_policy(agent), spaces.action

    def policy(raw_obs: Any) -> np.ndarray:
        action, std = distribution(normalize_obs(flatten_obs(raw_obs, spaces.observation), obs_rms, args))
        if rng is not None:
            action = action + std * rng.standard_normal(action.shape, dtype=np.float32)
        action = action.reshape(-1, *box.shape).astype(box.dtype, copy=False)
        return action.clip(box.low, box.high) if args.clip_actions else action

    return policy


def load_policy(path: str | Path, rng: np.random.Generator | None = None, env: str | None = None):
    """The policy of a run directory or checkpoint: raw observations of N environments -> actions (N, ...).

    The likeliest actions, or sampled ones where rng is given. Makes an environment of the run to learn its spaces; one
    of a module has to be named as env, because it runs that module's code.
    """
    checkpoint, file = load_checkpoint(path)
    args = load_args(checkpoint, file, device="cpu")
    check_trust(args.env, env)
    envs, *_ = make_envs(args.env, [0], 1)
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
    """Plays one episode from each seed, side by side; yields (return, length, cut off) of each as it ends.

    frames takes pictures of the first, at most 2000. Where it cannot be drawn any longer, the episodes go on.
    """
    N = len(seeds)
    envs, raw_obs, _ = make_envs(args.env, seeds, args.num_threads, render=frames is not None)
    policy = make_policy(args, checkpoint, Spaces.of(envs), None if args.eval_deterministic else rng)
    returns, lengths, running = np.zeros(N), np.zeros(N, dtype=int), np.ones(N, dtype=bool)
    for step in range(args.eval_steps):
        if frames is not None and running[0] and step % 2 == 0 and len(frames) < 2000:  # every other step, 40 ms each
            try:
                frames.append(draw(envs))
            except UsageError as error:
                if not frames:
                    raise
                problems.append(f"the video ends early: {error}")
                frames = None
        action = policy(raw_obs)
        check_finite(f"{args.env} leads to", f"in step {step} of the evaluation", action=action)
        raw_obs, reward, terminated, truncated, _ = envs.step(action)
        check_finite(f"{args.env} returned", f"in step {step} of the evaluation", reward=reward[running])
        returns, lengths = returns + np.where(running, reward, 0), lengths + running
        cut_off = step + 1 == args.eval_steps
        for i in np.flatnonzero(running & (terminated | truncated | cut_off)):
            yield float(returns[i]), int(lengths[i]), not (terminated[i] | truncated[i])
        running &= ~(terminated | truncated)
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
    "--cuda": ["--device", "cuda" if torch.cuda.is_available() else "cpu"],
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
    main()
