"""Environments as users have them; registered when imported, as odd_envs:NAME-v0, with Box or Discrete actions.

A class attribute says what goes wrong, so that a test can change it between two runs.
"""

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


class Odd(gymnasium.Env):
    """Reward 1 a step, 10 steps an episode, observations drawn from [-1, 1]."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}
    obs_dim = 4
    action_dim = 2
    limit = 10
    single = False  # only one instance may live
    alive: ClassVar[int] = 0
    most_alive: ClassVar[int] = 0
    info: ClassVar[Any] = None  # step -> info
    bad: ClassVar[Any] = None  # (step of the process, observation or reward there)
    steps: ClassVar[int] = 0
    pictures = 10**9  # that it draws before it fails
    camera_error: ClassVar[Exception | None] = None  # how it fails; none: it returns None
    closed: ClassVar[int] = 0
    fail_at_close = 0  # the number of the close that fails; 0: none
    commands: ClassVar[list] = []

    def __init__(self, discrete: bool = False, render_mode: str | None = None):
        if Odd.single and Odd.alive:
            raise RuntimeError("the simulator is running already")
        Odd.alive += 1
        Odd.most_alive = max(Odd.most_alive, Odd.alive)
        self.render_mode = render_mode
        self.observation_space = Box(-np.inf, np.inf, (Odd.obs_dim,), np.float64)
        self.action_space: Any = Discrete(Odd.action_dim) if discrete else Box(-1, 1, (Odd.action_dim,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.np_random.uniform(-1, 1, Odd.obs_dim), {}

    def step(self, action):
        if not np.isfinite(action).all():
            raise RuntimeError("the simulator got a command that is not finite")
        Odd.steps += 1
        self.time += 1
        obs, reward = self.np_random.uniform(-1, 1, Odd.obs_dim), 1.0
        if Odd.bad and Odd.steps == Odd.bad[0]:
            obs, reward = (obs, Odd.bad[2]) if Odd.bad[1] == "reward" else (np.full(Odd.obs_dim, Odd.bad[2]), reward)
        return obs, reward, self.time >= Odd.limit, False, Odd.info(self.time) if Odd.info else {}

    def render(self):
        Odd.pictures -= 1
        if Odd.pictures < 0 and Odd.camera_error:
            raise Odd.camera_error
        return np.zeros((8, 8, 3), np.uint8) if Odd.pictures >= 0 else None

    def close(self):
        Odd.alive -= 1
        Odd.closed += 1
        if Odd.closed == Odd.fail_at_close:
            raise RuntimeError("the simulator has gone")


class Blind(Odd):
    """Observes nothing."""

    def __init__(self, render_mode: str | None = None):
        super().__init__()
        self.observation_space = Dict({})


class OldReset(Odd):
    """The reset of the Gym before 0.26."""

    def reset(self, *, seed=None, options=None) -> Any:
        return super().reset(seed=seed, options=options)[0]


class Wrong(Odd):
    """Does not keep to gymnasium's API; `how` says where."""

    def __init__(self, how: str, discrete: bool = False, render_mode: str | None = None):
        super().__init__(discrete, render_mode)
        self.how = how
        if how == "constructor":
            raise AssertionError
        if how == "spaces":
            del self.observation_space

    def reset(self, *, seed=None, options=None) -> Any:
        obs, info = super().reset(seed=seed, options=options)
        return (obs[:3] if self.how == "reset" else obs), info

    def step(self, action) -> Any:
        obs, reward, *ended, info = super().step(action)
        if self.how == "four values":
            return obs, reward, ended[0], info
        return obs[:3] if self.how == "step" else obs, np.ones(1) if self.how == "reward" else reward, *ended, info


class NoSeed(Odd):
    def reset(self) -> Any:  # type: ignore[override]
        return super().reset(seed=1)


HOWS = ("constructor", "spaces", "reset", "four values", "step", "reward")
for discrete in (False, True):
    ending = "Discrete-v0" if discrete else "-v0"
    gymnasium.register(f"NoSeed{ending}", entry_point="odd_envs:NoSeed", kwargs={"discrete": discrete})
    for how in HOWS:
        kwargs = {"discrete": discrete, "how": how}
        gymnasium.register(f"Wrong_{how.replace(' ', '_')}{ending}", entry_point="odd_envs:Wrong", kwargs=kwargs)
gymnasium.register("OldReset-v0", entry_point="odd_envs:OldReset", kwargs={"discrete": False})
gymnasium.register("OldResetDiscrete-v0", entry_point="odd_envs:OldReset", kwargs={"discrete": True})
gymnasium.register("Blind-v0", entry_point="odd_envs:Blind")
gymnasium.register("Odd-v0", entry_point="odd_envs:Odd", kwargs={"discrete": False})
gymnasium.register("OddDiscrete-v0", entry_point="odd_envs:Odd", kwargs={"discrete": True})
gymnasium.register("odd/Space-v0", entry_point="odd_envs:Odd", kwargs={"discrete": False})
