"""ppo_rlhf.py on a language of four tokens, where every response can be listed and the best policy is known.

    python benchmarks/exact.py --seed 1
    python benchmarks/exact.py --seed 1 --kl-estimator k3

Runs the real script; only the model, the score (a table of random numbers) and the measures are replaced. What PPO
maximizes is J = E[score] - beta KL(policy, reference) over whole responses. Its maximum is beta log E_reference[exp(score /
beta)], reached by reference * exp(score / beta). "share" is how far from the reference to there the policy has come.
"""

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_rlhf
from ppo_rlhf import BOS, EOS, GPT, Agent, Args, Models, Runner

LETTERS = "^$_a"  # begin, end, padding, and one more; all may be sampled: three letters and an end
FLAGS = ["--env", "exact:score", "--data", "none", "--num-envs", "512", "--num-steps", "3", "--total-timesteps", "307200"]
FLAGS += ["--kl-coef", "0.5", "--learning-rate", "1.5e-3", "--no-norm-score", "--no-eos-score", "None", "--eval-every", "200"]
FLAGS += ["--checkpoint-every", "200", "--kl-target", "None"]


def all_responses(num_steps: int) -> list[list[int]]:
    """Every response: up to num_steps tokens, of which only the last may be the end."""
    return [
        list(tokens)
        for length in range(1, num_steps + 1)
        for tokens in itertools.product(range(len(LETTERS)), repeat=length)
        if EOS not in tokens[:-1] and (length == num_steps or tokens[-1] == EOS)
    ]


class Letters:
    """A tokenizer of one letter a token."""

    merges: tuple = ()

    def decode(self, tokens: list[int]) -> str:
        return "".join(LETTERS[token] for token in tokens)

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]


def make_models(args: Args) -> Models:
    """A tiny GPT with random weights, whose policy is neither uniform nor sure of one response."""
    torch.manual_seed(args.seed)
    lm = GPT(len(LETTERS), 32, 1, 8)
    torch.nn.init.normal_(lm.embedding.weight, std=0.1)
    torch.nn.init.normal_(lm.position.weight, std=0.1)
    return Models(Letters(), lm, None, [], [[BOS]], [[BOS]], {})


def make_score(args: Args, models: Models):
    """A table of standard normal scores, one for each response."""
    responses = all_responses(args.num_steps)
    scores = np.random.default_rng([args.seed, 5]).standard_normal(len(responses))
    table = {models.tokenizer.decode(tokens): float(score) for tokens, score in zip(responses, scores, strict=True)}
    return lambda prompts, texts: [table[text] for text in texts]


@torch.no_grad()
def log_probabilities(agent: Agent, responses: list[list[int]]) -> torch.Tensor:
    """Of each response, (number of responses,) float64."""
    tokens, mask = ppo_rlhf.pad_rows([[BOS, *response] for response in responses], False)
    return (agent(tokens, mask, tokens.shape[1] - 1).logprob.double() * mask[:, 1:]).sum(1)


def measure(runner: Runner, agent: Agent) -> tuple[dict[str, float], list]:
    """In place of Runner.evaluate: J of the reference, of the policy and of the best policy."""
    args, responses = runner.args, all_responses(runner.args.num_steps)
    score = torch.tensor(runner.score([], [runner.tokenizer.decode(tokens) for tokens in responses]), dtype=torch.float64)
    reference, policy = log_probabilities(runner.reference, responses), log_probabilities(agent, responses)
    start = (reference.exp() * score).sum().item()
    reached = (policy.exp() * (score - args.kl_coef * (policy - reference))).sum().item()
    best = args.kl_coef * torch.logsumexp(reference + score / args.kl_coef, 0).item()
    total = policy.exp().sum().item()
    assert math.isclose(total, 1, abs_tol=1e-4), total
    return {"objective": reached, "optimum": best, "share": (reached - start) / (best - start)}, []


def main(words: list[str]):
    replaced: dict[str, Any] = {"load_models": make_models, "make_score": make_score, "make_vader": lambda: None}
    replaced["__doc__"] = __doc__  # for --help
    kept = {name: getattr(ppo_rlhf, name) for name in replaced}, ppo_rlhf.Runner.evaluate
    try:
        for name, replacement in replaced.items():
            setattr(ppo_rlhf, name, replacement)
        setattr(ppo_rlhf.Runner, "evaluate", measure)  # noqa: B010
        saved = any(word.split("=")[0] in ("--resume", "--evaluate") for word in words)  # it keeps its settings
        sys.argv[1:] = words if saved else [*FLAGS, *words]
        ppo_rlhf.main()
    finally:  # the module may be used for something else in this process
        for name, original in kept[0].items():
            setattr(ppo_rlhf, name, original)
        setattr(ppo_rlhf.Runner, "evaluate", kept[1])  # noqa: B010


if __name__ == "__main__":
    main(sys.argv[1:])
