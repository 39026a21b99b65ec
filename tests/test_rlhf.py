"""ppo_rlhf.py: one test for each detail of the table in DETAILS.md, the exact optimum, resume, and bad input."""

import argparse
import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import ppo_rlhf
from helpers import equal, make_flags, read_checkpoint, read_jsonl, read_metrics
from ppo_rlhf import BOS, EOS, GPT, PAD, Agent, Args, Batch, NonFiniteError, RewardModel, Runner, Tokenizer, UsageError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import exact

from test_posed_gpu import IN_A_MINIBATCH, run_posed, waits_in

GOOD, BAD = ("good", "great", "lovely", "funny"), ("bad", "dull", "awful", "sad")
TINY = {
    "env": "human",
    "data": "texts.tsv",
    "num_envs": 8,
    "num_steps": 8,
    "num_minibatches": 2,
    "update_epochs": 2,
    "total_timesteps": 4 * 64,
    "checkpoint_every": 2,
    "eval_episodes": 4,
    "vocabulary": 300,
    "width": 32,
    "layers": 1,
    "sft_epochs": 4,
    "num_comparisons": 64,
}


@pytest.fixture(autouse=True)
def texts(tmp_path_factory, monkeypatch):
    """A cache for all tests, and texts.tsv: 90 short reviews with three votes each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    rng, lines = random.Random(0), []
    for _ in range(90):
        words = rng.choices(GOOD + BAD, k=4)
        votes = sum(1 if word in GOOD else -1 for word in words)
        lines.append(f"{votes},{votes + 1},{votes - 1}\tthe film is {' and '.join(words)} to me")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.startswith(str(tmp_path_factory.getbasetemp()))])
    Path("texts.tsv").write_text("\n".join(lines) + "\n")
    Path("words.py").write_text("def score(prompts, responses):\n    return [response.count('o') for response in responses]\n")


def tiny(run_dir: Path | str = "run", **changes) -> Args:
    return Args(**(TINY | {"run_dir": str(run_dir)} | changes))


def words(**changes) -> list[str]:
    return make_flags(TINY | {"run_dir": "run"} | changes)


def start(**changes):
    """Arguments, models, runner and agent as they are before the first iteration, and a reference that is not the policy."""
    args = tiny(**changes)
    models = ppo_rlhf.load_models(args)
    runner, agent = Runner(args, models), ppo_rlhf.make_agent(args, models)
    return args, models, runner, agent


def flat(agent: Agent) -> torch.Tensor:
    theta = torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()
    torch.nn.utils.vector_to_parameters(theta, agent.parameters())
    return theta


def update_once(args: Args, models, agent: Agent, batch: Batch, rate: float = 1e-3, warmup: bool = False) -> torch.Tensor:
    """Parameters after one update by the whole batch."""
    theta = flat(agent)
    adam = (torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros(()))
    update = ppo_rlhf.make_update(agent, args, models.texts)
    update(theta, adam, batch, torch.arange(len(batch.tokens)), rate, args.clip_coef, warmup)
    return theta


def next_token_losses(lm: GPT, rows: list[list[int]]) -> list[float]:
    """Minus the log-probability of each token of each row but the first, read without padding."""
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = lm.logits(lm.hidden(*ppo_rlhf.pad_rows([row], False)))[0].double().numpy()
        losses += [np.log(np.exp(logits[t]).sum()) - logits[t, row[t + 1]] for t in range(len(row) - 1)]
    return losses


def move(agent: Agent):
    """The policy away from the reference; ends are not rare then."""
    agent.lm.embedding.weight.data += 0.05 * torch.randn_like(agent.lm.embedding.weight)
    end = agent.lm.embedding.weight.data[EOS]
    agent.lm.norm.bias.data += 4 * end / end.square().sum()  # the logit of the end grows by 4


def divergence(agent: Agent, reference: Agent, responses) -> tuple[np.ndarray, np.ndarray]:
    """log(pi / ref) and ref / pi - 1 - log(ref / pi) of each response, summed over its tokens."""
    tokens, mask, valid, _ = responses
    with torch.no_grad():
        own, other = (x(tokens, mask, valid.shape[1]).logprob.double().exp().numpy() for x in (agent, reference))
    ratios = [base[real] / policy[real] for policy, base, real in zip(own, other, valid.numpy(), strict=True)]
    return np.array([-np.log(x).sum() for x in ratios]), np.array([(x - 1 - np.log(x)).sum() for x in ratios])


def ends(responses) -> list[bool]:
    """Whether the last token of each response is the end."""
    answers = responses.tokens[:, -responses.valid.shape[1] :]
    return [row[real][-1].item() == EOS for row, real in zip(answers, responses.valid, strict=True)]


def random_lm(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    lm = GPT(30, 64, 2, 32)
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return lm


# tokenizer and model


def test_tokenizer_loses_nothing_and_merges_the_commonest_pair():
    texts = ["the thin thing", "naïve café 日本 🙂\n\ttabs", "a_b  c__d 12,5!?"]
    tokenizer = Tokenizer.train(texts * 3, 300)
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([BOS, *tokenizer.encode("the"), EOS, PAD]) == "the"
    few = Tokenizer.train(["aaab aaab ab"], 261)  # ab: 3, aa: 4
    assert few.merges == [(3 + 97, 3 + 97), (3 + 97, 3 + 98)]
    assert len(Tokenizer.train(texts, 300).encode(texts[0])) < len(texts[0])


def test_rlhf_19_left_padding_changes_nothing():
    lm, rows = random_lm(), [[0, 5, 6, 7, 8], [0, 9], [0, 3, 4]]
    padded = lm.logits(lm.hidden(*ppo_rlhf.pad_rows(rows, True)))
    for row, logits in zip(rows, padded, strict=True):
        alone = lm.logits(lm.hidden(*ppo_rlhf.pad_rows([row], True)))[0]
        torch.testing.assert_close(logits[-len(row) :], alone, atol=2e-6, rtol=1e-5)


def test_cache_changes_nothing():
    lm = random_lm()
    tokens, mask = ppo_rlhf.pad_rows([[0, 5, 6, 7, 8, 9], [0, 9, 3]], True)
    cache = lm.make_cache(2, 6)
    parts = [lm.hidden(tokens[:, a:b], mask[:, :b], cache) for a, b in ((0, 4), (4, 5), (5, 6))]
    torch.testing.assert_close(torch.cat(parts, 1)[mask], lm.hidden(tokens, mask)[mask], atol=2e-6, rtol=1e-5)


def test_rlhf_21_samples_come_from_the_whole_distribution():
    agent = Agent(random_lm(), 1.0)
    tokens, mask = ppo_rlhf.pad_rows([[0, 5]] * 20_000, True)
    uniform = torch.as_tensor(np.random.default_rng(1).random((20_000, 1)))
    sampled = ppo_rlhf.generate(agent, tokens, mask, uniform, True).tokens[:, -1]
    expected = agent.policy(agent.lm.hidden(tokens[:1], mask[:1])[0, -1]).exp().detach()
    assert expected.min() < 0.01  # the unlikely ones come, too
    torch.testing.assert_close(torch.bincount(sampled, minlength=30) / 20_000, expected, atol=0.01, rtol=0)


def test_rlhf_16_rlhf_18_a_response_ends_at_its_end_token():
    agent = Agent(random_lm(), 1.0)
    tokens, mask = ppo_rlhf.pad_rows([[0, i] for i in range(3, 23)], True)
    uniform = torch.as_tensor(np.random.default_rng(0).random((20, 20)))
    stopped, going_on = (ppo_rlhf.generate(agent, tokens, mask, uniform, stop) for stop in (True, False))
    for row, valid in zip(stopped.tokens[:, 2:].tolist(), stopped.valid.tolist(), strict=True):
        end = row.index(EOS) if EOS in row else len(row) - 1
        assert valid == [t <= end for t in range(len(row))]
        assert set(row[end + 1 :]) <= {PAD}
    assert torch.equal(stopped.mask[:, 2:], stopped.valid)
    assert going_on.valid.all() and going_on.valid.shape[1] == 20
    same = stopped.valid  # up to the end token both are the same
    width = same.shape[1]
    assert torch.equal(stopped.tokens[:, 2:][same], going_on.tokens[:, 2 : 2 + width][same])


def test_rlhf_18_generation_stops_when_all_have_ended():
    agent = Agent(random_lm(), 1.0)
    agent.lm.logits = lambda hidden: 100.0 * torch.nn.functional.one_hot(torch.full(hidden.shape[:-1], EOS), 30)
    prompts = ppo_rlhf.pad_rows([[0, 3], [0, 4, 5]], True)
    assert ppo_rlhf.generate(agent, *prompts, torch.full((2, 20), 0.5).double(), True).valid.shape == (2, 1)
    assert ppo_rlhf.generate(agent, *prompts, torch.full((2, 20), 0.5).double(), False).valid.shape == (2, 20)


def test_rlhf_22_no_dropout():
    agent = Agent(random_lm(), 1.0).train()
    tokens, mask = ppo_rlhf.pad_rows([[0, 5, 6, 7]], True)
    assert torch.equal(agent(tokens, mask, 2).logprob, agent(tokens, mask, 2).logprob)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rlhf_20_rlhf_23_first_ratio_is_1(temperature):
    """The sampler, the old log-probability and the update agree at any temperature."""
    _, _, runner, agent = start(temperature=temperature)
    rollout = runner.play(agent, 1)
    batch, measures = ppo_rlhf.make_batch(agent, rollout, runner)
    assert measures["logprob_gap"] < 1e-5
    part = Batch(*(x[3:6] for x in batch))
    ratio = (agent(part.tokens, part.mask, part.valid.shape[1]).logprob - part.logprob).exp()
    torch.testing.assert_close(ratio * part.valid, part.valid, atol=1e-5, rtol=0)
    assert measures["kl"] == pytest.approx(0, abs=1e-5)  # the policy is still the reference
    agent.temperature = 1.3
    assert ((agent(*batch[:2], batch.valid.shape[1]).logprob - batch.logprob) * batch.valid).abs().max() > 0.01


# rewards


def test_rlhf_01_rlhf_02_penalty_at_every_token_and_score_at_the_last():
    valid = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    penalty = torch.arange(12.0).view(3, 4)
    rewards, last = ppo_rlhf.place_rewards(penalty, torch.tensor([10.0, 20, 30]), valid)
    assert rewards.tolist() == [[0, -1, 10 - 2, 0], [-4, -5, -6, 20 - 7], [30 - 8, 0, 0, 0]]
    assert last.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]


def test_rlhf_01_the_penalty_is_the_log_ratio():
    _, _, runner, agent = start(kl_coef=0.3, gae_lambda=1.0, norm_adv="none")
    agent.lm.embedding.weight.data += 0.05 * torch.randn_like(agent.lm.embedding.weight)
    rollout = runner.play(agent, 1)
    batch, measures = ppo_rlhf.make_batch(agent, rollout, runner)
    tokens, mask, valid, _ = rollout.responses
    with torch.no_grad():
        logratio = (batch.logprob - runner.reference(tokens, mask, valid.shape[1]).logprob) * valid
    # with lambda 1 the return of the first token is the score minus beta times the whole log ratio
    torch.testing.assert_close(batch.return_[:, 0], rollout.scores - 0.3 * logratio.sum(1), atol=1e-4, rtol=1e-4)
    assert measures["kl"] == pytest.approx(logratio.sum(1).mean().item(), rel=1e-4)
    assert measures["kl_k3"] >= 0


def test_rlhf_03_k3_and_the_measures_of_a_rollout_against_numpy():
    """An odd number of responses: as many with an end as without cannot be."""
    changes = {"num_envs": 9, "num_minibatches": 1, "norm_adv": "none", "gae_lambda": 1.0}
    _, _, runner, agent = start(kl_coef=0.3, kl_estimator="k3", **changes)
    move(agent)
    rollout = runner.play(agent, 1)
    batch, measures = ppo_rlhf.make_batch(agent, rollout, runner)
    k1, k3 = divergence(agent, runner.reference, rollout.responses)
    # with lambda 1 the return of the first token is the score minus beta times the whole penalty
    np.testing.assert_allclose(batch.return_[:, 0], rollout.scores.numpy() - 0.3 * k3, atol=1e-4, rtol=1e-4)
    ended = np.mean(ends(rollout.responses))
    assert 0 < ended < 1
    figures = [measures[name] for name in ("kl", "kl_k3", "ended")]
    assert figures == pytest.approx([k1.mean(), k3.mean(), ended], rel=1e-4)


def run_exact(*words: str):
    """Runs benchmarks/exact.py in this process."""
    names = ("load_models", "make_score", "make_vader")
    kept, argv = {name: getattr(ppo_rlhf, name) for name in names}, sys.argv[:]
    evaluate = ppo_rlhf.Runner.evaluate
    try:
        exact.main(list(words))
    finally:
        ppo_rlhf.Runner.evaluate, sys.argv[:] = evaluate, argv
        for name, value in kept.items():
            setattr(ppo_rlhf, name, value)


def exact_share(tmp_path: Path, *flags: str) -> float:
    run_exact("--run-dir", str(tmp_path / "exact"), *flags)
    return json.loads((tmp_path / "exact" / "evaluation.json").read_text())["share"]


@pytest.mark.parametrize(("estimator", "low", "high"), [("k1", 0.95, 1.0), ("k3", -math.inf, 0.8)])
def test_rlhf_03_exact_optimum(tmp_path, estimator, low, high):
    """Four tokens, all responses listed: k1 comes near the best policy, k3 does not. The suite goes to the end."""
    flags = ["--total-timesteps", str(100 * 128 * 3), "--num-envs", "128", "--num-minibatches", "2", "--learning-rate", "5e-3"]
    share = exact_share(tmp_path, "--kl-estimator", estimator, *flags)
    assert low <= share <= high and abs(share) > 0.2  # 0 is where it began


def test_exact_run_is_resumed_with_its_own_settings(tmp_path):
    """The flags that exact.py adds are no wish to change those of a saved run."""
    folder, steps = str(tmp_path / "exact"), 2 * 128 * 3
    run_exact("--run-dir", folder, "--total-timesteps", str(steps), "--num-envs", "128", "--kl-coef", "1.0")
    run_exact("--resume", folder)
    assert read_checkpoint(folder)["global_step"] == steps
    run_exact(f"--resume={folder}", "--total-timesteps", str(2 * steps))
    assert read_checkpoint(folder)["global_step"] == 2 * steps
    assert read_checkpoint(folder)["args"]["kl_coef"] == 1.0


def test_rlhf_04_adaptive_coefficient():
    _, _, runner, _ = start(kl_target=6.0, kl_horizon=100.0)
    runner.control_kl(6.6, False)
    assert runner.kl_coef == pytest.approx(0.05 * (1 + 0.1 * 8 / 100))
    runner.control_kl(600, False)
    assert runner.kl_coef == pytest.approx(0.05 * (1 + 0.1 * 8 / 100) * (1 + 0.2 * 8 / 100))
    runner.control_kl(0, False)
    assert runner.kl_coef == pytest.approx(0.05 * (1 + 0.1 * 8 / 100) * (1 + 0.2 * 8 / 100) * (1 - 0.2 * 8 / 100))
    fixed = start(kl_target=None)[2]
    fixed.control_kl(600, False)
    assert fixed.kl_coef == 0.05


def test_rlhf_05_scores_are_normalized_on_the_reference():
    args, _, runner, agent = start()
    runner.measure_scores()
    rng = np.random.default_rng([args.seed, 2**31])
    rows = [runner.prompts[i] for i in rng.integers(len(runner.prompts), size=256)]
    scores = [score for _, _, score in runner.respond(agent, rows, rng).samples]
    assert np.mean(scores) == pytest.approx(0, abs=1e-6)
    assert np.std(scores) == pytest.approx(1, abs=1e-6)
    off = start(norm_score=False)[2]
    off.measure_scores()
    assert (off.score_mean, off.score_std) == (0, 1)
    limited = start(score_clip=1e-3)[2]  # the limit is in the unit that is measured here
    limited.measure_scores()
    assert (limited.score_mean, limited.score_std) == (runner.score_mean, runner.score_std)


def test_rlhf_06_rlhf_07_whitening_against_numpy():
    _, _, runner, agent = start(whiten_rewards=True, gae_lambda=0.0, gamma=0.0, norm_adv="none")
    rollout = runner.play(agent, 1)
    batch, _ = ppo_rlhf.make_batch(agent, rollout, runner)
    valid = batch.valid.bool()
    _, _, other, same = start(gae_lambda=0.0, gamma=0.0, norm_adv="none")
    raw = ppo_rlhf.make_batch(same, other.play(same, 1), other)[0].return_[valid].numpy()  # the rewards themselves
    np.testing.assert_allclose(batch.return_[valid], raw.mean() + (raw - raw.mean()) / raw.std(), atol=1e-4)
    normalized = ppo_rlhf.normalize_advantages(batch.advantage, batch.valid)[valid].numpy()
    assert normalized.mean() == pytest.approx(0, abs=1e-5) and normalized.std() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("norm_adv", ["minibatch", "batch"])
def test_rlhf_07_padding_has_no_part_in_mean_and_deviation(norm_adv):
    """Those of the whole batch in make_batch, those of a minibatch in the update. Numpy knows the right ones."""
    changes = {"max_grad_norm": math.inf, "adam_eps": 1e-2, "head_init": "torch", "num_envs": 16}
    args, models, runner, agent = start(norm_adv=norm_adv, **changes)
    move(agent)
    rollout = runner.play(agent, 1)
    batch, _ = ppo_rlhf.make_batch(agent, rollout, runner)
    runner.args = plain = tiny(norm_adv="none", **changes)
    raw, _ = ppo_rlhf.make_batch(agent, rollout, runner)
    real, advantage = raw.valid.bool().numpy(), raw.advantage.numpy()
    assert not real.all()
    expected = torch.tensor((advantage - advantage[real].mean()) / advantage[real].std())
    if norm_adv == "batch":
        np.testing.assert_allclose(batch.advantage[real], expected[real], atol=1e-5)
    right = update_once(plain, models, copy.deepcopy(agent), raw._replace(advantage=expected))
    torch.testing.assert_close(update_once(args, models, agent, batch), right, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_rlhf_08_advantages_of_each_response_against_a_loop(gamma, gae_lambda):
    """Nothing flows from one response into another, nor from behind the end into a response."""
    _, _, runner, agent = start(norm_adv="none", gamma=gamma, gae_lambda=gae_lambda, head_init="torch", kl_coef=0.3)
    agent.lm.embedding.weight.data += 0.05 * torch.randn_like(agent.lm.embedding.weight)
    rollout = runner.play(agent, 1)
    batch, _ = ppo_rlhf.make_batch(agent, rollout, runner)
    tokens, mask, valid, _ = rollout.responses
    assert len(set(valid.sum(1).tolist())) > 1
    with torch.no_grad():
        reference = runner.reference(tokens, mask, valid.shape[1]).logprob
    for n in range(len(tokens)):
        length, advantage, next_value = int(valid[n].sum()), 0.0, 0.0
        for t in reversed(range(length)):
            reward = -0.3 * (batch.logprob[n, t] - reference[n, t]).item() + (
                rollout.scores[n].item() if t == length - 1 else 0
            )
            advantage = reward + gamma * next_value - batch.value[n, t].item() + gamma * gae_lambda * advantage
            next_value = batch.value[n, t].item()
            assert batch.advantage[n, t].item() == pytest.approx(advantage, abs=1e-4)
            assert batch.return_[n, t].item() == pytest.approx(advantage + next_value, abs=1e-4)


@pytest.mark.parametrize("clip_vloss", [True, False])
def test_rlhf_09_rlhf_10_rlhf_28_rlhf_29_loss_against_numpy(clip_vloss):
    rng = np.random.default_rng(0)
    valid = (rng.random((6, 5)) < 0.7).astype(float)
    old_logprob, new_logprob, old_value, new_value, advantage, target, entropy = rng.normal(0, 0.5, (7, 6, 5))
    ratio, error = np.exp(new_logprob - old_logprob), (new_value - target) ** 2
    near = old_value + np.clip(new_value - old_value, -0.2, 0.2)
    error = np.maximum(error, (near - target) ** 2) if clip_vloss else error
    objective = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    mean = lambda x: (x * valid).sum() / valid.sum()  # noqa: E731
    expected = -mean(objective) + 0.1 * 0.5 * mean(error) - 0.3 * mean(entropy)
    tensors = map(torch.as_tensor, (old_logprob, old_value, advantage, target, valid))
    old = Batch(torch.zeros(6, 7), torch.zeros(6, 7), *tensors)
    new = ppo_rlhf.Output(*map(torch.as_tensor, (new_logprob, entropy, new_value)))
    loss, _ = ppo_rlhf.ppo_loss(new, old, torch.tensor(0.2), 0.1, 0.3, True, clip_vloss)
    assert loss.item() == pytest.approx(expected)
    assert (Args.vf_coef, Args.clip_coef, Args.ent_coef, Args.clip_vloss) == (0.1, 0.2, 0, True)


def test_rlhf_11_rlhf_13_heads():
    _, _, runner, agent = start()
    batch, _ = ppo_rlhf.make_batch(agent, runner.play(agent, 1), runner)
    assert (batch.value == 0).all()
    torch.manual_seed(0)
    lm = GPT(10, 1024, 1, 8)
    head = RewardModel(lm, "last", "original").head
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.1) and head.bias.item() == 0
    assert RewardModel(lm, "last", "torch").head.bias.item() != 0
    assert start(head_init="torch")[3].value_head.weight.abs().sum() > 0


def test_rlhf_12_separate_value_network_begins_as_the_reward_model():
    """A run begins with it: its learning rate is so low that its weights at the end are those at the start."""
    ppo_rlhf.train(tiny(value="separate", total_timesteps=64, learning_rate=1e-12))
    _, models, runner, agent = start(value="separate")
    runner.measure_scores()
    ppo_rlhf.begin_value(agent, models, runner)
    rows = [ppo_rlhf.frame(models.tokenizer, "the film is good and bad to me")]
    tokens, mask = ppo_rlhf.pad_rows(rows, False)
    value = agent.value(agent.value_lm.hidden(tokens, mask))[0, -1].item()
    score = (models.reward_model.score(rows)[0] - runner.score_mean) / runner.score_std
    assert value == pytest.approx(score, abs=1e-4)
    assert agent.value_lm is not agent.lm
    torch.testing.assert_close(read_checkpoint("run")["theta"], flat(agent), atol=1e-6, rtol=0)


def test_rlhf_14_reward_model_reads_the_last_token():
    torch.manual_seed(0)
    model = RewardModel(random_lm(), "last", "original")
    rows = [[0, 5, 6, 7, EOS], [0, 5, EOS]]
    both = model(*ppo_rlhf.pad_rows(rows, False))
    for row, score in zip(rows, both, strict=True):
        hidden = model.lm.hidden(*ppo_rlhf.pad_rows([row], False))
        torch.testing.assert_close(score, model.head(hidden[0, -1])[0])
    model.pool = "mean"
    hidden = model.lm.hidden(*ppo_rlhf.pad_rows(rows[1:], False))
    torch.testing.assert_close(model(*ppo_rlhf.pad_rows(rows, False))[1], model.head(hidden[0]).mean())


def test_rlhf_15_what_fills_the_padding_is_never_read():
    args, models, runner, agent = start()
    batch, _ = ppo_rlhf.make_batch(agent, runner.play(agent, 1), runner)
    filled = batch._replace(tokens=torch.where(batch.mask, batch.tokens, EOS))
    assert not torch.equal(filled.tokens, batch.tokens)
    other = ppo_rlhf.make_agent(args, models)
    assert torch.equal(update_once(args, models, agent, batch), update_once(args, models, other, filled))


def test_rlhf_17_rlhf_32_score_without_an_end_and_limits():
    _, _, runner, agent = start(score_clip=0.5, norm_score=False, env="words:score", num_steps=4)
    rollout = runner.play(agent, 1)
    counts = torch.tensor([float(response.count("o")) for _, response, _ in rollout.samples])
    assert not rollout.ended.all()
    assert rollout.scores.tolist() == torch.where(rollout.ended, counts.clamp(-0.5, 0.5), -1.0).tolist()
    _, _, own, same = start(no_eos_score=None, norm_score=False, env="words:score", num_steps=4)
    assert own.play(same, 1).scores.tolist() == counts.tolist()


# update


def test_rlhf_24_update_is_adam_with_its_epsilon():
    args, models, runner, agent = start(max_grad_norm=math.inf, adam_eps=1e-2)
    batch, _ = ppo_rlhf.make_batch(agent, runner.play(agent, 1), runner)
    other = ppo_rlhf.make_agent(args, models)
    theta = update_once(args, models, agent, batch)
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-3, eps=1e-2)
    clip = torch.tensor(args.clip_coef)
    loss, _ = ppo_rlhf.ppo_loss(other(*batch[:2], batch.valid.shape[1]), batch, clip, args.vf_coef, args.ent_coef)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(theta, torch.nn.utils.parameters_to_vector(other.parameters()).detach(), atol=1e-6, rtol=1e-5)


def test_gradient_of_an_update_is_cut_to_the_norm_limit():
    steps = []
    for limit in (math.inf, 0.1):
        args, models, runner, agent = start(max_grad_norm=limit, adam_eps=1e6)  # a step is then rate * gradient / eps
        batch, _ = ppo_rlhf.make_batch(agent, runner.play(agent, 1), runner)
        before = flat(agent).clone()
        steps.append((update_once(args, models, agent, batch, 1e6) - before).double())
    assert steps[0].norm() > 0.2
    torch.testing.assert_close(steps[1], steps[0] * 0.1 / steps[0].norm(), atol=1e-6, rtol=1e-2)


def learn_noted(**changes):
    """Rows and approximate KL of each minibatch of one call of learn, what learn returns, and the batch."""
    args, models, runner, agent = start(update_epochs=4, head_init="torch", **changes)
    move(agent)
    batch, _ = ppo_rlhf.make_batch(agent, runner.play(agent, 1), runner)  # play seeds torch, so the order is the same
    theta, rows, kls = flat(agent), [], []
    adam = (torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros(()))
    update = ppo_rlhf.make_update(agent, args, models.texts)

    def noted(theta, adam, batch, mb_inds, *schedule):
        info = update(theta, adam, batch, mb_inds, *schedule)
        rows.append(mb_inds.tolist())
        kls.append(info["approx_kl"].item())
        return info

    figures, epochs = ppo_rlhf.learn(noted, theta, adam, batch, (1e-3, args.clip_coef, False), args)
    return rows, kls, figures, epochs, batch


def test_rlhf_26_an_epoch_takes_each_response_once_in_an_order_of_its_own():
    rows, kls, figures, epochs, _ = learn_noted()
    assert epochs == 4 and [len(part) for part in rows] == [4] * 8
    orders = [first + second for first, second in zip(rows[::2], rows[1::2], strict=True)]
    assert [sorted(order) for order in orders] == [list(range(8))] * 4
    assert len(set(map(tuple, orders))) == 4
    assert figures["approx_kl"] == pytest.approx(np.mean(kls))


def test_explained_variance_against_numpy():
    _, _, figures, _, batch = learn_noted()
    real = batch.valid.bool().numpy()
    returns, values = batch.return_.numpy()[real], batch.value.numpy()[real]
    assert figures["explained_variance"] == pytest.approx(1 - (returns - values).var() / returns.var(), rel=1e-3)


def test_target_kl_is_compared_with_the_mean_of_an_epoch():
    """Neither with its last minibatch, which is the farther one, nor with the mean of all epochs so far."""
    kls = np.array(learn_noted()[1]).reshape(4, 2)  # of each epoch and minibatch
    assert kls[0, 0] == 0 < kls[0, 1] < kls[1].mean()
    for target in ((kls[0].mean() + kls[0, 1]) / 2, (kls[:2].mean() + kls[1].mean()) / 2):
        assert kls[0].mean() < target < kls[1].mean()
        assert learn_noted(target_kl=float(target))[3] == 2


@pytest.mark.parametrize("norm_adv", ["minibatch", "batch"])
def test_rlhf_27_rlhf_30_micro_batches_change_nothing(norm_adv):
    """The mean is over all tokens of the minibatch, also where its parts have different numbers of tokens."""
    thetas = []
    for micro_batch in (0, 3):
        args, models, runner, agent = start(micro_batch=micro_batch, norm_adv=norm_adv, adam_eps=1e-2, ent_coef=0.1)
        batch, _ = ppo_rlhf.make_batch(agent, runner.play(agent, 1), runner)
        assert len(set(batch.valid.sum(1).tolist())) > 1
        thetas.append(update_once(args, models, agent, batch))
    torch.testing.assert_close(*thetas, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_rlhf_33_ptx_adds_the_supervised_gradient(micro_batch):
    args, models, runner, agent = start(
        ptx_coef=0.7, max_grad_norm=math.inf, adam_eps=1e6, micro_batch=micro_batch
    )  # a step is then rate * gradient / eps
    batch, _ = ppo_rlhf.make_batch(agent, runner.play(agent, 1), runner)
    before = flat(agent).clone()
    torch.manual_seed(3)
    with_ptx = (update_once(args, models, agent, batch, 1e6) - before).double()
    plain_args, _, _, plain = start(max_grad_norm=math.inf, adam_eps=1e6)
    without = (update_once(plain_args, models, plain, batch, 1e6) - before).double()
    torch.manual_seed(3)
    rows = [models.texts[i] for i in torch.randint(len(models.texts), (8,)).tolist()]
    fresh = ppo_rlhf.make_agent(args, models)
    (0.7 * ppo_rlhf.language_loss(fresh.lm, *ppo_rlhf.pad_rows(rows, False))).backward()
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in fresh.parameters()])
    torch.testing.assert_close(with_ptx - without, -gradient.double(), atol=1e-4, rtol=1e-2)


def test_rlhf_35_warmup_leaves_the_policy_alone():
    args, models, runner, agent = start(value="separate")
    batch, _ = ppo_rlhf.make_batch(agent, runner.play(agent, 1), runner)
    policy, value = ([p.clone() for p in part.parameters()] for part in (agent.lm, agent.value_head))
    update_once(args, models, agent, batch, warmup=True)
    assert all(torch.equal(a, b) for a, b in zip(policy, agent.lm.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(value, agent.value_head.parameters(), strict=True))


def test_rlhf_36_prompts_are_used_up_and_reshuffled():
    _, _, runner, _ = start()
    runner.prompts = [[BOS, i] for i in range(20)]
    picked = [row[1] for iteration in range(1, 6) for row in runner.pick_prompts(iteration)]
    assert sorted(picked[:20]) == sorted(picked[20:40]) == list(range(20))
    assert picked[:20] != picked[20:40]


def test_measures_of_an_evaluation_against_numpy():
    """An odd number of responses: as many with an end as without cannot be."""
    _, _, runner, agent = start(eval_episodes=5)
    move(agent)
    rollouts, respond = [], runner.respond

    def noted(*given):
        rollouts.append(respond(*given))
        return rollouts[-1]

    runner.respond = noted
    measures, samples = runner.evaluate(agent)
    (rollout,) = rollouts
    tokens, mask, valid, _ = rollout.responses
    k1, k3 = divergence(agent, runner.reference, rollout.responses)
    with torch.no_grad():
        nll = -runner.reference(tokens, mask, valid.shape[1]).logprob[valid].mean().item()
    expected = {"kl": k1.mean(), "kl_k3": k3.mean(), "reference_nll": nll, "ended": np.mean(ends(rollout.responses))}
    expected |= {"length": valid.sum().item() / 5, "score": rollout.raw.mean().item()}  # the unit is not yet measured
    assert len(samples) == 5 and not valid.all()
    assert {name: measures[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_rlhf_37_evaluation_near_greedy():
    _, _, runner, agent = start(eval_temperature=0.001)
    _, first = runner.evaluate(agent)
    runner.args.seed = 2
    assert [response for _, response, _ in first] == [response for _, response, _ in runner.evaluate(agent)[1]]
    assert agent.temperature == 1


# every flag does something


OFF = {
    "learning rate": {"learning_rate": 4e-3},
    "responses": {"num_envs": 4},
    "tokens": {"num_steps": 4},
    "norm limit": {"max_grad_norm": math.inf},
    "target": {"target_kl": 1e-9},
    "rlhf 01": {"kl_coef": 0.0},
    "rlhf 03": {"kl_estimator": "k3"},
    "rlhf 04": {"kl_target": 0.01, "kl_horizon": 10.0},
    "rlhf 04 horizon": {"kl_horizon": 10.0},
    "rlhf 05": {"norm_score": False},
    "rlhf 06": {"whiten_rewards": True},
    "rlhf 07": {"norm_adv": "none"},
    "rlhf 07 minibatch": {"norm_adv": "minibatch"},
    "rlhf 08": {"gae_lambda": 1.0},
    "rlhf 08 gamma": {"gamma": 0.9},
    "rlhf 09": {"clip_vloss": False},
    "rlhf 10": {"vf_coef": 1.0},
    "rlhf 11": {"head_init": "torch"},
    "rlhf 12": {"value": "separate"},
    "rlhf 14": {"reward_pool": "mean"},
    "rlhf 16": {"stop_at_eos": False},
    "rlhf 17": {"no_eos_score": None},
    "rlhf 20": {"temperature": 0.7},
    "rlhf 24": {"adam_eps": 1e-8},
    "rlhf 25": {"anneal_lr": False},
    "rlhf 26": {"update_epochs": 1},
    "rlhf 26 minibatches": {"num_minibatches": 1},
    "rlhf 28": {"clip_coef": 0.01},
    "rlhf 28 off": {"clip_policy": False},
    "rlhf 29": {"ent_coef": 0.01},
    "rlhf 32": {"score_clip": 0.1},
    "rlhf 33": {"ptx_coef": 1.0},
    "rlhf 34": {"max_kl": 1e-3},
    "rlhf 35": {"value_warmup": 1},
    "bfloat16": {"precision": "bfloat16"},
}


ROUNDING = {"micro_batch"}  # flags that change no more than that


def test_every_flag_of_ppo_is_switched():
    """Those from the first heading of Args, PPO, to the stages before it."""
    names = list(Args.__dataclass_fields__)
    switches = set(names[names.index("learning_rate") : names.index("vocabulary")])
    assert switches <= ROUNDING | {name for changes in OFF.values() for name in changes}


@pytest.fixture(scope="module")
def default_theta(tmp_path_factory):
    return {}


@pytest.mark.parametrize("name", OFF)
def test_every_flag_changes_what_is_learned(name, default_theta):
    few = {"total_timesteps": 3 * 64, "eval_episodes": 0, "checkpoint_every": 100, "learning_rate": 5e-3, "clip_coef": 0.05}
    if not default_theta:
        ppo_rlhf.train(tiny("default", **few))
        default_theta["theta"] = read_checkpoint("default")["theta"]
    ppo_rlhf.train(tiny("changed", **(few | OFF[name])))
    assert not equal(read_checkpoint("changed")["theta"], default_theta["theta"])


def test_rlhf_25_rlhf_26_schedule():
    ppo_rlhf.train(tiny())
    records = read_jsonl("run/metrics.jsonl")[1:]
    assert [record["charts/learning_rate"] for record in records] == [5e-4 * (1 - i / 4) for i in range(4)]
    assert read_checkpoint("run")["adam"][2].item() == 4 * 2 * 2  # iterations, epochs, minibatches


def test_rlhf_34_run_ends_at_a_kl():
    ppo_rlhf.train(tiny(max_kl=0.05, learning_rate=1e-2, total_timesteps=20 * 64))
    *others, last = (record["charts/kl"] for record in read_jsonl("run/metrics.jsonl")[1:])
    assert last > 0.05 and max(others) <= 0.05 and len(others) < 19
    assert read_checkpoint("run")["iteration"] == len(others) + 1


# the whole


def test_learns_a_reward_function():
    changes = {"total_timesteps": 20 * 16 * 8, "num_envs": 16, "learning_rate": 5e-3, "kl_coef": 0.01, "no_eos_score": None}
    ppo_rlhf.train(tiny(env="words:score", eval_episodes=32, **changes))
    first, *_, last = read_jsonl("run/evaluations.jsonl")
    assert last["score"] > first["score"] + 0.7


def test_run_directory_and_console(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo_rlhf.py", *words()])
    ppo_rlhf.main()
    out = capsys.readouterr()
    assert "before:" in out.out and "after:" in out.out and "kl:" in out.out
    assert "supervised model:" in out.err and "reward model: agrees" in out.err
    files = {"metrics.jsonl", "episodes.jsonl", "evaluations.jsonl", "samples.jsonl", "evaluation.json", "checkpoint.pt"}
    assert {path.name for path in Path("run").iterdir()} == files | {"models.pt", "ppo_rlhf.py"}
    assert [record["iteration"] for record in read_jsonl("run/evaluations.jsonl")] == [0, 4]
    measured = json.loads(Path("run/evaluation.json").read_text())
    assert measured["kl"] == read_jsonl("run/evaluations.jsonl")[-1]["kl"]  # the same prompts, the same random numbers
    assert len(read_jsonl("run/episodes.jsonl")) == 4 * 8
    monkeypatch.setattr(sys, "argv", ["ppo_rlhf.py", "--evaluate", "run", "--eval-episodes", "2"])
    Path("texts.tsv").unlink()  # the run directory holds what it needs
    ppo_rlhf.main()
    assert len(json.loads(Path("run/evaluation.json").read_text())["returns"]) == 2


def test_same_seed_same_bits():
    for name in ("a", "b"):
        ppo_rlhf.train(tiny(name))
    assert equal(read_checkpoint("a")["theta"], read_checkpoint("b")["theta"])
    assert read_metrics("a") == read_metrics("b")


def child(flags: list[str]):
    sys.argv = ["ppo_rlhf.py", *flags]
    ppo_rlhf.main()


def test_killed_and_resumed_run_ends_with_the_same_bits():
    whole = {"total_timesteps": 10 * 64, "kl_target": 1.0}
    ppo_rlhf.train(tiny("whole", **whole))
    process = multiprocessing.get_context("fork").Process(target=child, args=(words(run_dir="killed", **whole),))
    process.start()
    while not (Path("killed/metrics.jsonl").is_file() and len(Path("killed/metrics.jsonl").read_text().splitlines()) > 4):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    done = read_checkpoint("killed")["iteration"]
    assert 0 < done < 10
    ppo_rlhf.train(Args(**(read_checkpoint("killed")["args"] | {"resume": "killed", "run_dir": "killed"})))
    for name in ("theta", "adam", "kl_coef", "score_mean", "recent_returns"):
        assert equal(read_checkpoint("killed")[name], read_checkpoint("whole")[name]), name
    for name in ("episodes.jsonl", "evaluations.jsonl", "samples.jsonl"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()
    assert read_metrics("killed")[1:] == read_metrics("whole")[1:]


def test_tensorboard_gets_the_log_and_the_evaluations():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ppo_rlhf.train(tiny(tensorboard=True))
    events = EventAccumulator("run").Reload()
    for file, name, key in (("evaluations", "evaluation/score", "score"), ("metrics", "charts/score", "charts/score")):
        records = [record for record in read_jsonl(f"run/{file}.jsonl") if key in record]
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(record["global_step"], pytest.approx(record[key])) for record in records]
        assert len(told) > 1


# models of transformers, which is optional


def save_pretrained(folder: str, family: str, end: str = "<end>", add_end: bool = False, **changes):
    """A tiny model of random weights, and a tokenizer of whole words, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<unk>", "<end>", "the", "film", "is", "and", "to", "me", *GOOD, *BAD])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if add_end:
        backend.post_processor = tokenizers.processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 1)])
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=end, pad_token="<end>")
    own.save_pretrained(folder)
    sizes = {"vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 1, "do_layer_norm_before": True}
    sizes |= {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64} if family == "mpt" else {}
    sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64} if family in ("gpt2", "bloom") else {}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **sizes | changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return config


