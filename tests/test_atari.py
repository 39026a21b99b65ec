"""ppo_atari.py: details 14-22, resets, scores, data parallel training, resume, evaluation, bad input."""

import datetime
import functools
import inspect
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import envpool
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from PIL import Image
from torch import nn

import ppo_atari
from helpers import edited, equal, make_flags, read_checkpoint, read_jsonl, read_metrics
from ppo_atari import (
    Agent,
    Args,
    Batch,
    UsageError,
    average_gradient,
    find_game,
    make_envs,
    make_game_step,
    make_seeds,
    make_update,
    to_blocks,
)
from warm import CONTEXT, Warm

SCRIPT = Path(ppo_atari.__file__)
TINY: dict[str, Any] = {
    "num_envs": 2,
    "num_steps": 8,
    "num_minibatches": 2,
    "update_epochs": 1,
    "total_timesteps": 3 * 16,
    "checkpoint_every": 1,
    "eval_episodes": 0,
    "max_episode_steps": 50,
    "compile": False,
    "device": "cpu",
    "num_threads": 1,
}


def tiny_args(run_dir: Path | str = "run", **changes) -> Args:
    return Args(**(TINY | {"run_dir": str(run_dir)} | changes))


def tiny_flags(run_dir: Path | str = "run", **changes) -> list[str]:
    return make_flags(TINY | {"run_dir": str(run_dir)} | changes)


def plain_envs(game: str, seeds: list[int], **changes):
    """envpool without any of the details, and its first observation and info."""
    off = {"noop_max": 1, "frame_skip": 1, "episodic_life": False, "use_fire_reset": False, "reward_clip": False}
    options = off | {"repeat_action_probability": 0.0} | changes
    envs = envpool.make(game, env_type="gymnasium", num_envs=len(seeds), seed=seeds, num_threads=1, **options)
    return envs, *envs.reset()


def detail_envs(game: str, seeds: list[int], **changes):
    """Environments of ppo_atari.py with all details off but those named."""
    off = {"noop_max": 1, "frame_skip": 1, "episodic_life": False, "fire_reset": False, "clip_reward": False}
    args = tiny_args(env=game, max_episode_steps=1000, **(off | changes))
    return make_envs(args, seeds)


def repeat(n: int, action: int) -> np.ndarray:
    return np.full(n, action)


# details of the environment


def test_detail_14_games_start_with_1_to_noop_max_frames_without_action():
    """The next states of the game, RAM and all, are those after so many no-op frames."""
    seeds = list(range(1, 17))
    one, _, info = plain_envs("SpaceInvaders-v5", [7])
    rams = [info["ram"][0].copy()]  # one no-op
    for _ in range(32):
        rams.append(one.step(repeat(1, 0))[4]["ram"][0].copy())

    def noops(noop_max):
        envs, _ = detail_envs("SpaceInvaders", seeds, noop_max=noop_max)
        after = envs.step(repeat(16, 0))[4]["ram"]
        return [next(k for k, ram in enumerate(rams) if (ram == x).all()) for x in after]

    found = noops(30)
    assert min(found) >= 1
    assert max(found) <= 30
    assert max(found) > 20
    assert len(set(found)) > 8  # a number of its own for each environment
    assert set(noops(1)) == {1}


def test_detail_15_an_action_lasts_frame_skip_frames_and_the_last_two_are_seen():
    """Asteroids draws some things on every other frame only."""
    four, _ = detail_envs("Asteroids", [3], frame_skip=4)
    one, _ = detail_envs("Asteroids", [3], frame_skip=1)
    flicker = 0
    for t in range(30):
        seen, _, _, _, info = four.step(repeat(1, t % 4))
        frames = []
        for _ in range(4):
            obs, _, _, _, one_info = one.step(repeat(1, t % 4))
            frames.append(obs[0, -1].astype(int))
        assert (info["ram"] == one_info["ram"]).all()
        np.testing.assert_allclose(seen[0, -1], np.maximum(frames[2], frames[3]), atol=40)  # resized before the maximum
        assert abs(seen[0, -1] - np.maximum(frames[2], frames[3])).mean() < 0.05
        flicker += (frames[2] != frames[3]).any() and abs(seen[0, -1] - frames[3]).mean() > 0.05
    assert flicker > 10


@pytest.mark.parametrize("on", [True, False])
def test_detail_16_a_lost_life_terminates_but_the_game_goes_on(on):
    envs, _ = detail_envs("Breakout", [3], fire_reset=True, frame_skip=4, episodic_life=on)
    lives, ends = 5, []
    for _ in range(400):
        _, _, terminated, truncated, info = envs.step(repeat(1, 0))
        assert not truncated[0]
        if terminated[0]:
            ends.append((int(info["lives"][0]), int(info["terminated"][0])))
        elif info["lives"][0] < lives:
            assert not on  # without the detail a lost life is a step as any other
            break
        lives = info["lives"][0]
    if on:
        assert ends[:5] == [(4, 0), (3, 0), (2, 0), (1, 0), (0, 1)]
        assert lives == ends[-1][0]  # the next game has begun with five again, of which it has lost these
    else:
        assert ends == []


@pytest.mark.parametrize("on", [True, False])
def test_detail_17_fire_starts_each_life(on):
    envs, _ = detail_envs("Breakout", [3], frame_skip=4, fire_reset=on, episodic_life=True)
    lost = sum(int(envs.step(repeat(1, 0))[2][0]) for _ in range(120))
    assert lost >= 3 if on else lost == 0  # Breakout serves no ball before FIRE


def frames_until(envs, ram, action=0) -> int:
    """Frames with this action until the game is in this state."""
    for count in range(40):
        if (envs.step(repeat(1, action))[4]["ram"][0] == ram).all():
            return count + 1
    raise AssertionError("another state")


def test_what_envpool_does_after_a_lost_life():
    """DETAILS.md lists it: 1 to noop_max frames pass, FIRE is pressed for one frame, the frame stack is not cleared."""
    passed = []
    for seed in (1, 2, 3):
        envs, _ = detail_envs("SpaceInvaders", [seed], noop_max=30, episodic_life=True)
        whole, _ = detail_envs("SpaceInvaders", [seed], noop_max=30)  # the same game, where a lost life is no end
        terminated = [False]
        while not terminated[0]:
            obs, _, terminated, _, info = envs.step(repeat(1, 0))
            obs = obs.copy()
            assert (whole.step(repeat(1, 0))[4]["ram"] == info["ram"]).all()
        assert info["lives"][0] == 2
        after, _, _, _, info = envs.step(repeat(1, 3))  # the step that resets ignores its action
        assert (after[:, :3] == obs[:, 1:]).all()
        assert (obs[:, 0] != obs[:, 3]).any()
        passed.append(frames_until(whole, info["ram"][0]))
    assert len(set(passed)) == 3
    assert max(passed) <= 30

    envs, _ = detail_envs("Breakout", [1], fire_reset=True, episodic_life=True)
    whole, _ = detail_envs("Breakout", [1], fire_reset=True)
    while not envs.step(repeat(1, 0))[2][0]:
        whole.step(repeat(1, 0))
    whole.step(repeat(1, 0))
    served = envs.step(repeat(1, 0))[4]["ram"][0]
    assert frames_until(whole, served, action=1) == 1  # one frame with FIRE
    assert (whole.step(repeat(1, 0))[4]["ram"] == envs.step(repeat(1, 0))[4]["ram"]).all()


