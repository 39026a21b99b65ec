"""What cannot run is refused in one clear sentence on stderr with exit code 2, and nothing is left half-written."""

import json
import os
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import envs
import ppo_continuous
from helpers import SCRIPT, read_checkpoint, read_jsonl, run_script, tiny_args, tiny_flags
from ppo_continuous import main, train


@pytest.fixture
def fails(monkeypatch, capsys):
    """Runs the command line in this process, which must fail: words -> the one line on stderr."""

    def run(*words, code=2):
        before = sorted(Path().rglob("*"))
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert stopped.value.code == code
        if code == 2:
            assert sorted(Path().rglob("*")) == before
            assert err.count("\n") == 1, err
            assert err.startswith("ppo_continuous.py: error: ")
        assert out == ""
        return err.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "HalfCheeta"}, r"unknown environment HalfCheeta; nearest names: .*HalfCheetah-v\d"),
        ({"env": "Xyzzy-v9"}, r"unknown environment Xyzzy-v9; nearest names: \S+"),
        ({"env": "no_such_module:MyEnv-v0"}, r"cannot make environment no_such_module:MyEnv-v0: No module named"),
        ({"env": "envs:NoSuchEnv-v0"}, r"cannot make environment envs:NoSuchEnv-v0: .*NoSuchEnv"),
        ({"env": "CartPole-v1"}, r"action space is Discrete\(2\).* needs a Box of floats: use ppo_shared_params.py"),
        (
            {"env": "envs:DiscreteActions-v0"},
            r"action space is Discrete\(3\).* needs a Box of floats: use ppo_shared_params.py",
        ),
        ({"env": "envs:IntegerActions-v0"}, r"action space is Box\(0, 5, .* needs a Box of floats: use ppo_shared_params.py"),
        ({"env": ":CartPole-v1"}, r"unknown environment :CartPole-v1: .* my_module:MyEnv-v0"),
        ({"env": ".m:Env-v0"}, r"unknown environment .m:Env-v0"),
        ({"env": "a:b:c"}, r"unknown environment a:b:c"),
        ({"num_minibatches": 3}, r"num_envs \* num_steps = 64 does not divide into num_minibatches = 3"),
        ({"num_minibatches": 128}, r"64 does not divide into num_minibatches = 128"),
        ({"total_timesteps": 63}, r"total_timesteps is 63, less than one rollout of .* 64 steps"),
        ({"total_timesteps": -1}, r"total_timesteps is -1, less than one rollout"),
        ({"num_envs": 0}, r"num_envs is 0: it must be at least 1"),
        ({"num_steps": -5}, r"num_steps is -5: it must be at least 1"),
        ({"num_minibatches": 0}, r"num_minibatches is 0"),
        ({"update_epochs": 0}, r"update_epochs is 0"),
        ({"checkpoint_every": 0}, r"checkpoint_every is 0"),
        ({"num_threads": 0}, r"num_threads is 0"),
        ({"learning_rate": -1e-3}, r"learning_rate is -0.001: it must be above 0"),
        ({"learning_rate": 0}, r"learning_rate is 0"),
        ({"learning_rate": "nan"}, r"learning_rate is nan: it must be above 0"),
        ({"learning_rate": "inf"}, r"learning_rate is inf: it must be finite"),
        ({"clip_coef": -0.2}, r"clip_coef is -0.2"),
        ({"clip_coef": "nan"}, r"clip_coef is nan"),
        ({"max_grad_norm": 0}, r"max_grad_norm is 0"),
        ({"adam_eps": "nan"}, r"adam_eps is nan"),
        ({"clip_obs": -10}, r"clip_obs is -10"),
        ({"clip_reward": "nan"}, r"clip_reward is nan"),
        ({"ent_coef": -0.01}, r"ent_coef is -0.01: it must be finite and at least 0"),
        ({"ent_coef": "nan"}, r"ent_coef is nan"),
        ({"vf_coef": "inf"}, r"vf_coef is inf"),
        ({"seed": -1}, r"seed is -1"),
        ({"eval_episodes": -1}, r"eval_episodes is -1"),
        ({"gamma": 1.01}, r"gamma is 1.01: it must lie between 0 and 1"),
        ({"gamma": "nan"}, r"gamma is nan"),
        ({"gae_lambda": -0.1}, r"gae_lambda is -0.1"),
        ({"target_kl": -0.01}, r"target_kl is -0.01: it must be above 0, or None"),
        ({"target_kl": "nan"}, r"target_kl is nan"),
        ({"device": "toaster"}, r"device is toaster: use cpu, cuda or cuda:1"),
        ({"device": "meta"}, r"device is meta: use cpu, cuda or cuda:1"),
        ({"device": "cpu:0"}, r"device is cpu:0: use cpu, cuda or cuda:1"),
        ({"capture_video": True, "eval_episodes": 0}, r"capture_video records an evaluation episode"),
        ({"capture_video": True, "eval_episodes": 1}, r"capture_video needs an environment that draws itself"),
        (
            {"capture_video": True, "eval_episodes": 1, "env": "envs:DrawsFloats-v0"},
            r"capture_video needs an environment that draws itself, in bytes \(TypeError",
        ),
        (
            {"capture_video": True, "eval_episodes": 1, "env": "envs:DrawsWithoutPygame-v0"},
            r"capture_video needs an environment that draws itself, .*DependencyNotInstalled.*pygame",
        ),
        (
            {"capture_video": True, "eval_episodes": 1, "env": "envs:ConstantReward-v0"},
            r"capture_video needs an environment that draws itself: .*unexpected keyword argument 'render_mode'",
        ),
        ({"env": "Hopper-v2"}, r"cannot make environment Hopper-v2: .*mujoco"),
        ({"resume": "nowhere"}, r"there is no checkpoint nowhere"),
        ({"resume": "one", "evaluate": "other"}, r"give one of them"),
        ({"evaluate": "nowhere/checkpoint.pt"}, r"there is no checkpoint nowhere/checkpoint.pt"),
    ],
)
def test_one_sentence(fails, changes, message):
    assert re.search(message, fails(*tiny_flags(**changes)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_asked_for_where_there_is_none(fails):
    assert "device is cuda:0, but torch finds 0 GPU(s) here: use --device cpu" in fails(*tiny_flags(device="cuda:0"))


@pytest.mark.parametrize("words", [["--no-such-flag", "1"], ["--learning-rate", "fast"], ["--weight-init", "zeros"]])
def test_flags_that_do_not_parse(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err
    assert os.listdir() == []


def damaged(kind):
    """A checkpoint file that is none."""
    file = Path("damaged.pt")
    if kind == "empty":
        file.touch()
    elif kind == "truncated":
        train(tiny_args())
        whole = Path("run/checkpoint.pt").read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        file.write_text("not a checkpoint\n")
    elif kind == "foreign":
        torch.save({"model": torch.zeros(3)}, file)
    elif kind == "tensor":
        torch.save(torch.zeros(3), file)
    elif kind == "other script":
        torch.save({"kind": "ppo_atari", "args": {}}, file)
    elif kind == "code":  # only code that a checkpoint must not run could be in it
        torch.save({"kind": ppo_continuous.KIND, "args": Path("x")}, file)
    elif kind == "other version":
        torch.save({"kind": ppo_continuous.KIND, "args": {"no_such_flag": 1}}, file)
    return file


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "foreign", "tensor", "other script", "code", "other version"])
def test_damaged_or_foreign_checkpoint(fails, capsys, kind, flag):
    file = damaged(kind)
    capsys.readouterr()
    line = fails(flag, file)
    assert str(file) in line
    assert re.search(r"is not a readable checkpoint|is not a checkpoint of ppo_continuous|version of this script", line)


def test_run_directory_that_exists(fails, capsys):
    train(tiny_args())
    capsys.readouterr()
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert "run exists: --resume run continues it, another --run-dir starts anew" in fails(*tiny_flags("run"))
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


def test_run_directory_that_cannot_be_written(fails):
    Path("file").touch()
    assert "cannot write the run directory file/run: Not a directory" in fails(*tiny_flags("file/run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_run_directory_without_permission(fails):
    Path("locked").mkdir(mode=0o500)
    assert "cannot write the run directory locked/run: Permission denied" in fails(*tiny_flags("locked/run"))


def test_wandb_without_login(fails, monkeypatch, tmp_path_factory):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda **options: False)  # what it answers without a key; it would ask the network
    assert "--track needs a login: run `wandb login`, or set WANDB_MODE=offline" in fails(*tiny_flags(track=True))


def test_wandb_project_that_wandb_refuses(fails, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "wandb_project_name is a/b: " in fails(*tiny_flags(track=True, wandb_project_name="a/b"))


class RefusingServer(BaseHTTPRequestHandler):
    """Of W&B what wandb.init asks for, over HTTP: it knows the user, but no entity to start a run for."""

    def do_POST(self):
        query = self.rfile.read(int(self.headers["Content-Length"]))
        refused = b"mutation UpsertBucket" in query
        user = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        answer = {"errors": [{"message": "entity nobody not found"}]} if refused else {"data": {"viewer": user}}
        self.send_response(404 if refused else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format, *args):
        """Nothing on stderr."""


def test_wandb_login_that_the_server_refuses():
    class Stranger(RefusingServer):
        def do_POST(self):
            self.send_response(401)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online = {"WANDB_MODE": "online", "WANDB_API_KEY": 40 * "a", "WANDB_SILENT": "true"}
        url = f"http://127.0.0.1:{server.server_port}"
        done = run_script(*tiny_flags("run", track=True), WANDB_BASE_URL=url, **online)
        server.shutdown()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "set WANDB_MODE=offline" in done.stderr
    assert not Path("run").exists()


def test_wandb_entity_that_the_server_refuses():
    with ThreadingHTTPServer(("127.0.0.1", 0), RefusingServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online = {"WANDB_MODE": "online", "WANDB_API_KEY": 40 * "a", "WANDB_SILENT": "true"}
        url = f"http://127.0.0.1:{server.server_port}"
        done = run_script(*tiny_flags("run", track=True, wandb_entity="nobody"), WANDB_BASE_URL=url, **online)
        server.shutdown()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = "refuses the run: entity nobody not found; --resume run --no-track goes on without it"
    assert f"ppo_continuous.py: error: Weights & Biases {line}" in done.stderr
    done = run_script("--resume", "run", "--no-track")
    assert done.returncode == 0, done.stderr
    assert read_checkpoint("run")["iteration"] == 4


@pytest.mark.parametrize(("where", "step"), [("observation", 9), ("reward", 8)])
def test_nan_of_the_environment_stops_the_run(fails, monkeypatch, where, step):
    """NaN from step 41 on: in the third iteration of 16 steps, where the checkpoint is that of the second."""
    monkeypatch.setattr(envs.NaNAfter, "steps_taken", 0)
    name = f"envs:NaN{where.capitalize()}-v0"
    line = fails(
        *tiny_flags(env=name, num_envs=1, num_steps=16, total_timesteps=160, checkpoint_every=1, norm_obs="none"), code=1
    )
    assert line == (
        f"ppo_continuous.py: stopped: {name} returned a non-finite {where} in iteration 3, step {step}; the last checkpoint "
        "is run/checkpoint.pt"
    )
    assert read_checkpoint("run")["iteration"] == 2
    assert [record["iteration"] for record in read_jsonl("run/metrics.jsonl")[1:]] == [1, 2]


def test_non_finite_loss_stops_the_run(fails, monkeypatch):
    real = ppo_continuous.ppo_loss

    def bad_loss(*args):
        loss, info = real(*args)
        return loss, info | {"value_loss": info["value_loss"] * torch.nan}

    monkeypatch.setattr(ppo_continuous, "ppo_loss", bad_loss)
    line = fails(*tiny_flags(), code=1)
    assert "non-finite losses or charts in iteration 1" in line
    assert "the last checkpoint is run/checkpoint.pt" in line
    assert read_checkpoint("run")["iteration"] == 0


def test_as_a_process():
    """The same from outside: exit code and streams."""
    done = run_script(*tiny_flags(env="HalfCheeta"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ppo_continuous.py: error: unknown environment HalfCheeta; nearest names: HalfCheetah-v")
    assert done.stderr.count("\n") == 1
    assert os.listdir() == []


def test_resume_of_a_run_whose_logs_are_gone(fails, capsys):
    train(tiny_args())
    capsys.readouterr()
    shutil.copytree("run", "copy")
    (Path("copy") / "metrics.jsonl").unlink()
    assert "copy/metrics.jsonl is missing or shorter than at the checkpoint" in fails("--resume", "copy")
    (Path("run") / "episodes.jsonl").write_text("")
    assert "run/episodes.jsonl is missing or shorter than at the checkpoint" in fails("--resume", "run/checkpoint.pt")


def test_a_saved_run_stays_in_its_directory_and_an_evaluation_plays(fails, capsys):
    train(tiny_args())
    capsys.readouterr()
    assert "leave out --run-dir, or start a new run" in fails("--resume", "run", "--run-dir", "elsewhere")
    assert "evaluate plays episodes: set eval_episodes to at least 1" in fails(
        "--evaluate", "run", "--env", "envs:Point-v0", "--eval-episodes", 0
    )