FAMILIES = ("gpt2", "llama", "qwen3", "gpt_neox", "gemma3_text", "opt", "bloom", "mpt")


@pytest.mark.parametrize("family", FAMILIES)
def test_pretrained_model(family, monkeypatch):
    """Padding on the left and the cache change no logits (checked while loading), the first ratio is 1, and it trains."""
    save_pretrained("lm", family)
    Path("prompts.txt").write_text("the film is\nis the film good and\nthe\n")
    changes = {"model": "lm", "prompts": "prompts.txt", "env": "words:score", "data": "", "total_timesteps": 2 * 64}
    args, models, runner, agent = start(**changes)
    rollout = runner.play(agent, 1)
    batch, measures = ppo_rlhf.make_batch(agent, rollout, runner)
    assert measures["logprob_gap"] < 1e-5 and measures["kl"] == pytest.approx(0, abs=1e-5)
    before = flat(agent).clone()
    assert not torch.equal(before, update_once(args, models, agent, batch))
    ppo_rlhf.train(tiny(**changes))
    evaluated = ppo_rlhf.evaluate(tiny(**changes), read_checkpoint("run"))
    assert len(evaluated["returns"]) == 3 and not evaluated["problems"]


def test_pretrained_models_that_are_refused(monkeypatch):
    save_pretrained("capped", "gemma2", final_logit_softcapping=0.01)
    Path("prompts.txt").write_text("the film is\n")
    given = {"prompts": "prompts.txt", "env": "words:score", "data": ""}
    with pytest.raises(UsageError, match="the model capped gives other logits from its last hidden states: this script cannot"):
        start(model="capped", **given)
    (Path("capped") / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"cannot load the model capped: .*no file named"):
        start(model="capped", **given)
    with pytest.raises(UsageError, match=r"cannot load the model ./nowhere"):
        start(model="./nowhere", **given)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mamba", {"state_size": 4}),
        ("bert", {}),  # reads what comes after a token, too
        ("rwkv", {"attention_hidden_size": 32, "context_length": 64}),
    ],
)
def test_pretrained_models_that_work_in_other_ways_are_refused(family, changes):
    save_pretrained("other", family, **changes)
    Path("prompts.txt").write_text("the film is\n")
    refusals = r"this script cannot train the model other \(\w+: .*\)|the model other gives other logits .*: this script cannot"
    with pytest.raises(UsageError, match=refusals):
        start(model="other", prompts="prompts.txt", env="words:score", data="")


