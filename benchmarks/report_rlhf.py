"""Tables of ppo_rlhf.py for report.py: the exact test, the experiments with people's ratings, and the details."""

import textwrap

import numpy as np
import pandas as pd
import suites
from tables import Results, difference, markdown, seeds_text, share, with_interval

OTHER_UNITS = ("05", "11", "14", "16", "20")  # details without which the score has another reward model or another unit
CHOSEN_WITH = 3  # seeds of the defaults that were known when their KL target was chosen


def runs_of(r: Results, suite: str, setting: str) -> pd.DataFrame:
    """The runs of a setting by ascending seed; none where nothing was run."""
    return r.groups.get((suite, setting, suites.RLHF[suite][setting][1]), r.runs[:0])


def measured(r: Results, suite: str, setting: str, env: str, measure: str) -> list[tuple[float, float]]:
    """A measure of the evaluations of ppo_rlhf.py before and after the training, by ascending seed."""
    curves = [run["evaluations"] for run in r.groups[suite, setting, env]["curve"]]
    return [(evaluations[0][measure], evaluations[-1][measure]) for evaluations in curves]


def table_rlhf_exact(r: Results) -> str:
    rows = []
    for setting, (_, env, _) in suites.RLHF["rlhf-exact"].items():
        for i, seed in enumerate(r.seeds("rlhf-exact", setting, env)):
            (before, after), (_, best) = (measured(r, "rlhf-exact", setting, env, x)[i] for x in ("objective", "optimum"))
            row = [f"{x:.3f}" for x in (before, after, best)]
            rows.append([setting, str(seed), *row, f"{(after - before) / (best - before):.3f}"])
    head = ["penalty in the reward", "seed", "J of the reference", "J reached", "best J", "share of the way"]
    return markdown(head, rows) + r.footer("rlhf-exact")


def stages_of(r: Results) -> dict[tuple[str, int], dict[int, dict]]:
    """What reward models were like that were trained in the usual way: (who compared, comparisons) -> seed -> figures."""
    found: dict[tuple[str, int], dict[int, dict]] = {}
    for header, curve in zip(r.runs["header"], r.runs["curve"], strict=True):
        args, seed, stages = header["args"], header["seed"], curve.get("stages", {})
        if "reward_model_accuracy" in stages and (args["head_init"], args["reward_pool"]) == ("original", "last"):
            found.setdefault((args["env"], args["num_comparisons"]), {})[seed] = stages
    return found


def table_rlhf_stages(r: Results) -> str:
    """What PPO began with: the reward models, each trained once per seed and shared by the runs of that seed."""
    rows = []
    for (env, count), by_seed in sorted(stages_of(r).items(), reverse=True):
        seeds, who = sorted(by_seed), {"human": "people's ratings", "labels": "VADER"}[env]
        columns = [np.array([[by_seed[s][x]] for s in seeds]) for x in ("supervised_nats", "reward_model_accuracy")]
        agreement = with_interval(columns[1], form="{:.3f}".format)
        rows.append([f"{count:,} comparisons by {who}", with_interval(columns[0]), agreement, seeds_text(seeds)])
    return markdown(["reward model", "supervised model, nats a token", "agrees with people on pairs", "seeds"], rows)


def table_rlhf(r: Results) -> str:
    rows, footers = [], ""
    measures = ("score", "vader", "kl", "ended", "length", "distinct_2")
    for suite in ("rlhf-human", "rlhf-sentiment", "rlhf-overopt", "rlhf-labels"):
        for setting, (_, env, _) in suites.RLHF[suite].items():
            seeds, cells = r.seeds(suite, setting, env), [""] * len(measures)
            if seeds:
                ends = [np.array(measured(r, suite, setting, env, x)) for x in measures]
                cells = [f"{x[:, 0].mean():.2f} -> {with_interval(x[:, 1:], form='{:.2f}'.format)}" for x in ends]
            rows.append([f"{suite}, {setting}", *cells, seeds_text(seeds)])
        footers += r.footer(suite) if len(r.of(suite)) else ""
    head = ["suite, setting", "score", "VADER", "KL", "ended", "length", "distinct pairs", "seeds"]
    return markdown(head, rows) + footers


