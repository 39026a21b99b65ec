"""What stands in results/ and reference/ as a table of runs, and numbers as the text of a cell.

Scores are arrays (runs, tasks), as in stats.py. An interval is a 95% bootstrap interval; of a single run there is none.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import stats
import suites
from plot import brackets, number
from results import UNREADABLE, RunnerError, differing, read_result

REFERENCE = Path(__file__).resolve().parent / "reference"


def with_interval(scores: np.ndarray, aggregate=stats.mean, form: Callable[[float], str] = number) -> str:
    """aggregate(scores) and its interval, for scores (runs, tasks)."""
    text = form(float(aggregate(scores)))
    return text if len(scores) == 1 else text + brackets(*stats.interval(scores, aggregate), form)


def difference(x: np.ndarray, y: np.ndarray, form: Callable[[float], str] = number) -> str:
    """Mean of x minus mean of y, for scores (runs, tasks), with its interval unless one of them is a single run."""
    text = form(float(stats.mean(x) - stats.mean(y)))
    return text + (brackets(*stats.difference_interval(x, y), form) if min(len(x), len(y)) > 1 else "")


def share(count: int, runs: int) -> str:
    """Share of runs and its 95% Wilson interval."""
    return f"{count} of {runs}, {count / runs:.0%}" + brackets(*stats.wilson(count, runs), lambda x: f"{x:.0%}")


def with_extremes(values: pd.Series, digits: int) -> str:
    """Median [min, max] of alternations or seeds; empty where nothing was measured."""
    form = f".{digits}f"
    return f"{values.median():{form}} [{values.min():{form}}, {values.max():{form}}]" if values.notna().any() else ""


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def seeds_text(seeds) -> str:
    seeds = sorted(set(seeds))
    if len(seeds) > 5 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def read_json(file: Path) -> list[dict]:
    """Records of a file, one a line."""
    try:
        return [dict(json.loads(line)) for line in file.read_text().splitlines()]
    except UNREADABLE as error:
        raise RunnerError(f"{file} is damaged ({type(error).__name__}): delete it and measure again") from error


class Results:
    """All results of the stored suites, and what is in reference/.

    runs: one row a run; groups: (suite, setting, env) -> its rows by ascending seed.
    """

    def __init__(self, folder: Path):
        rows = []
        for file in sorted(folder.glob("*/*.jsonl.gz")):
            if file.parent.name not in suites.SUITES:  # somebody's sweep
                continue
            header, final, curve = read_result(file).values()
            if final["return"] is None:
                raise RunnerError(f"{file} has no finished episode")
            if header["suite"] != file.parent.name:
                raise RunnerError(f"{file} is a result of {header['suite']}: it does not belong in this folder")
            row = {k: header[k] for k in ("suite", "setting", "env", "seed")} | {k: final[k] for k in ("return", "seconds")}
            row |= {"return_over_training": final["return_over_training"], "steps": final["global_step"], "curve": curve}
            rows.append(row | {"file": file, "args": header["args"], "header": header})
        columns = ["suite", "setting", "env", "seed"]
        self.runs = pd.DataFrame(rows, columns=list(rows[0]) if rows else [*columns, "curve", "header"]).sort_values(columns)
        for run in self.runs[self.runs.duplicated(columns)].itertuples():
            raise RunnerError(f"{run.file} is of the setting, task and seed of another file there: delete one of them")
        self.groups = dict(iter(self.runs.groupby(columns[:3])))
        for group in self.groups.values():
            first = group.iloc[0]
            for run in group.itertuples():
                if run.steps != first["steps"]:
                    raise RunnerError(f"{run.file} has another number of steps than the other seeds beside it")
                if differing(first["args"], run.args):
                    raise RunnerError(f"{run.file} has other settings than the other seeds beside it")
        self.random = {p.stem: read_json(p)[0] for p in sorted((folder / "random").glob("*.json"))}
        self.speed = {p.stem: read_json(p) for p in sorted((folder / "speed").glob("*.jsonl"))}

    def csv(self, name: str) -> list[dict[str, str]]:
        with open(REFERENCE / name, newline="", encoding="utf-8") as f:
            return list(csv.DictReader(f))

    def of(self, suite: str) -> pd.DataFrame:
        return self.runs[self.runs["suite"] == suite]

    def seeds(self, suite: str, setting: str, env: str) -> list[int]:
        return list(self.groups[suite, setting, env]["seed"]) if (suite, setting, env) in self.groups else []

    def scores(self, suite: str, setting: str, env: str, key: str = "return") -> np.ndarray:
        """Scores (runs, 1) of one setting on one task, by ascending seed; (0, 1) if nothing was run."""
        group = self.groups.get((suite, setting, env))
        return np.empty((0, 1)) if group is None else group[key].to_numpy(float).reshape(-1, 1)

    def cell(self, suite: str, setting: str, env: str, key: str = "return") -> str:
        scores = self.scores(suite, setting, env, key)
        return with_interval(scores) if len(scores) else ""

    def complete_seeds(self, suite: str, setting: str, envs) -> list[int]:
        """Seeds that were run on all of these tasks."""
        return sorted(set.intersection(*(set(self.seeds(suite, setting, env)) for env in envs)))

    def matrix(self, suite: str, setting: str, envs, seeds: list[int] | None = None) -> np.ndarray:
        """Scores (seeds, tasks), by default of the complete seeds."""
        seeds = self.complete_seeds(suite, setting, envs) if seeds is None else seeds
        if not seeds:
            return np.empty((0, len(envs)))
        return np.array([self.groups[suite, setting, env].set_index("seed")["return"][seeds] for env in envs]).T

    def random_means(self, envs) -> np.ndarray | None:
        return np.array([self.random[e]["mean"] for e in envs]) if all(e in self.random for e in envs) else None

    def initial_means(self, suite: str, envs) -> np.ndarray | None:
        """Mean returns of the policy before training. As printed it is the same where observations are normalized once a batch:
        their statistics begin at mean 0 and variance 1.
        """
        setting = "all details" if suite == "table1-details" else "as printed"
        scores = [self.scores("initial", setting, env, "return_over_training") for env in envs]
        return np.array([x.mean() for x in scores]) if all(map(len, scores)) else None

    def footer(self, suite: str) -> str:
        """Where and with what the runs of a suite were made."""
        headers = pd.DataFrame(list(self.of(suite)["header"]))
        if not len(headers):
            return "\nNothing was run yet.\n"
        kinds = headers["cpu_kind"] if "cpu_kind" in headers else [None] * len(headers)
        cpus = [f"{cpu} ({kind})" if isinstance(kind, str) else cpu for cpu, kind in zip(headers["cpu"], kinds, strict=True)]
        machines = sorted({f"{gpu}, {cpu}" if gpu else cpu for gpu, cpu in zip(headers["gpu"], cpus, strict=True)})
        versions = sorted({f"{name} {version}" for versions in headers["versions"] for name, version in versions.items()})
        scripts = []
        for name, commits in headers.groupby("script")["script_commit"]:
            known = ", ".join(sorted(commit[:10] for commit in commits.dropna().unique()))
            scripts.append(f"{name} at {known}" if known else name)
            if commits.isna().any():
                scripts[-1] += f" ({commits.isna().sum()} runs of a text that was never committed)"
        parts = [f"{len(headers)} run{'s' if len(headers) > 1 else ''}", ", ".join(machines), ", ".join(versions), *scripts]
        return "\n" + "; ".join(parts) + ".\n"
