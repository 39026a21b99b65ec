"""Tables and plots from benchmarks/results/ alone, offline.

    python benchmarks/report.py            rewrite the tables of README.md and benchmarks/RESULTS.md, and the plots
    python benchmarks/report.py --check    exit code 1 where one of them is not what results/ say

A table stands between the lines `<!-- table:NAME -->` and `<!-- /table -->`; the functions table_NAME below write them. What
was not run stays empty. Intervals are 95% stratified bootstrap intervals over seeds (stats.py); of one seed there is none.
"""

import argparse
import csv
import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import run
import stats
import suites

HERE = Path(__file__).resolve().parent
ALL_ON = "all on (suite base)"


def number(x: float) -> str:
    """Four or so significant digits, without an exponent."""
    digits = 0 if abs(x) >= 100 else 1 if abs(x) >= 20 else 2
    return f"{x:.{digits}f}".replace("-0.00", "0.00")


def with_interval(scores: np.ndarray, aggregate=stats.mean) -> str:
    """aggregate(scores) and its interval, for scores (runs, tasks)."""
    text = number(float(aggregate(scores)))
    if len(scores) == 1:
        return text
    low, high = stats.interval(scores, aggregate)
    return f"{text} [{number(low)}, {number(high)}]"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def with_extremes(values: np.ndarray, digits: int) -> str:
    """Median [min, max] of alternations."""
    return f"{np.median(values):.{digits}f} [{values.min():.{digits}f}, {values.max():.{digits}f}]"


def seeds_text(seeds: list[int]) -> str:
    return ", ".join(map(str, sorted(set(seeds))))


def settings_of(result: dict) -> dict:
    """Arguments of a run without its seed and what it ran on."""
    return {k: v for k, v in result["header"]["args"].items() if k != "seed" and k not in run.MACHINE}


class Results:
    """All that is in results/ and reference/."""

    def __init__(self, folder: Path):
        self.reference = HERE / "reference"
        self.runs: dict[tuple[str, str, str], dict[int, dict]] = {}  # (suite, setting, env) -> seed -> result
        for file in sorted(folder.glob("*/*.jsonl.gz")):
            result = run.read_result(file)
            header = result["header"]
            group = self.runs.setdefault((header["suite"], header["setting"], header["env"]), {})
            if group and next(iter(group.values()))["final"]["global_step"] != result["final"]["global_step"]:
                raise run.RunnerError(f"{file} has another number of steps than the other seeds beside it")
            if group and settings_of(next(iter(group.values()))) != settings_of(result):
                raise run.RunnerError(f"{file} has other settings than the other seeds beside it")
            if result["final"]["return"] is None:
                raise run.RunnerError(f"{file} has no finished episode")
            group[header["seed"]] = result
        self.random = {p.stem: json.loads(p.read_text()) for p in sorted((folder / "random").glob("*.json"))}
        self.speed = {
            p.stem: [json.loads(line) for line in p.read_text().splitlines()]
            for p in sorted((folder / "speed").glob("*.jsonl"))
        }

    def csv(self, name: str) -> list[dict[str, str]]:
        with open(self.reference / name, newline="", encoding="utf-8") as f:
            return list(csv.DictReader(f))

    def scores(self, suite: str, setting: str, env: str, key: str = "return") -> np.ndarray:
        """Scores (runs, 1) of one setting on one task, by ascending seed; (0, 1) if nothing was run."""
        group = self.runs.get((suite, setting, env), {})
        return np.array([group[seed]["final"][key] for seed in sorted(group)]).reshape(-1, 1)

    def cell(self, suite: str, setting: str, env: str) -> str:
        scores = self.scores(suite, setting, env)
        return with_interval(scores) if len(scores) else ""

    def complete_seeds(self, suite: str, setting: str, envs) -> list[int]:
        """Seeds that were run on all of these tasks."""
        return sorted(set.intersection(*(set(self.runs.get((suite, setting, env), {})) for env in envs)))

    def matrix(self, suite: str, setting: str, envs, seeds: list[int] | None = None) -> np.ndarray:
        """Scores (seeds, tasks), by default of the complete seeds."""
        seeds = self.complete_seeds(suite, setting, envs) if seeds is None else seeds
        finals = [[self.runs[suite, setting, env][seed]["final"]["return"] for env in envs] for seed in seeds]
        return np.array(finals).reshape(len(seeds), len(envs))

    def random_means(self, envs) -> np.ndarray | None:
        return np.array([self.random[e]["mean"] for e in envs]) if all(e in self.random for e in envs) else None

    def footer(self, suite: str) -> str:
        """Where and with what the runs of a suite were made."""
        headers = [r["header"] for key, group in self.runs.items() if key[0] == suite for r in group.values()]
        if not headers:
            return "\nNothing was run yet.\n"

        def distinct(texts) -> str:
            return ", ".join(sorted(set(texts)))

        machines = distinct(f"{h['gpu'] + ', ' if h['gpu'] else ''}{h['cpu']}" for h in headers)
        versions = distinct(f"{name} {version}" for h in headers for name, version in h["versions"].items())
        scripts = distinct(
            f"{h['script']} at {h['script_commit'][:10]}"
            if h["script_commit"]
            else f"{h['script']} with sha256 {h['script_sha256'][:10]}"
            for h in headers
        )
        return f"\n{len(headers)} run{'s' if len(headers) > 1 else ''}; {machines}; {versions}; {scripts}.\n"


