"""How rows are cut: the table, what the environment forces, and that no cut changes what it should
not. The kernels run on the emulated machine."""

from __future__ import annotations

import json

import pytest
import torch

from papo_kernels import Objective
from papo_kernels.backends import tuning
from papo_kernels.backends.native import CUDA
from papo_kernels.types import RowParams, TokenInputs
from tests.cases import make_case, make_loss_case
from tests.kernels.cuda_emulator import emulated
from tests.oracle import check_policy_loss, check_token_stats

needs_compiler = pytest.mark.needs("g++")
VARIABLES = ("PAPO_KERNEL", "PAPO_TILE", "PAPO_STATS_TILE")
# A device with room for every tile below.
LARGE = {"shared_per_block": 60000, "shared_per_multiprocessor": 64000}


@pytest.fixture
def force(monkeypatch):
    """Sets the variables, the others unset, and has them read again."""

    def set_variables(**values: str) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        tuning.forced.cache_clear()

    set_variables()
    yield set_variables
    monkeypatch.undo()
    tuning.forced.cache_clear()


# ---- the table ----------------------------------------------------------------------------------


def test_the_table_serves_every_call():
    """Each backend's rows cover all columns, and each says where it comes from."""
    for backend, rows in tuning.load().items():
        for columns in (1, 1024, 1025, 4096, 4097, 151_936, 2**30):
            for dtype in ("float16", "bfloat16", "float32"):
                assert any(r.matches(("a device", "sm_90"), dtype, columns) for r in rows), backend
        for row in rows:
            assert row.columns[0] <= row.columns[1]
            assert ("modeled" in row.source) != ("measured" in row.source)
            if row.measured:
                assert {"measured", "date", "device"} == set(row.source)


def test_the_first_row_that_matches_serves(monkeypatch):
    def row(device, dtype, columns, name):
        return tuning.Row(device, dtype, columns, {"name": name}, {"modeled": "here"})

    rows = [
        row("NVIDIA H200", "bfloat16", (100, 200), "a device's"),
        row("sm_90", tuning.ANY, (100, 200), "an architecture's"),
        row(tuning.ANY, tuning.ANY, (1, 1000), "any"),
    ]
    monkeypatch.setattr(tuning, "_table", lambda: {"cuda": rows})
    names = {"cuda:0": ("NVIDIA H200", "sm_90"), "cuda:1": ("NVIDIA B200", "sm_100")}
    monkeypatch.setattr(tuning, "device_names", lambda device: names[str(device)])

    def chosen(index, dtype, columns):
        return tuning.config.__wrapped__("cuda", torch.device("cuda", index), dtype, columns)

    assert chosen(0, torch.bfloat16, 100) == {"name": "a device's"}
    assert chosen(0, torch.bfloat16, 200) == {"name": "a device's"}
    assert chosen(0, torch.float32, 150) == {"name": "an architecture's"}
    assert chosen(0, torch.bfloat16, 201) == {"name": "any"}
    assert chosen(1, torch.bfloat16, 150) == {"name": "any"}
    with pytest.raises(LookupError, match="V = 1001"):
        chosen(1, torch.bfloat16, 1001)


