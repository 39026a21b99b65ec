"""Whether a script still computes the same bits as in an earlier git revision, for changes that must change nothing.

    python benchmarks/same_bits.py 7aa7ce4
    python benchmarks/same_bits.py 7aa7ce4 ppo_continuous.py --env Hopper --num-envs 8 --no-compile
    python benchmarks/same_bits.py 7aa7ce4 ppo_atari.py --iterations 6

Flags after the script's name are the script's own, on top of short rollouts. Without flags every script, or the one named,
goes through a list of cases. A case runs the old script and the new one, with a checkpoint every third of the run. Then the
old one is killed while it replaces its third checkpoint, and the new one resumes that run directory from the second. Equal to
the last bit must be: every entry of the old checkpoint (found by its name, or a tensor's value in another place), every
episode, every loss and chart; of ppo_rlhf.py also the evaluations, samples and models. New entries are allowed. Left out are
times, log sizes, and names of runs and paths. The exit code is 1 if anything differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("charts/SPS", "charts/seconds", "charts/env_share", "charts/update_share", "charts/policy_share")
LOGS = ("metrics.jsonl", "episodes.jsonl", "evaluations.jsonl", "samples.jsonl")
TENSORS = ("checkpoint.pt", "models.pt")
FREE = ("args/run_dir", "args/resume", "script_sha256", "log_sizes", "wandb_id")  # of checkpoints

MUJOCO: dict[str, list[str]] = {
    "--env": ["Hopper"],
    "--num-steps": ["256"],
    "--num-minibatches": ["4"],
    "--update-epochs": ["3"],
    "--eval-episodes": ["0"],
}
DEFAULTS: dict[str, dict[str, list[str]]] = {
    "ppo_continuous.py": MUJOCO | {"--num-envs": ["1"]},
    "ppo_kl_penalty.py": MUJOCO | {"--num-envs": ["1"]},
    "ppo_shared_params.py": {"--num-envs": ["4"], "--num-steps": ["64"], "--eval-episodes": ["0"], "--eval-deterministic": []},
    "ppo_atari.py": {"--num-envs": ["2"], "--num-steps": ["16"], "--num-threads": ["1"], "--eval-episodes": ["0"]},
    "ppo_rlhf.py": {
        "--data": [str(ROOT / "tests" / "texts.tsv")],
        "--num-envs": ["8"],
        "--num-steps": ["8"],
        "--num-minibatches": ["2"],
        "--update-epochs": ["2"],
        "--eval-episodes": ["4"],
        "--eval-every": ["2"],
        "--vocabulary": ["300"],
        "--width": ["32"],
        "--layers": ["1"],
        "--sft-epochs": ["2"],
        "--num-comparisons": ["64"],
    },
}
COMPILED = ["", "--num-envs 8 --num-steps 64"]
BASE = [
    "--env HalfCheetah",
    "",
    "--num-envs 8 --num-steps 64",
    "--norm-obs batch --num-envs 4 --num-steps 64",
    "--norm-obs none --clip-obs inf --no-norm-reward --clip-reward inf",
    "--no-state-independent-std --ent-coef 0.01",
    "--norm-adv batch --num-envs 2",
    "--norm-adv none --no-clip-vloss --no-clip-policy",
    "--target-kl 0.002 --learning-rate 0.003",
    "--anneal-clip --no-anneal-lr --weight-init normc",
    "--no-bootstrap-truncated --no-mask-resets --no-clip-actions --num-envs 3 --num-steps 64",
    "--env same_bits:Noise-v0 --num-envs 2 --weight-init torch --adam-eps 1e-8",  # of Gymnasium
]
CASES: dict[str, list[str]] = {
    "ppo_continuous.py": [f"{case} --no-compile" for case in BASE]
    + [*COMPILED, "--no-state-independent-std --norm-adv batch --target-kl 0.002"],
    "ppo_kl_penalty.py": [
        f"{case} --no-compile"
        for case in (
            "",
            "--num-envs 8 --num-steps 64",
            "--no-adaptive-kl --kl-coef 3",
            "--kl-target 0.001 --learning-rate 0.003",
            "--norm-obs batch --no-state-independent-std",
            "--norm-adv batch --target-kl 0.002",
        )
    ]
    + [*COMPILED, "--no-adaptive-kl --kl-coef 3"],
    "ppo_shared_params.py": [
        f"{case} --no-compile"
        for case in (
            "",
            "--no-share-params",
            "--env Acrobot-v1 --norm-obs step --clip-obs 10 --norm-adv batch",
            "--env Hopper --discretize-actions 5 --norm-obs batch",
            "--env same_bits:Masked-v0 --target-kl 0.01",
            "--env MountainCar-v0 --no-bootstrap-truncated --no-mask-resets --no-norm-reward",
            "--lstm --observe 0 2",
            "--lstm --env same_bits:Masked-v0 --no-share-params --num-minibatches 2",
        )
    ]
    + ["", "--env Hopper --discretize-actions 5 --norm-obs step", "--env same_bits:Masked-v0"],
    "ppo_atari.py": [
        f"{case} --no-compile"
        for case in (
            "",
            "--precision bfloat16",
            "--env Pong --norm-adv batch --no-episodic-life --stack-num 2",
            "--env SpaceInvaders --max-episode-steps 40 --no-clip-reward --no-scale-obs --target-kl 0.01",
            "--num-threads 2 --num-envs 3 --num-steps 8",
        )
    ]
    + ["", "--precision bfloat16"],
    "ppo_rlhf.py": [
        "",
        "--env same_bits:score --value separate --norm-adv minibatch",
        "--kl-estimator k3 --whiten-rewards --score-clip 1 --no-clip-vloss --target-kl 0.001",
        "--ptx-coef 0.1 --value-warmup 3 --micro-batch 2 --ent-coef 0.01 --kl-target None",
        "--head-init torch --reward-pool mean --no-stop-at-eos --temperature 0.7 --precision bfloat16",
        "--env same_bits:score --no-norm-score --no-eos-score None --norm-adv none --no-clip-policy --num-threads 2",
    ],
}


class Noise(gymnasium.Env):
    """Observation (3,) and reward are noise; ends by termination or truncation at random; Box actions."""

    def __init__(self, render_mode: str | None = None):
        self.observation_space: Any = Box(-np.inf, np.inf, (3,))
        self.action_space: Any = Box(-1, 1, (2,))

    def info(self) -> dict:
        return {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return (5 + 3 * self.np_random.standard_normal(3)).astype(np.float32), self.info()

    def step(self, action):
        obs, reward = (5 + 3 * self.np_random.standard_normal(3)).astype(np.float32), float(self.np_random.normal(2, 4))
        reward += float(np.sum(action))
        terminated, truncated = bool(self.np_random.random() < 0.1), bool(self.np_random.random() < 0.1)
        return obs, reward, terminated, truncated, self.info()


class Masked(Noise):
    """The same with four actions, of which the info allows two or three."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(render_mode)
        self.action_space = Discrete(4)

    def info(self) -> dict:
        mask = self.np_random.random(4) < 0.5
        mask[self.np_random.integers(2)] = mask[2] = True
        return {"action_mask": mask}