def table_base(results: Results) -> str:
    rows = []
    for env in suites.MUJOCO:
        group = results.runs.get(("base", "default", env), {})
        if not group:
            rows.append([f"{env}-v4", "", "", ""])
            continue
        steps = next(iter(group.values()))["final"]["global_step"]
        rows.append([f"{env}-v4", results.cell("base", "default", env), seeds_text(list(group)), f"{steps:,}"])
    head = ["task", "return, last 100 episodes [95% interval]", "seeds", "steps"]
    return markdown(head, rows) + results.footer("base")


def table_published(results: Results) -> str:
    reference = results.csv("figure3.csv")
    head = ["task", "ours, v4", "Stable-Baselines3, same settings, v4", *list(reference[0])[1:]]
    rows = []
    for row in reference:
        task, *published = row.values()
        rows.append([task, results.cell("base", "default", task), results.cell("peer", "SB3 PPO", task), *published])
    return markdown(head, rows)


ALGORITHMS = {"PPO": ("base", "default"), "TRPO": ("figure3", "TRPO"), "A2C": ("figure3", "A2C")}


def table_figure3(results: Results) -> str:
    rows = [[f"{env}-v4", *(results.cell(*key, env) for key in ALGORITHMS.values())] for env in suites.MUJOCO]
    peers = any(suite == "figure3" for suite, _, _ in results.runs)
    return markdown(["task", *ALGORITHMS], rows) + (
        results.footer("figure3") if peers else "\nTRPO and A2C have not been run yet.\n"
    )


def table_second_hand(results: Results) -> str:
    rows = []
    for row in results.csv("second_hand_mujoco.csv"):
        cells = []
        for algorithm, key in ALGORITHMS.items():
            cells += [row[algorithm], results.cell(*key, row["task"])]
        rows.append([row["task"], *cells])
    return markdown(["task", *(f"{a}, {w}" for a in ALGORITHMS for w in ("claimed", "ours"))], rows)


def table1_seeds(results: Results, suite: str) -> list[int]:
    """Seeds that were run with every setting on every task."""
    return sorted(set.intersection(*(set(results.complete_seeds(suite, s, suites.MUJOCO)) for s in suites.TABLE1)))


def table1_scores(results: Results, suite: str, best: str) -> dict[str, np.ndarray]:
    """Normalized scores (seeds, tasks) of each setting, over table1_seeds: random policy 0, best result 1.

    best: "run", the best single run of the task, or "setting", the best mean over seeds of a setting. Both are held
    fixed in the bootstrap. Empty before the first such seed, since the best is not known until then.
    """
    envs, seeds = suites.MUJOCO, table1_seeds(results, suite)
    low = results.random_means(envs)
    if low is None or not seeds:
        return {}
    matrices = {s: results.matrix(suite, s, envs, seeds) for s in suites.TABLE1}
    tops = np.max([x.max(axis=0) if best == "run" else x.mean(axis=0) for x in matrices.values()], axis=0)
    return {s: stats.normalize(x, low, tops) for s, x in matrices.items()}


def table1(results: Results, suite: str) -> str:
    """Table 1 of the paper beside ours, and the returns that it was made of."""
    by_run, by_setting = (table1_scores(results, suite, best) for best in ("run", "setting"))
    rows = []
    for row in results.csv("table1.csv"):
        s = row["setting"]
        cells = (
            [with_interval(by_run[s]), with_interval(by_setting[s]), with_interval(by_run[s], stats.iqm)]
            if by_run
            else [""] * 3
        )
        rows.append([s, row["score"], *cells, seeds_text(results.complete_seeds(suite, s, suites.MUJOCO))])
    head = ["setting", "paper", "ours, best run = 1", "ours, best setting = 1", "ours, IQM, best run = 1", "whole seeds run"]
    text = markdown(head, rows)
    if by_run:
        text += f"\nScores are of the seeds that every setting has: {seeds_text(table1_seeds(results, suite))}.\n"
    rows = [[s, *(results.cell(suite, s, env) for env in suites.MUJOCO)] for s in suites.TABLE1]
    return text + "\n" + markdown(["return", *suites.MUJOCO], rows) + results.footer(suite)


