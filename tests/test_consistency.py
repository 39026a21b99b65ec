"""The scripts cannot drift apart, and the documents say what is in them. Standard library and pytest only.

python tests/test_consistency.py --update rewrites what is made from the scripts: tests/diffs/ and the columns "where"
and "test" of DETAILS.md.
"""

import ast
import difflib
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = "ppo_continuous.py"
SCRIPTS = sorted(path.name for path in ROOT.glob("ppo_*.py"))
VARIANTS = [name for name in SCRIPTS if name != BASE]
TEXT = {name: (ROOT / name).read_text() for name in SCRIPTS}
TREE = {name: ast.parse(text) for name, text in TEXT.items()}

KL, SHARED, ATARI, RLHF = "ppo_kl_penalty.py", "ppo_shared_params.py", "ppo_atari.py", "ppo_rlhf.py"
# name -> the scripts that have another text of it than the base, and why; RunOfRanks is first in ppo_atari.py
MAY_DIFFER: dict[str, tuple[set[str], str]] = {
    "Args": ({KL, SHARED, ATARI, RLHF}, "each variant has flags of its own"),
    "Output": ({KL, SHARED, RLHF}, "what a variant's networks say of a step"),
    "Batch": ({KL, SHARED, ATARI, RLHF}, "what a variant's update reads"),
    "Agent": ({KL, SHARED, ATARI, RLHF}, "the networks are what a variant is about"),
    "make_agent": ({SHARED, ATARI, RLHF}, "follows Agent; of language models the policy begins as the reference"),
    "numpy_policy": ({SHARED}, "follows Agent.policy"),
    "ppo_loss": ({KL}, "the objective is what this variant is about"),
    "make_update": ({KL, SHARED, ATARI, RLHF}, "follows Batch, and ranks average gradients"),
    "explained_variance": ({ATARI}, "a tensor, for which the host does not wait"),
    "Rollout": ({SHARED, ATARI, RLHF}, "what a variant's environments give"),
    "Runner": ({SHARED, ATARI, RLHF}, "masks, LSTM states, frames on the device, prompts"),
    "make_batch": ({KL, SHARED, ATARI, RLHF}, "follows Rollout and Batch"),
    "learn": ({KL, SHARED, ATARI, RLHF}, "hyperparameters, minibatches of whole environments, ranks"),
    "train": ({KL, SHARED, ATARI, RLHF}, "the state that survives an iteration"),
    "Spaces": ({SHARED, ATARI}, "the action spaces of a variant"),
    "make_policy": ({SHARED, ATARI}, "follows Agent and Spaces"),
    "make_envs": ({ATARI}, "Atari's wrappers"),
    "play_episodes": ({SHARED, ATARI}, "masks and LSTM states; whole games, not lives"),
    "load_policy": ({SHARED, ATARI}, "masks and LSTM states; Atari's environments need all settings"),
    "say": ({ATARI, RLHF}, "under torchrun one rank speaks"),
    "describe_run": ({RLHF}, "the versions of no environments"),
    "check_memory": ({RLHF}, "the sizes of models"),
    "Run": ({RLHF}, "two more logs, and evaluations in the course of training"),
    "RunOfRanks": ({RLHF}, "evaluations in the course of training"),
    "evaluate": ({RLHF}, "answers prompts"),
    "parse_args": ({RLHF}, "other flags may change in a resumed run"),
    "tell_evaluation": ({RLHF}, "measures and samples, before and after"),
}
# flags of the base that mean something else in a variant, or more
DIFFERENT_HELP: dict[str, set[str]] = {
    SHARED: {"env", "eval_deterministic", "num_minibatches"},
    ATARI: {"env", "evaluate", "eval_deterministic", "num_envs", "clip_reward", "compile", "device", "num_threads"},
    RLHF: {"env", "seed", "total_timesteps", "checkpoint_every", "evaluate", "eval_episodes", "num_envs", "num_steps"}
    | {"learning_rate", "gamma", "gae_lambda", "num_minibatches", "update_epochs", "clip_coef", "ent_coef", "vf_coef"}
    | {"adam_eps", "anneal_lr", "norm_adv", "clip_policy", "clip_vloss", "device", "num_threads"},
}


