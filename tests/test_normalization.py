"""Running statistics of observations and discounted returns against direct computations over all data seen."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import envs
import ppo_continuous
from helpers import read_checkpoint, read_jsonl, tiny_args
from ppo_continuous import RunningMeanStd, normalize_obs, scale_rewards, train


def moments(x):
    """Mean and variance of x (n, ...) and of the prior: weight 1e-4, mean 0, variance 1."""
    n, prior = len(x), 1e-4
    mean = x.sum(axis=0) / (n + prior)
    return mean, (prior * (1 + mean**2) + ((x - mean) ** 2).sum(axis=0)) / (n + prior)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=12), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 1e3]))
def test_running_mean_std(sizes, seed, offset):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(offset, [0.01, 1.0, 30.0], (size, 3)) for size in sizes]
    rms = RunningMeanStd((3,))
    for part in parts:
        rms.update(part)
    mean, var = moments(np.concatenate(parts))
    assert rms.mean.dtype == rms.var.dtype == np.float64
    assert rms.count == pytest.approx(sum(sizes) + 1e-4)
    np.testing.assert_allclose(rms.mean, mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(rms.var, var, rtol=1e-6, atol=1e-9)


def test_running_mean_std_starts_at_mean_0_variance_1_and_survives_the_checkpoint():
    rms = RunningMeanStd((2,))
    np.testing.assert_array_equal(rms.mean, 0)
    np.testing.assert_array_equal(rms.var, 1)
    rms.update(np.arange(10.0).reshape(5, 2))
    other = RunningMeanStd(())
    other.load_state_dict(rms.state_dict())
    for x in (rms, other):
        x.update(np.ones((1, 2)))
    assert np.array_equal(rms.mean, other.mean)
    assert np.array_equal(rms.var, other.var)
    assert rms.count == other.count


@st.composite
def reward_rollouts(draw):
    T, N, rollouts = draw(st.integers(1, 10)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    done = rng.random((T * rollouts, N)) < draw(st.sampled_from([0.0, 0.2, 0.5]))
    done[1:] &= ~done[:-1]
    valid = np.ones((T * rollouts, N), dtype=bool)
    valid[1:] = ~done[:-1]
    rewards = rng.normal(2, 5, (T * rollouts, N)) * valid
    return T, rewards, done, valid


@given(reward_rollouts(), st.floats(0, 1))
def test_scale_rewards_against_a_loop_over_all_returns_seen(rollout, gamma):
    T, rewards, done, valid = rollout
    steps, N = rewards.shape
    rms, discounted_return, scaled = RunningMeanStd(()), np.zeros(N), []
    for start in range(0, steps, T):
        part = slice(start, start + T)
        out, discounted_return = scale_rewards(rewards[part], done[part], valid[part], discounted_return, rms, gamma)
        scaled.append(out)
    running, seen = np.zeros(N), []
    expected = np.zeros_like(rewards)
    for t in range(steps):
        for i in range(N):
            if valid[t, i]:
                running[i] = running[i] * gamma + rewards[t, i]
                seen.append(running[i])
        expected[t] = rewards[t] / np.sqrt(moments(np.array(seen))[1] + 1e-8)
        running[done[t]] = 0
    np.testing.assert_allclose(np.concatenate(scaled), expected, rtol=1e-6, atol=1e-9)
    mean, var = moments(np.array(seen))
    assert rms.count == pytest.approx(len(seen) + 1e-4)
    assert rms.mean == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert rms.var == pytest.approx(var, rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(discounted_return, running, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 5.0, 10.0, np.inf]))
def test_normalize_obs(seed, clip_obs):
    rng = np.random.default_rng(seed)
    data, obs = rng.normal(3, 2, (50, 4)), rng.normal(3, 30, (6, 4))
    rms = RunningMeanStd((4,))
    rms.update(data)
    mean, var = moments(data)
    normalized = normalize_obs(obs, rms, tiny_args(clip_obs=clip_obs))
    assert normalized.dtype == np.float32
    expected = np.clip((obs - mean) / np.sqrt(var + 1e-8), -clip_obs, clip_obs)
    np.testing.assert_allclose(normalized, expected, rtol=1e-5, atol=1e-6)
    unnormalized = normalize_obs(obs, rms, tiny_args(clip_obs=clip_obs, norm_obs="none"))
    np.testing.assert_allclose(unnormalized, np.clip(obs, -clip_obs, clip_obs), rtol=1e-6)


def test_an_observation_that_never_changes_is_normalized_to_0():
    rms = RunningMeanStd((1,))
    for _ in range(1000):
        rms.update(np.full((1, 1), 5.0))
    assert abs(normalize_obs(np.full((1, 1), 5.0), rms, tiny_args())[0, 0]) < 0.1


@pytest.fixture
def record():
    """Everything that each RandomEnds environment returns from now on."""
    envs.RandomEnds.record.clear()
    return envs.RandomEnds.record


@pytest.mark.parametrize("norm_obs", ["step", "batch"])
def test_statistics_of_a_run_against_everything_the_environments_returned(record, norm_obs):
    args = tiny_args(
        env="envs:RandomEnds-v0", num_envs=3, num_steps=20, num_minibatches=1, total_timesteps=240, norm_obs=norm_obs
    )
    train(args)
    histories = [history for history in record if len(history) > 1]
    assert len(histories) == 3
    assert all(len(history) == 81 for history in histories)  # first reset, then 80 steps, resets among them
    saved = read_checkpoint("run")

    # observations: all of them, also those of resets; with "batch" all but the last, which no update has seen
    obs = np.concatenate([[obs for obs, *_ in (h if norm_obs == "step" else h[:-1])] for h in histories]).astype(float)
    mean, var = moments(obs)
    assert saved["obs_rms"]["count"] == pytest.approx(len(obs) + 1e-4)
    np.testing.assert_allclose(saved["obs_rms"]["mean"], mean, rtol=1e-9)
    np.testing.assert_allclose(saved["obs_rms"]["m2"] / saved["obs_rms"]["count"], var, rtol=1e-9)

    # discounted returns: of steps only, from zero in each episode; episodes: raw rewards, steps without the reset
    returns, episodes = [], []
    for history in histories:
        running, raw, length = 0.0, 0.0, 0
        for step, (_, reward, terminated, truncated) in enumerate(history):
            if reward is None:
                continue
            running, raw, length = running * args.gamma + reward, raw + reward, length + 1
            returns.append(running)
            if terminated or truncated:
                episodes.append({"global_step": 3 * step, "return": raw, "length": length})
                running, raw, length = 0.0, 0.0, 0
    mean, var = moments(np.array(returns))
    assert len(returns) < 240 - 20  # there were resets
    assert saved["return_rms"]["count"] == pytest.approx(len(returns) + 1e-4)
    assert saved["return_rms"]["mean"].item() == pytest.approx(mean)
    assert saved["return_rms"]["m2"].item() / saved["return_rms"]["count"] == pytest.approx(var)

    def key(episode):
        return episode["global_step"], episode["length"], episode["return"]

    logged = sorted(read_jsonl("run/episodes.jsonl"), key=key)
    assert len(logged) == len(episodes) > 20
    for got, expected in zip(logged, sorted(episodes, key=key), strict=True):
        assert got == {**expected, "return": pytest.approx(expected["return"])}


def test_without_the_switches_the_statistics_stay_as_they_are():
    train(tiny_args(norm_obs="none", norm_reward=False))
    saved = read_checkpoint("run")
    for name in ("obs_rms", "return_rms"):
        assert saved[name]["count"] == 1e-4
        assert torch.all(saved[name]["mean"] == 0)


class GarbageInResets:
    """Of a vectorized environment: another action goes into reset steps, and another reward comes out of them."""

    resets = 0

    def __init__(self, vector_env):
        self.vector_env = vector_env
        self.done = np.zeros(vector_env.num_envs, dtype=bool)

    def __getattr__(self, name):
        return getattr(self.vector_env, name)

    def step(self, action):
        action = np.where(self.done[:, None], 0.5, action).astype(np.float32)
        obs, reward, terminated, truncated, info = self.vector_env.step(action)
        assert not reward[self.done].any()
        GarbageInResets.resets += int(self.done.sum())
        reward = np.where(self.done, 777.0, reward)
        self.done = terminated | truncated
        return obs, reward, terminated, truncated, info


def test_garbage_rewards_and_actions_of_reset_steps_change_no_bit_of_a_run(monkeypatch):
    train(tiny_args("clean"))
    make_envs = ppo_continuous.make_envs

    def make_dirty_envs(*args, **options):
        vector_env, *first = make_envs(*args, **options)
        return GarbageInResets(vector_env), *first

    monkeypatch.setattr(ppo_continuous, "make_envs", make_dirty_envs)
    train(tiny_args("dirty"))
    assert GarbageInResets.resets > 5
    clean, dirty = read_checkpoint("clean"), read_checkpoint("dirty")
    assert read_jsonl("clean/episodes.jsonl") == read_jsonl("dirty/episodes.jsonl")
    assert clean["obs_rms"]["m2"].tolist() == dirty["obs_rms"]["m2"].tolist()
    assert clean["return_rms"] == dirty["return_rms"]
    assert torch.equal(clean["theta"], dirty["theta"])