def test_tokenizer_that_is_larger_than_the_model_is_refused():
    save_pretrained("lm", "gpt2", vocab_size=10)
    Path("prompts.txt").write_text("the film is lovely\n")
    given = {"model": "lm", "prompts": "prompts.txt", "env": "words:score", "data": ""}
    with pytest.raises(UsageError, match="the tokenizer of lm has a token 10, but the model has 10 tokens"):
        start(**given)
    save_pretrained("lm", "gpt2", end="<another>")
    with pytest.raises(UsageError, match="the tokenizer of lm has a token 16, but the model has 16 tokens"):
        start(**given)


def test_tokenizer_that_adds_the_end_to_a_prompt():
    save_pretrained("lm", "gpt2", add_end=True)
    Path("prompts.txt").write_text("the film is\nis the\n")
    given = {"model": "lm", "prompts": "prompts.txt", "env": "words:score", "data": "texts.txt"}
    Path("texts.txt").write_text("the film is good\n")
    models = start(**given)[1]
    assert models.prompts == [[2, 3, 4], [4, 2]] and models.texts == [[2, 3, 4, 8, 1]]
    save_pretrained("lm", "gpt2")  # this one adds nothing, so an end belongs to the prompt
    Path("prompts.txt").write_text("the film is <end>\nis the\n")
    Path("texts.txt").write_text("3,1\tthe film is good\n")  # ratings are no text
    models = start(**given)[1]
    assert models.prompts == [[2, 3, 4, 1], [4, 2]] and models.texts == [[2, 3, 4, 8, 1]]


