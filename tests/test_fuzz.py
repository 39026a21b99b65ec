"""Generated command lines, over all scripts: each ends within its limits, in one sentence, without leftovers.

    pytest -m slow tests/test_fuzz.py
    PPO_FUZZ_CASES=2000 PPO_FUZZ_SEED=7 pytest -m slow tests/test_fuzz.py
    PPO_FUZZ_ONLY="ppo_atari 17" pytest -m slow tests/test_fuzz.py

Flags and their types are read from each script's Args. A case is drawn from (seed, script, number) alone, so that a failed
one runs again by its name. Most run in forked children of a process that has imported the scripts, every eighth as a process
of its own. None may take more than 60 s on the processor or 4 GB. Settings that are valid and would only take long are not
drawn: many steps, epochs, evaluation episodes or frames.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import pickle
import random
import resource
import shlex
import shutil
import subprocess
import sys
import types
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from warm import CACHE, ROOT, SCRIPTS, Ended, Warm, kill_session, watch

CASES = int(os.environ.get("PPO_FUZZ_CASES", "440"))
SEED = int(os.environ.get("PPO_FUZZ_SEED", "1"))
ONLY = os.environ.get("PPO_FUZZ_ONLY", "")
SECONDS, MEMORY = 60, 4 * 2**30
REAL = 8  # every eighth case is a process of its own

FUZZED = (*SCRIPTS, "ppo_rlhf")

Flags = dict[str, list[str]]  # flag -> its values, [] for a switch
POINT: Flags = {"--env": ["envs:Point-v0"], "--num-steps": ["16"], "--total-timesteps": ["64"], "--eval-episodes": ["1"]}
POINT |= {"--num-envs": ["2"], "--num-minibatches": ["2"], "--update-epochs": ["1"], "--no-compile": []}
TINY: dict[str, Flags] = {
    "ppo_continuous": POINT,
    "ppo_kl_penalty": POINT,
    "ppo_shared_params": POINT | {"--env": ["CartPole-v1"]},
    "ppo_atari": POINT
    | {"--env": ["Breakout"], "--num-steps": ["8"], "--total-timesteps": ["32"], "--max-episode-steps": ["40"]}
    | {"--num-threads": ["1"]},
    "ppo_rlhf": {"--env": ["rewards:score"], "--data": ["texts.tsv"], "--num-steps": ["4"], "--total-timesteps": ["32"]}
    | {"--num-envs": ["4"], "--num-minibatches": ["2"], "--update-epochs": ["1"], "--eval-episodes": ["2"]}
    | {"--vocabulary": ["270"], "--width": ["32"], "--layers": ["1"], "--sft-epochs": ["1"], "--num-comparisons": ["64"]},
}

TEXTS = [
    "",
    " ",
    "abc",
    "nan",
    "inf",
    "-inf",
    "1e3",
    "0x10",
    "1_000",
    " 5",
    "1,5",
    "½",
    "\uff11\uff12",
    "--",
    "None",
    "\udcff",
    "1" * 5000,
]
HUGE = [10**7, 2**31 - 1, 2**31, 2**32, 10**12, 2**63 - 1, 2**63, 10**30]
INTEGERS = [-(2**63), -1, 0, 1, 2, 3, 7, *HUGE]
# huge ones are valid and take for ever
LONG = {"total_timesteps", "update_epochs", "eval_episodes", "sft_epochs", "num_comparisons"}
LOOPS = {"noop_max", "frame_skip"}  # likewise up to what their type holds
FLOATS = [-1.0, -0.0, 0.0, 1e-320, 1e-8, 0.5, 1.0, 1.0000001, 3.0, 1e39, 1e308, math.inf, -math.inf, math.nan]
ENVS = {
    "ppo_continuous": ["Hopper", "Pendulum-v1", "envs:Identity-v0", "MountainCarContinuous-v0", "CheetahRun-v1"],
    "ppo_shared_params": ["CartPole-v1", "Acrobot-v1", "FrozenLake-v1", "Blackjack-v1", "Taxi-v4", "Hopper", "Pong-v5"],
    "ppo_atari": ["Pong", "Breakout-v5", "BreakoutNoFrameskip-v4", "SpaceInvaders", "MontezumaRevenge"],
}
ENVS["ppo_kl_penalty"] = ENVS["ppo_continuous"]
ENVS["ppo_rlhf"] = [
    "human",
    "rewards:score",
    "rewards:equal",
    "rewards:huge",
    "rewards:tiny",
    "rewards:short",
    "rewards:raises",
]
ENVS["ppo_rlhf"] += ["rewards:not_a_number", "rewards:nothing", "rewards:leaves", "rewards:words", "rewards:one_argument"]
ENVS["ppo_rlhf"] += ["rewards:no_function", "rewards:missing"]
FILES = {  # for the flags of ppo_rlhf.py that name one
    "texts.tsv": (ROOT / "tests" / "texts.tsv").read_bytes(),
    "plain.txt": b"the film is good\nand others\n\n",
    "short.txt": b"a\n",
    "latin.txt": b"a\xe9b\n",
    "marked.txt": "\ufeffone two\u2028three\n".encode(),
    "empty.txt": b"",
}
BAD_ENVS = ["", " ", "breakout", "ALE/Breakout-v5", "Breakout-ram-v0", "Hopper-v99", "Hopper-v2", "halfcheetah", "CartPole-v1"]
BAD_ENVS += ["no_module:X-v0", "os:X-v0", "envs:", ":", "a:b:c", "../x", "envs:Point-v0/..", "x" * 5000, "ünïcode", "\udcff"]
BAD_ENVS += ["envs:NaNObservation-v0", "envs:NaNReward-v0", "envs:DiscreteObservations-v0", "envs:IntegerActions-v0"]
BAD_ENVS += ["GymV21Environment-v0", "phys2d/CartPole-v1", "FetchReach-v4", "Point-v0", "HalfCheetah HalfCheetah", "None"]
PLACES = [
    ".",
    "/",
    "/dev/null",
    "/dev/null/x",
    "/proc/x",
    "/sys/x",
    "file",
    "full",
    "empty",
    "dangling",
    "dangling/x",
    "a b/ü/ c",
]
PLACES += ["x" * 300, "trailing/", "a//b/../c", "~", "file/x", "\udcff", "-x", "'quoted\"", "*", "..", "loop/x"]
CLEANRL = ["--env-id", "--cuda", "--exp-name", "--torch-deterministic", "--save-model", "--upload-model", "--hf-entity"]
WORDS = [["-h"], ["--help"], ["--no-such-flag"], ["--no-such-flag", "1"], ["word"], ["--"], ["-x"], ["--seed"], ["--seed="]]
WORDS += [
    ["--seed", "1", "2"],
    ["--seed", "1", "--seed", "2"],
    ["--no-seed", "1"],
    ["--num_envs", "2"],
    ["---seed", "1"],
    ["-"],
]
WORDS += [["--env"], ["--resume"], ["--evaluate"], ["--see", "1"], ["--total-timestep", "64"], ["--no-no-compile"], ["\udcff"]]
WORDS += [
    ["--no-compile", "True"],
    ["--anneal-lr", "yes"],
    ["--track=True"],
    ["@file"],
    ["--args.seed", "1"],
    [""],
    ["--gamma", ".99", "x"],
]
CONFLICTS: list[list[str]] = [
    ["--resume", "run", "--evaluate", "run"],
    ["--evaluate", "run", "--eval-episodes", "0"],
    ["--resume", "run", "--seed", "9", "--learning-rate", "1"],
    ["--resume", "run", "--run-dir", "other"],
    ["--resume", "run", "--total-timesteps", "1"],
    ["--resume", "run", "--num-envs", "4"],
    ["--evaluate", "run", "--env", "no_module:X-v0"],
    ["--evaluate", "run", "--run-dir", "other"],
    ["--evaluate", "run", "--capture-video"],
    ["--evaluate", "run", "--total-timesteps", "1"],
    ["--evaluate", "run/metrics.jsonl"],
    ["--resume", ""],
    ["--evaluate", ""],
    ["--resume=", "--evaluate="],
    ["--resume", "run", "--resume", "nowhere"],
    ["--resume", "nowhere"],
    ["--resume", "full"],
    ["--evaluate", "empty"],
    ["--evaluate", "dangling"],
    ["--run-dir", "run"],
    ["--run-dir", "run/run"],
    ["--capture-video", "--eval-episodes", "0"],
    ["--capture-video"],
    ["--num-minibatches", "32", "--num-steps", "16"],
    ["--num-minibatches", "3"],
    ["--num-envs", "1", "--num-steps", "1", "--num-minibatches", "1", "--total-timesteps", "2"],
    ["--track", "--wandb-project-name", "a/b"],
    ["--device", "cuda"],
    ["--device", "cuda:99999999999999999999"],
    ["--device", "meta"],
]
CONFLICTS_OF = {
    "ppo_kl_penalty": [
        ["--kl-coef", "0"],
        ["--no-adaptive-kl", "--kl-coef", "0"],
        ["--kl-coef", "1e300", "--kl-target", "1e-300"],
    ],
    "ppo_shared_params": [
        ["--lstm", "--num-minibatches", "4"],
        ["--lstm", "--num-envs", "1", "--num-minibatches", "1", "--observe", "0", "2"],
        ["--observe", "9"],
        ["--observe", "0", "0"],
        ["--discretize-actions", "3"],
        ["--env", "Hopper", "--discretize-actions", "100000000"],
        ["--env", "Hopper", "--no-share-params"],
    ],
    "ppo_rlhf": [
        ["--kl-horizon", "0.8"],
        ["--kl-horizon", "0.9", "--kl-target", "1e-300"],
        ["--value-warmup", "2"],
        ["--value-warmup", "1", "--value", "separate", "--ptx-coef", "1"],
        ["--model", "empty", "--prompts", "plain.txt"],
        ["--reward-model", "empty"],
        ["--num-steps", "121", "--total-timesteps", "10000"],
        ["--temperature", "1e-6", "--eval-temperature", "1e-6"],
        ["--micro-batch", "1", "--ptx-coef", "1", "--prompts", "plain.txt"],
        ["--max-kl", "1e-300", "--eval-every", "1"],
    ],
    "ppo_atari": [["--stack-num", "1000000000"], ["--env", "Pong", "--precision", "bfloat16"], ["--noop-max", "2147483648"]],
}


@dataclasses.dataclass
class Case:
    name: str  # "ppo_atari 17"
    script: str
    words: list[str]
    real: bool  # as a process of its own
    damage: str = ""  # of the run directory ./run
    closed: tuple[int, ...] = ()  # streams that are closed
    stdout: str = ""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    limits: dict[int, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        about = [f"{key}={getattr(self, key)}" for key in ("damage", "closed", "stdout", "env", "limits") if getattr(self, key)]
        words = shlex.join(word if len(word) < 60 else f"{word[:20]}...({len(word)} characters)" for word in self.words)
        text = f"[{self.name}] {self.script}.py {words} {' '.join(about)}"
        return text.encode("utf-8", "backslashreplace").decode()


def kind_of(annotation: Any) -> tuple[Any, list[Any]]:
    """Plain type of a field (int, float, bool, str, tuple, Literal) and other values that are valid: None, the literals."""
    others: list[Any] = []
    while True:
        origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
        if hasattr(annotation, "__value__"):  # of a `type` statement
            annotation = annotation.__value__
        elif origin is typing.Annotated:
            annotation = inner[0]
        elif origin in (typing.Union, types.UnionType):
            others.append(None)
            annotation = next(x for x in inner if x is not type(None))
        elif origin is typing.Literal:
            return typing.Literal, [*others, *inner]
        else:
            return origin or annotation, others


def fields_of(script: str) -> dict[str, tuple[Any, list[Any]]]:
    """Name -> kind_of of the flags of a script."""
    args = importlib.import_module(script).Args
    hints = typing.get_type_hints(args, include_extras=True)
    return {field.name: kind_of(hints[field.name]) for field in dataclasses.fields(args) if field.init}


def draw_value(rng: random.Random, script: str, name: str, kind: Any, others: list[Any]) -> list[str]:
    """Words after a flag that is no switch."""
    if rng.random() < 0.2:
        return [rng.choice(TEXTS)]
    if others and rng.random() < 0.5:
        return [str(rng.choice(others))]
    if name == "env":
        return [rng.choice(ENVS[script] * 3 + BAD_ENVS)]
    if name in ("data", "prompts", "model", "reward_model"):
        return [rng.choice([*PLACES, *list(FILES) * 3])]
    if name in ("run_dir", "resume", "evaluate"):
        return [rng.choice([*PLACES, "run"])]
    if name == "device":
        return [
            rng.choice(
                ["cpu", "auto", "CPU", "cuda", "cuda:0", "cuda:-1", "cuda:\uff11", "cpu:0", "mps", "meta", "cuda:" + "9" * 30]
            )
        ]
    if kind is int:
        pool = [x for x in INTEGERS if not (name in LONG and x > 10**6) and not (name in LOOPS and 100 < x < 2**31)]
        if name == "num_threads":  # a million takes all processes of the machine
            pool += [1000, 10**5]
        return [str(rng.choice([*pool, 10**400] if name in ("total_timesteps", "seed") else pool))]
    if kind is float:
        return [repr(rng.choice(FLOATS))]
    if kind is tuple:
        return [str(rng.choice(INTEGERS)) for _ in range(rng.randrange(4))]
    return [rng.choice([*TEXTS, "a/b", "x" * 200])]


def draw_flag(rng: random.Random, script: str, name: str, kind: Any, others: list[Any]) -> Flags:
    """A flag with a value that is valid, on the border or nonsense."""
    flag = f"--{name.replace('_', '-')}"
    if name == "compile":  # takes half a minute with each new shape
        return {"--no-compile": []}
    if name == "track" and rng.random() < 0.5:
        return {"--no-track": []}
    if kind is bool:
        return {rng.choice([flag, f"--no-{flag[2:]}"]): []}
    return {flag: draw_value(rng, script, name, kind, others)}


def to_words(rng: random.Random, flags: Flags) -> list[str]:
    words = []
    for flag, values in flags.items():
        if len(values) == 1 and (rng.random() < 0.3 or values[0].startswith("-")):
            words.append(f"{flag}={values[0]}")
        else:
            words += [flag, *values]
    return words


def fit_steps(flags: Flags) -> Flags:
    """Two rollouts, where the sizes are numbers: so that they are not refused for too few steps.

    Not where they would take minutes, but again where no machine has the memory.
    """
    try:
        rollout = int(flags["--num-envs"][0]) * int(flags["--num-steps"][0])
    except ValueError:
        return flags
    fits = 0 < rollout <= 10**5 or rollout > 10**10
    return flags | {"--total-timesteps": [str(2 * rollout)]} if fits else flags


def draw_case(script: str, number: int) -> Case:
    rng = random.Random(f"{SEED} {script} {number}")
    case = Case(f"{script} {number}", script, [], number % REAL == 0)
    fields = fields_of(script)
    tiny = TINY[script]
    kind = rng.choices(["values", "words", "conflict", "damage", "around"], [50, 8, 12, 20, 10])[0]
    if kind == "values":
        first = list(fields)[number % len(fields)]  # every flag has its turn
        names = [first, *rng.sample(list(fields), rng.choice([0, 0, 1, 2]))]
        drawn: Flags = {}
        for name in names:
            drawn |= draw_flag(rng, script, name, *fields[name])
        flags = tiny | drawn
        if "--total-timesteps" not in drawn and rng.random() < 0.8:
            flags = fit_steps(flags)
        if "--num-threads" in drawn:
            # what the threads' stacks would need is refused by the system before the machine runs out of processes
            case.real, case.limits = False, {resource.RLIMIT_AS: 48 * 2**30}
        case.words = to_words(rng, flags)
        if "--track" in drawn:
            case.real, case.env = True, {"WANDB_MODE": rng.choice(["offline", "disabled", "nonsense", ""]), "WANDB_API_KEY": ""}
    elif kind == "words":
        extra = rng.choice([*WORDS, *([flag, rng.choice(["True", "False", "x", ""])] for flag in CLEANRL)])
        case.words = [*to_words(rng, tiny), *extra] if rng.random() < 0.7 else [*extra, *to_words(rng, tiny)]
    elif kind == "conflict":
        words = rng.choice(CONFLICTS + CONFLICTS_OF.get(script, []) * 3)
        saved = any(word.startswith(("--resume", "--evaluate")) for word in words)
        case.words = words if saved and rng.random() < 0.8 else [*to_words(rng, tiny), *words]
        case.damage = "none"
    elif kind == "damage":
        case.damage = rng.choice(list(DAMAGES))
        case.words = ["--evaluate", rng.choice(["run", "run/checkpoint.pt"])]
        if case.damage != "module of a stranger":
            case.words += ["--env", *tiny["--env"]]
        if rng.random() < 0.5 and case.damage != "module of a stranger":
            case.words = ["--resume", "run", *rng.choice([[], ["--total-timesteps", "192"]])]
    else:
        case.words = to_words(rng, tiny)
        around = rng.choice(
            ["full", "no stderr", "no stdout", "small files", "few files", "ascii", "homeless", "log full", "wide"]
        )
        if around == "full":
            case.real, case.stdout = True, "/dev/full"
        elif around in ("no stderr", "no stdout"):
            case.real, case.closed = True, (2 if around == "no stderr" else 1,)
        elif around in ("small files", "log full"):
            case.real, case.limits = (
                False,
                {resource.RLIMIT_FSIZE: rng.choice([20_000, 80_000]) if around == "small files" else 100},
            )
        elif around == "few files":
            case.real, case.limits = False, {resource.RLIMIT_NOFILE: rng.choice([8, 12, 20])}
        elif around == "ascii":
            case.real, case.env = True, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
            case.words += ["--run-dir", "ünïcode ½"]
        elif around == "homeless":
            case.env = {"HOME": "/nonexistent", "COLUMNS": "1", "TERM": "dumb"}
        else:
            case.env = {"COLUMNS": rng.choice(["0", "-1", "x", "100000"])}
    return case


# ---------------------------------------------------------------------------------------------------------------------
# Damaged run directories: each changes ./run of a finished run; True where it must be refused with exit code 2


def rewrite(run: Path, change: Callable[[dict], Any]):
    """Loads the checkpoint, changes it, and saves what `change` returns, or the changed one."""
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    changed = change(checkpoint)
    torch.save(checkpoint if changed is None else changed, run / "checkpoint.pt")


def drop_key(rng, run: Path, script: str):
    def change(checkpoint):
        del checkpoint[rng.choice(list(checkpoint))]

    rewrite(run, change)


def drop_needed_key(rng, run: Path, script: str):
    """One that an evaluation needs, too."""

    def change(checkpoint):
        del checkpoint[rng.choice(["theta", "args", "kind"])]

    rewrite(run, change)


def spoil_key(rng, run: Path, script: str):
    def change(checkpoint):
        key = rng.choice([key for key in checkpoint if key != "wandb_id"])
        checkpoint[key] = rng.choice([None, "text", -1, math.nan, [], {}, torch.zeros(3), [None], True, 10**30])

    rewrite(run, change)


def resize(rng, run: Path, script: str):
    """Other sizes of the parameters: fewer, more, another shape or type."""

    def change(checkpoint):
        theta = checkpoint["theta"]
        forms = [theta[:-1], theta.repeat(2), theta[:0], theta.double(), theta[None], theta.to(torch.complex64), theta[0]]
        checkpoint["theta"] = rng.choice(forms).clone()

    rewrite(run, change)


def expand(rng, run: Path, script: str):
    """A tensor of ten thousand million numbers that takes four bytes in the file."""

    def change(checkpoint):
        checkpoint["theta"] = torch.zeros(1).expand(10**10)

    rewrite(run, change)


def other_statistics(rng, run: Path, script: str):
    def change(checkpoint):
        state = checkpoint[rng.choice([key for key in ("obs_rms", "return_rms") if key in checkpoint])]
        state[rng.choice(["mean", "m2"])] = rng.choice([torch.zeros(77), torch.zeros(2, 2), torch.zeros(0)])

    simple = {"ppo_atari": {"updates": math.nan}, "ppo_rlhf": {"score_std": rng.choice([0.0, -1.0, math.inf])}}
    rewrite(run, change if script not in simple else lambda checkpoint: checkpoint.update(simple[script]))


def other_adam(rng, run: Path, script: str):
    def change(checkpoint):
        a, b, *step = checkpoint["adam"]  # ppo_atari.py has the step apart
        others = [(a,), (a, b[:-1], *step), (a.repeat(2), b.repeat(2), *step), (a, b, *step, a), None, ()]
        checkpoint["adam"] = rng.choice(others)

    rewrite(run, change)


def not_finite(rng, run: Path, script: str):
    def change(checkpoint):
        checkpoint["theta"][rng.randrange(len(checkpoint["theta"]))] = rng.choice([math.nan, math.inf, 1e38])

    rewrite(run, change)


def spoil_setting(rng, run: Path, script: str):
    def change(checkpoint):
        args = checkpoint["args"]
        name = rng.choice(
            [name for name in args if name not in ("total_timesteps", "update_epochs", "eval_episodes", "num_threads")]
        )
        args[name] = rng.choice([None, "text", -1, math.nan, [], {}, 10**12, 0, "\udcff", True, "../../x", "cuda:7"])

    rewrite(run, change)


def drop_setting(rng, run: Path, script: str):
    def change(checkpoint):
        del checkpoint["args"][rng.choice(list(checkpoint["args"]))]

    rewrite(run, change)


def more_setting(rng, run: Path, script: str):
    rewrite(run, lambda checkpoint: checkpoint["args"].update({rng.choice(["no_such_flag", "", "1", "self", "ü"]): 1}))


def spoil_sizes(rng, run: Path, script: str):
    def change(checkpoint):
        sizes = checkpoint["log_sizes"]
        checkpoint["log_sizes"] = rng.choice([{**sizes, "../x": 0}, {**sizes, "/etc/x": 5}, dict.fromkeys(sizes, -1), {1: 1}])

    rewrite(run, change)


def spoil_position(rng, run: Path, script: str):
    def change(checkpoint):
        key = rng.choice(["iteration", "global_step"])
        checkpoint[key] = rng.choice([-1, 10**6, 2**70, 1.5, "1", math.nan])

    rewrite(run, change)


def spoil_returns(rng, run: Path, script: str):
    def change(checkpoint):
        checkpoint["recent_returns"] = rng.choice([["a"], [math.nan], [None], [[1.0]], [1.0] * 10**5, {"a": 1.0}])

    rewrite(run, change)


def other_spaces(rng, run: Path, script: str):
    """Written for an environment of other spaces."""

    def change(checkpoint):
        if "spaces" in checkpoint:
            checkpoint["spaces"] = rng.choice([None, "text", {}, ["Box", "Box"]])
        checkpoint["theta"] = torch.zeros(len(checkpoint["theta"]) + rng.choice([-64, 64, 6400]))

    rewrite(run, change)


def flip_bits(rng, run: Path, script: str):
    file = run / "checkpoint.pt"
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 3, 100])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(rng, run: Path, script: str):
    file = run / "checkpoint.pt"
    os.truncate(file, rng.randrange(file.stat().st_size))


def replace_file(rng, run: Path, script: str):
    file = run / "checkpoint.pt"
    file.write_bytes(
        rng.choice([b"", b"text\n", rng.randbytes(5000), b"PK\x03\x04" + rng.randbytes(500), pickle.dumps({"a": 1})])
    )


def code_in_pickle(rng, run: Path, script: str):
    """Would write the file `pwned` if it were unpickled."""

    class Code:
        def __reduce__(self):
            return os.system, ("touch pwned",)

    if rng.random() < 0.5:
        torch.save({"kind": script, "args": Code()}, run / "checkpoint.pt")
    else:
        (run / "checkpoint.pt").write_bytes(pickle.dumps(Code()))


def bomb(rng, run: Path, script: str):
    """A few megabytes that unpack to five gigabytes."""
    rewrite(run, lambda checkpoint: checkpoint.update(theta=torch.zeros(4)))
    file, packed = run / "checkpoint.pt", run / "packed"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for item in old.infolist():
            with new.open(item.filename, "w", force_zip64=True) as target:
                if item.filename.endswith("data/0"):
                    for _ in range(5 * 2**10):
                        target.write(bytes(2**20))
                else:
                    target.write(old.read(item))
    packed.replace(file)


def other_kind(rng, run: Path, script: str):
    rewrite(run, lambda c: c.update(kind=rng.choice(["", None, 1, [1], *(name for name in SCRIPTS if name != script)])))


def no_dictionary(rng, run: Path, script: str):
    torch.save(rng.choice([[1], torch.zeros(3), None, "text", {}, {1: 2}, ()]), run / "checkpoint.pt")


def no_logs(rng, run: Path, script: str):
    file = run / rng.choice(["metrics.jsonl", "episodes.jsonl"])
    rng.choice([file.unlink, lambda: file.write_text(""), lambda: (file.unlink(), file.mkdir())])()


def spoil_models(rng, run: Path, script: str):
    """What ppo_rlhf.py began with; the other scripts have no such file."""
    if (file := run / "models.pt").is_file():
        state = torch.load(file, weights_only=True)
        state[rng.choice(list(state))] = rng.choice([None, "text", -1, [], {}, [[-1]], [["a"]], torch.zeros(3), {"lm": 1}])
        torch.save(rng.choice([state, state, {}, None, torch.zeros(3)]), file)


def spoil_logs(rng, run: Path, script: str):
    for file in run.glob("*.jsonl"):
        data = file.read_bytes()
        file.write_bytes(rng.choice([data, data + b'{"iteration": 1, "sco', data + b"\xff\n", data + b"[]\n", b"3\n" + data]))


def temporary_file(rng, run: Path, script: str):
    """What a kill or somebody left: a half-written checkpoint, a folder or a link to a file of the user."""
    file = run / "checkpoint.tmp"
    rng.choice([lambda: file.write_bytes(b"half"), file.mkdir, lambda: file.symlink_to("../full/precious")])()


def a_folder(rng, run: Path, script: str):
    (run / "checkpoint.pt").unlink()
    rng.choice([(run / "checkpoint.pt").mkdir, lambda: (run / "checkpoint.pt").symlink_to("checkpoint.pt"), lambda: None])()


def stranger(rng, run: Path, script: str):
    """The checkpoint names a module that came with it; importing it would write the file `pwned`."""
    for folder in (run, run.parent):
        (folder / "evil.py").write_text("open('pwned', 'w')\n")
    rewrite(run, lambda checkpoint: checkpoint["args"].update(env="evil:Evil-v0"))


DAMAGES: dict[str, tuple[Callable, bool]] = {
    "key dropped": (drop_key, False),
    "needed key dropped": (drop_needed_key, True),
    "key spoilt": (spoil_key, False),
    "resized": (resize, True),
    "expanded": (expand, True),
    "other statistics": (other_statistics, False),  # an evaluation need not read all of them
    "other Adam": (other_adam, False),
    "not finite": (not_finite, False),
    "setting spoilt": (spoil_setting, False),
    "setting dropped": (drop_setting, False),
    "setting too many": (more_setting, True),
    "sizes spoilt": (spoil_sizes, False),
    "position spoilt": (spoil_position, False),
    "returns spoilt": (spoil_returns, False),
    "other spaces": (other_spaces, True),
    "bits flipped": (flip_bits, False),
    "truncated": (truncate, True),
    "file replaced": (replace_file, True),
    "code in the pickle": (code_in_pickle, True),
    "bomb": (bomb, True),
    "other kind": (other_kind, True),
    "no dictionary": (no_dictionary, True),
    "no logs": (no_logs, False),
    "logs spoilt": (spoil_logs, False),
    "models spoilt": (spoil_models, False),
    "temporary file": (temporary_file, False),
    "a folder": (a_folder, True),
    "module of a stranger": (stranger, True),
}


# ---------------------------------------------------------------------------------------------------------------------
# Running and judging


def furnish(folder: Path, whole: Path, case: Case):
    """The folder that a case starts in: empty but for what its words may name."""
    folder.mkdir()
    words = " ".join(case.words)
    if case.script == "ppo_rlhf":
        for name, data in FILES.items():
            if name in words or name == "texts.tsv":
                (folder / name).write_bytes(data)
    if case.damage:
        shutil.copytree(whole, folder / "run")
    for name in ("full", "empty"):
        if name in words or case.damage:
            (folder / name).mkdir()
    if (folder / "full").is_dir():
        (folder / "full" / "precious").write_text("of the user\n")
    if "file" in words:
        (folder / "file").write_text("of the user\n")
    if "dangling" in words:
        (folder / "dangling").symlink_to("nowhere")
    if "loop" in words:
        (folder / "loop").symlink_to("loop")
    if case.damage in DAMAGES:
        DAMAGES[case.damage][0](random.Random(f"{SEED} {case.name} damage"), folder / "run", case.script)


def surroundings(script: str) -> dict[str, str]:
    """Variables for ppo_rlhf.py: stages are trained once, and no model is looked for elsewhere."""
    return {"XDG_CACHE_HOME": str(CACHE), "HF_HUB_OFFLINE": "1"} if script == "ppo_rlhf" else {}


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> what it is, with a hash of each file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = kind
    return found


def execute(case: Case, folder: Path) -> tuple[Ended, str, str]:
    """Runs it: (how it ended, stdout, stderr)."""
    out, err, env = Path(f"{folder}.out"), Path(f"{folder}.err"), surroundings(case.script) | case.env
    if not case.real:
        child = Warm(case.script, case.words, folder, case.stdout or out, err, env, case.limits)
        leader: int = child.process.pid
        ended = watch(leader, lambda: child.process.exitcode, SECONDS, MEMORY)
    else:
        command = [sys.executable, str(ROOT / f"{case.script}.py"), *case.words]
        if case.closed:
            closing = " ".join(f"{number}>&-" for number in case.closed)
            command = ["sh", "-c", f'exec "$@" {closing}', "sh", *command]
        with open(case.stdout or out, "ab") as stdout, open(err, "ab") as stderr:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | env,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        leader = process.pid
        ended = watch(leader, process.poll, SECONDS, MEMORY)
        process.wait()
    if kill_session(leader) and not ended.why:
        ended.why = "left processes behind"
    texts = [path.read_text(errors="replace") if path.is_file() else "" for path in (out, err)]
    return ended, texts[0], texts[1]


def not_json(constant: str):
    raise ValueError(f"{constant} is no JSON")


def judge(case: Case, folder: Path, before: dict[str, str], ended: Ended, out: str, err: str) -> list[str]:
    """What is wrong with how a case ended."""
    if ended.why:
        return [ended.why]
    wrong = []
    if ended.code not in (0, 1, 2):
        wrong.append(f"exit code {ended.code}")
    if case.damage in DAMAGES and DAMAGES[case.damage][1] and ended.code != 2:
        wrong.append(f"exit code {ended.code} for what must be refused")
    if "Traceback" in out + err:
        wrong.append("traceback")
    if ended.code in (1, 2) and 2 not in case.closed:
        lines = [line for line in err.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith(f"{case.script}.py: ")]
        boxed = bool(lines) and lines[-1].startswith("╰") and ended.code == 2  # of tyro
        if not (boxed and not said) and not (len(said) == 1 and lines[-1] == said[0]):
            wrong.append("no single sentence at the end of stderr")
    after = contents(folder)
    if ended.code == 2 and after != before:
        changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
        wrong.append(f"exit code 2 left or changed {', '.join(changed)[:300]}")
    if "pwned" in after or "run/pwned" in after:
        wrong.append("ran code that came with the checkpoint")
    if after.get("full/precious") != before.get("full/precious"):
        wrong.append("wrote through a link into a file of the user")
    if new := [path for path in after if path.endswith(".tmp") and path not in before]:
        wrong.append(f"left {', '.join(new)}")
    for path in folder.rglob("*.json*"):
        if not path.is_file() or (case.damage in DAMAGES and before.get(str(path.relative_to(folder)))):
            continue
        try:
            for line in path.read_text().splitlines():
                json.loads(line, parse_constant=not_json)
        except ValueError as error:
            wrong.append(f"{path.name}: {error}")
    return wrong


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[str], Path]:
    """Script -> run directory of a finished run of it."""
    made: dict[str, Path] = {}

    def make(script: str) -> Path:
        if script not in made:
            folder = tmp_path_factory.mktemp(script)
            words = [word for flag, values in TINY[script].items() for word in (flag, *values)]
            if script == "ppo_rlhf":
                furnish(folder / "here", folder, Case("", script, [], False))
                folder /= "here"
            child = Warm(script, [*words, "--run-dir", "run"], folder, env=surroundings(script))
            assert child.wait() == 0, child.stderr.read_text()
            made[script] = folder / "run"
        return made[script]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("script", FUZZED)
def test_every_command_line_ends_in_one_sentence(script, whole, tmp_path):
    failed, codes = [], []
    for number in range(math.ceil(CASES / len(FUZZED))):
        case = draw_case(script, number)
        if ONLY and case.name != ONLY:
            continue
        folder = tmp_path / str(number)
        furnish(folder, whole(script), case)
        before = contents(folder)
        ended, out, err = execute(case, folder)
        codes.append(ended.code)
        if wrong := judge(case, folder, before, ended, out, err):
            end = " | ".join(err.strip().splitlines()[-2:])[-400:]
            failed.append(f"{case}\n    {'; '.join(wrong)}\n    code {ended.code}, {ended.seconds:.0f} s: {end}")
            print(failed[-1].encode("utf-8", "backslashreplace").decode(), flush=True)
        shutil.rmtree(folder)
    counts = ", ".join(f"{codes.count(code)} with {code}" for code in sorted(set(codes), key=str))
    print(f"{script}: {len(codes)} command lines, {counts}; {len(failed)} failed")
    assert not failed, f"{len(failed)} of {len(codes)} command lines:\n" + "\n".join(failed)
