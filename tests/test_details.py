"""One behavioural test per detail, named after its number in DETAILS.md: what the learner and the environments really get.

`traces(script, **flags)` runs a script for three tiny iterations and keeps all that passed between its parts; most tests
compare that with the definition, computed from what the environments say they returned.
"""

import copy
import importlib
import inspect
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

from helpers import loss_inputs, read_checkpoint, read_jsonl

ROOT = Path(__file__).parents[1]
PATHS = sorted(set(ROOT.glob("ppo_*.py")) - {ROOT / "ppo_rlhf.py"})  # test_rlhf.py has the details of that one
SCRIPTS = [importlib.import_module(path.stem) for path in PATHS]
CONTINUOUS = [script for script in SCRIPTS if script.__name__ in ("ppo_continuous", "ppo_kl_penalty")]
TRACE: dict[str, Any] = {
    "env": "Recorder-v0",
    "num_envs": 2,
    "num_steps": 32,
    "num_minibatches": 2,
    "update_epochs": 3,
    "total_timesteps": 3 * 64,
    "learning_rate": 3e-3,
    "eval_episodes": 0,
    "compile": False,
}
TRACE_OF_SCRIPT: dict[str, dict[str, Any]] = {
    # its defaults are those of discrete control; here the flags of the base
    "ppo_shared_params": {"env": "RecorderDiscrete-v0", "norm_obs": "step", "clip_obs": 10.0}
    | {"norm_reward": True, "clip_reward": 10.0, "ent_coef": 0.0}
}
T, N, UPDATES = 32, 2, 6  # updates of an iteration
PLAIN: dict[str, Any] = {"norm_obs": "none", "clip_obs": math.inf, "norm_reward": False, "clip_reward": math.inf}

RECORDED = [script for script in SCRIPTS if script in CONTINUOUS or script.__name__ in TRACE_OF_SCRIPT]
each_recorded = pytest.mark.parametrize("script", RECORDED, ids=lambda script: script.__name__)
each_continuous = pytest.mark.parametrize("script", CONTINUOUS, ids=lambda script: script.__name__)


