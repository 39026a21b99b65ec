"""What people do to a copy of ppo_continuous.py, and the observation spaces of their environments.

An edit trains the policy that acts, or stops with a sentence before there is a run directory.
"""

import math
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

import ppo_continuous
from helpers import TINY, edited, read_checkpoint, read_jsonl, read_metrics, tiny_args, tiny_flags
from ppo_continuous import Agent, UsageError, flatten_obs, make_envs, train

# places of the script
STATE = '            "global_step": self.global_step,\n'
RUN_DIR = '    run_dir: str = ""'
FIRST, SECOND, LAST = "nn.Linear(obs_dim, 64)", "nn.Linear(64, 64)", "nn.Linear(64, out_dim)"
CRITIC = "        self.critic = mlp(1, 1.0)  # [detail 13] [detail 26] shares nothing with the policy\n"
ACTOR = "        self.actor = mlp(action_dim if state_independent_std else 2 * action_dim, 0.01)\n"
MEAN, VALUE, STD = "self.actor(obs), self.log_std", "self.critic(obs).squeeze(1)", "log_std.expand_as(mean).exp()"
BATCH_NORM = "nn.Sequential(nn.BatchNorm1d(obs_dim), mlp(1, 1.0))"
DENSITY = "Normal(*self.policy(obs), validate_args=False)"
COPIED = "in agent.actor.named_modules(remove_duplicate=False):"

SCALED = ("            return obs, std\n", "            return obs / agent.scale, std\n")
LISTED = "self.critic[1](self.critic[0](obs)).squeeze(1)"

SECOND_CRITIC = (CRITIC, CRITIC + CRITIC.replace("critic", "critic2"))
OBJECTIVE = """    policy_objective = ratio * old.advantage - old.advantage.abs() * (ratio - 1) ** 2 / (2 * clip_coef)
    squared_error = (new"""
TRUNK = [
    (CRITIC, "        self.trunk = nn.Sequential(nn.Linear(obs_dim, 64), nn.Tanh())\n        self.critic = nn.Linear(64, 1)\n"),
    (ACTOR, "        self.actor = nn.Linear(64, action_dim)\n"),
    (MEAN, "self.actor(self.trunk(obs)), self.log_std"),
    (VALUE, "self.critic(self.trunk(obs)).squeeze(1)"),
]
ENCODER = [
    (CRITIC, "        self.encoder = nn.Linear(obs_dim, obs_dim)\n" + CRITIC),
    (MEAN, "self.actor(self.encoder(obs)), self.log_std"),
    (VALUE, "self.critic(self.encoder(obs)).squeeze(1)"),
]
WIDE_ENCODER = [
    (CRITIC, "        self.encoder = nn.Sequential(nn.Linear(obs_dim, 32), nn.ReLU())\n" + CRITIC),
    (FIRST, "nn.Linear(32, 64)"),
    *ENCODER[1:],
]
ENCODER_COPIED = (COPIED, COPIED.replace("agent.actor", "nn.Sequential(agent.encoder, agent.actor)"))

