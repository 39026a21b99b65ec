"""Losses of the first ten updates or iterations against stored numbers, so that no change of the mathematics goes unseen.

After an intended change: PYTHONPATH=. python tests/test_golden.py prints the new numbers.
"""

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
GOLDEN: dict[str, dict[str, list[float]]] = {
    "ppo_continuous": {
        "policy_loss": [
            -0.002559597,
            -0.001473933,
            -9.250583e-05,
            -0.0002360326,
            -0.0006766894,
            -9.376256e-05,
            -0.0007767168,
            -0.00136228,
            -0.0002731123,
            -0.0007847982,
        ],
        "value_loss": [11.55051, 0.8264282, 1.541789, 1.974632, 1.110671, 0.207457, 0.6832669, 2.020366, 0.3809408, 0.2998497],
        "entropy": [1.418277, 1.418206, 1.417891, 1.417466, 1.41764, 1.417682, 1.41803, 1.418391, 1.418689, 1.418898],
        "grad_norm": [2.412551, 1.11575, 1.95488, 1.89142, 1.364509, 0.8968562, 1.120427, 2.629522, 0.873413, 1.501197],
        "explained_variance": [
            -0.01257646,
            0.02005363,
            0.01128316,
            0.05213124,
            0.0738849,
            -0.5352504,
            -0.2792894,
            -0.2833544,
            0.4840826,
            -0.9207802,
        ],
    },
    "ppo_kl_penalty": {
        "policy_loss": [
            -0.002340191,
            -0.001315264,
            -5.611242e-05,
            -0.0002403223,
            -0.0008197427,
            2.538267e-05,
            -0.0006165919,
            -5.345306e-05,
            -0.0002679286,
            -1.423689e-05,
        ],
        "value_loss": [11.55051, 0.8326125, 1.589403, 2.076467, 0.935359, 0.4611932, 0.4913614, 1.765631, 0.2193407, 0.3388215],
        "entropy": [1.41828, 1.418225, 1.41792, 1.417498, 1.417621, 1.417555, 1.41793, 1.418059, 1.418226, 1.418432],
        "grad_norm": [2.408283, 1.117891, 1.988744, 1.955083, 1.248814, 1.115596, 1.062067, 2.636483, 0.7103664, 1.003975],
        "explained_variance": [
            -0.01257646,
            0.01987118,
            0.01022708,
            0.05274278,
            0.07542092,
            -0.1807264,
            -0.5397364,
            -0.2089425,
            0.2774008,
            -0.6940864,
        ],
        "kl": [
            0.0009236599,
            0.0004367017,
            0.0001696407,
            0.0001515696,
            0.0002277753,
            7.349849e-05,
            0.0001082192,
            7.471542e-05,
            1.64118e-05,
            3.75607e-06,
        ],
    },
    "ppo_shared_params": {
        "policy_loss": [
            -1.165131e-05,
            -0.001890743,
            -0.0002685274,
            -0.0005082606,
            -0.0003873931,
            7.316227e-05,
            -4.983083e-05,
            -0.0001630617,
            -0.0002528705,
            2.832364e-05,
        ],
        "value_loss": [
            189.6196,
            0.4739996,
            0.7096781,
            0.2085345,
            0.5897695,
            0.5721943,
            0.4442925,
            0.4097558,
            0.3421489,
            0.2195208,
        ],
        "entropy": [
            0.6930685,
            0.6926336,
            0.6918443,
            0.6906486,
            0.6905401,
            0.6896113,
            0.6916544,
            0.6874046,
            0.6876112,
            0.6859121,
        ],
        "grad_norm": [
            5.596059,
            0.8989244,
            1.119633,
            0.5384406,
            0.9861191,
            0.9606313,
            0.8762938,
            1.013639,
            0.9386271,
            0.5801488,
        ],
        "explained_variance": [
            -0.0002418756,
            -0.06512034,
            0.3239783,
            -0.7177914,
            -0.3334219,
            -0.5324093,
            -0.1434695,
            0.433529,
            -0.6227965,
            -0.3646995,
        ],
    },
    "ppo_atari": {
        "policy_loss": [-0.001764878],
        "value_loss": [0.8714043],
        "entropy": [1.384375],
        "grad_norm": [6.374475],
        "explained_variance": [-0.03811002],
    },
}


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


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        for name in SCRIPTS:
            print(f'    "{name}": {{')
            for key, values in losses(name, f"{directory}/{name}").items():
                print(f'        "{key}": [{", ".join(f"{value:.7g}" for value in values)}],')
            print("    },")
