"""Tables of the paper's Table 1 for report.py: each configuration, its levels, its distance from the paper, its collapses."""

import itertools

import numpy as np
import pandas as pd
import stats
import suites
from figures import ALL_ON
from plot import number
from tables import Results, difference, markdown, seeds_text, share, with_interval

BASE = ("base", "default")
NO_CLIPPING, CLIP_02 = "no clipping or penalty", "clipping 0.2"
UNLIMITED = ("unlimited", CLIP_02)
CONFIGURATIONS = {
    "table1": "as printed",
    "table1-normalized": "observations normalized",
    "table1-details": "all details",
}


def table1_seeds(r: Results, suite: str) -> list[int]:
    """Seeds that were run with every setting on every task."""
    return sorted(set.intersection(*(set(r.complete_seeds(suite, s, suites.MUJOCO)) for s in suites.TABLE1)))


def table1_scores(r: Results, suite: str, best: str, zero: str = "uniform") -> dict[str, np.ndarray]:
    """Normalized scores (seeds, tasks) of each setting, over table1_seeds: a policy without training 0, best result 1.

    best: "run", the best single run of the task, or "setting", the best mean over seeds of a setting. zero: the "uniform"
    random policy or the "initial" one. Both are held fixed in the bootstrap. Empty before the first such seed, since the
    best is not known until then.
    """
    envs, seeds = suites.MUJOCO, table1_seeds(r, suite)
    low = r.random_means(envs) if zero == "uniform" else r.initial_means(suite, envs)
    if low is None or not seeds:
        return {}
    matrices = {s: r.matrix(suite, s, envs, seeds) for s in suites.TABLE1}
    tops = np.max([x.max(axis=0) if best == "run" else x.mean(axis=0) for x in matrices.values()], axis=0)
    return {s: stats.normalize(x, low, tops) for s, x in matrices.items()}


def table1(r: Results, suite: str) -> str:
    """Table 1 of the paper beside ours, and the returns that it was made of."""
    by_run, by_setting = (table1_scores(r, suite, best) for best in ("run", "setting"))
    rows = []
    for row in r.csv("table1.csv"):
        s, cells = row["setting"], [""] * 3
        if by_run:
            cells = [with_interval(by_run[s]), with_interval(by_setting[s]), with_interval(by_run[s], stats.iqm)]
        compared = difference(by_run[s], by_run[CLIP_02], "{:+.2f}".format) if by_run and s != CLIP_02 else ""
        rows.append([s, row["score"], *cells, seeds_text(r.complete_seeds(suite, s, suites.MUJOCO)), compared])
    head = ["setting", "paper", "ours, best run = 1", "ours, best setting = 1", "ours, IQM, best run = 1", "whole seeds run"]
    text = markdown([*head, "minus clipping 0.2, best run = 1"], rows)
    if by_run:
        text += f"\nScores are of the seeds that every setting has: {seeds_text(table1_seeds(r, suite))}.\n"
    rows = [[s, *(r.cell(suite, s, env) for env in suites.MUJOCO)] for s in suites.TABLE1]
    return text + "\n" + markdown(["return", *suites.MUJOCO], rows) + r.footer(suite)


def table_table1(r: Results) -> str:
    return table1(r, "table1")


def table_table1_normalized(r: Results) -> str:
    return table1(r, "table1-normalized")


def table_table1_details(r: Results) -> str:
    return table1(r, "table1-details")


def table_table1_short(r: Results) -> str:
    """For the README: the paper's eleven scores beside both configurations, uniform policy 0, best run 1."""
    columns = {name: table1_scores(r, suite, "run") for suite, name in list(CONFIGURATIONS.items())[:2]}
    names = list(columns)[::-1]  # what is nearest to the paper first
    rows = [
        [row["setting"], row["score"], *(with_interval(x[row["setting"]]) if (x := columns[name]) else "" for name in names)]
        for row in r.csv("table1.csv")
    ]
    seeds = {name: len(columns[name][CLIP_02]) if columns[name] else 0 for name in names}
    return markdown(["Table 1", "paper", *(f"{name} (n {seeds[name]})" for name in names)], rows)


