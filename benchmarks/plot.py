"""Learning curves, a final table and differences with intervals, of any runs: your own, a sweep, or stored results.

    python benchmarks/plot.py runs/*                                     a setting is whatever the runs differ in
    python benchmarks/plot.py runs/* --by clip_coef num_envs             or name it yourself
    python benchmarks/plot.py benchmarks/results/base benchmarks/results/figure3 --by setting --out curves.svg

A path is a run directory, a result file (*.jsonl.gz), or a folder that holds some. A score is the mean return of the last
100 training episodes. Intervals are 95% bootstrap intervals over runs; with three runs such an interval is their range.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import stats
from results import RunnerError, is_stopped_early, read_result, settings_of, summarize

# The look of every plot in this repository: color, line, marker.
STYLES = (
    ("black", "-", "o"),
    ("#c0392b", "--", "s"),
    ("#7f8c8d", "-.", "^"),
    ("#2471a3", ":", "D"),
    ("#b9770e", "-", "v"),
    ("#1e8449", "--", "P"),
)
LOOK: Any = {  # of matplotlib
    **{"font.size": 8, "axes.titlesize": 9, "axes.labelsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.25, "legend.fontsize": 8, "legend.frameon": False},
    **{"lines.linewidth": 1.2, "lines.markersize": 4, "hatch.linewidth": 0.6, "svg.hashsalt": "ppo"},
}


def number(x: float) -> str:
    """Four or so significant digits, without an exponent."""
    digits = 0 if abs(x) >= 100 else 1 if abs(x) >= 20 else 2
    return f"{x:.{digits}f}".replace("-0.00", "0.00")


def form_for(scores: np.ndarray) -> Callable[[float], str]:
    """number(), or where all scores are small, three significant digits of the largest."""
    largest = float(np.abs(scores).max())
    if largest >= 0.1 or largest == 0:
        return number
    digits = min(2 - math.floor(math.log10(largest)), 15)
    return lambda x: f"{x:.{digits}f}"


def brackets(low: float, high: float, form: Callable[[float], str] = number) -> str:
    return f" [{form(low)}, {form(high)}]"


def pyplot():
    """matplotlib.pyplot with the look of this repository. It is imported late: a check of the plots does without it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(LOOK)
    return plt


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def band(curves: list[dict]) -> dict:
    """Mean and 95% interval over runs at each step of the shortest run, from where all have a finished episode.

    curves: as in result files, {"global_step": [...], "return": [...]}, None before the first episode. Whole curves are
    resampled: the same runs at all points. The others are interpolated where their steps differ.
    """
    points = [[(s, r) for s, r in zip(c["global_step"], c["return"], strict=True) if r is not None] for c in curves]
    first = max(run[0][0] for run in points)
    steps = [step for step, _ in min(points, key=lambda run: run[-1][0]) if step >= first]
    returns = np.array([np.interp(steps, [s for s, _ in run], [x for _, x in run]) for run in points])  # (runs, points)
    resampled = returns[np.random.default_rng(0).integers(len(returns), size=(2000, len(returns)))].mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    rounded = {"mean": returns.mean(axis=0), "low": low, "high": high}
    return {"steps": steps, **{k: v.round(3).tolist() for k, v in rounded.items()}, "seeds": len(returns)}


