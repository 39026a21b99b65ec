"""Episodes per second of ppo_rlhf.py beside the PPO trainer of TRL 1.9.2, the last version that has one: A B A B.

    python -m venv trl && trl/bin/pip install trl==1.9.2 torch==2.13.0 tyro==1.0.17
    trl/bin/python benchmarks/speed_rlhf.py --rounds 5 --name rlhf

Both train the same GPT-2 of random weights (width 128, 2 layers, 2048 tokens) with a separate value network and the same
reward model, both of that size, 64 responses of 32 tokens an iteration, 4 epochs of 4 minibatches: 16 gradient steps. No
response stops early. Each measurement is a process of its own on the same core. The first iteration is left out. CPU time
is counted too: it says more than the clock where something else runs beside. With --name the measurements are kept in
results/speed/. Peak memory is that of the whole process, its libraries too.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import speed
import suites

EPISODES, TOKENS, EPOCHS, MINIBATCHES = 64, 32, 4, 4
PARTS = ("generation", "scores and reference", "updates")
CONTESTANTS = ("ppo_rlhf.py", "TRL")


def save_models(folder: Path):
    """A policy, a reward model, their tokenizer of whole words, and prompts of 3 to 7 words."""
    import numpy as np
    import tokenizers
    import torch
    import transformers

    words = {word: i for i, word in enumerate(["<pad>", "<end>", *(f"w{i}" for i in range(2046))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", padding_side="left"
    )
    sizes: dict[str, Any] = {
        "vocab_size": len(words),
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "num_labels": 1,
    }
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    for name, kind in (("policy", "GPT2LMHeadModel"), ("reward", "GPT2ForSequenceClassification")):
        getattr(transformers, kind)(config).save_pretrained(folder / name)
        own.save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    prompts = [" ".join(f"w{i}" for i in rng.integers(2046, size=rng.integers(3, 8))) for _ in range(1024)]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")


def timed(seconds: Any, part: str, function):
    """The function, with the time that it takes added to a part."""

    def wrapper(*args, **kwargs):
        start = time.process_time()
        result = function(*args, **kwargs)
        seconds[part] += time.process_time() - start
        return result

    return wrapper


def measure_ours(folder: Path, iterations: int) -> tuple[list[tuple[float, float]], Counter, dict]:
    """Wall and CPU clock at the ends of iterations, seconds of the parts, versions."""
    script: Any = suites.load_script("ppo_rlhf")
    ends: list[tuple[float, float]] = []
    seconds: Any = Counter()  # of floats
    script.generate = timed(seconds, "generation", script.generate)
    script.learn = timed(seconds, "updates", script.learn)
    log = script.Run.log

    def log_and_note(self, *args):
        log(self, *args)
        ends.append((time.perf_counter(), time.process_time()))
        if len(ends) == 1:
            seconds.clear()

    script.Run.log = log_and_note
    flags = {"model": str(folder / "policy"), "reward_model": str(folder / "reward"), "prompts": str(folder / "prompts.txt")}
    sizes = {"num_envs": EPISODES, "num_steps": TOKENS, "update_epochs": EPOCHS, "num_minibatches": MINIBATCHES}
    own = {"value": "separate", "stop_at_eos": False, "eval_episodes": 0, "learning_rate": 3e-6}
    total = EPISODES * TOKENS * iterations
    script.train(script.Args(run_dir=str(folder / "run"), total_timesteps=total, **flags, **sizes, **own))
    return ends, seconds, {"ppo_rlhf.py, commit": revision(script)}


def revision(script) -> str:
    command = ["git", "log", "-1", "--format=%h", "--", script.__file__]
    return subprocess.run(command, cwd=suites.ROOT, capture_output=True, text=True, check=True).stdout.strip()


def measure_trl(folder: Path, iterations: int) -> tuple[list[tuple[float, float]], Counter, dict]:
    import datasets
    import torch
    import transformers
    import trl
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    ends: list[tuple[float, float]] = []
    seconds: Counter[str] = Counter()
    ppo_trainer.batch_generation = timed(seconds, "generation", ppo_trainer.batch_generation)
    ppo_trainer.get_reward = timed(seconds, "scores and reference", ppo_trainer.get_reward)
    forward, timed_forward = ppo_trainer.forward, timed(seconds, "scores and reference", ppo_trainer.forward)
    ppo_trainer.forward = lambda *args: (forward if torch.is_grad_enabled() else timed_forward)(*args)

    class Note(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append((time.perf_counter(), time.process_time()))
            if len(ends) == 1:
                seconds.clear()

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    lines = (folder / "prompts.txt").read_text().splitlines()
    prompts = datasets.Dataset.from_list([{"input_ids": tokenizer(line)["input_ids"]} for line in lines])
    policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
    classifier = transformers.AutoModelForSequenceClassification
    reward, value = (classifier.from_pretrained(folder / "reward", num_labels=1) for _ in range(2))
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=EPISODES,
        gradient_accumulation_steps=1,  # with more its num_mini_batches gives no more steps
        num_mini_batches=MINIBATCHES,
        num_ppo_epochs=EPOCHS,
        total_episodes=EPISODES * iterations,
        local_rollout_forward_batch_size=EPISODES,
        num_sample_generations=0,
        response_length=TOKENS,
        temperature=1.0,
        learning_rate=3e-6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=prompts,
        callbacks=[Note()],
    ).train()
    return ends, seconds, {module.__name__: module.__version__ for module in (trl, transformers, torch)}


def measure(contestant: str, folder: Path, iterations: int) -> dict:
    ends, seconds, versions = (measure_ours if contestant == CONTESTANTS[0] else measure_trl)(folder, iterations)
    each, cpu = ((last - first) / (iterations - 1) for first, last in zip(ends[0], ends[-1], strict=True))
    parts = {part: seconds[part] / (iterations - 1) for part in PARTS}
    rest = {CONTESTANTS[0]: "scores and reference", "TRL": "updates"}[contestant]  # what was not timed
    parts[rest] += cpu - sum(parts.values())
    return {
        "sps": EPISODES * TOKENS / each,
        "episodes_per_second": EPISODES / each,
        "episodes_per_cpu_second": EPISODES / cpu,
        "cpu_seconds": {part: round(x, 4) for part, x in parts.items()},
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": versions,
    }


def print_summary(records: list[dict]):
    by_name = {name: [r for r in records if r["contestant"] == name] for name in CONTESTANTS}
    for name, rows in by_name.items():
        rates = [r["episodes_per_cpu_second"] for r in rows]
        parts = {part: statistics.median(r["cpu_seconds"][part] for r in rows) for part in PARTS}
        print(
            f"{name}: {statistics.median(rates):.1f} [{min(rates):.1f}, {max(rates):.1f}] episodes per CPU second, peak memory "
            f"{statistics.median(r['peak_mb'] for r in rows):.0f} MB, CPU seconds an iteration: "
            + ", ".join(f"{part} {x:.2f}" for part, x in parts.items())
        )
    for measure in ("episodes_per_cpu_second", "episodes_per_second"):
        ratios = [a[measure] / b[measure] for a, b in zip(*by_name.values(), strict=True)]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"ratio of {measure}: {spread}, {len(ratios)} alternations")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="alternations")
    parser.add_argument("--iterations", type=int, default=6, help="of each measurement; the first is not counted")
    parser.add_argument("--name", help="of the file in results/speed/; default: none is written")
    parser.add_argument("--measure", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1 or options.iterations < 2:
        parser.error("at least 1 round and 2 iterations")
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.iterations)))
        return 0
    if options.name and (suites.ROOT / "benchmarks" / "results" / "speed" / f"{options.name}.jsonl").is_file():
        parser.error(f"there are measurements of the name {options.name}: choose another --name or delete them")
    header = speed.begin("rlhf", EPISODES * TOKENS * options.iterations, None, 1)
    records: list[dict] = []
    file = suites.ROOT / "benchmarks" / "results" / "speed" / f"{options.name}.jsonl"
    environment = speed.limit_threads(1) | {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder))
        for number in range(1, options.rounds + 1):
            for name in CONTESTANTS:
                command = [sys.executable, str(Path(__file__).resolve()), "--measure", name]
                own = Path(tempfile.mkdtemp(dir=folder))
                for part in ("policy", "reward", "prompts.txt"):
                    (own / part).symlink_to(Path(folder) / part)
                command += ["--iterations", str(options.iterations), "--folder", str(own)]
                result = speed.measure_once(name, command, environment, header)
                if result is None:
                    return 1
                records.append({"round": number, "contestant": name, "num_envs": EPISODES, **result})
                print(f"round {number}: {name}: {result['episodes_per_second']:.1f} episodes/s", flush=True)
            if options.name:
                speed.write_report(file, header, records)  # whole rounds only
    print_summary(records)
    print("versions: " + ", ".join(f"{name} {version}" for name, version in sorted(header["versions"].items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
