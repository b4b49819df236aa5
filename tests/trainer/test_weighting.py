"""Sigma, the pressure-conserving scale and the branch statistics."""

import json
import math

import pytest
import torch

from papo.config import WeightingConfig as Config
from papo.dist import collectives
from papo.policy.weighting import BranchSums, WeightController, branch_sums
from papo_kernels.token_loss import polarity_shape


def batch(seed: int, n: int = 200) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    advantages = torch.randn(n, generator=g)
    unit = 0.1 * torch.randn(n, generator=g)
    live = torch.rand(n, generator=g) > 0.2
    clipped = torch.rand(n, generator=g) > 0.9
    return {
        "advantages": advantages,
        "unit": unit,
        "live": live,
        "clipped": clipped,
        "polarity": advantages * unit,
    }


def sums_of(b: dict[str, torch.Tensor], weight: torch.Tensor, h: torch.Tensor) -> BranchSums:
    sums = branch_sums(b["polarity"], b["advantages"], weight, b["live"], b["clipped"], h)
    return BranchSums.of(collectives.sum_named(sums))


@pytest.mark.parametrize("shape", ["sign", "tanh"])
@pytest.mark.parametrize("phase", [-0.9, 0.0, 0.4, 1.0])
def test_scale_conserves_pressure_over_the_batch(shape: str, phase: float) -> None:
    controller = WeightController(Config(shape=shape))
    b = batch(0)
    h = polarity_shape(
        b["polarity"], b["unit"], shape=shape, sigma=controller.sigma, dead_zone=1e-6
    )
    controller.update(sums_of(b, torch.ones(200), h))
    weight = controller.scale(phase) * (1 + 0.5 * phase * h)
    live = b["live"].double()
    before = (b["advantages"].abs() * live).sum()
    after = (weight * b["advantages"].abs() * live).sum()
    assert after.item() == pytest.approx(before.item(), rel=1e-6)


def test_scale_is_one_without_conserve_without_history_and_at_phase_zero() -> None:
    b = batch(1)
    h = polarity_shape(b["polarity"], b["unit"], shape="sign", sigma=1.0, dead_zone=1e-6)
    for config in (Config(), Config(conserve=False)):
        controller = WeightController(config)
        assert controller.scale(0.7) == 1.0
        controller.update(sums_of(b, torch.ones(200), h))
        assert controller.scale(0.0) == 1.0
    assert controller.scale(0.7) == 1.0


def test_strength_zero_is_no_weighting_at_all() -> None:
    assert WeightController(Config(strength=0.0)).kernel_weighting(0.9) is None


def test_sigma_is_the_bias_corrected_running_rms() -> None:
    controller = WeightController(Config(sigma_decay=0.9))
    squares = []
    for seed in range(4):
        b = batch(seed)
        h = torch.zeros(200)
        controller.update(sums_of(b, torch.ones(200), h))
        squares.append((b["polarity"].double()[b["live"]] ** 2).mean().item())
    weights = [0.9 ** (3 - i) for i in range(4)]
    expected = math.sqrt(sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights))
    assert controller.sigma == pytest.approx(expected, rel=1e-9)


def test_branch_sums_are_the_sums_over_their_tokens() -> None:
    b = batch(2)
    weight = torch.rand(200, generator=torch.Generator().manual_seed(7)) + 0.5
    h = torch.where(b["unit"].abs() < 0.02, 0.0, torch.sign(b["polarity"]))
    got = sums_of(b, weight, h)
    want = dict.fromkeys(BranchSums._fields, 0.0)
    for i in range(200):
        if not b["live"][i]:
            continue
        advantage, w = abs(b["advantages"][i].item()), weight[i].item()
        want["tokens"] += 1
        want["square"] += b["polarity"][i].item() ** 2
        want["advantage"] += advantage
        want["advantage_h"] += advantage * h[i].item()
        if b["clipped"][i]:
            continue
        want["pressure"] += advantage
        if h[i] != 0:
            branch = "expanding" if h[i] > 0 else "contracting"
            want[branch] += 1
            want[f"pressure_{branch}_before"] += advantage
            want[f"pressure_{branch}_after"] += w * advantage
    assert got._asdict() == pytest.approx(want, rel=1e-6)
    figures = got.metrics()
    assert figures["polarity/expanding_share"] == want["expanding"] / want["tokens"]
    assert figures["polarity/contracting_pressure_after"] == pytest.approx(
        want["pressure_contracting_after"] / want["pressure"]
    )


def test_branch_sums_add_up_over_micro_batches_and_ignore_masked_tokens() -> None:
    b = batch(5)
    weight, h = torch.ones(200), torch.sign(b["polarity"])
    rows = [b["polarity"], b["advantages"], weight, b["live"], b["clipped"], h]
    whole = branch_sums(*rows)
    pieces = [branch_sums(*(row[i : i + 60] for row in rows)) for i in range(0, 200, 60)]
    added = {name: sum(piece[name] for piece in pieces) for name in whole}
    torch.testing.assert_close(added, whole, rtol=1e-12, atol=0)
    ruined = [
        torch.where(b["live"], row, torch.nan) if row.is_floating_point() else row for row in rows
    ]
    assert branch_sums(*ruined) == whole
    nothing = branch_sums(*(row[:0] for row in rows))
    shares = BranchSums.of(collectives.sum_named(nothing)).metrics().values()
    assert all(map(math.isnan, shares))  # a share of nothing


@pytest.mark.parametrize("phase", [-0.8, 0.8])
def test_phase_moves_pressure_between_the_branches(phase: float) -> None:
    b = batch(6)
    b["clipped"] = torch.zeros(200, dtype=torch.bool)
    h = torch.sign(b["polarity"])
    controller = WeightController(Config())
    controller.update(sums_of(b, torch.ones(200), h))
    weight = controller.scale(phase) * (1 + 0.5 * phase * h)
    figures = sums_of(b, weight, h).metrics()
    grown, shrunk = ("expanding", "contracting") if phase > 0 else ("contracting", "expanding")
    assert (
        figures[f"polarity/{grown}_pressure_after"] > figures[f"polarity/{grown}_pressure_before"]
    )
    assert (
        0.0
        < figures[f"polarity/{shrunk}_pressure_after"]
        < figures[f"polarity/{shrunk}_pressure_before"]
    )


def test_dead_zone_and_shapes() -> None:
    unit = torch.tensor([1e-7, -1e-7, 1e-3, -1e-3, 0.0])
    polarity = 2.0 * unit
    sign = polarity_shape(polarity, unit, shape="sign", sigma=1.0, dead_zone=1e-6)
    assert sign.tolist() == [0.0, 0.0, 1.0, -1.0, 0.0]
    tanh = polarity_shape(polarity, unit, shape="tanh", sigma=1e-3, dead_zone=1e-6)
    assert torch.allclose(tanh, torch.tanh(polarity / 1e-3))


def test_empty_or_broken_batches_teach_nothing_and_state_round_trips() -> None:
    controller = WeightController(Config())
    b = batch(3)
    controller.update(sums_of(b, torch.ones(200), torch.sign(b["polarity"])))
    before = controller.state_dict()
    controller.update(BranchSums(*[0.0] * 11))
    controller.update(BranchSums(*[math.nan] * 11)._replace(tokens=5.0))
    assert controller.state_dict() == before
    other = WeightController(Config())
    other.load_state_dict(json.loads(json.dumps(before)))
    assert other.kernel_weighting(0.3) == controller.kernel_weighting(0.3)