def test_a_measured_row_goes_before_the_others_and_replaces_its_like(tmp_path):
    table = tuning.load()
    measured = {"measured": "results/x.json", "date": "2026-01-01", "device": "a device"}

    def new(tile):
        config = {"tile": tile, "stats": None}
        return tuning.Row("a device", "bfloat16", (4097, 151_936), config, measured)

    rows = tuning.insert(table["cuda"], new([8, 4, 1, 3, 2]))
    rows = tuning.insert(rows, new([4, 8, 1, 3, 1]))
    assert [r.config["tile"] for r in rows] == [[4, 8, 1, 3, 1], None]
    path = tmp_path / "tuning.json"
    tuning.save({**table, "cuda": rows}, path)
    assert tuning.load(path) == {**table, "cuda": rows}
    assert all(len(line) < 400 for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"device": 90}, "device to be a name, got 90"),
        ({"dtype": "torch.float32"}, "dtype to be one of"),
        ({"columns": [5000, 1]}, "columns to be"),
        ({"columns": [0, 1]}, "columns to be"),
        ({"columns": [1]}, "columns to be"),
        ({"config": {"tile": None}}, "the keys tile and stats"),
        ({"config": {"tile": [2, 2, 1, 3], "stats": None}}, "tile to be null or"),
        ({"config": {"tile": [0, 4, 1, 3, 2], "stats": None}}, "tile to be null or"),
        ({"config": {"tile": [2**32 + 2, 4, 1, 3, 2], "stats": None}}, "tile to be null or"),
        ({"config": {"tile": None, "stats": []}}, "stats to be null or"),
        ({"source": {"measured": "results/x.json"}}, "source to have the keys"),
        ({"rows": 3}, "the keys device, dtype, columns"),
    ],
)
def test_a_table_that_makes_no_sense_names_the_row(tmp_path, change, expected):
    table = json.loads(tuning.PATH.read_text())
    table["cuda"].append({**table["cuda"][0], **change})
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"tuning.json: cuda\[1\]: expected .*" + expected):
        tuning.load(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"cuda": {}}'])
def test_what_is_no_table_names_the_file(tmp_path, text):
    path = tmp_path / "tuning.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tuning.json: expected"):
        tuning.load(path)


@needs_compiler
def test_a_row_of_the_table_cuts_rows(force, monkeypatch):
    config = {"tile": [2, 2, 1, 3, 1], "stats": [1, 2, 1]}
    monkeypatch.setattr(tuning, "config", lambda *key: config)
    with emulated(**LARGE) as native:
        check_policy_loss(make_loss_case("normal", 3, 3001), "cuda")
        assert native.widest_cluster == 2
    with emulated(**LARGE) as native:
        check_token_stats(make_case("normal", 16, 3001), "cuda")
        assert native.widest_cluster == 1, "a block a row"
    with emulated(**LARGE) as native:
        check_token_stats(make_case("normal", 15, 3001), "cuda")
        assert native.widest_cluster == 2, "too few rows for that"
    config["stats"] = [0, 0, 0]
    with emulated(**LARGE) as native:
        check_token_stats(make_case("normal", 16, 3001), "cuda")
        assert native.widest_cluster == 2


@needs_compiler
def test_a_row_of_the_table_that_does_not_fit_is_an_error(force, monkeypatch):
    monkeypatch.setattr(tuning, "config", lambda *key: {"tile": [32, 4, 1, 3, 2], "stats": None})
    with emulated(), pytest.raises(ValueError, match=r"tuning.json.*cluster is 32.*largest is 8"):
        check_token_stats(make_case("normal", 3, 3001), "cuda")