def fall_of_vader(curve: dict) -> float:
    """From its highest to its last evaluation in the course of training."""
    values = [e["vader"] for e in curve["evaluations"]]
    return max(values) - values[-1]


def gains_at_the_same_kl(free: pd.DataFrame, bound: pd.DataFrame) -> np.ndarray:
    """VADER at the end of each run with the penalty minus that of its seed's run without at the same KL, (runs, 1).

    The latter is read from the line between two evaluations.
    """
    gains = []
    for seed, curve in zip(bound["seed"], bound["curve"], strict=True):
        for other in free[free["seed"] == seed]["curve"]:
            kl, vader = np.array(sorted([e["kl"], e["vader"]] for e in other["evaluations"])).T
            last = curve["evaluations"][-1]
            gains.append([last["vader"] - np.interp(last["kl"], kl, vader)])
    return np.array(gains)


def table_rlhf_overopt(r: Results) -> str:
    """Where VADER was highest in the course of training, and where it and the score ended."""
    rows, text, form = [], "", "{:.2f}".format
    for suite in ("rlhf-human", "rlhf-overopt"):
        groups = {setting: runs_of(r, suite, setting) for setting in ("beta 0", "beta 0.05")}
        for setting, group in groups.items():
            for seed, curve in zip(group["seed"], group["curve"], strict=True):
                best, last = max(curve["evaluations"], key=lambda e: e["vader"]), curve["evaluations"][-1]
                cells = [form(e[x]) for e in (best, last) for x in ("vader", "score", "kl")]
                rows.append([f"{suite}, {setting}", str(seed), *cells, form(fall_of_vader(curve))])
        free, bound = groups.values()
        if not (len(free) and len(bound)):
            continue
        x, y = (np.array([[fall_of_vader(curve)] for curve in group["curve"]]) for group in (free, bound))
        often = [share(int((falls > 0.15).sum()), len(falls)) for falls in (x, y)]
        text += f"\n{suite}: VADER fell by {with_interval(x, form=form)} without the penalty and {with_interval(y, form=form)} "
        text += f"with it, difference {difference(x, y, form)}; by more than 0.15 in {often[0]} and {often[1]}."
        if len(gains := gains_at_the_same_kl(free, bound)):
            text += " VADER at the end with the penalty, minus that without it at the same KL: "
            text += f"{with_interval(gains, form='{:+.2f}'.format)} (n {len(gains)})."
        text += "\n"
    head = ["suite, setting", "seed", "highest VADER", "its score", "its KL", "last VADER", "its score", "its KL", "fall"]
    return markdown(head, rows) + text


