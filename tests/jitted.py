"""Compiles the numba functions of the scripts, so that processes forked from here have them (a second each)."""

import numpy as np

import ppo_continuous
import ppo_kl_penalty
import ppo_shared_params

for script in (ppo_continuous, ppo_kl_penalty, ppo_shared_params):
    rows, statistics = np.zeros((2, 3)), script.RunningMeanStd((3,))
    statistics.update(rows)
    script.normalize(rows, statistics.mean, statistics.var, 10.0)
    script.all_finite(rows)