def draw_curves(data: dict, plt, labels: list[str] | None = None):
    """A panel for each task, a line and a band for each setting: {task: {setting: band(...)}}.

    labels: all settings, in the order of their looks and of the legend; else as they come.
    """
    labels = labels or list(dict.fromkeys(label for settings in data.values() for label in settings))
    columns = min(4, len(data))
    rows = -(-len(data) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(max(3.1 * columns, 4.5), 2.6 * rows), squeeze=False)
    lines: dict = {}
    unit = 1e6 if max(c["steps"][-1] for settings in data.values() for c in settings.values()) > 4e5 else 1e3
    for axis, (env, settings) in zip(axes.flat, data.items(), strict=False):
        for label, curve in settings.items():
            i = labels.index(label)
            color, line, marker = STYLES[i % len(STYLES)]
            if i >= len(STYLES):  # the colors again, each with another line and marker
                _, line, marker = STYLES[(i + i // len(STYLES)) % len(STYLES)]
            face = "white" if marker in "sDP" else color
            steps = np.array(curve["steps"]) / unit
            every = max(len(steps) // 8, 1)
            look: dict[str, Any] = {"color": color, "marker": marker, "mfc": face, "markevery": (i * every // 3, every)}
            (lines[label],) = axis.plot(steps, curve["mean"], line, **look)
            axis.fill_between(steps, curve["low"], curve["high"], color=color, alpha=0.18, lw=0)
        seeds = sorted({curve["seeds"] for curve in settings.values()})
        axis.set_title(f"{env} ({' or '.join(map(str, seeds))} seed{'s' if seeds != [1] else ''})")
        axis.set_xlabel("million steps" if unit == 1e6 else "thousand steps")
    for axis in axes.flat[len(data) :]:
        axis.axis("off")
    axes.flat[0].set_ylabel("return, last 100 episodes")
    below = 0.0  # share of the height that the legend takes
    shown = [label for label in labels if label in lines]  # a run may be too short for a curve
    if len(lines) > 1:
        free = len(data) < axes.size  # a panel is free for the legend; else it goes below
        wide = 1 if free else max(1, min(len(lines), int(figure.get_figwidth() * 14) // (max(map(len, lines)) + 8)))
        where = "lower right" if free else "lower center"
        figure.legend([lines[label] for label in shown], shown, loc=where, ncols=wide, handlelength=4)
        below = 0.0 if free else (0.1 + 0.2 * -(-len(lines) // wide)) / figure.get_figheight()
    figure.tight_layout(rect=(0, below, 1, 1))
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def find_runs(paths: list[Path]) -> list[Path]:
    """Run directories and result files among these paths and in folders below them."""
    found = []
    for path in paths:
        if not path.exists():
            raise RunnerError(f"{path} does not exist")
        inside = sorted([*path.rglob("metrics.jsonl"), *path.rglob("*.jsonl.gz")]) if path.is_dir() else [path]
        found += [file.parent if file.name == "metrics.jsonl" else file for file in inside]
    found = [file for file in found if file.is_dir() or file.name.endswith(".jsonl.gz")]  # runs/* names logs, too
    if not found:
        raise RunnerError(f"no run directory and no result file in {', '.join(map(str, paths))}")
    return list(dict.fromkeys(found))


def read_runs(files: list[Path]) -> pd.DataFrame:
    """One row a run. A run without a finished episode, or that cannot be read, is left out with a sentence."""
    rows = []
    for file in files:
        try:
            if file.is_dir():
                header, final, curve = summarize(file, "", file.name.split("__")[0], stopped=True)
            else:
                header, final, curve = read_result(file).values()
            if final["return"] is None:
                raise RunnerError(f"{file} has no finished episode")
        except RunnerError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        args = header["args"]
        if "num_steps" in args and is_stopped_early(args, final["global_step"]):
            print(f"not finished: {file}, {final['global_step']:,} of {args['total_timesteps']:,} steps", file=sys.stderr)
        steps, keys = final["global_step"], {k: header.get(k) for k in ("setting", "suite", "script", "script_sha256")}
        keys |= {k: v for k, v in settings_of(args).items() if k != "env"}
        if steps > args.get("total_timesteps", math.inf):  # extended by --resume; its header says what was asked for at first
            keys["total_timesteps"] = steps
        rows.append({"file": file, "env": header["env"], "seed": header["seed"], "keys": keys, "steps": steps})
        rows[-1] |= {"score": final["return"], "curve": curve}
    if not rows:
        raise RunnerError("there is nothing to plot")
    return pd.DataFrame(rows)


def value_order(values: tuple) -> list:
    """Sorting key: numbers by size, then words, with the numbers in them by size."""
    return [(0, v, []) if isinstance(v, int | float) else (1, 0, word_parts(str(v))) for v in values]


def word_parts(text: str) -> list:
    """Text and numbers in turn: "fixed KL 10" -> ["fixed KL ", 10.0, ""]"""
    return [float(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", text))]


def name_settings(runs: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Adds the column `label`, made of the keys in `by`, else of the arguments in which the runs differ."""
    keys = pd.DataFrame(list(runs["keys"]), dtype=object).map(lambda v: v if isinstance(v, int | float | str) else str(v))
    # what only some scripts, or newer ones, have counts where those that have it differ
    differing = [k for k in keys if k not in ("setting", "suite", "script_sha256") and keys[k].nunique() > 1]
    by = [key.replace("-", "_") for key in by] or differing
    for key in by:
        if key not in keys:
            raise RunnerError(f"no run has an argument {key}; they differ in: {', '.join(differing) or 'nothing'}")
    keys[by] = keys[by].astype(object).fillna("-")
    values = [tuple(row) for row in keys[by].itertuples(index=False)] if by else [()] * len(runs)
    order = sorted(set(values), key=value_order)
    plain = len(by) == 1 and by[0] in ("setting", "script", "suite")
    names = {v: ", ".join(str(x) if plain else f"{k}={x}" for k, x in zip(by, v, strict=True)) or "all runs" for v in order}
    runs = runs.assign(label=pd.Categorical([names[v] for v in values], [names[v] for v in order]))
    for label, group in keys.groupby(runs["label"], observed=True):
        if mixed := [k for k in differing if group[k].nunique() > 1]:
            print(f"warning: {label} mixes runs that differ in {', '.join(mixed)}; --by tells them apart", file=sys.stderr)
        elif (versions := group["script_sha256"].nunique()) > 1:
            print(f"{label}: from {versions} versions of the script", file=sys.stderr)
    runs = runs.sort_values("steps", ascending=False, kind="stable")  # of two attempts the one that came further
    again = runs.duplicated(["label", "env", "seed"])
    for file in runs["file"][again]:
        print(f"left out: {file} has the setting, task and seed of another run", file=sys.stderr)
    return runs[~again].sort_values(["env", "label", "seed"])


def interval_cells(scores: np.ndarray, form: Callable[[float], str]) -> list[str]:
    """low and high of scores (runs, 1); empty for one run, which has no interval."""
    return [form(x) for x in stats.interval(scores)] if len(scores) > 1 else ["", ""]


def final_table(runs: pd.DataFrame) -> pd.DataFrame:
    """n, mean and interval of each setting on each task."""
    rows = []
    for (env, label), group in runs.groupby(["env", "label"], observed=True):
        scores = group["score"].to_numpy()[:, None]
        steps = sorted(set(group["steps"]))
        lengths = " to ".join(f"{step:,}" for step in steps[:: max(len(steps) - 1, 1)])
        form = form_for(runs["score"][runs["env"] == env])
        rows.append([env, label, len(group), form(scores.mean()), *interval_cells(scores, form), lengths])
    return pd.DataFrame(rows, columns=["task", "setting", "n", "mean", "low", "high", "steps"])


def difference_table(runs: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Mean of each setting minus that of the baseline, on each task where both were run."""
    rows = []
    for env, task in runs.groupby("env"):
        form = form_for(task["score"])
        scores = {label: group["score"].to_numpy()[:, None] for label, group in task.groupby("label", observed=True)}
        for label, x in scores.items():
            if label == baseline or baseline not in scores:
                continue
            y = scores[baseline]
            cells = [form(v) for v in stats.difference_interval(x, y)] if min(len(x), len(y)) > 1 else ["", ""]
            rows.append([env, label, f"{len(x)} and {len(y)}", form(x.mean() - y.mean()), *cells])
    return pd.DataFrame(rows, columns=["task", "setting", "n", "difference", "low", "high"])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="run directories, result files, or folders of them")
    parser.add_argument("--by", nargs="+", default=[], help="arguments that make a setting; also: setting, suite, script")
    parser.add_argument("--baseline", help="setting that the others are compared with; default: the first")
    parser.add_argument("--out", type=Path, default=Path("plot.png"), help="file of the plot: .png, .svg or .pdf")
    options = parser.parse_args(argv)
    if options.out.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--out {options.out}: the name must end in .png, .svg or .pdf")
    try:
        runs = name_settings(read_runs(find_runs(options.paths)), options.by)
        labels = list(runs["label"].cat.categories)
        if options.baseline and options.baseline not in labels:
            raise RunnerError(f"there is no setting {options.baseline}; settings: {'; '.join(labels)}")
        baseline = options.baseline or labels[0]
        data: dict = {}
        for (env, label), group in runs.groupby(["env", "label"], observed=True):
            if (curve := band(list(group["curve"])))["steps"]:
                data.setdefault(env, {})[label] = curve
            else:
                print(f"no curve of {label} on {env}: its runs have no steps in common", file=sys.stderr)
        if data:
            draw_curves(data, pyplot(), labels).savefig(options.out, dpi=150)
        print(final_table(runs).to_string(index=False))
        if len(labels) > 1:
            differences = difference_table(runs, baseline)
            table = "no task has both" if differences.empty else differences.to_string(index=False)
            print(f"\neach setting minus {baseline}\n{table}")
        if (counts := runs.groupby(["env", "label"], observed=True).size()).min() < 5:
            print(f"\nthe smallest n is {counts.min()}: below 5 intervals are too narrow (benchmarks/README.md, Protocol)")
        print(f"\n{len(runs)} run{'s' if len(runs) > 1 else ''} -> {options.out if data else 'no plot'}")
    except (RunnerError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
