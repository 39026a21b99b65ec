"""Reward functions that tests of command lines name, as rewards:score and so on: one that is right and some that are not."""

import math
import random
import sys


def score(prompts, responses):
    return [float(response.count("o")) for response in responses]


def equal(prompts, responses):
    return [0.1] * len(responses)


def huge(prompts, responses):
    return [random.choice([-1, 1]) * 1e29 for _ in responses]


def tiny(prompts, responses):
    return [random.random() * 1e-300 for _ in responses]


def not_a_number(prompts, responses):
    return [math.nan for _ in responses]


def short(prompts, responses):
    return [1.0] * (len(responses) - 1)


def nothing(prompts, responses):
    pass


def raises(prompts, responses):
    raise ValueError("two\nlines \udcff")


def leaves(prompts, responses):
    sys.exit(3)


def words(prompts, responses):
    return list(responses)


def one_argument(prompts):
    return [1.0] * len(prompts)


no_function = 3