register: Any = gymnasium.register
register("Noise-v0", Noise)
register("Masked-v0", Masked)


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward for ppo_rlhf.py."""
    return [float(response.count("e")) for response in responses]


def parse_flags(words: list[str]) -> dict[str, list[str]]:
    """Words of a command line -> the values of each flag; a later flag replaces an earlier one."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, *value = word.split("=", 1)
            flag = name.replace("_", "-")
            flags[flag] = value
        elif not flags:
            raise ValueError(f"{word} belongs to no flag")
        else:
            flags[flag].append(word)
    for flag in ("--num-envs", "--num-steps"):
        if flag in flags and not (flags[flag] and flags[flag][0].isdecimal()):
            raise ValueError(f"{flag} needs a number")
    return flags


def run(script: Path, flags: dict[str, list[str]], folder: Path, kill_at: int = 0) -> None:
    """Runs a script in `folder`; with kill_at it kills itself instead of putting that checkpoint in its place (from 1).

    Raises RuntimeError with the end of stderr where the exit code is another than 0, or than that of the kill.
    """
    words = [word for flag, values in flags.items() for word in (flag, *values)]
    command = [sys.executable, str(script), *words]
    if kill_at:
        command = [sys.executable, __file__, "--killed-at", str(kill_at), str(script), *words]
    environ = dict(os.environ)
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    if script.name == "ppo_rlhf.py":  # each version makes its models itself
        environ["XDG_CACHE_HOME"] = str(folder / "cache" / script.parent.name)
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != (-9 if kill_at else 0):
        from run import last_words

        told = f"{script}{' resuming' if '--resume' in flags else ''}: exit code {done.returncode}"
        raise RuntimeError(f"{told}: {last_words(done.stderr)}")


