"""What is run: each suite is a list of runs, and a run names only the flags that differ from the defaults of its script."""

import hashlib
import importlib.util
import itertools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MUJOCO = ("HalfCheetah", "Hopper", "InvertedDoublePendulum", "InvertedPendulum", "Reacher", "Swimmer", "Walker2d")
SECOND_HAND = ("HalfCheetah", "Walker2d", "Swimmer", "Hopper")  # tasks of reference/second_hand_mujoco.csv
# fmt: off
ATARI = (  # the 49 games of Table 6
    "Alien", "Amidar", "Assault", "Asterix", "Asteroids", "Atlantis", "BankHeist", "BattleZone", "BeamRider", "Bowling",
    "Boxing", "Breakout", "Centipede", "ChopperCommand", "CrazyClimber", "DemonAttack", "DoubleDunk", "Enduro",
    "FishingDerby", "Freeway", "Frostbite", "Gopher", "Gravitar", "IceHockey", "Jamesbond", "Kangaroo", "Krull",
    "KungFuMaster", "MontezumaRevenge", "MsPacman", "NameThisGame", "Pitfall", "Pong", "PrivateEye", "Qbert",
    "Riverraid", "RoadRunner", "Robotank", "Seaquest", "SpaceInvaders", "StarGunner", "Tennis", "TimePilot",
    "Tutankham", "UpNDown", "Venture", "VideoPinball", "WizardOfWor", "Zaxxon",
)
# fmt: on
SEEDS = (1, 2, 3)
LONGEST = 200  # letters of a name: a file name may have 255, with what is added to it
FIVE, TEN, TWENTY, THIRTY = (tuple(range(1, n + 1)) for n in (5, 10, 20, 30))
BFLOAT16: dict[str, Any] = {"precision": "bfloat16"}
LARGER: dict[str, Any] = BFLOAT16 | {"learning_rate": 5e-4, "clip_coef": 0.2, "num_minibatches": 8}
# ppo_atari.py on a CPU: game, setting, flags beyond the defaults, steps, seeds.
ATARI_SHORT: tuple[tuple[str, str, dict[str, Any], int, tuple[int, ...]], ...] = (
    ("Pong", "default", {}, 4_000_000, (1,)),
    ("Pong", "bfloat16", BFLOAT16, 4_000_000, (1,)),
    ("Breakout", "default", {}, 1_000_000, SEEDS),
    ("Breakout", "bfloat16", BFLOAT16, 1_000_000, SEEDS),
    ("Breakout", "bfloat16, larger updates", LARGER, 1_000_000, SEEDS),
)

# Steps per second on one core of a 2-core server, for the expected time of a plan where no result says better.
RATES = {
    "ppo_continuous": 3000,
    "ppo_kl_penalty": 3000,
    "ppo_shared_params": 10000,
    "ppo_atari": 600,
    "ppo_rlhf": 500,
    "exact": 9000,
    "trpo": 1500,
    "a2c": 900,
    "ppo": 700,
}