def table_levels(r: Results) -> str:
    """Clipping 0.2 on each task beside the paper's Figure 3, which is of the same setting."""
    other = {x["env"]: x["mean"] for x in r.csv("mujoco_ppo_published.csv") if x["source"].endswith("read by 37-details blog")}
    keys = [("table1", CLIP_02), UNLIMITED, ("table1-normalized", CLIP_02), BASE]
    rows = []
    for row in r.csv("figure3.csv"):
        ours = [r.cell(*key, row["task"]) for key in keys]
        n = ", ".join(str(len(r.seeds(*key, row["task"]))) for key in keys)
        rows.append([f"{row['task']}-v4", row["paper (figure read)"], other.get(row["task"], ""), *ours, n])
    head = [
        "clipping 0.2",
        "paper, Figure 3",
        "another reading of it",
        CONFIGURATIONS["table1"],
        "as printed, raw observations unlimited",
        CONFIGURATIONS["table1-normalized"],
        ALL_ON,
        "runs of each",
    ]
    return markdown(head, rows)


def table_distance(r: Results) -> str:
    """Root mean square distance from the paper's eleven scores, by configuration, zero point and reading of "best"."""
    paper = {row["setting"]: float(row["score"]) for row in r.csv("table1.csv")}
    rows, found = [], {}
    for suite, name in CONFIGURATIONS.items():
        for zero, best in itertools.product(("uniform", "initial"), ("run", "setting")):
            scores, cells = table1_scores(r, suite, best, zero), [""] * 4
            if scores:
                off = pd.Series({s: float(stats.mean(x)) - paper[s] for s, x in scores.items()})
                rms, others = (float((x**2).mean() ** 0.5) for x in (off, off.drop(NO_CLIPPING)))
                found[f"{name}, {zero} policy 0, best {best} 1"] = rms
                row = scores[NO_CLIPPING]
                cells = [f"{rms:.2f}", f"{others:.2f}", with_interval(row), str(len(row))]
            rows.append([name, zero, f"best {best}", *cells])
    head = ["configuration", "0 is the policy", "1 is the", "distance, eleven rows", "without the first row"]
    nearest = min(found, key=found.__getitem__, default="")
    text = f"\nNearest over the eleven rows: {nearest} ({found[nearest]:.2f}).\n" if found else ""
    return markdown([*head, f"{NO_CLIPPING} (paper: -0.39)", "seeds"], rows) + text


def table_collapse(r: Results) -> str:
    """The row without clipping or penalty: how often a run ends where it learned nothing."""
    rows = []
    for suites_of, name in ((("table1",), "as printed"), (("table1-normalized", "collapse"), "observations normalized")):
        for env in suites.MUJOCO:
            scores = np.concatenate([r.scores(suite, NO_CLIPPING, env) for suite in suites_of]).ravel()
            learned, low = r.scores(suites_of[0], CLIP_02, env), r.random_means([env])
            cells = [""] * 3
            if len(scores) and low is not None:
                cells = [share(int((scores < low).sum()), len(scores)), "", number(float(np.median(scores)))]
                cells[2] += f" ({number(scores.min())} to {number(scores.max())})"
                if len(learned):
                    cells[1] = share(int((scores < low + (learned.mean() - low) / 10).sum()), len(scores))
            rows.append([name, f"{env}-v4", *cells])
    head = ["configuration", "task", "ends below the uniform policy", "below a tenth of clipping 0.2", "median (range)"]
    return markdown(head, rows)


def table1_data(r: Results) -> dict:
    data: dict = {}
    for suite, name in CONFIGURATIONS.items():
        for setting, scores in table1_scores(r, suite, "run").items():
            low, high = stats.interval(scores) if len(scores) > 1 else (float(stats.mean(scores)),) * 2
            data.setdefault(f"ours, {name}", {})[setting] = [round(float(x), 4) for x in (stats.mean(scores), low, high)]
    paper = {row["setting"]: float(row["score"]) for row in r.csv("table1.csv")}
    return {"paper": paper, "ours": data} if data else {}
