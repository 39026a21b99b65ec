"""Any of the scripts in a process of its own, forked from one that has imported them all (20 ms instead of seconds)."""

import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("ppo_continuous", "ppo_kl_penalty", "ppo_shared_params", "ppo_atari")
CACHE = Path(tempfile.gettempdir(), f"ppo_tests_{os.getuid()}")  # of the stages of ppo_rlhf.py, which are trained once
CONTEXT: Any = multiprocessing.get_context("forkserver")
# the last one is what --device cuda imports of the compiler
CONTEXT.set_forkserver_preload(["warm", "jitted", "envs", "rewards", *SCRIPTS, "ppo_rlhf", "torch._inductor.cudagraph_trees"])


def run_child(body: Callable, args: tuple, folder: str, stdout: str, stderr: str):
    """Body of a child: body(*args) in `folder`, as the leader of a process group of its own; output is appended to files."""
    os.setsid()
    os.chdir(folder)
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    body(*args)


def run_main(name: str, words: list[str], env: dict[str, str], limits: dict[int, int]):
    """The command line `name.py words...`."""
    os.environ.update(env)
    script = importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    if handler := getattr(script, "stop_at_signal", None):  # a script sets it where it is the main module
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, handler)
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
    sys.argv = [str(ROOT / f"{name}.py"), *words]
    script.main()


@dataclass
class Ended:
    """What is left of a process: exit code (None: a limit struck), seconds it took and the most memory it had, in bytes."""

    code: int | None
    seconds: float
    memory: int
    why: str = ""


class Warm:
    """`name.py words...` in `folder`. Its stdout and stderr are appended to files, by default beside the folder."""

    def __init__(self, name: str, words: list[str], folder: Path, stdout="", stderr="", env=None, limits=None):
        self.stdout, self.stderr = (Path(x or f"{folder}.{y}") for x, y in ((stdout, "out"), (stderr, "err")))
        for path in (self.stdout, self.stderr):
            path.touch()
        args = (name, words, env or {}, limits or {})
        self.process = CONTEXT.Process(
            target=run_child, args=(run_main, args, str(folder.resolve()), str(self.stdout), str(self.stderr))
        )
        self.process.start()

    def send(self, number: int):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL, "it had ended by itself"

    def alive(self) -> bool:
        return self.process.is_alive()

    def wait(self, seconds: float = 300) -> int:
        """Exit code, -9 after SIGKILL."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "the child did not end"
        return self.process.exitcode


def session(leader: int) -> list[tuple[int, int, float]]:
    """(pid, memory in bytes, seconds on the processor) of each process of the session that `leader` began (Linux only)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text().rpartition(")")[2].split()  # from the state on
        except OSError:
            continue  # it ended meanwhile
        if int(words[3]) == leader and words[0] not in "ZX":
            seconds = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
            found.append((int(folder.name), int(words[21]) * os.sysconf("SC_PAGE_SIZE"), seconds))
    return found


def kill_session(leader: int) -> int:
    """Kills what is left of it and returns how many processes that were."""
    left = session(leader)
    for pid, _, _ in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(left)


def watch(leader: int, poll: Callable[[], int | None], seconds: float, memory: int) -> Ended:
    """Waits for the process whose exit code poll() returns (None: it runs), and kills its session beyond a limit.

    The limit in seconds is one of the time on the processor, since a machine that others use is slower, and of the clock
    on the wall where it only sleeps. Memory is what all processes of the session have together, in bytes.
    """
    start, most, why = time.monotonic(), 0, ""
    while (code := poll()) is None:
        time.sleep(0.02)
        processes = session(leader)
        elapsed, busy = time.monotonic() - start, sum(cpu for _, _, cpu in processes)
        most = max(most, sum(rss for _, rss, _ in processes))
        if most > memory:
            why = f"took {most / 2**30:.1f} GB of memory"
        elif busy > seconds or elapsed > seconds + 50 * busy:
            why = f"ran for {elapsed:.0f} s ({busy:.0f} s on the processor)"
        if why:
            kill_session(leader)
            break
    return Ended(code, time.monotonic() - start, most, why)