# The configuration that the paper prints (Table 3 names no normalization, no clipping of gradients and a plain 3e-4).
AS_PRINTED: dict[str, Any] = {
    "weight_init": "normc",
    "anneal_lr": False,
    "norm_adv": "batch",
    "norm_obs": "none",
    "clip_obs": 5.0,  # the code of the time did, and so did the prototypes that show the collapse
    "norm_reward": False,
    "clip_reward": "inf",
    "max_grad_norm": "inf",
    "clip_vloss": False,
    "clip_actions": False,
    "vf_coef": 2.0,  # c1 = 1 on the squared error without 1/2
    "bootstrap_truncated": False,
}
# The same with observations normalized, once a batch, as the code of 2017 did (its paper does not say so).
AS_PRINTED_NORMALIZED: dict[str, Any] = AS_PRINTED | {"norm_obs": "batch"}
CLIP, PENALTY = "ppo_continuous.py", "ppo_kl_penalty.py"
TABLE1: dict[str, tuple[str, dict[str, Any]]] = {
    "no clipping or penalty": (CLIP, {"clip_policy": False}),
    "clipping 0.1": (CLIP, {"clip_coef": 0.1}),
    "clipping 0.2": (CLIP, {}),
    "clipping 0.3": (CLIP, {"clip_coef": 0.3}),
    "adaptive KL 0.003": (PENALTY, {"kl_target": 0.003}),
    "adaptive KL 0.01": (PENALTY, {}),
    "adaptive KL 0.03": (PENALTY, {"kl_target": 0.03}),
    "fixed KL 0.3": (PENALTY, {"adaptive_kl": False, "kl_coef": 0.3}),
    "fixed KL 1": (PENALTY, {"adaptive_kl": False}),
    "fixed KL 3": (PENALTY, {"adaptive_kl": False, "kl_coef": 3.0}),
    "fixed KL 10": (PENALTY, {"adaptive_kl": False, "kl_coef": 10.0}),
}
# One detail off at a time; the baseline of the comparison is the suite base.
DETAILS: dict[str, dict[str, Any]] = {
    "02 default init of torch": {"weight_init": "torch"},
    "03 Adam epsilon 1e-8": {"adam_eps": 1e-8},
    "04 constant learning rate": {"anneal_lr": False},
    "05 GAE lambda 0": {"gae_lambda": 0.0},
    "05 GAE lambda 1": {"gae_lambda": 1.0},
    "06 whole batch": {"num_minibatches": 1},
    "07 no advantage normalization": {"norm_adv": "none"},
    "07 normalization over the batch": {"norm_adv": "batch"},
    "08 no policy clipping": {"clip_policy": False},
    "09 no value clipping": {"clip_vloss": False},
    "11 no gradient clipping": {"max_grad_norm": "inf"},
    "24 state-dependent deviation": {"state_independent_std": False},
    "27 no action clipping": {"clip_actions": False},
    "28 no observation normalization": {"norm_obs": "none"},
    "28 statistics once per rollout": {"norm_obs": "batch"},
    "29 no observation clipping": {"clip_obs": "inf"},
    "30 no reward scaling": {"norm_reward": False},
    "31 no reward clipping": {"clip_reward": "inf"},
    "clip range annealed": {"anneal_clip": True},
    "ours off: time limit terminates": {"bootstrap_truncated": False},
    "ours off: reset steps learned": {"mask_resets": False},
}
DETAILS_TASKS = ("HalfCheetah", "Hopper", "Walker2d")
# Some of them with more seeds: suite -> setting -> flags, tasks, seeds.
CLOSER: dict[str, tuple[dict[str, dict[str, Any]], tuple[str, ...], tuple[int, ...]]] = {
    "limits": (
        {"time limit terminates": {"bootstrap_truncated": False}, "reset steps learned": {"mask_resets": False}},
        MUJOCO,
        TEN,
    ),
    "double-pendulum": (
        {
            "observations not normalized": {"norm_obs": "none"},
            "observations not clipped": {"clip_obs": "inf"},
            "statistics once per rollout": {"norm_obs": "batch"},
            "rewards not scaled": {"norm_reward": False},
            "neither normalized nor scaled": {"norm_obs": "none", "norm_reward": False},
        },
        ("InvertedDoublePendulum",),
        FIVE,
    ),
    "unclipped": ({"no policy clipping": {"clip_policy": False}}, DETAILS_TASKS, TEN),
}