def test_detail_18_frames_are_gray_and_84_by_84():
    envs, obs = detail_envs("Breakout", [1, 2])
    assert obs.shape == (2, 4, 84, 84)
    assert obs.dtype == np.uint8
    spec = envs.spec.config
    assert spec.gray_scale
    assert spec.use_inter_area_resize
    small, _, _ = plain_envs("Breakout-v5", [1], use_inter_area_resize=False)
    assert (small.step(repeat(1, 0))[0] != envs.step(repeat(2, 0))[0][:1]).any()


@pytest.mark.parametrize("on", [True, False])
def test_detail_19_the_learner_gets_the_sign_of_the_reward(on):
    envs, _ = detail_envs("SpaceInvaders", [3], frame_skip=4, clip_reward=on)
    step, pairs = make_game_step(envs), set()
    for t in range(120):
        _, reward, _, _, raw, _ = step(repeat(1, 1 + t % 3))
        pairs.add((float(reward[0]), float(raw[0])))
    raws = {raw for _, raw in pairs}
    assert raws > {0.0, 5.0}
    assert pairs == {(np.sign(raw) if on else raw, raw) for raw in raws}


@pytest.mark.parametrize("stack_num", [4, 2, 1])
def test_detail_20_the_last_frames_are_stacked(stack_num):
    envs, obs = detail_envs("SpaceInvaders", [3], frame_skip=4, stack_num=stack_num)
    assert obs.shape == (1, stack_num, 84, 84)
    assert (obs == obs[:, -1:]).all()  # envpool repeats the first frame
    changes = 0
    for t in range(50):  # the game stands still at first
        next_obs = envs.step(repeat(1, 2 + t % 2))[0]
        assert (next_obs[:, :-1] == obs[:, 1:]).all()
        changes += (next_obs[:, -1] != obs[:, -1]).any()
        obs = next_obs.copy()
    assert changes > 10


def test_sticky_actions_full_action_space_and_time_limit():
    envs, _ = detail_envs("Breakout", [1], full_action_space=True)
    assert envs.single_action_space.n == 18

    def ram(probability):
        envs, _ = detail_envs("SpaceInvaders", [1, 2], frame_skip=4, repeat_action_probability=probability)
        for t in range(60):  # the game stands still at first
            info = envs.step(repeat(2, 1 + t % 3))[4]
        return info["ram"]

    always, never, sometimes = ram(1.0), ram(0.0), ram(0.25)
    assert (never[0] == never[1]).all()
    assert (sometimes[0] != sometimes[1]).any()  # each environment draws its own
    assert (always != never).any()

    step = make_game_step(make_envs(tiny_args(max_episode_steps=10, frame_skip=1), [1])[0])
    ends = [tuple(bool(x[0]) for x in step(repeat(1, 0))[2:4]) + (i,) for i in range(22)]
    assert [i for _, truncated, i in ends if truncated] == [9, 20]  # a reset step lies between
    assert not any(terminated for terminated, _, _ in ends)


# details of the network


def random_frames(count: int, stack_num: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(count, stack_num, 84, 84), dtype=np.uint8)


def nature_cnn(agent: Agent, pixels: torch.Tensor) -> torch.Tensor:
    """Output (B, 512) of the network as Mnih et al. (2015) describe it, on frames (B, C, 84, 84), with the agent's weights."""
    first, second, third = (m for m in agent.convolutions if isinstance(m, nn.Conv2d))
    blocks = first.weight.unflatten(1, (-1, 4, 4))  # (32, C, row in block, column in block, block row, block column)
    x = torch.conv2d(pixels, blocks.permute(0, 1, 4, 2, 5, 3).reshape(32, -1, 8, 8), first.bias, stride=4).relu()
    x = torch.conv2d(x, second.weight, second.bias, stride=2).relu()
    x = torch.conv2d(x, third.weight, third.bias).relu()
    return agent.linear(x.permute(0, 2, 3, 1).flatten(1)).relu()