def test_pretrained_prompts_that_are_refused():
    save_pretrained("lm", "gpt2")
    Path("long.txt").write_text("good " * 60 + "\n")
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes(b"a\xe9b")
    given = {"model": "lm", "env": "words:score", "data": ""}
    with pytest.raises(UsageError, match="the longest prompt and num_steps = 8 make 68 tokens, but the model reads 64"):
        start(prompts="long.txt", **given)
    with pytest.raises(UsageError, match=r"prompts empty.txt has no lines"):
        start(prompts="empty.txt", **given)
    with pytest.raises(UsageError, match=r"prompts latin.txt is not UTF-8: byte 1"):
        start(prompts="latin.txt", **given)


def test_prompts_without_a_token_are_refused(monkeypatch):
    save_pretrained("lm", "gpt2")
    Path("prompts.txt").write_text("the film\nis\n")
    monkeypatch.setattr(ppo_rlhf.PretrainedTokenizer, "encode", lambda self, text: [3] if "film" in text else [])
    with pytest.raises(UsageError, match="the tokenizer of lm makes no token of 'is'"):
        start(model="lm", prompts="prompts.txt", env="words:score", data="")


def test_rlhf_15_a_tokenizer_whose_padding_is_its_end(capsys):
    """The end token of a response is a token like any other: it ends the response and it is learned. One line warns."""
    save_pretrained("lm", "gpt2")
    Path("prompts.txt").write_text("the film is\nthe\n")
    _, models, runner, agent = start(
        model="lm", prompts="prompts.txt", env="words:score", data="", num_envs=64, total_timesteps=512
    )
    own = models.tokenizer.tokenizer
    assert own.pad_token_id == own.eos_token_id == agent.lm.eos
    assert capsys.readouterr().err.count("warning: the tokenizer of lm pads with its end token") == 1
    rollout = runner.play(agent, 1)
    tokens, valid = rollout.responses.tokens[:, -rollout.responses.valid.shape[1] :], rollout.responses.valid
    ended = [row[row_valid][-1].item() == agent.lm.eos for row, row_valid in zip(tokens, valid, strict=True)]
    assert rollout.ended.tolist() == ended and 10 < sum(ended) < 64
    batch, _ = ppo_rlhf.make_batch(agent, rollout, runner)
    at_end = (tokens == agent.lm.eos) & valid
    assert (batch.mask[:, -valid.shape[1] :][at_end]).all() and (batch.advantage[at_end] != 0).all()
    own.pad_token = "<unk>"
    own.save_pretrained("lm")
    start(model="lm", prompts="prompts.txt", env="words:score", data="")
    assert "warning: the tokenizer" not in capsys.readouterr().err


