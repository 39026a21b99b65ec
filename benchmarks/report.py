"""Tables and plots from benchmarks/results/ alone, offline.

    python benchmarks/report.py            rewrite the tables of README.md and benchmarks/RESULTS.md, and the plots
    python benchmarks/report.py --check    exit code 1 where one of them is not what results/ say

A table stands between the lines `<!-- table:NAME -->` and `<!-- /table -->`; the functions table_NAME below write them. What
was not run stays empty. Intervals are 95% stratified bootstrap intervals over seeds (stats.py); of one seed there is none.
"""

import argparse
import functools
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import figures
import numpy as np
import pandas as pd
import plot
import report_rlhf
import report_table1
import stats
import suites
from figures import ALL_ON, KL_TARGET
from plot import brackets, number
from report_table1 import BASE, CLIP_02, CONFIGURATIONS, NO_CLIPPING, UNLIMITED
from results import RESULTS, RunnerError, is_stopped_early
from tables import Results, difference, markdown, seeds_text, share, with_extremes, with_interval

HERE = Path(__file__).resolve().parent
ALGORITHMS = {"PPO": BASE, "TRPO": ("figure3", "TRPO"), "A2C": ("figure3", "A2C")}
KL_SETTING = "adaptive KL 0.01"
ATARI = ("table6", "bfloat16")
ATARI_LABELS = {s: "float32" if s == "default" else s for _, s, *_ in suites.ATARI_SHORT}
MODES = 2400.0  # return that parts the two kinds of runs on HalfCheetah


# ---------------------------------------------------------------------------------------------------------------------
# MuJoCo


def table_base(r: Results) -> str:
    rows = []
    for env in suites.MUJOCO:
        steps = f"{r.groups[*BASE, env]['steps'].iloc[0]:,}" if (*BASE, env) in r.groups else ""
        rows.append([f"{env}-v4", r.cell(*BASE, env), seeds_text(r.seeds(*BASE, env)), steps])
    head = ["task", "return, last 100 episodes [95% interval]", "seeds", "steps"]
    return markdown(head, rows) + r.footer("base")


def table_modes(r: Results) -> str:
    """The two kinds of runs on HalfCheetah."""
    scores, rows = r.scores(*BASE, "HalfCheetah").ravel(), []
    for name, kind in ((f"below {MODES:.0f}", scores[scores < MODES]), (f"above {MODES:.0f}", scores[scores >= MODES])):
        span = f"{number(kind.min())} to {number(kind.max())}" if len(kind) else ""
        rows.append([name, share(len(kind), len(scores)) if len(scores) else "", span])
    return markdown(["HalfCheetah-v4 ends", "share of runs [95% Wilson interval]", "returns"], rows)


def table_published(r: Results) -> str:
    reference = r.csv("figure3.csv")
    head = ["task", "ours, v4", "Stable-Baselines3, same settings, v4", *list(reference[0])[1:], "outside our interval"]
    rows = []
    for row in reference:
        task, *published = row.values()
        scores, outside = r.scores(*BASE, task), []
        if len(scores) > 1:
            low, high = stats.interval(scores)
            values = {name: float(re.split("[±~]", text.lstrip("~"))[0]) for name, text in list(row.items())[1:] if text}
            outside = [name.split(" (")[0] for name, value in values.items() if not low <= value <= high]
        rows.append([task, r.cell(*BASE, task), r.cell("peer", "SB3 PPO", task), *published, ", ".join(outside)])
    return markdown(head, rows)


def table_figure3(r: Results) -> str:
    rows = [[f"{env}-v4", *(r.cell(*key, env) for key in ALGORITHMS.values())] for env in suites.MUJOCO]
    text = r.footer("figure3") if len(r.of("figure3")) else "\nTRPO and A2C have not been run yet.\n"
    return markdown(["task", *ALGORITHMS], rows) + text


