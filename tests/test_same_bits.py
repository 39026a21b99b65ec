"""What benchmarks/same_bits.py takes for the same, on run directories made by hand."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "same_bits.py"
spec = importlib.util.spec_from_file_location("same_bits", FILE)
assert spec and spec.loader
same_bits: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(same_bits)

CHECKPOINT: dict[str, Any] = {
    "args": {"seed": 1, "run_dir": "old"},
    "iteration": 2,
    "theta": torch.arange(5.0),
    "adam": (torch.ones(5), torch.zeros(5), torch.tensor(7.0)),
    "obs_rms": {"mean": torch.tensor([0.0, 1.0], dtype=torch.float64), "count": 8.0001},
    "recent_returns": [1.0, 2.0],
    "log_sizes": {"metrics.jsonl": 100},
}


def write_run(name: str, checkpoint: dict, loss: float = 0.5, episodes: int = 2, seconds: float = 1.0) -> Path:
    folder = Path(name)
    folder.mkdir()
    torch.save(checkpoint, folder / "checkpoint.pt")
    record = {"iteration": 1, "global_step": 8, "losses/value_loss": loss, "charts/seconds": seconds}
    (folder / "metrics.jsonl").write_text(json.dumps({"args": name}) + "\n" + json.dumps(record) + "\n")
    lines = [json.dumps({"global_step": 4 * i, "return": 1.0, "length": 4}) + "\n" for i in range(episodes)]
    (folder / "episodes.jsonl").write_text("".join(lines))
    return folder


def test_equal_but_for_times_paths_and_new_entries():
    new = CHECKPOINT | {"args": {"seed": 1, "run_dir": "new", "new_flag": 3}, "log_sizes": {}, "spaces": "Box"}
    assert same_bits.compare(write_run("old", CHECKPOINT), write_run("new", new, seconds=2.0)) == ""


def test_a_tensor_may_have_moved_and_a_number_with_its_name():
    new = {key: value for key, value in CHECKPOINT.items() if key not in ("adam", "obs_rms")}
    first, second, step = CHECKPOINT["adam"]
    new |= {"optimizer": {"m": first, "v": second, "t": step}, "runner": {"obs_rms": CHECKPOINT["obs_rms"]}}
    assert same_bits.compare(write_run("old", CHECKPOINT), write_run("new", new)) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"theta": torch.nextafter(torch.arange(5.0), torch.tensor(9.0))}, r"theta: largest difference 4.77e-07"),
        ({"theta": torch.arange(5.0).double()}, "theta"),
        ({"theta": -torch.tensor([-0.0, -1.0, -2.0, -3.0, -4.0])}, ""),
        ({"theta": torch.tensor([-0.0, 1.0, 2.0, 3.0, 4.0])}, "theta"),
        ({"adam": (torch.ones(5), torch.zeros(5))}, "adam/2 is nowhere"),
        ({"obs_rms": {"mean": torch.zeros(2, dtype=torch.float64), "count": 8.0001}}, "obs_rms/mean: largest difference 1"),
        ({"obs_rms": {"mean": CHECKPOINT["obs_rms"]["mean"], "other": 8.0001}}, "obs_rms/count is nowhere"),
        ({"iteration": 3}, "iteration: 2 became 3"),
        ({"recent_returns": [1.0, math.nan]}, "recent_returns"),
        ({"args": {"run_dir": "new"}}, "the setting seed is gone"),
        ({"args": {"seed": 2}}, "args/seed: 1 became 2"),
    ],
)
def test_what_differs_in_the_checkpoint(changes, said):
    difference = same_bits.compare(write_run("old", CHECKPOINT), write_run("new", CHECKPOINT | changes))
    assert said in difference
    assert bool(said) == bool(difference)


def test_what_differs_in_the_logs():
    old = write_run("old", CHECKPOINT)
    assert "losses/value_loss of record 1: 0.5 became 0.25" in same_bits.compare(old, write_run("a", CHECKPOINT, loss=0.25))
    assert "episodes.jsonl: 2 records became 3" in same_bits.compare(old, write_run("b", CHECKPOINT, episodes=3))


def test_what_differs_in_a_run_of_a_language_model():
    runs = {
        name: write_run(name, CHECKPOINT) for name in ("old", "same", "evaluated", "sampled", "unevaluated", "models", "gone")
    }
    for name, folder in runs.items():
        kl, text = 2.5 if name == "evaluated" else 1.5, "bad" if name == "sampled" else "good"
        if name != "unevaluated":
            (folder / "evaluations.jsonl").write_text(json.dumps({"global_step": 8, "kl": kl}) + "\n")
        (folder / "samples.jsonl").write_text(json.dumps({"global_step": 8, "response": text}) + "\n")
        if name != "gone":
            torch.save({"lm": {"bias": torch.full((2,), 3.0 if name == "models" else 1.0)}}, folder / "models.pt")
    said = {name: same_bits.compare(runs["old"], folder) for name, folder in runs.items() if name != "old"}
    assert said == {
        "same": "",
        "evaluated": "evaluations.jsonl: kl of record 1: 1.5 became 2.5",
        "sampled": "samples.jsonl: response of record 1: good became bad",
        "unevaluated": "evaluations.jsonl is gone",
        "models": "models: lm/bias: largest difference 2",
        "gone": "models.pt is gone",
    }


def test_flags_of_a_case_replace_those_of_the_short_run():
    words = ["--num_envs=2", "--observe", "0", "2", "--lstm"]
    flags = {"--num-envs": ["4"], "--env": ["CartPole-v1"]} | same_bits.parse_flags(words)
    assert flags == {"--num-envs": ["2"], "--env": ["CartPole-v1"], "--observe": ["0", "2"], "--lstm": []}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ppo_continuous.py", "5", "--no-compile"], "5 belongs to no flag"),
        (["ppo_continuous.py", "--num-envs"], "--num-envs needs a number"),
        (["ppo_continuous.py", "--num-steps", "x"], "--num-steps needs a number"),
        (["--num-envs", "2"], "name a script before its flags"),
    ],
)
def test_words_that_make_no_case(monkeypatch, capsys, words, said):
    monkeypatch.setattr(same_bits.sys, "argv", ["same_bits.py", "HEAD", *words])
    with pytest.raises(SystemExit) as stop:
        same_bits.main()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
