"""The phase controller against a direct computation of its definition."""

import json
import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papo.policy.phase import FLOOR, PhaseController


@dataclass(frozen=True)
class Config:
    mode: str = "both"
    target: object = "warmup"
    warmup_steps: int = 5
    fast_decay: float = 0.7
    slow_decay: float = 0.95
    k_d: float = 3.0
    k_p: float = 3.0


def direct(config: Config, entropies: list[float]) -> float:
    n = len(entropies)
    if n < config.warmup_steps:
        return 0.0

    def average(decay: float) -> float:
        weights = [decay ** (n - 1 - i) for i in range(n)]
        return sum(w * h for w, h in zip(weights, entropies, strict=True)) / sum(weights)

    fast, slow = average(config.fast_decay), average(config.slow_decay)
    first = entropies[: max(1, config.warmup_steps)]
    reference = sum(first) / len(first) if config.target == "warmup" else float(config.target)
    trend = config.k_d * (slow - fast) / max(slow, FLOOR)
    target = config.k_p * (reference - fast) / max(reference, FLOOR)
    return math.tanh({"trend": trend, "target": target, "both": trend + target}[config.mode])


@given(
    st.lists(st.floats(0.0, 12.0), min_size=1, max_size=30),
    st.sampled_from(["trend", "target", "both"]),
    st.sampled_from(["warmup", 0.0, 1.5]),
    st.integers(0, 6),
)
@settings(max_examples=100, deadline=None)
def test_phase_is_its_definition(
    entropies: list[float], mode: str, target: object, warmup: int
) -> None:
    config = Config(mode=mode, target=target, warmup_steps=warmup)
    controller = PhaseController(config)
    for entropy in entropies:
        phase = controller.update(entropy)
    assert phase == pytest.approx(direct(config, entropies), abs=1e-9)
    assert -1.0 <= phase <= 1.0


def test_signs_follow_the_trajectory() -> None:
    falling, rising = PhaseController(Config()), PhaseController(Config())
    for k in range(12):
        falling.update(2.0 - 0.15 * k)
        rising.update(2.0 + 0.15 * k)
    assert falling.phase > 0.5 and rising.phase < -0.5


def test_warm_up_is_the_baseline() -> None:
    controller = PhaseController(Config(warmup_steps=5))
    assert [controller.update(2.0 - 0.3 * k) for k in range(4)] == [0.0] * 4
    assert controller.update(0.1) > 0.0


def test_state_round_trips_through_json_bit_for_bit() -> None:
    entropies = [2.1, 1.7, 1.9, 1.1, 0.73, 0.2, 0.31, 0.5]
    whole, first = PhaseController(Config()), PhaseController(Config())
    for h in entropies:
        whole.update(h)
    for h in entropies[:4]:
        first.update(h)
    second = PhaseController(Config())
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for h in entropies[4:]:
        second.update(h)
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5])
def test_a_bad_entropy_is_refused_and_changes_nothing(bad: float) -> None:
    controller = PhaseController(Config())
    controller.update(1.0)
    before = controller.state_dict()
    with pytest.raises(ValueError, match="mean_entropy"):
        controller.update(bad)
    assert controller.state_dict() == before