class Recorder(gymnasium.Env):
    """Random observations far from 0, large rewards, narrow action bounds, ends at random; keeps what passed through it."""

    instances: ClassVar[list["Recorder"]] = []

    def __init__(self, render_mode: str | None = None):
        self.observation_space = Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = Box(np.array([-0.3, -1], np.float32), np.array([0.1, 2], np.float32))
        self.events: list[SimpleNamespace] = []
        self.instances.append(self)

    def draw(self):
        return np.array([1000.0, -2.0, 0.0]) + np.array([30.0, 0.01, 1.0]) * self.np_random.standard_normal(3)

    def keep(self, obs, reward, terminated, truncated, action, seed):
        is_reset = action is None
        self.events.append(
            SimpleNamespace(
                obs=obs, reward=reward, terminated=terminated, truncated=truncated, action=action, seed=seed, is_reset=is_reset
            )
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        obs = self.draw()
        self.keep(obs, 0.0, False, False, None, seed)
        return obs, {}

    def step(self, action):
        obs, reward = self.draw(), float(self.np_random.normal(3.0, 20.0))
        terminated, truncated = (self.np_random.random(2) < 0.08) & (len(self.events) != T - 1)
        truncated |= len(self.events) == T  # the first rollout ends with an episode, so the second begins with a reset
        self.keep(obs, reward, bool(terminated), bool(truncated), np.array(action), None)
        return obs, reward, bool(terminated), bool(truncated), {}


class RecorderDiscrete(Recorder):
    """The same with three choices."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode)
        self.action_space: Any = Discrete(3)


gymnasium.register("Recorder-v0", "test_details:Recorder")
gymnasium.register("RecorderDiscrete-v0", "test_details:RecorderDiscrete")


@dataclass
class Trace:
    """A run: one entry of rollouts per iteration, one of updates per minibatch, one of groups per start of environments."""

    args: Any
    script: Any
    agent: Any = None  # the network, for agent_at
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    rollouts: list[SimpleNamespace] = field(default_factory=list)
    updates: list[SimpleNamespace] = field(default_factory=list)
    acted: list[SimpleNamespace] = field(default_factory=list)
    groups: list[list[Recorder]] = field(default_factory=list)

    def agent_at(self, theta: torch.Tensor):
        agent = copy.deepcopy(self.agent)
        nn.utils.vector_to_parameters(theta, agent.parameters())
        return agent

    def updates_of(self, iteration: int) -> list[SimpleNamespace]:
        return [update for update in self.updates if update.iteration == iteration]

    def batch(self, iteration: int) -> SimpleNamespace:
        """What the updates of an iteration learn from, each (T, N, ...)."""
        tensors = dict(vars(self.updates_of(iteration)[0].batch))
        shape = (self.args.num_steps, self.args.num_envs)
        tensors.pop("state", None)  # of an LSTM: not one of each step
        return SimpleNamespace(**{name: x.view(*shape, *x.shape[1:]) for name, x in tensors.items()})

    def recorded(self, name: str) -> np.ndarray:
        """What the environments kept, (1 + iterations * T, N, ...), the first observation first; one group only."""
        assert len(self.groups) == 1
        return np.stack([[getattr(event, name) for event in env.events] for env in self.groups[0]], axis=1)

    @property
    def metrics(self) -> list[dict]:
        return read_jsonl(Path(self.args.run_dir) / "metrics.jsonl")[1:]

    @property
    def epochs(self) -> list[list[SimpleNamespace]]:
        """The updates of each epoch."""
        size = self.args.num_minibatches
        return [self.updates[i : i + size] for i in range(0, len(self.updates), size)]


def value_of(agent, obs: torch.Tensor) -> torch.Tensor:
    """Values (B,) of observations (B, obs_dim)."""
    if hasattr(agent, "features"):
        return agent.value(agent.features(obs, torch.zeros(len(obs)), agent.initial_state(len(obs))))
    return agent.value(obs)


def clones(*tensors):
    return [x.clone() for x in tensors]


def run_trace(script, run_dir: Path, **changes) -> Trace:
    flags = TRACE | TRACE_OF_SCRIPT.get(script.__name__, {}) | {"run_dir": str(run_dir)} | changes
    trace = Trace(script.Args(**flags), script)
    originals = SimpleNamespace(**{name: getattr(script, name) for name in ("compute_gae", "make_update", "ppo_loss")})
    make_policy = script.numpy_policy

    def compute_gae(*args, **kwargs):
        bound = inspect.signature(originals.compute_gae).bind(*args, **kwargs).arguments
        advantages = originals.compute_gae(*args, **kwargs)
        kept = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in bound.items()}
        trace.rollouts.append(SimpleNamespace(**kept, advantages=advantages.clone()))
        return advantages

    def ppo_loss(*args, **kwargs):
        loss, info = originals.ppo_loss(*args, **kwargs)
        bound = dict(inspect.signature(originals.ppo_loss).bind(*args, **kwargs).arguments)
        new, old = bound.pop("new")._asdict(), bound.pop("old")._asdict()
        bound |= new | {f"old_{name}" if name in new else name: x for name, x in old.items()} | {"loss": loss}
        # out of the gradient transformation only by the dictionary; update() below takes them out of it
        return loss, info | {f"spy_{name}": torch.as_tensor(x) for name, x in bound.items()}

    def make_update(agent, args):
        inner = originals.make_update(agent, args)
        trace.agent = copy.deepcopy(agent)
        trace.initial = {name: p.detach().clone() for name, p in agent.named_parameters()}

        def update(*args):
            given = inspect.signature(inner).bind(*args).arguments
            theta, adam = given["theta"], given["adam"]
            before, adam_before = theta.clone(), clones(*adam)
            info = inner(*args)
            loss_arguments = SimpleNamespace(**{name[4:]: info.pop(name) for name in list(info) if name.startswith("spy_")})
            trace.updates.append(
                SimpleNamespace(
                    iteration=len(trace.rollouts) - 1,
                    batch=SimpleNamespace(**{name: x.clone() for name, x in given["batch"]._asdict().items()}),
                    mb_inds=given["mb_inds"].clone(),
                    learning_rate=given["learning_rate"].item(),
                    theta=(before, theta.clone()),
                    adam=(adam_before, clones(*adam)),
                    info=clone_info(info),
                    loss=loss_arguments,
                )
            )
            return info

        return update

    def numpy_policy(agent):
        inner = make_policy(agent)

        def policy(obs, *memory):
            said = inner(obs, *memory)
            mean, std = said if script in CONTINUOUS else (None, None)
            trace.acted.append(SimpleNamespace(obs=obs.copy(), mean=copy.copy(mean), std=copy.copy(std)))
            return said

        return policy

    with pytest.MonkeyPatch.context() as patch:
        for spy in (compute_gae, ppo_loss, make_update, numpy_policy):
            patch.setattr(script, spy.__name__, spy)
        Recorder.instances.clear()
        script.train(trace.args)
    used = [env for env in Recorder.instances if len(env.events) > 1]
    trace.groups = [used[i : i + trace.args.num_envs] for i in range(0, len(used), trace.args.num_envs)]
    return trace


def clone_info(info):
    return {name: x.clone() for name, x in info.items()}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """traces(script, **flags): the trace of a run with these flags, made once."""
    cache: dict[tuple, Trace] = {}

    def get(script, **changes) -> Trace:
        key = (script.__name__, *sorted(changes.items()))
        if key not in cache:
            cache[key] = run_trace(script, tmp_path_factory.mktemp("trace") / "run", **changes)
        return cache[key]

    return get


def direct_statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the rows of x together with 1e-4 samples of mean 0 and variance 1, in two passes."""
    count = 1e-4 + len(x)
    mean = x.sum(axis=0) / count
    return mean, (1e-4 * (1 + mean**2) + ((x - mean) ** 2).sum(axis=0)) / count


def direct_normalized(raw: np.ndarray) -> np.ndarray:
    """Each observation (S, N, dim) with the statistics of all up to and with its own step."""
    normalized = np.empty_like(raw)
    for s in range(len(raw)):
        mean, var = direct_statistics(raw[: s + 1].reshape(-1, raw.shape[-1]))
        normalized[s] = (raw[s] - mean) / np.sqrt(var + 1e-8)
    return normalized


def direct_scaled(rewards, ends, resets, gamma) -> np.ndarray:
    """Rewards (S, N) over the deviation of all discounted returns up to and with their own step; 0 at resets."""
    scaled, running, seen = np.zeros_like(rewards), np.zeros(rewards.shape[1]), []
    for s in range(len(rewards)):
        running = running * gamma + rewards[s]
        seen += [running[i] for i in range(len(running)) if not resets[s, i]]
        scaled[s] = rewards[s] / np.sqrt(direct_statistics(np.array(seen))[1] + 1e-8)
        running[ends[s]] = 0  # after use
    return scaled


def direct_gae(rollout, gamma, gae_lambda, bootstrap_truncated=True) -> np.ndarray:
    """The recursion in float64, from the rewards, values and ends that compute_gae was called with."""
    names = ("rewards", "values", "terminated", "truncated")
    rewards, values, terminated, truncated = (getattr(rollout, name).double().numpy() for name in names)
    ends = np.maximum(terminated, truncated)
    no_future = terminated if bootstrap_truncated else ends
    advantages, following = np.zeros_like(rewards), np.zeros(rewards.shape[1])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * (1 - no_future[t]) * values[t + 1] - values[t]
        advantages[t] = following = delta + gamma * gae_lambda * (1 - ends[t]) * following
    return advantages


def loss_of(script, **changes):
    """ppo_loss of samples with everything neutral but `changes`: its parameters, or columns as in loss_inputs."""
    parameters = inspect.signature(script.ppo_loss).parameters
    settings = {name: torch.tensor(x) for name, x in (("clip_coef", 0.2), ("kl_coef", 0.0)) if name in parameters}
    settings |= {name: x for name, x in changes.items() if name in parameters}
    columns = {name: np.atleast_1d(x) for name, x in changes.items() if name not in parameters}
    tensors = {name: torch.tensor(x, dtype=torch.float64) for name, x in columns.items()}
    return script.ppo_loss(*loss_inputs(script, **tensors), **settings)


def valid_mean(x: torch.Tensor, valid: torch.Tensor) -> float:
    return x[valid > 0].double().mean().item()


@each_recorded
def test_detail_01_rollouts_of_n_environments_and_t_steps(script, traces):
    trace = traces(script, **PLAIN)
    obs, reward = trace.recorded("obs"), trace.recorded("reward")
    assert len(trace.rollouts) == 3
    assert obs.shape == (1 + 3 * T, N, 3), "every environment is stepped T times an iteration and started once"
    assert not np.array_equal(obs[:, 0], obs[:, 1])
    for iteration, rollout in enumerate(trace.rollouts):
        steps = slice(iteration * T, (iteration + 1) * T)
        after = slice(steps.start + 1, steps.stop + 1)
        batch = trace.batch(iteration)
        np.testing.assert_array_equal(batch.obs, obs[steps].astype(np.float32))  # goes on where the last rollout stopped
        np.testing.assert_array_equal(rollout.rewards, reward[after].astype(np.float32))
        np.testing.assert_array_equal(rollout.terminated, trace.recorded("terminated")[after])
        np.testing.assert_array_equal(rollout.truncated, trace.recorded("truncated")[after])


@each_continuous
def test_detail_02_orthogonal_weights_and_zero_biases(script, traces):
    gains = {"0": math.sqrt(2), "2": math.sqrt(2)}
    for state_independent_std in (True, False):
        initial = traces(script, state_independent_std=state_independent_std).initial
        layers = 0
        for name, weight in initial.items():
            if name.endswith("weight"):
                network, layer, _ = name.split(".")
                gain = gains.get(layer, 0.01 if network == "actor" else 1.0)
                small = weight if weight.shape[0] <= weight.shape[1] else weight.T
                torch.testing.assert_close(small @ small.T, gain**2 * torch.eye(len(small)), rtol=0, atol=1e-5 * gain**2)
                layers += 1
            elif name.endswith("bias"):
                assert not weight.any(), name
        assert layers == 6


@each_continuous
def test_detail_02_other_initializations(script, traces):
    for name, weight in traces(script, weight_init="normc").initial.items():
        if name.endswith("weight"):
            gain = 0.01 if name == "actor.4.weight" else 1.0
            torch.testing.assert_close(weight.norm(dim=1), torch.full((len(weight),), gain))
        elif name.endswith("bias"):
            assert not weight.any(), name
    initial = traces(script, weight_init="torch").initial
    for name, weight in initial.items():
        if name.endswith("weight"):  # uniform within 1 / sqrt(inputs)
            bound = 1 / math.sqrt(weight.shape[1])
            assert 0.8 * bound < weight.abs().max() <= bound
            assert initial[name.replace("weight", "bias")].any()


def adam_of_torch(trace: Trace, eps: float) -> list[torch.Tensor]:
    """Parameter changes by torch.optim.Adam from the gradients that the first moments tell, in float64."""
    parameter = nn.Parameter(trace.updates[0].theta[0].double())
    optimizer = torch.optim.Adam([parameter], betas=(0.9, 0.999), eps=eps)
    changes = []
    for update in trace.updates:
        (old_moment, *_), (moment, *_) = update.adam
        parameter.grad = (moment.double() - 0.9 * old_moment.double()) / 0.1
        optimizer.param_groups[0]["lr"] = update.learning_rate
        before = parameter.detach().clone()
        optimizer.step()
        changes.append(parameter.detach() - before)
    return changes


@each_recorded
@pytest.mark.parametrize("eps", [1e-5, 1e-8, 1e-3])
def test_detail_03_epsilon_of_adam(script, traces, eps):
    assert script.Args().adam_eps == 1e-5
    trace = traces(script, adam_eps=eps)
    real = [(update.theta[1].double() - update.theta[0].double()) for update in trace.updates]
    errors = {}
    for candidate in (1e-5, 1e-8, 1e-3):
        pairs = zip(real, adam_of_torch(trace, candidate), strict=True)
        errors[candidate] = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    assert errors.pop(eps) < 2e-4
    assert min(errors.values()) > 1e-3


@each_recorded
def test_detail_04_learning_rate_annealing(script, traces):
    trace, n = traces(script), 3
    assert script.Args().anneal_lr
    expected = [3e-3 * (1 - i / n) for i in range(n)]  # the first update full, the last one lr / n
    assert [record["charts/learning_rate"] for record in trace.metrics] == pytest.approx(expected)
    assert [update.learning_rate for update in trace.updates] == pytest.approx(np.repeat(expected, UPDATES).tolist())
    trace = traces(script, anneal_lr=False)
    assert [record["charts/learning_rate"] for record in trace.metrics] == [3e-3] * n
    assert {update.learning_rate for update in trace.updates} == {3e-3}


@each_continuous
@pytest.mark.parametrize("flags", [{}, {"gamma": 0.9, "gae_lambda": 0.5}, {"gae_lambda": 0.0}, {"gae_lambda": 1.0}])
def test_detail_05_generalized_advantage_estimation(script, traces, flags):
    assert (script.Args().gamma, script.Args().gae_lambda) == (0.99, 0.95)
    trace = traces(script, norm_adv="none", **flags)
    for iteration, rollout in enumerate(trace.rollouts):
        batch, update = trace.batch(iteration), trace.updates_of(iteration)[0]
        with torch.no_grad():
            values = trace.agent_at(update.theta[0]).critic(batch.obs).squeeze(-1)
        torch.testing.assert_close(batch.value, values)
        torch.testing.assert_close(rollout.values[:-1], values)
        expected = torch.as_tensor(direct_gae(rollout, trace.args.gamma, trace.args.gae_lambda), dtype=torch.float32)
        torch.testing.assert_close(batch.advantage, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batch.return_, batch.advantage + values)
        if iteration + 1 < len(trace.rollouts):  # the value after the last step is that of the next rollout's first obs
            with torch.no_grad():
                last = trace.agent_at(update.theta[0]).critic(trace.batch(iteration + 1).obs[0]).squeeze(-1)
            torch.testing.assert_close(rollout.values[-1], last)


@each_recorded
def test_detail_06_every_transition_once_per_epoch_in_new_order(script, traces):
    trace = traces(script)
    assert len(trace.updates) == 3 * UPDATES
    orders = []
    for epoch in trace.epochs:
        assert {len(update.mb_inds) for update in epoch} == {T * N // 2}
        order = torch.cat([update.mb_inds for update in epoch]).tolist()
        assert sorted(order) == list(range(T * N))
        orders.append(tuple(order))
        valid = trace.batch(epoch[0].iteration).valid
        assert sum(update.loss.valid.sum() for update in epoch) == valid.sum() < T * N
        for update in epoch:  # what the loss gets is what the indices name
            torch.testing.assert_close(update.loss.old_logprob, update.batch.logprob[update.mb_inds])
            torch.testing.assert_close(update.loss.return_, update.batch.return_[update.mb_inds])
    assert len(set(orders)) == len(orders), "two epochs have the same order"
    assert tuple(range(T * N)) not in orders
    whole = traces(script, num_minibatches=1)
    assert [len(update.mb_inds) for update in whole.updates] == [T * N] * 9


def direct_normalized_advantages(advantage: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    chosen = advantage[valid > 0].double()
    return ((advantage.double() - chosen.mean()) / (chosen.std(correction=0) + 1e-8)).float()


@each_recorded
@pytest.mark.parametrize("norm_adv", ["minibatch", "batch", "none"])
def test_detail_07_advantage_normalization(script, traces, norm_adv):
    assert script.Args().norm_adv == "minibatch"
    trace = traces(script, norm_adv=norm_adv)
    for update in trace.updates:
        raw, valid, inds = trace.rollouts[update.iteration].advantages.flatten(), update.batch.valid, update.mb_inds
        expected = {
            "minibatch": direct_normalized_advantages(raw[inds], valid[inds]),
            "batch": direct_normalized_advantages(raw, valid)[inds],
            "none": raw[inds],
        }[norm_adv]
        used = valid[inds] > 0
        torch.testing.assert_close(update.loss.advantage[used], expected[used], rtol=1e-4, atol=1e-4)
    assert sum((update.loss.valid == 0).sum() for update in trace.updates) > 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_detail_07_epsilon_and_population_deviation(script):
    two = script.normalize_advantages(torch.tensor([1e-8, -1e-8], dtype=torch.float64), torch.ones(2))
    assert two.tolist() == pytest.approx([0.5, -0.5])  # 1e-8 / (1e-8 + 1e-8)
    one_two_three = script.normalize_advantages(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.ones(3))
    assert one_two_three.tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped", "unclipped"),
    [
        (1.1, 2.0, 2.2, 2.2),
        (1.2, 2.0, 2.4, 2.4),
        (1.3, 2.0, 2.4, 2.6),
        (0.5, 2.0, 1.0, 1.0),
        (0.9, -2.0, -1.8, -1.8),
        (0.8, -2.0, -1.6, -1.6),
        (0.7, -2.0, -1.6, -1.4),
        (1.5, -2.0, -3.0, -3.0),
    ],
)
def test_detail_08_clipped_surrogate_objective(script, ratio, advantage, clipped, unclipped):
    sample = {"logprob": math.log(ratio) - 0.7, "old_logprob": -0.7, "advantage": advantage}
    assert loss_of(script, **sample, clip_policy=True)[0].item() == pytest.approx(-clipped)
    assert loss_of(script, **sample, clip_policy=False)[0].item() == pytest.approx(-unclipped)


@each_recorded
def test_detail_08_flag_and_range_reach_the_loss(script, traces):
    for clip_policy, clip_coef in ((True, 0.2), (False, 0.05)):
        trace = traces(script, clip_policy=clip_policy, clip_coef=clip_coef)
        assert {bool(update.loss.clip_policy) for update in trace.updates} == {clip_policy}
        assert [update.loss.clip_coef.item() for update in trace.updates] == pytest.approx([clip_coef] * 3 * UPDATES)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    ("value", "old_value", "return_", "clipped", "unclipped"),
    [
        (1.1, 1.0, 2.0, 0.9**2, 0.9**2),  # within the range
        (1.2, 1.0, 2.0, 0.8**2, 0.8**2),  # at its end
        (1.7, 1.0, 2.0, 0.8**2, 0.3**2),  # beyond it, towards the return
        (0.3, 1.0, -2.0, 2.8**2, 2.3**2),
        (0.3, 1.0, 2.0, 1.7**2, 1.7**2),  # beyond it, away from the return
    ],
)
def test_detail_09_value_clipping(script, value, old_value, return_, clipped, unclipped):
    sample = {"value": value, "old_value": old_value, "return_": return_}
    for clip_vloss, square in ((True, clipped), (False, unclipped)):
        loss, info = loss_of(script, **sample, clip_vloss=clip_vloss, vf_coef=1.0)
        assert loss.item() == pytest.approx(0.5 * square)
        assert info["value_loss"].item() == pytest.approx(0.5 * square)


@each_recorded
def test_detail_09_flag_reaches_the_loss(script, traces):
    for clip_vloss in (True, False):
        trace = traces(script, clip_vloss=clip_vloss)
        assert {bool(update.loss.clip_vloss) for update in trace.updates} == {clip_vloss}
        for update in trace.updates:  # around the value at the time of the rollout
            torch.testing.assert_close(update.loss.old_value, update.batch.value[update.mb_inds])


@each_recorded
@pytest.mark.parametrize("flags", [{}, {"vf_coef": 0.7, "ent_coef": 0.3}])
def test_detail_10_overall_loss_and_entropy_bonus(script, traces, flags):
    assert (script.Args().vf_coef, script.Args().ent_coef) == (0.5, 0.0 if script in CONTINUOUS else 0.01)
    trace = traces(script, **flags)
    for update in trace.updates:
        info = update.info
        expected = info["policy_loss"] + trace.args.vf_coef * info["value_loss"] - trace.args.ent_coef * info["entropy"]
        torch.testing.assert_close(update.loss.loss, expected)
    before, after = (trace.agent_at(theta) for theta in (trace.updates[0].theta[0], trace.updates[-1].theta[1]))
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new), f"the one optimizer leaves out {name}"


