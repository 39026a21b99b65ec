"""ppo_shared_params.py: one trunk or two, discrete and multi-discrete actions, action masks, LSTM, partial observation."""

import dataclasses
import itertools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from torch import nn
from torch.distributions import Categorical

import ppo_continuous
import ppo_shared_params
from helpers import edited, equal, read_checkpoint, read_jsonl, read_metrics, run_script
from ppo_shared_params import (
    INVERSE_KEYS,
    MASK_KEYS,
    ActionMap,
    Agent,
    Args,
    NonFiniteError,
    Spaces,
    UsageError,
    choose,
    draw_noise,
    evaluate,
    load_policy,
    make_policy,
    numpy_policy,
    read_masks,
    read_obs,
    train,
    unroll_lstm,
)

SCRIPT = Path(ppo_shared_params.__file__)
TINY: dict[str, Any] = {
    "env": "RandomEndsDiscrete-v0",
    "num_envs": 4,
    "num_steps": 16,
    "num_minibatches": 2,
    "update_epochs": 2,
    "total_timesteps": 3 * 64,
    "learning_rate": 3e-3,
    "eval_episodes": 0,
    "compile": False,
}


def tiny(run_dir="run", **changes) -> Args:
    return Args(**(TINY | {"run_dir": str(run_dir)} | changes))


class RandomEndsDiscrete(gymnasium.Env):
    """Noise that ends at random, by termination or truncation; component 0 is 1 in the first observation of an episode."""

    def __init__(self, action_space: gymnasium.Space | None = None, render_mode: str | None = None):
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (4,)), action_space or Discrete(3)

    def observation(self, first: bool) -> np.ndarray:
        return np.array([first, *self.np_random.standard_normal(3)], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation(True), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        ends = self.np_random.random(2) < 0.1
        return self.observation(False), float(self.np_random.normal()), bool(ends[0]), bool(ends[1]), {}


class Masked(RandomEndsDiscrete):
    """Two components of 3 and 5 choices, of which a random part is valid; an invalid choice is an error."""

    def __init__(self, place: str = "info", key: str = "action_mask", invalid: float = 0, render_mode: str | None = None):
        super().__init__(MultiDiscrete([3, 5]))
        self.place, self.key, self.invalid = place, key, invalid  # invalid below 0: of the kind that is added to logits
        if place == "observation":
            self.observation_space: Any = Dict({"x": Box(-np.inf, np.inf, (4,)), "action_mask": MultiBinary(8)})
        if place == "tuple in observation":
            parts = Tuple((MultiBinary(3), MultiBinary(5)))
            self.observation_space = Dict({"x": Box(-np.inf, np.inf, (4,)), "action_mask": parts})

    def masked(self, obs: np.ndarray):
        self.mask = self.np_random.random(8) < 0.4
        self.mask[self.np_random.integers(3)] = self.mask[3 + self.np_random.integers(5)] = True
        if self.place == "observation":
            return {"x": obs, "action_mask": self.mask.astype(np.int8)}, {}
        if self.place == "tuple in observation":
            return {"x": obs, "action_mask": (self.mask[:3].astype(np.int8), self.mask[3:].astype(np.int8))}, {}
        if self.place == "tuple":  # as MultiDiscrete.sample takes it
            return obs, {"action_mask": (self.mask[:3].astype(np.int8), self.mask[3:].astype(np.int8))}
        return obs, {self.key: np.where(self.mask, 0, self.invalid).astype(np.float32) if self.invalid else self.mask}

    def reset(self, *, seed=None, options=None):
        return self.masked(super().reset(seed=seed)[0])

    def step(self, action):
        assert self.mask[action[0]], "invalid choice of component 0"
        assert self.mask[3 + action[1]], "invalid choice of component 1"
        obs, *outcome, _ = super().step(action)
        obs, info = self.masked(obs)
        return obs, *outcome, info


class MaskedAtFirst(Masked):
    """Gives its mask in the info of a reset alone; later all choices are valid."""

    def step(self, action):
        self.mask = self.mask | True
        obs, *outcome, _ = super().step(action)
        return obs, *outcome, {}


class MaskedLater(Masked):
    """Gives its mask in the info of steps alone; after a reset all choices are valid."""

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed)
        self.mask = self.mask | True
        return obs, {}


class OnlyMask(RandomEndsDiscrete):
    """Shows its mask and nothing else."""

    def __init__(self, render_mode: str | None = None):
        super().__init__()
        self.observation_space: Any = Dict(action_mask=MultiBinary(3))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"action_mask": np.ones(3, np.int8)}, {}


class MaskMethod(RandomEndsDiscrete):
    """Offers its masks as another library wants them."""

    def action_masks(self):
        return np.array([True, False, True])


class Recall(gymnasium.Env):
    """Reward 1 for repeating at the fourth step the sign seen at the first: 0.5 without memory, 1 with it."""

    def __init__(self, render_mode: str | None = None):
        self.observation_space, self.action_space = Box(-1, 1, (2,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.sign = 0, int(self.np_random.integers(2))
        return np.array([2 * self.sign - 1, 0], np.float32), {}

    def step(self, action):
        self.time += 1
        return (
            np.array([0, self.time / 4], np.float32),
            float(self.time == 4 and action == self.sign),
            self.time == 4,
            False,
            {},
        )


register: Any = gymnasium.register
register("RandomEndsDiscrete-v0", RandomEndsDiscrete)
register("RandomEndsShifted-v0", RandomEndsDiscrete, kwargs={"action_space": Discrete(3, start=-1)})
register("RandomEndsMulti-v0", RandomEndsDiscrete, kwargs={"action_space": MultiDiscrete([2, 4, 3])})
register("RandomEndsBox-v0", RandomEndsDiscrete, kwargs={"action_space": Box(np.float32(-2), np.float32(1), (2,))})
register("RandomEndsWide-v0", RandomEndsDiscrete, kwargs={"action_space": Box(-(2**31), 2**31 - 1, (2,), np.int32)})
register("RandomEndsBinary-v0", RandomEndsDiscrete, kwargs={"action_space": MultiBinary((3, 2))})
register("RandomEndsParts-v0", RandomEndsDiscrete, kwargs={"action_space": Dict(a=Discrete(2), b=Discrete(3))})
register("RandomEndsPairs-v0", RandomEndsDiscrete, kwargs={"action_space": Tuple([Discrete(2), Box(-1, 1)])})
register("RandomEndsHuge-v0", RandomEndsDiscrete, kwargs={"action_space": Discrete(10**12)})
register("RandomEndsManyChoices-v0", RandomEndsDiscrete, kwargs={"action_space": Discrete(10**5)})
register(
    "RandomEndsDouble-v0", RandomEndsDiscrete, kwargs={"action_space": Box(-0.5, np.array([[0.1], [0.7]]), dtype=np.float64)}
)
register("RandomEndsUnbounded-v0", RandomEndsDiscrete, kwargs={"action_space": Box(-np.inf, np.inf, (2,))})
register("MaskedInfo-v0", Masked, kwargs={"place": "info"})
register("MaskedTuple-v0", Masked, kwargs={"place": "tuple"})
register("MaskedAtFirst-v0", MaskedAtFirst)
register("MaskedLater-v0", MaskedLater)
register("MaskedObservation-v0", Masked, kwargs={"place": "observation"})
register("MaskedTupleObservation-v0", Masked, kwargs={"place": "tuple in observation"})
for mask_key in (*MASK_KEYS, *INVERSE_KEYS):
    register(f"Masked_{mask_key}-v0", Masked, kwargs={"key": mask_key})
register("MaskedByInfinity-v0", Masked, kwargs={"invalid": -np.inf})
register("MaskedByLargeNumbers-v0", Masked, kwargs={"invalid": -1e9, "key": "avail_actions"})
register("OnlyMask-v0", OnlyMask)
register("MaskMethod-v0", MaskMethod)
register("Recall-v0", Recall)


@pytest.fixture
def trace(monkeypatch):
    """Runs train and returns, per iteration, what the rollout's policy put out and what the update got."""

    def run(args: Args) -> list[dict[str, Any]]:
        iterations: list[dict[str, Any]] = []
        make_policy, make_update = ppo_shared_params.numpy_policy, ppo_shared_params.make_update

        def spy_policy(agent):
            policy = make_policy(agent)
            iterations.append(
                {"outputs": [], "updates": [], "theta": nn.utils.parameters_to_vector(agent.parameters()).clone()}
            )

            def spied(obs, first, memory):
                outputs, memory = policy(obs, first, memory)
                iterations[-1]["outputs"].append([x.copy() for x in outputs])
                return outputs, memory

            return spied

        def spy_update(agent, args):
            update = make_update(agent, args)

            def spied(theta, adam, batch, mb_inds, *hyper):
                if not iterations[-1]["updates"]:  # copies: the next rollout writes into the same arrays
                    iterations[-1] |= {name: x.clone() for name, x in batch._asdict().items()} | {"agent": agent}
                info = update(theta, adam, batch, mb_inds, *hyper)
                iterations[-1]["updates"].append((mb_inds, info))
                return info

            return spied

        monkeypatch.setattr(ppo_shared_params, "numpy_policy", spy_policy)
        monkeypatch.setattr(ppo_shared_params, "make_update", spy_update)
        train(args)
        return [record for record in iterations if record["updates"]]  # without the probe before the run

    return run


def make_agent(lstm: bool, share: bool, nvec=(2, 4, 3), seed=0) -> Agent:
    torch.manual_seed(seed)
    agent = Agent(4, (len(nvec), max(nvec)), share_params=share, lstm=lstm)
    with torch.no_grad():
        next(agent.actor.parameters()).mul_(100)  # of gain 1, so that the policy is not uniform
    return agent


# actions


@pytest.mark.parametrize("nvec", [(3,), (2, 4, 3), (2, 2)], ids=str)
def test_detail_37_independent_components(nvec):
    agent = make_agent(lstm=False, share=True, nvec=nvec)
    real = torch.arange(max(nvec)) < torch.tensor(nvec)[:, None]
    everything = torch.tensor(list(itertools.product(*map(range, nvec))))
    obs, n = torch.randn(1, 4).expand(len(everything), 4), len(everything)
    masks, first, state = real.expand(n, -1, -1), torch.zeros(n), agent.initial_state(n)
    with torch.no_grad():
        logprob, entropy, *_ = agent(obs, everything, masks, first, state)
        (logits,) = agent.policy(agent.features(obs, first, state))
    parts = [Categorical(logits=logits[:, c, :size]) for c, size in enumerate(nvec)]
    assert logprob.exp().sum().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(logprob, sum(part.log_prob(everything[:, c]) for c, part in enumerate(parts)))
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts))
    assert logprob.std() > 0.1  # not the uniform policy


