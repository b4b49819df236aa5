"""Checkpoints: exact, independent of stage and ranks, and never half there."""

import errno
import json
from pathlib import Path

import pytest

from papo.dist import checkpoint
from papo.errors import PapoError
from tests.distributed.launch import run_tasks
from tests.distributed.test_updates import distance

CASES = [
    # saved by (stage, shares), loaded by (stage, shares), dtype, tied
    ((3, [8]), (3, [8]), "fp32", True),
    ((3, [8]), (3, [8]), "bf16", False),
    ((3, [4, 4]), (3, [4, 4]), "fp32", True),
    ((3, [4, 4]), (0, [8]), "fp32", False),  # other stage, other number of ranks
    ((0, [8]), (2, [4, 4]), "fp32", True),
    ((0, [8]), (0, [8]), "fp32", True),
    ((1, [4, 4]), (3, [8]), "bf16", True),
    ((2, [8]), (2, [8]), "bf16", True),
]


EXPORTS = [(True, "bf16"), (False, "fp32")]


def of_two_ranks(root: Path) -> dict:
    exports = {
        f"export-{tied}": (
            "export",
            {"folder": str(root / f"final-{tied}"), "tied": tied, "dtype": dtype},
        )
        for tied, dtype in EXPORTS
    }
    return {"full": ("full_disk", {"folder": str(root / "full")}), **exports}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """Everything saved and loaded: per case the ranks' results of both."""
    root = tmp_path_factory.mktemp("checkpoints")
    done: dict = {"full-folder": root / "full"}
    for task, side in (("save", 0), ("load", 1)):
        for world in (1, 2):
            done |= run_tasks(
                world,
                {
                    f"{task}-{i}": (
                        task,
                        {
                            "folder": str(root / str(i)),
                            "stage": case[side][0],
                            "split": case[side][1],
                            "dtype": case[2],
                            "tied": case[3],
                        },
                    )
                    for i, case in enumerate(CASES)
                    if len(case[side][1]) == world
                }
                | (of_two_ranks(root) if (task, world) == ("save", 2) else {}),
                "tests.distributed.checkpoint_tasks",
            )
    return done


@pytest.mark.parametrize("case", range(len(CASES)))
def test_resume_continues_exactly(results, case: int) -> None:
    saved_by, loaded_by, dtype, _ = CASES[case]
    saved = results[f"save-{case}"][0]
    for got in results[f"load-{case}"]:
        assert got["steps"] == 3 and got["cursor"] == 5
        if saved_by == loaded_by:
            assert got["weights"] == saved["weights"]
        else:  # sums are taken in another order; bf16 weights may round to their neighbor
            assert distance(got["weights"], saved["weights"]) < (1e-5 if dtype == "fp32" else 4e-3)


def test_nothing_but_a_finished_checkpoint_is_picked_up(tmp_path: Path) -> None:
    assert checkpoint.resolve("auto", tmp_path / "none") is None
    (tmp_path / ".partial-00000009").mkdir()
    (tmp_path / ".partial-00000009" / "trainer.json").write_text("{}")
    (tmp_path / "step-00000008").mkdir()
    assert checkpoint.resolve("auto", tmp_path) is None
    for step in (3, 12):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "trainer.json").write_text(json.dumps({"format": 1}))
    assert checkpoint.resolve("auto", tmp_path) == tmp_path / "step-00000012"
    assert checkpoint.resolve("never", tmp_path) is None
    with pytest.raises(PapoError, match="no checkpoint there"):
        checkpoint.resolve(str(tmp_path / "step-00000008"), tmp_path)


class OneTensorEngine:
    """Enough of an engine to save: one parameter."""

    optimizer_steps = 1

    def trained_parameters(self):
        import torch

        return [("w", torch.nn.Parameter(torch.ones(3)))]

    def read_state(self, parameter):
        return {"weight": parameter.detach()}


def test_disk_full_while_saving_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    engine = OneTensorEngine()
    checkpoint.save(tmp_path, 1, engine, {}, keep=2)

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        PapoError, match=r"cannot save .*No space left on device.*Earlier checkpoints are intact"
    ) as caught:
        checkpoint.save(tmp_path, 2, engine, {}, keep=2)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_disk_full_on_rank_0_fails_both_ranks_with_the_same_line(results) -> None:
    """None waits for the other, and the checkpoint before is whole."""
    told, other = results["full"]
    assert told == other and "\n" not in told
    assert "cannot save" in told and "No space left on device" in told and "free some space" in told
    folder = results["full-folder"]
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]
    assert [step for step, _ in checkpoint.completed(folder)] == [1]


@pytest.mark.parametrize(("tied", "dtype"), EXPORTS)
def test_final_gives_the_logits_that_sampled(results, tied, dtype) -> None:
    """Gathered over two ranks; a tied head is written once."""
    name = {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[dtype]
    for got in results[f"export-{tied}"]:
        assert got == {"same": True, "moved": True, "head": not tied, "dtype": name}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, OneTensorEngine(), {}, keep=2)
    assert [step for step, _ in checkpoint.completed(tmp_path)] == [2, 3]
