"""The plots of report.py that plot.py has not: the paper's Table 1, the effect of details, the measured KL,
the score of a language model against its KL.

Each takes data that are plain numbers and gives a figure. The digest of both is stored in the SVG file, so that a check
needs no drawing.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plot
import suites
from plot import STYLES, brackets, number

ALL_ON = "all on (suite base)"
KL_TARGET = 0.01

TABLE1_BOTTOM = -0.6  # of the plot: a bar that goes below it is cut off and says its score, so that the others stay readable


def draw_table1(data: dict, plt):
    settings = list(data["paper"])
    series = {"paper": {s: [x, x, x] for s, x in data["paper"].items()}, **data["ours"]}
    figure, axis = plt.subplots(figsize=(9, 3.8))
    width = 0.8 / len(series)
    looks = (("white", "////"), ("#dcdcdc", ""), ("#a0a0a0", ""), ("#606060", ""))
    for i, (label, bars) in enumerate(series.items()):
        x = [settings.index(s) + (i - (len(series) - 1) / 2) * width for s in bars]
        mean, low, high = (np.array([bars[s][k] for s in bars]) for k in range(3))
        errors = [mean - low, high - mean] if (high > low).any() else None  # one seed has no interval
        look = {"color": looks[i][0], "hatch": looks[i][1], "edgecolor": "black", "lw": 0.7}
        axis.bar(x, mean, width, yerr=errors, label=label, error_kw={"lw": 1.2, "capsize": 2}, **look)
        for left, *score in zip(x, mean, low, high, strict=True):
            if score[0] < TABLE1_BOTTOM:
                text = f" {number(score[0])}{brackets(*score[1:])}"
                place = (round(left) + 0.45, TABLE1_BOTTOM + 0.03 + 0.09 * i)  # beside all bars of the setting
                line = {"arrowstyle": "->", "lw": 0.8, "relpos": (0, 0.5), "shrinkB": 0}
                axis.annotate(text, (left, TABLE1_BOTTOM + 0.05 + 0.09 * i), place, arrowprops=line)
    axis.axhline(0, color="black", lw=0.8)
    if axis.get_ylim()[0] < TABLE1_BOTTOM:
        axis.set_ylim(TABLE1_BOTTOM, 1.05)
    axis.set_xticks(range(len(settings)), settings, rotation=30, ha="right")
    axis.set_ylabel("normalized score\n(random policy 0, best run 1)")
    axis.grid(axis="x", visible=False)
    axis.legend(frameon=True)
    figure.tight_layout()
    return figure


def draw_details(data: dict, plt):
    """One panel a task, with its runs; where settings have a whole seed of all tasks, a forest plot of their effects."""
    settings = [s for s in suites.DETAILS if any(s in runs for runs in data["tasks"].values())]
    panels = len(data["tasks"]) + bool(data["effects"])
    size = (2.6 * panels + 2.2, 0.24 * len(settings) + 1.1)
    figure, axes = plt.subplots(1, panels, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (env, runs) in zip(axes.flat, data["tasks"].items(), strict=False):
        axis.axvspan(min(runs[ALL_ON]), max(runs[ALL_ON]), color="#dddddd", lw=0)
        axis.axvline(1, color="black", lw=0.8, ls=":")
        for y, setting in enumerate(settings):
            scores = runs.get(setting, [])
            axis.plot(scores, [y] * len(scores), "o", color="black", mfc="white")
            if len(scores) > 1:
                axis.plot(np.mean(scores), y, "|", color="black", markersize=11, mew=1.6)
        axis.set_title(f"{env}: score of each run")
        axis.set_xlabel("random policy 0, all details on 1;\nshaded: runs with all on")
    if data["effects"]:
        axis = axes.flat[-1]
        axis.axvline(0, color="black", lw=0.8, ls=":")
        for setting, effect in data["effects"].items():
            y = settings.index(setting)
            axis.plot([effect["low"], effect["high"]], [y, y], "-", color="black")
            clear = effect["low"] < effect["high"] and (effect["low"] > 0 or effect["high"] < 0)  # one seed has no interval
            axis.plot(effect["mean"], y, "s", color="black", mfc="black" if clear else "white")
        axis.set_title("effect, mean over the tasks")
        axis.set_xlabel("95% interval, none with one seed;\nfilled: without 0")
    axes.flat[0].set_yticks(range(len(settings)), settings)
    axes.flat[0].invert_yaxis()
    return figure


def draw_kl(data: dict, plt):
    figure, axes = plt.subplots(1, len(data), figsize=(max(2.9 * len(data), 4), 2.7), squeeze=False, sharey=True)
    for axis, (env, by_seed) in zip(axes.flat, data.items(), strict=True):
        axis.axhspan(KL_TARGET / 3, 3 * KL_TARGET, color="#dddddd", lw=0, label="factor 3 around the target")
        axis.axhline(KL_TARGET, color="black", lw=0.8, ls=":")
        for (seed, points), (color, line, _) in zip(by_seed.items(), STYLES * 9, strict=False):
            steps, kls = zip(*points, strict=True)
            axis.plot(np.array(steps) / 1e6, kls, line, color=color, label=f"seed {seed}")
        tenth = max(step for points in by_seed.values() for step, _ in points) / 1e7
        axis.axvline(tenth, color="black", lw=0.6, ls="--", label="a tenth of training")
        axis.set_yscale("log")
        axis.set_title(env)
        axis.set_xlabel("million steps")
    axes.flat[0].set_ylabel("KL of an update, mean of about 5")
    axes.flat[-1].legend(loc="lower left")
    figure.tight_layout()
    return figure


def draw_rlhf(data: dict, plt):
    """A row for each suite: the score that PPO maximizes and VADER against the root of the KL; a line for each run.

    data: {suite: {setting: {seed: [[KL, score, VADER], ...]}}}, a point for each evaluation in the course of training.
    """
    figure, axes = plt.subplots(len(data), 2, figsize=(7.5, 2.7 * len(data)), squeeze=False, layout="constrained")
    styles = dict(zip(dict.fromkeys(s for settings in data.values() for s in settings), STYLES, strict=False))
    for row, (suite, settings) in zip(axes, data.items(), strict=True):
        for setting, by_seed in settings.items():
            color, line, marker = styles[setting]
            look = {"color": color, "marker": marker, "mfc": "white" if marker in "sDP" else color, "markersize": 4}
            for i, points in enumerate(by_seed.values()):
                kl, *measures = np.array(points).T
                for axis, values in zip(row, measures, strict=True):
                    axis.plot(np.sqrt(np.maximum(kl, 0)), values, line, label=None if i else setting, **look)
        row[0].set_title(f"{suite}: what PPO maximizes")
        row[1].set_title(f"{suite}: VADER")
        row[0].set_ylabel("score (deviations of the\nreference's samples)")
        row[1].set_ylabel("VADER (-1 to 1)")
        row[0].legend(loc="best")
    for axis in axes[-1]:
        axis.set_xlabel("square root of the KL of a response (nats)")
    return figure


def digest(data: dict, draw: Callable) -> str:
    text = json.dumps([data, STYLES, plot.LOOK], sort_keys=True) + inspect.getsource(draw)
    return hashlib.sha256(text.encode()).hexdigest()


def stored_digest(file: Path) -> str | None:
    found = re.search(r"digest ([0-9a-f]{64})", file.read_text()) if file.is_file() else None
    return found.group(1) if found else None


def draw_plot(file: Path, data: dict, draw: Callable):
    """Draws an SVG that is the same on every call, with its digest as description."""
    plt = plot.pyplot()
    figure = draw(data, plt)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None, "Description": f"digest {digest(data, draw)}"})
    plt.close(figure)
