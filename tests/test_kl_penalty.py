"""ppo_kl_penalty.py: the exact KL, the rule for beta, its place in loss, log and checkpoint, and what is left without it."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

import ppo_continuous
import ppo_kl_penalty
from helpers import TINY, equal, loss_inputs, read_checkpoint, read_metrics, run_script, tiny_flags
from ppo_kl_penalty import Args, adapt_kl_coef, gaussian_kl, ppo_loss, train

SCRIPT = Path(ppo_kl_penalty.__file__)


def tiny(run_dir="run", **changes) -> Args:
    return Args(**(TINY | {"run_dir": str(run_dir)} | changes))


@given(st.integers(0, 10_000), st.integers(1, 7), st.floats(0.01, 3.0))
def test_kl_and_its_gradient_equal_those_of_torch(seed, action_dim, spread):
    generator = torch.Generator().manual_seed(seed)
    old_mean, old_log_std, mean, log_std = spread * torch.randn(4, 5, action_dim, generator=generator, dtype=torch.float64)
    mean.requires_grad_()
    log_std.requires_grad_()
    ours = gaussian_kl(old_mean, old_log_std.exp(), mean, log_std.exp())
    reference = kl_divergence(Normal(old_mean, old_log_std.exp()), Normal(mean, log_std.exp())).sum(1)
    torch.testing.assert_close(ours, reference)
    gradients = [torch.autograd.grad(kl.sum(), (mean, log_std)) for kl in (ours, reference)]
    torch.testing.assert_close(*gradients)


def test_kl_of_a_policy_to_itself_is_zero_with_zero_gradient():
    mean, log_std = torch.randn(2, 6, 3, requires_grad=True)
    kl = gaussian_kl(mean.detach(), log_std.detach().exp(), mean, log_std.exp())
    torch.testing.assert_close(kl, torch.zeros(6), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(kl.sum(), mean)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(0.0, 0.5), (0.0199, 0.5), (0.02, 1), (0.03, 1), (0.045, 1), (0.0451, 2), (5.0, 2), (math.inf, 2)],
)
def test_beta_halves_below_and_doubles_above(kl, factor):
    assert adapt_kl_coef(3.0, kl, 0.03) == 3.0 * factor


def test_beta_never_reaches_zero_or_infinity():
    """In float32, too, as the update gets it: 0 cannot be doubled, and infinity times a KL of 0 is no number."""
    for kl, factor in ((0.0, 2.0), (1.0, 0.5)):
        beta = 1.0
        for _ in range(2000):
            beta = adapt_kl_coef(beta, kl, 0.01)
        assert 0 < torch.tensor(beta, dtype=torch.float32) < torch.inf
        assert adapt_kl_coef(beta, 1 - kl, 0.01) == pytest.approx(beta * factor)  # and comes back


def test_beta_of_a_run_made_in_python_may_be_a_whole_number():
    changes: dict[str, Any] = {"kl_coef": 1, "kl_target": 10.0, "checkpoint_every": 1}
    train(tiny(**changes))
    saved = read_checkpoint("run")
    assert saved["kl_coef"] < 1
    train(tiny(**changes, resume="run", total_timesteps=2 * saved["global_step"]))
    assert read_checkpoint("run")["global_step"] == 2 * saved["global_step"]


def test_penalty_is_subtracted_over_valid_steps_only():
    generator = torch.Generator().manual_seed(0)
    names = ("logprob", "entropy", "value", "old_logprob", "old_value", "advantage", "return_")
    columns = dict(zip(names, torch.randn(7, 6, generator=generator), strict=True))
    columns["valid"] = valid = torch.tensor([1.0, 1, 0, 1, 1, 0])
    mean, old_mean, log_std, old_log_std = torch.randn(4, 6, 3, generator=generator)
    old_policy, policy = Normal(old_mean, old_log_std.exp()), Normal(mean, log_std.exp())
    kl = kl_divergence(old_policy, policy).sum(1)
    of_policies = {"mean": mean, "std": policy.stddev, "old_mean": old_mean, "old_std": old_policy.stddev}
    coefficients: dict[str, Any] = {"vf_coef": 0.5, "ent_coef": 0.01, "clip_vloss": True}
    for clip in (False, True):
        new, old = loss_inputs(ppo_continuous, **columns)
        base, info = ppo_continuous.ppo_loss(new, old, torch.tensor(0.2), clip_policy=clip, **coefficients)
        new, old = loss_inputs(ppo_kl_penalty, **columns, **of_policies)
        ours, our_info = ppo_loss(new, old, torch.tensor(0.2), torch.tensor(3.0), clip_policy=clip, **coefficients)
        penalty = 3.0 * kl[valid == 1].mean()
        torch.testing.assert_close(ours, base + penalty)
        torch.testing.assert_close(our_info["policy_loss"], info["policy_loss"] + penalty)


@pytest.mark.parametrize("flags", [{}, {"state_independent_std": False}, {"norm_adv": "batch", "clip_vloss": False}], ids=str)
def test_without_penalty_it_is_the_base_without_clipping_to_the_last_bit(flags):
    ppo_continuous.train(ppo_continuous.Args(**(TINY | flags | {"run_dir": "base", "clip_policy": False})))
    train(tiny("ours", kl_coef=0.0, adaptive_kl=False, **flags))
    base, ours = read_checkpoint("base"), read_checkpoint("ours")
    for key in ("theta", "adam", "obs_rms", "return_rms", "recent_returns", "global_step"):
        assert equal(base[key], ours[key]), key
    train(tiny("penalized", kl_coef=1.0, adaptive_kl=False, **flags))
    assert not equal(base["theta"], read_checkpoint("penalized")["theta"])


def test_with_clipping_on_top_and_no_penalty_it_is_the_base():
    ppo_continuous.train(ppo_continuous.Args(**(TINY | {"run_dir": "base"})))
    train(tiny("ours", kl_coef=0.0, adaptive_kl=False, clip_policy=True))
    assert equal(read_checkpoint("base")["theta"], read_checkpoint("ours")["theta"])


@pytest.mark.parametrize(("target", "direction"), [(1e-9, 2.0), (1e3, 0.5)])
def test_beta_moves_once_per_iteration_and_counts_from_the_next(target, direction):
    train(tiny(kl_coef=0.7, kl_target=target))
    records = read_metrics("run")[1:]
    assert [r["charts/kl_coef"] for r in records] == [0.7 * direction**i for i in range(4)]
    assert read_checkpoint("run")["kl_coef"] == 0.7 * direction**4  # that of the iteration after the last


def test_fixed_beta_stays():
    train(tiny(kl_coef=0.7, kl_target=1e-9, adaptive_kl=False))
    assert [r["charts/kl_coef"] for r in read_metrics("run")[1:]] == [0.7] * 4


def test_beta_of_the_log_is_what_the_update_gets(monkeypatch):
    used = []

    def spy(new, old, clip_coef, kl_coef, *args):
        used.append(float(kl_coef))
        return ppo_loss(new, old, clip_coef, kl_coef, *args)

    monkeypatch.setattr(ppo_kl_penalty, "ppo_loss", spy)
    train(tiny(kl_target=1e-9, num_minibatches=1, update_epochs=2))
    assert used == [2.0**i for i in range(4) for _ in range(2)]


def test_logged_kl_is_the_exact_one_of_the_whole_batch_after_all_epochs(monkeypatch):
    """Every ninth step of ConstantReward only resets: its KL does not count."""
    calls = []

    def spy(*args):
        if len(args[0]) == 64:  # the whole batch, not a minibatch
            calls.append([x.clone() for x in args])
        return gaussian_kl(*args)

    monkeypatch.setattr(ppo_kl_penalty, "gaussian_kl", spy)
    train(tiny(env="envs:ConstantReward-v0", total_timesteps=64, learning_rate=1e-2))
    ((old_mean, old_std, mean, std),) = calls
    valid = (torch.arange(32) % 9 != 8).repeat_interleave(2)
    kl = kl_divergence(Normal(old_mean, old_std), Normal(mean, std)).sum(1)
    record = read_metrics("run")[1]
    assert record["losses/kl"] == pytest.approx(kl[valid].mean().item(), rel=1e-4)
    assert record["losses/kl"] != pytest.approx(kl.mean().item(), rel=1e-4)
    agent = ppo_kl_penalty.Agent(8, 1)
    torch.nn.utils.vector_to_parameters(read_checkpoint("run")["theta"], agent.parameters())
    assert agent.log_std is not None
    torch.testing.assert_close(std[0], agent.log_std.detach().exp())  # the policy after the last epoch


def test_beta_follows_the_exact_kl_not_the_approximate_one(monkeypatch):
    calls = []

    def spy(kl_coef, kl, kl_target):
        calls.append((kl_coef, kl, adapt_kl_coef(kl_coef, kl, kl_target)))
        return calls[-1][2]

    monkeypatch.setattr(ppo_kl_penalty, "adapt_kl_coef", spy)
    train(tiny(kl_target=1e-9))
    records = read_metrics("run")[1:]
    assert [kl for _, kl, _ in calls] == [r["losses/kl"] for r in records]
    assert all(r["losses/kl"] != pytest.approx(r["losses/approx_kl"], rel=1e-2) for r in records)
    assert [old for old, _, _ in calls] == [r["charts/kl_coef"] for r in records]
    assert [new for _, _, new in calls[:-1]] == [r["charts/kl_coef"] for r in records[1:]]


def test_a_larger_beta_keeps_the_policy_nearer():
    distances = []
    for kl_coef in (0.0, 30.0):
        train(tiny(f"run{kl_coef}", kl_coef=kl_coef, adaptive_kl=False, learning_rate=3e-3, update_epochs=8))
        distances.append(sum(r["losses/kl"] for r in read_metrics(f"run{kl_coef}")[1:]))
    assert distances[1] < 0.5 * distances[0]


def test_same_seed_same_numbers_and_resume_to_the_same_bit():
    train(tiny("whole", checkpoint_every=2))
    train(tiny("again", checkpoint_every=2))
    train(tiny("other", checkpoint_every=2, seed=2))
    assert read_metrics("whole") == read_metrics("again")
    assert not equal(read_checkpoint("whole")["theta"], read_checkpoint("other")["theta"])

    saved: list[Path] = []
    write_atomically = ppo_kl_penalty.write_atomically

    def keep_all(file, data):  # those of iterations 0, 2 and 4
        write_atomically(file, data)
        saved.append(Path(shutil.copy(file, f"checkpoint{len(saved)}.pt")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_kl_penalty, "write_atomically", keep_all)
        train(tiny("cut", checkpoint_every=2))
    shutil.copy(saved[1], "cut/checkpoint.pt")  # as if killed after it
    train(tiny("cut", checkpoint_every=2, resume="cut"))
    whole, cut = read_checkpoint("whole"), read_checkpoint("cut")
    for key in ("theta", "adam", "kl_coef", "obs_rms", "return_rms", "recent_returns"):
        assert equal(whole[key], cut[key]), key
    assert read_metrics("whole") == read_metrics("cut")
    assert Path("whole/episodes.jsonl").read_bytes() == Path("cut/episodes.jsonl").read_bytes()
    # there was something to lose
    before = torch.load(saved[1], weights_only=True)
    assert 0 < len(before["recent_returns"]) < len(whole["recent_returns"])
    assert before["log_sizes"]["episodes.jsonl"] > 0
    assert before["kl_coef"] != 1.0
    assert whole["kl_coef"] != 1.0


def test_renamed_copy_runs_alone():
    Path("elsewhere").mkdir()
    copy = shutil.copy(SCRIPT, "elsewhere/my_penalty.py")
    run = run_script(*tiny_flags("out", env="Hopper", total_timesteps=128), script=copy, PYTHONPATH="")
    assert run.returncode == 0, run.stderr
    assert Path("out/my_penalty.py").read_text() == SCRIPT.read_text()
    assert "losses/kl" in read_metrics("out")[-1]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"kl_coef": math.nan}, "kl_coef"),
        ({"kl_coef": math.inf}, "kl_coef"),
        ({"kl_coef": 0.0}, "no-adaptive-kl"),
        ({"kl_target": 0.0}, "kl_target"),
        ({"kl_target": math.nan}, "kl_target"),
        ({"kl_target": math.inf}, "kl_target"),
    ],
    ids=str,
)
def test_bad_values_are_refused(flags, word):
    with pytest.raises(ppo_kl_penalty.UsageError, match=word):
        tiny(**flags)


def test_bad_command_line_ends_with_one_sentence_and_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ppo_kl_penalty.py", "--kl-coef", "0"])
    with pytest.raises(SystemExit) as stop:
        ppo_kl_penalty.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert "add --no-adaptive-kl" in error
    assert not Path("runs").exists()


def test_checkpoint_of_the_base_is_refused():
    ppo_continuous.train(ppo_continuous.Args(**(TINY | {"run_dir": "base", "total_timesteps": 64})))
    with pytest.raises(ppo_kl_penalty.UsageError, match="not a checkpoint of ppo_kl_penalty"):
        train(tiny("ours", resume="base"))
