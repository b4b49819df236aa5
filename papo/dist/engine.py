"""DeepSpeed around the policy: forward, backward, step, whole weights, this rank's state by name.

With group.py, the only file that uses deepspeed. ZeRO-0 to 3 look the same from outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from papo.dist import collectives
from papo.dist.adamw import GuardedAdamW
from papo.dist.average import GradientAverage, compute_weights
from papo.dist.partition import (
    MASTER,
    MOMENTS,
    FragmentPartition,
    Partition,
    ReplicatedPartition,
    ZeRO3Partition,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from papo.config import OptimConfig
    from papo.policy.batch import LossInputs, ModelInputs
    from papo.policy.module import Policy
    from papo_kernels import Objective, PolarityWeighting

os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed


class StepResult(NamedTuple):
    """What a step did.

    Attributes:
        grad_norm: before clipping, inf or NaN where the gradient is.
        applied: whether weights changed.
        first_order: sum over all trained parameters of the kept average (`Engine.average_gradient`)
            times the change of the weights that passes compute with, rounding to bfloat16 included;
            NaN where there is none or nothing changed.
    """

    grad_norm: float
    applied: bool
    first_order: float = math.nan


def local_device() -> torch.device:
    """The device of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


class Engine:
    """The policy under DeepSpeed.

    Args:
        policy: its parameters are the model's.
        ds_config: the dict DeepSpeed gets (`TrainConfig.deepspeed_dict`).
        optim: the config's `optim` section; None for a frozen reference policy.
    """

    def __init__(
        self, policy: Policy, ds_config: dict[str, Any], optim: OptimConfig | None
    ) -> None:
        self.policy = policy
        self.device = local_device()
        if optim is None and ds_config["zero_optimization"]["stage"] != 3:
            # ZeRO-1 and 2 partition what only an optimizer has, and refuse to run without one.
            ds_config = {**ds_config, "zero_optimization": {"stage": 0}}
        self._stage = ds_config["zero_optimization"]["stage"]
        self.computes_in_bf16: bool = ds_config["bf16"]["enabled"]
        self.adamw: GuardedAdamW | None = None
        self._max_grad_norm = math.inf if optim is None else optim.max_grad_norm
        if optim is not None:
            self.adamw = GuardedAdamW(
                [p for p in policy.parameters() if p.requires_grad],
                lr=optim.lr,
                betas=optim.betas,
                eps=optim.eps,
                weight_decay=optim.weight_decay,
                fused=True,
            )
        self._offloads = "offload_optimizer" in ds_config["zero_optimization"]
        self.average = GradientAverage(
            torch.bfloat16 if self.computes_in_bf16 else torch.float32,
            torch.device("cpu") if self._offloads else self.device,
        )
        self._view = _empty_twin(policy.causal_lm)
        # DeepSpeed makes its float32 masters from bfloat16 weights. A checkpoint's further digits
        # would be lost, and small updates with them: a master that starts on the bfloat16 grid must
        # first leave its rounding interval before the policy changes at all.
        exact = {
            name: p.detach()
            for name, p in self.trained_parameters()
            if self.computes_in_bf16 and p.dtype != torch.bfloat16
        }
        self._ds, self._zero, _, _ = deepspeed.initialize(
            model=policy, optimizer=self.adamw, config=ds_config, dist_init_required=False
        )
        if self._stage == 3:
            for parameter in policy.scoring.parameters_read:
                deepspeed.zero.register_external_parameter(policy.scoring, parameter)
        for name, parameter in self.trained_parameters():
            if name in exact:
                partition = self.partition(parameter)
                mine = exact.pop(name).flatten()[partition.start : partition.stop]
                partition.write(MASTER, mine.float())
        self.train(optim is not None)

    def forward(
        self,
        batch: ModelInputs,
        tokens: LossInputs | None = None,
        objective: Objective | None = None,
        weighting: PolarityWeighting | None = None,
    ) -> tuple[Tensor, ...]:
        """`Policy.forward` with the weights gathered layer by layer."""
        return self._ds(batch, tokens, objective, weighting)

    def train(self, mode: bool = True) -> None:
        """Switch dropout and the like."""
        self._ds.train(mode)

    @property
    def dropout(self) -> bool:
        """Whether passes with gradient see another policy than those without."""
        return self.policy.dropout

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of `loss`; `last` marks the step's last micro-batch.

        DeepSpeed averages over ranks. The loss is a part of a global sum, so the average is undone
        here.
        """
        self._ds.set_gradient_accumulation_boundary(last)
        self._ds.backward(loss * self._ds.dp_world_size, scale_wrt_gas=False)

    def step(self, lr: float, *, blocked: bool) -> StepResult:
        """Clip, update (unless `blocked` or the gradient is not finite) and clear the gradients."""
        assert self.adamw is not None
        for group in self.adamw.param_groups:
            group["lr"] = lr
        norm = None
        # float32 without ZeRO: DeepSpeed clips but keeps no norm.
        if not hasattr(self._zero, "_global_grad_norm"):
            grads = [p.grad for p in self.policy.parameters() if p.grad is not None]
            norm = float(nn.utils.get_total_norm(grads))
            blocked = blocked or not math.isfinite(norm)
        parts = self._partitions() if self.has_average else []
        before = compute_weights(parts)
        self._ds_step(blocked)
        norm = float(self._ds.get_global_grad_norm()) if norm is None else norm
        applied, first_order = not blocked and math.isfinite(norm), math.nan
        if self.has_average and applied:
            first_order = self.average.dot_change(self._partitions(), before)
        return StepResult(norm, applied, first_order)

    @property
    def has_average(self) -> bool:
        """Whether there is an average of gradients."""
        return self.average.count > 0

    def average_gradient(self, decay: float) -> float:
        """Fold what `backward` has accumulated into the kept average, in place of a step; its norm.

        The norm is of all ranks' gradient, before clipping. One that is not finite is not folded.
        Weights and AdamW's state stay as they are, bit for bit.

        Args:
            decay: of the bias-corrected average, in [0, 1).
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # streams of DeepSpeed's own write gradients
        norm = self.average.fold(self._partitions(), decay)
        if self._stage == 3 and not self._offloads:
            self._zero.zero_grad()
            self._release_gathered()
            self._clear_buffers()
        else:
            self._ds_step(blocked=True)
        return norm

    def _ds_step(self, blocked: bool) -> None:
        """DeepSpeed's step, after which no gradient is left."""
        assert self.adamw is not None
        self.adamw.blocked = blocked
        _return_freed_memory()
        self._ds.step()
        if self._stage == 3:
            self._clear_buffers()

    def _clear_buffers(self) -> None:
        """Zero the gradients that ZeRO-3 leaves where they are: it would step a weight that the
        next loss does not reach, such as an expert's, by the last gradient that it had."""
        self._zero.grad_partitions_flat_buffer.zero_()
        for flat in self._zero.fp32_partitioned_groups_flat if self._offloads else ():
            if flat.grad is not None:
                flat.grad.zero_()

    @contextlib.contextmanager
    def moved_along_average(self, change: float) -> Iterator[None]:
        """Forward passes inside see weights moved along the kept average, scaled as by AdamW.

        The move is the average over what AdamW would divide it by in an update. The weights come
        back bit for bit; float32 masters of bfloat16 weights never change. Without an average
        nothing is moved.

        Args:
            change: first-order change of what the average is the gradient of; in nats for an
                entropy's.
        """
        assert self.adamw is not None
        if not self.has_average:
            yield
            return
        self._release_gathered()
        try:
            parts, bound = self._partitions(), self._max_grad_norm
            with self.average.moved(parts, self.adamw, bound, change):
                yield
        finally:
            self._release_gathered()

    def _release_gathered(self) -> None:
        """Have ZeRO-3 gather weights anew, some of which it keeps from one pass to the next."""
        if self._stage == 3:
            self._zero.empty_partition_cache()

    def finite(self) -> bool:
        """Whether the weights and moments that this rank updates are; no collective."""
        assert self.adamw is not None
        state = self.adamw.state
        flat = [t for p in state for t in (p, *(state[p][k] for k in MOMENTS if k in state[p]))]
        # Among the optimizer's own tensors is padding, which DeepSpeed leaves as the memory was.
        return _all_finite(flat) or _all_finite(self._held())

    def _held(self) -> Iterator[Tensor]:
        """This rank's float32 masters and moments, without padding."""
        kinds = (MASTER, *MOMENTS) if self.has_moments else (MASTER,)
        for _, partition in self._partitions():
            yield from (partition.read(kind) for kind in kinds)

    @contextlib.contextmanager
    def inference_model(self) -> Iterator[PreTrainedModel]:
        """The causal LM with whole weights and no hooks, gathered once for the whole block.

        The twin's parameters point at the gathered storage, so nothing is copied, and are emptied
        at the end.
        """
        source = dict(self.policy.causal_lm.named_parameters())
        gather = (
            deepspeed.zero.GatheredParameters(list(source.values()))
            if self._stage == 3
            else contextlib.nullcontext()
        )
        with gather:
            self._point_twin_at({name: p.data for name, p in source.items()})
            self._view.eval()
            try:
                yield self._view
            finally:
                self._point_twin_at({name: torch.empty(0, device="meta") for name in source})
        _return_freed_memory()

    def _point_twin_at(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            module_name, _, leaf = name.rpartition(".")
            module = self._view.get_submodule(module_name)
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        self._view.tie_weights()
        for name, buffer in self.policy.causal_lm.named_buffers():
            module_name, _, leaf = name.rpartition(".")
            self._view.get_submodule(module_name)._buffers[leaf] = buffer

    # State by parameter name: independent of ZeRO stage and number of ranks.

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Name and parameter of everything that is trained, in a fixed order."""
        named = self.policy.causal_lm.named_parameters()
        return [(name, p) for name, p in named if p.requires_grad]

    @property
    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of everything that is trained, by name."""
        return {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self.trained_parameters()}

    @property
    def trained_numel(self) -> int:
        """How many numbers are trained, over all ranks."""
        return sum(math.prod(shape) for shape in self.trained_shapes.values())

    def partition(self, parameter: nn.Parameter) -> Partition:
        """This rank's part of a trained parameter and of its optimizer state."""
        if self._stage == 3:
            return ZeRO3Partition(parameter, self._zero, collectives.rank())
        if self.adamw and hasattr(parameter, "_hp_mapping"):
            return FragmentPartition(parameter, self.adamw)
        state = self.adamw.state.get(parameter, {}) if self.adamw else {}
        moments = {key: state[key] for key in MOMENTS if key in state}
        ranks = collectives.rank(), collectives.world_size()
        return ReplicatedPartition(parameter, moments, *ranks)

    def _partitions(self) -> list[tuple[str, Partition]]:
        return [(name, self.partition(p)) for name, p in self.trained_parameters()]

    @property
    def has_moments(self) -> bool:
        """Whether AdamW's moments exist, which its first update makes."""
        return self.adamw is not None and any("exp_avg" in s for s in self.adamw.state.values())

    @property
    def optimizer_steps(self) -> int:
        """Updates AdamW has made (its bias correction depends on it)."""
        return self.adamw.updates if self.adamw else 0

    @optimizer_steps.setter
    def optimizer_steps(self, value: int) -> None:
        assert self.adamw is not None
        for state in self.adamw.state.values():
            state["step"].fill_(value)


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    # aminmax needs no temporary of the tensor's size.
    extremes = [x for t in tensors if t.numel() for x in torch.aminmax(t.detach())]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def _return_freed_memory() -> None:
    """Hand the heap's free pages back to the system.

    A pass leaves holes that the next one, of another length, does not fill. Without this, resident
    memory grows by a tenth within some ten steps on a CPU.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other C libraries do not
    if trim is not None:
        trim(0)


def _empty_twin(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """The same architecture without weights, for `Engine.inference_model`.

    Its generation config is a blank one: sampling must be the policy's own distribution, not one
    with the repetition penalty that the model's files may ask for.
    """
    with torch.device("meta"):
        twin = type(causal_lm)(causal_lm.config)
    twin.generation_config = GenerationConfig()
    return twin
