"""It learns: an environment that random actions fail and a trained policy solves, in seconds."""

import numpy as np
import pytest

from helpers import tiny_args
from ppo_continuous import train


def test_identity():
    """Return of an episode of 8 steps: about -10 with random actions, 0 at best."""
    args = tiny_args(
        env="envs:Identity-v0",
        num_envs=4,
        num_steps=64,
        num_minibatches=4,
        update_epochs=4,
        total_timesteps=256 * 25,
        learning_rate=5e-3,
        gamma=0.5,
        eval_episodes=20,
    )
    result = train(args)
    assert np.mean(result["evaluation"]["returns"]) > -0.3
    assert set(result["evaluation"]["lengths"]) == {8}


@pytest.mark.slow
def test_inverted_pendulum():
    args = tiny_args(
        env="InvertedPendulum",
        num_envs=8,
        num_steps=128,
        num_minibatches=16,
        update_epochs=10,
        total_timesteps=120_000,
        eval_episodes=10,
    )
    assert np.mean(train(args)["evaluation"]["returns"]) > 800
