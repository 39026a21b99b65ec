"""compute_gae against the definition: a sum over the future, written out for every step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_continuous import compute_gae


def gae(rewards, values, terminated, truncated, gamma, gae_lambda, bootstrap_truncated=True) -> np.ndarray:
    """compute_gae of arrays or lists."""
    r, v, term, trunc = (torch.as_tensor(np.asarray(x), dtype=torch.float32) for x in (rewards, values, terminated, truncated))
    return compute_gae(r, v, term, trunc, gamma, gae_lambda, bootstrap_truncated).numpy()


def brute_force(rewards, values, terminated, truncated, gamma, gae_lambda, bootstrap_truncated):
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, up to and with the first step that ends the episode."""
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for i in range(N):
        for t in range(T):
            for k in range(T - t):
                s = t + k
                ends = terminated[s, i] or truncated[s, i]
                has_future = not terminated[s, i] if bootstrap_truncated else not ends
                delta = rewards[s, i] + (gamma * values[s + 1, i] if has_future else 0.0) - values[s, i]
                advantages[t, i] += (gamma * gae_lambda) ** k * delta
                if ends:
                    break
    return advantages


@st.composite
def rollouts(draw):
    T, N = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ends = rng.random((T, N)) < draw(st.sampled_from([0.0, 0.2, 0.6]))
    ends[1:] &= ~ends[:-1]  # the step after an end is a reset and ends nothing
    terminated = ends & (rng.random((T, N)) < 0.5)
    truncated = ends & (~terminated | (rng.random((T, N)) < 0.2))  # both at once is possible
    rewards, values = rng.normal(size=(T, N)) * 3, rng.normal(size=(T + 1, N)) * 3
    resets = np.zeros((T, N), dtype=bool)
    resets[1:] = ends[:-1]
    rewards[resets] = 0
    return rewards, values, terminated, truncated, resets


@given(rollouts(), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_brute_force(rollout, gamma, gae_lambda, bootstrap_truncated):
    rewards, values, terminated, truncated, resets = rollout
    expected = brute_force(rewards, values, terminated, truncated, gamma, gae_lambda, bootstrap_truncated)
    advantages = gae(rewards, values, terminated, truncated, gamma, gae_lambda, bootstrap_truncated)
    assert advantages.dtype == np.float32
    assert advantages.shape == rewards.shape
    np.testing.assert_allclose(advantages[~resets], expected[~resets], rtol=1e-4, atol=1e-4)


@given(rollouts(), st.floats(-1e6, 1e6, width=32))
def test_rewards_of_reset_steps_change_no_bit(rollout, garbage):
    rewards, values, terminated, truncated, resets = rollout
    clean = gae(rewards, values, terminated, truncated, 0.99, 0.95)
    rewards[resets] = garbage
    dirty = gae(rewards, values, terminated, truncated, 0.99, 0.95)
    assert np.array_equal(clean[~resets], dirty[~resets])


def test_worked_example():
    rewards, values = [[1], [2], [-1], [3]], [[0], [1.5], [2], [1], [0]]
    none = np.zeros((4, 1))
    deltas = gae(rewards, values, none, none, 0.9, 0.0)
    np.testing.assert_allclose(deltas[:, 0], [2.35, 2.3, -2.1, 2.0], rtol=1e-6)
    advantages = gae(rewards, values, none, none, 0.9, 0.8)
    np.testing.assert_allclose(advantages[:, 0], [3.664, 1.825, -0.66, 2.0], atol=5e-4)


def test_lambda_1_is_monte_carlo_and_lambda_0_is_one_step_td():
    rng = np.random.default_rng(0)
    rewards, values, none = rng.normal(size=(6, 2)), rng.normal(size=(7, 2)), np.zeros((6, 2))
    monte_carlo = gae(rewards, values, none, none, 0.9, 1.0)
    future = values[6]
    for t in range(5, -1, -1):
        future = rewards[t] + 0.9 * future
        np.testing.assert_allclose(monte_carlo[t], future - values[t], rtol=1e-5, atol=1e-5)
    one_step = gae(rewards, values, none, none, 0.9, 0.0)
    np.testing.assert_allclose(one_step, rewards + 0.9 * values[1:] - values[:-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("terminated", "truncated", "bootstrap_truncated", "expected"),
    [
        (1, 0, True, 1.0 - 5.0),  # a termination has no future
        (0, 1, True, 1.0 + 0.9 * 7.0 - 5.0),  # a time limit has one
        (0, 1, False, 1.0 - 5.0),  # except as in 2017
        (1, 1, True, 1.0 - 5.0),  # both at once: the termination counts
        (0, 0, False, 1.0 + 0.9 * 7.0 - 5.0 + 0.9 * 0.8 * (100.0 + 0.9 * 11.0 - 7.0)),
    ],
)
def test_kinds_of_end(terminated, truncated, bootstrap_truncated, expected):
    ends = [[terminated], [0]], [[truncated], [0]]
    advantages = gae([[1], [100]], [[5], [7], [11]], *ends, 0.9, 0.8, bootstrap_truncated)
    assert advantages[0, 0].item() == pytest.approx(expected)