@pytest.mark.parametrize("stack_num", [4, 1])
def test_blocks_of_4_by_4_pixels(stack_num):
    frames = random_frames(3, stack_num)
    blocks = to_blocks(frames)
    assert blocks.shape == (3, 21, 21, 16 * stack_num)
    assert blocks.dtype == torch.uint8
    assert blocks.is_contiguous()
    for n, c, y, x in [(0, 0, 0, 0), (2, stack_num - 1, 83, 83), (1, stack_num // 2, 41, 7), (1, 0, 6, 50)]:
        assert blocks[n, y // 4, x // 4, 16 * c + y % 4 * 4 + x % 4] == frames[n, c, y, x]
    assert blocks.sum() == frames.sum()


def test_detail_21_nature_cnn():
    agent = Agent(4, 6)
    convolutions = [m for m in agent.convolutions if isinstance(m, nn.Conv2d)]
    shapes = [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions]
    assert shapes == [(64, 32, 2, 1), (32, 64, 4, 2), (64, 64, 3, 1)]  # the first on blocks: 8 x 8 pixels of 4 frames, stride 4
    trunk = (*convolutions, agent.linear)
    assert sum(p.numel() for m in trunk for p in m.parameters()) == 1_684_128
    for layer, gain in [*((m, math.sqrt(2)) for m in trunk), (agent.actor, 0.01), (agent.critic, 1)]:
        weight = layer.weight.detach().flatten(1)
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), atol=1e-4, rtol=1e-4)
        assert (layer.bias == 0).all()
    output = agent(to_blocks(random_frames(3)), torch.tensor([0, 1, 2]))
    assert {x.shape for x in output} == {(3,)}
    torch.testing.assert_close(output.entropy, torch.full((3,), math.log(6)), atol=1e-3, rtol=0)


def test_detail_22_pixels_are_divided_by_255_in_the_network():
    torch.manual_seed(0)
    agent, unscaled = Agent(4, 6, weight_init="torch"), Agent(4, 6, scale=1.0)
    unscaled.load_state_dict(agent.state_dict())
    frames = random_frames(3)
    pixels = torch.from_numpy(frames).float()
    with torch.no_grad():
        torch.testing.assert_close(agent.hidden(to_blocks(frames)), nature_cnn(agent, pixels / 255), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unscaled.hidden(to_blocks(frames)), nature_cnn(unscaled, pixels), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scheme", ["normc", "torch"])
def test_detail_02_other_initial_weights(scheme):
    """In every layer: rows of norm 1 (0.01 of the policy) without bias, or the uniform ones of torch with one."""
    agent = Agent(4, 6, weight_init=scheme)
    layers = [m for m in agent.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 6
    for layer in layers:
        weight, gain = layer.weight.detach().flatten(1), 0.01 if layer is agent.actor else 1.0
        if scheme == "normc":
            torch.testing.assert_close(weight.norm(dim=1), torch.full((len(weight),), gain))
            assert not layer.bias.any()
        else:
            bound = 1 / math.sqrt(weight.shape[1])
            assert 0.8 * bound < weight.abs().max() <= bound
            assert layer.bias.any()


def test_act_samples_the_policy_and_agrees_with_forward():
    torch.manual_seed(0)
    agent = Agent(4, 3)
    agent.actor.weight.data *= 100
    obs = to_blocks(random_frames(4))
    with torch.no_grad():
        step = agent.act(obs, torch.empty(4, 3).exponential_())
        learned = agent(obs, step.action)
        torch.testing.assert_close((step.logprob, step.value), (learned.logprob, learned.value))
        hidden = agent.hidden(obs[:1])
        probabilities = agent.actor(hidden).softmax(1)[0]
        assert probabilities.max() < 0.9
        agent.hidden = lambda obs: hidden.expand(len(obs), -1)  # type: ignore[method-assign]
        many = agent.act(torch.zeros(50_000, 1), torch.empty(50_000, 3).exponential_()).action
        torch.testing.assert_close(many.bincount(minlength=3) / 50_000, probabilities, atol=0.01, rtol=0)
        assert agent.act(torch.zeros(1, 1), torch.ones(1, 3)).action == probabilities.argmax()


@pytest.mark.parametrize(
    ("where", "change", "stops"),
    [
        ("logits=self.policy(hidden), validate_args", "logits=1.1 * self.policy(hidden), validate_args", True),
        ("entropy(), self.value(hidden))", "entropy(), self.value(hidden) + 1)", True),
        (
            "        hidden = self.hidden(obs)\n        logprobs",
            "        hidden = self.hidden(obs).tanh()\n        logprobs",
            True,
        ),
        ("return self.linear(features).relu().float()", "return self.linear(features).tanh().float()", False),
        ("layer_init(nn.Linear(64 * 7 * 7, 512)", "layer_init(nn.Linear(64 * 7 * 7, 256)", None),  # and the heads
    ],
)
def test_an_edit_trains_the_policy_that_acts_or_stops_before_the_run(where, change, stops):
    heads = [("nn.Linear(512,", "nn.Linear(256,")] if stops is None else []
    script: Any = edited([(where, change), *heads], SCRIPT)
    args = script.Args(**TINY | {"run_dir": "run", "total_timesteps": 16, "num_minibatches": 1})
    if stops:
        with pytest.raises(script.UsageError, match=r"change Agent\.hidden, Agent\.policy or Agent\.value"):
            script.train(args)
        assert not Path("run").exists()
    else:
        script.train(args)
        first = read_metrics("run")[1]
        assert abs(first["losses/old_approx_kl"]) < 1e-6  # the ratio is 1 in the first minibatch
        assert first["losses/clipfrac"] == 0


def test_bfloat16_is_near_float32():
    torch.manual_seed(0)
    agent, half = Agent(4, 6, weight_init="torch"), Agent(4, 6, precision="bfloat16")
    half.load(agent.flat())
    assert [p.dtype for p in half.parameters()] == [torch.bfloat16] * 8 + [torch.float32] * 4  # the trunk, and two heads
    obs, action = to_blocks(random_frames(2)), torch.tensor([1, 2])
    a, b = agent(obs, action), half(obs, action)
    assert b.value.dtype == torch.float32
    assert not torch.equal(a.value, b.value)
    torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


def test_bfloat16_trains_float32_parameters():
    """A step too small for bfloat16 is not lost: parameters and Adam's moments are float32, and the gradient is near theirs."""
    ppo_atari.train(tiny_args("whole"))
    ppo_atari.train(tiny_args("half", precision="bfloat16"))
    whole, half = read_checkpoint("whole"), read_checkpoint("half")
    assert {x.dtype for x in (half["theta"], *half["adam"])} == {torch.float32}
    assert not torch.equal(half["theta"], half["theta"].bfloat16().float())
    assert not torch.equal(half["theta"], whole["theta"])
    batch = fixed_batch(10)
    gradients = [gradient_of(tiny_args(precision=precision), batch) for precision in ("float32", "bfloat16")]
    assert gradients[1].dtype == torch.float32
    assert not torch.equal(*gradients)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


# resets and scores


def test_step_equals_that_of_envpool():
    args = tiny_args(max_episode_steps=60)
    fast, public = make_envs(args, [5, 6])[0], make_envs(args, [5, 6])[0]
    step, rng, ended = make_game_step(fast), np.random.default_rng(0), 0
    for _ in range(130):
        action = rng.integers(4, size=2)
        a, (obs, reward, terminated, truncated, info) = step(action), public.step(action)
        over = (info["terminated"] == 1) | truncated
        for x, y in zip(a, (obs, reward, terminated, truncated, info["reward"], over), strict=True):
            np.testing.assert_array_equal(x, y)
        ended += over.sum()
    assert ended >= 2


def record_run(monkeypatch, **changes) -> SimpleNamespace:
    """Trains; returns the actions of all steps, the batch that each minibatch was taken from, and of each iteration the
    KLs of its minibatches and (theta, tensors, numbers, result) of compute_gae."""
    record = SimpleNamespace(actions=[], batches=[], kls=[], gaes=[], agent=None)
    make_step, make, gae = ppo_atari.make_game_step, ppo_atari.make_update, ppo_atari.compute_gae

    def recorded_step(envs):
        step = make_step(envs)
        return lambda action: (record.actions.append(action.copy()), step(action))[1]

    def recorded_update(agent, args):
        compute_gradient, adam_step = make(agent, args)
        record.agent = agent

        def recorded(theta, batch, mb_inds, clip_coef):
            record.batches.append(Batch(*(x.clone() for x in batch)))
            gradient, info = compute_gradient(theta, batch, mb_inds, clip_coef)
            record.kls[-1].append(float(info["approx_kl"]))
            return gradient, info

        return recorded, adam_step

    def recorded_gae(*args):
        theta = nn.utils.parameters_to_vector(record.agent.parameters()).detach()
        advantages = gae(*args)
        record.gaes.append((theta, [x.clone() for x in args[:4]], args[4:], advantages.clone()))
        record.kls.append([])
        return advantages

    monkeypatch.setattr(ppo_atari, "make_game_step", recorded_step)
    monkeypatch.setattr(ppo_atari, "make_update", recorded_update)
    monkeypatch.setattr(ppo_atari, "compute_gae", recorded_gae)
    ppo_atari.train(tiny_args(**changes))
    return record


@pytest.mark.parametrize("mask_resets", [True, False])
def test_ours_mask_resets_and_scores_against_playing_by_hand(monkeypatch, mask_resets):
    """Two rollouts of Space Invaders, played again through envpool's public interface with the same actions."""
    T, N, limit, skip = 96, 2, 60, 20  # games end sooner with so many frames per action
    settings: dict[str, Any] = {"num_steps": T, "num_minibatches": 1, "total_timesteps": 2 * T * N, "seed": 3}
    settings |= {"max_episode_steps": limit, "checkpoint_every": 100, "mask_resets": mask_resets, "env": "SpaceInvaders"}
    settings |= {"gamma": 0.98, "gae_lambda": 0.9, "bootstrap_truncated": not mask_resets}  # none the default in both cases
    record = record_run(monkeypatch, **settings, frame_skip=skip)
    options = {"noop_max": 30, "frame_skip": skip, "episodic_life": True, "use_fire_reset": True, "reward_clip": True}
    envs, obs, _ = plain_envs("SpaceInvaders-v5", make_seeds(3, 1, N), max_episode_steps=limit, **options)
    score, length, resetting = np.zeros(N), np.zeros(N, dtype=int), np.zeros(N, dtype=bool)
    games, kinds, raw_rewards, seen, steps = [], set(), set(), [obs.copy()], []
    for t, action in enumerate(record.actions):
        batch, row = record.batches[t // T], slice(t % T * N, (t % T + 1) * N)
        np.testing.assert_array_equal(batch.obs[row], to_blocks(obs))
        np.testing.assert_array_equal(batch.action[row], action)
        np.testing.assert_array_equal(batch.valid[row], ~(resetting & mask_resets))
        obs, reward, terminated, truncated, info = envs.step(action)
        assert not info["reward"][resetting].any()
        np.testing.assert_array_equal(reward, np.sign(info["reward"]))
        score += info["reward"]
        raw_rewards |= set(info["reward"])
        length += ~resetting if mask_resets else 1
        resetting = terminated | truncated
        for i in range(N):
            if resetting[i]:
                kinds.add("truncated" if truncated[i] else "game over" if info["terminated"][i] else "life")
            if truncated[i] or info["terminated"][i]:
                if mask_resets and not truncated[i]:
                    assert length[i] == info["elapsed_step"][i]
                games.append({"global_step": (t + 1) * N, "return": score[i], "length": length[i]})
                score[i], length[i] = 0, 0
        seen.append(obs.copy())
        steps.append((reward.copy(), terminated.copy(), truncated.copy()))
    assert kinds == {"life", "game over", "truncated"}
    assert read_jsonl("run/episodes.jsonl") == games
    assert max(raw_rewards) > 1

    rewards, terminated, truncated = (np.array(x) for x in zip(*steps, strict=True))
    agent = Agent(4, 6)
    for i, (theta, (gae_rewards, gae_values, *ends), numbers, advantages) in enumerate(record.gaes):
        rows = slice(i * T, (i + 1) * T)
        for got, by_hand in zip((gae_rewards, *ends), (rewards, terminated, truncated), strict=True):
            np.testing.assert_array_equal(got, by_hand[rows])
        assert numbers == (0.98, 0.9, not mask_resets)
        agent.load(theta)
        with torch.no_grad():
            hidden = agent.hidden(to_blocks(np.concatenate(seen[i * T : (i + 1) * T + 1])))
            values = agent.value(hidden)
        torch.testing.assert_close(gae_values, values.view(T + 1, N), atol=1e-5, rtol=1e-4)
        batch = record.batches[i]
        assert torch.equal(batch.value, gae_values[:-1].flatten())
        assert torch.equal(batch.advantage, advantages.flatten())
        assert torch.equal(batch.return_, batch.advantage + batch.value)


@pytest.mark.parametrize(("checkpoint_every", "teaches"), [(100, 0), (1, 1)])
def test_a_game_that_ends_with_a_rollout_is_reset_in_the_first_step_of_the_next(monkeypatch, checkpoint_every, teaches):
    """That step teaches nothing; after a checkpoint, where new games have begun, it does."""
    settings: dict[str, Any] = {"max_episode_steps": 8, "total_timesteps": 2 * 16, "num_minibatches": 1}
    settings["checkpoint_every"] = checkpoint_every
    first, second = (batch.valid.view(8, 2).tolist() for batch in record_run(monkeypatch, **settings).batches)
    assert first == [[1, 1]] * 8  # the games end at the last of these 8 steps
    assert second == [[teaches, teaches], *[[1, 1]] * 7]


def fixed_batch(n: int) -> Batch:
    """A batch of n steps, a fifth of them resets."""
    generator = torch.Generator().manual_seed(0)
    obs = torch.randint(0, 256, (n, 21, 21, 64), dtype=torch.uint8, generator=generator)
    logprob, value, advantage, return_ = torch.randn(4, n, generator=generator)
    valid = (torch.arange(n) % 5 != 2).float()
    return Batch(obs, torch.arange(n) % 4, logprob * 0.1 - 1.4, value, advantage, return_, valid)


def gradient_of(args: Args, batch: Batch) -> torch.Tensor:
    torch.manual_seed(1)
    agent = Agent(4, 4, precision=args.precision)
    compute_gradient, _ = make_update(agent, args)
    return compute_gradient(agent.flat(), batch, torch.arange(len(batch.obs)), torch.tensor(0.1))[0]


def test_reset_steps_do_not_enter_the_gradient():
    args, batch = tiny_args(), fixed_batch(10)
    before = gradient_of(args, batch)
    resets = batch.valid == 0
    for x in (batch.logprob, batch.value, batch.advantage, batch.return_):
        x[resets] += 3.0
    batch.obs[resets] = 17
    torch.testing.assert_close(gradient_of(args, batch), before)
    batch.advantage[~resets] *= -1.0
    assert (gradient_of(args, batch) - before).norm() > 0.1 * before.norm()


# data parallel


PARALLEL: dict[str, Any] = {"seed": 12, "norm_adv": "none", "max_episode_steps": 2}
TARGET_KL = 4.9e-4


def uneven_batch() -> Batch:
    """A batch of 8 steps, of which 3 of the first half and 1 of the second are valid."""
    batch = fixed_batch(8)
    batch.valid[4:6] = 0
    return batch


def run_rank(rank: int, port: int, directory: str):
    """Body of rank 0 or 1: the gradient on its half of a fixed batch, then a training run."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(directory)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    half = Batch(*(x[4 * rank : 4 * rank + 4] for x in uneven_batch()))
    gradient = average_gradient(gradient_of(tiny_args(total_timesteps=32, norm_adv="none"), half), half.valid)
    # a checkpoint after every iteration, by the clock of rank 0, which decides for both
    clock: dict[str, Any] = {"checkpoint_every": 100, "checkpoint_minutes": 1e-9, "eval_episodes": 1}
    changes: dict[str, Any] = {"total_timesteps": 2 * 32, "update_epochs": 4, "target_kl": TARGET_KL}
    record = record_run(pytest.MonkeyPatch(), **changes, **clock, **PARALLEL)
    theta = nn.utils.parameters_to_vector(record.agent.parameters()).detach()
    saved = {"gradient": gradient, "theta": theta, "batch": list(record.batches[0]), "kls": record.kls}
    torch.save(saved, f"rank{rank}.pt")


def test_aux_data_parallel_two_ranks_are_one_process_with_all_their_environments(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [CONTEXT.Process(target=run_rank, args=(rank, port, os.getcwd())) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        assert process.exitcode == 0
    a, b = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(a["theta"], b["theta"])
    checkpoint = read_checkpoint("run")
    assert torch.equal(a["theta"], checkpoint["theta"])
    assert checkpoint["global_step"] == 2 * 32
    assert [r["global_step"] for r in read_metrics("run")[1:]] == [32, 64]

    assert torch.equal(a["gradient"], b["gradient"])
    batch = uneven_batch()
    assert [int(half.sum()) for half in batch.valid.split(4)] == [3, 1]
    whole = gradient_of(tiny_args(norm_adv="none"), batch)
    torch.testing.assert_close(a["gradient"], whole, atol=1e-6, rtol=1e-4)
    assert whole.norm() > 0.01

    one = record_run(monkeypatch, run_dir="one", num_envs=4, total_timesteps=32, **PARALLEL)
    for mine, others, together in list(zip(a["batch"], b["batch"], one.batches[0], strict=True))[:2]:  # frames, actions
        assert not torch.equal(mine, others)
        both = torch.cat([x.unflatten(0, (8, 2)) for x in (mine, others)], 1)
        assert torch.equal(both, together.unflatten(0, (8, 4)))

    games = [(game["global_step"], game["length"]) for game in read_jsonl("run/episodes.jsonl")]
    assert games == [(step * 4, 2) for step in (2, 5, 8, 10, 13, 16) for _ in range(4)]

    assert read_metrics("run")[1]["charts/epochs"] == 3
    kls = torch.tensor([rank["kls"][0] for rank in (a, b)])  # of each minibatch
    assert read_metrics("run")[1]["losses/approx_kl"] == pytest.approx(kls.mean().item(), rel=1e-4)  # of both ranks
    assert abs(kls[0].mean() - kls[1].mean()) > 0.01 * kls.mean()
    _, goes_on, stops = kls.view(2, 3, 2).mean(2).T
    assert goes_on.mean() < TARGET_KL < goes_on.sum()
    assert max(stops.min(), stops.max() / 2) < TARGET_KL < stops.mean()  # the rank with the smaller KL would go on

    assert len(json.loads(Path("run/evaluation.json").read_text())["returns"]) == 1

    with pytest.raises(UsageError, match=r"the run has 2 rank\(s\), not 1"):
        ppo_atari.train(tiny_args("run", resume="run", total_timesteps=64))


def test_games_of_ranks_that_end_together_stay_in_the_order_of_the_environments(monkeypatch):
    """Sorted by return, the last 100 of many games that end at one step would be the best ones."""
    args = SimpleNamespace(world_size=2, batch_size=8)
    runner: Any = SimpleNamespace(args=args, rewards=np.zeros((2, 2)), global_step=0, recent_returns=[])
    runner.raw_rewards, runner.game_over = np.array([[5.0, 1.0], [4.0, 0.0]]), np.array([[True, True], [True, False]])
    runner.episode_return, runner.episode_length, runner.valid = np.zeros(2), np.zeros(2, int), np.ones((3, 2), bool)

    def gather(gathered, ended):
        gathered[:] = [ended, [(step, value - 2, length) for step, value, length in ended]]

    monkeypatch.setattr(ppo_atari.dist, "all_gather_object", gather)
    games = ppo_atari.Runner.end_episodes(runner)
    assert [(step, value) for step, value, _ in games] == [(4, 5.0), (4, 1.0), (4, 3.0), (4, -1.0), (8, 4.0), (8, 2.0)]
    assert runner.recent_returns == [5.0, 1.0, 3.0, -1.0, 4.0, 2.0]


def test_ranks_are_resumed_by_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    told = ppo_atari.RunOfRanks(tiny_args("a b", total_timesteps=32)).how_to_go_on(0)
    assert "go on from step 0 with: torchrun --nproc-per-node 2 " in told
    assert told.endswith("--resume 'a b'")


# whole runs


@pytest.fixture
def command_line(run_here):
    """Words of `ppo_atari.py words...` -> exit code, stdout, stderr."""
    return functools.partial(run_here, "ppo_atari")


def test_same_seed_same_numbers_and_a_killed_run_resumes_to_the_last_bit():
    settings = {"total_timesteps": 6 * 16, "checkpoint_every": 2, "env": "Skiing", "max_episode_steps": 2}  # games end
    ppo_atari.train(tiny_args("a", **settings))
    ppo_atari.train(tiny_args("other_seed", seed=2, **settings))
    start = functools.partial(Warm, "ppo_atari", folder=Path("."), stdout="child.txt", stderr="child.txt")
    child = start(tiny_flags("b", **settings))
    metrics = Path("b/metrics.jsonl")
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 4:  # after iteration 3, whose work is lost
        assert child.alive()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.kill()
    assert 2 <= read_checkpoint("b")["iteration"] < 6
    assert start(["--resume", "b"]).wait() == 0, Path("child.txt").read_text()
    a, b, other = (read_checkpoint(run_dir) for run_dir in ("a", "b", "other_seed"))
    for key in a.keys() - {"args", "log_sizes"}:
        assert equal(a[key], b[key]), key
    assert not torch.equal(a["theta"], other["theta"])
    assert len(set(a["recent_returns"])) > 1
    assert Path("a/episodes.jsonl").read_bytes() == Path("b/episodes.jsonl").read_bytes()
    assert read_metrics("a")[1:] == read_metrics("b")[1:] != read_metrics("other_seed")[1:]


def test_the_return_of_a_run_is_the_mean_of_its_last_100_games():
    settings: dict[str, Any] = {"num_envs": 8, "num_steps": 24, "total_timesteps": 2 * 8 * 24, "checkpoint_every": 100}
    result = ppo_atari.train(tiny_args(env="Skiing", max_episode_steps=2, **settings))
    returns = [game["return"] for game in read_jsonl("run/episodes.jsonl")]
    assert len(returns) == 128
    assert result["episodes"] == 100
    assert result["episodic_return"] == np.mean(returns[-100:])
    assert result["episodic_return"] not in (np.mean(returns), np.mean(returns[:100]), np.mean(returns[-99:]))


def test_renamed_copy_alone_evaluates_whole_games_and_draws_them():
    shutil.copy(SCRIPT, "my_experiment.py")
    words = tiny_flags("run", env="PongNoFrameskip-v4", total_timesteps=16, eval_episodes=2, capture_video=True)
    command = [sys.executable, "my_experiment.py", *words]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "evaluation, sampled actions: return" in done.stdout
    assert "over 2 episodes" in done.stdout
    assert sorted(path.name for path in Path("run").iterdir()) == [
        "checkpoint.pt",
        "episodes.jsonl",
        "evaluation.gif",
        "evaluation.json",
        "metrics.jsonl",
        "my_experiment.py",
    ]
    with Image.open("run/evaluation.gif") as gif:
        assert gif.size == (160, 210)
        assert gif.n_frames > 5
        assert np.asarray(gif.convert("L")).std() > 1  # shows something
    assert read_jsonl("run/metrics.jsonl")[0]["script"] == "my_experiment.py"


def test_evaluation_plays_whole_games_and_repeats_itself():
    settings: dict[str, Any] = {"max_episode_steps": 400, "eval_episodes": 2}
    ppo_atari.train(tiny_args(total_timesteps=16))
    checkpoint = read_checkpoint("run")
    args = tiny_args(**settings)
    torch.set_num_threads(2)
    first = ppo_atari.evaluate(args, checkpoint)
    assert torch.get_num_threads() == args.num_threads == 1
    assert first == ppo_atari.evaluate(args, checkpoint)
    assert min(first["lengths"]) > 100  # five lives of about 25 steps
    whole = tiny_args(**settings, eval_deterministic=True)
    assert ppo_atari.evaluate(whole, checkpoint) != first


def test_evaluation_makes_at_most_num_envs_games_at_a_time_and_cuts_them_off(monkeypatch, capsys):
    ppo_atari.train(tiny_args(total_timesteps=16))
    make, made = ppo_atari.make_envs, []

    def recorded(args, seeds, render=False):
        made.append(seeds)
        return make(args, seeds, render)

    monkeypatch.setattr(ppo_atari, "make_envs", recorded)
    result = ppo_atari.evaluate(tiny_args(eval_episodes=5, eval_steps=7, max_episode_steps=2**31 - 1), read_checkpoint("run"))
    assert [len(seeds) for seeds in made] == [2, 2, 1]
    assert len({seed for seeds in made for seed in seeds}) == 5
    assert result["lengths"] == [7] * 5
    assert "5 evaluation episode(s) cut off after --eval-steps 7" in capsys.readouterr().err


def test_load_policy_plays_as_the_evaluation_does():
    ppo_atari.train(tiny_args(total_timesteps=16))
    policy, sampled = ppo_atari.load_policy("run"), ppo_atari.load_policy("run", np.random.default_rng(0))
    agent, frames = Agent(4, 4), random_frames(64)
    agent.load(read_checkpoint("run")["theta"])
    with torch.no_grad():
        likeliest = agent.policy(agent.hidden(to_blocks(frames))).argmax(1).numpy()
    np.testing.assert_array_equal(policy(frames), likeliest)
    assert len(set(sampled(frames))) == 4  # the policy is still nearly uniform


def test_sampled_actions_of_an_evaluation_follow_the_policy():
    """Frequencies of a peaked policy within five standard errors."""
    p, n, agent = np.array([0.7, 0.2, 0.1]), 3000, Agent(1, 3)
    agent.actor.weight.data.zero_()
    agent.actor.bias.data = torch.tensor(p).log().float()
    spaces = ppo_atari.Spaces(Box(0, 255, (1, 84, 84), np.uint8), 3)
    policy = ppo_atari.make_policy(tiny_args(stack_num=1), {"theta": agent.flat()}, spaces, np.random.default_rng(0))
    frequencies = np.bincount(policy(np.zeros((n, 1, 84, 84), np.uint8)), minlength=3) / n
    assert (np.abs(frequencies - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()


def test_what_is_said_of_the_cpu(monkeypatch, command_line):
    for flags, words in (
        ({"amx_bf16": True, "avx512_bf16": True}, "AMX, with which"),
        ({"avx512_bf16": True}, "avx512_bf16, with which"),
        ({"bf16": True}, "bf16 (not measured)"),  # of ARM
        ({}, "no instructions for bfloat16, which with AVX2 takes ten times as long as float32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert words in ppo_atari.describe_cpu()
    for precision, flags in (("float32", {}), ("bfloat16", {}), ("bfloat16", {"avx512_bf16": True})):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        code, _, err = command_line(*tiny_flags(f"{precision}{len(flags)}", total_timesteps=16, precision=precision))
        assert code == 0
        assert f"1 rank(s); {ppo_atari.describe_cpu()}\n" in err
        assert ("warning: leave out --precision bfloat16" in err) == (precision == "bfloat16" and not flags)


@pytest.mark.parametrize(("scale_obs", "seed"), [(True, 10), (False, 10)])
def test_evaluation_against_playing_by_hand(scale_obs, seed):
    """The likeliest actions of a random network in Space Invaders; with these seeds it does not do the same all the time."""
    torch.manual_seed(seed)
    agent = Agent(4, 6, scale=255.0 if scale_obs else 1.0)
    nn.init.uniform_(agent.get_parameter("convolutions.0.bias"), -1, 1)  # without biases the scale would not matter
    options: dict[str, Any] = {"frame_skip": 20, "max_episode_steps": 80}  # games end sooner
    args = tiny_args(env="SpaceInvaders", num_envs=4, eval_episodes=4, eval_deterministic=True, scale_obs=scale_obs, **options)
    Path("run").mkdir()
    evaluation = ppo_atari.evaluate(args, {"theta": agent.flat()})

    seeds = np.random.default_rng([args.seed, 2**31]).integers(2**31, size=4).tolist()
    options |= {"noop_max": 30, "episodic_life": True, "use_fire_reset": True, "reward_clip": True}
    envs, obs, _ = plain_envs("SpaceInvaders-v5", seeds, **options)
    returns, signs, lengths = np.zeros(4), np.zeros(4), np.zeros(4, dtype=int)
    running, resetting, order = np.ones(4, dtype=bool), np.zeros(4, dtype=bool), []
    while running.any():
        with torch.no_grad():
            action = agent.actor(agent.hidden(to_blocks(obs))).argmax(1).numpy()
        obs, reward, terminated, truncated, info = envs.step(action)
        returns[running] += info["reward"][running]
        signs[running] += reward[running]
        lengths[running & ~resetting] += 1
        order += np.flatnonzero(running & ((info["terminated"] == 1) | truncated)).tolist()  # as they end
        running[order] = False
        resetting = terminated | truncated
    assert evaluation["returns"] == returns[order].tolist()
    assert evaluation["lengths"] == lengths[order].tolist()
    assert (evaluation["deterministic"], evaluation["problems"]) == (True, [])
    assert (returns != signs).any()
    assert len(set(lengths)) > 1


def test_names_of_games():
    assert {find_game(name) for name in ("Breakout", "Breakout-v5", "BreakoutNoFrameskip-v4")} == {"Breakout-v5"}
    with pytest.raises(UsageError, match="unknown game Breakot; nearest names: Breakout"):
        find_game("Breakot")
    assert find_game("ALE/Breakout-v5") == "Breakout-v5"
    for name in ("HalfCheetah", "ALE/HalfCheetah-v5", "Breakout-v4"):
        with pytest.raises(UsageError, match="unknown game"):
            find_game(name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env", "SpaceInvadrs"], "unknown game SpaceInvadrs; nearest names: SpaceInvaders"),
        (["--num-minibatches", 3], "num_envs * num_steps = 16 does not divide into num_minibatches = 3"),
        (["--noop-max", 0], "noop_max is 0: it must be at least 1"),
        (["--stack-num", 0], "stack_num is 0: it must be at least 1"),
        (["--frame-skip", 0], "frame_skip is 0: it must be at least 1"),
        (["--noop-max", 2**31], "noop_max is 2147483648: it must be at most 10000"),
        (["--frame-skip", 10**5], "frame_skip is 100000: it must be at most 10000"),
        (["--max-episode-steps", 2**31], "max_episode_steps is 2147483648: it must be at most 2147483647"),
        (["--stack-num", 10**4, "--num-steps", 8192, "--total-timesteps", 16384], "num_steps = 8192 need about"),
        (["--num-steps", 10**7, "--total-timesteps", 10**8], "num_steps = 10000000 need about"),
        (["--repeat-action-probability", 1.5], "repeat_action_probability is 1.5: it must lie between 0 and 1"),
        (["--total-timesteps", 15], "less than one rollout of num_envs * num_steps * ranks = 16"),
        (["--device", "gpu"], "device is gpu: use auto, cpu, cuda or cuda:1"),
        (["--resume", "nowhere"], "there is no checkpoint nowhere"),
    ],
)
def test_bad_input_gives_one_sentence(command_line, words, message):
    code, out, err = command_line(*tiny_flags(), *words)
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("ppo_atari.py: error: ")
    assert message in err
    assert not Path("run").exists()


def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match=r"torch finds 0 GPU\(s\) here"):
        tiny_args(device="cuda")
    assert tiny_args(device="auto").device == "cpu"


def test_every_compiled_part_is_compiled_without_guards(monkeypatch):
    """torch takes the filter out of the options that it is given."""
    seen = []

    def spy(function, options, **others):
        seen.append(options.pop("guard_filter_fn", None))
        return function

    monkeypatch.setattr(torch, "compile", spy)
    ppo_atari.train(tiny_args(compile=True, total_timesteps=16))
    assert seen == [torch.compiler.skip_all_guards_unsafe] * 3


def test_ranks_and_gpus_must_match(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert tiny_args(device="cuda:1").device == "cuda:1"
    with pytest.raises(UsageError, match=r"device is cuda:2, but torch finds 2 GPU\(s\) here"):
        tiny_args(device="cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="under torchrun say cuda, and each rank takes its own GPU"):
        tiny_args(device="cuda:1", total_timesteps=640)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="finds 2 GPU"):
        tiny_args(device="cuda", total_timesteps=640)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_in_two_parts_ends_with_the_same_bits(command_line, device):
    settings = {"device": device, "compile": device != "cpu", "anneal_lr": False}
    ppo_atari.train(tiny_args("whole", total_timesteps=3 * 16, **settings))
    ppo_atari.train(tiny_args("parts", total_timesteps=2 * 16, **settings))
    assert command_line("--resume", "parts", "--total-timesteps", 3 * 16)[0] == 0
    whole, parts = read_checkpoint("whole"), read_checkpoint("parts")
    assert equal([whole["theta"], whole["adam"]], [parts["theta"], parts["adam"]])
    assert read_metrics("whole")[1:] == read_metrics("parts")[1:]


def test_resume_without_the_logs_is_refused(command_line):
    ppo_atari.train(tiny_args(total_timesteps=16))
    Path("run/metrics.jsonl").unlink()
    code, _, err = command_line("--resume", "run", "--total-timesteps", 32)
    assert code == 2
    assert "run/metrics.jsonl is missing or shorter than at the checkpoint: --resume needs it" in err
    assert not Path("run/metrics.jsonl").exists()


def test_threads_are_those_of_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert ppo_atari.count_cores() == 1


def test_ranks_do_not_evaluate_together(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="not with torchrun"):
        tiny_args(evaluate="run")
    with pytest.raises(UsageError, match="= 32 steps"):
        tiny_args(total_timesteps=31)


def test_table_5_of_the_paper():
    """3 epochs, clip range annealed, value loss weight 1 on the square without 1/2."""
    args = tiny_args(update_epochs=3, anneal_clip=True, vf_coef=2.0)
    ppo_atari.train(args)
    records = read_metrics("run")[1:]
    np.testing.assert_allclose([r["charts/clip_coef"] for r in records], [0.1, 0.1 * 2 / 3, 0.1 / 3])
    assert [r["charts/epochs"] for r in records] == [3, 3, 3]


def test_flags_and_annealed_clip_range_reach_the_loss(monkeypatch):
    loss, calls = ppo_atari.ppo_loss, []

    def recorded(*args, **kwargs):
        calls.append(inspect.signature(loss).bind(*args, **kwargs).arguments)
        return loss(*args, **kwargs)

    monkeypatch.setattr(ppo_atari, "ppo_loss", recorded)
    flags: dict[str, Any] = {"vf_coef": 0.25, "ent_coef": 0.03, "clip_policy": False, "clip_vloss": True}
    ppo_atari.train(tiny_args(anneal_clip=True, num_minibatches=1, checkpoint_every=100, **flags))
    assert [{name: call[name] for name in flags} for call in calls] == [flags] * 3
    np.testing.assert_allclose([float(call["clip_coef"]) for call in calls], [0.1, 0.1 * 2 / 3, 0.1 / 3])


def test_target_kl_is_judged_on_the_whole_epoch(monkeypatch):
    """A target below the KL of the last minibatch of the first epoch, but above that of all: two epochs."""
    first, last = record_run(monkeypatch, run_dir="measured", total_timesteps=16).kls[0]
    target_kl = ((first + last) / 2 + last) / 2
    assert (first + last) / 2 < target_kl < last
    ppo_atari.train(tiny_args(total_timesteps=16, update_epochs=4, target_kl=target_kl))
    assert [r["charts/epochs"] for r in read_metrics("run")[1:]] == [2]


def test_adam_counts_the_minibatches_that_it_has_seen():
    """Fewer than planned, where target_kl ends the epochs early."""
    ppo_atari.train(tiny_args(total_timesteps=32, update_epochs=4, target_kl=1e-9))
    epochs = [r["charts/epochs"] for r in read_metrics("run")[1:]]
    assert len(epochs) == 2
    assert max(epochs) < 4
    assert read_checkpoint("run")["updates"] == sum(epochs) * TINY["num_minibatches"]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_run_is_near_the_eager_one(device):
    for run_dir, compiled in (("eager", False), ("compiled", True)):
        ppo_atari.train(tiny_args(run_dir, compile=compiled, device=device))
    eager, compiled = read_checkpoint("eager")["theta"], read_checkpoint("compiled")["theta"]
    torch.testing.assert_close(compiled, eager, atol=2e-4, rtol=0)
    assert not torch.equal(compiled, torch.zeros_like(compiled))


def find_unmarked(function, inputs: tuple) -> list[int]:
    """Inputs that the graph of a function changes and that are not marked static: a CUDA graph would be skipped for them."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    graphs = []

    def compiler(module, _):
        context: Any = torch._guards.TracingContext.try_get()
        graphs.append(context.fw_metadata)
        return make_boxed_func(module.forward)

    backend: Any = aot_autograd(
        fw_compiler=compiler, inference_compiler=compiler, keep_inference_input_mutations=True, bw_compiler=compiler
    )
    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    (graph,) = graphs  # one, without a backward pass of its own
    return [i for i, x in enumerate(graph.input_info) if x.mutates_data and i not in graph.static_input_indices]


@pytest.mark.parametrize("marked", [True, False])
def test_what_cuda_graphs_change_is_marked_static(marked):
    T, N, args = 4, 2, tiny_args()
    args.device = "cuda"  # only what is traced depends on it: nothing runs there
    agent = Agent(4, 4)
    theta = agent.flat()
    adam = (torch.zeros_like(theta), torch.zeros_like(theta))
    obs = torch.zeros(T + 1, N, 21, 21, 64, dtype=torch.uint8)
    memory = (obs, torch.zeros(T + 1, N, dtype=torch.int64), torch.zeros(T + 1, N), torch.zeros(T + 1, N))
    if marked:
        ppo_atari.mark_static(args, theta, *adam, *memory)
    frames = torch.zeros(N, 4, 84, 84, dtype=torch.uint8)
    act = (frames, torch.ones(N, 4), torch.tensor([0]), memory)
    assert (find_unmarked(ppo_atari.make_act(agent, args), act) == []) == marked
    batch = Batch(*(x[:-1].flatten(0, 1) for x in memory), *torch.ones(3, T * N))
    update = ppo_atari.join_update(*make_update(agent, args), args)
    assert (find_unmarked(update, (theta, adam, batch, torch.arange(4), torch.ones(3))) == []) == marked


@pytest.mark.gpu
def test_first_rollout_and_minibatch_are_those_of_an_eager_cpu(monkeypatch):
    """Compiled with eager and GPU with GPU would share a fault; this is against the CPU."""
    batches, learn = [], ppo_atari.learn

    def recorded(update, theta, adam, batch, *rest):
        batches.append([x.cpu().clone() for x in batch])
        return learn(update, theta, adam, batch, *rest)

    monkeypatch.setattr(ppo_atari, "learn", recorded)
    for run_dir, where in (("there", "cuda"), ("here", "cpu")):
        args = tiny_args(run_dir, device=where, compile=where != "cpu", num_minibatches=1, total_timesteps=16)
        ppo_atari.train(args)
        _, record = read_metrics(run_dir)
        assert abs(record["losses/old_approx_kl"]) < 1e-3  # the policy that acted is the one that learns
        assert record["losses/clipfrac"] == 0
    names = ("obs", "action", "logprob", "value", "advantage", "return_", "valid")
    for name, there, here in zip(names, *batches, strict=True):
        torch.testing.assert_close(there, here, atol=0 if name in ("obs", "action", "valid") else 1e-2, rtol=0, msg=name)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_gpu_script_starts_nothing_where_its_input_is_not_whole(tmp_path):
    env = os.environ | {"IN": str(tmp_path / "none"), "OUT": str(tmp_path), "WORK": str(tmp_path), "DEVICE": "cpu"}
    command = ["bash", str(SCRIPT.parent / "benchmarks" / "gpu.sh"), "games", "Breakout", "16"]
    done = subprocess.run(command, env=env | {"PY": sys.executable}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no whole games.tgz" in done.stdout
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.slow
def test_gpu_script_plays_a_game_in_two_parts(tmp_path):
    flags = "--num-envs 2 --num-steps 8 --num-minibatches 2 --update-epochs 1 --max-episode-steps 50 --no-compile"
    env = os.environ | {"DEVICE": "cpu", "PY": sys.executable, "FLAGS": flags, "EVERY": "1"}
    script = str(SCRIPT.parent / "benchmarks" / "gpu.sh")

    def play(place: str, steps: int, **more: str):
        here = {"OUT": str(tmp_path / place / "out"), "WORK": str(tmp_path / place)} | more
        command = ["bash", script, "games", "Breakout", str(steps)]
        return subprocess.run(command, env=env | here, capture_output=True, text=True, check=False)

    first = play("a", 32)
    assert (first.returncode, "game_Breakout: step 32" in first.stdout) == (0, True), first.stdout + first.stderr
    second = play("b", 64, IN=str(tmp_path / "a/out"))
    assert (second.returncode, "game_Breakout: step 64" in second.stdout) == (0, True), second.stdout + second.stderr
    (part,) = (tmp_path / "b/out").glob("games.tgz.*")
    part.write_bytes(part.read_bytes()[:-1000])
    cut = play("c", 96, IN=str(tmp_path / "b/out"))
    assert (cut.returncode, "no whole games.tgz" in cut.stdout) == (1, True)
    assert not list((tmp_path / "c/runs").iterdir())
    many = play("b", 64, PARTS="0")
    assert (many.returncode, "1 parts, more than 0: run fewer games" in many.stdout) == (1, True), many.stdout