TRAINS: dict[str, list[tuple[str, str]]] = {
    "hidden size": [(FIRST, "nn.Linear(obs_dim, 48)"), (SECOND, "nn.Linear(48, 32)"), (LAST, "nn.Linear(32, out_dim)")],
    "a layer more": [(f"layer_init({SECOND}, math.sqrt(2), weight_init)", f"{SECOND}, nn.Tanh(), {SECOND}")],
    "ReLU": [("nn.Tanh()", "nn.ReLU()")],
    "a layer without bias": [(SECOND, "nn.Linear(64, 64, bias=False)")],
    "shared trunk": [*TRUNK, (COPIED, COPIED.replace("agent.actor", "nn.Sequential(agent.trunk, agent.actor)"))],
    "second critic": [
        SECOND_CRITIC,
        ("    value: torch.Tensor  # (B,) in units of reward\n", "    value: torch.Tensor\n    value2: torch.Tensor\n"),
        ("self.value(obs))", "self.value(obs), self.critic2(obs).squeeze(1))"),
        (
            "    policy_loss = -masked",
            "    squared_error = squared_error + (new.value2 - old.return_) ** 2\n    policy_loss = -masked",
        ),
    ],
    "the smaller of two critics": [SECOND_CRITIC, (VALUE, "torch.minimum(self.critic(obs), self.critic2(obs)).squeeze(1)")],
    "objective": [("    squared_error = (new", OBJECTIVE)],
    "a flag that may be None": [
        ("from typing import Annotated", "from typing import Optional, Annotated"),
        (RUN_DIR, "    scale: Optional[float] = None\n    other: Optional[float] = 2\n" + RUN_DIR),
    ],
    "a constant": [
        (CRITIC, CRITIC + "        self.register_buffer('two', torch.tensor(2.0), persistent=False)\n"),
        (VALUE, f"self.two * {VALUE}"),
    ],
    "one activation for all layers": [
        ("        def mlp(", "        act = nn.Tanh()\n\n        def mlp("),
        ("nn.Tanh(),", "act,"),
    ],
    "a number of numpy in the state": [(STATE, STATE + '            "best": np.mean(self.rewards),\n')],
    "a figure of numpy in the log": [('charts = {"learning_rate"', 'charts = {"obs": rollout.obs.mean(), "learning_rate"')],
    "encoder": [*ENCODER, ENCODER_COPIED],
    "wide encoder": [*WIDE_ENCODER, ENCODER_COPIED],
}
SAME = ("objective", "a flag that may be None", "one activation for all layers")  # these have the same parameters
SAME += ("a number of numpy in the state", "a figure of numpy in the log")
FOLLOW = "numpy_policy, which acts in the rollout, computes another policy than Agent.policy or Agent.forward"
STOPS: dict[str, tuple[list[tuple[str, str]], str]] = {
    "an activation": ([("nn.Tanh()", "nn.SiLU()")], "numpy_policy does not know SiLU"),
    "shared trunk": (TRUNK, FOLLOW),
    "encoder": (ENCODER, FOLLOW),
    "wide encoder": (WIDE_ENCODER, FOLLOW),
    "mean": ([(MEAN, "self.actor(obs).sin(), self.log_std")], FOLLOW),
    "standard deviation": ([(STD, f"0.5 * {STD}")], FOLLOW),
    "encoder in forward alone": ([ENCODER[0], (DENSITY, DENSITY.replace("obs", "self.encoder(obs)"))], FOLLOW),
    "mean in forward alone": ([(DENSITY, "Normal(self.policy(obs)[0] + 0.1, self.policy(obs)[1])")], FOLLOW),
    "deviation in forward alone": ([(DENSITY, "Normal(self.policy(obs)[0], 2 * self.policy(obs)[1])")], FOLLOW),
    "a frozen parameter": (
        [(CRITIC, CRITIC + "        self.critic[0].weight.requires_grad_(False)\n")],
        "critic.0.weight is frozen",
    ),
    "batch normalization": ([("mlp(1, 1.0)", BATCH_NORM)], "critic.0.running_mean is a buffer, which no"),
    "layers in a list": (
        [(CRITIC, CRITIC.replace("mlp(1, 1.0)", "[mlp(64, 1.0), nn.Linear(64, 1)]")), (VALUE, LISTED)],
        "the network holds layers in a list or dict, which are not trained: use nn.ModuleList or nn.ModuleDict",
    ),
    "a flag of a type that cannot be checked": (
        [(RUN_DIR, "    scale: Weight | None = None\n" + RUN_DIR)],
        "the type of scale cannot be checked: write Annotated",
    ),
    "state that no checkpoint holds": (
        [(STATE, STATE + '            "best": np.zeros(3),\n')],
        "state['best'] is of type ndarray: a checkpoint holds tensors, numbers and texts",
    ),
    "value in forward alone": (
        [("sum(1), self.value(obs))", "sum(1), 10 * self.value(obs))")],
        "Agent.forward and Agent.value give different values of the same observation",
    ),
    "the root of observations": ([(MEAN, "self.actor(obs.sqrt()), self.log_std")], FOLLOW),
    "a layer that is not there": ([(VALUE, "self.critic.nothing(obs)")], "Agent.policy or Agent.forward fails"),
    "a flag of another type": ([(RUN_DIR, "    data: Path = Path('x')\n" + RUN_DIR)], "data is PosixPath('x'): a setting is"),
    "observations limited to 1": ([(MEAN, "self.actor(obs.clamp(-1, 1)), self.log_std")], FOLLOW),
    "observations limited to 5": ([(MEAN, "self.actor(obs.clamp(-5, 5)), self.log_std")], FOLLOW),
    "the logarithm of observations": ([(MEAN, "self.actor(obs.sign() * obs.abs().log1p()), self.log_std")], FOLLOW),
    "one layer wider": ([(FIRST, "nn.Linear(obs_dim, 256)")], "Agent.policy or Agent.forward fails: mat1 and mat2 shapes"),
    "numpy_policy alone": ([("np.exp(agent.log_std", "0.5 * np.exp(agent.log_std")], FOLLOW),
    "deviation where it is not 1": ([("np.exp(agent.log_std", "np.exp(0.5 * agent.log_std")], FOLLOW),
}