def table_table1(results: Results) -> str:
    return table1(results, "table1")


def table_table1_details(results: Results) -> str:
    return table1(results, "table1-details")


def detail_scores(results: Results, envs) -> dict[str, np.ndarray]:
    """Scores (seeds, tasks) with all details on and with one off, where the random policy is 0 and all on is 1.

    Of the settings that have a whole seed of these tasks; empty if none has, or if a score to compare with is missing.
    """
    on, low = results.matrix("base", "default", envs), results.random_means(envs)
    off = {setting: results.matrix("details", setting, envs) for setting in suites.DETAILS}
    off = {setting: scores for setting, scores in off.items() if len(scores)}
    if not off or not len(on) or low is None:
        return {}
    return {setting: stats.normalize(scores, low, on.mean(axis=0)) for setting, scores in {ALL_ON: on, **off}.items()}


def detail_effect(off: np.ndarray, on: np.ndarray) -> tuple[float, float, float]:
    """Difference of the mean scores and its 95% interval, which is the difference itself where there is one seed."""
    mean = float(stats.mean(off) - stats.mean(on))
    return mean, *(stats.difference_interval(off, on) if len(off) > 1 and len(on) > 1 else (mean, mean))


def table_details(results: Results) -> str:
    scores, rows = detail_scores(results, suites.DETAILS_TASKS), []
    for setting in suites.DETAILS:
        cells = [results.cell("details", setting, env) for env in suites.DETAILS_TASKS]
        effect = probability = ""
        if setting in scores:
            off, on = scores[setting], scores[ALL_ON]
            mean, low, high = detail_effect(off, on)
            effect = f"{mean:+.2f}"
            probability = f"{stats.probability_of_improvement(off, on):.2f}"
            if len(off) > 1 and len(on) > 1:
                effect += f" [{low:+.2f}, {high:+.2f}]"
                low, high = stats.probability_of_improvement_interval(off, on)
                probability += f" [{low:.2f}, {high:.2f}]"
        rows.append(
            [setting, effect, probability, *cells, seeds_text(results.complete_seeds("details", setting, suites.DETAILS_TASKS))]
        )
    all_on = [ALL_ON, "", "", *(results.cell("base", "default", env) for env in suites.DETAILS_TASKS)]
    rows.insert(0, [*all_on, seeds_text(results.complete_seeds("base", "default", suites.DETAILS_TASKS))])
    head = ["one detail off", "effect on the normalized score", "probability of improvement", *suites.DETAILS_TASKS, "seeds"]
    return markdown(head, rows) + results.footer("details")


ATARI_LABELS = {s: "float32" if s == "default" else s for _, s, *_ in suites.ATARI_SHORT}


def table_atari_short(results: Results) -> str:
    rows = []
    for game, setting, _, planned, _ in suites.ATARI_SHORT:
        group = results.runs.get(("atari-short", setting, game), {})
        scores = hours = steps = ""
        if group:
            finals = [group[seed]["final"] for seed in sorted(group)]
            scores = ", ".join(f"{final['return']:.1f}" for final in finals)
            steps = f"{finals[0]['global_step']:,}"
            if run.is_stopped_early(next(iter(group.values()))["header"]["args"], finals[0]["global_step"]):
                steps += f" (stopped; of {planned:,})"
            hours = ", ".join(f"{final['seconds'] / 3600:.1f}" for final in finals)
        score, seeds = results.cell("atari-short", setting, game), seeds_text(list(group))
        rows.append([game, ATARI_LABELS[setting], score, seeds, scores, steps or f"(planned: {planned:,})", hours])
    head = ["game", "setting", "score, last 100 games", "seeds", "scores by seed", "steps", "hours by seed"]
    return markdown(head, rows) + results.footer("atari-short")


def table_table6(results: Results) -> str:
    published = {row["game"]: row for row in results.csv("ppo_paper_atari_table6.csv")}
    rows = []
    for game in suites.ATARI:
        row = published[game]
        seeds = seeds_text(list(results.runs.get(("table6", "default", game), {})))
        rows.append([game, results.cell("table6", "default", game), seeds, row["ppo"], row["a2c"], row["acer"]])
    return markdown(["game", "ours", "seeds", "PPO, paper", "A2C, paper", "ACER, paper"], rows) + results.footer("table6")


