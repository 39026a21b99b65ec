"""What users ran into, by its mechanism: spaces that changed, evaluations that fail, odd infos, locks, disks, foreign flags.

Most tests run the command line of each script that takes the environment, in this process.
"""

import contextlib
import hashlib
import importlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import MultiDiscrete

import ppo_continuous
from helpers import read_checkpoint, read_jsonl, run_script, tiny_flags
from odd_envs import Odd

ENVS = {"ppo_continuous": "Odd-v0", "ppo_kl_penalty": "Odd-v0", "ppo_shared_params": "OddDiscrete-v0"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test starts with the environment as it is written."""
    for name, value in list(vars(Odd).items()):
        if not name.startswith("_") and not callable(value):
            monkeypatch.setattr(Odd, name, value)


@pytest.fixture(params=ENVS)
def cli(request, monkeypatch, capsys):
    """words -> exit code, stdout, stderr of a script; cli.flags(...) are those of a short run, cli.env its environment."""
    script = importlib.import_module(request.param)

    def run(*words):
        monkeypatch.setattr(sys, "argv", [f"{request.param}.py", *map(str, words)])
        code: object = 0
        try:
            script.main()
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # what the interpreter prints
            code, err = 1, f"{err}{code}\n"
        assert "Traceback" not in err
        assert not list(Path().rglob("*.tmp"))
        return code or 0, out, err

    run.env = f"odd_envs:{ENVS[request.param]}"
    run.flags = lambda run_dir="run", **changes: tiny_flags(run_dir, **{"env": run.env} | changes)
    run.script = script
    run.evaluate = lambda *words: run("--evaluate", "run", "--env", run.env, *words)
    return run


# A: spaces and checkpoints


@pytest.mark.parametrize(("name", "size"), [("obs_dim", 3), ("obs_dim", 9), ("action_dim", 1), ("action_dim", 5)])
def test_other_spaces_than_those_of_the_training_are_refused(cli, monkeypatch, name, size):
    assert cli(*cli.flags(eval_episodes=1))[0] == 0
    before = Path("run/evaluation.json").read_bytes()
    monkeypatch.setattr(Odd, name, size)
    for words in (["--evaluate", "run", "--env", cli.env], ["--resume", "run", "--total-timesteps", 640]):
        code, out, err = cli(*words)
        assert (code, out) == (2, "")
        assert "the checkpoint was trained on the spaces" in err
        assert "but the environment has" in err
    assert Path("run/evaluation.json").read_bytes() == before


def change(checkpoint, what):
    if what == "no return_rms":
        del checkpoint["return_rms"]
    elif what == "no mean":
        del checkpoint["obs_rms"]["mean"]
    elif what == "short theta":
        checkpoint["theta"] = checkpoint["theta"][:-1]
    elif what == "one moment":
        checkpoint["adam"] = checkpoint["adam"][:1]
    elif what == "text for a number":
        checkpoint["global_step"] = "many"
    elif what == "NaN":
        checkpoint["theta"][3] = math.nan
    elif what == "device":
        checkpoint["args"]["device"] = "cuda:7"
    elif what == "type of a setting":
        checkpoint["args"]["gamma"] = "high"
    elif what == "no args":
        del checkpoint["args"]
    elif what == "args are a list":
        checkpoint["args"] = [*checkpoint["args"]]
    elif what == "NaN for a count":
        checkpoint["obs_rms"]["count"] = math.nan
    elif what == "negative size":
        checkpoint["log_sizes"]["metrics.jsonl"] = -1
    return checkpoint


DAMAGES = ["no return_rms", "no mean", "short theta", "one moment", "text for a number", "NaN", "device", "no args"]


DAMAGES += ["type of a setting", "args are a list", "NaN for a count", "negative size"]


@pytest.mark.parametrize("what", DAMAGES)
def test_a_checkpoint_that_lacks_something_is_refused_in_one_sentence(cli, what):
    cli(*cli.flags())
    torch.save(change(read_checkpoint("run"), what), "run/checkpoint.pt")
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    code, _, err = cli("--resume", "run", "--total-timesteps", 640)
    assert code == 2
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_checkpoint_that_unpacks_to_much_more_is_refused(cli):
    cli(*cli.flags())
    with zipfile.ZipFile("run/checkpoint.pt") as old, zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry.filename))
        new.writestr("checkpoint/data/99", bytes(50_000_000))
    code, _, err = cli("--evaluate", "bomb.pt", "--env", cli.env)
    assert (code, err.count("\n")) == (2, 1)
    assert "not a readable checkpoint" in err


# B: the closing evaluation


def test_an_episode_that_never_ends_is_cut_off(cli, monkeypatch):
    monkeypatch.setattr(Odd, "limit", 10**9)
    code, out, err = cli(*cli.flags(eval_episodes=3, eval_steps=50, num_envs=2))
    assert code == 0
    assert out.index("steps/s") < out.index("evaluation, ")
    assert err.count("3 evaluation episode(s) cut off after --eval-steps 50") == 1
    evaluation = json.loads(Path("run/evaluation.json").read_text())
    assert evaluation["returns"] == [50.0] * 3
    assert evaluation["lengths"] == [50] * 3
    assert evaluation["cut_off"] == 3


def test_a_simulator_of_one_instance_is_evaluated(cli, monkeypatch):
    monkeypatch.setattr(Odd, "single", True)
    code, out, _ = cli(*cli.flags(eval_episodes=3, num_envs=1, num_steps=64))
    assert code == 0
    assert "over 3 episodes" in out
    assert Odd.most_alive == 1
    assert Odd.alive == 0


@pytest.mark.parametrize("error", [None, ZeroDivisionError("camera")])
@pytest.mark.parametrize("pictures", [0, 7])
def test_a_video_that_fails_half_way_keeps_the_returns(cli, monkeypatch, pictures, error):
    cli(*cli.flags())
    monkeypatch.setattr(Odd, "camera_error", error)
    monkeypatch.setattr(Odd, "pictures", pictures)
    code, out, err = cli(*cli.flags("other", eval_episodes=2, capture_video=True))
    if pictures == 0:  # noticed before the training
        assert code == 2
        return
    assert code == 1
    assert "the video ends early" in err
    assert out.index("steps/s") < out.index("evaluation, ")
    assert json.loads(Path("other/evaluation.json").read_text())["returns"] == [10.0, 10.0]
    assert Path("other/evaluation.gif").is_file()


@pytest.mark.parametrize(("where", "value"), [("reward", math.nan), ("observation", math.nan), ("reward", math.inf)])
def test_a_number_that_is_not_finite_stops_the_evaluation_alone(cli, monkeypatch, where, value):
    sizes = {"num_envs": 1, "num_steps": 64, "num_minibatches": 2}
    flags = cli.flags(eval_episodes=4, **sizes)
    assert cli(*cli.flags("count", **sizes))[0] == 0
    steps = Odd.steps  # of the training
    monkeypatch.setattr(Odd, "steps", 0)
    monkeypatch.setattr(Odd, "bad", (steps + 25, where, value))
    code, out, err = cli(*flags)
    assert code == 1
    assert "4 episodes" not in out
    assert "the evaluation stopped after 2 of 4 episodes" in err
    assert out.index("steps/s") < out.index("evaluation, ")
    text = Path("run/evaluation.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["returns"] == [10.0, 10.0]
    assert read_checkpoint("run")["iteration"] == 4


def test_an_environment_that_cannot_be_closed_hides_no_result(cli, capsys, monkeypatch):
    cli(*cli.flags("count"))
    closed = Odd.closed
    monkeypatch.setattr(Odd, "closed", 0)
    monkeypatch.setattr(Odd, "fail_at_close", closed)  # the last one
    with pytest.raises(RuntimeError, match="the simulator has gone"):
        cli(*cli.flags(eval_episodes=1))
    assert "steps/s with start-up" in capsys.readouterr().out
    assert read_checkpoint("run")["iteration"] == 4


def test_an_evaluation_that_cannot_be_written_is_told(cli):
    cli(*cli.flags())
    os.mkdir("run/evaluation.json")
    code, out, err = cli.evaluate("--eval-episodes", 2)
    assert code == 1
    assert "return 10.0 +- 0.0, length 10 over 2 episodes" in out
    assert "cannot write run/evaluation.json: Is a directory" in err


# C: infos


@pytest.mark.parametrize(
    "info", [lambda t: {"path": np.zeros(t)}, lambda t: {"x": 1 if t % 2 else "text"}, lambda t: {"y": {t: t}}]
)
def test_infos_that_nobody_reads_may_have_any_shape(cli, monkeypatch, info):
    monkeypatch.setattr(Odd, "info", staticmethod(info))
    assert cli(*cli.flags(eval_episodes=2))[0] == 0


# D: numbers that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e160])
@pytest.mark.parametrize("where", ["observation", "reward"])
def test_it_is_noticed_before_it_reaches_environment_or_parameters(cli, monkeypatch, where, value):
    if value == 1e160 and where == "reward":
        pytest.skip("a large reward is a number")
    monkeypatch.setattr(Odd, "bad", (100, where, value))
    code, _, err = cli(*cli.flags(checkpoint_every=1, norm_obs="step", clip_obs=10.0))
    assert code == 1
    assert "non-finite" in err
    assert "in iteration 2" in err
    assert Odd.steps <= 102  # the environments of the same step, none after
    assert read_checkpoint("run")["iteration"] == 1
    assert "NaN" not in Path("run/metrics.jsonl").read_text()


@pytest.mark.parametrize("where", ["observation", "reward"])
def test_a_number_whose_square_is_not_finite_stops_the_run(cli, monkeypatch, where):
    """It would divide all that follows by infinity, so that nothing is learned, without a word."""
    monkeypatch.setattr(Odd, "bad", (100, where, 1e155))
    code, _, err = cli(*cli.flags(checkpoint_every=1, norm_obs="step", norm_reward=True, clip_obs=10.0))
    assert code == 1
    assert f"a non-finite variance of {'observations' if where == 'observation' else 'returns'} in iteration 2" in err
    assert read_checkpoint("run")["iteration"] == 1


# E: settings that learn nothing, or start what was not meant


@pytest.mark.parametrize("norm_adv", ["minibatch", "batch"])
def test_minibatches_of_one_step_cannot_be_normalized(cli, norm_adv):
    sizes = {
        "num_envs": 1,
        "num_steps": 8 if norm_adv == "minibatch" else 1,
        "num_minibatches": 8 if norm_adv == "minibatch" else 1,
    }
    code, _, err = cli(*cli.flags(norm_adv=norm_adv, **sizes))
    assert code == 2
    assert "makes the advantage of a single step 0" in err
    assert cli(*cli.flags(norm_adv="none", **sizes, total_timesteps=16))[0] == 0


def test_an_empty_dict_is_refused(cli):
    code, _, err = cli(*cli.flags(env="odd_envs:Blind-v0"))
    assert code == 2
    assert "cannot make environment odd_envs:Blind-v0: An empty Dict" in err
    assert os.listdir() == []


def test_the_reset_of_the_old_gym_is_refused(cli):
    code, _, err = cli(*cli.flags(env=cli.env.replace("Odd", "OldReset")))
    assert code == 2
    assert re.search(r"reset of the environment returned array.*: it must return \(observation, info\)\n$", err)
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("NoSeed", "reset of the environment must take seed and options: "),
        ("Wrong_constructor", r"cannot make environment odd_envs:Wrong_constructor\w*-v0: AssertionError\(\)"),
        ("Wrong_spaces", "cannot make environment .*: The environment must specify an observation space"),
        ("Wrong_reset", r"the environment returned array\(.*, which does not fit its space Box"),
        ("Wrong_step", r"the environment returned array\(.*, which does not fit its space Box"),
        ("Wrong_four_values", "step of the environment must return observation, reward, terminated, truncated and info: "),
        ("Wrong_reward", r"step of the environment returned the reward array\(\[1.\]\): it must be a number"),
    ],
)
def test_an_environment_that_does_not_keep_to_the_api(cli, name, sentence):
    code, _, err = cli(*cli.flags(env=cli.env.replace("Odd", name)))
    assert code == 2
    assert re.search(f"error: {sentence}", err.splitlines()[-1]), err


@pytest.mark.parametrize("what", ["obs_dim", "action_dim"])
def test_an_empty_space_is_refused(cli, monkeypatch, what):
    if what == "action_dim" and cli.env.endswith("OddDiscrete-v0"):
        pytest.skip("Gymnasium allows no Discrete of nothing")
    monkeypatch.setattr(Odd, what, 0)
    code, _, err = cli(*cli.flags())
    assert (code, err.count("\n")) == (2, 1)
    assert "neither may be empty" in err
    assert os.listdir() == []


@pytest.mark.parametrize("outside", [-1, 3])
def test_a_choice_outside_of_the_space_is_not_taken_for_another(cli, monkeypatch, outside):
    space = MultiDiscrete([3, 3])
    assert cli.script.flatten_obs(np.array([[0, 2]]), space).tolist() == [[1, 0, 0, 0, 0, 1]]
    with pytest.raises(cli.script.UsageError, match=r"which is not in its observation space MultiDiscrete\(\[3 3\]\)"):
        cli.script.flatten_obs(np.array([[0, 1], [outside, 2]]), space)


def test_masks_that_change_their_size(cli):
    """Of one environment alone; scripts without masks do not read them."""
    Odd.info = lambda time: {"action_mask": np.ones(2 + Odd.steps % 2, dtype=bool)}
    code, _, err = cli(*cli.flags(num_envs=2))
    assert code == (2 if cli.env.endswith("OddDiscrete-v0") else 0)
    assert ("masks of {2, 3} entries, but there are 2 choices: a mask has" in err) == (code == 2)


@pytest.mark.parametrize("run_dir", ["file/a/b", "x" * 300, f"new/{'x' * 300}/b"])
def test_a_run_directory_that_cannot_be_made(cli, run_dir):
    Path("file").write_text("")
    code, _, err = cli(*cli.flags(run_dir))
    assert code == 2
    assert f"error: cannot write the run directory {run_dir}: " in err
    assert os.listdir() == ["file"]


def test_a_run_directory_that_cannot_be_written_leaves_no_parents(cli):
    """The copy of the script is larger than a file may be."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code, _, err = cli(*cli.flags("new/a/run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert "error: cannot write the run directory new/a/run: File too large" in err
    assert os.listdir() == []


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_an_empty_path_starts_nothing(cli, flag):
    code, _, err = cli(*cli.flags(), flag, "")
    assert code == 2
    assert "is empty" in err
    assert os.listdir() == []


def test_a_run_cannot_be_shortened_below_what_is_done(cli):
    cli(*cli.flags())
    code, _, err = cli("--resume", "run", "--total-timesteps", 128)
    assert code == 2
    assert "the run has done 256" in err
    assert read_checkpoint("run")["args"]["total_timesteps"] == 256


# F: one run directory, one process


def test_a_second_process_is_refused_while_the_first_one_writes(cli):
    cli(*cli.flags())
    run = object.__new__(cli.script.Run)
    run.dir = Path("run")
    run.lock()
    code, _, err = cli("--resume", "run", "--total-timesteps", 640)
    assert code == 2
    assert "another process is writing run" in err
    run.unlock()
    assert cli("--resume", "run", "--total-timesteps", 640)[0] == 0
    assert len(read_jsonl("run/metrics.jsonl")) == 11


def test_names_of_two_runs_of_one_second_differ():
    names = {ppo_continuous.Args().run_dir for _ in range(20)}
    assert len(names) == 20


def test_a_run_that_died_before_its_first_checkpoint_can_be_started_again(cli):
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text("{")
    Path("run/checkpoint.tmp").write_text("half")
    assert cli(*cli.flags())[0] == 0
    assert len(read_jsonl("run/metrics.jsonl")) == 5
    Path("other").mkdir()
    Path("other/thesis.tex").write_text("precious")
    code, _, err = cli(*cli.flags("other"))
    assert code == 2
    assert "other exists: another --run-dir starts anew" in err


# G: disks and streams


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_one(cli, monkeypatch):
    real = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("checkpoint.tmp") and Path("run/checkpoint.pt").exists():
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = cli(*cli.flags(checkpoint_every=1))
    assert code == 1
    assert "No space left on device; the last checkpoint is run/checkpoint.pt" in err
    assert read_checkpoint("run")["iteration"] == 0


def test_a_checkpoint_is_never_written_through_a_link():
    Path("precious").write_text("keep")
    Path("a.tmp").symlink_to("precious")
    ppo_continuous.write_atomically(Path("a.pt"), b"new")
    assert Path("precious").read_text() == "keep"
    assert Path("a.pt").read_bytes() == b"new"
    assert not Path("a.tmp").exists()


def test_a_compiler_that_fails_is_named_with_the_way_round_it(tmp_path):
    run = run_script(*tiny_flags(compile=True), CXX="false", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("ppo_continuous.py: torch.compile refuses the update (")
    assert run.stderr.endswith("; --no-compile runs without it\n")


def test_a_signal_is_ignored_after_another_but_not_for_ever(cli, monkeypatch):
    """An environment may swallow the first: then the next one has to work."""
    for past, heeded in ((math.inf, True), (11, True), (9, False)):
        monkeypatch.setattr(cli.script, "SIGNALS", [time.monotonic() - past])
        with pytest.raises(KeyboardInterrupt) if heeded else contextlib.nullcontext():
            cli.script.stop_at_signal(signal.SIGINT, None)
        cli.script.stop_at_signal(signal.SIGTERM, None)


def test_closed_streams():
    words = " ".join(tiny_flags(eval_episodes=1))
    done = subprocess.run(f"{sys.executable} {ppo_continuous.__file__} {words} >&- 2>&-", shell=True, check=False)
    assert done.returncode == 0
    assert read_checkpoint("run")["iteration"] == 4


# I: sizes beyond the machine


@pytest.mark.parametrize("name", ["num_envs", "num_steps", "eval_episodes", "num_threads", "update_epochs", "eval_steps"])
@pytest.mark.parametrize("size", [10**8, 10**12, 2**31, 2**63])
def test_sizes_beyond_the_machine_are_refused(cli, name, size):
    if name in ("update_epochs", "eval_steps") and size < 2**31:
        pytest.skip("takes long, but can be done")
    code, _, err = cli(*cli.flags(**{name: size, "total_timesteps": 10**30}))
    assert code == 2
    assert err.count("\n") == 1
    assert os.listdir() == []


# J: what does not fit says where to go


def test_an_environment_of_ones_own_is_found_by_its_hint(cli):
    code, _, err = cli("--env", "Nowhere-v0")
    assert code == 2
    assert "my_module:Nowhere-v0" in err


def test_a_namespace_makes_no_nested_directory():
    args = ppo_continuous.Args(env="odd_envs:odd/Space-v0")
    assert Path(args.run_dir).parent == Path("runs")


# L: trust


def test_evaluating_a_checkpoint_imports_no_module_that_only_it_names(cli):
    cli(*cli.flags())
    checkpoint = read_checkpoint("run")
    checkpoint["args"]["env"] = "evil:Env-v0"
    torch.save(checkpoint, "run/checkpoint.pt")
    Path("evil.py").write_text("open('pwned', 'w').close()\n")
    code, _, err = cli("--evaluate", "run")
    assert code == 2
    assert "add --env evil:Env-v0" in err
    with pytest.raises(cli.script.UsageError, match="add --env evil:Env-v0"):
        cli.script.load_policy("run")
    assert not Path("pwned").exists()


# N: seeing what happens


def test_without_a_terminal_the_progress_is_told(cli, monkeypatch):
    code, out, err = cli(*cli.flags())
    assert code == 0
    assert "256 of 256 steps (100%)" in err
    assert "steps/s" in out
    assert " 0 steps/s" not in out


def test_a_run_of_one_iteration_says_its_speed(cli):
    _, out, _ = cli(*cli.flags(total_timesteps=64))
    assert " 0 steps/s" not in out
    assert "steps/s with start-up" in out


# P: the header tells machines apart; JSON holds no infinity


def test_the_header_is_strict_json_and_names_the_kind_of_cpu(cli):
    cli(*cli.flags(clip_reward=math.inf, max_grad_norm=math.inf))
    line = Path("run/metrics.jsonl").read_text().splitlines()[0]
    assert "Infinity" not in line
    header = json.loads(line)
    assert header["args"]["clip_reward"] == "inf"
    assert header["cpu_kernels"] == torch.backends.cpu.get_cpu_capability()
    assert header["cpu_kind"]


def overflow(learn):
    """learn, after which the last parameter is infinite; no loss shows it, because none is computed after the last step."""

    def learn_too_fast(update, theta, *others):
        result = learn(update, theta, *others)
        theta[-1] = math.inf
        return result

    return learn_too_fast


def test_parameters_that_overflow_reach_no_checkpoint_and_no_environment(cli, monkeypatch):
    """In the last step of an iteration, after which a checkpoint is due, or the next rollout."""
    for run_dir, every in (("due", 1), ("later", 100)):
        with monkeypatch.context() as patch:
            patch.setattr(cli.script, "learn", overflow(cli.script.learn))
            code, _, err = cli(*cli.flags(run_dir, checkpoint_every=every))
        assert code == 1
        assert re.search("stopped: (non-finite|the parameters of the policy are not finite)", err.splitlines()[-1])
        assert f"the last checkpoint is {run_dir}/checkpoint.pt" in err
        assert cli("--resume", run_dir)[0] == 0  # it is a good one
        assert read_checkpoint(run_dir)["theta"].isfinite().all()


def test_an_evaluation_that_is_interrupted_keeps_what_was_played(cli, monkeypatch):
    assert cli(*cli.flags())[0] == 0
    interrupted = {"after": 2 * 10 * 3 + 4}  # steps: three episodes of two environments, and a bit
    step = Odd.step

    def stop(self, action):
        interrupted["after"] -= 1
        if interrupted["after"] == 0:
            raise KeyboardInterrupt(signal.SIGTERM)
        return step(self, action)

    monkeypatch.setattr(Odd, "step", stop)
    code, _, err = cli.evaluate("--eval-episodes", 100)
    assert code == 128 + signal.SIGTERM
    assert "the evaluation was interrupted after 6 of 100 episodes" in err.splitlines()[-1]
    evaluation = json.loads(Path("run/evaluation.json").read_text())
    assert (evaluation["lengths"], evaluation["cut_off"]) == ([10] * 6, 0)


def test_an_edited_script_or_the_logs_of_a_run_are_not_overwritten(cli):
    script = Path(f"{cli.script.KIND}.py")
    Path("mine").mkdir()
    (Path("mine") / script).write_text(Path(cli.script.__file__).read_text() + "# mine\n")
    cli(*cli.flags("logs"))
    Path("logs/checkpoint.pt").unlink()
    for run_dir in ("mine", "logs"):
        before = {path: path.read_bytes() for path in Path(run_dir).iterdir()}
        code, _, err = cli(*cli.flags(run_dir))
        assert (code, err.count("\n")) == (2, 1)
        assert f"{run_dir} exists: another --run-dir starts anew" in err
        assert {path: path.read_bytes() for path in Path(run_dir).iterdir()} == before


def test_the_script_of_a_run_is_the_text_that_ran(tmp_path):
    """It is edited after it was read, while torch is imported."""
    copy = tmp_path / "my_ppo.py"
    text = Path(ppo_continuous.__file__).read_text()
    edit = 'open(__file__, "a").write("# edited after the start")\n'  # the file, not what Python has read of it
    copy.write_text(text.replace("import envpool\n", f"{edit}import envpool\n", 1))
    ran = copy.read_bytes()
    assert run_script(*tiny_flags(), script=copy).returncode == 0
    assert copy.read_bytes() == ran + b"# edited after the start"
    assert Path("run/my_ppo.py").read_bytes() == ran
    assert read_jsonl("run/metrics.jsonl")[0]["script_sha256"] == hashlib.sha256(ran).hexdigest()
