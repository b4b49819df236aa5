"""How rows are read is a table's or PAPO_TRITON_CONFIG's matter, and never one of correctness."""

from __future__ import annotations

import os
import re

import pytest
import torch

from papo_kernels import PolicyLossParams
from papo_kernels.backends import tuning
from papo_kernels.types import RowParams, TokenInputs
from tests.cases import make_case, make_loss_case
from tests.oracle import check_policy_loss, check_token_stats

pytest.importorskip("triton")
from papo_kernels.backends.triton import config, launch, policy_loss_fwd, token_stats_fwd

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(not INTERPRETED, reason="runs kernels on the CPU")

CPU, BF16, F32 = torch.device("cpu"), torch.bfloat16, torch.float32
V = 151_936
# How each candidate for long rows reads them: registers change no result.
READS = sorted({re.sub(r",maxnreg=\d+", "", x) for x in launch.candidates(BF16, V)})
PARAMS = PolicyLossParams(clip_high=0.28, dual_clip=2.0, kl_coef=0.04, entropy_coef=0.01)


@pytest.fixture
def force(monkeypatch):
    """Sets the variable, or removes it."""

    def force(value):
        if value is None:
            monkeypatch.delenv("PAPO_TRITON_CONFIG", raising=False)
        else:
            monkeypatch.setenv("PAPO_TRITON_CONFIG", value)
        launch.clear_config()

    yield force
    monkeypatch.undo()
    launch.clear_config()


@pytest.fixture
def table(monkeypatch, force):
    """Replaces the table's rows, given as (dtype, columns, config), for any device."""

    def table(*rows):
        rows = [
            tuning.Row("*", dtype, columns, dict(c._asdict()), {}) for dtype, columns, c in rows
        ]
        monkeypatch.setattr(tuning, "_table", lambda: {"triton": rows})
        tuning.config.cache_clear()
        force(None)

    yield table
    monkeypatch.undo()
    tuning.config.cache_clear()


def config_of(v, dtype=BF16):
    return launch.plan(CPU, dtype, RowParams(1.0, 0.0, v)).config


def compile_parameters(v):
    """The variant and the launch options of a loss on `v` bfloat16 columns."""
    plan = launch.plan(CPU, BF16, RowParams(1.0, 0.0, v))
    how = plan.variant(launch.Flags(True, True, launch.LOGITS.value, True))
    kernel = policy_loss_fwd.__globals__["policy_loss_kernel"]
    return how, launch.options(kernel, how, plan.config.maxnreg, 32, True)


# ---- the table ------------------------------------------------------------------------------


def test_every_row_of_the_table_is_a_configuration():
    for row in tuning.load()["triton"]:
        text = ",".join(f"{key}={value}" for key, value in row.config.items())
        assert config.check(config.Config(**config.parse(text)), "tuning.json")


def test_the_table_is_asked_by_dtype_and_columns(table):
    short, long = config.Config(64, 1, 2, 3, 96), config.Config(512, 8, 1, 5, 128)
    table(("bfloat16", (1, 1000), short), ("*", (1, 2**30), long))
    assert config_of(1000) == short
    assert config_of(1001) == long
    assert config_of(1000, F32) == long


def test_kernels_are_compiled_for_the_row_of_the_table(table):
    table(("*", (1, 2**30), config.Config(512, 8, 2, 5, 96)))
    how, options = compile_parameters(V)
    assert [x.value for x in how[:3]] == [512, 8, 2]
    assert (options["num_warps"], options["maxnreg"]) == (16, 96)


def test_fewer_rows_than_programs_for_every_multiprocessor_are_split(table):
    table(("*", (1, 2**30), config.Config(64, 1, 1, 5, 96)))
    plan = launch.plan(CPU, BF16, RowParams(1.0, 0.0, 4096))  # a CPU counts as one
    assert plan.count_parts(5) == 1
    assert plan.count_parts(4) == plan.n_segments == 8


def test_rows_of_more_segments_than_a_grid_has_programs_are_not_split(force):
    force("lanes=64,vectors=1,segment=1")
    plan = launch.plan(CPU, BF16, RowParams(1.0, 0.0, 2**30))
    assert plan.n_segments > launch.MAX_PARTS
    assert plan.count_parts(1) == 1


# ---- PAPO_TRITON_CONFIG -----------------------------------------------------------------------