def table_games_won(results: Results) -> str:
    """Games won, and medians of the human-normalized score, over the games that were run."""
    published = {row["game"]: row for row in results.csv("ppo_paper_atari_table6.csv")}
    levels = {row["game"]: row for row in results.csv("atari_human_random.csv")}
    games = [game for game in suites.ATARI if ("table6", "default", game) in results.runs]
    wins = {"a2c": 0, "acer": 0, "ours": 0, "tie": 0}
    for game in games:
        scores = {"a2c": float(published[game]["a2c"]), "acer": float(published[game]["acer"])}
        scores["ours"] = float(results.scores("table6", "default", game).mean())
        best = [name for name, score in scores.items() if score == max(scores.values())]
        wins[best[0] if len(best) == 1 else "tie"] += 1
    head = ["last 100 episodes", "A2C", "ACER", "PPO", "tie", "games", "human-normalized median of PPO"]
    paper = next(row for row in results.csv("table2.csv") if row["metric"] == "last 100 episodes")
    low, high = (np.array([float(levels[g][k]) for g in suites.ATARI]) for k in ("random", "human"))
    theirs = np.array([[float(published[g]["ppo"]) for g in suites.ATARI]])
    median = number(float(stats.median(stats.normalize(theirs, low, high))))
    rows = [["paper", paper["a2c"], paper["acer"], paper["ppo"], paper["tie"], "49", median]]
    ours = [str(wins[k]) if games else "" for k in ("a2c", "acer", "ours", "tie")]
    matrix = results.matrix("table6", "default", suites.ATARI)
    human = with_interval(stats.normalize(matrix, low, high), stats.median) if len(matrix) else ""
    rows.append(["ours against the paper's A2C and ACER", *ours, str(len(games)) if games else "", human])
    return markdown(head, rows)


KL_SETTING, KL_TARGET = "adaptive KL 0.01", 0.01