def test_action_spaces():
    def of(space, bins=None):
        """Numbers of choices of the components, and what the space holds for each choice."""
        action_map = ActionMap.of(space, bins)
        assert (np.sort(action_map.real, axis=1)[:, ::-1] == action_map.real).all()  # the first ones are real
        return action_map.real.sum(axis=1).tolist(), action_map.choices

    nvec, choices = of(Box(np.array([-2, 0], np.float32), np.array([1, 10], np.float32)), 4)
    assert nvec == [4, 4]
    np.testing.assert_allclose(choices, [[-2.0, -1.0, 0.0, 1.0], [0.0, 10 / 3, 20 / 3, 10.0]], rtol=1e-6)
    nvec, choices = of(Discrete(3, start=-1))
    assert (nvec, choices.tolist()) == ([3], [[-1, 0, 1]])
    nvec, choices = of(MultiDiscrete([2, 4, 3], start=[0, 5, 0]))
    assert (nvec, choices[[0, 1, 2], [1, 3, 2]].tolist()) == ([2, 4, 3], [1, 8, 2])
    nvec, choices = of(Box(np.array([-1, 0]), np.array([1, 4]), dtype=np.int32))
    assert (nvec, choices[[0, 1], [2, 3]].tolist(), choices.dtype) == ([3, 5], [1, 3], np.int32)
    nvec, choices = of(Box(0, 1, (2,), dtype=np.bool_))
    assert (nvec, choices.tolist()) == ([2, 2], [[False, True]] * 2)
    nvec, choices = of(MultiBinary((3, 2)))
    assert (nvec, choices.tolist(), choices.dtype) == ([2] * 6, [[0, 1]] * 6, np.int8)
    nvec, choices = of(Box(-1, 1, (2,)))  # a Gaussian policy has no choices
    assert (nvec, choices.shape) == ([0, 0], (2, 0))


def test_actions_as_the_environment_takes_them():
    binary = MultiBinary((3, 2))
    taken = ActionMap.of(binary, None).to_env(np.array([[0, 1, 1, 0, 0, 1]]), True)
    assert taken.tolist() == [[[0, 1], [1, 0], [0, 1]]]
    assert binary.contains(taken[0])
    box = Box(np.array([[-0.5], [0.0]]), np.array([[0.1], [0.7]]), dtype=np.float64)
    sampled = np.array([[0.3, 0.3], [-9, 9], [0, 0.5]], np.float32)
    clipped = ActionMap.of(box, None).to_env(sampled, True)
    assert clipped.tolist() == [[[0.1], [float(np.float32(0.3))]], [[-0.5], [0.7]], [[0], [0.5]]]
    assert all(box.contains(action) for action in clipped)
    assert ActionMap.of(box, None).to_env(sampled, False).ravel().tolist() == sampled.ravel().tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-0.4, 0.4), (-0.3, 0.7)])
def test_bins_stay_within_the_bounds(low, high, dtype):
    for bins in range(2, 40):
        box = Box(low, high, (1,), dtype=dtype)
        choices = ActionMap.of(box, bins).choices
        assert all(box.contains(choice[None]) for choice in choices[0])
        assert (choices[0, 0], choices[0, -1]) == (box.low[0], box.high[0])


@pytest.mark.parametrize(
    ("env", "flags"),
    [
        ("RandomEndsDiscrete-v0", {}),
        ("RandomEndsShifted-v0", {}),
        ("RandomEndsMulti-v0", {"share_params": False}),
        ("RandomEndsBox-v0", {"discretize_actions": 3}),
        ("RandomEndsBinary-v0", {}),
        ("RandomEndsBinary-v0", {"lstm": True, "share_params": False}),
        ("RandomEndsBox-v0", {}),
        ("RandomEndsDouble-v0", {"share_params": False, "norm_obs": "batch"}),
        ("RandomEndsDouble-v0", {"lstm": True, "share_params": False}),
        ("RandomEndsUnbounded-v0", {"lstm": True, "observe": (1, 3)}),
        ("CheetahRun-v1", {"norm_obs": "step"}),  # observations are a dictionary
        ("FrozenLake-v1", {}),
        ("LunarLander-v3", {"norm_obs": "step", "norm_reward": True}),
        ("BipedalWalker-v3", {"discretize_actions": 5, "norm_obs": "batch"}),
        ("Game2048-v1", {}),
        ("GraphColoring-v1", {"lstm": True}),
        ("Cleaner-v0", {}),  # actions are a Box of integers
    ],
)
def test_runs_and_evaluates_in(env, flags):
    """The environments of this file check every action themselves."""
    args = tiny(env=env, total_timesteps=128, eval_episodes=1 if "RandomEnds" in env else 0, eval_deterministic=False, **flags)
    result = train(args)
    assert result["global_step"] == 128
    assert all(length > 0 for length in result["evaluation"].get("lengths", []))


