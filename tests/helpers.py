"""What several test files need: tiny arguments, log files, and the script as a subprocess."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import ppo_continuous
from ppo_continuous import Args

SCRIPT = Path(ppo_continuous.__file__)
TIMES = ("charts/SPS", "charts/seconds", "charts/env_share", "charts/update_share")
TINY: dict[str, Any] = {
    "env": "envs:Point-v0",
    "num_envs": 2,
    "num_steps": 32,
    "num_minibatches": 2,
    "update_epochs": 2,
    "total_timesteps": 4 * 64,
    "eval_episodes": 0,
    "compile": False,
}


def tiny_args(run_dir: Path | str = "run", **changes) -> Args:
    """Arguments of a run that takes a second: 4 iterations, uncompiled."""
    return Args(**(TINY | {"run_dir": str(run_dir)} | changes))


def tiny_flags(run_dir: Path | str = "run", **changes) -> list[str]:
    """The same as words of a command line."""
    return make_flags(TINY | {"run_dir": str(run_dir)} | changes)


def make_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as words of a command line: clip_coef 0.1 is --clip-coef 0.1, anneal_lr False is --no-anneal-lr."""
    flags = []
    for name, value in settings.items():
        word = name.replace("_", "-")
        flags += [f"--{word}" if value else f"--no-{word}"] if isinstance(value, bool) else [f"--{word}", str(value)]
    return flags


def read_jsonl(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_metrics(run_dir: Path | str) -> list[dict]:
    """metrics.jsonl without what differs between equal runs: times, and the run directory in the header."""
    records = [{k: v for k, v in record.items() if k not in TIMES} for record in read_jsonl(Path(run_dir) / "metrics.jsonl")]
    del records[0]["args"]["run_dir"]
    return records


def read_checkpoint(run_dir: Path | str) -> dict:
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def equal(a, b) -> bool:
    """Bitwise equality of nested checkpoints."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def loss_inputs(script: Any, **columns: torch.Tensor) -> tuple[Any, Any]:
    """new and old of ppo_loss, one row a sample, from their columns; what is not named is 0, or 1 for valid and std.

    A field that both have is old_NAME in old: value is that of new, old_value that of old.
    """
    like = next(iter(columns.values()))

    def fill(kind, prefix: str):
        fields = {}
        for field in kind._fields:
            shape = (len(like), 1) if field in ("mean", "std") else (len(like),)
            neutral = torch.full(shape, float(field in ("valid", "std")), dtype=like.dtype)
            fields[field] = columns.pop(prefix + field if field in script.Output._fields else field, neutral)
        return kind(**fields)

    inputs = fill(script.Output, ""), fill(script.Batch, "old_")
    assert not columns, f"neither Output nor Batch has {list(columns)}"
    return inputs


def run_script(*words, script: Path | str = SCRIPT, **env) -> subprocess.CompletedProcess:
    """python script words..., in the current directory, with the environment variables changed."""
    command = [sys.executable, str(script), *map(str, words)]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=600, check=False)


def edited(changes: list[tuple[str, str]], script: Path = SCRIPT) -> ModuleType:
    """A copy of the script in the current directory, with each text replaced wherever it stands, imported."""
    text = script.read_text()
    for old, new in changes:
        assert old in text, f"the trial edit finds no {old!r}"
        text = text.replace(old, new)
    Path("my_ppo.py").write_text(text)
    spec = importlib.util.spec_from_file_location("my_ppo", Path("my_ppo.py").resolve())
    assert spec and spec.loader
    module = sys.modules["my_ppo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