def test_reward_model_without_a_head_is_refused(capfd):
    """transformers gives a language model a random head and only warns, in a table; here there is one sentence."""
    save_pretrained("lm", "gpt2")
    capfd.readouterr()
    with pytest.raises(UsageError, match=r"the model lm has no weights for score\.weight: it was saved as another kind"):
        ppo_rlhf.Classifier("lm", "cpu")
    assert capfd.readouterr().err == ""


def test_pretrained_reward_model():
    """A classifier of another family and tokenizer than the policy's."""
    config = save_pretrained("rm", "llama", num_labels=1)
    transformers = pytest.importorskip("transformers")
    classifier = transformers.AutoModelForSequenceClassification.from_config(config)
    classifier.save_pretrained("rm")
    score = ppo_rlhf.Classifier("rm", "cpu")
    tokens = transformers.AutoTokenizer.from_pretrained("rm")("the film is good", return_tensors="pt")
    alone = classifier.eval()(**tokens).logits.item()
    both = score(["the film is", "the film is bad"], [" good", " and sad and awful"])
    assert both[0] == pytest.approx(alone, abs=1e-5) and both[0] != both[1]
    args = tiny(reward_model="rm", total_timesteps=64)
    ppo_rlhf.train(args)
    Path("rm").rename("moved")
    words = ["--evaluate", "run", "--reward-model", "moved"]
    assert ppo_rlhf.evaluate(*ppo_rlhf.parse_args(words))["problems"] == []
    torch.nn.init.ones_(classifier.score.weight)
    classifier.save_pretrained("moved")
    with pytest.raises(UsageError, match="the run began with other models, prompts or texts than there are now"):
        ppo_rlhf.evaluate(*ppo_rlhf.parse_args(words))


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    Path("prompts.txt").write_text("the film is\n")
    with pytest.raises(UsageError, match="need transformers: pip install transformers"):
        start(model="lm", prompts="prompts.txt", env="words:score", data="")


# ranks


def run_two_ranks(**changes) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ppo_rlhf.__file__]
    return subprocess.run([*command, *words(**changes)], capture_output=True, text=True, check=False, timeout=300)


def test_rlhf_31_two_ranks_equal_one_process_with_twice_the_prompts(monkeypatch):
    changes = {"num_minibatches": 1, "norm_adv": "none", "adam_eps": 1e-2, "total_timesteps": 2 * 64}
    changes |= {"ptx_coef": 1.0, "kl_horizon": 10.0}
    ppo_rlhf.load_models(tiny(**changes))  # the stages draw as ever
    draw = torch.randperm
    with monkeypatch.context() as patch:  # as many numbers as a rank with half of the rows, so that both draw the same texts
        patch.setattr(torch, "randperm", lambda count: torch.cat([draw(count // 2), torch.arange(count // 2, count)]))
        ppo_rlhf.train(tiny("one", **changes))
    done = run_two_ranks(run_dir="two", num_envs=4, **changes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run directory: two") == 1
    one, two = (read_checkpoint(name) for name in ("one", "two"))
    torch.testing.assert_close(one["theta"], two["theta"], atol=1e-5, rtol=1e-4)
    assert one["kl_coef"] == pytest.approx(two["kl_coef"]) and one["kl_coef"] != pytest.approx(Args.kl_coef)
    assert read_jsonl("one/episodes.jsonl") == [pytest.approx(episode) for episode in read_jsonl("two/episodes.jsonl")]
    with pytest.raises(UsageError, match="the run has 2 rank"):
        ppo_rlhf.train(Args(**(two["args"] | {"resume": "two"})))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_reward_that_fails_in_one_rank_stops_all(failing):
    failure = f"len(responses) == 4 and os.environ['RANK'] == '{failing}'"
    write_function(f"import os; return 1 / 0 if {failure} else [1.0] * len(responses)")
    done = run_two_ranks(env="own:score", num_envs=4, eval_episodes=0)
    raised = "ppo_rlhf.py: error: the reward own:score raised ZeroDivisionError('division by zero'); interrupted"
    assert done.stderr.count(raised) == 2, done.stderr  # the lines of two processes may run into each other
    assert done.stderr.count("torchrun --nproc-per-node 2") == 1


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "0"}, "the environment variable WORLD_SIZE is '0', no number as torchrun sets it: unset it"),
        ({"RANK": "x"}, "the environment variable RANK is 'x', no number as torchrun sets it: unset it"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is 1: start it with torchrun, or unset both"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, as if torchrun had started this, but .*: start it with torchrun, or unset W"),
    ],
)
def test_ranks_that_are_none(variables, sentence, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=sentence):
        ppo_rlhf.train(tiny())


def test_a_reward_that_fails_in_an_evaluation_does_not_end_the_training(capsys):
    """It fails at its fourth call, which is the evaluation after the second and last iteration."""
    write_function("score.calls += 1\n    return fail() if score.calls == CALL else [1.0] * len(responses)")
    text = Path("own.py").read_text() + "\nscore.calls = 0\n\ndef fail():\n    raise OSError('quota')\n"
    for call, fails in ((4, "evaluation"), (3, "training")):
        Path("own.py").write_text(text.replace("CALL", str(call)))
        sys.modules.pop("own", None)
        args = tiny(fails, env="own:score", norm_score=False, eval_every=100, total_timesteps=2 * 64, checkpoint_every=1)
        if fails == "evaluation":
            ppo_rlhf.train(args)
            assert "warning: no evaluation after iteration 2: the reward own:score raised OSError" in capsys.readouterr().err
            assert read_checkpoint(fails)["iteration"] == 2
        else:
            with pytest.raises(UsageError, match=r"go on from step 64 with: python .* --resume training"):
                ppo_rlhf.train(args)


@pytest.mark.parametrize("what", ["prompts", "lm"])
def test_models_of_another_run_are_refused(what):
    ppo_rlhf.train(tiny())
    state = torch.load("run/models.pt", weights_only=True)
    state.pop(what) if what == "prompts" else state["lm"].popitem()
    torch.save(state, "run/models.pt")
    with pytest.raises(UsageError, match=r"run/models.pt is damaged or of another run"):
        ppo_rlhf.train(Args(**(read_checkpoint("run")["args"] | {"resume": "run", "total_timesteps": 6 * 64})))


def test_models_beyond_the_memory_are_refused_before_they_are_made():
    for changes in ({"width": 3_200_000}, {"layers": 10**7}, {"num_envs": 10**9}):
        with pytest.raises(UsageError, match=r"need at least .* GB of memory, and .* GB are free"):
            ppo_rlhf.train(tiny(**changes, total_timesteps=10**12, kl_target=None))
    assert not Path("run").exists()


# what a review of this file found, mechanism by mechanism


def test_rlhf_37_a_reward_that_fails_in_an_evaluation_leaves_the_temperature():
    _, _, runner, agent = start(env="words:score", temperature=0.7, eval_temperature=0.5)
    kept, runner.score = runner.score, lambda prompts, responses: 1 / 0
    with pytest.raises(UsageError):
        runner.evaluate(agent)
    assert agent.temperature == 0.7
    runner.score = kept
    assert runner.evaluate(agent)[0]["score"] and agent.temperature == 0.7


def test_rlhf_37_kl_of_an_evaluation_is_that_of_what_it_samples():
    """The policy is the reference, so at temperature 1 the KL is 0; at another one it is the KL of that distribution."""
    _, _, runner, agent = start(env="words:score", eval_episodes=6)
    assert runner.evaluate(agent)[0]["kl"] == pytest.approx(0, abs=1e-5)
    runner.args.eval_temperature = 0.01
    measures, _ = runner.evaluate(agent)
    # nearly the likeliest tokens: log pi is nearly 0, so the KL is what the reference needs for them
    assert measures["kl"] == pytest.approx(measures["reference_nll"] * measures["length"], rel=0.02)


@pytest.mark.parametrize(("norm_adv", "minibatches"), [("batch", 1), ("minibatch", 8)])
def test_a_single_step_is_not_normalized(norm_adv, minibatches):
    N = minibatches
    with pytest.raises(UsageError, match=f"norm_adv {norm_adv} makes the advantage of a single step 0"):
        tiny(norm_adv=norm_adv, num_envs=N, num_minibatches=minibatches, num_steps=1)
    tiny(norm_adv="none", num_envs=N, num_minibatches=minibatches, num_steps=1)


def test_rlhf_04_a_coefficient_that_could_turn_negative_is_refused(monkeypatch):
    with pytest.raises(UsageError, match=r"kl_horizon is 1\.6: it must be above 1\.6, a fifth of the responses of an it"):
        tiny(kl_horizon=1.6)
    tiny(kl_horizon=1.6, kl_target=None)
    runner = start(kl_horizon=1.7)[2]
    runner.control_kl(0, False)
    assert 0 < runner.kl_coef < 0.05
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"it must be above 3\.2"):
        tiny(kl_horizon=1.7)