class Acting:
    """Watches a script: the log-density of each action by the policy that drew it, and what the batch says of it."""

    def __init__(self, script: Any):
        self.ratios: list[np.ndarray] = []
        self.initial: dict[str, torch.Tensor] = {}
        self.originals = script.numpy_policy, script.make_batch
        script.numpy_policy, script.make_batch = self.numpy_policy, self.make_batch

    def numpy_policy(self, agent):
        policy = self.originals[0](agent)
        self.said: list[np.ndarray] = []
        self.initial = self.initial or {name: p.detach().clone() for name, p in agent.named_parameters()}

        def watched(obs):
            mean, std = policy(obs)
            self.said.append(np.stack([mean, np.broadcast_to(std, mean.shape)]))
            return mean, std

        return watched

    def make_batch(self, agent, rollout, args):
        batch = self.originals[1](agent, rollout, args)
        mean, std = np.stack(self.said, axis=1).astype(np.float64)
        density = (-0.5 * ((rollout.actions - mean) / std) ** 2 - np.log(std * math.sqrt(2 * math.pi))).sum(axis=2)
        self.ratios.append(np.exp(batch.logprob.numpy() - density.ravel()))
        return batch


ONE_UPDATE: dict[str, Any] = {"num_minibatches": 1, "update_epochs": 1, "learning_rate": 1e-2}


@pytest.mark.parametrize("name", TRAINS)
def test_an_edit_that_trains(name):
    """With one update an iteration the learner's ratio is exactly 1, and so is that to the densities of the actions."""
    script: Any = edited(TRAINS[name])
    acting = Acting(script)
    result = script.train(script.Args(**TINY | ONE_UPDATE | {"run_dir": "run", "eval_episodes": 1}))
    records = read_metrics("run")[1:]
    assert len(acting.ratios) == len(records) == 4
    for ratio, record in zip(acting.ratios, records, strict=True):
        np.testing.assert_allclose(ratio, 1, atol=1e-5)
        assert abs(record["losses/approx_kl"]) < 1e-7
        assert record["losses/clipfrac"] == 0
    agent = script.Agent(2, 1)
    assert {name: p.shape for name, p in agent.named_parameters()} == {name: p.shape for name, p in acting.initial.items()}
    torch.nn.utils.vector_to_parameters(read_checkpoint("run")["theta"], agent.parameters())
    for parameter, value in agent.named_parameters():
        assert not torch.equal(value, acting.initial[parameter]), f"{parameter} does not learn"
    assert len(result["evaluation"]["returns"]) == 1
    train(tiny_args("base", **ONE_UPDATE))
    base, ours = (read_checkpoint(run_dir)["theta"] for run_dir in ("base", "run"))
    assert base.shape != ours.shape or (base - ours).norm() > 1e-3 or name in SAME


def test_another_objective_learns_something_else():
    script: Any = edited(TRAINS["objective"])
    script.train(script.Args(**TINY | {"run_dir": "run", "learning_rate": 1e-2}))
    train(tiny_args("base", learning_rate=1e-2))
    base, ours = (read_checkpoint(run_dir)["theta"] for run_dir in ("base", "run"))
    assert (base - ours).norm() > 1e-3


@pytest.mark.parametrize("name", STOPS)
def test_an_edit_that_stops(name, monkeypatch, capsys):
    changes, sentence = STOPS[name]
    script: Any = edited(changes)
    monkeypatch.setattr("sys.argv", ["my_ppo.py", *tiny_flags("run")])
    with pytest.raises(SystemExit) as stop:
        script.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"my_ppo.py: error: {sentence}")
    assert error.count("\n") == 1
    assert not Path("run").exists()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_setting_that_the_loop_changes_is_refused(compiled, monkeypatch, capsys):
    """A compiled update keeps the first value of ent_coef, so that a schedule of it would do nothing, without a word."""
    line = "            clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)  # [aux: anneal_clip]\n"
    script: Any = edited([(line, line + "            args.ent_coef = 0.1 * remaining\n")])
    monkeypatch.setattr(script, "compile_all", lambda functions, args: functions)
    monkeypatch.setattr("sys.argv", ["my_ppo.py", *tiny_flags("run", compile=compiled)])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    told = "error: args.ent_coef was changed in the loop: hand what changes to learn, as learning_rate is"
    assert told in capsys.readouterr().err
    assert len(read_metrics("run")) == 1  # nothing but the header