def test_samples_follow_the_policy(trace):
    """Frequencies of actions against the probabilities of the rollout's logits, within four standard errors."""
    iterations = trace(tiny(env="RandomEndsMulti-v0", num_steps=512, num_envs=8, total_timesteps=2 * 4096, learning_rate=0.02))
    logits = torch.tensor(np.concatenate([logits for (logits,) in iterations[1]["outputs"]])).view(-1, 3, 4)
    probabilities = logits.masked_fill(torch.arange(4) >= torch.tensor([2, 4, 3])[:, None], -torch.inf).softmax(2)
    chosen = nn.functional.one_hot(iterations[1]["action"], 4)
    error = (probabilities * (1 - probabilities)).sum(0).sqrt()
    assert ((chosen - probabilities).sum(0).abs() <= 4 * error).all()
    assert (probabilities.mean(0)[0] - 0.5).abs().max() > 0.01  # the update has moved the policy


def test_samples_follow_a_policy_that_is_far_from_uniform():
    """Frequencies within four standard errors, with and without a mask."""
    torch.manual_seed(0)
    logits, n = np.array([[[0.0, 3.0, -1.0, 1.0], [2.0, 2.0, -4.0, 0.0]]], np.float32), 20_000
    mask = np.array([[[True, False, True, True], [True, True, True, False]]])
    for masks in (None, mask):
        chosen = choose((logits.repeat(n, axis=0),), masks, draw_noise(1, n, (2, 4))[0])
        allowed = torch.tensor(logits[0]).masked_fill(
            ~torch.tensor(mask[0] if masks is not None else mask[0] | True), -torch.inf
        )
        for component, expected in enumerate(allowed.softmax(1).double().numpy()):
            frequencies = np.bincount(chosen[:, component], minlength=4) / n
            assert (np.abs(frequencies - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)).all()
    assert choose((logits,), None, 0).tolist() == [[1, 0]]
    assert choose((logits,), mask, 0).tolist() == [[3, 0]]


# Gaussian policy


@pytest.mark.parametrize("norm_adv", ["minibatch", "batch"])
@pytest.mark.parametrize(
    ("env", "clip_actions"),
    [("RandomEndsBox-v0", True), ("RandomEndsDouble-v0", True), ("envs:Point-v0", True), ("envs:Point-v0", False)],
)
def test_gaussian_policy_of_separate_networks_is_that_of_ppo_continuous(env, norm_adv, clip_actions):
    """To the last bit, with the flags of that script: parameters, statistics, losses, episodes, evaluation."""
    flags = TINY | {"env": env, "norm_obs": "step", "clip_obs": 10.0, "clip_reward": 10.0, "ent_coef": 0.0, "num_steps": 32}
    flags |= {"norm_adv": norm_adv, "clip_actions": clip_actions}
    flags |= {"checkpoint_every": 2, "total_timesteps": 5 * 128, "eval_deterministic": False}
    train(Args(**flags | {"run_dir": "ours", "share_params": False, "eval_episodes": 6}))
    ppo_continuous.train(ppo_continuous.Args(**flags | {"run_dir": "base", "eval_episodes": 6}))
    ours, base = read_checkpoint("ours"), read_checkpoint("base")
    for key in ("theta", "adam", "obs_rms", "return_rms", "recent_returns", "global_step", "spaces"):
        assert equal(ours[key], base[key]), key
    assert ours["adam"][2] == 5 * 4
    assert read_metrics("ours")[1:] == read_metrics("base")[1:]
    for name in ("episodes.jsonl", "evaluation.json"):
        assert Path("ours", name).read_bytes() == Path("base", name).read_bytes()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("lstm", [False, True])
def test_gaussian_policy_learns_from_the_density_of_what_it_did(lstm, share, trace):
    for record in trace(tiny(env="RandomEndsDouble-v0", lstm=lstm, share_params=share)):
        mean, std = (np.concatenate([np.broadcast_to(step[i], (4, 2)) for step in record["outputs"]]) for i in (0, 1))
        action = record["action"].numpy()
        density = (-0.5 * ((action - mean) / std) ** 2 - np.log(std * math.sqrt(2 * math.pi))).sum(1)
        np.testing.assert_allclose(record["logprob"].numpy(), density, atol=1e-5)
        _, info = record["updates"][0]
        assert abs(info["old_approx_kl"].item()) < 1e-6
        assert info["clipfrac"].item() == 0
        assert info["entropy"].item() == pytest.approx(
            2 * 0.5 * math.log(2 * math.pi * math.e) + np.log(std[0]).sum(), abs=1e-5
        )
        assert (np.abs(action) > 0.7).any()  # the environment refuses these, so it gets clipped ones
    assert std[0].tolist() != [1, 1]


def test_gaussian_policy_samples_what_it_says(trace):
    """Mean and standard deviation of (action - mean) / std, within four standard errors."""
    record = trace(tiny(env="RandomEndsBox-v0", num_steps=512, num_envs=8, total_timesteps=2 * 4096, learning_rate=0.02))[1]
    mean, std = (np.concatenate([np.broadcast_to(step[i], (8, 2)) for step in record["outputs"]]) for i in (0, 1))
    z = (record["action"].numpy() - mean) / std
    assert (np.abs(z.mean(0)) < 4 / math.sqrt(len(z))).all()
    assert (np.abs(z.std(0) - 1) < 4 / math.sqrt(2 * len(z))).all()
    assert abs(np.corrcoef(z.T)[0, 1]) < 4 / math.sqrt(len(z))
    assert mean.std(0).min() > 0.01  # the update has moved it


# masks


@pytest.mark.parametrize("env", ["MaskedInfo-v0", "MaskedTuple-v0", "MaskedObservation-v0", "MaskedTupleObservation-v0"])
@pytest.mark.parametrize("lstm", [False, True])
def test_aux_action_masks_are_obeyed(env, lstm, trace):
    """The environment raises at an invalid action."""
    iterations = trace(tiny(env=env, num_envs=8, num_steps=32, total_timesteps=3 * 256, lstm=lstm))
    for record in iterations:
        assert record["mask"].any(2).all()
        assert record["mask"].gather(2, record["action"].unsqueeze(2)).all()
        assert 0.2 < record["mask"].float().mean() < 0.5  # of 2 x 5
        assert record["obs"].shape[1] == 4  # the mask is no observation


def test_aux_action_masks_that_a_step_leaves_out_allow_all(trace):
    for record in trace(tiny(env="MaskedAtFirst-v0", num_envs=4, num_steps=8, total_timesteps=2 * 32)):
        choices = record["mask"].view(8, 4, 10).sum(2)
        assert choices[1:].eq(3 + 5).float().mean() > 0.5  # the others are resets
        assert (choices[0] < 3 + 5).any()


def test_aux_action_masks_of_steps_alone_are_obeyed_and_resets_allow_all(trace):
    """With a restart of the environments before each iteration."""
    for record in trace(tiny(env="MaskedLater-v0", num_envs=4, num_steps=8, total_timesteps=3 * 32, checkpoint_every=1)):
        choices = record["mask"].view(8, 4, 10).sum(2)
        assert (choices[0] == 3 + 5).all()
        assert choices[1:].lt(3 + 5).float().mean() > 0.5  # the others are resets


@pytest.mark.slow
def test_aux_action_masks_are_obeyed_in_a_million_steps():
    train(tiny(env="MaskedInfo-v0", num_envs=32, num_steps=256, num_minibatches=4, total_timesteps=1_000_000))


