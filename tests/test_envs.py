"""What the script assumes of envpool and Gymnasium, and which environments its names mean."""

import random

import gymnasium
import numpy as np
import pytest
import torch

import envs as test_envs
from ppo_continuous import UsageError, find_env, make_envs, make_seeds, make_step


@pytest.mark.parametrize(
    ("name", "count", "steps"),
    [
        ("HalfCheetah", 1, 1005),  # across the time limit
        ("Hopper", 2, 300),
        ("Walker2d", 3, 150),
        ("InvertedPendulum", 1, 100),
        ("InvertedDoublePendulum", 2, 100),
        ("Reacher", 2, 110),
        ("Swimmer", 1, 50),
        ("envs:Point-v0", 2, 60),
    ],
)
def test_make_step_equals_step(name, count, steps):
    seeds = list(range(7, 7 + count))
    (a, first_a, _), (b, first_b, _) = (make_envs(name, seeds, 1) for _ in range(2))
    np.testing.assert_array_equal(first_a, first_b)
    step, rng, ends = make_step(a), np.random.default_rng(0), 0
    for _ in range(steps):
        action = rng.uniform(-1, 1, (count, *a.single_action_space.shape)).astype(np.float32)
        fast, slow = step(action), b.step(action)[:4]
        for got, expected in zip(fast, slow, strict=True):
            np.testing.assert_array_equal(got, expected)
        ends += int((fast[2] | fast[3]).sum())
    assert (ends > 0) == (name != "Swimmer")
    a.close()
    b.close()


def test_a_time_limit_is_a_truncation_and_a_fall_a_termination():
    envs, *_ = make_envs("HalfCheetah", [1], 1)
    step, action = make_step(envs), np.zeros((1, 6), np.float32)
    for t in range(1000):
        _, _, terminated, truncated = step(action)
        assert not terminated[0]
        assert truncated[0] == (t == 999)
    envs, *_ = make_envs("InvertedPendulum", [1], 1)
    step, action = make_step(envs), np.ones((1, 1), np.float32)
    for _ in range(1000):
        _, _, terminated, truncated = step(action)
        assert not truncated[0]
        if terminated[0]:
            break
    assert terminated[0]


@pytest.mark.parametrize("name", ["Hopper", "InvertedPendulum", "envs:Point-v0"])
def test_the_step_after_an_end_only_resets(name):
    """It ignores its action, its reward is 0, it ends nothing, and its observation begins an episode."""
    (a, first, _), (b, *_) = (make_envs(name, [3, 4], 1) for _ in range(2))
    shape, resets, rng = (2, *a.single_action_space.shape), 0, np.random.default_rng(0)
    done, last = np.zeros(2, dtype=bool), first
    for _ in range(300):
        action = np.ones(shape, np.float32) * rng.uniform(0.3, 1, shape).astype(np.float32)
        other = np.where(done.reshape(2, *[1] * (len(shape) - 1)), -action, action)
        obs, reward, terminated, truncated, _ = a.step(action)
        other_obs, other_reward, *_ = b.step(other)
        np.testing.assert_array_equal(obs, other_obs)
        np.testing.assert_array_equal(reward, other_reward)
        for i in np.flatnonzero(done):
            resets += 1
            assert reward[i] == 0
            assert not (terminated[i] or truncated[i])
            assert np.abs(obs[i] - first[i]).max() < 2.1  # near where episodes begin
            assert not np.array_equal(obs[i], last[i])
        done, last = terminated | truncated, obs
    assert resets > 5


def test_the_observation_of_a_truncation_is_the_final_one():
    envs, *_ = make_envs("envs:Point-v0", [5], 1)
    twin = test_envs.Point()
    twin.reset(seed=5)
    action = np.full((1, 1), 0.1, np.float32)
    for _ in range(20):
        obs, _, terminated, truncated, _ = envs.step(action)
        expected, _, expected_terminated, _, _ = twin.step(action[0])
        np.testing.assert_array_equal(obs[0], expected)
        assert terminated[0] == expected_terminated
        if terminated[0] or truncated[0]:
            break
    else:
        pytest.fail("the episode did not end")


@pytest.mark.parametrize("name", ["HalfCheetah", "Hopper", "envs:Point-v0"])
def test_environments_start_apart_and_the_same_again(name):
    seeds = make_seeds(1, 1, 4)
    _, first, _ = make_envs(name, seeds, 1)
    _, again, _ = make_envs(name, seeds, 1)
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first, axis=0)) == 4
    _, other, _ = make_envs(name, make_seeds(2, 1, 4), 1)
    assert not np.isin(other, first).all()


def test_seeds():
    assert make_seeds(1, 2, 8) == make_seeds(1, 2, 8)
    seen = [seed for args in ((1, 0), (1, 1), (2, 0), (2, 1)) for seed in make_seeds(*args, 8)]
    assert len(set(seen)) == 32
    assert all(0 <= seed < 2**31 for seed in seen)
    draws = []
    for seed, iteration in ((5, 6), (5, 6), (5, 7), (6, 6)):
        make_seeds(seed, iteration, 1)
        draws.append((random.random(), np.random.random(), torch.rand(()).item()))
    assert draws[0] == draws[1]
    for of_one_generator in zip(*draws[1:], strict=True):
        assert len(set(of_one_generator)) == 3, "draws that do not depend on both the seed and the iteration"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("HalfCheetah", ("HalfCheetah-v4", True)),
        ("HalfCheetah-v4", ("HalfCheetah-v4", True)),
        ("HalfCheetah-v5", ("HalfCheetah-v5", True)),
        ("Pendulum", ("Pendulum-v1", True)),
        ("Point", ("Point-v0", False)),
        ("my_module:MyEnv-v0", ("my_module:MyEnv-v0", False)),
    ],
)
def test_find_env(name, found):
    assert find_env(name) == found


def test_find_env_prefers_version_4_and_takes_the_newest_otherwise():
    for version in (2, 4, 10):
        gymnasium.register(f"Versions-v{version}", "envs:Point")
    for version in (2, 10):
        gymnasium.register(f"OtherVersions-v{version}", "envs:Point")
    assert find_env("Versions")[0] == "Versions-v4"
    assert find_env("OtherVersions")[0] == "OtherVersions-v10"


def test_find_env_names_what_is_near():
    with pytest.raises(UsageError, match=r"unknown environment HalfCheeta; nearest names: .*HalfCheetah-v"):
        find_env("HalfCheeta")


def test_environment_of_a_module_in_the_current_directory(tmp_path):
    (tmp_path / "my_own_module.py").write_text(
        "import gymnasium\nfrom envs import Point\ngymnasium.register('MyEnv-v0', Point, max_episode_steps=3)\n"
    )
    envs, obs, _ = make_envs("my_own_module:MyEnv-v0", [1, 2], 1)
    assert obs.shape == (2, 2)
    step = make_step(envs)
    truncated = [step(np.zeros((2, 1), np.float32))[3].tolist() for _ in range(4)]
    assert truncated == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]