@pytest.mark.parametrize("compiled", [False, True])
def test_a_number_of_the_network_that_the_loop_changes_is_refused_where_it_is_compiled(compiled, monkeypatch, capsys):
    """The compiled update would keep the first value. Without the compiler it learns what it should."""
    line = "            clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)  # [aux: anneal_clip]\n"
    changes = [(line, line + "            agent.scale = 1 + remaining\n"), (CRITIC, CRITIC + "        self.scale = 2.0\n")]
    script: Any = edited([*changes, (MEAN, "self.actor(obs) / self.scale, self.log_std"), SCALED])
    monkeypatch.setattr(script, "compile_all", lambda functions, args: functions)
    monkeypatch.setattr("sys.argv", ["my_ppo.py", *tiny_flags("run", compile=compiled)])
    if not compiled:
        script.main()
        assert len(read_metrics("run")) == 5
        return
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert "error: agent.scale was changed in the loop" in capsys.readouterr().err
    assert len(read_metrics("run")) == 2  # the header, and the iteration in which it was still 2


@pytest.mark.parametrize(
    ("made", "changed", "named"),
    [
        ("", "KIND", "KIND"),
        ("", "Agent.weight", "Agent.weight"),
        ("        self.weights = [1.0]\n", "agent.weights[0]", "agent.weights"),
        ("        self.weights = {'a': 1.0}\n", "agent.weights['a']", "agent.weights"),
    ],
)
def test_numbers_in_other_places_that_the_loop_changes_are_refused_too(made, changed, named, monkeypatch, capsys):
    line = "            clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)  # [aux: anneal_clip]\n"
    loop = (
        line + "            globals()['KIND'] = f'{remaining}'\n"
        if changed == "KIND"
        else f"{line}            {changed} = remaining\n"
    )
    script: Any = edited([(line, loop), (CRITIC, CRITIC + made)])
    monkeypatch.setattr(script, "compile_all", lambda functions, args: functions)
    monkeypatch.setattr("sys.argv", ["my_ppo.py", *tiny_flags("run", compile=True)])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert f"error: {named} was changed in the loop" in capsys.readouterr().err


def test_a_whole_number_for_a_setting_that_is_a_fraction_becomes_one():
    args = tiny_args(learning_rate=1, clip_obs=10, target_kl=2)
    assert [type(x) for x in (args.learning_rate, args.clip_obs, args.target_kl, args.seed)] == [float, float, float, int]


def test_large_observations_of_a_wide_network_that_overflow_are_no_reason_to_refuse_it():
    """ReLU and an output for the deviation: the exponential of a large output is infinite, in numpy as in torch."""
    script: Any = edited([("nn.Tanh()", "nn.ReLU()")])
    for seed in range(5):
        torch.manual_seed(seed)
        script.numpy_policy(script.perturbed(script.Agent(376, 17, "orthogonal", False)))


MY_ENV = """
import gymnasium
from envs import Identity

class Mine(Identity):
    def __init__(self):
        super().__init__()
        self.observation_space = gymnasium.spaces.Dict(seen=self.observation_space, kind=gymnasium.spaces.Discrete(3))

    def reset(self, **options):
        obs, info = super().reset(**options)
        return {"seen": obs, "kind": 1}, {"about": "a reset"}

    def step(self, action):
        obs, *others, info = super().step(action)
        return {"seen": obs, "kind": 2}, *others, {"about": "a step"}

gymnasium.register("Mine-v0", Mine)
"""


