"""The update against PPO in plain numpy, float64, with backward pass and Adam written out; and against torch.optim."""

import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import ppo_continuous
import ppo_kl_penalty
import ppo_shared_params
from helpers import TINY, read_checkpoint, read_metrics, tiny_args
from ppo_continuous import Agent, Batch, make_update, normalize_advantages, ppo_loss, train


class NumpyPPO:
    """Agent, loss, gradient and Adam in float64; parameters by name, as Agent names them."""

    def __init__(self, agent, args):
        self.args = args
        self.shapes = {name: tuple(p.shape) for name, p in agent.named_parameters()}
        self.m = {name: np.zeros(shape) for name, shape in self.shapes.items()}
        self.v = {name: np.zeros(shape) for name, shape in self.shapes.items()}
        self.steps = 0

    def split(self, theta):
        """Flat vector -> parameters by name."""
        parameters, start = {}, 0
        for name, shape in self.shapes.items():
            parameters[name] = theta[start : start + math.prod(shape)].reshape(shape).astype(np.float64)
            start += math.prod(shape)
        return parameters

    def forward(self, p, net, x):
        hidden1 = np.tanh(x @ p[f"{net}.0.weight"].T + p[f"{net}.0.bias"])
        hidden2 = np.tanh(hidden1 @ p[f"{net}.2.weight"].T + p[f"{net}.2.bias"])
        return hidden2 @ p[f"{net}.4.weight"].T + p[f"{net}.4.bias"], (x, hidden1, hidden2)

    def backward(self, p, net, inputs, d_out):
        """Gradients of the parameters of a network, d_out (B, out_dim) being that of its output."""
        x, hidden1, hidden2 = inputs
        d2 = (d_out @ p[f"{net}.4.weight"]) * (1 - hidden2**2)
        d1 = (d2 @ p[f"{net}.2.weight"]) * (1 - hidden1**2)
        gradients = {}
        for layer, d, inputs_of_layer in ((4, d_out, hidden2), (2, d2, hidden1), (0, d1, x)):
            gradients[f"{net}.{layer}.weight"] = d.T @ inputs_of_layer
            gradients[f"{net}.{layer}.bias"] = d.sum(axis=0)
        return gradients

    def gradient(self, p, minibatch, clip):
        """Gradients by name, and what is logged. minibatch: a Batch of arrays."""
        a = self.args
        rows = minibatch.valid > 0
        obs, action, old_logprob, old_value = (
            x[rows] for x in (minibatch.obs, minibatch.action, minibatch.logprob, minibatch.value)
        )
        advantage, return_ = minibatch.advantage[rows], minibatch.return_[rows]
        n, dims = action.shape
        if a.norm_adv == "minibatch":
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        out, actor_inputs = self.forward(p, "actor", obs)
        if a.state_independent_std:
            mean, log_std = out, np.broadcast_to(p["log_std"], (n, dims))
        else:
            mean, log_std = out[:, :dims], out[:, dims:]
        value, critic_inputs = self.forward(p, "critic", obs)
        value = value[:, 0]
        z = (action - mean) / np.exp(log_std)
        logprob = (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(axis=1)
        entropy = (0.5 + 0.5 * math.log(2 * math.pi) + log_std).sum(axis=1)
        ratio = np.exp(logprob - old_logprob)

        flat = a.clip_policy & (((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip)))
        used_ratio = np.where(flat, np.clip(ratio, 1 - clip, 1 + clip), ratio)
        d_logprob = np.where(flat, 0.0, -advantage * ratio) / n
        error = value - return_
        moved = value - old_value
        clipped_error = old_value + np.clip(moved, -clip, clip) - return_
        use_clipped = a.clip_vloss & (clipped_error**2 > error**2)
        d_value = a.vf_coef * np.where(use_clipped, clipped_error * (np.abs(moved) < clip), error) / n
        squared = np.where(use_clipped, clipped_error**2, error**2)

        d_mean = d_logprob[:, None] * z / np.exp(log_std)
        d_log_std = d_logprob[:, None] * (z**2 - 1) - a.ent_coef / n
        if a.state_independent_std:
            gradients = {"log_std": d_log_std.sum(axis=0), **self.backward(p, "actor", actor_inputs, d_mean)}
        else:
            gradients = self.backward(p, "actor", actor_inputs, np.concatenate([d_mean, d_log_std], axis=1))
        gradients |= self.backward(p, "critic", critic_inputs, d_value[:, None])
        info = {
            "policy_loss": -(used_ratio * advantage).mean(),
            "value_loss": 0.5 * squared.mean(),
            "entropy": entropy.mean(),
            "old_approx_kl": (old_logprob - logprob).mean(),
            "approx_kl": (ratio - 1 - (logprob - old_logprob)).mean(),
            "clipfrac": (np.abs(ratio - 1) > clip).mean(),
            "grad_norm": math.sqrt(sum((g**2).sum() for g in gradients.values())),
        }
        return gradients, info

    def update(self, theta, minibatch, learning_rate, clip):
        """Changes theta in place and returns what is logged."""
        p = self.split(theta)
        gradients, info = self.gradient(p, minibatch, clip)
        scale = min(1.0, self.args.max_grad_norm / (info["grad_norm"] + 1e-6))
        self.steps += 1
        new = []
        for name in self.shapes:
            g = gradients[name] * scale
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.999 * self.v[name] + 0.001 * g * g
            m_hat = self.m[name] / (1 - 0.9**self.steps)
            v_hat = self.v[name] / (1 - 0.999**self.steps)
            new.append((p[name] - learning_rate * m_hat / (np.sqrt(v_hat) + self.args.adam_eps)).ravel())
        theta[:] = np.concatenate(new)
        return info


SWITCHES = [
    {},
    {"clip_policy": False, "clip_vloss": False, "norm_adv": "none", "max_grad_norm": math.inf, "ent_coef": 0.02},
    {"state_independent_std": False, "ent_coef": 0.01, "vf_coef": 2.0, "adam_eps": 1e-8},
]


def start(switches, dtype):
    """Agent, its flat parameters, a fresh Adam state, arguments and a random batch of 96 steps."""
    torch.manual_seed(3)
    args = tiny_args(**switches)
    agent = Agent(4, 2, "orthogonal", args.state_independent_std).to(dtype)
    theta = nn.utils.parameters_to_vector(agent.parameters()).detach().clone()
    theta += 0.05 * torch.randn_like(theta)  # also the policy head and the biases
    nn.utils.vector_to_parameters(theta, agent.parameters())
    adam = (torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros(()))
    obs, action = torch.randn(96, 4, dtype=dtype), 1.5 * torch.randn(96, 2, dtype=dtype)
    with torch.no_grad():
        old = agent(obs, action)
    logprob, old_value = old.logprob + 0.3 * torch.randn(96, dtype=dtype), old.value + 0.3 * torch.randn(96, dtype=dtype)
    advantage, return_ = torch.randn(96, dtype=dtype), old.value + torch.randn(96, dtype=dtype)
    valid = (torch.rand(96) < 0.85).to(dtype)
    batch = Batch(obs, action, logprob, old_value, advantage, return_, valid)
    hyper = torch.tensor(2e-3, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    minibatches = [x for _ in range(4) for x in torch.randperm(96).split(24)]
    return agent, theta, adam, args, batch, hyper, minibatches


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-5, 1e-7), (torch.float32, 1e-3, 1e-4)])
def test_sixteen_minibatches_against_numpy(switches, dtype, rtol, atol):
    agent, theta, adam, args, batch, hyper, minibatches = start(switches, dtype)
    update, reference = make_update(agent, args), NumpyPPO(agent, args)
    expected, first = theta.double().numpy().copy(), theta.clone()
    clipped = 0.0
    for mb_inds in minibatches:
        info = update(theta, adam, batch, mb_inds, *hyper)
        arrays = Batch(*(x[mb_inds].double().numpy() for x in batch))
        expected_info = reference.update(expected, arrays, *(x.item() for x in hyper))
        assert info.keys() == expected_info.keys()
        for key, value in expected_info.items():
            assert info[key].item() == pytest.approx(value, rel=rtol, abs=10 * atol), key
        clipped += expected_info["clipfrac"]
    np.testing.assert_allclose(theta.numpy(), expected, rtol=0, atol=atol)
    assert (theta - first).abs().max() > 100 * atol  # the comparison is of a change much larger than its tolerance
    assert clipped > 1
    assert adam[2].item() == 16


