"""Statistics of scores over seeds and tasks, by the definitions of Agarwal et al. 2021 (the library rliable).

Scores are arrays (runs, tasks): one row a seed, one column a task.
"""

import numpy as np

REPETITIONS = 10_000  # of the bootstrap


def last_100(returns: list[float]) -> float:
    """Mean of the last 100 episode returns, of all where there are fewer; NaN without any."""
    return float(np.mean(returns[-100:])) if returns else float("nan")


def normalize(scores: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(scores - low) / (high - low) for scores (..., tasks) and low, high (tasks,): low becomes 0 and high 1."""
    return (scores - low) / (high - low)


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over the last two axes: (..., runs, tasks) -> (...)."""
    return scores.mean(axis=(-2, -1))


def median(scores: np.ndarray) -> np.ndarray:
    """Median over the tasks of the mean over runs: (..., runs, tasks) -> (...)."""
    return np.median(scores.mean(axis=-2), axis=-1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean: the mean of all runs of all tasks without the lowest and the highest quarter (rounded down)."""
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    return flat[..., cut : flat.shape[-1] - cut].mean(axis=-1)


def resample(scores: np.ndarray, rng: np.random.Generator, repetitions: int = REPETITIONS) -> np.ndarray:
    """Stratified bootstrap: within each task, runs drawn with replacement; (runs, tasks) -> (repetitions, runs, tasks)."""
    runs, tasks = scores.shape
    return scores[rng.integers(runs, size=(repetitions, runs, tasks)), np.arange(tasks)]


def interval(scores: np.ndarray, aggregate=mean, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of aggregate(scores) by the stratified bootstrap."""
    values = aggregate(resample(scores, np.random.default_rng(seed)))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference_interval(
    x: np.ndarray, y: np.ndarray, aggregate=mean, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of aggregate(x) - aggregate(y), both resampled; their numbers of runs may differ."""
    rng = np.random.default_rng(seed)
    values = aggregate(resample(x, rng)) - aggregate(resample(y, rng))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2 for a random run of each, averaged over tasks (Mann-Whitney).

    x: (..., runs of X, tasks), y: (..., runs of Y, tasks) -> (...)
    """
    difference = x[..., :, None, :] - y[..., None, :, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean(axis=(-3, -2, -1))


def probability_of_improvement_interval(
    x: np.ndarray, y: np.ndarray, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of probability_of_improvement by the stratified bootstrap."""
    rng = np.random.default_rng(seed)
    values = probability_of_improvement(resample(x, rng), resample(y, rng))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson(count: int, runs: int) -> tuple[float, float]:
    """95% interval of Wilson 1927 for the probability of an event that happened in `count` of `runs` independent runs."""
    z = 1.959964
    middle, half = count + z * z / 2, z * float(np.sqrt(count * (runs - count) / runs + z * z / 4))
    return (middle - half) / (runs + z * z), (middle + half) / (runs + z * z)