def definitions(script: str) -> dict[str, str]:
    """Source text of every top-level function and class of a script."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    lines = TEXT[script].splitlines()
    found = [node for node in TREE[script].body if isinstance(node, kinds)]
    return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in found}


def args_fields(script: str) -> dict[str, tuple[str, str]]:
    """Name -> (type, help) of the fields of Args, in order. The help is the comment at the end of the line or above it."""
    body = next(node for node in TREE[script].body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    lines, fields = TEXT[script].splitlines(), {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            doc, above = lines[node.lineno - 1].partition("  # ")[2], node.lineno - 2
            while not lines[node.lineno - 1].count("  # ") and lines[above].lstrip().startswith("# "):
                doc, above = f"{lines[above].strip()[2:]} {doc}".strip(), above - 1
            fields[node.target.id] = (ast.unparse(node.annotation), doc)
    return fields


def imported(script: str) -> set[str]:
    nodes = [node for node in ast.walk(TREE[script]) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    names += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    return {name.split(".")[0] for name in names}


def stored_diff(variant: str) -> str:
    lines = difflib.unified_diff(TEXT[BASE].splitlines(True), TEXT[variant].splitlines(True), BASE, variant, n=2)
    return "".join(lines)


@functools.cache
def functions(script: str) -> list[tuple[int, int, str]]:
    """(first line, last line, name) of the functions of a script, methods as Class.method, the innermost last."""
    found = []
    for node in TREE[script].body:
        methods = [m for m in ast.walk(node) if m is not node and isinstance(m, ast.FunctionDef)]
        for inner in [node, *(methods if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
                name = node.name if inner is node else f"{node.name}.{inner.name}"
                found.append((inner.lineno, inner.end_lineno or 0, name))
    return found


@functools.cache
def tags(script: str) -> dict[str, list[str]]:
    """Tag ("07", "ours: mask_resets") -> functions with a line that carries it in a comment, outside of Args."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(TEXT[script].splitlines(), 1):
        for tag in re.findall(r"\[(?:detail )?(\d\d|ours: \w+|aux: \w+)\]", line.partition("#")[2]):
            name = [name for first, last, name in functions(script) if first <= number <= last][-1]
            if name != "Args" and name not in found.setdefault(tag, []):
                found[tag].append(name)
    return found


