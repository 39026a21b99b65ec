"""Tiny Gymnasium environments whose dynamics, values and returns are known; registered when imported, as envs:NAME-v0."""

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

TIME_LIMIT = 8  # of ConstantReward


class Point(gymnasium.Env):
    """A point pushed along a line: obs (position, velocity), reward -position^2, terminated far out, limit 20 steps."""

    def __init__(self, render_mode: str | None = None):
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (2,)), Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2)
        return self.state.astype(np.float32), {}

    def step(self, action):
        position, velocity = self.state
        velocity = 0.9 * velocity + 0.3 * float(action[0])
        position += 0.3 * velocity
        self.state = np.array([position, velocity])
        return self.state.astype(np.float32), -(position**2), bool(abs(position) > 1.5), False, {}


class ConstantReward(gymnasium.Env):
    """Reward 1 at every step and no termination; obs: one-hot (8,) of the time, the final observation as the one before."""

    def __init__(self):  # no render_mode, as in many environments of users
        self.observation_space, self.action_space = Box(0, 1, (TIME_LIMIT,)), Box(-1, 1, (1,))

    def observe(self):
        return np.eye(TIME_LIMIT, dtype=np.float32)[min(self.time, TIME_LIMIT - 1)]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        return self.observe(), 1.0, False, False, {}


class NaNAfter(gymnasium.Env):
    """Returns NaN in observation or reward from the given step on, counted over all instances of the process."""

    steps_taken = 0

    def __init__(self, after: int, where: str):
        self.after, self.where = after, where
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (1,)), Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        NaNAfter.steps_taken += 1
        bad = np.nan if NaNAfter.steps_taken > self.after else 1.0
        obs = np.full(1, bad if self.where == "observation" else 1.0, np.float32)
        return obs, bad if self.where == "reward" else 1.0, False, False, {}


class RandomEnds(gymnasium.Env):
    """Ends by termination or truncation at random; all that it ever returned stands in `record`, one list an instance.

    A reset is recorded as (obs, None, False, False), a step as (obs, reward, terminated, truncated).
    """

    record: ClassVar[list[list[tuple[np.ndarray, float | None, bool, bool]]]] = []

    def __init__(self, render_mode: str | None = None):
        self.observation_space, self.action_space = Box(-np.inf, np.inf, (3,)), Box(-1, 1, (2,))
        self.history: list[tuple[np.ndarray, float | None, bool, bool]] = []
        self.record.append(self.history)

    def draw(self):
        return (5 + 3 * self.np_random.standard_normal(3)).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        obs = self.draw()
        self.history.append((obs, None, False, False))
        return obs, {}

    def step(self, action):
        obs, reward = self.draw(), float(self.np_random.normal(2.0, 4.0))
        terminated, truncated = bool(self.np_random.random() < 0.15), bool(self.np_random.random() < 0.15)
        self.history.append((obs, reward, terminated, truncated))
        return obs, reward, terminated, truncated, {}


class Identity(gymnasium.Env):
    """Reward -(action - obs)^2, obs uniform in [-1, 1], 8 steps an episode: solved by action = obs. Draws itself."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        self.observation_space, self.action_space = Box(-1, 1, (1,)), Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        self.obs = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        reward = -float((action[0] - self.obs[0]) ** 2)
        self.time += 1
        self.obs = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.obs, reward, self.time == 8, False, {}

    def render(self):
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:, round(63 * (float(self.obs[0]) + 1) / 2)] = 255
        return picture


class DiscreteActions(Identity):
    """Has an action space that the continuous script must refuse."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode)
        self.action_space: Any = Discrete(3)


class IntegerActions(Identity):
    """Has a Box of integers, which the continuous script must refuse."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode)
        self.action_space = Box(0, 5, (1,), np.int64)


class StrictActions(Identity):
    """Refuses what its action space does not contain, such as numbers of a wider type."""

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action)


class DrawsFloats(Identity):
    """Its picture is no array of bytes."""

    def render(self):
        return super().render() / 255


class DrawsWithoutPygame(Identity):
    """Draws like Gymnasium's own environments where pygame is missing."""

    def render(self):
        raise gymnasium.error.DependencyNotInstalled("pygame is not installed")


class DiscreteObservations(Identity):
    """Has an observation space that the continuous script must refuse."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode)
        self.observation_space: Any = Discrete(3)


register: Any = gymnasium.register
register("Point-v0", Point, max_episode_steps=20)
register("ConstantReward-v0", ConstantReward, max_episode_steps=TIME_LIMIT)
register("NaNObservation-v0", NaNAfter, kwargs={"after": 40, "where": "observation"})
register("NaNReward-v0", NaNAfter, kwargs={"after": 40, "where": "reward"})
register("RandomEnds-v0", RandomEnds)
register("Identity-v0", Identity)
register("DiscreteActions-v0", DiscreteActions)
register("DiscreteObservations-v0", DiscreteObservations)
register("IntegerActions-v0", IntegerActions)
register("StrictActions-v0", StrictActions)
register("DrawsFloats-v0", DrawsFloats)
register("DrawsWithoutPygame-v0", DrawsWithoutPygame)
