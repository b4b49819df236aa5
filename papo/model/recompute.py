"""Activations that are computed again in the backward pass, with or without dropout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from papo.errors import PapoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def recompute_activations(causal_lm: PreTrainedModel, *, dropout: bool) -> None:
    """Make the layers recompute their activations in the backward pass.

    Args:
        dropout: keep the layers' dropout.

    Raises:
        PapoError: the model cannot do so.
    """
    # Renamed in transformers 5.23, which Python 3.10 does not get.
    enable = getattr(causal_lm, "activation_checkpointing_enable", None)
    try:
        (enable or causal_lm.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise PapoError(f"model.activation_checkpointing=True: {error}") from error
    if dropout:
        return
    layers: list[Any] = [*recomputed_layers(causal_lm)]
    if not layers:
        raise PapoError(
            f"model.activation_checkpointing=True: {type(causal_lm).__name__} recomputes only "
            "with dropout; expected model.dropout=true beside it"
        )
    for layer in layers:
        checkpoint = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = partial(_recomputed, layer, checkpoint)


def recomputed_layers(causal_lm: nn.Module) -> list[nn.Module]:
    """The layers whose activations are recomputed; none before `recompute_activations`."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [
        module
        for module in causal_lm.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]


def _recomputed(
    layer: nn.Module, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any
) -> Any:
    """`checkpoint(function, *args)` with `function` run in evaluation mode.

    A layer recomputes only in training mode, and in training mode its dropout is on as well.
    """

    def evaluated(*args: Any) -> Any:
        training, layer.training = layer.training, False
        try:
            return function(*args)
        finally:
            layer.training = training

    return checkpoint(evaluated, *args)
