"""What people do to a copy of ppo_rlhf.py, and what they hand it.

An edit learns from what it sampled and saves what it learned, or stops with a sentence.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ppo_rlhf
from helpers import edited, read_checkpoint, read_metrics
from test_rlhf import flat, start, texts, tiny, update_once, words  # noqa: F401  texts is a fixture

SCRIPT = Path(ppo_rlhf.__file__)
AGENT = "        self.value_head = nn.Linear(lm.width, 1)\n"
FORWARD = "            logprobs, value = self.policy(hidden), self.value(other)\n"
GENERATE_ON = "                hidden = agent.lm.hidden(token[:, None], mask, cache)\n"
LOGITS = "F.log_softmax(self.lm.logits(hidden).float() / self.temperature, dim=-1)"
APART = "Agent.forward, which learns, and generate, which samples, differ by"


def make(changes: list[tuple[str, str]], **settings) -> Any:
    """An edited copy and the settings of a short run of it."""
    script: Any = edited(changes, SCRIPT)
    return script, script.Args(**vars(tiny(eval_episodes=0, **settings)))


@pytest.mark.parametrize(
    "changes",
    [
        [(FORWARD, FORWARD.replace("self.policy(hidden)", "self.policy(hidden + 0.1)"))],
        [(GENERATE_ON, GENERATE_ON.replace("token[:, None]", "token[:, None] * 0 + 5"))],
        [("clamp(0, self.context - 1)[:, past:]", "clamp(0, self.context - 1)[:, : L]")],  # positions begin anew at each token
    ],
)
def test_an_edit_of_one_pass_alone_stops_before_it_learns(changes):
    script, args = make(changes)
    with pytest.raises(script.UsageError, match=APART):
        script.train(args)
    assert len(read_metrics("run")) == 1  # the header


@pytest.mark.parametrize("value", ["head", "separate"])
def test_rlhf_35_a_parameter_more_of_the_policy_stays_in_the_warmup(value):
    """It stands before those of the language model in theta, where a slice would take it for another."""
    bias = [
        (AGENT, AGENT + "        self.bias = nn.Parameter(torch.zeros(lm.vocabulary))\n"),
        (LOGITS, LOGITS.replace(").float()", ").float() + self.bias")),
    ]
    script, args = make(bias, value=value, value_warmup=3, learning_rate=0.01)
    script.train(args)
    records = read_metrics("run")[1:]
    assert [abs(record["charts/kl"]) < 1e-5 for record in records] == [True] * 4  # of the policy before each update
    assert all(record["losses/grad_norm"] > 0 for record in records)
    agent = script.make_agent(args, script.load_models(args))
    names = [name for name, p in agent.named_parameters() for _ in range(p.numel())]
    moved = {name for name, x in zip(names, (read_checkpoint("run")["theta"] - flat(agent)).tolist(), strict=True) if x}
    assert {"bias", "lm.embedding.weight", "value_head.weight"} <= moved  # in the fourth iteration


def test_frozen_parameters_stay_and_the_others_learn():
    frozen = [(AGENT, AGENT + "        lm.embedding.requires_grad_(False)\n")]
    script, args = make(frozen, learning_rate=0.01)
    script.train(args)
    models = script.load_models(args)
    agent = script.make_agent(args, models)
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    torch.nn.utils.vector_to_parameters(read_checkpoint("run")["theta"], agent.parameters())
    same = {name for name, p in agent.named_parameters() if torch.equal(p, before[name])}
    assert same == {"lm.embedding.weight"}


def test_a_buffer_that_training_changes_is_refused_and_one_that_stays_is_not():
    buffer = (AGENT, AGENT + "        self.register_buffer('seen', torch.zeros(()))\n")
    count = (FORWARD, FORWARD + "            self.seen += 1\n")
    script, args = make([buffer])
    script.train(args)
    script, args = make([buffer, count], run_dir="counted")
    with pytest.raises(script.UsageError, match="seen is a buffer that changes in training, which no checkpoint holds"):
        script.train(args)


def test_a_renamed_section_would_hide_edits_from_the_cache():
    script, args = make([("\n# Language model\n", "\n# My language model\n")])
    with pytest.raises(script.UsageError, match="the cache goes by the sections Language model, Stages of this file"):
        script.train(args)
    assert not Path("run").exists()


def test_a_reward_that_draws_numbers_of_numpy_and_python_gives_the_same_run_twice():
    Path("noisy.py").write_text(
        "import random\nimport numpy as np\n"
        "def score(prompts, responses):\n    return [random.random() + np.random.randn() for _ in responses]\n"
    )
    for run_dir in ("one", "two"):
        random.seed()
        np.random.seed()
        ppo_rlhf.train(tiny(run_dir, env="noisy:score", total_timesteps=128))
    one, two = (read_checkpoint(run_dir)["theta"] for run_dir in ("one", "two"))
    assert torch.equal(one, two)


def test_the_reference_is_no_copy_and_stays_as_it_is():
    args, models, runner, agent = start()
    assert runner.reference.lm is models.lm
    before = [p.clone() for p in models.lm.parameters()]
    rollout = runner.play(agent, 1)
    batch, _ = ppo_rlhf.make_batch(agent, rollout, runner)
    update_once(args, models, agent, batch, rate=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, models.lm.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, agent.lm.parameters(), strict=True))


def test_rlhf_33_the_supervised_loss_has_the_precision_of_the_rest(monkeypatch):
    args, models, runner, agent = start(ptx_coef=1.0, precision="bfloat16")
    batch, _ = ppo_rlhf.make_batch(agent, runner.play(agent, 1), runner)
    logits, dtypes = agent.lm.logits, []

    def watched(hidden):
        made = logits(hidden)
        dtypes.append(made.dtype)
        return made

    monkeypatch.setattr(agent.lm, "logits", watched)
    update_once(args, models, agent, batch)
    assert dtypes == [torch.bfloat16] * 2  # of the responses and of the texts


@pytest.mark.parametrize("again", [20, 180])
def test_held_out_texts_are_not_trained_on_where_they_occur_twice(again):
    lines = Path("texts.tsv").read_text().splitlines()
    Path("texts.tsv").write_text("\n".join([*lines, *(lines * 2)[:again]]) + "\n")
    seen: dict[str, list[str]] = {}
    train_supervised = ppo_rlhf.train_supervised

    def watched(args, trained, unseen):
        seen.update(trained=trained, unseen=unseen)
        return train_supervised(args, trained, unseen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rlhf, "train_supervised", watched)
        ppo_rlhf.load_models(tiny(seed=77))
    assert len(seen["trained"]) > again
    assert seen["unseen"]
    assert not set(seen["unseen"]) & set(seen["trained"])


def test_ratings_that_are_missing_and_long_prompts_are_told_before_the_stages(monkeypatch):
    monkeypatch.setattr(ppo_rlhf, "train_reward_model", None)
    Path("long.txt").write_text("good " * 200 + "\n")
    with pytest.raises(ppo_rlhf.UsageError, match=r"the longest prompt and num_steps = 8 make \d+ tokens"):
        ppo_rlhf.load_models(tiny(prompts="long.txt", seed=78))
    monkeypatch.setattr(ppo_rlhf, "train_supervised", None)
    Path("plain.txt").write_text("a film\nanother film\na third one\n" * 10)
    with pytest.raises(ppo_rlhf.UsageError, match=r"human ratings are missing: .*, or a reward, --env my_module:score"):
        ppo_rlhf.load_models(tiny(data="plain.txt", seed=78))


def test_the_human_reward_model_is_trained_once_for_settings_that_it_does_not_read():
    ppo_rlhf.load_models(tiny(seed=79))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rlhf, "train_reward_model", None)
        Path("some.txt").write_text("the film is\nto me\n" * 20)
        for changes in ({"num_steps": 4}, {"prompts": "some.txt"}):
            assert ppo_rlhf.load_models(tiny(seed=79, **changes)).reward_model is not None


def test_a_vote_without_a_text_is_no_text():
    Path("votes.tsv").write_text("1,2\t\n3,2,-1\t \n1\tgood film\n\tan odd one\nplain\n")
    sentences = ppo_rlhf.load_sentences(tiny(data="votes.tsv"))
    assert [tuple(sentence) for sentence in sentences] == [("good film", [1.0]), ("an odd one", []), ("plain", [])]


def test_two_rewards_are_refused():
    with pytest.raises(ppo_rlhf.UsageError, match="reward_model and vader would both score: give one of them"):
        tiny(env="vader", reward_model="rm")


def test_files_of_a_pretrained_model_may_move_but_not_those_of_a_run_of_its_own():
    ppo_rlhf.train(tiny(total_timesteps=64))
    with pytest.raises(ppo_rlhf.UsageError, match="a saved run keeps its settings: leave out --data"):
        ppo_rlhf.parse_args(["--evaluate", "run", "--data", "other.tsv"])