def gradient_of(trace: Trace, update) -> torch.Tensor:
    """Gradient before any clipping, by torch's autograd through the network and the loss, flat, in float64."""
    agent = trace.agent_at(update.theta[0]).double()
    old = trace.script.Batch(**{name: x[update.mb_inds].double() for name, x in vars(update.batch).items()})
    old = old._replace(advantage=update.loss.advantage.double())
    settings = {name: x for name, x in vars(update.loss).items() if name in inspect.signature(trace.script.ppo_loss).parameters}
    loss, _ = trace.script.ppo_loss(agent(old.obs, old.action), old, **settings)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))])


@each_continuous
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6, math.inf])
def test_detail_11_global_gradient_clipping(script, traces, max_grad_norm):
    assert script.Args().max_grad_norm == 0.5
    trace = traces(script, max_grad_norm=max_grad_norm)
    for update in trace.updates[:UPDATES]:
        (old_moment, *_), (moment, *_) = update.adam
        clipped = (moment.double() - 0.9 * old_moment.double()) / 0.1
        gradient = gradient_of(trace, update)
        norm = gradient.norm().item()
        assert update.info["grad_norm"].item() == pytest.approx(norm, rel=1e-3)
        expected = gradient * min(1.0, max_grad_norm / (norm + 1e-6))
        assert (clipped - expected).norm() < 2e-3 * expected.norm()
    largest = max(update.info["grad_norm"].item() for update in trace.updates[:UPDATES])
    assert largest > 0.5, "the limit was never reached"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_detail_12_debug_variables_of_the_loss(script):
    logratio, old = np.array([0.0, 0.5, -0.1, -0.4]), np.array([-1.0, -2.0, 0.5, -3.0])
    _, info = loss_of(
        script,
        logprob=(old + logratio).tolist(),
        old_logprob=old.tolist(),
        entropy=[1.0, 2.0, 3.0, 4.0],
        value=[1.0, 1.0, 1.0, 1.0],
        old_value=[1.0, 1.0, 1.0, 1.0],
        return_=[1.0, 3.0, 1.0, 2.0],
        advantage=[1.0, 1.0, 1.0, 1.0],
        valid=[1.0, 1.0, 1.0, 0.0],
        clip_policy=True,
    )
    ratio = np.exp(logratio[:3])
    expected = {
        "policy_loss": -np.minimum(ratio, 1.2).mean(),
        "value_loss": 0.5 * 4 / 3,
        "entropy": 2.0,
        "old_approx_kl": -logratio[:3].mean(),
        "approx_kl": (ratio - 1 - logratio[:3]).mean(),
        "clipfrac": 1 / 3,
    }
    assert {name: info[name].item() for name in expected} == pytest.approx(expected)


