"""Losses of the first ten iterations against stored numbers, so that no change of the mathematics goes unseen.

After an intended change: python tests/test_golden.py prints the new numbers.
"""

import pytest

from helpers import read_jsonl, tiny_args
from ppo_continuous import train

GOLDEN = {
    "policy_loss": [-0.002559597, -0.001473933, -9.250583e-05, -0.0002360326, -0.0006766894,
                    -9.376256e-05, -0.0007767168, -0.00136228, -0.0002731123, -0.0007847982],
    "value_loss": [11.55051, 0.8264282, 1.541789, 1.974632, 1.110671, 0.207457, 0.6832669, 2.020366, 0.3809408, 0.2998497],
    "entropy": [1.418277, 1.418206, 1.417891, 1.417466, 1.41764, 1.417682, 1.41803, 1.418391, 1.418689, 1.418898],
    "grad_norm": [2.412551, 1.11575, 1.95488, 1.89142, 1.364509, 0.8968562, 1.120427, 2.629522, 0.873413, 1.501197],
    "explained_variance": [-0.01257646, 0.02005363, 0.01128316, 0.05213124, 0.0738849,
                           -0.5352504, -0.2792894, -0.2833544, 0.4840826, -0.9207802],
}  # fmt: skip


def losses(run_dir) -> dict[str, list[float]]:
    """Means of ten iterations of 64 steps of the point environment, four minibatches each."""
    train(tiny_args(run_dir, num_minibatches=2, update_epochs=2, total_timesteps=640, learning_rate=1e-3, ent_coef=0.01))
    records = read_jsonl(f"{run_dir}/metrics.jsonl")[1:]
    keys = ("policy_loss", "value_loss", "entropy", "grad_norm", "explained_variance")
    return {key: [record[f"losses/{key}"] for record in records] for key in keys}


def test_losses():
    got = losses("run")
    assert got.keys() == GOLDEN.keys()
    for key, values in GOLDEN.items():
        assert got[key] == pytest.approx(values, rel=1e-4, abs=2e-6), key


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        for key, values in losses(f"{directory}/run").items():
            print(f'    "{key}": [{", ".join(f"{value:.7g}" for value in values)}],')
