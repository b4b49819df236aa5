"""The parameters of a model's output projection: of a linear layer, or of PEFT's LoRA of one.

A head reads them instead of calling the layer, so whatever else a call would do is refused.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

# Their hooks gather, move and free parameters, and leave what goes through a layer as it is.
_HOOKS_OF = ("deepspeed", "accelerate", "torch", "transformers")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_PEFT_LAYER = ("peft.tuners.lora.layer", "Linear")


def is_linear(layer: object) -> bool:
    """A layer of another kind may do more to the hidden states than multiply them, and a weight
    that is no parameter is one step's."""
    is_class = getattr(type(layer), "forward", None) is nn.Linear.forward
    return is_class and isinstance(getattr(layer, "weight", None), nn.Parameter)


def check_hooks(layer: nn.Module) -> None:
    """Refuse what a call of the layer would do besides its own forward pass.

    Raises:
        TypeError: naming the hook or the function.
    """
    found: list[Any] = [hook for name in _HOOKS for hook in vars(layer).get(name, {}).values()]
    if "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):  # accelerate's, if it has one
        found.append(vars(layer)["forward"])
    for function in found:
        while isinstance(function, functools.partial):
            function = function.func
        owner = getattr(function, "__module__", None) or type(function).__module__
        is_forward = function is vars(layer).get("forward")
        if is_forward or owner.partition(".")[0] not in _HOOKS_OF:
            name = getattr(function, "__qualname__", type(function).__qualname__)
            raise TypeError(
                "model: expected an output projection without hooks, which reading its weight "
                f"leaves out, got {owner}.{name}; make Head(weight, ...) if the logits are to be "
                "without it"
            )


def unwrapped(layer: Any) -> tuple[Any, tuple[torch.Tensor, torch.Tensor, float] | None]:
    """The layer that an adapter of PEFT is around, and the active LoRA's A, B and scaling; `layer`
    itself and None where there is no such adapter.

    Raises:
        TypeError: the adapter is more than LoRA; its kind is named.
    """
    if (type(layer).__module__, type(layer).__qualname__) != _PEFT_LAYER:
        return layer, None
    check_hooks(layer)
    if layer.merged_adapters:
        raise _refused("merged adapters", f"{layer.merged_adapters}; call unmerge_adapter() first")
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or not active:
        return layer.base_layer, None
    if len(active) > 1:
        raise _refused("several active adapters", f"{active}; call set_adapter() with one")
    (name,) = active
    a, b = layer.lora_A[name], layer.lora_B[name]
    if layer.use_dora.get(name) or name in layer.lora_magnitude_vector:
        raise _refused("DoRA", repr(name))
    if layer.lora_bias.get(name) or a.bias is not None or b.bias is not None:
        raise _refused("a LoRA bias", repr(name))
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        raise _refused("LoRA dropout", f"{name!r} with {layer.lora_dropout[name]}")
    variant = layer.lora_variant.get(name)
    if variant is not None or not (is_linear(a) and is_linear(b)):
        raise _refused("a variant of LoRA", f"{name!r} with {variant or type(a).__name__}")
    check_hooks(a)
    check_hooks(b)
    return layer.base_layer, (a.weight, b.weight, float(layer.scaling[name]))


def _refused(kind: str, got: str) -> TypeError:
    return TypeError(
        f"model: expected an output projection with plain LoRA or none, not {kind}, got {got}"
    )