@pytest.mark.parametrize("place", ["module", "script"])
def test_an_environment_of_ones_own(place, monkeypatch, capsys):
    """In a module of the current directory, or written into the copy of the script."""
    Path("my_env.py").write_text(MY_ENV)
    before_main = 'if __name__ == "__main__":\n    main()'
    script: Any = edited([(before_main, MY_ENV + before_main)] if place == "script" else [])
    monkeypatch.setattr("sys.argv", ["my_ppo.py", *tiny_flags(env="my_env:Mine-v0" if place == "module" else "Mine-v0")])
    script.main()
    assert "return" in capsys.readouterr().out
    assert len(read_jsonl("run/episodes.jsonl")) > 10
    assert read_checkpoint("run")["obs_rms"]["mean"].shape == (4,)  # kind, then seen, as gymnasium sorts them


def test_an_environment_that_is_not_there(monkeypatch, capsys):
    Path("my_empty_module.py").write_text("")
    for name, words in (("my_empty_module:Mine-v9", "cannot make environment"), ("no_such_module:Mine-v0", "cannot make")):
        monkeypatch.setattr("sys.argv", ["ppo_continuous.py", *tiny_flags(env=name)])
        with pytest.raises(SystemExit) as stop:
            ppo_continuous.main()
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert words in error
        assert error.count("\n") == 1
        assert not Path("run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Observation spaces

SPACES: dict[str, gymnasium.Space] = {
    "Box": Box(-1, 1, (3,)),
    "Box of two axes": Box(-1, 1, (2, 3), np.float64),
    "Box without axes": Box(-1, 1, ()),
    "Box of bytes": Box(0, 255, (2, 2), np.uint8),
    "Discrete": Discrete(5),
    "Discrete from -2": Discrete(4, start=-2),
    "MultiDiscrete": MultiDiscrete([3, 2, 4]),
    "MultiDiscrete from 1": MultiDiscrete([3, 2], start=[1, -1]),
    "MultiDiscrete of two axes": MultiDiscrete(np.array([[3, 2], [4, 5]])),
    "MultiBinary": MultiBinary(4),
    "MultiBinary of two axes": MultiBinary((2, 3)),
    "Dict": spaces.Dict(z=Box(-1, 1, (2,)), a=Discrete(3), m=MultiBinary(2)),
    "Tuple": spaces.Tuple([MultiDiscrete([2, 3]), Box(-1, 1, (1,)), Discrete(2)]),
    "nested": spaces.Dict(
        {"b": spaces.Tuple([Discrete(2), spaces.Dict(y=Box(0, 1, (2, 2)), x=Discrete(3, start=1))]), "a": MultiBinary(3)}
    ),
}
NOT_FIXED: dict[str, gymnasium.Space] = {
    "Text": spaces.Text(5),
    "Sequence": spaces.Sequence(Discrete(3)),
    "Graph": spaces.Graph(Box(-1, 1, (2,)), None),
    "Dict with Text": spaces.Dict(a=Box(-1, 1, (2,)), b=spaces.Text(5)),
    "OneOf": spaces.OneOf([Discrete(2), Box(-1, 1, (2,))]),
}


class Observes(gymnasium.Env):
    """Samples of a space as observations; ends after 7 steps."""

    space: ClassVar[gymnasium.Space] = Discrete(2)
    seen: ClassVar[list] = []

    def __init__(self):
        self.observation_space, self.action_space = self.space, Box(-1, 1, (1,))

    def observe(self):
        obs = self.observation_space.sample()
        self.seen.append(obs)
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        return self.observe(), 1.0, self.time == 7, False, {}


gymnasium.register("Observes-v0", "test_edits:Observes")


@pytest.mark.parametrize("name", SPACES)
def test_observations_are_flattened_as_gymnasium_does(name):
    space = SPACES[name]
    space.seed(3)
    samples = [space.sample() for _ in range(6)]
    empty: Any = gymnasium.vector.utils.create_empty_array(space, 6)
    flat = flatten_obs(gymnasium.vector.utils.concatenate(space, samples, empty), space)
    expected = np.stack([np.asarray(spaces.flatten(space, sample)) for sample in samples])
    assert flat.shape == (6, spaces.flatdim(space))
    np.testing.assert_array_equal(flat, expected)
    assert not (flat == flat[0]).all()


@pytest.mark.parametrize("name", SPACES)
def test_every_space_trains_on_its_flattened_observations(name, monkeypatch):
    monkeypatch.setattr(Observes, "space", SPACES[name])
    monkeypatch.setattr(Observes, "seen", [])
    result = train(tiny_args(env="Observes-v0", num_envs=1, num_steps=64, norm_obs="step", eval_episodes=1))
    saved = read_checkpoint("run")
    steps = [spaces.flatten(SPACES[name], obs) for obs in Observes.seen[1 : 4 * 64 + 2]]  # the first one saw nothing but a size
    np.testing.assert_allclose(saved["obs_rms"]["mean"], np.mean(np.array(steps, np.float64), axis=0), rtol=1e-4, atol=1e-4)
    assert saved["spaces"]["observation"] == str(SPACES[name])
    assert result["evaluation"]["lengths"] == [7]


@pytest.mark.parametrize("name", NOT_FIXED)
def test_a_space_without_a_fixed_size_is_refused_with_a_way_out(name, monkeypatch):
    monkeypatch.setattr(Observes, "space", NOT_FIXED[name])
    with pytest.raises(UsageError, match=r"observations of .* have no fixed size: make them a Box with .*ObservationWrapper"):
        train(tiny_args(env="Observes-v0", num_envs=1, num_steps=64))
    assert not Path("run").exists()


def test_a_large_discrete_space_needs_no_table(monkeypatch):
    """Two observations of 5,000 values take their own 40 kB, not the 100 MB of all one-hot vectors."""
    tracemalloc.start()
    flat = flatten_obs(np.array([7, 4999]), Discrete(5000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e5
    assert np.argwhere(flat).tolist() == [[0, 7], [1, 4999]]
    monkeypatch.setattr(Observes, "space", Discrete(5000))
    train(tiny_args(env="Observes-v0", num_envs=1, num_steps=16, total_timesteps=32, num_minibatches=2))
    assert read_checkpoint("run")["obs_rms"]["mean"].shape == (5000,)


@pytest.mark.parametrize(("name", "size"), [("CheetahRun-v1", 17), ("FetchReach-v4", 16)])
def test_dict_observations_of_envpool(name, size):
    """dm_control and robotics: the parts in the order of gymnasium, a few iterations, an evaluation."""
    envs, obs, _ = make_envs(name, [1, 2], 1)
    space = envs.single_observation_space
    single = [{key: value[i] for key, value in obs.items()} for i in range(2)]
    np.testing.assert_array_equal(flatten_obs(obs, space), [spaces.flatten(space, one) for one in single])
    envs.close()
    result = train(tiny_args(env=name, eval_episodes=1, eval_steps=30))
    assert read_checkpoint("run")["obs_rms"]["mean"].shape == (size,)
    assert len(read_metrics("run")) == 5
    assert result["evaluation"]["lengths"] == [30]
    assert Agent(size, 1).obs_dim == size


def test_a_checkpoint_of_another_version_says_so(capsys):
    """ReLU in place of tanh leaves the size of theta as it is, so nothing else would tell."""
    train(tiny_args())
    copy = edited([("nn.Tanh()", "nn.ReLU()")])
    capsys.readouterr()
    for script, told in ((ppo_continuous, False), (copy, True)):
        script.load_policy("run", env="envs:Point-v0")
        err = capsys.readouterr().err
        assert ("warning: run/checkpoint.pt is of another version of this script" in err) == told, err


def test_a_checkpoint_of_a_larger_machine_is_read(capsys):
    """Its number of threads is too large here; that is no reason to refuse it."""
    train(tiny_args())
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    checkpoint["args"]["num_threads"] = 10_000
    torch.save(checkpoint, "run/checkpoint.pt")
    ppo_continuous.load_policy("run", env="envs:Point-v0")
    assert "run/checkpoint.pt is of a run with 10000 threads, but here are at most" in capsys.readouterr().err
    args, _ = ppo_continuous.parse_args(["--resume", "run", "--total-timesteps", "2000"])
    assert args.num_threads == 4 * os.cpu_count()


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler here")
def test_minibatches_of_other_sizes_need_no_compile(monkeypatch, capsys):
    """Half of the samples in the second epoch."""
    sizes = ("order.split(args.minibatch_size)", "order.split(args.minibatch_size // (1 + bool(infos)))")
    script: Any = edited([sizes])
    monkeypatch.setattr("sys.argv", ["my_ppo.py", *tiny_flags("compiled", compile=True)])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 1
    told = "my_ppo.py: stopped: the compiled update takes minibatches of one size alone; --no-compile takes any"
    assert capsys.readouterr().err.splitlines()[-1] == told
    monkeypatch.setattr("sys.argv", ["my_ppo.py", *tiny_flags("eager")])
    script.main()
    assert len(read_metrics("eager")) == 5
