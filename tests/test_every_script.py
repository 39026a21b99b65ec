"""What all scripts with environments do alike: what they log, how they learn from a batch, what a checkpoint holds, seeds."""

import importlib
import math
import random
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from helpers import TINY, equal, read_checkpoint, read_jsonl

NAMES = ("ppo_continuous", "ppo_kl_penalty", "ppo_shared_params", "ppo_atari")
OF_SCRIPT: dict[str, dict[str, Any]] = {
    "ppo_shared_params": {"env": "CartPole-v1", "norm_obs": "step", "norm_reward": True},
    "ppo_atari": {"env": "Breakout", "device": "cpu", "num_threads": 1, "num_steps": 8, "max_episode_steps": 3},
}

each_script = pytest.mark.parametrize("script", [importlib.import_module(name) for name in NAMES], ids=NAMES)


def rollout_of(script) -> int:
    """Steps of an iteration."""
    return TINY["num_envs"] * OF_SCRIPT.get(script.__name__, {}).get("num_steps", TINY["num_steps"])


def tiny(script, run_dir: Path | str = "run", **changes: Any):
    """4 iterations, in each of which episodes end."""
    flags = TINY | OF_SCRIPT.get(script.__name__, {}) | {"total_timesteps": 4 * rollout_of(script)}
    return script.Args(**flags | {"run_dir": str(run_dir)} | changes)


def records_of(run_dir: str) -> list[dict]:
    return read_jsonl(f"{run_dir}/metrics.jsonl")[1:]


@each_script
def test_episodic_return_and_length_are_means_over_this_iteration(script):
    script.train(tiny(script))
    episodes, before, means = read_jsonl("run/episodes.jsonl"), 0, []
    for record in records_of("run"):
        ended = [e for e in episodes if before < e["global_step"] <= record["global_step"]]
        for key in ("return", "length") if ended else ():
            assert record[f"charts/episodic_{key}"] == pytest.approx(np.mean([e[key] for e in ended]))
            means.append(record[f"charts/episodic_{key}"])
        before = record["global_step"]
    assert before == 4 * rollout_of(script)
    assert len(set(means)) > 2 or script.__name__ == "ppo_atari", "all iterations alike show nothing"


@each_script
def test_an_iteration_without_an_end_logs_no_episodic_return(script):
    script.train(tiny(script, num_steps=2, num_minibatches=1, total_timesteps=100))
    episodes = read_jsonl("run/episodes.jsonl")
    ends = {record["iteration"] for record in records_of("run") if "charts/episodic_return" in record}
    assert ends == {math.ceil(e["global_step"] / 4) for e in episodes}
    assert 0 < len(ends) < len(records_of("run"))


class Recorder:
    """In place of the module wandb: what it is given."""

    def __init__(self):
        self.logged: list[tuple[int, dict]] = []
        self.run = SimpleNamespace(summary={})
        self.errors = SimpleNamespace(Error=RuntimeError, CommError=RuntimeError)

    def init(self, **options):
        self.options = options

    def log(self, record, step):
        self.logged.append((step, record))

    def finish(self):
        self.finished = True