def test_rlhf_05_equal_scores_have_no_unit():
    """The deviation of 256 times 0.1 is 1e-17, not 0."""
    write_function("return [0.1] * len(responses)")
    _, _, runner, agent = start(env="own:score")
    runner.measure_scores()
    assert runner.score_std == 1
    assert runner.play(agent, 1).samples[0].score == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("value", ["head", "separate"])
def test_rlhf_35_warmup_trains_the_value_function_alone(value):
    """Texts of PTX wait, beta waits, and Adam begins anew with the policy."""
    changes = {"value": value, "ptx_coef": 1.0, "kl_target": 5.0, "learning_rate": 1e-2, "checkpoint_every": 1}
    ppo_rlhf.train(tiny(value_warmup=2, total_timesteps=3 * 64, **changes))
    args, _, _, agent = start(value=value)
    policy = sum(p.numel() for p in agent.lm.parameters())
    saved, records = read_checkpoint("run"), read_jsonl("run/metrics.jsonl")[1:]
    assert [record["charts/kl_coef"] for record in records] == [args.kl_coef] * 3
    assert [record["charts/kl"] for record in records] == [pytest.approx(0, abs=1e-4)] * 3
    assert saved["adam"][2].item() == 4  # of one iteration: two epochs of two minibatches
    assert not torch.equal(saved["theta"][:policy], flat(agent)[:policy])


def test_rlhf_35_a_warmup_without_an_end_is_refused():
    with pytest.raises(UsageError, match="value_warmup is 4, but there are 4 iterations: the policy would never learn"):
        tiny(value_warmup=4)


class Spaced:
    """A tokenizer of words as SentencePiece has it: the first space of a text is not written."""

    def decode(self, tokens):
        return "".join(" " + "abcdefghijklmnopqrstuvwxyz"[token % 26] for token in tokens)[1:]


def test_prompt_and_response_together_are_the_text_of_both():
    _, _, runner, _ = start()
    tokenizer, runner.tokenizer = runner.tokenizer, Spaced()
    assert runner.decode([0, 1], [2, 3]) == ("a b", " c d")
    runner.tokenizer = tokenizer
    letter = [3 + byte for byte in "日本".encode()]
    for cut in range(1, len(letter)):  # the joint is within a letter of three bytes
        prompt, response = runner.decode([BOS, *letter[:cut]], letter[cut:])
        assert prompt + response == "日本" and "\ufffd" not in prompt + response
    assert runner.decode([3 + 0xFF], [3 + 97]) == ("\ufffd", "a")  # no letter at all


def test_a_run_notices_another_reference(capsys):
    given = {"env": "words:score", "total_timesteps": 2 * 64}
    ppo_rlhf.train(tiny(**given))
    ppo_rlhf.train(tiny("other", seed=2, **given))
    saved = Path("run/models.pt").read_bytes()
    Path("run/models.pt").write_bytes(Path("other/models.pt").read_bytes())
    with pytest.raises(UsageError, match="the run began with other models, prompts or texts than there are now"):
        ppo_rlhf.train(Args(**(read_checkpoint("run")["args"] | {"resume": "run", "total_timesteps": 4 * 64})))
    with pytest.raises(UsageError, match="the run began with other models, prompts or texts than there are now"):
        ppo_rlhf.evaluate(tiny(**given), read_checkpoint("run"))
    Path("run/models.pt").write_bytes(saved)
    assert len(ppo_rlhf.evaluate(tiny(**given), read_checkpoint("run"))["returns"]) == 4


@pytest.mark.parametrize(
    "change",
    [{"texts": [["a"]]}, {"prompts": [[10**6]]}, {"facts": [1]}, {"merges": [1]}, {"lm": []}, {"held_out_prompts": 3}],
)
def test_models_of_wrong_types_are_refused(change):
    ppo_rlhf.train(tiny(total_timesteps=64))
    torch.save(torch.load("run/models.pt", weights_only=True) | change, "run/models.pt")
    with pytest.raises(UsageError, match=r"run/models.pt is damaged or of another run"):
        ppo_rlhf.load_models(tiny())


@pytest.mark.parametrize("change", [{"score_std": 0.0}, {"kl_coef": -1.0}])
def test_figures_that_cannot_be_are_refused(change):
    ppo_rlhf.train(tiny(total_timesteps=64))
    torch.save(read_checkpoint("run") | change, "run/checkpoint.pt")
    with pytest.raises(UsageError, match=f"the checkpoint is damaged: .*{next(iter(change))} is {next(iter(change.values()))}"):
        ppo_rlhf.evaluate(tiny(), read_checkpoint("run"))


def cached() -> set[Path]:
    return set(Path(os.environ["XDG_CACHE_HOME"], "ppo_rlhf").glob("*.pt"))


