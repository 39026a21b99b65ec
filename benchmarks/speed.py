"""Steps per second side by side: every contestant in turn, A B A B, each measurement a process of its own on the same cores.

    python benchmarks/speed.py --rounds 5 --peer-python peers/bin/python --name mine
    python benchmarks/speed.py --cleanrl cleanrl/cleanrl/ppo_continuous_action.py --cleanrl-python clean/bin/python
    python benchmarks/speed.py --rounds 5 --contestant "ours, 1 env" "environment only, 1 env" --steps 20480
    python benchmarks/speed.py --env Breakout --steps 4096 --cores 0 1 --threads 2 --peer-python peers/bin/python

With --name the measurements are kept in results/speed/ for the tables; without it they are only printed.

Contestants for MuJoCo: ppo_continuous.py with 1 and 8 environments, compiled and eager (its own SPS, which leaves start-up
and compilation out); the same environments stepped with random actions, by envs.step and by the script's faster make_step;
Stable-Baselines3 with the same network, batch size and epochs (--peer-python: a Python that has it); sbx likewise
(--sbx-python); the script of a CleanRL checkout, unchanged (--cleanrl), whose defaults are the same (--cleanrl-python: a
Python with gymnasium 0.29, which it needs). For an Atari game: ppo_atari.py compiled and eager, in bfloat16, with one epoch
instead of four (the difference is what three epochs cost), its environments alone, Stable-Baselines3, and CleanRL's
ppo_atari.py (--cleanrl; its Python needs ale-py 0.10 and stable-baselines3 2.3 too). For CartPole-v1:
ppo_shared_params.py with 4 and 64 environments of 128 steps, with an LSTM, and Stable-Baselines3. Run it on a quiet machine.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import suites

ROOT = Path(__file__).resolve().parent.parent
BATCH = 2048  # environment steps of a rollout on MuJoCo, however many environments share it
ATARI_BATCH = 1024
CARTPOLE_STEPS = 128  # of each environment


def mujoco_id(env: str) -> str:
    """Hopper means Hopper-v4."""
    return env if re.search(r"-v\d+$", env) else f"{env}-v4"


# ---------------------------------------------------------------------------------------------------------------------
# Measurements: each prints {"sps", "versions"} as its last line. Peers are imported only here, by their own Python.


def measure_game(env: str, num_envs: int, steps: int, threads: int) -> dict:
    """The Atari environments of the script stepped with random actions drawn beforehand; nothing else in the loop."""
    script = suites.load_script("ppo_atari")
    envs, *_ = script.make_envs(script.Args(env=env, num_threads=threads), script.make_seeds(1, 0, num_envs))
    count = max(steps, 20_000) // num_envs
    actions = script.np.random.default_rng(0).integers(envs.single_action_space.n, size=(count, num_envs), dtype="int32")
    start = time.perf_counter()
    for t in range(count):
        envs.step(actions[t])
    return {"sps": count * num_envs / (time.perf_counter() - start), "versions": {"envpool": script.envpool.__version__}}


def time_peer(model, batch: int, steps: int) -> float:
    """Steps per second of a model of Stable-Baselines3 or sbx: one rollout with its update first, then the clock."""
    model.learn(batch)
    rollouts = max(steps // batch, 1)
    start = time.perf_counter()
    model.learn(batch * rollouts)
    return batch * rollouts / (time.perf_counter() - start)


def measure_game_peer(env: str, num_envs: int, steps: int, threads: int) -> dict:
    """PPO of Stable-Baselines3 on ale-py, with the defaults of ppo_atari.py."""
    import ale_py
    import gymnasium
    import stable_baselines3
    import torch
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gymnasium.register_envs(ale_py)
    torch.set_num_threads(threads)
    envs = VecFrameStack(make_atari_env(f"{env}NoFrameskip-v4", num_envs, seed=1), 4)
    own = {"n_steps": ATARI_BATCH // num_envs, "batch_size": 256, "n_epochs": 4, "learning_rate": 2.5e-4, "clip_range": 0.1}
    model = stable_baselines3.PPO("CnnPolicy", envs, seed=1, device="cpu", ent_coef=0.01, clip_range_vf=0.1, **own)
    modules = (stable_baselines3, ale_py, gymnasium, torch)
    versions = {module.__name__: module.__version__ for module in modules}
    return {"sps": time_peer(model, ATARI_BATCH, steps), "versions": versions}


def measure_cartpole_peer(env: str, num_envs: int, steps: int, threads: int) -> dict:
    """PPO of Stable-Baselines3 with the defaults of ppo_shared_params.py (its networks are separate)."""
    import gymnasium
    import stable_baselines3
    import torch
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(threads)
    batch = CARTPOLE_STEPS * num_envs
    own = {"n_steps": CARTPOLE_STEPS, "batch_size": batch // 4, "n_epochs": 4, "learning_rate": 2.5e-4, "ent_coef": 0.01}
    model = stable_baselines3.PPO(
        "MlpPolicy", make_vec_env(env, num_envs, seed=1), seed=1, device="cpu", clip_range_vf=0.2, **own
    )
    versions = {module.__name__: module.__version__ for module in (stable_baselines3, gymnasium, torch)}
    return {"sps": time_peer(model, batch, steps), "versions": versions}


def measure_environment(env: str, num_envs: int, steps: int, threads: int, fast: bool) -> dict:
    """The environments of the script stepped with random actions drawn beforehand; nothing else in the loop."""
    script = suites.load_script("ppo_continuous")
    envs, *_ = script.make_envs(env, script.make_seeds(1, 0, num_envs), threads)
    space = envs.single_action_space
    rng = script.np.random.default_rng(0)
    actions = rng.uniform(space.low, space.high, (BATCH, num_envs, *space.shape)).astype(script.np.float32)
    step = script.make_step(envs) if fast else envs.step
    for t in range(200):
        step(actions[t])
    count = steps // num_envs
    start = time.perf_counter()
    for t in range(count):
        step(actions[t % BATCH])
    seconds = time.perf_counter() - start
    return {"sps": count * num_envs / seconds, "versions": {"envpool": script.envpool.__version__}}


def measure_peer(library: str, env: str, num_envs: int, steps: int, threads: int) -> dict:
    """PPO of Stable-Baselines3 or sbx on MuJoCo, with what costs time set as in ppo_continuous.py."""
    own = {"n_steps": BATCH // num_envs, "batch_size": 64, "n_epochs": 10, "ent_coef": 0.0}
    import gymnasium
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    versions = {"stable_baselines3": stable_baselines3.__version__, "gymnasium": gymnasium.__version__}
    envs = VecNormalize(make_vec_env(mujoco_id(env), num_envs, seed=1), gamma=0.99)
    if library == "sbx":
        import jax
        import sbx

        model = sbx.PPO("MlpPolicy", envs, seed=1, policy_kwargs={"net_arch": [64, 64]}, **own)
        versions |= {"sbx": sbx.__version__, "jax": jax.__version__}
    else:
        import torch

        torch.set_num_threads(threads)
        # its MuJoCo default network is the 2 x 64 tanh of the paper; value clipping as in the script
        model = stable_baselines3.PPO("MlpPolicy", envs, seed=1, device="cpu", clip_range_vf=0.2, **own)
        versions |= {"torch": torch.__version__}
    return {"sps": time_peer(model, BATCH, steps), "versions": versions}


def measure_cleanrl(file: str, env: str, num_envs: int, steps: int) -> dict:
    """CleanRL's script as it is, timed from the end of its first iteration by the lines it prints."""
    import gymnasium
    import torch

    modules, path, wrapped = [gymnasium, torch], Path(file).resolve(), []
    batch, env_id = BATCH, mujoco_id
    if env in suites.ATARI:
        import ale_py  # registers the games; the script does not import it

        wrapped = ["-c", "import ale_py, runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"]
        modules, batch, env_id = [*modules, ale_py], ATARI_BATCH, "{}NoFrameskip-v4".format
    iterations = max(steps // batch, 1) + 1
    command = [sys.executable, "-u", *wrapped, str(path), "--env-id", env_id(env), "--no-cuda", "--num-envs", str(num_envs)]
    command += ["--num-steps", str(batch // num_envs), "--total-timesteps", str(batch * iterations)]
    utils = os.environ | {"PYTHONPATH": str(path.parents[1])}  # where its cleanrl_utils lies
    with tempfile.TemporaryDirectory() as folder:  # it writes runs/ where it stands
        process = subprocess.Popen(command, cwd=folder, env=utils, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        ends = [time.perf_counter() for line in process.stdout if line.startswith("SPS:")]  # one at the end of an iteration
        if process.wait() or len(ends) != iterations:
            raise SystemExit(f"{file} failed with exit code {process.returncode} after {len(ends)} iterations")
    versions = {module.__name__: module.__version__ for module in modules}
    versions["CleanRL script, sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()[:10]
    return {"sps": batch * (iterations - 1) / (ends[-1] - ends[0]), "versions": versions}


def measure_script(script: str, batch: int, env: str, num_envs: int, steps: int, threads: int, flags: tuple[str, ...]) -> dict:
    """SPS that the script itself logs, from the end of its first iteration on."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / script), "--env", env, "--run-dir", f"{folder}/run", "--device", "cpu"]
        command += ["--num-envs", str(num_envs), "--num-steps", str(batch // num_envs), "--eval-episodes", "0", *flags]
        command += ["--total-timesteps", str(batch * (max(steps // batch, 1) + 1)), "--num-threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{script} failed: {done.stderr.strip().splitlines()[-1]}")
        header, first, *_, last = (json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines())
    measured = last["global_step"] - first["global_step"]
    sps = measured / (last["charts/seconds"] - first["charts/seconds"])
    versions = header["versions"] | {f"{script}, sha256": header["script_sha256"][:10]}
    return {"sps": sps, "first_iteration_seconds": first["charts/seconds"], "versions": versions}


FLAGS = {
    "compiled": ("--compile",),
    "eager": ("--no-compile",),
    "one epoch": ("--update-epochs", "1"),
    "bfloat16": ("--precision", "bfloat16"),
    "lstm": ("--lstm",),
}


def measure(what: str, env: str, num_envs: int, steps: int, threads: int, cleanrl: str) -> dict:
    if env in suites.ATARI:
        if what == "envs.step":
            return measure_game(env, num_envs, steps, threads)
        if what == "sb3":
            return measure_game_peer(env, num_envs, steps, threads)
        if what == "cleanrl":
            return measure_cleanrl(cleanrl, env, num_envs, steps)
        return measure_script("ppo_atari.py", ATARI_BATCH, env, num_envs, steps, threads, FLAGS[what])
    if env == "CartPole-v1":
        if what == "sb3":
            return measure_cartpole_peer(env, num_envs, steps, threads)
        batch = CARTPOLE_STEPS * num_envs
        return measure_script("ppo_shared_params.py", batch, env, num_envs, steps, threads, FLAGS[what])
    if what == "penalty":
        return measure_script("ppo_kl_penalty.py", BATCH, env, num_envs, steps, threads, ())
    if what in FLAGS:
        return measure_script("ppo_continuous.py", BATCH, env, num_envs, steps, threads, FLAGS[what])
    if what == "cleanrl":
        return measure_cleanrl(cleanrl, env, num_envs, steps)
    if what in ("make_step", "envs.step"):
        return measure_environment(env, num_envs, steps, threads, what == "make_step")
    return measure_peer(what, env, num_envs, steps, threads)


# ---------------------------------------------------------------------------------------------------------------------


def contestants(
    env: str, peer_python: str | None, sbx_python: str | None, cleanrl_python: str | None
) -> dict[str, tuple[str, int, str]]:
    """Name -> what is measured, number of environments, Python that measures it."""
    found: dict[str, tuple[str, int, str]] = {}
    if env in suites.ATARI:
        found["ours, 8 envs"] = ("compiled", 8, sys.executable)
        found["ours, eager, 8 envs"] = ("eager", 8, sys.executable)
        found["ours, bfloat16, 8 envs"] = ("bfloat16", 8, sys.executable)
        found["ours, 1 epoch, 8 envs"] = ("one epoch", 8, sys.executable)
        found["environment only, 8 envs"] = ("envs.step", 8, sys.executable)
        if peer_python:
            found["Stable-Baselines3, 8 envs"] = ("sb3", 8, peer_python)
        if cleanrl_python:
            found["CleanRL, 8 envs"] = ("cleanrl", 8, cleanrl_python)
        return found
    if env == "CartPole-v1":
        found["shared, 4 envs"] = ("compiled", 4, sys.executable)
        if peer_python:
            found["Stable-Baselines3, 4 envs"] = ("sb3", 4, peer_python)
        found["shared, LSTM, 4 envs"] = ("lstm", 4, sys.executable)
        found["shared, 64 envs"] = ("compiled", 64, sys.executable)
        found["shared, LSTM, 64 envs"] = ("lstm", 64, sys.executable)
        return found
    for n in (1, 8):
        envs = f"{n} env{'s' if n > 1 else ''}"
        found[f"ours, {envs}"] = ("compiled", n, sys.executable)
        found[f"KL penalty, {envs}"] = ("penalty", n, sys.executable)
        found[f"ours, eager, {envs}"] = ("eager", n, sys.executable)
        found[f"environment only, {envs}"] = ("make_step", n, sys.executable)
        found[f"environment only by envs.step, {envs}"] = ("envs.step", n, sys.executable)
        if peer_python:
            found[f"Stable-Baselines3, {envs}"] = ("sb3", n, peer_python)
        if sbx_python:
            found[f"sbx, {envs}"] = ("sbx", n, sbx_python)
        if cleanrl_python:
            found[f"CleanRL, {envs}"] = ("cleanrl", n, cleanrl_python)
    return found


def write_report(file: Path, header: dict, records: list[dict]):
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in [header, *records]))
    os.replace(temporary, file)


def begin(env: str, steps: int, cores: list[int] | None, threads: int) -> dict:
    """Pins this process, and so those that it starts, to cores, by default the first allowed; the header of a report."""
    cores = cores or (sorted(os.sched_getaffinity(0))[:1] if hasattr(os, "sched_getaffinity") else [0])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    cpu, family, model = (re.search(rf"^{name}\s*: (.*)", info, re.M) for name in ("model name", "cpu family", "model"))
    return {
        "env": env,
        "steps": steps,
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "cpu_kind": f"family {family.group(1)}, model {model.group(1)}" if family and model else platform.machine(),
        "cores": cores,
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()},
    }


def limit_threads(threads: int) -> dict[str, str]:
    """The environment variables of a measuring process."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return os.environ | dict.fromkeys(names, str(threads))


def measure_once(name: str, command: list[str], environment: dict[str, str], header: dict) -> dict | None:
    """What a measuring process says of a contestant, its versions added to header; None, and a line, where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        print(f"{Path(sys.argv[0]).name}: {name} failed: {reason}", file=sys.stderr)
        return None
    result = json.loads(done.stdout.strip().splitlines()[-1])
    for library, version in result.pop("versions").items():
        known = header["versions"].setdefault(library, version)
        if known != version and version not in known.split(" and "):
            header["versions"][library] = f"{known} and {version}"
    return result


def print_table(names: list[str], records: list[dict]):
    rates = {name: {r["round"]: r["sps"] for r in records if r["contestant"] == name} for name in names}
    first = names[0]
    print(f"\n{'':40} {'steps/s: median [min, max]':>32}   {first} / this: median [min, max]")
    for name in names:
        values, ratios = list(rates[name].values()), [rates[first][r] / rates[name][r] for r in rates[name]]
        spread = f"{statistics.median(values):.0f} [{min(values):.0f}, {max(values):.0f}]"
        print(f"{name:40} {spread:>32}   {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah")
    parser.add_argument("--rounds", type=int, default=5, help="alternations")
    parser.add_argument("--steps", type=int, default=51_200, help="environment steps of each measurement")
    parser.add_argument("--cores", type=int, nargs="+", help="cores to pin to; default: the first that is allowed")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and envpool")
    parser.add_argument("--peer-python", help="Python with stable-baselines3 and gymnasium[mujoco]")
    parser.add_argument("--sbx-python", help="Python with sbx-rl")
    parser.add_argument("--cleanrl", default="", help="ppo_continuous_action.py of a CleanRL checkout, or its ppo_atari.py")
    parser.add_argument("--cleanrl-python", help="Python with torch, gymnasium 0.29, MuJoCo, tensorboard and tyro")
    parser.add_argument("--contestant", nargs="+", help="only these; the first is compared with the others")
    parser.add_argument("--name", help="of the file in results/speed/; default: none is written")
    parser.add_argument("--results-dir", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "ENVS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, num_envs = options.measure
        print(json.dumps(measure(what, options.env, int(num_envs), options.steps, options.threads, options.cleanrl)))
        return 0
    if bool(options.cleanrl) != bool(options.cleanrl_python):
        parser.error("--cleanrl and --cleanrl-python go together")
    chosen = contestants(options.env, options.peer_python, options.sbx_python, options.cleanrl_python)
    names = options.contestant or list(chosen)
    unknown = [name for name in names if name not in chosen]
    if unknown or len(set(names)) < len(names) or options.rounds < 1 or options.steps < BATCH:
        parser.error(f"contestants, each once: {'; '.join(chosen)}; at least 1 round and {BATCH} steps")
    file = options.results_dir / "speed" / f"{options.name}.jsonl"
    if options.name and file.is_file():
        parser.error(f"{file} holds measurements: choose another --name or delete it")
    for python in filter(None, (options.peer_python, options.sbx_python, options.cleanrl_python)):
        if not shutil.which(python):
            parser.error(f"{python} is no Python that can be started")
    if hasattr(os, "sched_getaffinity") and not set(options.cores or []) <= os.sched_getaffinity(0):
        parser.error(f"--cores: this process may use {sorted(os.sched_getaffinity(0))}")
    header = begin(options.env, options.steps, options.cores, options.threads)
    print(f"{header['cpu']}, cores {header['cores']}, {options.threads} thread(s), load {header['load']} before the start")
    environment = limit_threads(options.threads) | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    records: list[dict] = []
    for number in range(1, options.rounds + 1):
        for name in names:
            what, num_envs, python = chosen[name]
            command = [python, str(Path(__file__).resolve()), "--measure", what, str(num_envs)]
            command += ["--env", options.env, "--steps", str(options.steps), "--threads", str(options.threads)]
            command += ["--cleanrl", options.cleanrl]
            result = measure_once(name, command, environment, header)
            if result is None:
                return 1
            records.append({"round": number, "contestant": name, "num_envs": num_envs, **result})
            print(f"round {number}: {name}: {result['sps']:.0f} steps/s", flush=True)
        if options.name:
            write_report(file, header, records)  # whole rounds only
    print_table(names, records)
    print("versions: " + ", ".join(f"{name} {version}" for name, version in sorted(header["versions"].items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