def run_killed(kill_at: int, script: str, words: list[str]):
    """Body of the process that dies before its checkpoint number `kill_at` replaces the one before."""
    import runpy
    import signal

    replace, count = os.replace, 0

    def counting(source, target, **options):
        nonlocal count
        if Path(target).name == "checkpoint.pt":
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target, **options)

    system: Any = os
    system.replace = counting
    sys.argv = [script, *words]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts and sequences of tensors as {path: leaf}; a list of numbers is one leaf."""
    if isinstance(value, dict):
        items = {str(key): x for key, x in value.items()}
    elif isinstance(value, list | tuple) and any(isinstance(x, torch.Tensor | dict) for x in value):
        items = {str(i): x for i, x in enumerate(value)}
    else:
        return {path: value}
    return {p: leaf for key, x in items.items() for p, leaf in flatten(x, f"{path}/{key}" if path else key).items()}


def bits(leaf: Any) -> tuple:
    """What must be equal of a leaf: kind, shape and bytes of a tensor, text of anything else (NaN equals NaN, 0.0 not -0.0)."""
    if isinstance(leaf, torch.Tensor):
        return str(leaf.dtype), tuple(leaf.shape), leaf.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return (repr(list(leaf) if isinstance(leaf, tuple) else leaf),)


def compare_tensors(old_dir: Path, new_dir: Path, file: str) -> str:
    """What of the old file of tensors is not in the new one, first difference only; empty: all is there."""
    old, new = (flatten(torch.load(d / file, map_location="cpu", weights_only=True)) for d in (old_dir, new_dir))
    kind = file.removesuffix(".pt")
    places: dict[tuple, list[str]] = {}
    for path, leaf in new.items():
        places.setdefault(bits(leaf), []).append(path)
    for path, leaf in old.items():
        if path.startswith(FREE) or (path in new and bits(new[path]) == bits(leaf)):
            continue
        if path in new:
            a, b = (x.double() if isinstance(x, torch.Tensor) else x for x in (leaf, new[path]))
            same_shape = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape
            how = f"largest difference {(a - b).abs().max().item():.3g}" if same_shape else f"{a!r:.80} became {b!r:.80}"
            return f"{kind}: {path}: {how}"
        if path.startswith("args/"):
            return f"{kind}: the setting {path[5:]} is gone"
        # a tensor may have moved; a number must have kept its own name, since equal numbers say little
        name = path.rsplit("/", 1)[-1]
        moved = [p for p in places.get(bits(leaf), []) if isinstance(leaf, torch.Tensor) or p.rsplit("/", 1)[-1] == name]
        if not moved:
            return f"{kind}: {path} is nowhere in the new one"
    return ""


def read_records(file: Path) -> list[dict]:
    """Records of a log, without the header and times."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records if "global_step" in r]


def compare(old_dir: Path, new_dir: Path) -> str:
    """The first thing that differs between two run directories; empty: none."""
    kept = [name for name in (*LOGS, *TENSORS) if (old_dir / name).exists()]  # not all scripts have all of them
    if gone := [name for name in kept if not (new_dir / name).exists()]:
        return f"{gone[0]} is gone"
    for name in (name for name in kept if name in LOGS):
        old, new = read_records(old_dir / name), read_records(new_dir / name)
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            for key in a:
                if key not in b or repr(a[key]) != repr(b[key]):
                    return f"{name}: {key} of record {i + 1}: {a[key]} became {b.get(key, 'nothing')}"
        if len(old) != len(new):
            return f"{name}: {len(old)} records became {len(new)}"
    differences = (compare_tensors(old_dir, new_dir, name) for name in kept if name in TENSORS)
    return next(filter(None, differences), "")


def check(old: Path, new: Path, flags: dict[str, list[str]], iterations: int) -> tuple[str, int]:
    """Runs a case: ("", number of episodes) where all is the same, else what differs first."""
    steps = iterations * int(flags["--num-envs"][0]) * int(flags["--num-steps"][0])
    flags = {"--checkpoint-every": [str(max(1, iterations // 3))], "--total-timesteps": [str(steps)]} | flags
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            run(old, flags | {"--run-dir": ["old"]}, folder)
            run(new, flags | {"--run-dir": ["new"]}, folder)
            if difference := compare(folder / "old", folder / "new"):
                return difference, 0
            run(old, flags | {"--run-dir": ["resumed"]}, folder, kill_at=3)
            run(new, {"--resume": ["resumed"]}, folder)
            if difference := compare(folder / "old", folder / "resumed"):
                return f"resumed: {difference}", 0
        except RuntimeError as error:
            return str(error), 0
        return "", len(read_records(folder / "old" / "episodes.jsonl"))


def main():
    if sys.argv[1:2] == ["--killed-at"]:
        return run_killed(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("revision", help="git revision of the old script")
    parser.add_argument("script", nargs="?", choices=list(CASES), help="one script; default: all")
    parser.add_argument("--iterations", type=int, default=12, help="iterations of a run, at least 3")
    args, words = parser.parse_known_args()
    if args.iterations < 3:
        parser.error("--iterations must be at least 3: one for each checkpoint")
    if words and not args.script:
        parser.error(f"name a script before its flags: {' '.join(words)}")
    try:
        parse_flags(words)
    except ValueError as error:
        parser.error(str(error))
    different = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in [args.script] if args.script else CASES:
            old = Path(temporary, "old", name)
            old.parent.mkdir(exist_ok=True)
            show = ["git", "show", f"{args.revision}:{name}"]
            text = subprocess.run(show, cwd=ROOT, capture_output=True, check=False)
            if text.returncode:
                parser.error(f"{' '.join(show)}: {text.stderr.decode().strip()}")
            old.write_bytes(text.stdout)
            for case in [" ".join(words)] if words else CASES[name]:
                difference, episodes = check(old, ROOT / name, DEFAULTS[name] | parse_flags(case.split()), args.iterations)
                different += bool(difference)
                print(f"{name} {case or '(defaults)'}: {difference or f'same ({episodes} episodes)'}", flush=True)
    print("all the same" if not different else f"{different} case(s) differ")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