# Networks shared or separate on MuJoCo: ppo_shared_params.py with the settings of ppo_continuous.py.
BASE_SETTINGS: dict[str, Any] = {"total_timesteps": 1_000_000, "checkpoint_every": 50, "learning_rate": 3e-4, "num_envs": 1}
BASE_SETTINGS |= {"num_steps": 2048, "num_minibatches": 32, "update_epochs": 10, "ent_coef": 0.0}
BASE_SETTINGS |= {"norm_obs": "step", "clip_obs": 10.0, "clip_reward": 10.0}
SHARED_MUJOCO: dict[str, tuple[str, dict[str, Any]]] = {
    "shared": ("ppo_shared_params.py", BASE_SETTINGS),
    "separate": ("ppo_shared_params.py", BASE_SETTINGS | {"share_params": False}),
}
DM_CONTROL = ("CheetahRun-v1", "WalkerWalk-v1")

HIDDEN: dict[str, Any] = {"observe": [0, 2], "num_envs": 16}
LUNAR: dict[str, Any] = {"num_envs": 16, "num_steps": 1024, "num_minibatches": 64, "gamma": 0.999, "gae_lambda": 0.98}
LUNAR |= {"total_timesteps": 2_000_000}
BIPEDAL: dict[str, Any] = {"discretize_actions": 7, "num_envs": 16, "num_steps": 256, "num_minibatches": 32, "ent_coef": 0.0}
BIPEDAL |= {"update_epochs": 10, "learning_rate": 3e-4, "norm_obs": "step", "total_timesteps": 2_000_000}
# ppo_shared_params.py: setting -> task, flags beyond the defaults, seeds.
DISCRETE: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "shared": ("CartPole-v1", {}, FIVE),
    "separate": ("CartPole-v1", {"share_params": False}, FIVE),
    "shared, unscaled rewards": ("CartPole-v1", {"norm_reward": False}, FIVE),
    "shared, unscaled rewards, c1 0.01": ("CartPole-v1", {"norm_reward": False, "vf_coef": 0.01}, FIVE),
    "separate, unscaled rewards": ("CartPole-v1", {"share_params": False, "norm_reward": False}, FIVE),
    "Acrobot": ("Acrobot-v1", {}, FIVE),
    "no velocities, LSTM": ("CartPole-v1", HIDDEN | {"lstm": True}, SEEDS),
    "no velocities": ("CartPole-v1", HIDDEN, SEEDS),
    "LunarLander": ("LunarLander-v3", LUNAR, FIVE),
    "BipedalWalker, 7 bins": ("BipedalWalker-v3", BIPEDAL, SEEDS),
}
# Terms of the loss of a shared network taken away; with all three it is a setting of the suite discrete.
OBJECTIVE: dict[str, dict[str, Any]] = {"clip": {"vf_coef": 0.0, "ent_coef": 0.0}, "clip + value": {"ent_coef": 0.0}}
# task -> that setting, flags beyond the defaults
OBJECTIVE_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "CartPole-v1": ("shared", {}),
    "Acrobot-v1": ("Acrobot", {}),
    "LunarLander-v3": ("LunarLander", LUNAR),
}