def table_second_hand(r: Results) -> str:
    rows = [
        [row["task"], *(cell for name, key in ALGORITHMS.items() for cell in (row[name], r.cell(*key, row["task"])))]
        for row in r.csv("second_hand_mujoco.csv")
    ]
    return markdown(["task", *(f"{name}, {which}" for name in ALGORITHMS for which in ("claimed", "ours"))], rows)


CARTPOLE, BREAKOUT, LARGER = ("CartPole-v1",), ("Breakout",), "bfloat16, larger updates"
SHARED, SEPARATE = (("discrete", f"{kind}, unscaled rewards") for kind in ("shared", "separate"))
COMPARISONS: list[tuple[str, tuple[str, str], tuple[str, str], tuple[str, ...]]] = [  # name, x, what x is compared with, tasks
    ("TRPO minus PPO", ALGORITHMS["TRPO"], BASE, suites.MUJOCO),
    ("A2C minus PPO", ALGORITHMS["A2C"], BASE, suites.MUJOCO),
    ("adaptive KL 0.01 minus clipping, all details", ("table1-details", KL_SETTING), BASE, suites.MUJOCO),
    ("clipping 0.2, normalized minus as printed", ("table1-normalized", CLIP_02), ("table1", CLIP_02), suites.MUJOCO),
    ("clipping 0.2, as printed, raw observations unlimited minus limited", UNLIMITED, ("table1", CLIP_02), suites.MUJOCO),
    ("clipping 0.2, normalized minus raw observations unlimited", ("table1-normalized", CLIP_02), UNLIMITED, suites.MUJOCO),
    *(
        (f"{setting} minus all details on", (suite, setting), BASE, envs)
        for suite, (settings, envs, _) in suites.CLOSER.items()
        for setting in settings
    ),
    ("LSTM minus none, no velocities", ("discrete", "no velocities, LSTM"), ("discrete", "no velocities"), CARTPOLE),
    ("shared minus separate, unscaled rewards", SHARED, SEPARATE, CARTPOLE),
    ("bfloat16 minus float32", ("atari-short", "bfloat16"), ("atari-short", "default"), BREAKOUT),
    ("larger updates minus defaults", ("atari-short", LARGER), ("atari-short", "bfloat16"), BREAKOUT),
]


