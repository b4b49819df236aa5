"""One training step of the main job: ``python -m benchmarks.bench_step [--save]``.

papo and, where it is installed, TRL's GRPOTrainer, on the same model, task and sizes (4 prompts x 8
completions x 24 tokens of chain_sum), each in a process of its own, one after the other. Seconds a
step are medians without the first step; peak memory is the resident set of the process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, write_json

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "smollm2-arithmetic.yaml"


def papo_side(steps: int) -> dict[str, Any]:
    """`train.py` on the main job's config, without evaluations and checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        changes = (
            f"steps={steps}",
            f"output_dir={folder}",
            "evaluation.before=false",
            "evaluation.after=false",
            "checkpoint.every=0",
            "metrics.tensorboard=false",
        )
        options = [word for change in changes for word in ("--set", change)]
        command = [sys.executable, "train.py", "--config", str(CONFIG), *options]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        "seconds": [row["time/step"] for row in rows],
        "peak_rss_gib": rows[-1]["memory/peak_rss"],
        "reward": [row["reward/mean"] for row in rows],
        "entropy": [row["entropy/mean"] for row in rows],
    }


def last_number(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """TRL's reward: 1 where the last number of a completion is the answer."""
    numbers = [re.findall(r"-?\d+(?:\.\d+)?", c[0]["content"]) for c in completions]
    return [float(bool(n) and n[-1] == a) for n, a in zip(numbers, answer, strict=True)]


def trl_side(steps: int, bf16: bool) -> dict[str, Any]:
    """GRPOTrainer with float32 weights, in bfloat16 autocast or in float32."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from papo.config import load_config
    from papo.data.problems import ProblemSource
    from papo.model.files import resolve_model_path

    config = load_config(CONFIG)
    path = resolve_model_path(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    problems = ProblemSource(config.data, tokenizer, config.seed).batch(0, 4 * steps)
    rows = [{"prompt": [dict(m) for m in p.messages], "answer": p.answer} for p in problems]

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.begin)

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            processing_class=tokenizer,
            reward_funcs=last_number,
            train_dataset=Dataset.from_list(rows),
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=32,
                num_generations=8,
                max_completion_length=24,
                learning_rate=1e-5,
                beta=0.0,
                bf16=bf16,
                use_cpu=not torch.cuda.is_available(),
                logging_steps=1,
                report_to=[],
                save_strategy="no",
            ),
        )
        trainer.train()
    log = [row for row in trainer.state.log_history if "reward" in row]
    return {
        "seconds": seconds,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "reward": [row["reward"] for row in log],
        "entropy": [row.get("entropy") for row in log],
    }


SIDES = {
    "papo": papo_side,
    "trl, bf16 autocast": lambda steps: trl_side(steps, bf16=True),
    "trl, float32": lambda steps: trl_side(steps, bf16=False),
}


def measure(side: str, steps: int) -> dict[str, Any]:
    """A side's figures, from a process of its own."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks.bench_step", "--steps", str(steps)]
        subprocess.run([*command, "--side", side, "--into", file.name], cwd=ROOT, check=True)
        figures: dict[str, Any] = json.load(file)
    figures["median_seconds"] = statistics.median(figures["seconds"][1:])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/step-*.json")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        args.into.write_text(json.dumps(SIDES[args.side](args.steps)))
        return
    has_trl = importlib.util.find_spec("trl") is not None
    results = {side: measure(side, args.steps) for side in SIDES if side == "papo" or has_trl}
    for side, figures in results.items():
        print(
            f"{side:<20}{figures['median_seconds']:8.1f} s/step{figures['peak_rss_gib']:8.2f} GiB"
        )
    if not has_trl:
        print("TRL is not installed here: its side was not measured")
    if args.save:
        record = {"environment": environment(), "steps": args.steps, "results": results}
        print("wrote", write_json("step", record).name)


if __name__ == "__main__":
    main()
