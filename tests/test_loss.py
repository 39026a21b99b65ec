"""ppo_loss, normalize_advantages and masked_mean against closed forms and an independent float64 computation."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo_continuous
from helpers import loss_inputs, tiny_args
from ppo_continuous import Agent, Batch, make_update, masked_mean, normalize_advantages, ppo_loss

EPS = torch.tensor(0.2, dtype=torch.float64)


def policy_loss(ratio, advantage, valid=None, **switches):
    """Loss of the policy alone and its gradient with respect to the log-probabilities, in float64."""
    logprob = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    valid = torch.ones_like(logprob) if valid is None else torch.tensor(valid, dtype=torch.float64)
    advantage = torch.tensor(advantage, dtype=torch.float64)
    new, old = loss_inputs(ppo_continuous, logprob=logprob, advantage=advantage, valid=valid)
    loss, info = ppo_loss(new, old, EPS, 0.5, 0.0, **switches)
    loss.backward()
    assert logprob.grad is not None
    return loss.item(), logprob.grad, info


@pytest.mark.parametrize(
    ("advantage", "ratio", "objective"),
    [(1.5, 1.5, 1.80), (1.5, 1.1, 1.65), (-0.8, 1.5, -1.20), (-1.0, 0.7, -0.8), (2.0, 0.5 / 0.2, 2.4)],
)
def test_worked_examples_of_the_clipped_objective(advantage, ratio, objective):
    assert policy_loss([ratio], [advantage])[0] == pytest.approx(-objective, rel=1e-12)


def test_worked_example_without_clipping():
    assert policy_loss([0.5 / 0.2], [2.0], clip_policy=False)[0] == pytest.approx(-5.0, rel=1e-12)


@pytest.mark.parametrize(
    ("advantage", "ratio", "is_zero"),
    [
        (1.0, 1.21, True),
        (1.0, 3.0, True),
        (-1.0, 0.79, True),
        (-1.0, 0.1, True),
        (-1.0, 1.5, False),
        (1.0, 0.5, False),
        (1.0, 1.1, False),
        (-1.0, 0.9, False),
    ],
)
def test_gradient_of_the_clipped_objective(advantage, ratio, is_zero):
    gradient = policy_loss([ratio], [advantage])[1].item()
    if is_zero:
        assert gradient == 0.0
    else:
        assert gradient == pytest.approx(-ratio * advantage)
    assert policy_loss([ratio], [advantage], clip_policy=False)[1].item() == pytest.approx(-ratio * advantage)


@pytest.mark.parametrize(
    ("value", "old_value", "return_", "clip_vloss", "loss", "gradient"),
    [
        (1.1, 1.0, 2.0, True, 0.5 * 0.81, -0.9),  # within the range: squared error
        (1.5, 1.0, 2.0, True, 0.5 * 0.64, 0.0),  # moved too far towards the return: no gradient
        (0.5, 1.0, 2.0, True, 0.5 * 2.25, -1.5),  # moved away from it: squared error, the larger one
        (2.5, 1.0, 2.0, True, 0.5 * 0.64, 0.0),  # beyond it, yet the clipped error is larger
        (4.0, 1.0, 2.0, True, 0.5 * 4.0, 2.0),
        (1.5, 1.0, 2.0, False, 0.5 * 0.25, -0.5),
    ],
)
def test_value_clipping(value, old_value, return_, clip_vloss, loss, gradient):
    value, old_value, return_ = (torch.tensor([x], dtype=torch.float64) for x in (value, old_value, return_))
    value.requires_grad_()
    new, old = loss_inputs(ppo_continuous, value=value, old_value=old_value, return_=return_)
    total, info = ppo_loss(new, old, EPS, 3.0, 0.0, clip_vloss=clip_vloss)
    total.backward()
    assert info["value_loss"].item() == pytest.approx(loss)
    assert total.item() == pytest.approx(3.0 * loss)
    assert value.grad is not None
    assert value.grad.item() == pytest.approx(3.0 * gradient)


def test_entropy_bonus_lowers_the_loss():
    new, old = loss_inputs(ppo_continuous, entropy=torch.tensor([1.0, 2.0, 3.0, 6.0]))
    loss, info = ppo_loss(new, old, torch.tensor(0.2), 0.5, 0.01)
    assert loss.item() == pytest.approx(-0.03)
    assert info["entropy"].item() == pytest.approx(3.0)


@pytest.mark.parametrize("state_independent_std", [True, False])
def test_log_probability_and_entropy_of_the_agent(state_independent_std):
    """Against the density of a diagonal normal distribution, written out."""
    torch.manual_seed(0)
    agent = Agent(3, 2, state_independent_std=state_independent_std)
    obs, action = torch.randn(5, 3), torch.randn(5, 2)
    said = agent(obs, action)
    out = agent.actor(obs).detach().double().numpy()
    if state_independent_std:
        assert agent.log_std is not None
        with torch.no_grad():
            agent.log_std.copy_(torch.tensor([-0.5, 0.3]))
        said = agent(obs, action)
        mean, log_std = out, np.tile([-0.5, 0.3], (5, 1))
    else:
        mean, log_std = out[:, :2], out[:, 2:]
    z = (action.numpy() - mean) / np.exp(log_std)
    expected = (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(1)
    np.testing.assert_allclose(said.logprob.detach(), expected, rtol=1e-5)
    np.testing.assert_allclose(said.entropy.detach(), (0.5 + 0.5 * math.log(2 * math.pi) + log_std).sum(1), rtol=1e-5)


def reference_loss(x, clip_coef, vf_coef, ent_coef, clip_policy, clip_vloss):
    """Loss and what is logged, step by step in plain Python."""
    sums = dict.fromkeys(("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac"), 0.0)
    count = 0
    for lp, ent, v, old_lp, old_v, adv, ret, valid in zip(*x, strict=True):
        if not valid:
            continue
        count += 1
        ratio = math.exp(lp - old_lp)
        clipped = min(max(ratio, 1 - clip_coef), 1 + clip_coef)
        sums["policy_loss"] -= min(ratio * adv, clipped * adv) if clip_policy else ratio * adv
        clipped_v = old_v + min(max(v - old_v, -clip_coef), clip_coef)
        sums["value_loss"] += 0.5 * (max((v - ret) ** 2, (clipped_v - ret) ** 2) if clip_vloss else (v - ret) ** 2)
        sums["entropy"] += ent
        sums["old_approx_kl"] += old_lp - lp
        sums["approx_kl"] += ratio - 1 - (lp - old_lp)
        sums["clipfrac"] += abs(ratio - 1) > clip_coef
    means = {key: total / max(count, 1) for key, total in sums.items()}
    return means["policy_loss"] + vf_coef * means["value_loss"] - ent_coef * means["entropy"], means


COLUMNS = ("logprob", "entropy", "value", "old_logprob", "old_value", "advantage", "return_", "valid")


def random_columns(rng, size, share_valid=0.7):
    """COLUMNS, each (size,)."""
    old_logprob, old_value = rng.normal(-2, 1, size), rng.normal(0, 1, size)
    return [
        old_logprob + rng.normal(0, 0.4, size),
        rng.normal(1, 1, size),
        old_value + rng.normal(0, 0.4, size),
        old_logprob,
        old_value,
        rng.normal(0, 2, size),
        old_value + rng.normal(0, 1, size),
        (rng.random(size) < share_valid).astype(float),
    ]


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.booleans(), st.booleans())
def test_loss_against_plain_python_and_its_gradient_against_differences(seed, size, clip_policy, clip_vloss):
    batch = random_columns(np.random.default_rng(seed), size)
    options: Any = {"vf_coef": 0.7, "ent_coef": 0.03, "clip_policy": clip_policy, "clip_vloss": clip_vloss}
    tensors: Any = [torch.tensor(x, dtype=torch.float64) for x in batch]
    learned = [tensor.requires_grad_() for tensor in tensors[:3]]
    new, old = loss_inputs(ppo_continuous, **dict(zip(COLUMNS, tensors, strict=True)))
    loss, info = ppo_loss(new, old, EPS, **options)
    expected, expected_info = reference_loss(batch, 0.2, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for key, value in expected_info.items():
        assert info[key].item() == pytest.approx(value, rel=1e-6, abs=1e-9), key
    gradients = torch.autograd.grad(loss, learned)
    h = 1e-6
    for which in range(3):
        for i in range(size):
            up, down = [[list(x) for x in batch] for _ in range(2)]
            up[which][i] += h
            down[which][i] -= h
            slope = (reference_loss(up, 0.2, **options)[0] - reference_loss(down, 0.2, **options)[0]) / (2 * h)
            assert gradients[which][i].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_masked_mean():
    x = torch.tensor([1.0, 2.0, 1e6, 6.0])
    assert masked_mean(x, torch.tensor([1.0, 1.0, 0.0, 1.0])).item() == 3.0
    assert masked_mean(x, torch.zeros(4)).item() == 0.0


@given(st.integers(0, 2**32 - 1), st.integers(2, 30))
def test_advantage_normalization(seed, size):
    rng = np.random.default_rng(seed)
    advantages, valid = rng.normal(3, 5, size), rng.random(size) < 0.7
    valid[:2] = True
    normalized = normalize_advantages(torch.tensor(advantages), torch.tensor(valid, dtype=torch.float64)).numpy()
    chosen = advantages[valid]
    np.testing.assert_allclose(normalized[valid], (chosen - chosen.mean()) / (chosen.std() + 1e-8), rtol=1e-9, atol=1e-9)


def test_advantage_of_a_minibatch_of_one_sample_is_zero_not_nan():
    assert normalize_advantages(torch.tensor([7.0]), torch.ones(1)).item() == 0.0


def test_constant_advantages_are_not_nan():
    assert torch.equal(normalize_advantages(torch.full((8,), 3.0), torch.ones(8)), torch.zeros(8))


def one_update(batch, norm_adv):
    torch.manual_seed(0)
    agent = Agent(3, 2)
    theta = torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone()
    adam = (torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros(()))
    update = make_update(agent, tiny_args(norm_adv=norm_adv))
    hyper = torch.tensor(1e-3, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    batch = Batch(*batch)
    order = torch.randperm(len(batch.obs))
    infos = [update(theta, adam, batch, mb_inds, *hyper) for mb_inds in order.split(8)]
    return theta, adam, infos


@pytest.mark.parametrize("norm_adv", ["minibatch", "none"])
def test_garbage_in_reset_steps_changes_no_bit_of_the_update(norm_adv):
    generator = torch.Generator().manual_seed(1)
    clean = [torch.randn(32, 3, generator=generator), torch.randn(32, 2, generator=generator)]
    clean += [torch.randn(32, generator=generator) - 2 for _ in range(4)]  # log-probability, value, advantage, return
    valid = (torch.rand(32, generator=generator) < 0.7).float()
    assert 0 < valid.sum() < 32
    dirty = [torch.where(valid.view(-1, *[1] * (x.dim() - 1)) > 0, x, 1e3 * torch.randn_like(x)) for x in clean]
    assert all(not torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    theta, adam, infos = one_update([*clean, valid], norm_adv)
    other_theta, other_adam, other_infos = one_update([*dirty, valid], norm_adv)
    assert torch.equal(theta, other_theta)
    assert all(torch.equal(a, b) for a, b in zip(adam, other_adam, strict=True))
    assert infos == other_infos
    all_valid_theta, _, _ = one_update([*dirty, torch.ones(32)], norm_adv)
    assert not torch.equal(theta, all_valid_theta)  # it is the mask that protects


def test_a_minibatch_of_reset_steps_only_changes_no_parameter():
    batch = [torch.randn(8, 3), torch.randn(8, 2), *[torch.randn(8) for _ in range(4)], torch.zeros(8)]
    torch.manual_seed(0)
    before = torch.nn.utils.parameters_to_vector(Agent(3, 2).parameters())
    theta, _, infos = one_update(batch, "minibatch")
    assert torch.equal(theta, before)
    assert all(math.isfinite(x.item()) for info in infos for x in info.values())