def test_the_cache_goes_by_all_that_the_stages_read(monkeypatch, tmp_path):
    """Of settings only those that a stage knows; it knows no others. Of code the sections that it runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ppo_rlhf.load_models(tiny())
    first = cached()
    assert len(first) == 2
    ppo_rlhf.load_models(tiny(temperature=0.5, learning_rate=1e-2, kl_coef=0.1))
    assert cached() == first
    ppo_rlhf.load_models(tiny(reward_pool="mean"))
    second = cached()
    assert len(second) == 3
    for part, trained_anew in (("Flags", 0), ("PPO", 0), ("Language model", 2), ("Stages", 2)):
        edited = [text + "# edited\n" * text.startswith(f"# {part}") for text in ppo_rlhf.SECTIONS]
        assert edited != ppo_rlhf.SECTIONS
        with monkeypatch.context() as patch:
            patch.setattr(ppo_rlhf, "SECTIONS", edited)
            before = len(cached())
            ppo_rlhf.load_models(tiny())
            assert len(cached()) == before + trained_anew, part
    monkeypatch.setattr(ppo_rlhf, "train_supervised", lambda args, *rest: args.learning_rate)
    with pytest.raises(AttributeError, match="learning_rate"):  # a stage that reads another flag needs to say so
        ppo_rlhf.load_models(tiny(sft_epochs=3))


def test_a_cache_entry_that_is_none_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ppo_rlhf.load_models(tiny())
    for file in cached():
        torch.save({}, file)
    with pytest.raises(UsageError, match=r"[0-9a-f]{16}\.pt is damaged: delete it"):
        ppo_rlhf.load_models(tiny())


def test_waiting_for_a_stage_of_another_process_is_said(capsys):
    order = []

    def hold():
        with ppo_rlhf.open_cache("entry"):
            order.append("held")
            time.sleep(0.5)
            order.append("freed")

    thread = threading.Thread(target=hold)
    thread.start()
    while not order:
        time.sleep(0.01)
    with ppo_rlhf.open_cache("entry"):
        order.append("mine")
    thread.join()
    assert order == ["held", "freed", "mine"]
    assert "waiting for another process, which is filling" in capsys.readouterr().err


def test_labels_do_not_depend_on_how_ppo_samples(monkeypatch):
    """The first of a pair is the better one."""
    monkeypatch.setattr(ppo_rlhf, "make_vader", lambda: lambda texts, _: [float(text.count("o")) for text in texts])
    models = ppo_rlhf.load_models(tiny(env="words:score"))
    pairs = []
    for changes in ({}, {"temperature": 0.3, "precision": "bfloat16", "value": "separate"}):
        args = argparse.Namespace(**vars(tiny(env="labels", **changes)))
        pairs.append(ppo_rlhf.compare_by_vader(args, models, np.random.default_rng(0)))
    assert pairs[0] == pairs[1] and len(pairs[0]) == 64
    assert all(better.count("o") > worse.count("o") for better, worse in pairs[0])


def test_evaluation_of_a_saved_run_shows_before_only_what_was_measured_alike(capsys, monkeypatch):
    ppo_rlhf.train(tiny(eval_episodes=2, eval_every=1, total_timesteps=2 * 64))
    for flags, alike in (
        (["--eval-episodes", "2"], True),
        (["--eval-episodes", "4"], False),
        (["--eval-temperature", "0.5"], 0),
    ):
        with open("run/evaluations.jsonl", "a") as log:
            log.write('{"iteration": 2, "sco')  # cut by a crash
        monkeypatch.setattr(sys, "argv", ["ppo_rlhf.py", "--evaluate", "run", *flags])
        capsys.readouterr()
        ppo_rlhf.main()
        out, err = capsys.readouterr()
        assert ("->" in out and out.count("before:") == 2) if alike else ("->" not in out and "before:" not in out)
        assert out.count("after:") == (4 if "4" in flags else 2) and " kl: " in out
        assert f"answering {4 if '4' in flags else 2} prompts" in err


def test_language_loss_is_that_of_each_next_token():
    lm, rows = random_lm(), [[0, 5, 6, 7, 8, EOS], [0, 9, EOS], [0, EOS]]
    losses = next_token_losses(lm, rows)
    padded = ppo_rlhf.pad_rows(rows, False)
    assert ppo_rlhf.language_loss(lm, *padded).item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert ppo_rlhf.language_loss(lm, *padded, "sum").item() == pytest.approx(sum(losses), rel=1e-5)


def test_the_reward_model_prefers_what_people_prefer():
    """Words that it has read in other texts."""
    models = start(num_comparisons=1024)[1]
    rows = [ppo_rlhf.frame(models.tokenizer, f"the film is {' and '.join(told)} to me") for told in (GOOD, BAD)]
    good, bad = models.reward_model.score(rows)
    assert good > bad and models.facts["reward_model_accuracy"] > 0.9


def test_held_out_texts_serve_the_measures_alone():
    """Each text begins with a number of its own, so that a prompt says which text it is of."""
    lines = Path("texts.tsv").read_text().splitlines()
    rated = [line.split("\t") for line in lines]
    rated = [(votes, f"{i:02} {text}") for i, (votes, text) in enumerate(rated)]
    Path("numbered.tsv").write_text("".join(f"{votes}\t{text}\n" for votes, text in rated))
    _, models, runner, agent = start(data="numbered.tsv", eval_episodes=90)
    number = lambda tokens: int(models.tokenizer.decode(tokens)[:2])  # noqa: E731
    learned = set(map(number, models.texts))
    held = sorted(set(range(90)) - learned)
    assert len(held) == 5
    assert set(map(number, runner.prompts)) <= learned
    measured = [int(prompt[:2]) for prompt, _, _ in runner.evaluate(agent)[1]]
    assert sorted(measured) == held
    rows = [ppo_rlhf.frame(models.tokenizer, rated[i][1]) for i in held]
    assert models.facts["supervised_nats"] == pytest.approx(np.mean(next_token_losses(models.lm, rows)), rel=1e-4)
    votes = [np.mean([float(vote) for vote in rated[i][0].split(",")]) for i in held]
    assert models.facts["reward_model_accuracy"] == ppo_rlhf.agreement(models.reward_model.score(rows), votes)


def test_few_prompts_are_said_and_held_out_prompts_are_not_trained_on(capsys):
    assert ppo_rlhf.hold_out([[1], [2]]) == ([[1], [2]], [[1], [2]])
    assert "warning: too few different prompts" in capsys.readouterr().err
    prompts, held_out = ppo_rlhf.hold_out([[i % 20] for i in range(40)])
    assert held_out == [[0], [1]] and prompts == [[i % 20] for i in range(40) if i % 20 > 1]
    assert capsys.readouterr().err == ""


def test_seeds_of_any_size():
    _, models, runner, _ = start(env="words:score")
    heads = [ppo_rlhf.make_agent(tiny(seed=seed, head_init="torch"), models).value_head for seed in (1, 2**200 + 2)]
    assert not torch.equal(heads[0].weight, heads[1].weight)
    runner.args.seed = 2**200 + 2
    assert len(runner.play(ppo_rlhf.make_agent(runner.args, models), 1).samples) == 8


def test_more_tokens_than_the_model_reads_are_refused_before_the_stages():
    with pytest.raises(UsageError, match="num_steps is 125: with a prompt of 8 tokens it exceeds the 128 that"):
        tiny(num_steps=125, total_timesteps=10_000)
    tiny(num_steps=125, total_timesteps=10_000, prompts="some.txt")  # a prompt of three tokens would fit


def test_files_with_a_mark_and_with_odd_separators():
    Path("odd.txt").write_bytes("\ufeffone\u2028two\u0085three\r\nfour\n".encode())
    assert ppo_rlhf.read_lines("odd.txt", "prompts") == ["one\u2028two\u0085three", "four"]


def test_agreement_without_ratings_is_not_known(capsys):
    assert ppo_rlhf.agreement([1.0, 2.0], [3.0, 3.0]) is None and ppo_rlhf.agreement([], []) is None
    lines = Path("texts.tsv").read_text().splitlines()
    order = np.random.default_rng(0).permutation(len(lines)).tolist()
    for i in order[: len(lines) // 18]:  # those that are held out
        lines[i] = lines[i].partition("\t")[2]
    Path("half.tsv").write_text("\n".join(lines) + "\n")
    assert "reward_model_accuracy" not in start(data="half.tsv")[1].facts
    assert "reward model: no two unseen texts have different ratings to test it with" in capsys.readouterr().err


def test_rlhf_27_micro_batches_bound_every_pass(monkeypatch):
    """But those of sampling, which keep no hidden states."""
    args, models, runner, agent = start(micro_batch=3, env="words:score", ptx_coef=1.0)
    whole = start(env="words:score")[2:]
    rows, hidden = [], GPT.hidden

    def counted(self, tokens, mask, cache=None):
        rows.extend([len(tokens)] if cache is None else [])
        return hidden(self, tokens, mask, cache)

    monkeypatch.setattr(GPT, "hidden", counted)
    batch, _ = ppo_rlhf.make_batch(agent, runner.play(agent, 1), runner)
    measures, _ = runner.evaluate(agent)
    update_once(args, models, ppo_rlhf.make_agent(args, models), batch)
    assert max(rows) == 3
    other, _ = ppo_rlhf.make_batch(whole[1], whole[0].play(whole[1], 1), whole[0])
    torch.testing.assert_close(batch.logprob, other.logprob, atol=1e-5, rtol=1e-5)
    assert measures["kl"] == pytest.approx(whole[0].evaluate(whole[1])[0]["kl"], abs=1e-5)


def test_rlhf_34_a_run_that_ended_at_a_kl_stays_ended(capsys):
    ppo_rlhf.train(tiny(max_kl=0.05, learning_rate=1e-2, total_timesteps=20 * 64))
    before = read_checkpoint("run")
    for _ in range(2):
        ppo_rlhf.train(Args(**(before["args"] | {"resume": "run"})))
        assert read_checkpoint("run")["iteration"] == before["iteration"]
        assert equal(read_checkpoint("run")["theta"], before["theta"])
    assert capsys.readouterr().err.count("max_kl: the KL to the reference is") == 3


def test_a_reward_may_change_its_lists_and_switch_gradients_off():
    Path("own.py").write_text(
        "import torch\ntorch.set_grad_enabled(False)\n"
        "def score(prompts, responses):\n    torch.set_grad_enabled(False)\n    torch.rand(3)\n"
        "    prompts.clear()\n    return [float(len(responses.pop())) for _ in range(len(responses))][::-1]\n"
    )
    sys.modules.pop("own", None)
    _, _, runner, agent = start(env="own:score")
    rollout = runner.play(agent, 1)
    assert [len(sample.response) for sample in rollout.samples] == rollout.raw.tolist() and torch.is_grad_enabled()
    drawn = torch.rand(1)
    runner.score = lambda prompts, responses: [1.0] * len(responses)
    runner.play(agent, 1)
    assert torch.equal(torch.rand(1), drawn)  # what the reward draws changes nothing
    ppo_rlhf.train(tiny(env="own:score", total_timesteps=64))


def test_a_reward_that_draws_numbers_of_torch_resumes_to_the_same_bits():
    write_function("import torch; return torch.rand(len(responses)).tolist()")
    changes = {"env": "own:score", "anneal_lr": False, "eval_every": 2}
    ppo_rlhf.train(tiny("whole", **changes))
    ppo_rlhf.train(tiny("part", total_timesteps=2 * 64, **changes))
    torch.manual_seed(7)
    part = read_checkpoint("part")["args"]
    ppo_rlhf.train(Args(**(part | {"resume": "part", "run_dir": "part", "total_timesteps": 4 * 64})))
    assert equal(read_checkpoint("part")["theta"], read_checkpoint("whole")["theta"])
    assert Path("part/evaluations.jsonl").read_bytes() == Path("whole/evaluations.jsonl").read_bytes()


def test_a_checkpoint_of_an_older_version_is_evaluated_and_not_resumed(capsys):
    ppo_rlhf.train(tiny(env="words:score"))
    checkpoint = read_checkpoint("run")
    older = {key: value for key, value in checkpoint.items() if key not in ("kl", "reference")} | {"script_sha256": "0"}
    assert len(ppo_rlhf.evaluate(tiny(env="words:score"), older)["returns"]) == 4
    torch.save(older, "run/checkpoint.pt")
    with pytest.raises(UsageError, match="the checkpoint is incomplete: it has no kl"):
        ppo_rlhf.train(Args(**(checkpoint["args"] | {"resume": "run", "total_timesteps": 6 * 64})))


def test_the_unit_of_the_score_is_that_of_rank_0():
    """A reward need not say the same in all ranks."""
    write_function("import os; return [len(response) * (1.0 + int(os.environ['RANK'])) for response in responses]")
    done = run_two_ranks(env="own:score", num_envs=4, total_timesteps=64, eval_episodes=0)
    assert done.returncode == 0, done.stderr
    saved = read_checkpoint("run")
    _, _, runner, agent = start(env="words:score")
    runner.score = lambda prompts, responses: [float(len(response)) for response in responses]
    runner.measure_scores()
    assert (saved["score_mean"], saved["score_std"]) == (runner.score_mean, runner.score_std)
    rng = np.random.default_rng([1, 2, 1])
    rng.integers(2**31)  # the seed that play draws
    second = runner.respond(agent, runner.pick_prompts(1), rng, slice(4, 8)).samples
    for episode, sample in zip(read_jsonl("run/episodes.jsonl")[4:], second, strict=True):
        assert episode["return"] == pytest.approx((2 * len(sample.response) - saved["score_mean"]) / saved["score_std"])


def test_without_pip_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "bare"], check=True)
    monkeypatch.setattr(sys, "executable", str(Path("bare/bin/python").absolute()))
    with pytest.raises(UsageError, match=r"No module named pip\): give texts with --data FILE"):
        ppo_rlhf.load_sentences(tiny(data=""))


def test_the_path_of_a_gpu_of_language_models(monkeypatch):
    """All stages of ppo_rlhf.py. The stand-in has other kernels for attention, so the last digits differ."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path.cwd()))
    script, data = Path(ppo_rlhf.__file__), Path(__file__).with_name("texts.tsv")
    flags = f"--env human --data {data} --num-envs 4 --num-steps 4 --num-minibatches 2 --update-epochs 2"
    flags += " --total-timesteps 48 --eval-episodes 3 --vocabulary 270 --width 32 --layers 1 --sft-epochs 1"
    flags += " --num-comparisons 64 --ptx-coef 1 --value separate --value-warmup 1 --target-kl 1 --run-dir"
    done = run_posed(script, f"{flags} posed")
    assert done.returncode == 0, done.stderr
    assert not IN_A_MINIBATCH & waits_in(done).keys()
    subprocess.run([sys.executable, str(script), *flags.split(), "cpu"], check=True, capture_output=True)
    posed, cpu = read_checkpoint("posed"), read_checkpoint("cpu")
    assert posed["args"]["device"] == "cuda"
    assert posed["iteration"] == 3
    torch.testing.assert_close(posed["theta"], cpu["theta"], atol=1e-4, rtol=0)
    assert [json.loads(Path(run_dir, "evaluation.json").read_text())["problems"] for run_dir in ("posed", "cpu")] == [[], []]
    texts = [[record["response"] for record in read_jsonl(f"{run_dir}/samples.jsonl")] for run_dir in ("posed", "cpu")]
    assert texts[0] == texts[1]


