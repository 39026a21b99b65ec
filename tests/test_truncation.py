"""A time limit is no termination: the value of a constant reward of 1 under a time limit has a closed form."""

import numpy as np
import pytest
import torch
from torch import nn

from envs import TIME_LIMIT
from helpers import read_checkpoint, tiny_args
from ppo_continuous import Agent, train

GAMMA = 0.9


@pytest.mark.parametrize("bootstrap_truncated", [True, False])
def test_learned_value(bootstrap_truncated):
    """r / (1 - gamma) = 10 at any time with the bootstrap; without it the discounted sum of the rewards that are left."""
    train(
        tiny_args(
            env="envs:ConstantReward-v0",
            bootstrap_truncated=bootstrap_truncated,
            num_envs=1,
            num_steps=60,
            num_minibatches=1,
            update_epochs=10,
            total_timesteps=60 * 30,
            learning_rate=1e-2,
            gamma=GAMMA,
            gae_lambda=1.0,
            clip_vloss=False,
            max_grad_norm=np.inf,
            norm_obs="none",
            norm_reward=False,
        )
    )
    agent = Agent(TIME_LIMIT, 1)
    nn.utils.vector_to_parameters(read_checkpoint("run")["theta"], agent.parameters())
    with torch.no_grad():
        learned = agent.value(torch.eye(TIME_LIMIT)).numpy()
    time_left = TIME_LIMIT - np.arange(TIME_LIMIT)
    expected = np.full(TIME_LIMIT, 1 / (1 - GAMMA)) if bootstrap_truncated else (1 - GAMMA**time_left) / (1 - GAMMA)
    np.testing.assert_allclose(learned, expected, rtol=0.04)