def table_rlhf_told(r: Results) -> str:
    """What the README says of language models."""
    on, off = (("rlhf-human", setting, "human") for setting in (suites.RLHF_DEFAULT, "beta 0"))
    if not (r.seeds(*on) and r.seeds(*off)):
        return "Nothing was run yet.\n"
    form = "{:.2f}".format
    accuracy = [[x["reward_model_accuracy"]] for x in stages_of(r).get(("human", 16_000), {}).values()]
    ends = {x: np.array(measured(r, *on, x)) for x in ("score", "vader", "kl", "distinct_2")}
    before = {x: form(values[:, 0].mean()) for x, values in ends.items()}
    after = {x: with_interval(values[:, 1:], form=form) for x, values in ends.items()}
    free = {x: np.array(measured(r, *off, x))[:, 1:] for x in ("vader", "kl")}
    fell = np.array([[fall_of_vader(curve)] for curve in r.groups[off]["curve"]])
    told = f"With {len(ends['score'])} seeds PPO raised the score from {before['score']} to {after['score']}, in deviations of "
    told += f"the reference's scores, at a KL of {after['kl']} nats. VADER is a lexicon of sentiment by the authors of the "
    told += f"ratings; the policy never saw its scores. They rose from {before['vader']} to {after['vader']}. "
    new = [i for i, seed in enumerate(r.seeds(*on)) if seed > CHOSEN_WITH]
    if new:
        alone = [with_interval(ends[x][new, 1:], form=form) for x in ("score", "vader", "kl")]
        told += f"The KL target was chosen with seeds 1 to {CHOSEN_WITH} known; the others alone: score {alone[0]}, VADER "
        told += f"{alone[1]}, KL {alone[2]}. "
    told += f"The texts became more alike: the share of distinct pairs of words fell from {before['distinct_2']} to "
    told += f"{after['distinct_2']}. Without the penalty ({len(fell)} seeds) the KL reached "
    told += f"{with_interval(free['kl'], form=form)}. VADER ended at {with_interval(free['vader'], form=form)}, "
    told += f"{with_interval(fell, form=form)} below its highest value. VADER with the penalty minus that without is "
    told += f"{difference(ends['vader'][:, 1:], free['vader'], form)} ({len(ends['vader'])} and {len(fell)} seeds)."
    if accuracy:
        agreed = with_interval(np.array(accuracy), form="{:.1%}".format)
        told += f" The reward models ({len(accuracy)} seeds) agree with people on {agreed} of unseen pairs."
    return textwrap.fill(told, 124) + "\n"


def table_rlhf_details(r: Results) -> str:
    """Each detail off beside all on, after the training; differences are within a seed, whose models both share."""
    all_on, measures = ("rlhf-human", "beta 0.05", "human"), ("score", "kl", "ended", "vader", "distinct_2")
    rows: list[list[str]] = []
    on = {x: dict(zip(r.seeds(*all_on), measured(r, *all_on, x), strict=True)) for x in measures if r.seeds(*all_on)}
    keys = {"all on, beta 0.05": all_on, f"04 {suites.RLHF_DEFAULT}, the default": ("rlhf-human", suites.RLHF_DEFAULT, "human")}
    for name, key in (keys | {s: ("rlhf-details", s, "human") for s in suites.RLHF_DETAILS}).items():
        if on and (seeds := [seed for seed in r.seeds(*key) if seed in on["score"]]):
            cells = []
            for x in measures:
                ends = dict(zip(r.seeds(*key), (after for _, after in measured(r, *key, x)), strict=True))
                gaps = [[ends[seed] - on[x][seed][1]] for seed in seeds]
                comparable = key != all_on and not (x == "score" and name[:2] in OTHER_UNITS)
                told = with_interval(np.array(gaps), form="{:+.2f}".format) if comparable else ""
                cells += [f"{np.mean([ends[seed] for seed in seeds]):.2f}", *([told] if x in measures[:3] else [])]
            rows.append([name, *cells, seeds_text(seeds)])
    gap = "minus first row"
    head = ["changed", "score", gap, "KL", gap, "ended", gap, "VADER", "distinct pairs", "seeds"]
    footer = r.footer("rlhf-details") if len(r.of("rlhf-details")) else "\nNo detail was switched off yet.\n"
    return markdown(head, rows) + footer


def rlhf_data(r: Results) -> dict:
    """suite -> setting -> seed -> KL, score and VADER of each evaluation in the course of training."""
    data: dict = {}
    for suite in ("rlhf-human", "rlhf-overopt"):
        for setting in suites.RLHF[suite]:
            group = runs_of(r, suite, setting)
            for seed, curve in zip(group["seed"], group["curve"], strict=True):
                points = [[round(e[x], 4) for x in ("kl", "score", "vader")] for e in curve["evaluations"]]
                data.setdefault(suite, {}).setdefault(setting, {})[str(seed)] = points
    return data