@each_recorded
def test_detail_12_debug_variables_in_the_log(script, traces):
    trace = traces(script)
    for iteration, record in enumerate(trace.metrics):
        batch, updates = trace.batch(iteration), trace.updates_of(iteration)
        for name in ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "grad_norm"):
            mean = np.mean([update.info[name].item() for update in updates])
            assert record[f"losses/{name}"] == pytest.approx(mean, rel=1e-4, abs=1e-6)
        returns, residual = (x[batch.valid > 0].double() for x in (batch.return_, batch.return_ - batch.value))
        explained = 1 - (residual.var() / returns.var()).item()
        assert record["losses/explained_variance"] == pytest.approx(explained, abs=1e-4)
        # the old log-probabilities are those of the acting policy: the ratio is 1 in the first minibatch
        assert updates[0].info["approx_kl"].abs() < 1e-6
        assert updates[0].info["clipfrac"] == 0
        assert updates[-1].info["approx_kl"] > 1e-5


@each_continuous
def test_detail_13_two_hidden_layers_of_64_tanh_units(script):
    agent = script.Agent(5, 3)
    for network, outputs in ((agent.actor, 3), (agent.critic, 1)):
        shapes = [tuple(module.weight.shape) for module in network if isinstance(module, nn.Linear)]
        assert shapes == [(64, 5), (64, 64), (outputs, 64)]
        layers = [module for module in network if isinstance(module, nn.Linear)]
        x = 3 * torch.randn(7, 5)
        hidden = torch.tanh(layers[1](torch.tanh(layers[0](x))))
        torch.testing.assert_close(network(x), layers[2](hidden))


