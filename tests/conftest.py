"""Paths and threads of all tests: `import ppo_continuous`, `import envs` and `import helpers` work from anywhere."""

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


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path, monkeypatch):
    """No test writes into the repository."""
    monkeypatch.chdir(tmp_path)