def test_aux_action_masks_leave_no_probability_and_no_gradient():
    agent = make_agent(lstm=False, share=True, nvec=(5,))
    obs, action, n = torch.randn(64, 4), torch.randint(0, 2, (64, 1)) * 3, 64  # actions 0 and 3
    mask = torch.tensor([True, False, False, True, True]).expand(n, 1, 5)
    logprob, entropy, *_ = agent(obs, action, mask, torch.zeros(n), agent.initial_state(n))
    logits = agent.actor(agent.policy_trunk(obs))
    reference = Categorical(logits=logits[:, [0, 3, 4]])
    torch.testing.assert_close(logprob, reference.log_prob((action > 0).long().squeeze(1)))
    torch.testing.assert_close(entropy, reference.entropy())
    (gradient,) = torch.autograd.grad(logprob.sum() + entropy.sum(), next(agent.actor.parameters()))
    assert (gradient[[1, 2]] == 0).all()
    assert (gradient[[0, 3, 4]] != 0).any(1).all()
    assert gradient.isfinite().all()


def test_aux_action_masks_where_nothing_is_valid_all_choices_count():
    real = np.array([[True, True, False], [True, True, True]])
    flat = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 1]])
    expected = [[[False, True, False], [True, False, True]], [[True, True, False], [False, False, True]]]
    for obs, info in (({"action_mask": flat}, {}), (np.zeros((2, 1)), {"action_mask": flat})):
        assert read_masks(obs, info, real).tolist() == expected
    assert read_masks(np.zeros((2, 1)), {"other": flat}, real) is real
    parts = (flat[:, :2], flat[:, 2:])  # as a Tuple in a dictionary of observations
    assert read_masks({"action_mask": parts}, {}, real).tolist() == expected


def test_aux_action_masks_of_gymnasium_are_tuples_or_lists():
    """SyncVectorEnv hands them on as an array of objects, with None where an environment gave none."""
    real, obs = np.array([[True, True, False], [True, True, True]]), np.zeros((4, 1))
    given = np.empty(4, dtype=object)
    given[:] = [None, (np.array([0, 1]), np.array([1, 0, 1])), [False, True, False, False, True], np.array([0, 1, 0, 0, 1])]
    last = [[False, True, False], [False, False, True]]
    expected = [real.tolist(), [[False, True, False], [True, False, True]], last, last]
    assert read_masks(obs, {"action_mask": given}, real).tolist() == expected
    given[1] = [False, True]
    for wrong in (given, np.ones((4, 6))):
        with pytest.raises(UsageError, match="there are 5 choices: a mask has"):
            read_masks(obs, {"action_mask": wrong}, real)


@pytest.mark.parametrize("wrong", [{1, 3}, "01001", b"01001", {"move": 1}])
def test_aux_action_masks_of_another_kind_are_refused(wrong):
    given = np.empty(2, dtype=object)
    given[:] = [None, wrong]
    with pytest.raises(UsageError, match="give an array of all choices, or a tuple with one part for each component"):
        read_masks(np.zeros((2, 1)), {"legal_moves": given}, np.ones((1, 5), dtype=bool))


def test_aux_action_masks_of_torch_count_and_mask_is_a_name_in_an_info_alone():
    given = np.empty(1, dtype=object)
    given[0], real = torch.tensor([0, 1, 1]), np.ones((1, 3), dtype=bool)
    assert read_masks(np.zeros((1, 1)), {"mask": given}, real).tolist() == [[[False, True, True]]]
    assert read_masks({"mask": np.array([[0, 1, 1]])}, {}, real) is real  # it may be anything that is seen


@pytest.mark.parametrize("key", MASK_KEYS)
def test_aux_action_masks_under_every_usual_name(key, trace):
    for record in trace(tiny(env=f"Masked_{key}-v0", total_timesteps=2 * 64)):
        assert record["mask"].gather(2, record["action"].unsqueeze(2)).all()
        assert 0.2 < record["mask"].float().mean() < 0.5


@pytest.mark.parametrize("env", ["MaskedByInfinity-v0", "MaskedByLargeNumbers-v0"])
def test_aux_action_masks_that_are_added_to_logits(env, trace):
    """The environment raises at an invalid action."""
    args = tiny(env=env, num_envs=8, num_steps=32, total_timesteps=3 * 256, eval_episodes=8)
    for record in trace(args):
        assert record["mask"].gather(2, record["action"].unsqueeze(2)).all()
        assert 0.2 < record["mask"].float().mean() < 0.5
    assert sum(evaluate(args, read_checkpoint("run"))["lengths"]) > 20


def test_aux_action_masks_of_numbers():
    real, obs = np.array([[True, True, False], [True, True, True]]), np.zeros((2, 1))
    expected = [[[False, True, False], [True, False, True]], [[True, True, False], [False, False, True]]]
    zeros_and_ones = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 1]])  # nothing of the last row's first component: all of it
    for dtype in (bool, np.int8, np.uint8, np.int64, np.float32):
        assert read_masks(obs, {"action_mask": zeros_and_ones.astype(dtype)}, real).tolist() == expected
    for low in (-1000, -1e9, -np.inf):
        assert read_masks(obs, {"action_mask": np.where(zeros_and_ones, 0, low)}, real).tolist() == expected
    # no number is added where all is valid, or where an environment gave no mask
    assert read_masks(obs, {"action_mask": np.zeros((2, 5))}, real).tolist() == [real.tolist()] * 2
    for odd in (2, -1, 0.5, np.nan, np.inf):
        for rest in (zeros_and_ones, np.where(zeros_and_ones, 0, -np.inf)):
            mask = rest.astype(float)
            mask[1, 4] = odd
            with pytest.raises(UsageError, match="action_mask must hold 1 for valid and 0 for invalid"):
                read_masks(obs, {"action_mask": mask}, real)
    mixed = np.array([[0, 1, 1, 0, 1], [0, 0, -np.inf, 0, 0]])
    with pytest.raises(UsageError, match="action_mask must hold 1 for valid and 0 for invalid"):
        read_masks(obs, {"action_mask": mixed}, real)
    with pytest.raises(UsageError, match="action_mask is a dictionary"):
        read_masks(obs, {"action_mask": {"a": zeros_and_ones}}, real)


def test_aux_action_masks_that_may_be_lists_of_actions():
    """Of two actions both of which are legal, a list is [0, 1], which as a mask forbids the first."""
    two, obs = np.ones((1, 2), dtype=bool), np.zeros((1, 1))
    for key in ("legal_actions", "valid_actions"):
        with pytest.raises(UsageError, match=f"{key} of two numbers .* action_mask"):
            read_masks(obs, {key: np.array([[0, 1]])}, two)
        assert read_masks(obs, {key: np.array([[False, True]])}, two).tolist() == [[[False, True]]]
        with pytest.raises(UsageError, match=f"{key} must hold"):
            read_masks(obs, {key: np.array([[0, 1, 2]])}, np.ones((1, 3), dtype=bool))
    assert read_masks(obs, {"action_mask": np.array([[0, 1]])}, two).tolist() == [[[False, True]]]


def test_observations_become_vectors():
    obs = {"b": np.arange(8).reshape(2, 2, 2), "a": np.array([1, 3]), "action_mask": np.ones((2, 2))}
    expected = [[1, 0, 0, 0, 1, 2, 3], [0, 0, 1, 4, 5, 6, 7]]
    for name in ("action_mask", "legal_actions"):
        space = Dict({"b": Box(0, 1, (2, 2)), name: MultiBinary(2), "a": Discrete(3, start=1)})
        envs = SimpleNamespace(single_observation_space=space, single_action_space=Discrete(2))
        spaces = Spaces.of(envs)
        assert spaces.obs_dim == 7
        assert spaces.describe()["observation"] == str(Dict({"a": Discrete(3, start=1), "b": Box(0, 1, (2, 2))}))
        np.testing.assert_array_equal(read_obs(obs, spaces, tiny()), expected)
        np.testing.assert_array_equal(read_obs(obs, spaces, tiny(observe=(2, 0))), np.array(expected)[:, [2, 0]])


# networks