@each_script
def test_wandb_gets_the_records_of_the_log_at_their_global_steps(script, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(script, "load_wandb", lambda args: recorder)
    args = tiny(script, track=True, wandb_entity="us")
    script.train(args)
    size = rollout_of(script)
    assert [step for step, _ in recorder.logged] == [size * i for i in range(1, 5)]
    for (step, given), record in zip(recorder.logged, records_of("run"), strict=True):
        assert {"iteration": step // size, "global_step": step, **given} == record
    assert recorder.options["id"] == read_checkpoint("run")["wandb_id"]
    assert recorder.options["name"] == "run"
    assert (recorder.options["project"], recorder.options["entity"]) == ("ppo", "us")
    assert recorder.options["config"]["learning_rate"] == args.learning_rate
    assert recorder.finished


@each_script
def test_tensorboard_gets_the_records_of_the_log_and_none_twice_after_an_interruption(script, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def interrupted(self, iteration):
        if iteration == 4:  # it is in the log, and not in the checkpoint
            raise KeyboardInterrupt
        return iteration == 3

    with monkeypatch.context() as m:
        m.setattr(script.Run, "is_checkpoint_due", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.train(tiny(script, tensorboard=True))
    assert len(records_of("run")) == 4
    script.train(tiny(script, tensorboard=True, resume="run"))
    events = EventAccumulator("run").Reload()
    names = {name for record in records_of("run") for name in record} - {"iteration", "global_step"}
    assert set(events.Tags()["scalars"]) == names
    for name in names - {"charts/seconds", "charts/SPS"}:
        told = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(record["global_step"], record[name]) for record in records_of("run") if name in record]
        assert told == [(step, pytest.approx(value, nan_ok=True)) for step, value in expected], name


@each_script
def test_tensorboard_that_is_not_installed_is_one_sentence_before_the_run(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(script.UsageError, match="pip install tensorboard"):
        script.train(tiny(script, tensorboard=True))
    assert not Path("run").exists()


@pytest.mark.parametrize("name", [*NAMES, "ppo_rlhf"])
def test_where_memory_runs_out_the_sentence_names_flags_that_save_it(name, monkeypatch, capsys):
    script: Any = importlib.import_module(name)
    monkeypatch.setattr(script, "train", lambda args: torch.empty(2**55))  # torch raises what it does for a large network
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--run-dir", "run"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"{name}.py: stopped: out of memory: {script.LESS_MEMORY}"
    flags = set(re.findall(r"[a-z]+_[a-z]+", script.LESS_MEMORY))
    assert flags <= vars(script.Args(run_dir="run")).keys() and len(flags) >= 2


@each_script
def test_speed_counts_the_steps_of_this_process_after_its_first_iteration(script, monkeypatch):
    """On a clock by which a rollout takes two seconds and nothing else any time."""
    clock = SimpleNamespace(**{name: getattr(time, name) for name in ("time", "strftime", "localtime")}, now=1000.0)
    clock.perf_counter = lambda: clock.now
    play = script.Runner.play

    def slow_play(self, *args):
        clock.now += 2
        return play(self, *args)

    size = rollout_of(script)
    monkeypatch.setattr(script, "time", clock)
    monkeypatch.setattr(script.Runner, "play", slow_play)
    result = script.train(tiny(script))
    assert [record["charts/SPS"] for record in records_of("run")] == [0, size / 2, size / 2, size / 2]
    assert [record["charts/seconds"] for record in records_of("run")] == [2, 4, 6, 8]
    assert (result["sps"], result["sps_with_startup"], result["seconds"]) == (size / 2, size / 2, 8)
    clock.now += 1000
    longer = tiny(script, resume="run", total_timesteps=7 * size)
    result = script.train(longer)
    assert [record["charts/SPS"] for record in records_of("run")[4:]] == [0, size / 2, size / 2]
    assert [record["charts/seconds"] for record in records_of("run")[4:]] == [2, 4, 6]
    assert (result["sps"], result["sps_with_startup"], result["seconds"]) == (size / 2, size / 2, 6)
    assert result["global_step"] == 7 * size


def updates_of(script, **changes) -> list[list[SimpleNamespace]]:
    """For each iteration what every minibatch's update was given: rows, learning rate, clip range."""
    found: list[list[SimpleNamespace]] = []
    make_update, learn = script.make_update, script.learn

    def spy_learn(*args):
        found.append([])
        return learn(*args)

    def spy_update(agent, args):
        inner = make_update(agent, args)
        if isinstance(inner, tuple):  # Atari's two functions; Adam's step size is learning_rate / (1 - 0.9^count)
            compute_gradient, adam_step = inner

            def spy_gradient(theta, batch, mb_inds, clip_coef):
                found[-1].append(SimpleNamespace(rows=mb_inds.clone(), clip_coef=clip_coef.item()))
                return compute_gradient(theta, batch, mb_inds, clip_coef)

            def spy_adam(theta, adam, gradient, step_size, bias2):
                found[-1][-1].learning_rate = step_size.item() * (1 - 0.9 ** sum(map(len, found)))
                return adam_step(theta, adam, gradient, step_size, bias2)

            return spy_gradient, spy_adam

        def update(theta, adam, batch, mb_inds, learning_rate, clip_coef, *others):
            given = SimpleNamespace(rows=mb_inds.clone(), clip_coef=clip_coef.item(), learning_rate=learning_rate.item())
            found[-1].append(given)
            return inner(theta, adam, batch, mb_inds, learning_rate, clip_coef, *others)

        return update

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "learn", spy_learn)
        patch.setattr(script, "make_update", spy_update)
        script.train(tiny(script, **changes))
    return found


@each_script
@pytest.mark.parametrize(("anneal_lr", "anneal_clip"), [(True, False), (False, True)])
def test_learning_rate_and_clip_range_fall_by_their_own_switches_once_an_iteration(script, anneal_lr, anneal_clip):
    flags = {"learning_rate": 8e-4, "clip_coef": 0.16, "anneal_lr": anneal_lr, "anneal_clip": anneal_clip}
    iterations = updates_of(script, **flags)
    falling, records = [1, 0.75, 0.5, 0.25], records_of("run")
    for name, start, falls in (("learning_rate", 8e-4, anneal_lr), ("clip_coef", 0.16, anneal_clip)):
        expected = [start * x for x in falling] if falls else [start] * 4
        assert [record[f"charts/{name}"] for record in records] == pytest.approx(expected)
        for updates, value in zip(iterations, expected, strict=True):
            assert len(updates) == TINY["update_epochs"] * TINY["num_minibatches"]
            assert [getattr(update, name) for update in updates] == pytest.approx([value] * len(updates), rel=1e-5)


@each_script
def test_every_epoch_has_a_permutation_of_its_own(script):
    orders = []
    for updates in updates_of(script, update_epochs=3):
        for epoch in range(3):
            order = torch.cat([update.rows for update in updates[2 * epoch : 2 * epoch + 2]]).tolist()
            assert sorted(order) == list(range(rollout_of(script)))
            orders.append(tuple(order))
    assert len(set(orders)) == len(orders) == 12


@each_script
@pytest.mark.parametrize("norm_adv", ["minibatch", "batch"])
def test_returns_come_from_advantages_before_they_are_normalized(script, monkeypatch, norm_adv):
    raw, batches = [], []
    compute_gae, learn = script.compute_gae, script.learn

    def spy_gae(rewards, values, *others):
        advantages = compute_gae(rewards, values, *others)
        raw.append((advantages.flatten().clone(), values[:-1].flatten().clone()))
        return advantages

    def spy_learn(update, theta, adam, batch, *others):
        batches.append(batch._replace(advantage=batch.advantage.clone(), return_=batch.return_.clone()))
        return learn(update, theta, adam, batch, *others)

    monkeypatch.setattr(script, "compute_gae", spy_gae)
    monkeypatch.setattr(script, "learn", spy_learn)
    script.train(tiny(script, norm_adv=norm_adv))
    for (advantage, value), batch in zip(raw, batches, strict=True):
        torch.testing.assert_close(batch.return_, advantage + value)
        if norm_adv == "minibatch":
            assert torch.equal(batch.advantage, advantage)
            continue
        chosen = advantage[batch.valid > 0]
        expected = (advantage - chosen.mean()) / (chosen.std(correction=0) + 1e-8)
        torch.testing.assert_close(batch.advantage, expected, rtol=1e-4, atol=1e-4)
        assert (batch.advantage - advantage).abs().max() > 1e-3


@each_script
def test_a_checkpoint_has_all_that_goes_on(script, monkeypatch):
    """A run killed after its second checkpoint, resumed, ends as the one that was not: state, logs and what it reports."""
    whole = script.train(tiny(script, "whole", checkpoint_every=2))
    files: list[str] = []
    write_atomically = script.write_atomically

    def keep(file, data):
        write_atomically(file, data)
        files.append(str(shutil.copy(file, f"checkpoint{len(files)}.pt")))

    monkeypatch.setattr(script, "write_atomically", keep)
    script.train(tiny(script, "cut", checkpoint_every=2))
    shutil.copy(files[1], "cut/checkpoint.pt")
    cut = script.train(tiny(script, "cut", checkpoint_every=2, resume="cut"))
    saved, resumed = read_checkpoint("whole"), read_checkpoint("cut")
    assert saved.keys() == resumed.keys() == torch.load(files[0], weights_only=True).keys()
    for key in saved.keys() - {"args", "log_sizes", "wandb_id"}:
        assert equal(saved[key], resumed[key]), key
    for key in ("global_step", "episodic_return", "episodes"):
        assert whole[key] == cut[key], key
    assert whole["episodes"] == len(read_jsonl("whole/episodes.jsonl")) > 4
    assert Path("whole/episodes.jsonl").read_bytes() == Path("cut/episodes.jsonl").read_bytes()
    half = torch.load(files[1], weights_only=True)
    changing = {"theta", "adam", "global_step", "recent_returns", "iteration"}
    changing |= {"obs_rms", "return_rms", "updates"} & saved.keys()
    assert {key for key in changing if equal(half[key], saved[key])} == set()


@each_script
def test_evaluation_leaves_the_statistics_as_they_are(script, monkeypatch):
    script.train(tiny(script))
    saved = read_checkpoint("run")
    if "obs_rms" not in saved:
        pytest.skip("normalizes no observations")
    seen, normalize_obs = [], script.normalize_obs

    def spy(obs, rms, args):
        seen.append((rms.mean.copy(), rms.m2.copy(), float(rms.count)))
        return normalize_obs(obs, rms, args)

    monkeypatch.setattr(script, "normalize_obs", spy)
    script.evaluate(tiny(script, eval_episodes=2), saved)
    assert len(seen) > 5
    for mean, m2, count in seen:
        np.testing.assert_array_equal(mean, saved["obs_rms"]["mean"])
        np.testing.assert_array_equal(m2, saved["obs_rms"]["m2"])
        assert count == saved["obs_rms"]["count"]
    assert equal(read_checkpoint("run"), saved)


@each_script
def test_all_generators_are_seeded_by_seed_and_iteration(script):
    draws = []
    for seed, iteration in ((5, 6), (5, 6), (5, 7), (6, 6)):
        seeds = script.make_seeds(seed, iteration, 4)
        draws.append((*seeds, random.random(), np.random.random(), torch.rand(()).item()))
    assert draws[0] == draws[1]
    for of_one in zip(*draws[1:], strict=True):
        assert len(set(of_one)) == 3, "a number that does not depend on both the seed and the iteration"
    assert len({seed for four in draws[1:] for seed in four[:4]}) == 12


@each_script
def test_a_run_draws_other_numbers_in_an_iteration_after_a_restart(script):
    """All randomness of an iteration after a checkpoint comes from (seed, iteration): no two draw the same."""
    orders = [updates[0].rows.tolist() for updates in updates_of(script, checkpoint_every=1)]
    assert len({tuple(order) for order in orders}) == 4
    other = [updates[0].rows.tolist() for updates in updates_of(script, checkpoint_every=1, seed=2, run_dir="other")]
    assert not {tuple(order) for order in orders} & {tuple(order) for order in other}


def test_a_peaked_policy_is_sampled_by_its_probabilities():
    """A nearly uniform one would hide noise of another distribution."""
    script = importlib.import_module("ppo_shared_params")
    torch.manual_seed(0)
    probabilities, noise = np.array([0.7, 0.2, 0.1]), script.draw_noise(5000, 4, (1, 3))
    logits = np.broadcast_to(np.log(probabilities), (4, 1, 3))
    actions = np.stack([script.choose((logits,), None, x) for x in noise])
    frequencies = np.bincount(actions.ravel(), minlength=3) / actions.size
    np.testing.assert_allclose(frequencies, probabilities, atol=5 * 0.5 / math.sqrt(actions.size))


@each_script
def test_figures_of_the_end_are_those_of_all_the_episodes(script, monkeypatch, capsys):
    """An evaluation of known returns: what is printed, and what W&B gets in its summary."""
    recorder, returns, lengths = Recorder(), [1.0, 2.0, 9.0], [5, 6, 10]
    monkeypatch.setattr(script, "load_wandb", lambda args: recorder)
    played = {"returns": returns, "lengths": lengths, "problems": []}
    monkeypatch.setattr(script, "evaluate", lambda args, checkpoint, closing: played)
    args = tiny(script, track=True, eval_episodes=3)
    result = script.train(args)
    ended = [episode["return"] for episode in read_jsonl("run/episodes.jsonl")][-100:]
    assert result["episodic_return"] == pytest.approx(np.mean(ended))
    expected = {"final/episodic_return": np.mean(ended), "evaluation/return": 4.0, "evaluation/std": np.std(returns)}
    assert recorder.run.summary == pytest.approx(expected)
    script.tell_evaluation(args, played)
    assert "return 4.0 +- 3.6, length 7 over 3 episodes" in capsys.readouterr().out


@each_script
def test_an_evaluation_is_seeded_by_the_seed_of_its_run(script, monkeypatch):
    given = []

    def play_episodes(args, checkpoint, seeds, rng, frames, problems):
        given.append((*seeds, rng.random()))
        yield from [(0.0, 1, False)] * len(seeds)

    monkeypatch.setattr(script, "play_episodes", play_episodes)
    Path("run").mkdir()
    for seed in (1, 1, 2):
        script.evaluate(tiny(script, seed=seed, eval_episodes=2), {})
    assert given[0] == given[1]
    assert not set(given[1]) & set(given[2])
    assert len(set(given[0])) == 3


def test_games_of_earlier_iterations_do_not_enter_the_mean_of_atari():
    """On a script whose returns are all 0 in a short run: the log itself, with returns that differ."""
    script = importlib.import_module("ppo_atari")
    end_episodes, number = script.Runner.end_episodes, iter(range(1000))

    def numbered(self):
        ended = [(step, float(next(number)), length) for step, _, length in end_episodes(self)]
        self.recent_returns.extend(r for _, r, _ in ended)
        return ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Runner, "end_episodes", numbered)
        script.train(tiny(script))
    episodes, before, means = read_jsonl("run/episodes.jsonl"), 0, []
    for record in records_of("run"):
        ended = [e["return"] for e in episodes if before < e["global_step"] <= record["global_step"]]
        means += [(record["charts/episodic_return"], np.mean(ended))] if ended else []
        before = record["global_step"]
    assert len(means) > 2
    assert [mean for mean, _ in means] == pytest.approx([mean for _, mean in means])


def test_atari_acts_by_what_it_has_learned(monkeypatch):
    script = importlib.import_module("ppo_atari")
    play, acted, learned = script.Runner.play, [], []
    learn, make_act, agents = script.learn, script.make_act, []

    def spy_make_act(agent, args):
        agents.append(agent)
        return make_act(agent, args)

    def spy_play(self, act):
        acted.append(agents[-1].flat())
        return play(self, act)

    def spy_learn(update, theta, *others):
        said = learn(update, theta, *others)
        learned.append(theta.clone())
        return said

    monkeypatch.setattr(script.Runner, "play", spy_play)
    monkeypatch.setattr(script, "make_act", spy_make_act)
    monkeypatch.setattr(script, "learn", spy_learn)
    script.train(tiny(script))
    assert len(acted) == 4
    assert all(map(torch.equal, acted[1:], learned))
    assert not torch.equal(acted[0], acted[1])