EXACT = "benchmarks/exact.py"  # runs ppo_rlhf.py with another model and flags of its own
# ppo_rlhf.py: suite -> setting -> script, reward, flags beyond the defaults.
FEW_LABELS: dict[str, Any] = {"num_comparisons": 1700}
RLHF_DEFAULT = "KL target 10"  # what the defaults are called
FIXED: dict[str, Any] = {"kl_target": None, "kl_horizon": 10_000}  # beta stays as it is, and the horizon means nothing
FIXED_005: dict[str, Any] = FIXED | {"kl_coef": 0.05}
RLHF: dict[str, dict[str, tuple[str, str, dict[str, Any]]]] = {
    "rlhf-exact": {k: (EXACT, "exact:score", {"kl_estimator": k}) for k in ("k1", "k3")},
    "rlhf-sentiment": {"VADER, beta 0.02": ("ppo_rlhf.py", "vader", FIXED | {"kl_coef": 0.02})},
    "rlhf-human": {
        RLHF_DEFAULT: ("ppo_rlhf.py", "human", {}),
        **{f"beta {beta:g}": ("ppo_rlhf.py", "human", FIXED | {"kl_coef": beta}) for beta in (0.0, 0.05, 0.07, 0.1)},
    },
    "rlhf-overopt": {  # both with the same learning rate
        "beta 0": ("ppo_rlhf.py", "labels", FEW_LABELS | FIXED | {"kl_coef": 0.0, "anneal_lr": False}),
        "beta 0.05": ("ppo_rlhf.py", "labels", FEW_LABELS | FIXED_005 | {"anneal_lr": False}),
    },
    "rlhf-labels": {
        f"{count} comparisons": ("ppo_rlhf.py", "human", FIXED_005 | {"num_comparisons": count}) for count in (1600, 4800)
    },  # 16,000 are in rlhf-human, beta 0.05
}
# One detail of ppo_rlhf.py off at a time, beside rlhf-human, beta 0.05: a beta that moves would hide effects. The models of the
# stages come from the cache.
RLHF_DETAILS: dict[str, dict[str, Any]] = {
    "03 penalty by k3": {"kl_estimator": "k3"},
    "05 scores not normalized": {"norm_score": False},
    "06 rewards whitened": {"whiten_rewards": True},
    "07 advantages not normalized": {"norm_adv": "none"},
    "08 lambda 1": {"gae_lambda": 1.0},
    "09 no value clipping": {"clip_vloss": False},
    "10 value loss weight 1": {"vf_coef": 1.0},
    "11, 13 heads as in torch": {"head_init": "torch"},
    "12 separate value network": {"value": "separate"},
    "14 mean over tokens": {"reward_pool": "mean"},
    "16, 18 no stop at the end": {"stop_at_eos": False},
    "17 own score without an end": {"no_eos_score": None},
    "20 temperature 0.7": {"temperature": 0.7},
    "24 Adam epsilon 1e-8": {"adam_eps": 1e-8},
    "25 constant learning rate": {"anneal_lr": False},
    "26 one epoch": {"update_epochs": 1},
    "28 no policy clipping": {"clip_policy": False},
    "29 entropy bonus 0.01": {"ent_coef": 0.01},
    "32 scores limited to 2": {"score_clip": 2.0},
    "33 PPO-ptx 1": {"ptx_coef": 1.0},
    "35 value warm-up 5": {"value_warmup": 5},
}
RLHF["rlhf-details"] = {setting: ("ppo_rlhf.py", "human", FIXED_005 | flags) for setting, flags in RLHF_DETAILS.items()}


@dataclass(frozen=True)
class Run:
    suite: str
    setting: str
    script: str  # relative to the repository
    env: str
    seed: int
    flags: dict[str, Any] = field(default_factory=dict)  # beyond env and seed

    @property
    def name(self) -> str:
        """File name of its result, without extension; a long one ends in a hash instead."""
        name = f"{slug(self.setting)}__{slug(self.env)}__{self.seed}"
        return name if len(name) <= LONGEST else f"{name[: LONGEST - 11]}_{hashlib.sha256(name.encode()).hexdigest()[:10]}"

    @property
    def peer(self) -> bool:
        """Needs the Python that has the baseline algorithms."""
        return self.script == "benchmarks/baselines.py"

    def options(self) -> list[str]:
        """Its flags as command-line options."""
        return [*option("env", self.env), *option("seed", self.seed), *(x for k, v in self.flags.items() for x in option(k, v))]


def slug(text: str) -> str:
    """Text as part of a file name."""
    return re.sub(r"[^A-Za-z0-9=.,+-]+", "_", text)


def option(name: str, value: Any) -> list[str]:
    """A flag and its value: clip_coef, 0.1 -> --clip-coef 0.1; anneal_lr, False -> --no-anneal-lr; observe, [0, 2]."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    return [f"--{dashed}", *(map(str, value) if isinstance(value, list) else [str(value)])]


def load_script(name: str) -> ModuleType:
    """A script of the repository as a module, loaded once."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return script


