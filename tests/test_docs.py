"""Every command in the documents parses, every flag that they name exists, and a sample of the commands runs.

Commands are `python SCRIPT ...`, `uv run SCRIPT ...` and `torchrun ... SCRIPT ...` up to a comment, a description after two
spaces, `&&` or the end of the line.
"""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import tyro

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.name: importlib.import_module(path.stem) for path in sorted(ROOT.glob("ppo_*.py"))}
DOCUMENTS = ["README.md", "DETAILS.md", "benchmarks/README.md", "benchmarks/RESULTS.md"]
DOCUMENTS += [f"{path.relative_to(ROOT)}" for path in sorted([*ROOT.glob("ppo_*.py"), *ROOT.glob("benchmarks/*.py")])]
MARKDOWN = [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")]
COMMAND = re.compile(r"(?:\bpython3?|\buv run|\btorchrun\b[^`\n]*?)\s((?:benchmarks/)?[a-z]\w*\.py)\b([^`\n]*)")


class Command(NamedTuple):
    document: str
    script: str  # path in the repository
    words: list[str]


class Parsed(BaseException):
    """Stops a script once its arguments are parsed: (parser, result)."""


def text_of(document: str) -> str:
    path = ROOT / document
    if not path.exists():
        return ""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    return re.sub(r"\\\n\s*", " ", text)


def commands(document: str) -> list[Command]:
    found = []
    for line in text_of(document).splitlines():
        copies = {copy: original for original, copy in re.findall(r"\bcp (\w+\.py) (\w+\.py)", line)}
        for script, rest in COMMAND.findall(line):
            words = shlex.split(re.split(r"\s{2,}|\s#|&&|[|;]", rest)[0])
            found.append(Command(document, copies.get(script, script), words))
    return found


COMMANDS = [command for document in DOCUMENTS for command in commands(document)]


def named(command: Command) -> str:
    return " ".join([command.document, command.script, *command.words])


def parse_benchmark(command: Command, monkeypatch):
    """Runs a script of benchmarks/ up to its parsed arguments. Packages that only a real run needs may be missing."""
    parsers = {name: getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_known_args")}

    def parse_args(self, args=None, namespace=None):
        with monkeypatch.context() as patch:  # it calls parse_known_args itself
            patch.setattr(argparse.ArgumentParser, "parse_known_args", parsers["parse_known_args"])
            raise Parsed(self, parsers["parse_args"](self, args, namespace))

    def parse_known_args(self, args=None, namespace=None):
        known, _ = parsers["parse_known_args"](self, args, namespace)
        raise Parsed(self, known)

    class Missing(types.ModuleType):
        __path__: list[str] = []  # noqa: RUF012

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [command.script, *command.words])
    for _ in range(20):
        try:
            runpy.run_path(str(ROOT / command.script), run_name="__main__")
        except ModuleNotFoundError as error:
            name = str(error.name)
            monkeypatch.setitem(sys.modules, name, Missing(name))
        except Parsed as parsed:
            return parsed.args
    raise AssertionError(f"{command.script} parsed no arguments")


def sweep_flags(words: list[str]) -> dict[str, list[str]]:
    """--flag a b --other -> {"--flag": [a, b], "--other": []}"""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flags[word] = []
        elif flags:
            flags[list(flags)[-1]].append(word)
    return flags


@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_command_parses(command, monkeypatch, capsys):
    path = ROOT / command.script
    assert path.exists(), f"{command.document} names {command.script}, which does not exist"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the reader may have a GPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if command.script in SCRIPTS:
        if "--help" in command.words:
            with pytest.raises(SystemExit) as stopped:
                tyro.cli(SCRIPTS[command.script].Args, args=command.words)
            assert stopped.value.code == 0
        else:
            tyro.cli(SCRIPTS[command.script].Args, args=command.words)
        return
    parser, _ = parse_benchmark(command, monkeypatch)
    if command.words[:1] == ["sweep"]:
        script, *words = command.words[1:]
        for flag, values in sweep_flags(words).items():
            if flag not in parser._option_string_actions:
                for value in values:
                    tyro.cli(SCRIPTS[script].Args, args=[flag, value])


def test_commands_are_found():
    """The pattern misses no document that has commands."""
    for document in DOCUMENTS:
        if document in SCRIPTS or (document == "README.md" and (ROOT / document).exists()):
            assert len(commands(document)) >= 3, document


def accepts(script: str, words: list[str]) -> bool:
    """Whether a flag, with its value if one is given, is one of the script's."""
    fields = {"--" + name.replace("_", "-"): f.type for name, f in SCRIPTS[script].Args.__dataclass_fields__.items()}
    fields |= {flag.replace("--", "--no-", 1): "bool" for flag, kind in fields.items() if kind in (bool, "bool")}
    if words[0] not in fields:
        return False
    if len(words) > 1:
        try:
            tyro.cli(SCRIPTS[script].Args, args=words)
        except (SystemExit, SCRIPTS[script].UsageError):
            return False
    return True


def flag_spans(text: str) -> list[list[str]]:
    return [shlex.split(span) for span in re.findall(r"`(--[a-z][^`]*)`", text)]


@pytest.mark.parametrize("document", ["README.md", "DETAILS.md"])
def test_flags_in_documents_exist(document, capsys):
    for line in text_of(document).splitlines():
        linked = [script for script in SCRIPTS if script in line] or list(SCRIPTS)
        for words in flag_spans(line):
            assert any(accepts(script, words) for script in linked), f"{document}: {' '.join(words)} in: {line[:100]}"


def anchor(heading: str) -> str:
    """The name that a heading gets in a link."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", [*DOCUMENTS[:4], "CONTRIBUTING.md", "benchmarks/LOG.md", "benchmarks/reference/README.md"])
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        name, _, place = link.partition("#")
        if name.startswith("http"):
            continue
        target = (ROOT / document).parent / name if name else ROOT / document
        assert target.exists(), f"{document}: {link}"
        if place and target.suffix == ".md":
            headings = [anchor(heading) for heading in re.findall(r"^#+ (.*)$", target.read_text(), re.M)]
            assert place in headings, f"{document}: {link}"


def without(words: list[str], flags: set[str]) -> list[str]:
    """Words of a command line without these flags and their values."""
    kept, skipping = [], False
    for word in words:
        skipping = word in flags if word.startswith("--") else skipping
        if not skipping:
            kept.append(word)
    return kept


def training_commands():
    """The first training command of each script's docstring; that of Atari is slow.

    ppo_rlhf.py trains other models before PPO, for minutes: test_rlhf.py runs it on a small file.
    """
    chosen = []
    for name in sorted(set(SCRIPTS) - {"ppo_rlhf.py"}):
        training = [c for c in commands(name) if not {"--evaluate", "--resume", "--help", "--track"} & set(c.words)]
        marks = [pytest.mark.slow] if name == "ppo_atari.py" else []
        chosen += [pytest.param(command, id=named(command), marks=marks) for command in training[:1]]
    return chosen


@pytest.mark.parametrize("command", training_commands())
def test_training_command_of_the_docstring_runs(command, monkeypatch, capsys):
    tiny = {"--num-envs": "2", "--num-steps": "8", "--total-timesteps": "32", "--num-minibatches": "2", "--update-epochs": "1"}
    tiny |= {"--eval-episodes": "0", "--run-dir": "run"}
    words = without(command.words, set(tiny)) + [word for pair in tiny.items() for word in pair] + ["--no-compile"]
    monkeypatch.setattr(sys, "argv", [command.script, *words])
    SCRIPTS[command.script].main()
    assert "run directory: run" in capsys.readouterr().out
    assert Path("run/checkpoint.pt").exists()
    if command.script == "ppo_atari.py":
        return  # a whole game is long
    # and the saved run can be evaluated by the docstring's other command
    monkeypatch.setattr(sys, "argv", [command.script, "--evaluate", "run", "--eval-episodes", "1"])
    SCRIPTS[command.script].main()
    assert "over 1 episodes" in capsys.readouterr().out


def test_code_in_the_readme_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    ppo_continuous = SCRIPTS["ppo_continuous.py"]
    ppo_continuous.train(
        ppo_continuous.Args(
            env="Walker2d", run_dir="runs/walker", total_timesteps=64, num_steps=64, compile=False, eval_episodes=0
        )
    )
    names: dict[str, Any] = {"observations": np.zeros((3, 17))}
    exec(code, names)
    assert names["actions"].shape == (3, 6)


@pytest.mark.parametrize("document", sorted(str(path.relative_to(ROOT)) for path in MARKDOWN))
def test_tables_and_lists_are_lines_of_their_own(document):
    """A text that was wrapped anew must not swallow them."""
    lines = (ROOT / document).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        assert not re.search(r"\S.*\|\s*:?---", line) or re.fullmatch(r"\s*\|[\s:|-]+\|", line), f"{document}:{number}: {line}"
        assert not re.search(r"\S - \*\*", line), f"{document}:{number}: {line}"
        if line.lstrip().startswith("|"):
            before, after = lines[number - 2].lstrip(), (lines[number : number + 1] or [""])[0].lstrip()
            first = not before.startswith("|")
            assert not first or re.fullmatch(r"\|[\s:|-]+\|", after), f"{document}:{number}: a table without a head: {line}"
            assert first or line.count("|") == lines[number - 2].count("|"), f"{document}:{number}: other columns: {line}"