# ---- the environment ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PAPO_KERNEL", "resident "),
        ("PAPO_KERNEL", "fast"),
        ("PAPO_TILE", "8"),
        ("PAPO_TILE", "8,4,1,3"),
        ("PAPO_TILE", "8,4,1,3,2,1"),
        ("PAPO_TILE", "8,4,1,three,2"),
        ("PAPO_TILE", "-8,4,1,3,2"),
        ("PAPO_TILE", "8,4,1,3,4294967297"),
        ("PAPO_TILE", "8,4,1,3,٢"),
        ("PAPO_TILE", "8,4,1,3," + 30 * "9"),
        ("PAPO_TILE", "0,4,1,3,2"),
        ("PAPO_TILE", "8,4,1,3,0"),
        ("PAPO_STATS_TILE", "2,3"),
        ("PAPO_STATS_TILE", "2;3;2"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_it(force, name, value):
    force(**{name: value})
    with pytest.raises(ValueError, match=name) as error:
        tuning.forced()
    assert repr(value) in str(error.value)
    assert "expected" in str(error.value)


def test_streamed_rows_have_no_tile(force):
    for name, value in (("PAPO_TILE", "8,4,1,3,2"), ("PAPO_STATS_TILE", "2,3,2")):
        force(PAPO_KERNEL="streamed", **{name: value})
        with pytest.raises(ValueError, match=f"{name}: expected none"):
            tuning.forced()


@needs_compiler
@pytest.mark.parametrize(
    ("variables", "limit"),
    [
        ({"PAPO_TILE": "16,4,1,3,2"}, "cluster is 16, the device's largest is 8"),
        ({"PAPO_TILE": "3,4,1,3,2"}, "cluster is 3"),
        ({"PAPO_TILE": "8,16,1,3,2"}, "warps is 16, the kernel's most is 8"),
        ({"PAPO_TILE": "8,3,1,3,2"}, "warps is 3, which is no power of two"),
        ({"PAPO_TILE": "8,8,1,3,2"}, "registers is 110592, a multiprocessor's is 65536"),
        ({"PAPO_STATS_TILE": "1,3,100"}, "registers is .* a multiprocessor's is 65536"),
        ({"PAPO_TILE": "8,4,1,9,2"}, "ring is 9, the kernel's most is 8"),
        ({"PAPO_TILE": "8,4,2,2,2"}, "ring is 2, the least beyond its stages is 3"),
        ({"PAPO_TILE": "1,4,1,3,2"}, "shared memory is .* the device's, .* is 30976"),
        ({"PAPO_TILE": "1,4,1,3,1"}, "shared memory is .* the device's, .* is 60000"),
        ({"PAPO_STATS_TILE": "3,4,1"}, "teams is 3"),
        ({"PAPO_STATS_TILE": "16,8,1"}, "teams is 16, the row's slices is"),
        ({"PAPO_TILE": "8,8,1,3,1", "PAPO_STATS_TILE": "2,3,2"}, "all teams is 16, .* most is 8"),
        ({"PAPO_TILE": "8,4,1,3,2", "PAPO_STATS_TILE": "2,1,2"}, "ring is 1, the least"),
        ({"PAPO_TILE": "8,4,1,3,2", "PAPO_STATS_TILE": "2,9,2"}, "ring is 9, the kernel's most"),
        ({"PAPO_TILE": "8,4,1,3,2", "PAPO_STATS_TILE": "2,3,0"}, "blocks is 0"),
        ({"PAPO_TILE": "8,4,2,3,2", "PAPO_STATS_TILE": "2,3,2"}, "stages is 2"),
    ],
)
def test_a_tile_that_does_not_fit_raises_and_names_the_limit(force, variables, limit):
    force(**variables)
    case = make_case("normal", 3, 10001)
    with emulated(**LARGE) as native:
        with pytest.raises(ValueError, match=limit) as error:
            check_token_stats(case, "cuda")
        assert all(f"{name}={value}" in str(error.value) for name, value in variables.items())
        assert "V = 10001" in str(error.value)
        assert native.launches == 0


@needs_compiler
def test_a_device_without_clusters_has_no_tiles(force):
    for variables in ({"PAPO_KERNEL": "resident"}, {"PAPO_TILE": "1,1,1,3,1"}):
        force(**variables)
        with emulated(max_cluster=0), pytest.raises(ValueError, match="has no clusters"):
            check_token_stats(make_case("normal", 3, 100), "cuda")


@needs_compiler
@pytest.mark.parametrize(
    "tile", ["1,1,1,3,1", "2,2,1,2,2", "4,1,1,4,1", "8,8,1,3,1", "2,4,3,4,1", "1,8,2,7,1"]
)
def test_every_tile_gives_right_results(force, tile):
    """One block a row, many; more warps than words, fewer; several buffers a slice."""
    force(PAPO_TILE=tile)
    objective = Objective(dual_clip=1.5, kl_coef=0.04, entropy_coef=0.01)
    with emulated(**LARGE) as native:
        for dtype in (torch.bfloat16, torch.float32):
            check_token_stats(make_case("masked", 5, 3001, dtype=dtype), "cuda")
            case = make_loss_case("normal", 5, 3001, dtype=dtype, objective=objective)
            check_policy_loss(case, "cuda", inplace=True)
        assert native.widest_cluster == int(tile[0])


@needs_compiler
def test_streamed_rows_can_be_forced(force):
    force(PAPO_KERNEL="streamed")
    with emulated(**LARGE) as native:
        check_policy_loss(make_loss_case("normal", 5, 3001), "cuda")
        assert native.widest_cluster == 1
    force(PAPO_KERNEL="resident")
    with emulated(**LARGE) as native:
        check_policy_loss(make_loss_case("normal", 5, 30001), "cuda")
        assert native.widest_cluster > 1
    with emulated(), pytest.raises(ValueError, match=r"PAPO_KERNEL=resident.*columns is 1000000"):
        check_token_stats(make_case("normal", 1, 1_000_000), "cuda")


# ---- statistics by a block a row, and by a cluster ----------------------------------------------


@needs_compiler
@pytest.mark.parametrize("kind", ["normal", "masked", "one_hot", "offset_down"])
@pytest.mark.parametrize("stats", ["1,2,1", "2,3,2", "2,2,1", "4,5,1", "4,8,1"])
def test_statistics_have_the_same_bits_however_blocks_take_their_rows(force, kind, stats):
    """And so has the loss, with a gradient or without."""
    v, n = 1601, 9
    for dtype in (torch.bfloat16, torch.float32):
        case = make_case(kind, n, v, dtype=dtype)
        row, ones = RowParams(0.9, 0.0, v), torch.ones(n)
        tokens = TokenInputs(ones, ones, ones, None)
        live = case.targets != -100

        def call(dlogits, case=case, tokens=tokens, row=row):
            params = Objective()
            return CUDA.policy_loss_fwd(
                case.logits, case.targets, tokens, params, None, row, dlogits
            )

        force(PAPO_TILE="4,2,1,3,1", PAPO_STATS_TILE="0,0,0")
        with emulated(**LARGE) as native:
            by_clusters = CUDA.token_stats_fwd(case.logits, case.targets, row)
            loss = call(None)
            with_gradient = call(torch.empty_like(case.logits))
            assert native.widest_cluster == 4
        force(PAPO_TILE="4,2,1,3,1", PAPO_STATS_TILE=stats)
        for seed in range(3):
            with emulated(**LARGE, seed=seed, resident=1 + seed) as native:
                by_blocks = CUDA.token_stats_fwd(case.logits, case.targets, row)
                loss_again = call(None)
                assert native.widest_cluster == 1
            for a, b in zip(by_blocks, by_clusters, strict=True):
                assert torch.equal(a, b)
            for a, b in zip((*loss_again, *with_gradient), (*loss, *loss), strict=True):
                assert torch.equal(a, b)
        assert torch.equal(by_blocks[0][live], loss[1][live])


@needs_compiler
def test_a_device_that_refuses_clusters_streams_statistics_too(force):
    """Or the ratio to the logp of many rows would not be 1."""
    n, v = 20, 3001
    logits, targets = torch.randn(n, v), torch.randint(v, (n,))
    row, ones = RowParams(1.0, 0.0, v), torch.ones(n)
    force()
    with emulated() as native:
        native.lib.emulated_refuse_clusters()
        logp, *_ = CUDA.token_stats_fwd(logits, targets, row)
        tokens = TokenInputs(ones, ones, logp, None)
        for dlogits in (None, torch.empty_like(logits)):
            *_, ratio, _ = CUDA.policy_loss_fwd(
                logits, targets, tokens, Objective(), None, row, dlogits
            )
            assert ratio.eq(1.0).all()
        assert native.widest_cluster == 1
    force(PAPO_TILE="2,2,1,3,1")
    with emulated(**LARGE) as native:
        native.lib.emulated_refuse_clusters()
        with pytest.raises(RuntimeError, match="cannot run a cluster of 2 blocks with"):
            CUDA.token_stats_fwd(logits, targets, row)