@pytest.mark.parametrize("switches", SWITCHES)
def test_sixteen_minibatches_against_torch_optim(switches):
    agent, theta, adam, args, batch, hyper, minibatches = start(switches, torch.float32)
    torch.manual_seed(3)
    other = Agent(4, 2, "orthogonal", args.state_independent_std)
    nn.utils.vector_to_parameters(theta.clone(), other.parameters())
    optimizer = torch.optim.Adam(other.parameters(), lr=hyper[0].item(), eps=args.adam_eps)
    update = make_update(agent, args)
    for mb_inds in minibatches:
        info = update(theta, adam, batch, mb_inds, *hyper)
        old = Batch(*(x[mb_inds] for x in batch))
        if args.norm_adv == "minibatch":
            old = old._replace(advantage=normalize_advantages(old.advantage, old.valid))
        new = other(old.obs, old.action)
        loss, _ = ppo_loss(new, old, hyper[1], args.vf_coef, args.ent_coef, args.clip_policy, args.clip_vloss)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), args.max_grad_norm)
        optimizer.step()
        assert info["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-3)
    torch.testing.assert_close(theta, nn.utils.parameters_to_vector(other.parameters()).detach(), rtol=0, atol=1e-4)


def test_two_iterations_of_a_run_against_numpy(monkeypatch):
    """All updates of a run, from the batches that it built: their advantages and returns are checked as well."""
    calls, gae_calls = [], []
    make_real_update, real_gae = ppo_continuous.make_update, ppo_continuous.compute_gae

    def make_recording_update(agent, args):
        real_update = make_real_update(agent, args)
        agents.append(agent)

        def update(theta, adam, batch, mb_inds, learning_rate, clip_coef):
            starts.append(theta.clone())
            arrays = Batch(*(x.double().numpy() for x in batch))
            calls.append((arrays, mb_inds.numpy(), learning_rate.item(), clip_coef.item()))
            return real_update(theta, adam, batch, mb_inds, learning_rate, clip_coef)

        return update

    def recording_gae(rewards, values, terminated, truncated, gamma, gae_lambda, bootstrap_truncated):
        gae_calls.append([x.double().numpy() for x in (rewards, values, terminated, truncated)])
        return real_gae(rewards, values, terminated, truncated, gamma, gae_lambda, bootstrap_truncated)

    agents: list[Agent] = []
    starts: list[torch.Tensor] = []
    monkeypatch.setattr(ppo_continuous, "make_update", make_recording_update)
    monkeypatch.setattr(ppo_continuous, "compute_gae", recording_gae)
    args = tiny_args(num_steps=64, num_minibatches=4, total_timesteps=256, learning_rate=2e-3, ent_coef=0.01)
    train(args)
    assert len(calls) == 2 * args.update_epochs * args.num_minibatches
    assert len(gae_calls) == 2

    expected = starts[0].double().numpy().copy()
    reference = NumpyPPO(agents[0], args)
    for number, (batch, mb_inds, learning_rate, clip) in enumerate(calls):
        assert learning_rate == pytest.approx(2e-3 * (1 if number < 8 else 0.5))
        assert clip == 0.2
        reference.update(expected, Batch(*(x[mb_inds] for x in batch)), learning_rate, clip)
    np.testing.assert_allclose(read_checkpoint("run")["theta"].numpy(), expected, rtol=0, atol=1e-4)
    assert np.abs(expected - starts[0].numpy()).max() > 5e-3

    for iteration, (rewards, values, terminated, truncated) in enumerate(gae_calls):
        batch = calls[iteration * 8][0]
        ends = np.maximum(terminated, truncated)
        advantage, advantages = np.zeros(args.num_envs), np.zeros_like(rewards)
        for t in range(args.num_steps - 1, -1, -1):
            delta = rewards[t] + args.gamma * values[t + 1] * (1 - terminated[t]) - values[t]
            advantage = delta + args.gamma * args.gae_lambda * (1 - ends[t]) * advantage
            advantages[t] = advantage
        np.testing.assert_allclose(batch.advantage, advantages.ravel(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(batch.return_, (advantages + values[:-1]).ravel(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(batch.value, values[:-1].ravel())
        assert np.array_equal(batch.valid.reshape(rewards.shape)[1:], 1 - ends[:-1])  # reset steps, and no others, are masked
        parameters = reference.split(starts[iteration * 8].double().numpy())
        value, _ = reference.forward(parameters, "critic", batch.obs)
        np.testing.assert_allclose(batch.value, value[:, 0], rtol=1e-4, atol=1e-5)
        for epoch in range(args.update_epochs):
            first = iteration * 8 + epoch * 4
            assert np.array_equal(np.sort(np.concatenate([call[1] for call in calls[first : first + 4]])), np.arange(128))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (ppo_continuous, {}),
        (ppo_kl_penalty, {"kl_coef": 4.0, "kl_target": 1e-9}),
        (ppo_shared_params, {"env": "CartPole-v1"}),
    ],
    ids=["ppo_continuous", "ppo_kl_penalty", "ppo_shared_params"],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_against_eager(script, flags, device):
    """Learning rate, clip range and beta change in every iteration: the compiled update must not keep the first ones."""
    flags = TINY | {"learning_rate": 3e-3, "clip_coef": 0.02, "anneal_clip": True} | flags | {"device": device}
    for run_dir in ("eager", "compiled"):
        script.train(script.Args(**flags | {"run_dir": run_dir, "compile": run_dir == "compiled"}))
    eager, compiled = read_checkpoint("eager"), read_checkpoint("compiled")
    torch.testing.assert_close(eager["theta"], compiled["theta"], rtol=0, atol=1e-4)
    torch.testing.assert_close(eager["adam"], compiled["adam"], rtol=1e-2, atol=1e-4)
    records = read_metrics("eager")[1:]
    for ours, expected in zip(read_metrics("compiled")[1:], records, strict=True):
        assert ours == pytest.approx(expected, rel=1e-2, abs=1e-4)
    for name in ("learning_rate", "clip_coef", "kl_coef"):
        values = [record[f"charts/{name}"] for record in records if f"charts/{name}" in record]
        assert len(set(values)) == len(values)
    assert all(record["losses/clipfrac"] > 0 for record in records)
