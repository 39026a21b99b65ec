"""Paths and threads of all tests: `import ppo_continuous`, `import envs` and `import helpers` work from anywhere."""

import importlib
import os
import sys
from pathlib import Path

import pytest

PATHS = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])  # for subprocesses

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("ppo", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("ppo")


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs `script.py words...` in this process: name of the script, words -> exit code, stdout, stderr."""

    def run(script: str, *words) -> tuple[int, str, str]:
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
        code = 0
        try:
            module.main()
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path, monkeypatch):
    """No test writes into the repository."""
    monkeypatch.chdir(tmp_path)