def test_the_variable_overrides_the_table_key_by_key(force):
    force(None)
    of_table = config_of(V)
    force("lanes=512, maxnreg=64")
    assert config_of(V) == of_table._replace(lanes=512, maxnreg=64)
    how, options = compile_parameters(V)
    assert how.LANES.value == 512
    assert (options["num_warps"], options["maxnreg"]) == (16, 64)


def test_the_variable_is_read_once(force, monkeypatch):
    force("lanes=512,maxnreg=64")
    assert config_of(V).lanes == 512
    monkeypatch.setenv("PAPO_TRITON_CONFIG", "lanes=64")
    assert config_of(V).lanes == 512
    launch.clear_config()
    assert config_of(V).lanes == 64


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("warps=4", "expected key=value pairs of lanes, vectors, segment, programs, maxnreg, "),
        ("lanes", "expected lanes to be a power of two in [64, 1024], got ''"),
        ("lanes=96", "expected lanes to be a power of two in [64, 1024], got '96'"),
        ("lanes=32", "expected lanes to be a power of two in [64, 1024], got '32'"),
        ("lanes=2048", "expected lanes to be a power of two in [64, 1024], got '2048'"),
        ("lanes=-64", "expected lanes to be a power of two in [64, 1024], got '-64'"),
        ("vectors=3", "expected vectors to be a power of two in [1, 8], got '3'"),
        ("segment=0", "expected segment to be a power of two in [1, 64], got '0'"),
        ("programs=x", "expected programs to be an integer in [0, 64], got 'x'"),
        ("maxnreg=81", "expected maxnreg to be a multiple of 8 in [32, 248], got '81'"),
        ("lanes=64,lanes=128", "expected lanes once, got 'lanes=64,lanes=128'"),
        ("lanes=64,,vectors=2", "got ''"),
        ("lanes=1024,maxnreg=80", "expected lanes * maxnreg <= 65536, the registers of a "),
    ],
)
def test_what_cannot_work_names_the_variable_the_value_and_the_limit(value, expected, force):
    force(value)
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        config_of(V)
    assert str(error.value).startswith("PAPO_TRITON_CONFIG: ")


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("v", [1, 1000, 4096, 32_000, V])
def test_candidates_are_values_of_the_variable(v, dtype, force):
    found = launch.candidates(dtype, v)
    assert len(found) == len(set(found)) >= 2
    for value in found:
        force(value)
        how, options = compile_parameters(v)
        assert value.startswith(f"lanes={how.LANES.value},vectors={how.VECTORS.value},")
        assert value.endswith(f"maxnreg={options['maxnreg']}")


# ---- results --------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("reads", READS)
def test_every_candidate_gives_right_results(reads, force):
    force(f"{reads},segment=1,maxnreg=64")
    for dtype, v in ((BF16, 1031), (F32, 700)):
        check_token_stats(make_case("normal", 2, v, dtype=dtype), "triton")
        case = make_loss_case("normal", 2, v, dtype=dtype, params=PARAMS)
        check_policy_loss(case, "triton", inplace=True)


@runs
@pytest.mark.parametrize("reads", READS)
def test_every_candidate_gives_the_same_bits_in_split_rows(reads, force):
    """Rows of two segments and more, from both entry points."""
    force(f"{reads},segment=1,maxnreg=64")
    lanes, vectors = config_of(V)[:2]
    v = 8 * lanes * vectors + 8 * lanes + 77
    logits = torch.randn(4, v, generator=torch.Generator().manual_seed(0)).to(BF16)
    targets, ones = torch.tensor([5, v - 1, v // 2, 8]), torch.ones(4)
    row = RowParams(0.9, 0.0, v)
    stats, losses = [], []
    for n in (4, 2):
        rows, at, w = logits[:n], targets[:n], ones[:n]
        assert launch.prepare(rows, row).count_parts(n) == (1 if n == 4 else 2)
        stats.append(token_stats_fwd(rows, at, row))
        tokens, dlogits = TokenInputs(w, w, stats[-1][0], None), torch.empty_like(rows)
        out = policy_loss_fwd(rows, at, tokens, PARAMS, None, row, dlogits)
        assert torch.equal(out[1], stats[-1][0])
        assert out[6].eq(1.0).all()
        losses.append((*out, dlogits))
    for together, alone in (stats, losses):
        assert all(torch.equal(a[:2], b) for a, b in zip(together, alone, strict=True))
