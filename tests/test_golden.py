"""Losses of the first ten updates or iterations against stored numbers, so that no change of the mathematics goes unseen.

The numbers, and the checksums of test_ablations.py, are those of golden.json. After an intended change:
PYTHONPATH=. python tests/test_golden.py writes the new ones.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

import ppo_atari
import ppo_continuous
import ppo_kl_penalty
import ppo_shared_params
from helpers import TINY, read_jsonl

SCRIPTS = {script.__name__: script for script in (ppo_continuous, ppo_kl_penalty, ppo_shared_params, ppo_atari)}
# ten iterations of two epochs and two minibatches; of Atari ten updates of one iteration, because in a longer run the last
# bit of another processor changes an action
COMMON: dict[str, Any] = {"num_minibatches": 2, "update_epochs": 2, "learning_rate": 1e-3, "ent_coef": 0.01}
FLAGS: dict[str, dict[str, Any]] = {
    "ppo_continuous": {"total_timesteps": 640},
    "ppo_kl_penalty": {"total_timesteps": 640},
    "ppo_shared_params": {"env": "CartPole-v1", "total_timesteps": 640},
    "ppo_atari": {"env": "Breakout", "num_steps": 32, "total_timesteps": 64, "update_epochs": 5, "device": "cpu"},
}
GOLDEN: dict[str, dict[str, list[float]]] = json.loads((Path(__file__).parent / "golden.json").read_text())["losses"]


def losses(name: str, run_dir) -> dict[str, list[float]]:
    """Means over each iteration."""
    script = SCRIPTS[name]
    script.train(script.Args(**(TINY | {"run_dir": str(run_dir)} | COMMON | FLAGS[name])))
    records = read_jsonl(f"{run_dir}/metrics.jsonl")[1:]
    keys = ["policy_loss", "value_loss", "entropy", "grad_norm", "explained_variance"]
    keys += ["kl"] if name == "ppo_kl_penalty" else []
    return {key: [record[f"losses/{key}"] for record in records] for key in keys}


@pytest.mark.parametrize("name", SCRIPTS)
def test_losses(name):
    got = losses(name, "run")
    assert got.keys() == GOLDEN[name].keys()
    for key, values in GOLDEN[name].items():
        assert got[key] == pytest.approx(values, rel=1e-4, abs=2e-6), key


def rounded(values, digits: int) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]


if __name__ == "__main__":
    import test_ablations

    golden: dict[str, dict] = {"losses": {}, "checksums": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in SCRIPTS:
            found = losses(name, f"{folder}/{name}")
            golden["losses"][name] = {key: rounded(values, 7) for key, values in found.items()}
        for name, settings in test_ablations.CHECKSUMS.items():
            sums = {of: test_ablations.checksum_of(name, of, Path(folder, f"{name}-{of}")) for of in settings}
            golden["checksums"][name] = {of: rounded(values, 5) for of, values in sums.items()}
    text = re.sub(r"\[[^]]*\]", lambda numbers: json.dumps(json.loads(numbers[0])), json.dumps(golden, indent=1))
    (Path(__file__).parent / "golden.json").write_text(text + "\n")