# bad input


def test_samples_cannot_control_the_terminal(capsys):
    samples = [("a prompt", "caf\u00e9 \x1b[2Jgone\r\x01\n", 1.0)]
    ppo_rlhf.tell_evaluation(tiny("nothing"), {"problems": [], "score": 1.5, "samples": samples})
    out = capsys.readouterr().out
    assert "after:  caf\u00e9 \ufffd[2Jgone\ufffd\ufffd\ufffd\n" in out
    assert "score:    1.500" in out


def write_function(body: str):
    Path("own.py").write_text(f"def score(prompts, responses):\n    {body}\n")
    sys.modules.pop("own", None)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--env", "humans"], "unknown reward humans: use human, labels, vader, or a function of yours, my_module:score"),
        (["--reward", "no_module:score"], "cannot load the reward function no_module:score: ModuleNotFoundError"),
        (["--reward", "words:other"], "cannot load the reward function words:other: AttributeError"),
        (["--prompts", "nothing.txt"], "prompts nothing.txt cannot be read: No such file or directory"),
        (["--prompts", "empty.txt"], "prompts empty.txt has no lines"),
        (["--prompts", "latin.txt"], "prompts latin.txt is not UTF-8: byte 1"),
        (["--prompts", "long.txt"], "the longest prompt and num_steps = 8 make"),
        (["--data", "unrated.txt"], "human ratings are missing"),
        (["--data", "wrong.txt"], "data wrong.txt: before the tab there must be numbers, not 'good'"),
        (["--data", "one.txt"], "data needs at least two different texts"),
        (["--num-minibatches", "3"], "num_envs = 8 responses do not divide into num_minibatches = 3: change one of them"),
        (["--model", "lm"], "model needs prompts: give --prompts FILE"),
        (["--model", "lm", "--prompts", "long.txt"], "model needs a reward of its own: --reward my_module:score"),
        (["--width", "33"], "width is 33: it must be a multiple of 32"),
        (["--vocabulary", "100"], "vocabulary is 100: it must be at least 259"),
        (["--temperature", "0"], "temperature is 0.0: it must be at least 1e-6"),
        (["--no-eos-score", "nan"], "no_eos_score is nan: it must lie between -1e30 and 1e30, or be None"),
        (["--temperature", "1e-40"], "temperature is 1e-40: it must be at least 1e-6"),
        (["--eval-temperature", "1e-40"], "eval_temperature is 1e-40: it must be at least 1e-6"),
        (["--no-eos-score", "1e300"], "no_eos_score is 1e+300: it must lie between -1e30 and 1e30"),
        (["--reward", "leaves:score"], "cannot load the reward function leaves:score: SystemExit(3)"),
        (["--resume", "nowhere"], "there is no checkpoint nowhere"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence, capsys, monkeypatch):
    Path("empty.txt").write_text("\n\n")
    Path("latin.txt").write_bytes(b"a\xe9b")
    Path("long.txt").write_text("good " * 200)
    Path("unrated.txt").write_text("".join(f"the film is good and dull number {i}\n" for i in range(30)))
    Path("wrong.txt").write_text("good\ttext\n")
    Path("one.txt").write_text("1,2\ttext\n")
    Path("leaves.py").write_text("import sys\nsys.exit(3)\n")
    given = [] if "--resume" in flags else words()
    monkeypatch.setattr(sys, "argv", ["ppo_rlhf.py", *given, *flags])
    with pytest.raises(SystemExit) as stop:
        ppo_rlhf.main()
    told = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and told.startswith(f"ppo_rlhf.py: error: {sentence}"), told
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("body", "code", "sentence"),
    [
        ("return [1.0]", 2, "error: the reward own:score returned 1 numbers for"),
        ("return None", 2, "error: the reward own:score returned None: it must return a list of numbers"),
        ("return ['x'] * len(responses)", 2, "error: the reward own:score returned ['x'"),
        ("return [float('nan')] * len(responses)", 1, "stopped: the reward own:score returned nan for the response"),
        ("raise ValueError('no')", 2, "error: the reward own:score raised ValueError('no')"),
        ("import sys; sys.exit()", 2, "error: the reward own:score raised SystemExit()"),
        ("return (1 / 0 for _ in responses)", 2, "error: the reward own:score raised ZeroDivisionError"),
        ("return [10**400] * len(responses)", 2, "error: the reward own:score returned [1000"),
        ("return [10**5000] * len(responses)", 2, "error: the reward own:score returned something of the type list: it"),
        ("return set(range(len(responses)))", 2, "error: the reward own:score returned {0, 1, 2"),
        ("import torch; return torch.zeros(99, 99)", 2, "error: the reward own:score returned tensor([[0., 0., 0., ..., 0."),
    ],
)
def test_bad_reward_function_is_one_sentence(body, code, sentence, capsys, monkeypatch):
    write_function(body)
    monkeypatch.setattr(sys, "argv", ["ppo_rlhf.py", *words(env="own:score")])
    with pytest.raises(SystemExit) as stop:
        ppo_rlhf.main()
    told = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == code and told.startswith(f"ppo_rlhf.py: {sentence}"), told


def test_evaluating_does_not_run_foreign_code(capsys, monkeypatch):
    ppo_rlhf.train(tiny(env="words:score"))
    monkeypatch.setattr(sys, "argv", ["ppo_rlhf.py", "--evaluate", "run"])
    with pytest.raises(SystemExit):
        ppo_rlhf.main()
    assert "if you trust it, add --env words:score" in capsys.readouterr().err


def test_damaged_archive_and_missing_network(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UsageError, match="pip could not fetch vaderSentiment, which holds the ratings"):
        ppo_rlhf.load_sentences(tiny(data=""))
    (tmp_path / "other" / "ppo_rlhf" / ppo_rlhf.SDIST).write_bytes(b"something else")
    with pytest.raises(UsageError, match="is not the file of that name that this script knows: delete it"):
        ppo_rlhf.load_sentences(tiny(data=""))


@pytest.mark.parametrize("there", ["checkpoint.pt", "notes.txt"])
def test_foreign_run_directory_is_refused_before_the_stages(there, monkeypatch):
    Path("run").mkdir()
    Path("run", there).write_text("of somebody else")
    monkeypatch.setattr(ppo_rlhf, "load_models", lambda args: pytest.fail("the stages began"))
    remedy = "--resume run continues it, " if there == "checkpoint.pt" else ""
    with pytest.raises(UsageError, match=f"run exists: {remedy}another --run-dir starts anew"):
        ppo_rlhf.train(tiny())
    assert Path("run", there).read_text() == "of somebody else"


def test_comparisons_follow_the_votes():
    sentences = [ppo_rlhf.Sentence("up", [3.0, 3.0]), ppo_rlhf.Sentence("down", [-3.0]), ppo_rlhf.Sentence("unrated", [])]
    pairs = ppo_rlhf.compare_by_people(sentences, 20, np.random.default_rng(0))
    assert Counter(pairs) == {("up", "down"): 20}
    assert ppo_rlhf.agreement([1, 2, 3], [1, 2, 2]) == 1 and ppo_rlhf.agreement([3, 2, 1], [1, 2, 2]) == 0


def test_scores_must_be_finite():
    with pytest.raises(NonFiniteError):
        ppo_rlhf.call_score("x", lambda prompts, responses: [math.inf], ["a"], ["b"])


def test_distinct_pairs():
    assert ppo_rlhf.distinct_pairs(["a b a b", "a b"]) == 2 / 4
    assert list(itertools.pairwise("ab")) == [("a", "b")]


def test_details_name_functions_and_tests_that_exist():
    details = (Path(__file__).parents[1] / "DETAILS.md").read_text()
    rows = {line.split("`")[1]: line.strip("| ").split(" | ") for line in details.splitlines() if line.startswith("| `rlhf ")}
    script = Path(ppo_rlhf.__file__).read_text()
    tags = set(re.findall(r"\[(rlhf \d\d)\]", script))
    assert set(rows) == tags
    for cells in rows.values():
        for name in re.findall(r"`([\w.]+)`", cells[-2]):
            assert functools.reduce(getattr, name.split("."), ppo_rlhf), name
        for name in re.findall(r"`(\w+)`", cells[-1]):
            assert name in globals(), name
        for flag in re.findall(r"`--([a-z-]+)", cells[2]):
            field = flag.replace("-", "_")
            assert {field, field.removeprefix("no_")} & set(Args.__dataclass_fields__), flag


@pytest.mark.slow  # fetches 2.4 MB through pip
def test_built_in_ratings():
    sentences = ppo_rlhf.load_sentences(tiny(data=""))
    rated = [s for s in sentences if s.votes]
    assert (len(rated), len(sentences)) == (10_605, 10_605 + 3_708)
    assert np.mean([len(s.votes) for s in rated]) == pytest.approx(18.7, abs=0.1)
    assert all(-4 <= vote <= 4 for s in rated for vote in s.votes)
    good, bad = ppo_rlhf.make_vader()(["the film is ", "the film is "], ["a great joy", "a sad mess"])
    assert good > 0.5 and bad < -0.3
