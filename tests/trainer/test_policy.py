"""The policy as one module: nothing random in training passes, unless it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from papo.errors import PapoError
from papo.model.recompute import recompute_activations, recomputed_layers
from papo.policy.batch import collate
from papo.policy.passes import loss_of
from papo_kernels import Objective, PolicyLossOutput
from tests.trainer.families import PlainEngine, build, sequences, trained

# By attention, by modules of their own, by a layer's function, and whole layers.
DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"attention_dropout": 0.5},
    "opt": {"dropout": 0.5, "layerdrop": 0.5},
}


def loss(engine: PlainEngine) -> PolicyLossOutput:
    engine.train(True)
    batch = collate(sequences(), pad_id=0, max_row_tokens=2048)
    return loss_of(engine, batch, Objective(), None)


def expected(engine: PlainEngine) -> torch.Tensor:
    engine.train(False)
    return trained(engine, sequences(), 2048).logp


@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_is_off_in_training_passes(family: str) -> None:
    """With it nothing had changed and the ratio was 0.97, a tenth of the tokens clipped."""
    engine = PlainEngine(build(family, **DROPOUT[family]))
    assert (loss(engine).logp - expected(engine)).abs().max() < 1e-5


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_is_kept_where_it_is_asked_for(family: str, recompute: bool) -> None:
    """In passes with gradient; log-probs of the old policy are without."""
    model = build(family, **DROPOUT[family])
    if recompute:
        recompute_activations(model, dropout=True)
    engine = PlainEngine(model, dropout=True)
    first, second = expected(engine), expected(engine)
    assert torch.equal(first, second)
    torch.manual_seed(0)
    assert (loss(engine).logp - first).abs().max() > 0.01


@pytest.mark.parametrize("family", DROPOUT)
def test_activations_are_recomputed_without_dropout(family: str) -> None:
    """transformers recomputes in training mode alone, in which dropout is active."""
    model = build(family, **DROPOUT[family])
    recompute_activations(model, dropout=False)
    engine = PlainEngine(model)
    layer = recomputed_layers(model)[0]
    runs: list[int] = []
    for module in layer.children():
        module.register_forward_pre_hook(lambda *_: runs.append(1))
    without = expected(engine)
    once = len(runs)
    out = loss(engine)
    assert len(runs) == 2 * once
    out.loss.backward()
    assert len(runs) == 3 * once
    assert (out.logp - without).abs().max() < 1e-5
    assert layer.training and not any(child.training for child in layer.children())
    engine.train(False)
    assert not layer.training


def test_a_model_that_cannot_recompute_is_one_line() -> None:
    model = build("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(PapoError, match=r"^model.activation_checkpointing=True: .*not support"):
        recompute_activations(model, dropout=False)