def test_names() -> dict[str, list[str]]:
    """Tag -> tests named after it (test_detail_07_..., test_ours_mask_resets..., test_aux_target_kl...)."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for name in re.findall(r"^def (test_(?:detail|ours|aux)_\w+)", path.read_text(), re.M):
            number = re.match(r"test_detail_(\d\d)", name)
            key = number[1] if number else re.sub(r"^test_(ours|aux)_", r"\1: ", name)
            found.setdefault(key, []).append(f"{path.name}::{name}")
    return found


test_names.__test__ = False  # type: ignore[attr-defined]


def updated_details(text: str) -> str:
    """DETAILS.md with the cells "where" and "test" of every row made anew. A row starts with its tag in backticks."""
    tests = test_names()
    lines = []
    for line in text.splitlines():
        tag = re.match(r"\| `(\d\d|ours: \w+|aux: \w+)` \|", line)
        if tag:
            cells = line.strip("| ").split(" | ")
            places: dict[str, list[str]] = {}  # function -> scripts
            for script in SCRIPTS:
                for name in tags(script).get(tag[1], []):
                    places.setdefault(name, []).append(script[4:-3])
            where = [f"`{name}` ({', '.join(scripts)})" for name, scripts in places.items()]
            names = [n for key, values in tests.items() if key == tag[1] or key.startswith(tag[1] + "_") for n in values]
            cells[-2:] = ["<br>".join(where) or "-", "<br>".join(f"`{name}`" for name in names) or "-"]
            line = "| " + " | ".join(cells) + " |"
        lines.append(line)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("script", VARIANTS)
def test_same_name_same_text(script):
    """As in the base, or in the first variant that has the name; and no exemption is left that is not needed."""
    first: dict[str, str] = {}
    for other in (BASE, *VARIANTS):
        first = definitions(other) | first
    differing = {name for name, text in definitions(script).items() if text != first[name]}
    exempt = {name for name, (scripts, _) in MAY_DIFFER.items() if script in scripts}
    assert not differing - exempt, f"{script} and another script have different texts of {differing - exempt}"
    assert not exempt - differing, f"{script} has the text of the base: take it out of MAY_DIFFER: {exempt - differing}"


@pytest.mark.parametrize("script", VARIANTS)
def test_shared_flags_agree(script):
    base, variant = args_fields(BASE), args_fields(script)
    shared = [name for name in base if name in variant]
    assert shared == [name for name in variant if name in base], "the order of shared flags differs"
    other_types = {name for name in shared if base[name][0] != variant[name][0]}
    assert other_types == ({"clip_reward"} if script == ATARI else set())  # a bound, or a switch for the sign
    assert {name for name in shared if base[name][1] != variant[name][1]} == DIFFERENT_HELP.get(script, set())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_documented(script):
    # derived sizes are read through self; everything else through args
    text = TEXT[script]
    for name, (_, doc) in args_fields(script).items():
        assert doc, f"{name} has no help"
        reads = re.findall(rf"\b(?:args|self|saved)\.{name}\b", text)
        assert reads, f"nothing reads {name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_only_requirements(script):
    names = {"PIL": "pillow"}
    required = {re.split("[=<>]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    outside = {names.get(name, name) for name in imported(script)} - set(sys.stdlib_module_names)
    outside -= {"transformers"} if script == RLHF else set()  # optional: only --model and --reward-model need it
    assert outside <= required, f"{script} imports {outside - required}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_pep723_block_equals_requirements(script):
    block = re.search(r"^# /// script\n(.*?)^# ///$", TEXT[script], re.M | re.S)
    assert block is not None
    required = (ROOT / "requirements.txt").read_text().split()
    # no observation statistics; no environments
    without = {"ppo_atari.py": {"numba"}, RLHF: {"numba", "envpool", "gymnasium", "pillow"}}.get(script, set())
    required = [line for line in required if line.split("==")[0] not in without]
    assert re.findall(r'"([^"]+==[^"]+)"', block[1]) == required


def test_surroundings_are_the_same_text():
    """Of the lines below that heading in each script with environments at least 85% are in all of them."""
    parts = {script: surroundings(script) for script in SCRIPTS if script != RLHF}
    common = set.intersection(*map(set, parts.values()))
    for script, lines in parts.items():
        shared = [line for line in lines if line in common]
        assert len(shared) >= 0.85 * len(lines), f"{script}: {len(shared)} of {len(lines)} lines"


def surroundings(script: str) -> list[str]:
    """The lines below the heading "Surroundings" that are not empty."""
    return [line for line in TEXT[script].split("\n# Surroundings.")[1].splitlines()[1:] if line.strip()]


def longest(script: str) -> dict[str, int]:
    """Lines of each function, methods as Class.method."""
    classes = {node.name for node in TREE[script].body if isinstance(node, ast.ClassDef)}
    return {name: last - first + 1 for first, last, name in functions(script) if name not in classes}


@pytest.mark.parametrize("script", SCRIPTS)
def test_functions_stay_short(script):
    too_long = {name: n for name, n in longest(script).items() if n > (90 if name == "train" else 60)}
    assert not too_long


@pytest.mark.parametrize("script", VARIANTS)
def test_stored_diff_is_current(script):
    stored = ROOT / "tests" / "diffs" / f"{script}.diff"
    assert stored.exists(), "run: python tests/test_consistency.py --update"
    assert stored.read_text() == stored_diff(script), "run: python tests/test_consistency.py --update, and read the change"


def test_details_are_current():
    text = (ROOT / "DETAILS.md").read_text()
    assert text == updated_details(text), "run: python tests/test_consistency.py --update"


def test_every_tag_has_a_row_and_every_row_a_tag():
    rows = set(re.findall(r"^\| `(\d\d|ours: \w+|aux: \w+)` \|", (ROOT / "DETAILS.md").read_text(), re.M))
    used = {tag for script in SCRIPTS for tag in tags(script)}
    assert used <= rows, f"no row in DETAILS.md: {sorted(used - rows)}"
    assert {f"{i:02}" for i in range(1, 38)} <= rows
    assert rows <= used, f"no line carries: {sorted(rows - used)}"


def update():
    (ROOT / "tests" / "diffs").mkdir(exist_ok=True)
    for script in VARIANTS:
        (ROOT / "tests" / "diffs" / f"{script}.diff").write_text(stored_diff(script))
    (ROOT / "DETAILS.md").write_text(updated_details((ROOT / "DETAILS.md").read_text()))


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/test_consistency.py --update")
    update()