def grid(suite: str, settings: dict[str, tuple[str, dict[str, Any]]], envs, seeds) -> list[Run]:
    """All settings on all tasks, one whole seed after the other."""
    return [
        Run(suite, setting, script, env, seed, flags)
        for seed in seeds
        for (setting, (script, flags)), env in itertools.product(settings.items(), envs)
    ]


def make_suite(name: str) -> list[Run]:
    """Runs of a stored suite."""
    default: dict[str, tuple[str, dict[str, Any]]] = {"default": (CLIP, {})}
    if name == "base":  # HalfCheetah has two kinds of runs, so it gets more seeds
        return grid(name, default, MUJOCO, TEN) + grid(name, default, ["HalfCheetah"], THIRTY[10:])
    if name == "table1":
        return grid(name, {k: (script, AS_PRINTED | flags) for k, (script, flags) in TABLE1.items()}, MUJOCO, SEEDS)
    if name == "table1-normalized":
        return grid(name, {k: (script, AS_PRINTED_NORMALIZED | flags) for k, (script, flags) in TABLE1.items()}, MUJOCO, SEEDS)
    if name == "collapse":  # more seeds of one row of table1-normalized; its first three are there
        script, flags = TABLE1["no clipping or penalty"]
        setting = {"no clipping or penalty": (script, AS_PRINTED_NORMALIZED | flags)}
        return grid(name, setting, ["HalfCheetah", "Reacher"], TWENTY[3:])
    if name == "unlimited":  # as printed, where the limit of +-5 acts on raw observations
        return grid(name, {"clipping 0.2": (CLIP, AS_PRINTED | {"clip_obs": "inf"})}, MUJOCO, SEEDS)
    if name == "initial":  # a single rollout: all of its episodes are those of the policy before training
        one = {"num_steps": 20_000, "total_timesteps": 20_000, "update_epochs": 1, "compile": False}
        return grid(name, {"as printed": (CLIP, AS_PRINTED | one), "all details": (CLIP, one)}, MUJOCO, SEEDS)
    if name == "table1-details":
        return grid(name, TABLE1, MUJOCO, SEEDS)
    if name == "figure3":  # PPO is the suite base
        settings = {a: ("benchmarks/baselines.py", {"algorithm": a.lower()}) for a in ("TRPO", "A2C")}
        own = grid(name, settings, SECOND_HAND, SEEDS) + grid(
            name, settings, [e for e in MUJOCO if e not in SECOND_HAND], SEEDS
        )
        return grid("base", default, MUJOCO, SEEDS) + own
    if name == "peer":  # Stable-Baselines3 with the settings of the suite base
        return grid(name, {"SB3 PPO": ("benchmarks/baselines.py", {"algorithm": "ppo"})}, MUJOCO, SEEDS)
    if name == "discrete":
        runs = [
            Run(name, setting, "ppo_shared_params.py", env, seed, flags)
            for setting, (env, flags, seeds) in DISCRETE.items()
            for seed in seeds
        ]
        return sorted(runs, key=lambda run: run.seed)
    if name == "objective":
        return [
            Run(name, setting, "ppo_shared_params.py", env, seed, of_task | flags)
            for seed in FIVE
            for env, (_, of_task) in OBJECTIVE_TASKS.items()
            for setting, flags in OBJECTIVE.items()
        ]
    if name == "dm_control":
        return grid(name, default, DM_CONTROL, SEEDS)
    if name == "shared-mujoco":
        return grid(name, SHARED_MUJOCO, DETAILS_TASKS, SEEDS)
    if name == "atari-short":
        return [
            Run(name, setting, "ppo_atari.py", game, seed, flags | {"total_timesteps": steps, "checkpoint_every": 200})
            for game, setting, flags, steps, seeds in ATARI_SHORT
            for seed in seeds
        ]
    if name in RLHF:
        seeds = FIVE if name == "rlhf-exact" else SEEDS
        planned = RLHF[name].items()
        runs = [Run(name, k, script, env, seed, flags) for seed in seeds for k, (script, env, flags) in planned]
        if name == "rlhf-human":  # the defaults get more seeds
            runs += [Run(name, RLHF_DEFAULT, "ppo_rlhf.py", "human", seed) for seed in (4, 5, 6)]
        return runs
    if name == "table6":
        return grid(name, {"bfloat16": ("ppo_atari.py", BFLOAT16)}, ATARI, SEEDS)
    if name in CLOSER:
        changes, envs, many = CLOSER[name]
        return grid(name, {k: (CLIP, flags) for k, flags in changes.items()}, envs, many)
    if name == "details":
        return grid(name, {k: (CLIP, flags) for k, flags in DETAILS.items()}, DETAILS_TASKS, SEEDS)
    raise ValueError(name)


