"""Checkpoints of real ranks: exact, independent of stage and ranks, never half there, and no rank
ever holds more than its share.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from papo.dist.export import main
from papo.dist.manifest import read_manifest, verify, write_manifest
from tests.distributed import average_cases
from tests.distributed.launch import run_tasks
from tests.distributed.test_updates import distance

CASES = [
    # saved by (stage, shares), loaded by (stage, shares), dtype, weights, tied
    ((3, [8]), (3, [8]), "fp32", "fp32", True),
    ((3, [8]), (3, [8]), "bf16", "bf16", False),
    ((3, [4, 4]), (3, [4, 4]), "fp32", "fp32", True),
    ((3, [4, 4]), (0, [8]), "fp32", "fp32", False),  # other stage, other number of ranks
    ((0, [8]), (2, [4, 4]), "fp32", "bf16", True),  # bf16 weights of fp32 models are fp32
    ((0, [8]), (0, [8]), "fp32", "fp32", True),
    ((1, [4, 4]), (3, [8]), "bf16", "bf16", True),
    ((2, [8]), (2, [8]), "bf16", "fp32", True),
    ((3, [8]), (3, [4, 4]), "bf16", "fp32", True),
    ((2, [4, 4]), (0, [4, 4]), "fp32", "fp32", False),
]
EXPORTS = [(True, "bf16"), (False, "fp32")]
SHARES = [(3, "bf16"), (2, "bf16"), (0, "fp32")]
BUCKET = 4096


def task_of(task: str, case: int, root: Path, folder: str = "") -> tuple[str, dict[str, Any]]:
    side = CASES[case][0 if task == "save" else 1]
    dtype, weights, tied = CASES[case][2:]
    return task, {
        "folder": str(root / (folder or str(case))),
        "stage": side[0],
        "split": side[1],
        "dtype": dtype,
        "weights": weights,
        "tied": tied,
    }


def of_two_ranks(root: Path) -> dict[str, Any]:
    """What else two ranks do."""
    exports = {
        f"export-{tied}": (
            "export",
            {"folder": str(root / f"final-{tied}"), "tied": tied, "dtype": dtype},
        )
        for tied, dtype in EXPORTS
    }
    shares = {
        f"share-{stage}-{dtype}": (
            "share",
            {
                "folder": str(root / f"share-{stage}"),
                "stage": stage,
                "dtype": dtype,
                "bucket": BUCKET,
            },
        )
        for stage, dtype in SHARES
    }
    full = {
        f"full-{rank}": ("full_disk", {"folder": str(root / f"full-{rank}"), "failing": rank})
        for rank in (0, 1)
    }
    others = {name: (name, {"folder": str(root / name)}) for name in ("unshared", "damaged")}
    return {**exports, **shares, **full, **others, **average_cases.asked(average_cases.TWO)}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """Everything saved and loaded: per case the ranks' results of both. One rank, two, one: each
    start loads what those before it saved."""
    root = tmp_path_factory.mktemp("checkpoints")
    done: dict = {"root": root}
    saved: set[int] = set()
    loaded: set[int] = set()
    for world in (1, 2, 1):
        saves = [i for i, c in enumerate(CASES) if len(c[0][1]) == world and i not in saved]
        saved |= {*saves}
        loads = [
            i
            for i, c in enumerate(CASES)
            if len(c[1][1]) == world and i in saved and i not in loaded
        ]
        back = [i for i in loaded if world == 1 and [len(x[1]) for x in CASES[i][:2]] == [1, 2]]
        loaded |= {*loads}
        done |= run_tasks(
            world,
            {
                **{f"save-{i}": task_of("save", i, root) for i in saves},
                **{f"load-{i}": task_of("load", i, root) for i in loads},
                **{f"back-{i}": back_on_one_rank(i, root) for i in back},
                **(of_two_ranks(root) if world == 2 else {}),
            },
            "tests.distributed.checkpoint_tasks",
        )
    return done


def back_on_one_rank(case: int, root: Path) -> tuple[str, dict[str, Any]]:
    """Load what two ranks saved of what they loaded from one."""
    task, options = task_of("load", case, root, f"{case}-again")
    return task, {**options, "split": [8]}


@pytest.mark.parametrize("case", range(len(CASES)))
def test_resume_continues_exactly(results, case: int) -> None:
    """The same weights, masters, moments and averaged gradient, bit for bit, under every stage and
    number of ranks; then the same updates."""
    saved_by, loaded_by, dtype, weights, _ = CASES[case]
    saved = results[f"save-{case}"][0]
    kinds = {key.split("/")[0] for key in saved["state"]}
    masters = {"master"} if (dtype, weights) == ("bf16", "bf16") else set()
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "entropy_gradient", *masters}
    assert results[f"load-{case}"][0]["state"] == saved["state"]
    for got in results[f"load-{case}"]:
        assert got["steps"] == 3 and got["cursor"] == 5
        if saved_by == loaded_by:
            assert got["weights"] == saved["weights"] and got["average"] == saved["average"]
        else:  # sums are taken in another order; bf16 weights may round to their neighbor
            assert distance(got["weights"], saved["weights"]) < (1e-5 if dtype == "fp32" else 4e-3)
            scale = max(map(abs, saved["average"]))
            assert got["average"] == pytest.approx(
                saved["average"], abs=scale * (1e-6 if dtype == "fp32" else 1e-2)
            )


def test_one_rank_two_ranks_one_rank_is_the_same_state(results) -> None:
    back = [key for key in results if key.startswith("back-")]
    assert len(back) == 2
    for key in back:
        saved, got = results[key.replace("back", "save")][0], results[key][0]
        assert got["state"] == saved["state"] and got["steps"] == 3


@pytest.mark.parametrize(("stage", "dtype"), SHARES)
def test_no_rank_holds_more_than_its_share_and_a_bucket(results, stage, dtype) -> None:
    """Files and pieces are as small as a bucket, and no collective carries a weight."""
    for got in results[f"share-{stage}-{dtype}"]:
        assert got["files"] > 10
        assert 0 < got["written"] <= BUCKET and 0 < got["read"] <= BUCKET
        assert got["carried"] == 0
        assert stage != 3 or got["seen by the test"] > 0  # the gather before sampling


def test_a_damaged_checkpoint_is_named_and_passed_by_on_both_ranks(results) -> None:
    first, second = results["damaged"]
    assert first == second
    (fault,) = first["faults"]
    assert fault.startswith("optimizer-00001-of-00002-00001.safetensors: ")
    assert "bytes, expected" in fault
    assert first["found"] == "step-00000001"
    assert "NaN or infinity in weight/" in first["told"]
    names = {p.name for p in (results["root"] / "damaged").iterdir()}
    assert names == {"step-00000001", "damaged-step-00000002"}


@pytest.mark.parametrize("failing", [0, 1])
def test_disk_full_on_one_rank_fails_both_with_the_same_line(results, failing: int) -> None:
    """None waits for the other, and the checkpoint before is whole."""
    told, other = results[f"full-{failing}"]
    assert told == other and "\n" not in told
    assert "cannot save" in told and "No space left on device" in told and "free some space" in told
    folder = results["root"] / f"full-{failing}"
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]
    assert verify(folder / "step-00000001") == []


def test_ranks_without_a_shared_folder_are_told_so(results) -> None:
    told, other = results["unshared"]
    assert told == other and "\n" not in told
    assert "a folder that all nodes share" in told
    assert [p for p in (results["root"] / "unshared").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(("tied", "dtype"), EXPORTS)
def test_final_gives_the_logits_that_sampled(results, tied, dtype) -> None:
    """Gathered over two ranks; a tied head is written once."""
    name = {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[dtype]
    for got in results[f"export-{tied}"]:
        assert got == {"same": True, "moved": True, "head": not tied, "dtype": name}


@pytest.mark.parametrize(("tied", "dtype"), EXPORTS)
def test_a_checkpoint_becomes_the_same_model(results, tmp_path: Path, capsys, tied, dtype) -> None:
    """By the command, also of one that holds weights alone; what is wrong is one line."""
    root = results["root"]
    folder = root / f"final-{tied}-checkpoints" / "step-00000001"
    for path in folder.glob("optimizer-*"):
        path.unlink()
    made = tmp_path / "model"
    assert main([str(folder), str(made)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}: damaged: optimizer-00000-of-00002-00001")
    manifest = read_manifest(folder)
    weights = {n: e for n, e in manifest.files.items() if not n.startswith("optimizer-")}
    write_manifest(folder, manifest.model_copy(update={"resumable": False, "files": weights}))
    assert main([str(folder), str(made)]) == 0
    expected, got = (load_file(f / "model.safetensors") for f in (root / f"final-{tied}", made))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert (made / "tokenizer.json").exists() and (made / "generation_config.json").exists()
    assert main([str(folder), str(made)]) == 1
    assert "expected a new or an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("case", range(len(average_cases.TWO)))
def test_two_ranks_average_gradients_beside_their_updates(results, case: int) -> None:
    stage, dtype, _ = average_cases.TWO[case]
    for got in results[f"average-{case}"]:
        average_cases.check(got, stage, dtype)