def table_differences(r: Results) -> str:
    """Every comparison that a text makes: number of runs and interval of the difference."""
    rows = []
    for name, x_key, y_key, envs in COMPARISONS:
        for env in envs:
            x, y = r.scores(*x_key, env), r.scores(*y_key, env)
            if len(x) and len(y):
                rows.append([name, env, f"{len(x)} and {len(y)}", difference(x, y)])
    return markdown(["comparison", "task", "runs", "difference of the mean returns [95% interval]"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# The other suites


def table_kl_penalty(r: Results) -> str:
    """Clipping beside the adaptive penalty, and how far the measured KL of an update is from its target."""
    rows = []
    for env in suites.MUJOCO:
        clip, penalty, cells = r.scores(*BASE, env), r.scores("table1-details", KL_SETTING, env), [""] * 5
        if len(clip) and len(penalty):
            updates = [curve["kl_of_updates"] for curve in r.groups["table1-details", KL_SETTING, env]["curve"]]
            late = np.array([kl for kls in updates for kl in kls[len(kls) // 10 :]])  # after the first tenth of training
            low = r.random_means([env])
            ratio = "" if low is None else f"{(penalty.mean() - low[0]) / (clip.mean() - low[0]):.1%}"
            inside = np.mean((late >= KL_TARGET / 3) & (late <= 3 * KL_TARGET))
            cells = [with_interval(penalty), difference(penalty, clip), ratio, f"{np.median(late):.4f}", f"{inside:.1%}"]
        rows.append([f"{env}-v4", r.cell(*BASE, env), *cells])
    head = ["task", "clipping (suite base)", KL_SETTING, "penalty minus clipping", "penalty / clipping, random policy 0"]
    return markdown([*head, "median KL", "updates within a factor of 3 of the target"], rows)


def table_discrete(r: Results) -> str:
    rows = []
    for setting, (env, flags, _) in suites.DISCRETE.items():
        given = " ".join(x for k, v in flags.items() if k != "total_timesteps" for x in suites.option(k, v))
        key = ("discrete", setting, env)
        steps = f"{r.groups[key]['steps'].iloc[0]:,}" if key in r.groups else ""
        rows.append([setting, env, r.cell(*key), r.cell(*key, "return_over_training"), seeds_text(r.seeds(*key)), steps, given])
    head = ["setting", "task", "return, last 100 episodes", "return, all episodes", "seeds", "steps", "flags"]
    return markdown(head, rows) + r.footer("discrete")


def table_objective(r: Results) -> str:
    """Terms added to the loss of a shared network, one after the other."""
    rows = []
    for env, (full, _) in suites.OBJECTIVE_TASKS.items():
        scores = [*(r.scores("objective", setting, env) for setting in suites.OBJECTIVE), r.scores("discrete", full, env)]
        cells = [with_interval(x) if len(x) else "" for x in scores]
        gaps = [difference(y, x) if len(x) and len(y) else "" for x, y in itertools.pairwise(scores)]
        rows.append([env, *cells, *gaps, ", ".join(str(len(x)) for x in scores)])
    head = [
        "task",
        *suites.OBJECTIVE,
        "clip + value + entropy",
        "what the value loss adds",
        "what the entropy adds",
        "runs of each",
    ]
    return markdown(head, rows) + r.footer("objective")


def table_dm_control(r: Results) -> str:
    rows = []
    for env in suites.DM_CONTROL:
        key = ("dm_control", "default", env)
        rows.append([env, r.cell(*key), seeds_text(r.seeds(*key))])
    return markdown(["task", "return, last 100 episodes", "seeds"], rows) + r.footer("dm_control")


def table_shared_mujoco(r: Results) -> str:
    """Both from ppo_shared_params.py."""
    rows = []
    for env in suites.DETAILS_TASKS:
        shared, separate = (r.scores("shared-mujoco", setting, env) for setting in suites.SHARED_MUJOCO)
        cells = [with_interval(x) if len(x) else "" for x in (shared, separate)]
        gap = difference(shared, separate) if len(shared) and len(separate) else ""
        rows.append([f"{env}-v4", *cells, gap, f"{len(shared)} and {len(separate)}"])
    head = ["task", "shared", "separate", "shared minus separate [95% interval]", "runs"]
    return markdown(head, rows) + r.footer("shared-mujoco")


def detail_scores(r: Results, envs) -> dict[str, np.ndarray]:
    """Scores (seeds, tasks) with all details on and with one off, where the random policy is 0 and all on is 1.

    Of the settings that have a whole seed of these tasks; empty if none has, or if a score to compare with is missing. All on
    are the seeds that all tasks of the suite have, also where envs are some of them.
    """
    columns = [suites.DETAILS_TASKS.index(env) for env in envs]
    on, low = r.matrix(*BASE, suites.DETAILS_TASKS)[:, columns], r.random_means(envs)
    off = {s: scores for s in suites.DETAILS if len(scores := r.matrix("details", s, envs))}
    if not off or not len(on) or low is None:
        return {}
    return {s: stats.normalize(scores, low, on.mean(axis=0)) for s, scores in {ALL_ON: on, **off}.items()}


def table_details(r: Results) -> str:
    scores, envs = detail_scores(r, suites.DETAILS_TASKS), suites.DETAILS_TASKS
    whole = r.matrix(*BASE, envs)
    cells = [with_interval(whole[:, [i]]) if len(whole) else "" for i in range(len(envs))]
    rows = [[ALL_ON, "", "", *cells, seeds_text(r.complete_seeds(*BASE, envs))]]
    for setting in suites.DETAILS:
        effect = probability = ""
        if setting in scores:
            off, on = scores[setting], scores[ALL_ON]
            effect, probability = difference(off, on, "{:+.2f}".format), f"{stats.probability_of_improvement(off, on):.2f}"
            if min(len(off), len(on)) > 1:
                probability += brackets(*stats.probability_of_improvement_interval(off, on), "{:.2f}".format)
        cells = [r.cell("details", setting, env) for env in envs]
        rows.append([setting, effect, probability, *cells, seeds_text(r.complete_seeds("details", setting, envs))])
    head = ["one detail off", "effect on the normalized score", "probability of improvement", *envs, "whole seeds"]
    return markdown(head, rows) + r.footer("details")


def table_atari_short(r: Results) -> str:
    rows = []
    for game, setting, _, planned, _ in suites.ATARI_SHORT:
        group, cells = r.groups.get(("atari-short", setting, game)), ["", f"(planned: {planned:,})", ""]
        if group is not None:
            last = int(group["steps"].iloc[0])
            stopped = is_stopped_early(group["header"].iloc[0]["args"], last)
            steps = f"{last:,}" + (f" (stopped; of {planned:,})" if stopped else "")
            cells = [", ".join(f"{x:.1f}" for x in group["return"]), steps]
            cells.append(", ".join(f"{x / 3600:.1f}" for x in group["seconds"]))
        seeds = seeds_text(r.seeds("atari-short", setting, game))
        rows.append([game, ATARI_LABELS[setting], r.cell("atari-short", setting, game), seeds, *cells])
    head = ["game", "setting", "score, last 100 games", "seeds", "scores by seed", "steps", "hours by seed"]
    return markdown(head, rows) + r.footer("atari-short")


def table_table6(r: Results) -> str:
    published, rows = {row["game"]: row for row in r.csv("ppo_paper_atari_table6.csv")}, []
    for game in suites.ATARI:
        ours = [r.cell(*ATARI, game), seeds_text(r.seeds(*ATARI, game))]
        rows.append([game, *ours, *(published[game][k] for k in ("ppo", "a2c", "acer"))])
    return markdown(["game", "ours", "seeds", "PPO, paper", "A2C, paper", "ACER, paper"], rows) + r.footer("table6")


def table_games_won(r: Results) -> str:
    """Games won, and medians of the human-normalized score, over the games that were run."""
    published = pd.DataFrame(r.csv("ppo_paper_atari_table6.csv")).set_index("game").astype(float)
    levels = pd.DataFrame(r.csv("atari_human_random.csv")).set_index("game").loc[list(suites.ATARI), ["random", "human"]]
    low, high = levels.astype(float).to_numpy().T
    games = [game for game in suites.ATARI if (*ATARI, game) in r.groups]
    wins = dict.fromkeys(("a2c", "acer", "ours", "tie"), 0)
    for game in games:
        scores = published.loc[game, ["a2c", "acer"]].to_dict() | {"ours": float(r.scores(*ATARI, game).mean())}
        best = [name for name, score in scores.items() if score == max(scores.values())]
        wins[best[0] if len(best) == 1 else "tie"] += 1
    paper = next(row for row in r.csv("table2.csv") if row["metric"] == "last 100 episodes")
    theirs = stats.normalize(published.loc[list(suites.ATARI), "ppo"].to_numpy()[None], low, high)
    rows = [["paper", *(paper[k] for k in ("a2c", "acer", "ppo", "tie")), "49", number(float(stats.median(theirs)))]]
    matrix = r.matrix(*ATARI, suites.ATARI)
    human = with_interval(stats.normalize(matrix, low, high), stats.median) if len(matrix) else ""
    ours = [str(n) if games else "" for n in (*wins.values(), len(games))]
    rows.append(["ours against the paper's A2C and ACER", *ours, human])
    head = ["last 100 episodes", "A2C", "ACER", "PPO", "tie", "games", "human-normalized median of PPO"]
    return markdown(head, rows)


def table_measured(r: Results) -> str:
    """What the README says of all this: sentences whose numbers are those of the tables."""
    lines, page = [], "benchmarks/RESULTS.md"
    cheetah, low = r.scores(*BASE, "HalfCheetah").ravel(), r.random_means(["Reacher"])
    if len(cheetah):
        above = share(int((cheetah >= MODES).sum()), len(cheetah))
        lines.append(f"HalfCheetah has [two kinds of runs]({page}#two-kinds-of-runs-on-halfcheetah):")
        lines[-1] += f" {above}, end above {MODES:.0f}."
    printed, normalized = (r.scores(suite, CLIP_02, "Walker2d") for suite in list(CONFIGURATIONS)[:2])
    if len(printed) and len(normalized):
        lines.append(f"Walker2d, clipping 0.2: as printed {with_interval(printed)}, observations normalized")
        lines[-1] += f" {with_interval(normalized)}, difference {difference(normalized, printed)} (n {len(normalized)},"
        lines[-1] += f" {len(printed)}); the paper's Figure 3, read twice: 3000, 3460."
    reacher = np.concatenate([r.scores(suite, NO_CLIPPING, "Reacher") for suite in ("table1-normalized", "collapse")])
    if len(reacher) and low is not None:
        below = share(int((reacher < low[0]).sum()), len(reacher))
        lines.append(f"Without clipping or penalty, observations normalized, runs on Reacher that end below random: {below}.")
    known = {env: (r.scores(*ALGORITHMS["TRPO"], env), r.scores(*BASE, env)) for env in suites.SECOND_HAND}
    if known := {env: xy for env, xy in known.items() if min(map(len, xy)) > 1}:
        told = {env: np.prod(stats.difference_interval(*xy)) > 0 for env, xy in known.items()}
        lines.append("TRPO (settings of rl-zoo, some tuned) minus PPO: ")
        clear = [f"{env} {difference(*xy)} (n {len(xy[0])}, {len(xy[1])})" for env, xy in known.items() if told[env]]
        open_ = [f"{env} ({difference(*xy)}; n {len(xy[0])}, {len(xy[1])})" for env, xy in known.items() if not told[env]]
        lines[-1] += ", ".join(clear) + (f"; not known on {' and '.join(open_)}." if open_ else ".")
    unclipped = {env: (r.scores("unclipped", "no policy clipping", env), r.scores(*BASE, env)) for env in suites.DETAILS_TASKS}
    if all(min(map(len, xy)) > 1 for xy in unclipped.values()):
        lost = [f"{env} {difference(*xy)} (n {len(xy[0])}, {len(xy[1])})" for env, xy in unclipped.items()]
        lines.append(f"No policy clipping minus all details on: {', '.join(lost)}.")
    larger, default = (r.scores("atari-short", setting, "Breakout") for setting in (LARGER, "bfloat16"))
    if len(larger) and len(default):
        lines.append(f"Breakout, 1M, bfloat16, [larger updates]({page}#atari-on-a-cpu) minus defaults: ")
        lines[-1] += f"{difference(larger, default)} (n {len(larger)}, {len(default)})."
    return "".join(f"- {line}\n" for line in lines)


def table_random(r: Results) -> str:
    rows = []
    for env in suites.MUJOCO:
        x = r.random.get(env)
        rows.append([x["id"], number(x["mean"]), number(x["std"]), str(x["episodes"])] if x else [f"{env}-v4", "", "", ""])
    return markdown(["task", "mean return", "standard deviation", "episodes"], rows)


def speed_rates(measured: list[dict]) -> pd.DataFrame:
    """Steps per second: a row for each alternation, a column for each contestant, in the order of measuring."""
    frame = pd.DataFrame(measured)
    return frame.pivot(index="round", columns="contestant", values="sps")[list(dict.fromkeys(frame["contestant"]))]


def table_speed_short(r: Results) -> str:
    """Ours beside the peers on MuJoCo, with as many environments each; ratios are those within an alternation."""
    header, *measured = r.speed.get("mujoco", [{}])
    if not measured:
        return "Nothing was measured yet.\n"
    rows, peers = [], ("CleanRL", "Stable-Baselines3", "sbx")
    for envs in ("1 env", "8 envs"):
        rates = speed_rates(measured).reindex(columns=[f"{name}, {envs}" for name in ("ours", *peers)])
        ratios = rates.iloc[:, [0]].to_numpy() / rates.iloc[:, 1:]
        cells = [with_extremes(rates[c], 0) for c in rates] + [with_extremes(ratios[c], 1) for c in ratios]
        rows.append([envs, *cells])
    head = [header["env"], "ours, steps/s", *peers, *(f"ours / {name}" for name in ("CleanRL", "SB3", "sbx"))]
    return markdown(head, rows)


def table_speed(r: Results) -> str:
    texts = []
    for name, (header, *measured) in r.speed.items():
        rates = speed_rates(measured)
        rows = []
        for contestant in rates:
            ours = f"ours, {contestant.rpartition(', ')[2]}"  # with as many environments, where that was measured
            ratios = rates[ours if ours in rates else rates.columns[0]] / rates[contestant]
            cells = [with_extremes(rates[contestant], 0), with_extremes(ratios, 2), str(rates[contestant].count())]
            rows.append([contestant, *cells])
        kind = f" ({header['cpu_kind']})" if "cpu_kind" in header else ""
        head = [header["env"], "steps/s, median [min, max]", "ours / this", "alternations"]
        versions = ", ".join(f"{name} {version}" for name, version in sorted(header["versions"].items()))
        texts.append(
            f"[results/speed/{name}.jsonl](results/speed/{name}.jsonl)\n\n{markdown(head, rows)}\n"
            f"{header['cpu']}{kind}, pinned to {len(header['cores'])} core(s), {header['threads']} thread(s), load of the "
            f"machine before the start {header['load']}; {versions}; {header['steps']:,} steps a measurement, start-up and "
            f"compilation left out.\n"
        )
    return "\n".join(texts) or "Nothing was measured yet.\n"


# ---------------------------------------------------------------------------------------------------------------------
# Plots: each has a function for its data and one that draws it. The digest of both is stored in the file.


def curves_data(r: Results, lines: dict[str, tuple[str, str]], envs) -> dict:
    """{task: {line: plot.band(...)}}; a line is a setting of a suite."""
    data: dict = {}
    for env in envs:
        for name, key in lines.items():
            if (*key, env) in r.groups:
                data.setdefault(env, {})[name] = plot.band(list(r.groups[*key, env]["curve"]))
    return data


def details_data(r: Results) -> dict:
    """Per task normalized scores of the runs with all details on and with one off; effects over all tasks, where known."""
    by_task = {env: detail_scores(r, [env]) for env in suites.DETAILS_TASKS}
    tasks = {env: {s: x.flatten().round(4).tolist() for s, x in scores.items()} for env, scores in by_task.items() if scores}
    whole = detail_scores(r, suites.DETAILS_TASKS)
    on = whole.pop(ALL_ON, np.empty(0))  # nothing is compared with it where it is empty
    effects = {}
    for setting, off in whole.items():
        mean = float(stats.mean(off) - stats.mean(on))
        low, high = stats.difference_interval(off, on) if min(len(off), len(on)) > 1 else (mean, mean)
        effects[setting] = {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}
    return {"tasks": tasks, "effects": effects} if tasks else {}


def kl_data(r: Results) -> dict:
    """env -> seed -> steps and measured KL, of all tasks that were run."""
    data: dict = {}
    for env in suites.MUJOCO:
        group = r.groups.get(("table1-details", KL_SETTING, env), r.runs[:0])
        for seed, curve in zip(group["seed"], group["curve"], strict=True):
            points = [(step, kl) for step, kl in zip(curve["global_step"], curve["kl"], strict=True) if kl is not None]
            data.setdefault(env, {})[str(seed)] = points
    return data


def curves_of(lines: dict[str, tuple[str, str]], envs) -> Callable[[Results], dict]:
    return lambda r: curves_data(r, lines, envs)


ATARI_LINES = {label: ("atari-short", s) for s, label in ATARI_LABELS.items()}
PLOTS: dict[str, tuple[str, Callable[[Results], dict], Callable]] = {
    "curves": ("Learning curves of PPO, TRPO and A2C", curves_of(ALGORITHMS, suites.MUJOCO), plot.draw_curves),
    "table1": ("Table 1 of the paper beside ours", report_table1.table1_data, figures.draw_table1),
    "kl": ("Measured KL of the adaptive penalty", kl_data, figures.draw_kl),
    "details": ("Effect of each detail", details_data, figures.draw_details),
    "atari_short": ("Learning curves on Atari without a GPU", curves_of(ATARI_LINES, ("Pong", "Breakout")), plot.draw_curves),
    "rlhf": ("Score and VADER against the KL to the reference", report_rlhf.rlhf_data, figures.draw_rlhf),
    "atari": ("Learning curves on Atari", curves_of({"PPO": ATARI}, suites.ATARI), plot.draw_curves),
}
TABLES: dict[str, Callable[[Results], str]] = {
    name.removeprefix("table_"): function
    for name, function in [*globals().items(), *vars(report_table1).items(), *vars(report_rlhf).items()]
    if name.startswith("table_")
}


# ---------------------------------------------------------------------------------------------------------------------


def fill(text: str, tables: dict[str, Callable[[], str]], name: str) -> str:
    """Text with what stands between its markers written anew."""
    opened, closed = len(re.findall("<!-- table:", text)), len(re.findall("<!-- /table -->", text))
    pattern = re.compile(r"<!-- table:(\w+) -->\n(.*?)<!-- /table -->", re.DOTALL)
    if not opened == closed == len(pattern.findall(text)):
        raise RunnerError(f"{name}: the table markers do not pair up")

    def replace(match: re.Match) -> str:
        if match.group(1) not in tables:
            raise RunnerError(f"{name}: there is no table {match.group(1)}; tables: {', '.join(tables)}")
        return f"<!-- table:{match.group(1)} -->\n{tables[match.group(1)]()}<!-- /table -->"

    return pattern.sub(replace, text)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something is stale")
    parser.add_argument("--results-dir", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=suites.ROOT / "README.md")
    parser.add_argument("--results-md", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--plots-dir", type=Path, default=HERE / "plots")
    options = parser.parse_args(argv)
    if not options.results_dir.is_dir():
        parser.error(f"--results-dir {options.results_dir} is no folder")
    for file in (options.readme, options.results_md):
        if not file.is_file():
            parser.error(f"{file} does not exist: the markers in it say where tables go")
    writes: dict[Path, Callable[[], object]] = {}  # what is stale, and how it is put right
    try:
        results = Results(options.results_dir)
        tables: dict[str, Callable[[], str]] = {name: functools.partial(table, results) for name, table in TABLES.items()}
        for name, (title, make_data, draw) in PLOTS.items():
            data, file = make_data(results), options.plots_dir / f"{name}.svg"
            tables[f"plot_{name}"] = functools.partial(str, f"![{title}](plots/{file.name})\n" if data else "(No plot yet.)\n")
            if data and figures.stored_digest(file) != figures.digest(data, draw):
                writes[file] = functools.partial(figures.draw_plot, file, data, draw)
            elif not data and file.is_file():
                writes[file] = file.unlink
        for file in (options.readme, options.results_md):
            old = file.read_text()
            if (new := fill(old, tables, file.name)) != old:
                writes[file] = functools.partial(file.write_text, new)
    except RunnerError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    for file, write in writes.items():
        if not options.check:
            write()
        print(f"{'stale' if options.check else 'written'}: {file.name}")
    if not writes:
        print("tables and plots are what results/ say")
    return 1 if writes and options.check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