def table_kl_penalty(results: Results) -> str:
    """Clipping beside the adaptive penalty, and how far the measured KL of an update is from its target."""
    rows = []
    for env in suites.MUJOCO:
        clip, penalty = results.scores("base", "default", env), results.scores("table1-details", KL_SETTING, env)
        if not len(clip) or not len(penalty):
            rows.append([f"{env}-v4", results.cell("base", "default", env), "", "", "", ""])
            continue
        group = results.runs["table1-details", KL_SETTING, env]
        updates = [r["curve"]["kl_of_updates"] for r in group.values()]
        late = [x for kls in updates for x in kls[len(kls) // 10 :]]  # after the first tenth of training
        low = results.random[env]["mean"] if env in results.random else None
        ratio = "" if low is None else f"{(penalty.mean() - low) / (clip.mean() - low):.1%}"
        inside = np.mean([1 / 3 <= x / KL_TARGET <= 3 for x in late])
        rows.append([
            f"{env}-v4", with_interval(clip), with_interval(penalty), ratio,
            f"{np.median(late):.4f}", f"{inside:.1%}",
        ])  # fmt: skip
    head = [
        "task",
        "clipping (suite base)",
        KL_SETTING,
        "penalty / clipping, random policy 0",
        "median KL",
        "updates within a factor of 3 of the target",
    ]
    return markdown(head, rows)


def table_discrete(results: Results) -> str:
    rows = []
    for setting, (env, flags, _) in suites.DISCRETE.items():
        group = results.runs.get(("discrete", setting, env), {})
        given = " ".join(x for k, v in flags.items() if k != "total_timesteps" for x in suites.option(k, v))
        if not group:
            rows.append([setting, env, "", "", "", "", given])
            continue
        rows.append([
            setting, env, with_interval(results.scores("discrete", setting, env)),
            with_interval(results.scores("discrete", setting, env, "return_over_training")), seeds_text(list(group)),
            f"{next(iter(group.values()))['final']['global_step']:,}", given,
        ])  # fmt: skip
    head = ["setting", "task", "return, last 100 episodes", "return, all episodes", "seeds", "steps", "flags"]
    return markdown(head, rows) + results.footer("discrete")


def measured(group: dict[int, dict], key: str, place: int) -> list[float]:
    """A measure of the evaluations of ppo_rlhf.py, by seed: at the start (place 0) or at the end (place -1)."""
    return [group[seed]["curve"]["evaluations"][place][key] for seed in sorted(group)]


def table_rlhf_exact(results: Results) -> str:
    rows = []
    for setting, (_, env, _) in suites.RLHF["rlhf-exact"].items():
        group = results.runs.get(("rlhf-exact", setting, env), {})
        starts, ends, best = (measured(group, key, i) for key, i in (("objective", 0), ("objective", -1), ("optimum", -1)))
        for seed, start, end, optimum in zip(sorted(group), starts, ends, best, strict=True):
            share = (end - start) / (optimum - start)
            rows.append([setting, str(seed), f"{start:.3f}", f"{end:.3f}", f"{optimum:.3f}", f"{share:.4f}"])
    head = ["penalty in the reward", "seed", "J of the reference", "J reached", "best J", "share of the way"]
    return markdown(head, rows) + results.footer("rlhf-exact")


RLHF_MEASURES = ("score", "vader", "kl", "reference_nll", "ended", "length", "distinct_2")


def table_rlhf(results: Results) -> str:
    rows, footers = [], ""
    for suite in ("rlhf-human", "rlhf-sentiment", "rlhf-overopt", "rlhf-labels"):
        for setting, (_, env, _) in suites.RLHF[suite].items():
            group = results.runs.get((suite, setting, env), {})
            cells = [
                f"{np.mean(measured(group, key, 0)):.2f} -> {np.mean(measured(group, key, -1)):.2f}" if group else ""
                for key in RLHF_MEASURES
            ]
            rows.append([suite, setting, *cells, seeds_text(list(group))])
        footers += results.footer(suite) if any(key[0] == suite for key in results.runs) else ""
    head = ["suite", "setting", "score", "VADER", "KL", "reference nats", "ended", "length", "distinct pairs", "seeds"]
    return markdown(head, rows) + footers


def table_random(results: Results) -> str:
    rows = []
    for env in suites.MUJOCO:
        r = results.random.get(env)
        rows.append([r["id"], number(r["mean"]), number(r["std"]), str(r["episodes"])] if r else [f"{env}-v4", "", "", ""])
    return markdown(["task", "mean return", "standard deviation", "episodes"], rows)


def table_speed_short(results: Results) -> str:
    """Ours beside the peers on MuJoCo, with as many environments each."""
    header, *measured = results.speed.get("mujoco", [{}])
    if not measured:
        return "Nothing was measured yet.\n"
    rows, peers = [], ("CleanRL", "Stable-Baselines3", "sbx")
    for envs in ("1 env", "8 envs"):
        rates = {
            name: np.array([r["sps"] for r in measured if r["contestant"] == f"{name}, {envs}"]) for name in ("ours", *peers)
        }
        ratios = [rates["ours"] / rates[name] if len(rates[name]) else rates[name] for name in peers]
        cells = [(x, 0) for x in rates.values()] + [(x, 1) for x in ratios]
        rows.append([envs, *(with_extremes(x, digits) if len(x) else "" for x, digits in cells)])
    head = [header["env"], "ours, steps/s", *peers, *(f"ours / {name}" for name in ("CleanRL", "SB3", "sbx"))]
    return markdown(head, rows)


def table_speed(results: Results) -> str:
    text = ""
    for name, records in results.speed.items():
        header, measured = records[0], records[1:]
        rates: dict[str, dict[int, float]] = {}
        for record in measured:
            rates.setdefault(record["contestant"], {})[record["round"]] = record["sps"]
        first = next(iter(rates))
        rows = []
        for contestant, by_round in rates.items():
            values = np.array(list(by_round.values()))
            ratios = np.array([rates[first][r] / by_round[r] for r in by_round if r in rates[first]])
            rows.append([contestant, with_extremes(values, 0), with_extremes(ratios, 2), str(len(values))])
        head = [header["env"], "steps/s, median [min, max]", f"{first} / this", "alternations"]
        versions = ", ".join(f"{name} {version}" for name, version in sorted(header["versions"].items()))
        text += f"[results/speed/{name}.jsonl](results/speed/{name}.jsonl)\n\n" + markdown(head, rows)
        text += (
            f"\n{header['cpu']}, pinned to {len(header['cores'])} core(s), {header['threads']} thread(s), load of the machine "
            f"before the start {header['load']}; {versions}; {header['steps']:,} steps a measurement, start-up and compilation "
            f"left out.\n\n"
        )
    return text.rstrip("\n") + "\n" if text else "Nothing was measured yet.\n"


# ---------------------------------------------------------------------------------------------------------------------
# Plots: each has a function for its data and one that draws it. The digest of both is stored in the file.

STYLES = (("black", "-", "o", "black"), ("#c0392b", "--", "s", "white"), ("#7f8c8d", "-.", "^", "#7f8c8d"))


def curves_data(results: Results, algorithms: dict[str, tuple[str, str]], envs) -> dict:
    """env -> algorithm -> steps, mean, interval of the last-100 return over seeds."""
    data: dict = {}
    for env in envs:
        for algorithm, key in algorithms.items():
            curves = [r["curve"] for r in results.runs.get((*key, env), {}).values()]
            if not curves:
                continue
            points = [i for i in range(len(curves[0]["return"])) if all(c["return"][i] is not None for c in curves)]
            steps = [curves[0]["global_step"][i] for i in points]
            returns = np.array([[c["return"][i] for i in points] for c in curves])  # (seeds, points)
            # whole curves are resampled: the same seeds at all points
            resampled = returns[np.random.default_rng(0).integers(len(returns), size=(2000, len(returns)))].mean(axis=1)
            low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
            data.setdefault(env, {})[algorithm] = {
                "steps": steps,
                "mean": returns.mean(axis=0).round(3).tolist(),
                "low": low.round(3).tolist(),
                "high": high.round(3).tolist(),
                "seeds": len(curves),
            }
    return data


def draw_curves(data: dict, plt):
    columns = min(4, len(data))
    rows = -(-len(data) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(data) :]:
        axis.axis("off")
    names: dict = {}
    for axis, (env, algorithms) in zip(axes.flat, data.items(), strict=False):
        for i, (algorithm, curve) in enumerate(algorithms.items()):
            color, line, marker, face = STYLES[i % len(STYLES)]
            million = np.array(curve["steps"]) / 1e6
            every = max(len(million) // 8, 1)
            (names[algorithm],) = axis.plot(
                million,
                curve["mean"],
                line,
                color=color,
                marker=marker,
                markevery=(i * every // 3, every),
                markersize=4,
                mfc=face,
                lw=1.2,
            )
            axis.fill_between(million, curve["low"], curve["high"], color=color, alpha=0.18, lw=0)
        seeds = sorted({curve["seeds"] for curve in algorithms.values()})
        axis.set_title(f"{env} ({' or '.join(map(str, seeds))} seed{'s' if seeds != [1] else ''})", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        axis.set_xlabel("million steps", fontsize=7)
    axes.flat[0].set_ylabel("return, last 100 episodes", fontsize=8)
    below = 0.0  # share of the height that the legend takes
    if len(names) > 1:
        free = len(data) < axes.size  # a panel is free for the legend; else it goes below, in a row
        where, columns = ("lower right", 1) if free else ("lower center", len(names))
        figure.legend(names.values(), names.keys(), loc=where, ncols=columns, fontsize=9, frameon=False, handlelength=4)
        below = 0.0 if free else 0.3 / figure.get_figheight()
    figure.tight_layout(rect=(0, below, 1, 1))
    return figure


def table1_data(results: Results) -> dict:
    paper = {row["setting"]: float(row["score"]) for row in results.csv("table1.csv")}
    data: dict = {}
    for suite, label in (("table1", "ours, as printed"), ("table1-details", "ours, all details")):
        for setting, scores in table1_scores(results, suite, "run").items():
            low, high = stats.interval(scores) if len(scores) > 1 else (float(stats.mean(scores)),) * 2
            data.setdefault(label, {})[setting] = [round(float(stats.mean(scores)), 4), round(low, 4), round(high, 4)]
    return {"paper": paper, "ours": data} if data else {}


TABLE1_BOTTOM = -0.6  # of the plot: a bar that goes below it is cut off and says its score, so that the others stay readable


def draw_table1(data: dict, plt):
    settings = list(data["paper"])
    series = {"paper": {s: [x, x, x] for s, x in data["paper"].items()}, **data["ours"]}
    figure, axis = plt.subplots(figsize=(9, 3.8))
    width = 0.8 / len(series)
    looks = (("white", "////"), ("#c8c8c8", ""), ("#707070", ""))
    for i, (label, bars) in enumerate(series.items()):
        x = [settings.index(s) + (i - (len(series) - 1) / 2) * width for s in bars]
        mean, low, high = (np.array([bars[s][k] for s in bars]) for k in range(3))
        errors = [mean - low, high - mean] if (high > low).any() else None  # one seed has no interval
        axis.bar(
            x, mean, width, yerr=errors, label=label, color=looks[i][0], hatch=looks[i][1], edgecolor="black", lw=0.7,
            error_kw={"ecolor": "black", "lw": 1.2, "capsize": 2},
        )  # fmt: skip
        for left, *score in zip(x, mean, low, high, strict=True):
            if score[0] < TABLE1_BOTTOM:
                text = f" {number(score[0])} [{number(score[1])}, {number(score[2])}]"
                axis.text(left + width / 2, TABLE1_BOTTOM + 0.03, text, fontsize=8)
    axis.axhline(0, color="black", lw=0.8)
    if axis.get_ylim()[0] < TABLE1_BOTTOM:
        axis.set_ylim(TABLE1_BOTTOM, 1.05)
    axis.set_xticks(range(len(settings)), settings, rotation=30, ha="right", fontsize=8)
    axis.set_ylabel("normalized score\n(random policy 0, best run 1)", fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def details_data(results: Results) -> dict:
    """Per task normalized scores of the runs with all details on and with one off; effects over all tasks, where known."""
    by_task = {env: detail_scores(results, [env]) for env in suites.DETAILS_TASKS}
    tasks = {env: {s: x.flatten().round(4).tolist() for s, x in scores.items()} for env, scores in by_task.items() if scores}
    whole = detail_scores(results, suites.DETAILS_TASKS)
    on = whole.pop(ALL_ON, np.empty(0))  # nothing is compared with it where it is empty
    effects = {}
    for setting, off in whole.items():
        mean, low, high = detail_effect(off, on)
        effects[setting] = {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}
    return {"tasks": tasks, "effects": effects} if tasks else {}


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
            axis.plot(scores, [y] * len(scores), "o", color="black", mfc="white", markersize=4.5)
            if len(scores) > 1:
                axis.plot(np.mean(scores), y, "|", color="black", markersize=11, mew=1.6)
        axis.set_title(f"{env}: score of each run", fontsize=8)
        axis.set_xlabel("random policy 0, all details on 1;\nshaded: runs with all on", fontsize=7)
    if data["effects"]:
        axis = axes.flat[-1]
        axis.axvline(0, color="black", lw=0.8, ls=":")
        for setting, effect in data["effects"].items():
            y = settings.index(setting)
            axis.plot([effect["low"], effect["high"]], [y, y], "-", color="black", lw=1.4)
            clear = effect["low"] < effect["high"] and (effect["low"] > 0 or effect["high"] < 0)  # one seed has no interval
            axis.plot(effect["mean"], y, "s", color="black", mfc="black" if clear else "white", markersize=5)
        axis.set_title("effect, mean over the tasks", fontsize=8)
        axis.set_xlabel("95% interval, none with one seed;\nfilled: without 0", fontsize=7)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    axes.flat[0].set_yticks(range(len(settings)), settings, fontsize=8)
    axes.flat[0].invert_yaxis()
    return figure


def kl_data(results: Results) -> dict:
    """env -> seed -> steps and measured KL, of all tasks that were run."""
    data: dict = {}
    for env in suites.MUJOCO:
        for seed, result in sorted(results.runs.get(("table1-details", KL_SETTING, env), {}).items()):
            curve = result["curve"]
            points = [(step, kl) for step, kl in zip(curve["global_step"], curve["kl"], strict=True) if kl is not None]
            data.setdefault(env, {})[str(seed)] = points
    return data


def draw_kl(data: dict, plt):
    figure, axes = plt.subplots(1, len(data), figsize=(max(2.9 * len(data), 4), 2.7), squeeze=False, sharey=True)
    for axis, (env, by_seed) in zip(axes.flat, data.items(), strict=True):
        axis.axhspan(KL_TARGET / 3, 3 * KL_TARGET, color="#dddddd", lw=0, label="factor 3 around the target")
        axis.axhline(KL_TARGET, color="black", lw=0.8, ls=":")
        for (seed, points), (color, line, _, _) in zip(by_seed.items(), STYLES * 9, strict=False):
            steps, kls = zip(*points, strict=True)
            axis.plot(np.array(steps) / 1e6, kls, line, color=color, lw=1.1, label=f"seed {seed}")
        tenth = max(step for points in by_seed.values() for step, _ in points) / 1e7
        axis.axvline(tenth, color="black", lw=0.6, ls="--", label="a tenth of training")
        axis.set_yscale("log")
        axis.set_title(env, fontsize=9)
        axis.set_xlabel("million steps", fontsize=7)
        axis.tick_params(labelsize=7)
    axes.flat[0].set_ylabel("KL of an update, mean of about 5", fontsize=8)
    axes.flat[-1].legend(fontsize=7, frameon=False, loc="lower left")
    figure.tight_layout()
    return figure


PLOTS: dict[str, tuple[str, Callable, Callable]] = {
    "curves": ("Learning curves of PPO, TRPO and A2C", lambda r: curves_data(r, ALGORITHMS, suites.MUJOCO), draw_curves),
    "table1": ("Table 1 of the paper beside ours", table1_data, draw_table1),
    "kl": ("Measured KL of the adaptive penalty", kl_data, draw_kl),
    "details": ("Effect of each detail", details_data, draw_details),
    "atari_short": (
        "Learning curves on Atari without a GPU",
        lambda r: curves_data(r, {label: ("atari-short", s) for s, label in ATARI_LABELS.items()}, ("Pong", "Breakout")),
        draw_curves,
    ),
    "atari": (
        "Learning curves on Atari",
        lambda r: curves_data(r, {"PPO": ("table6", "default")}, suites.ATARI),
        draw_curves,
    ),
}


def digest(data: dict, draw: Callable) -> str:
    text = json.dumps([data, STYLES], sort_keys=True) + inspect.getsource(draw)
    return hashlib.sha256(text.encode()).hexdigest()


def stored_digest(file: Path) -> str | None:
    found = re.search(r"digest ([0-9a-f]{64})", file.read_text()) if file.is_file() else None
    return found.group(1) if found else None


def draw_plot(file: Path, data: dict, draw: Callable):
    """Draws an SVG that is the same on every call, with its digest as description."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with mpl.rc_context({"svg.hashsalt": "ppo", "hatch.linewidth": 0.6}):
        figure = draw(data, plt)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None, "Description": f"digest {digest(data, draw)}"})
        plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[Results], str]] = {
    "base": table_base,
    "published": table_published,
    "figure3": table_figure3,
    "second_hand": table_second_hand,
    "table1": table_table1,
    "table1_details": table_table1_details,
    "kl_penalty": table_kl_penalty,
    "discrete": table_discrete,
    "details": table_details,
    "atari_short": table_atari_short,
    "table6": table_table6,
    "games_won": table_games_won,
    "rlhf_exact": table_rlhf_exact,
    "rlhf": table_rlhf,
    "random": table_random,
    "speed": table_speed,
    "speed_short": table_speed_short,
}


def fill(text: str, tables: dict[str, Callable[[], str]], name: str) -> str:
    """Text with what stands between its markers written anew."""
    opened, closed = len(re.findall("<!-- table:", text)), len(re.findall("<!-- /table -->", text))
    pattern = re.compile(r"<!-- table:(\w+) -->\n(.*?)<!-- /table -->", re.DOTALL)
    if not opened == closed == len(pattern.findall(text)):
        raise run.RunnerError(f"{name}: the table markers do not pair up")

    def replace(match: re.Match) -> str:
        if match.group(1) not in tables:
            raise run.RunnerError(f"{name}: there is no table {match.group(1)}; tables: {', '.join(tables)}")
        return f"<!-- table:{match.group(1)} -->\n{tables[match.group(1)]()}<!-- /table -->"

    return pattern.sub(replace, text)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something is stale")
    parser.add_argument("--results-dir", type=Path, default=run.RESULTS)
    parser.add_argument("--readme", type=Path, default=run.ROOT / "README.md")
    parser.add_argument("--results-md", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--plots-dir", type=Path, default=HERE / "plots")
    options = parser.parse_args(argv)
    stale = []
    try:
        results = Results(options.results_dir)
        tables: dict[str, Callable[[], str]] = {name: functools.partial(table, results) for name, table in TABLES.items()}
        for name, (title, make_data, draw) in PLOTS.items():
            data, file = make_data(results), options.plots_dir / f"{name}.svg"
            link = f"![{title}](plots/{file.name})\n" if data else "(No plot yet.)\n"
            tables[f"plot_{name}"] = functools.partial(str, link)
            if not data and file.is_file():
                stale.append(file)
                if not options.check:
                    file.unlink()
            elif data and stored_digest(file) != digest(data, draw):
                stale.append(file)
                if not options.check:
                    draw_plot(file, data, draw)
        for file in (options.readme, options.results_md):
            if not file.is_file():
                continue
            old = file.read_text()
            new = fill(old, tables, file.name)
            if new != old:
                stale.append(file)
                if not options.check:
                    file.write_text(new)
    except run.RunnerError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    for file in stale:
        print(f"{'stale' if options.check else 'written'}: {file.name}")
    if not stale:
        print("tables and plots are what results/ say")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