SUITES = (
    *("base", "table1", "table1-normalized", "unlimited", "collapse", "initial", "table1-details", "figure3", "peer"),
    *("discrete", "objective", "dm_control", "shared-mujoco", "atari-short", "table6", "details"),
    *CLOSER,
    *RLHF,
)

UNNAMED = ("total_timesteps", "compile", "device", "num_threads")  # flags that are no part of the name of a setting


def make_sweep(name: str, script: str, options: list[str]) -> list[Run]:
    """Product grid of a command line such as --env Hopper Walker2d --clip-coef 0.1 0.2 --seed 1 2.

    True and False switch a flag on and off; a flag without a value is on. Numbers with a comma are one value: 0,2 is a
    list. ValueError where a word makes no sense.
    """
    values: dict[str, list[Any]] = {}
    key = None
    for word in options:
        if word.startswith("--"):
            key, *given = word[2:].split("=", 1)
            key = key.replace("-", "_")
            if key in values:
                raise ValueError(f"--{key.replace('_', '-')} is given twice")
            values[key] = list(given)
        elif key is None:
            raise ValueError(f"{word} belongs to no flag")
        else:
            values[key].append(word)
    values = {k: [parse_value(v) for v in vs] or [True] for k, vs in values.items()}
    envs, seeds = values.pop("env", [True]), values.pop("seed", ["1"])
    if True in envs:
        raise ValueError("a sweep names its environments: --env HalfCheetah Hopper")
    for seed in seeds:
        if not re.fullmatch(r"\d+", str(seed)):
            raise ValueError(f"--seed {'without a value' if seed is True else seed}: a seed is a whole number")
    for key, given in values.items():
        flag, switched = key.replace("_", "-"), [isinstance(v, bool) for v in given]
        if any(switched) and not all(switched):
            raise ValueError(f"--{flag} has both True or False and other values")
        if key.startswith("no_") and given != [True]:
            raise ValueError(f"--{flag} takes no value: --{flag[3:]} True False does")
    runs: list[Run] = []
    for seed in seeds:
        for combination in itertools.product(*values.values()):
            flags = dict(zip(values, combination, strict=True))
            named = [k for k in flags if k not in UNNAMED]
            shown = {k: " ".join(v) if isinstance(v, list) else v for k, v in flags.items()}
            setting = ",".join(f"{k}={shown[k]}" for k in named) or "default"
            runs += [Run(name, setting, script, env, int(seed), flags) for env in envs]
    known: dict[str, Run] = {}
    for run in runs:
        other = known.setdefault(run.name, run)
        if other is not run:
            apart = [f"--{k.replace('_', '-')} {other.flags[k]} and {v}" for k, v in run.flags.items() if other.flags[k] != v]
            reason = f"{', '.join(apart)} are not told apart in its name" if apart else "it is named twice"
            raise ValueError(f"the sweep has two runs {run.name}: {reason}")
    return runs


def parse_value(word: str) -> Any:
    """A value of a sweep: True, False, a list of numbers, or the word as it is."""
    if word in ("True", "False"):
        return word == "True"
    return word.split(",") if re.fullmatch(r"[-+.\de]+(,[-+.\de]+)+", word) else word