@each_continuous
def test_detail_23_actions_are_gaussian(script, traces):
    trace = traces(script, num_steps=512, total_timesteps=2 * 1024, update_epochs=1)
    mean, std = (np.stack([getattr(step, name) for step in trace.acted[-512:]]) for name in ("mean", "std"))
    batch = trace.batch(1)
    z = (batch.action.numpy() - mean) / std[:, None]
    n = z.size  # 2048: five standard errors below
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert abs((z[:, :, 0] * z[:, :, 1]).mean()) < 5 / math.sqrt(n / 2)
    assert abs((z[:, 0] * z[:, 1]).mean()) < 5 / math.sqrt(n / 2), "two environments share their noise"
    agent = trace.agent_at(trace.updates_of(1)[0].theta[0])
    with torch.no_grad():
        expected = agent.actor(batch.obs)
    np.testing.assert_allclose(mean, expected, atol=1e-5)  # acting and learning use one policy
    logprob = (-0.5 * z**2 - np.log(std)[:, None] - 0.5 * math.log(2 * math.pi)).sum(-1)
    np.testing.assert_allclose(batch.logprob, logprob, rtol=1e-3, atol=1e-3)


@each_continuous
def test_detail_24_standard_deviation_is_independent_of_the_state(script, traces):
    assert script.Args().state_independent_std
    trace = traces(script)
    assert torch.equal(trace.initial["log_std"], torch.zeros(2))
    last = trace.agent_at(trace.updates[-1].theta[1])
    assert last.log_std.abs().min() > 0  # learned
    obs = 5 * torch.randn(9, 3)
    _, std = script.numpy_policy(last)(obs.numpy())
    np.testing.assert_allclose(np.broadcast_to(std, (9, 2)), np.exp(np.tile(last.log_std.detach(), (9, 1))), rtol=1e-6)
    entropy = last(obs, torch.zeros(9, 2)).entropy
    torch.testing.assert_close(entropy, entropy[:1].expand(9))
    trace = traces(script, state_independent_std=False)
    assert "log_std" not in trace.initial
    last = trace.agent_at(trace.updates[-1].theta[1])
    mean, std = script.numpy_policy(last)(obs.numpy())
    out = last.actor(obs).detach().numpy()
    np.testing.assert_allclose(mean, out[:, :2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(std, np.exp(out[:, 2:]), rtol=1e-4)
    assert (std.std(axis=0) > 1e-4).all()
    assert last(obs, torch.zeros(9, 2)).entropy.std() > 1e-4


@each_continuous
def test_detail_25_log_probabilities_of_the_components_add_up(script):
    agent = script.Agent(3, 2)
    with torch.no_grad():
        agent.log_std.copy_(torch.tensor([0.4, -1.0]))
    obs, action = torch.randn(6, 3), torch.randn(6, 2)
    said = agent(obs, action)
    mean, std = agent.actor(obs).double(), agent.log_std.double().exp()
    density = torch.exp(-0.5 * ((action - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    torch.testing.assert_close(said.logprob.double(), (density[:, 0] * density[:, 1]).log(), rtol=1e-5, atol=1e-5)
    expected = sum(0.5 * math.log(2 * math.pi * math.e) + log_std for log_std in (0.4, -1.0))
    torch.testing.assert_close(said.entropy, torch.full((6,), expected))


@each_continuous
def test_detail_26_policy_and_value_networks_share_nothing(script):
    agent = script.Agent(3, 2)
    said = agent(torch.randn(6, 3), torch.randn(6, 2))
    for output, reached in ((said.value.sum(), "critic"), ((said.logprob + said.entropy).sum(), "actor")):
        gradients = torch.autograd.grad(output, list(agent.parameters()), allow_unused=True)
        for (name, _), gradient in zip(agent.named_parameters(), gradients, strict=True):
            of_network = name.startswith(reached) or (reached == "actor" and name == "log_std")
            assert (gradient is not None) == of_network, f"{reached}: {name}"


@each_continuous
def test_detail_27_environment_gets_clipped_actions_and_learner_unclipped_ones(script, traces):
    assert script.Args().clip_actions
    low, high = np.array([-0.3, -1], np.float32), np.array([0.1, 2], np.float32)
    for clip_actions in (True, False):
        trace = traces(script, clip_actions=clip_actions)
        stored = np.concatenate([trace.batch(i).action.numpy() for i in range(3)])
        outside = (stored < low) | (stored > high)
        assert 0.3 < outside[:, :, 0].mean() < 1
        assert outside[:, :, 1].any()
        for i, env in enumerate(trace.groups[0]):
            for step, event in enumerate(env.events[1:]):
                if not event.is_reset:
                    expected = np.clip(stored[step, i], low, high) if clip_actions else stored[step, i]
                    np.testing.assert_array_equal(event.action, expected)


@each_recorded
def test_detail_28_observations_by_statistics_updated_before_use(script, traces):
    assert script.Args().norm_obs == "step" or script not in CONTINUOUS
    trace = traces(script)
    raw = trace.recorded("obs")
    expected = np.clip(direct_normalized(raw), -10, 10)
    stored = np.concatenate([trace.batch(i).obs.numpy() for i in range(3)])
    assert stored.dtype == np.float32
    np.testing.assert_allclose(stored, expected[:-1], rtol=1e-5, atol=1e-6)
    acted = np.stack([step.obs for step in trace.acted])
    np.testing.assert_array_equal(acted, stored)  # the policy sees what is learned from
    saved = read_checkpoint(trace.args.run_dir)["obs_rms"]
    mean, var = direct_statistics(raw.reshape(-1, 3))
    assert saved["mean"].dtype == torch.float64
    np.testing.assert_allclose(saved["mean"], mean, rtol=1e-11)
    np.testing.assert_allclose(saved["m2"] / saved["count"], var, rtol=1e-8)
    assert saved["count"] == pytest.approx(1e-4 + raw[..., 0].size, rel=1e-12)


@each_recorded
def test_detail_28_statistics_once_per_rollout_or_none(script, traces):
    trace = traces(script, norm_obs="batch")
    raw = trace.recorded("obs")
    for iteration in range(3):
        seen, steps = raw[: (iteration + 1) * T].reshape(-1, 3), slice(iteration * T, (iteration + 1) * T)
        mean, var = direct_statistics(seen)
        expected = np.clip((raw[steps] - mean) / np.sqrt(var + 1e-8), -10, 10)
        np.testing.assert_allclose(trace.batch(iteration).obs, expected, rtol=1e-5, atol=1e-5)
        last = torch.tensor(np.clip((raw[steps.stop] - mean) / np.sqrt(var + 1e-8), -10, 10), dtype=torch.float32)
        agent = trace.agent_at(trace.updates_of(iteration)[0].theta[0])
        with torch.no_grad():
            value = value_of(agent, last)
        torch.testing.assert_close(trace.rollouts[iteration].values[-1], value, rtol=1e-4, atol=1e-5)
    trace = traces(script, **PLAIN)
    stored = np.concatenate([trace.batch(i).obs.numpy() for i in range(3)])
    np.testing.assert_array_equal(stored, trace.recorded("obs")[:-1].astype(np.float32))


@each_recorded
def test_detail_28_epsilon(script):
    rms = script.RunningMeanStd((1,))
    assert (rms.mean.tolist(), rms.var.tolist(), rms.count) == ([0.0], [1.0], 1e-4)
    rms.m2, rms.count = np.array([3e-8]), 1.0
    normalized = script.normalize_obs(np.array([[1e-4]]), rms, script.Args(norm_obs="step"))
    assert normalized.item() == pytest.approx(0.5, rel=1e-6)  # 1e-4 / sqrt(3e-8 + 1e-8)


@each_recorded
def test_detail_29_observation_clipping(script, traces):
    assert script.Args().clip_obs == 10.0 or script not in CONTINUOUS
    trace = traces(script, clip_obs=0.7)
    normalized = direct_normalized(trace.recorded("obs"))[:-1]
    stored = np.concatenate([trace.batch(i).obs.numpy() for i in range(3)])
    np.testing.assert_allclose(stored, np.clip(normalized, -0.7, 0.7), rtol=1e-5, atol=1e-6)
    assert (stored == np.float32(0.7)).any()
    assert (stored == np.float32(-0.7)).any()
    rms, obs = script.RunningMeanStd((3,)), np.array([[12.0, -1e6, 3.0]])
    for clip_obs, expected in ((10.0, [[10.0, -10.0, 3.0]]), (math.inf, obs)):
        np.testing.assert_allclose(script.normalize_obs(obs, rms, script.Args(clip_obs=clip_obs)), expected, rtol=1e-6)


@each_recorded
def test_detail_30_rewards_over_the_deviation_of_the_discounted_return(script, traces):
    assert script.Args().norm_reward or script not in CONTINUOUS
    for gamma in (0.99, 0.5):
        trace = traces(script, gamma=gamma, clip_reward=math.inf)
        rewards, resets = trace.recorded("reward")[1:], trace.recorded("is_reset")[1:]
        ends = (trace.recorded("terminated") | trace.recorded("truncated"))[1:]
        assert resets.any()
        expected = direct_scaled(rewards, ends, resets, gamma)  # over all three iterations: nothing starts again
        learned = np.concatenate([rollout.rewards.numpy() for rollout in trace.rollouts])
        np.testing.assert_allclose(learned[~resets], expected[~resets], rtol=1e-5)
    trace = traces(script, **PLAIN)
    learned = np.concatenate([rollout.rewards.numpy() for rollout in trace.rollouts])
    np.testing.assert_array_equal(learned, trace.recorded("reward")[1:].astype(np.float32))


@each_recorded
def test_detail_30_epsilon_and_no_mean(script):
    rms = script.RunningMeanStd(())
    rms.mean, rms.m2, rms.count = np.array(0.0), 1.5e12 * 1e-8, 1e12  # variance 1.5e-8, which one more step leaves
    no, yes = np.zeros((1, 1), dtype=bool), np.ones((1, 1), dtype=bool)
    scaled, running = script.scale_rewards(np.array([[2e-4]]), no, yes, np.array([1e-4]), rms, 0.5)
    assert scaled.item() == pytest.approx(2e-4 / math.sqrt(1.5e-8 + 1e-8), rel=1e-6)
    assert running.item() == pytest.approx(2.5e-4)
    scaled, running = script.scale_rewards(np.array([[2e-4]]), yes, yes, np.array([1e-4]), rms, 0.5)
    assert scaled.item() == pytest.approx(2e-4 / math.sqrt(2.5e-8), rel=1e-6)
    assert running.item() == 0


@each_recorded
def test_detail_31_reward_clipping(script, traces):
    assert script.Args().clip_reward == 10.0 or script not in CONTINUOUS
    trace = traces(script, clip_reward=0.5)
    rewards, resets = trace.recorded("reward")[1:], trace.recorded("is_reset")[1:]
    ends = (trace.recorded("terminated") | trace.recorded("truncated"))[1:]
    scaled = direct_scaled(rewards, ends, resets, 0.99)
    learned = np.concatenate([rollout.rewards.numpy() for rollout in trace.rollouts])
    np.testing.assert_allclose(learned[~resets], np.clip(scaled, -0.5, 0.5)[~resets], rtol=1e-5)
    assert (learned == 0.5).any()
    assert (learned == -0.5).any()
    trace = traces(script, norm_reward=False)
    learned = np.concatenate([rollout.rewards.numpy() for rollout in trace.rollouts])
    np.testing.assert_allclose(learned, np.clip(trace.recorded("reward")[1:], -10, 10), rtol=1e-6)
    assert (learned == 10).any()


@each_recorded
def test_aux_anneal_clip(script, traces):
    assert not script.Args().anneal_clip
    trace = traces(script, anneal_clip=True)
    expected = [0.2, 0.2 * 2 / 3, 0.2 / 3]
    assert [record["charts/clip_coef"] for record in trace.metrics] == pytest.approx(expected)
    used = [update.loss.clip_coef.item() for update in trace.updates]
    assert used == pytest.approx(np.repeat(expected, UPDATES).tolist())
    used = [update.loss.clip_coef.item() for update in traces(script).updates]
    assert used == pytest.approx([0.2] * 3 * UPDATES)


@each_recorded
def test_aux_target_kl(script, traces):
    assert script.Args().target_kl is None
    free = traces(script)
    assert [record["charts/epochs"] for record in free.metrics] == [3, 3, 3]
    kls = [[update.info["approx_kl"].item() for update in epoch] for epoch in free.epochs[:3]]  # of iteration 1
    first, second = np.mean(kls[0]), np.mean(kls[1])
    assert kls[0][-1] > first, "the last minibatch alone would stop earlier than the epoch"
    targets = [0.5 * first, 0.5 * (first + kls[0][-1]), 0.5 * (first + second), 1e3]
    for target in targets:
        trace = traces(script, target_kl=float(target))
        means = [np.mean(epoch) > target for epoch in kls]
        expected = means.index(True) + 1 if any(means) else 3
        assert trace.metrics[0]["charts/epochs"] == expected
        assert len(trace.updates_of(0)) == 2 * expected  # a started epoch is finished
    assert traces(script, target_kl=float(targets[0])).metrics[0]["charts/epochs"] == 1
    assert traces(script, target_kl=float(targets[1])).metrics[0]["charts/epochs"] > 1


@each_recorded
def test_ours_bootstrap_truncated(script, traces):
    assert script.Args().bootstrap_truncated
    for flag in (True, False):
        trace = traces(script, bootstrap_truncated=flag, norm_adv="none")
        cut, ended = 0, 0
        for iteration, rollout in enumerate(trace.rollouts):
            expected = direct_gae(rollout, 0.99, 0.95, flag)
            np.testing.assert_allclose(trace.batch(iteration).advantage, expected, rtol=1e-4, atol=1e-4)
            terminated, truncated = rollout.terminated.bool(), rollout.truncated.bool()
            for t, i in torch.argwhere(truncated | terminated).tolist():
                future = 0.99 * rollout.values[t + 1, i].item() if flag and not terminated[t, i] else 0.0
                advantage = rollout.rewards[t, i].item() + future - rollout.values[t, i].item()
                assert trace.batch(iteration).advantage[t, i].item() == pytest.approx(advantage, rel=1e-4, abs=1e-5)
                cut, ended = cut + (not terminated[t, i]), ended + 1
        assert 0 < cut < ended


@each_continuous
def test_ours_bootstrap_truncated_from_the_true_final_observation(script, traces):
    trace = traces(script, **PLAIN)
    raw, truncated = trace.recorded("obs"), trace.recorded("truncated")
    for iteration, rollout in enumerate(trace.rollouts):
        agent = trace.agent_at(trace.updates_of(iteration)[0].theta[0])
        for t, i in np.argwhere(truncated[1 + iteration * T : 1 + (iteration + 1) * T]):
            final = torch.tensor(raw[1 + iteration * T + t, i], dtype=torch.float32)  # what the ending step returned
            assert rollout.values[t + 1, i].item() == pytest.approx(agent.critic(final[None]).item(), rel=1e-4)


@each_recorded
def test_ours_mask_resets(script, traces):
    assert script.Args().mask_resets
    trace = traces(script)
    resets = trace.recorded("is_reset")[1:]
    for iteration in range(3):
        of_rollout = resets[iteration * T : (iteration + 1) * T]
        assert of_rollout.any()
        np.testing.assert_array_equal(trace.batch(iteration).valid, ~of_rollout)
    trace = traces(script, mask_resets=False)
    assert all((trace.batch(iteration).valid == 1).all() for iteration in range(3))


@each_recorded
def test_ours_mask_resets_in_episodes_and_reward_statistics(script, traces):
    trace = traces(script)
    expected = []
    for env in trace.groups[0]:
        reward, length = 0.0, 0
        for step, event in enumerate(env.events[1:], 1):
            if event.is_reset:
                reward, length = 0.0, 0
                continue
            reward, length = reward + event.reward, length + 1
            if event.terminated or event.truncated:
                expected.append((step * N, reward, length))
    logged = [tuple(r.values()) for r in read_jsonl(Path(trace.args.run_dir) / "episodes.jsonl")]
    assert [(step, length) for step, _, length in sorted(logged)] == [(step, length) for step, _, length in sorted(expected)]
    assert [x[1] for x in sorted(logged)] == pytest.approx([x[1] for x in sorted(expected)])
    counted = read_checkpoint(trace.args.run_dir)["return_rms"]["count"]
    assert counted == pytest.approx(1e-4 + (~trace.recorded("is_reset")[1:]).sum(), rel=1e-12)


@each_recorded
def test_ours_checkpoint_every_starts_environments_afresh(script, traces):
    trace = traces(script, checkpoint_every=1, **PLAIN | {"norm_reward": True})
    assert len(trace.groups) == 3
    firsts = []
    for iteration, group in enumerate(trace.groups):
        assert all(len(env.events) == 1 + T for env in group)
        firsts += [env.events[0] for env in group]
        expected = np.stack([env.events[0].obs for env in group]).astype(np.float32)
        np.testing.assert_array_equal(trace.batch(iteration).obs[0], expected)
        assert (trace.batch(iteration).valid[0] == 1).all()
    seeds = [event.seed for event in firsts]
    assert None not in seeds
    assert len(set(seeds)) == len(seeds), "two environments share a seed"
    events = [[env.events[1:] for env in group] for group in trace.groups]
    fields = {
        name: np.concatenate([np.array([[getattr(e, name) for e in env] for env in group]).T for group in events])
        for name in ("reward", "terminated", "truncated", "is_reset")
    }
    ends = fields["terminated"] | fields["truncated"]
    ends[T - 1 :: T] = True  # the discounted return starts at 0 with the environments
    expected = direct_scaled(fields["reward"], ends, fields["is_reset"], 0.99)
    learned = np.concatenate([rollout.rewards.numpy() for rollout in trace.rollouts])
    np.testing.assert_allclose(learned[~fields["is_reset"]], expected[~fields["is_reset"]], rtol=1e-5)
    lengths = [json.loads(line)["length"] for line in (Path(trace.args.run_dir) / "episodes.jsonl").read_text().splitlines()]
    assert max(lengths) <= T
    again = run_trace(script, Path("again"), checkpoint_every=1, seed=2)
    assert not {env.events[0].seed for group in again.groups for env in group} & set(seeds)