@pytest.mark.parametrize("lstm", [False, True])
@pytest.mark.parametrize("share", [True, False])
def test_detail_13_shared_and_separate(share, lstm):
    agent = make_agent(lstm, share)
    obs, first = torch.randn(6, 4), torch.zeros(6)
    agent.value(agent.features(obs, first, agent.initial_state(2))).sum().backward()
    moved = {name for name, p in agent.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert ("policy_trunk.0.weight" in moved) == share
    assert ("value_trunk.0.weight" in moved) == (not share)
    per_trunk = 4 * 64 + 64 + 64 * 64 + 64 + lstm * (4 * 128 * (64 + 128) + 2 * 4 * 128)
    heads = (1 + 3 * 4) * ((128 if lstm else 64) + 1)
    assert sum(p.numel() for p in agent.parameters()) == per_trunk * (1 if share else 2) + heads


@pytest.mark.parametrize("share", [True, False])
def test_other_initial_weights_are_those_of_every_layer(share):
    """Rows of norm 1 (0.01 of the policy) without bias, or the uniform ones of torch with one."""
    for scheme in ("normc", "torch"):
        agent = Agent(4, (1, 3), weight_init=scheme, share_params=share)
        layers = [m for m in agent.modules() if isinstance(m, nn.Linear)]
        assert len(layers) == (4 if share else 6)
        for layer in layers:
            weight, gain = layer.weight.detach(), 0.01 if layer is agent.actor else 1.0
            if scheme == "normc":
                torch.testing.assert_close(weight.norm(dim=1), torch.full((len(weight),), gain))
                assert not layer.bias.any()
            else:
                bound = 1 / math.sqrt(weight.shape[1])
                assert 0.8 * bound < weight.abs().max() <= bound
                assert layer.bias.any()


def test_detail_32_lstm_initialization():
    agent = Agent(4, (1, 2), lstm=True, share_params=False)
    for cell in (agent.policy_cell, agent.value_cell):
        assert cell is not None
        for name, parameter in cell.named_parameters():
            if name.startswith("weight"):  # orthonormal columns
                torch.testing.assert_close(parameter.T @ parameter, torch.eye(parameter.shape[1]), atol=1e-5, rtol=0)
            else:
                assert parameter.count_nonzero() == 0
    other = Agent(4, (1, 2), weight_init="torch", lstm=True).policy_cell
    assert other is not None
    assert all(parameter.count_nonzero() == parameter.numel() for parameter in other.parameters())


# LSTM


def random_sequence(steps: int, n: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps * n, 64, generator=generator, dtype=torch.float64)
    first = (torch.rand(steps * n, generator=generator) < 0.15).double()
    return x, first, 0.5 * torch.randn(n, 2, 128, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_detail_36_unrolled_lstm_equals_torch_on_each_episode(seed):
    """Outputs, last state and gradients, against nn.LSTM on every piece between resets."""
    steps, n = 23, 3
    torch.manual_seed(seed)
    cell = nn.LSTMCell(64, 128).double()
    reference = nn.LSTM(64, 128).double()
    for name, parameter in cell.named_parameters():
        getattr(reference, f"{name}_l0").data = parameter.data.clone()
    x, first, state = random_sequence(steps, n, seed)
    x.requires_grad_()
    outputs, after = unroll_lstm(cell, x, first, state)
    expected = torch.zeros(steps, n, 128, dtype=torch.float64)
    for i in range(n):
        column, starts = x.view(steps, n, 64)[:, i], [0, *(first.view(steps, n)[1:, i].nonzero().flatten() + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], steps], strict=True):
            own = start == 0 and first.view(steps, n)[0, i] == 0
            h, c = state[i] if own else torch.zeros(2, 128, dtype=torch.float64)
            piece, (h, c) = reference(column[start:end], (h[None], c[None]))
            expected[start:end, i] = piece
        torch.testing.assert_close(after[i], torch.stack([h[0], c[0]]))
    torch.testing.assert_close(outputs, expected.flatten(0, 1))
    weights = torch.randn_like(outputs)  # the reference knows nothing of what is written out in LSTMSteps.backward
    ours = torch.autograd.grad((outputs * weights).sum(), [x, *cell.parameters()])
    theirs = torch.autograd.grad((expected.flatten(0, 1) * weights).sum(), [x, *reference.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_detail_34_nothing_before_the_episode_counts():
    """The gradient of each step's output with regard to all inputs before its episode, and the first state, is 0."""
    steps, n = 12, 2
    cell = nn.LSTMCell(64, 128).double()
    x, _, state = random_sequence(steps, n, 0)
    first = torch.zeros(steps, n, dtype=torch.float64)
    first[5, 0] = first[9, 0] = first[3, 1] = 1
    x.requires_grad_()
    outputs, _ = unroll_lstm(cell, x, first.flatten(), state)
    for i, t in itertools.product(range(n), range(steps)):
        start = max([s for s in range(t + 1) if first[s, i]], default=0)
        (gradient,) = torch.autograd.grad(outputs.view(steps, n, 128)[t, i].sum(), x, retain_graph=True)
        size = gradient.view(steps, n, 64).abs().sum(2)
        assert (size[:start] == 0).all()
        assert (size[t + 1 :] == 0).all()
        assert (size[start : t + 1, i] > 0).all()
        assert (size[:, 1 - i] == 0).all()
    other, _ = unroll_lstm(cell, x, first.flatten(), state + 1)
    same = (other == outputs).all(1).view(steps, n)
    assert same.tolist() == [[t >= 5, t >= 3] for t in range(steps)]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("lstm", [True, False])
def test_training_sees_what_the_rollout_put_out(lstm, share, trace):
    """Log-probabilities from the rollout's logits equal the batch's, across resets and rollout ends, for every step."""
    for iteration, record in enumerate(
        trace(tiny(env="RandomEndsMulti-v0", lstm=lstm, share_params=share, num_steps=24, total_timesteps=3 * 96))
    ):
        logits = torch.tensor(np.concatenate([logits for (logits,) in record["outputs"]])).view(-1, 3, 4)
        logits = logits.masked_fill(~record["mask"], -torch.inf)
        taken = logits.log_softmax(2).gather(2, record["action"].unsqueeze(2)).squeeze(2).sum(1)
        torch.testing.assert_close(taken, record["logprob"], atol=1e-5, rtol=0)
        agent = record["agent"]
        nn.utils.vector_to_parameters(record["theta"], agent.parameters())
        inputs = [record[key] for key in ("obs", "action", "mask", "first")]
        for envs in ([2, 0, 3, 1], [3], [1, 2]):  # permuting or choosing environments permutes or chooses the results
            rows = (torch.arange(24)[:, None] * 4 + torch.tensor(envs)).flatten()
            state = record["state"][envs] if lstm else agent.initial_state(len(rows))
            with torch.no_grad():
                logprob, _, value, _ = agent(*(x[rows] for x in inputs), state)
            torch.testing.assert_close(logprob, record["logprob"][rows], atol=1e-5, rtol=0)
            torch.testing.assert_close(value, record["value"][rows], atol=1e-5, rtol=1e-5)
        if lstm:
            assert (record["state"].abs().sum() > 0) == (iteration > 0)


@pytest.mark.parametrize("share", [True, False])
def test_last_value_continues_the_state_of_the_rollout(share, trace, monkeypatch):
    """The values that compute_gae gets equal those of T + 1 steps from the rollout's start state."""
    seen, compute_gae = [], ppo_shared_params.compute_gae

    def spied(rewards, values, *others):
        seen.append(values.clone())
        return compute_gae(rewards, values, *others)

    monkeypatch.setattr(ppo_shared_params, "compute_gae", spied)
    records = trace(tiny(lstm=True, share_params=share, total_timesteps=6 * 64))
    last_first = []
    for (record, following), values in zip(itertools.pairwise(records), seen[:-1], strict=True):
        obs, first = (torch.cat([record[key], following[key][:4]]) for key in ("obs", "first"))
        nn.utils.vector_to_parameters(record["theta"], record["agent"].parameters())
        with torch.no_grad():
            agent = record["agent"]
            expected = agent.value(agent.features(obs, first, record["state"])).view(17, 4)
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
        last_first.append(first[-4:])
        assert (last_first[-1] == 0).any()
    assert torch.cat(last_first).sum() > 0


def test_separate_trunks_continue_their_own_states():
    """Actor and critic put out the same in one call of 2 T steps as in two calls of T steps."""
    steps, n = 7, 3
    agent, half = make_agent(lstm=True, share=False), steps * n
    obs, first, start = torch.randn(2 * half, 4), (torch.rand(2 * half) < 0.15).float(), torch.randn(n, 2, 2, 128)
    first[:n] = first[half : half + n] = 0
    assert first.sum() > 2

    def run(rows, state):
        features = agent.features(obs[rows], first[rows], state)
        return torch.cat([agent.policy(features)[0].flatten(1), agent.value(features)[:, None]], dim=1), features.state

    with torch.no_grad():
        whole, end = run(slice(None), start)
        before, middle = run(slice(half), start)
        after, end_of_two = run(slice(half, None), middle)
    torch.testing.assert_close(torch.cat([before, after]), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(end_of_two, end, atol=1e-5, rtol=1e-5)


def test_states_are_reset_where_an_episode_begins(trace):
    """The environment marks first observations; the step before each is the reset step, which is not learned from."""
    records = trace(tiny(lstm=True, num_steps=40, total_timesteps=3 * 160))
    first = torch.cat([record["first"].view(40, 4) for record in records])
    marks = torch.cat([record["obs"][:, 0].view(40, 4) for record in records])
    valid = torch.cat([record["valid"].view(40, 4) for record in records])
    assert torch.equal(first, marks)
    assert torch.equal(valid[:-1], 1 - first[1:])
    assert first[1:].sum() > 20


def test_detail_33_states_start_at_zero_and_after_a_checkpoint_too(trace):
    starts = [record["state"].abs().sum().item() for record in trace(tiny(lstm=True, checkpoint_every=2))]
    assert starts[0] == 0
    assert starts[1] > 0
    assert starts[2] == 0


def test_detail_35_minibatches_are_whole_environments(trace):
    orders = set()
    for record in trace(tiny(lstm=True)):
        for epoch in (record["updates"][:2], record["updates"][2:]):
            minibatches = [mb_inds.view(16, 2) for mb_inds, _ in epoch]
            for minibatch in minibatches:
                envs = minibatch[0]
                assert torch.equal(minibatch, torch.arange(16)[:, None] * 4 + envs)
            orders.add(tuple(torch.cat([minibatch[0] for minibatch in minibatches]).tolist()))
            assert sorted(torch.cat([m.flatten() for m in minibatches]).tolist()) == list(range(64))
    assert len(orders) > 2


@pytest.mark.parametrize("lstm", [True, False])
def test_first_update_has_ratio_one(lstm, trace):
    _, info = trace(tiny(lstm=lstm))[1]["updates"][0]
    assert abs(info["old_approx_kl"].item()) < 1e-6
    assert info["clipfrac"].item() == 0


def test_numpy_policy_continues_its_state():
    agent = make_agent(lstm=True, share=False)
    obs = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float32)
    policy, state = numpy_policy(agent), agent.initial_state(3)[:, 0].numpy()
    steps = []
    for x in obs:
        (logits,), state = policy(x, np.zeros(3, dtype=bool), state)
        steps.append(logits)
    with torch.no_grad():
        features = agent.features(torch.tensor(obs).flatten(0, 1), torch.zeros(15), agent.initial_state(3))
        torch.testing.assert_close(torch.tensor(np.concatenate(steps)), agent.policy(features)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(state), features.state[:, 0], atol=1e-5, rtol=0)


# learning


@pytest.mark.parametrize("lstm", [False, True])
def test_recall_needs_memory(lstm):
    args = tiny(
        env="Recall-v0",
        num_envs=16,
        num_steps=20,
        num_minibatches=2,
        update_epochs=4,
        total_timesteps=25 * 320,
        learning_rate=5e-3,
        lstm=lstm,
        eval_episodes=60,
        eval_deterministic=True,
    )
    score = np.mean(train(args)["evaluation"]["returns"])
    assert score > 0.95 if lstm else 0.3 < score < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("share", [True, False])
def test_cartpole(share):
    result = train(Args(run_dir="run", share_params=share, eval_episodes=0))
    assert result["episodic_return"] >= 475


# evaluation


@pytest.mark.parametrize("env", ["MaskedInfo-v0", "MaskedObservation-v0"])
def test_aux_action_masks_are_obeyed_in_evaluation(env):
    """The environment raises at an invalid action."""
    args = tiny(env=env, total_timesteps=64)
    train(args)
    for deterministic in (True, False):
        changed = dataclasses.replace(args, eval_episodes=8, eval_deterministic=deterministic)
        assert sum(evaluate(changed, read_checkpoint("run"))["lengths"]) > 20


@pytest.mark.parametrize("lstm", [False, True])
def test_evaluation_against_playing_by_hand(lstm):
    """Torch instead of numpy for the policy, one Gymnasium environment instead of a vector."""
    # with seed 3 some episodes end far out and others at the limit of 20 steps
    args = tiny(env="envs:Point-v0", discretize_actions=5, norm_obs="step", lstm=lstm, total_timesteps=128, seed=3)
    train(args)
    checkpoint = read_checkpoint("run")
    agent = Agent(2, (1, 5), lstm=lstm)
    nn.utils.vector_to_parameters(checkpoint["theta"], agent.parameters())
    with torch.no_grad():
        next(agent.actor.parameters()).mul_(100)  # so that actions vary
    checkpoint["theta"] = nn.utils.parameters_to_vector(agent.parameters()).detach()
    rms = {key: np.asarray(value) for key, value in checkpoint["obs_rms"].items()}
    returns, lengths, actions = [], [], []
    for seed in np.random.default_rng([args.seed, 2**31]).integers(2**31, size=8).tolist():
        env, state = gymnasium.make(args.env), agent.initial_state(1)
        obs, _ = env.reset(seed=seed)
        total, length, done = 0.0, 0, False
        while not done:
            x = (obs - rms["mean"]) / np.sqrt(rms["m2"] / rms["count"] + 1e-8)
            with torch.no_grad():
                features = agent.features(torch.tensor(x[None], dtype=torch.float32), torch.zeros(1), state)
                state = features.state
                actions.append(-1 + 0.5 * agent.policy(features)[0][:, 0].argmax(1).numpy())
            obs, reward, terminated, truncated, _ = env.step(actions[-1])
            total, length, done = total + float(reward), length + 1, terminated or truncated
        returns.append(total)
        lengths.append(length)
    assert len(np.unique(actions)) > 2
    assert len(set(lengths)) > 1
    args = dataclasses.replace(args, eval_episodes=8, eval_deterministic=True)  # four at a time
    played = sorted(range(8), key=lambda i: (i // 4, lengths[i]))  # each four in the order in which they end
    expected = {"returns": [returns[i] for i in played], "lengths": [lengths[i] for i in played]}
    assert evaluate(args, checkpoint) == expected | {"cut_off": 0, "deterministic": True, "problems": []}
    sampled = dataclasses.replace(args, eval_deterministic=Args.eval_deterministic)
    assert not sampled.eval_deterministic
    first, second = evaluate(sampled, checkpoint), evaluate(sampled, checkpoint)
    assert first == second
    assert first["returns"] != returns


def test_sampled_actions_of_an_evaluation_follow_the_policy():
    """Frequencies of a peaked policy within five standard errors."""
    p, n, agent = np.array([0.7, 0.2, 0.1]), 20_000, Agent(4, (1, 3))
    with torch.no_grad():
        for parameter, value in zip(agent.actor.parameters(), (torch.zeros(1), torch.tensor(p).log()), strict=True):
            parameter.copy_(value)
    theta, obs_rms = nn.utils.parameters_to_vector(agent.parameters()).detach(), ppo_shared_params.RunningMeanStd((4,))
    spaces = Spaces(Box(-np.inf, np.inf, (4,)), Discrete(3), 4)
    checkpoint = {"theta": theta, "obs_rms": obs_rms.state_dict()}
    policy = make_policy(tiny(), checkpoint, spaces, np.random.default_rng(0))
    frequencies = np.bincount(policy(np.ones((n, 4))), minlength=3) / n
    assert (np.abs(frequencies - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()


def test_load_policy_forgets_where_an_episode_begins():
    train(tiny(lstm=True))
    checkpoint = read_checkpoint("run")
    obs = np.random.default_rng(0).standard_normal((5, 64, 4)).astype(np.float32)
    assert load_policy("run")(obs[0]).shape == (64,)
    spaces = Spaces(Box(-np.inf, np.inf, (4,)), Discrete(3), 4)
    agent = Agent(4, (1, 3), lstm=True)
    nn.utils.vector_to_parameters(checkpoint["theta"], agent.parameters())
    with torch.no_grad():
        next(agent.actor.parameters()).mul_(100)  # so that actions vary
    checkpoint["theta"] = nn.utils.parameters_to_vector(agent.parameters()).detach()

    def play(first):
        policy = make_policy(tiny(lstm=True), checkpoint, spaces)
        return [policy(x, first=first).tolist() for x in obs]

    alone = [make_policy(tiny(lstm=True), checkpoint, spaces)(x).tolist() for x in obs]
    assert play(np.ones(64, dtype=bool)) == alone
    remembered = play(None)
    assert remembered[0] == alone[0]
    assert remembered[1:] != alone[1:]
    half = np.arange(64) < 32
    assert [x[:32] for x in play(half)] == [x[:32] for x in alone]
    assert [x[32:] for x in play(half)] == [x[32:] for x in remembered]
    assert play(half.astype(int)) == play(half.astype(float)) == play(half.tolist()) == play(half)


def test_a_policy_with_memory_refuses_another_number_of_environments():
    train(tiny(lstm=True))
    policy = load_policy("run")
    policy(np.zeros((2, 4)))
    for n in (1, 4):
        with pytest.raises(UsageError, match=f"the LSTM remembers 2 environments, and these are {n}: load it anew"):
            policy(np.zeros((n, 4)))
    assert "policy(observations, info, first)" in str(load_policy.__doc__)


def test_a_policy_whose_infos_hold_masks_does_not_act_without_them():
    train(tiny(env="MaskedInfo-v0"))
    policy = load_policy("run")
    obs, info = np.zeros((2, 4), np.float32), {"action_mask": np.tile(np.arange(8) % 2 == 0, (2, 1))}
    assert policy(obs, info).shape == (2, 2)
    with pytest.raises(UsageError, match=r"infos of this environment hold action masks: call policy\(observations, info\)"):
        policy(obs)


def test_a_policy_without_memory_takes_any_number_of_environments():
    train(tiny())
    policy = load_policy("run")
    assert [policy(np.zeros((n, 4))).shape for n in (2, 1, 4)] == [(2,), (1,), (4,)]


@pytest.mark.parametrize("place", ["dict", "tuple"])
def test_a_mask_deep_within_the_observation_is_refused(place):
    spaces = gymnasium.spaces
    inner = spaces.Dict(x=spaces.Box(-1, 1, (2,)), action_mask=spaces.MultiBinary(3))
    outer = spaces.Dict(a=inner) if place == "dict" else spaces.Tuple([inner])
    envs = SimpleNamespace(single_observation_space=outer, single_action_space=spaces.Discrete(3))
    with pytest.raises(UsageError, match="action_mask is deep within the observation: give a mask at its top, or in the info"):
        ppo_shared_params.Spaces.of(envs)


def test_masks_of_two_axes_that_one_environment_leaves_out():
    real, mask = np.ones((3, 3), dtype=bool), np.arange(6).reshape(2, 3) % 2
    info: Any = {"action_mask": np.array([None, None])}
    info["action_mask"][0] = (np.vstack([mask, [1, 1, 0]]),)
    masks = ppo_shared_params.read_masks(np.zeros((2, 1)), info, real)
    np.testing.assert_array_equal(masks[0], np.vstack([mask, [1, 1, 0]]).astype(bool))
    assert masks[1].all()


def test_a_mask_of_another_size_says_where_it_was_found():
    for shape, told in (((1, 3), "is no list of those"), ((2, 0), "a Gaussian policy has none")):
        told = f"masks of .16. entries, but there are {math.prod(shape)} choices: .*{told}.*; a mask that is no mask needs"
        with pytest.raises(UsageError, match=told):
            ppo_shared_params.read_masks(np.zeros((1, 1)), {"mask": np.ones((1, 4, 4))}, np.ones(shape, dtype=bool))


def test_a_policy_refuses_what_is_not_finite():
    train(tiny())
    with pytest.raises(NonFiniteError, match="returned a non-finite observation"):
        load_policy("run")(np.array([[0, 0, np.nan, 0]]))


# trial edits


FEATURES = "features = self.features(obs, first, state)\n        value"
TRAINS = {
    "hidden sizes": [("nn.Linear(obs_dim, 64)", "nn.Linear(obs_dim, 48)"), ("nn.Linear(64, 64)", "nn.Linear(48, 64)")],
    "ReLU": [("nn.Tanh()", "nn.ReLU()")],
    "LSTM without bias": [("nn.LSTMCell(64, LSTM_SIZE)", "nn.LSTMCell(64, LSTM_SIZE, bias=False)")],
    "two layers for the value": [("head(1, 1.0), head(", "nn.Sequential(head(8, 1.0), nn.Linear(8, 1)), head(")],
}
STOPS = {
    "activation": [("nn.Tanh()", "nn.SiLU()")],
    "features": [("policy = self.policy_trunk(obs)", "policy = 0.5 * self.policy_trunk(obs)")],
    "policy": [("out = self.actor(features.policy)", "out = 0.5 * self.actor(features.policy)")],
    "forward": [("logits, MASKED_LOGIT)", "0.5 * logits, MASKED_LOGIT)"), ("Normal(mean, std,", "Normal(mean, 0.5 * std,")],
    "forward, observations": [(FEATURES, FEATURES.replace("(obs", "(0.5 * obs"))],
    "numpy_policy": [("out = obs @ head[0]", "out = 0.5 * obs @ head[0]")],
    "observations limited to 1": [("self.policy_trunk(obs)", "self.policy_trunk(obs.clamp(-1, 1))")],
    "observations limited to 5": [("self.policy_trunk(obs)", "self.policy_trunk(obs.clamp(-5, 5))")],
}


@pytest.mark.parametrize("lstm", [False, True])
@pytest.mark.parametrize("env", ["RandomEndsMulti-v0", "RandomEndsBox-v0"])
@pytest.mark.parametrize("name", TRAINS)
def test_an_edit_that_trains(name, env, lstm):
    script: Any = edited(TRAINS[name], SCRIPT)
    script.train(script.Args(**TINY | {"run_dir": "run", "num_minibatches": 1, "update_epochs": 1, "env": env, "lstm": lstm}))
    for record in read_metrics("run")[1:]:
        assert abs(record["losses/approx_kl"]) < 1e-6
        assert record["losses/policy_loss"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("lstm", [False, True])
@pytest.mark.parametrize("env", ["RandomEndsMulti-v0", "RandomEndsBox-v0"])
@pytest.mark.parametrize("name", STOPS)
def test_an_edit_that_stops(name, env, lstm):
    script: Any = edited(STOPS[name], SCRIPT)
    with pytest.raises(script.UsageError, match=r"numpy_policy.* computes another policy|numpy_policy does not know SiLU"):
        script.train(script.Args(**TINY | {"run_dir": "run", "env": env, "lstm": lstm}))
    assert not Path("run").exists()


def test_an_edit_of_the_memory_alone_stops():
    script: Any = edited([("c = f * memory[:, 1] + i *", "c = 0.9 * f * memory[:, 1] + i *")], SCRIPT)
    with pytest.raises(script.UsageError, match=r"numpy_policy.* computes another policy"):
        script.train(script.Args(**TINY | {"run_dir": "run", "lstm": True}))
    assert not Path("run").exists()


def test_an_edit_that_leaves_out_the_mask_stops():
    script: Any = edited([("torch.where(mask, logits, MASKED_LOGIT)", "logits")], SCRIPT)
    with pytest.raises(script.UsageError, match=r"numpy_policy.* computes another policy"):
        script.train(script.Args(**TINY | {"run_dir": "run", "env": "MaskedInfo-v0"}))
    assert not Path("run").exists()


def test_an_edit_of_the_cell_without_its_gradient_stops():
    """In both places of the forward pass, so that the policies agree."""
    gate = "gates[:, 2 * LSTM_SIZE : 3 * LSTM_SIZE]"
    script: Any = edited([("g.tanh(), o", "g.relu(), o"), (f"i * np.tanh({gate})", f"i * np.maximum({gate}, 0)")], SCRIPT)
    with pytest.raises(script.UsageError, match=r"LSTMSteps.backward is not the gradient of LSTMSteps.forward"):
        script.train(script.Args(**TINY | {"run_dir": "run", "lstm": True}))
    assert not Path("run").exists()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(1, 4), (3, 5), (17, 0)])
def test_a_network_of_relu_with_many_inputs_is_not_refused(shape, seed):
    """Its outputs are large, so their rounding errors are, too."""
    script: Any = edited([("nn.Tanh()", "nn.ReLU()")], SCRIPT)
    torch.manual_seed(seed)
    for lstm in (False, True):
        script.numpy_policy(script.perturbed(script.Agent(376, shape, lstm=lstm)))


# runs


@pytest.mark.parametrize("lstm", [False, True])
def test_same_seed_same_numbers_and_resume_to_the_same_bit(lstm):
    flags: dict[str, Any] = {"env": "CartPole-v1", "lstm": lstm, "checkpoint_every": 2, "total_timesteps": 4 * 64}
    train(tiny("whole", **flags))
    train(tiny("other", **flags, seed=2))
    saved: list[Path] = []
    write_atomically = ppo_shared_params.write_atomically

    def keep(file, data):  # those of iterations 0, 2 and 4
        write_atomically(file, data)
        saved.append(Path(shutil.copy(file, f"checkpoint{len(saved)}.pt")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_shared_params, "write_atomically", keep)
        train(tiny("again", **flags))
    whole, again = read_checkpoint("whole"), read_checkpoint("again")
    assert equal(whole["theta"], again["theta"])
    assert read_metrics("whole") == read_metrics("again")
    assert not equal(whole["theta"], read_checkpoint("other")["theta"])
    shutil.copy(saved[1], "again/checkpoint.pt")  # as if killed after it
    train(tiny("again", **flags, resume="again"))
    resumed = read_checkpoint("again")
    assert equal(whole["theta"], resumed["theta"])
    assert equal(whole["adam"], resumed["adam"])
    assert read_metrics("whole") == read_metrics("again")
    assert whole["recent_returns"] == resumed["recent_returns"]
    assert 0 < len(torch.load(saved[1])["recent_returns"]) < len(whole["recent_returns"])  # some ended before the kill
    assert Path("whole/episodes.jsonl").read_bytes() == Path("again/episodes.jsonl").read_bytes()
    assert len(read_jsonl("whole/episodes.jsonl")) == len(whole["recent_returns"])


def test_result_has_the_mean_of_the_last_100_episodes():
    result = train(tiny(num_steps=64, total_timesteps=4 * 256))
    returns = [episode["return"] for episode in read_jsonl("run/episodes.jsonl")]
    assert len(returns) > 120
    assert result["episodes"] == 100
    assert result["episodic_return"] == pytest.approx(np.mean(returns[-100:]), rel=1e-9)


def test_renamed_copy_runs_alone():
    Path("elsewhere").mkdir()
    copy = shutil.copy(SCRIPT, "elsewhere/my_script.py")
    words = ["--env", "CartPole", "--total-timesteps", "512", "--no-compile", "--eval-episodes", "2", "--run-dir", "out"]
    run = run_script(*words, "--observe", "0", "2", script=copy, PYTHONPATH="")
    assert run.returncode == 0, run.stderr
    assert Path("out/my_script.py").read_text() == SCRIPT.read_text()
    assert read_metrics("out")[0]["args"]["observe"] == [0, 2]
    assert read_checkpoint("out")["theta"].numel() == 2 * 64 + 64 + 64 * 64 + 64 + 3 * 65


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"lstm": True, "num_minibatches": 8}, "num_envs = 4 does not divide"),
        ({"discretize_actions": 1}, "discretize_actions is 1"),
        ({"observe": (0, 0)}, "must be different"),
        ({"observe": (-1,)}, "at least 0"),
        ({"observe": (0, 7)}, "has 4 observation components"),
        ({"discretize_actions": 1002}, "discretize_actions is 1002: it must be at most 1001"),
        ({"env": "RandomEndsUnbounded-v0", "discretize_actions": 3}, "no finite bounds.*: leave out --discretize-actions"),
        ({"env": "RandomEndsParts-v0"}, r"action space is Dict.*: make it a Box or MultiDiscrete with .*ActionWrapper"),
        ({"env": "RandomEndsPairs-v0"}, r"action space is Tuple.*: make it a Box or MultiDiscrete with .*ActionWrapper"),
        ({"env": "RandomEndsHuge-v0"}, r"1 x 1000000000000 choices, more than a million: .*ActionWrapper"),
        ({"env": "RandomEndsBinary-v0", "discretize_actions": 3}, "is discrete already: leave out --discretize-actions"),
        ({"env": "RandomEndsManyChoices-v0", "num_steps": 2**20, "total_timesteps": 2**30}, r"need about .* GB of memory"),
        ({"env": "OnlyMask-v0"}, "nothing to observe but the action mask"),
        (
            {"env": "MaskMethod-v0"},
            r"has a method action_masks, which is not called: put its result into info\['action_mask'\]",
        ),
        *(({"env": f"Masked_{key}-v0"}, f"gives {key}: give its opposite.* as action_mask") for key in INVERSE_KEYS),
        ({"discretize_actions": 3}, "leave out --discretize-actions"),
        ({"env": "Cleaner-v0", "discretize_actions": 7}, "leave out --discretize-actions"),
        ({"env": "RandomEndsWide-v0"}, "more than 1000 values"),
        ({"env": "Minesweeper-v0"}, r"masks of \{100\} entries, but there are 20 choices"),
        ({"env": "Sudoku-v0"}, "cannot make environment Sudoku-v0: failed to open"),
        ({"env": "FrozenLake-v1", "capture_video": True, "eval_episodes": 1}, "needs an environment that draws itself"),
        ({"env": "ConnectFour-v1"}, "several players"),
        ({"env": "CartPoll"}, "nearest names: .*CartPole-v1"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"num_minibatches": 5}, "does not divide"),
    ],
    ids=str,
)
def test_bad_values_are_refused(flags, words):
    with pytest.raises(UsageError, match=words):
        train(tiny(**flags))
    assert not Path("run").exists()
