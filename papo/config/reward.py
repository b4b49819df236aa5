"""The `reward` section of a run's options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from papo.config.section import FiniteFloat, NonNegative, Section, refuse
from papo.errors import shown

Verifier = Annotated[
    str, Field(pattern=r"^(auto|reasoning_gym|math_verify|exact|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")
]


class RewardConfig(Section):
    """Verifiable rewards, computed in worker processes that can be killed."""

    verifier: Verifier | Annotated[list[Verifier], Field(min_length=1)] = "auto"
    """`auto` (the data source's own), `reasoning_gym`, `math_verify`, `exact` (docs/rewards.md says
    what each treats as equal), or your own `package.module:function` called as (answer text,
    reference answer, metadata) and returning a float, or None to mask the completion; functions
    written for TRL and verl are called their way. A list gives several, whose weighted sum is the
    reward."""
    weights: Annotated[list[FiniteFloat], Field(min_length=1)] | None = None
    """Weight of each verifier; by default all are 1."""
    extract: Literal["last_number", "boxed", "last_line", "none"] = "none"
    """Which part of a completion the verifier sees; a completion without such a part scores 0."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """For built-in verifiers, the reward is 1 where the score exceeds this and 0 elsewhere
    (reasoning-gym gives partial credit). What your own function returns is the reward itself."""
    success: FiniteFloat = 1.0
    """Reward from which a completion counts as right in `reward/accuracy`, held-out accuracy and
    pass@k. It changes no reward. Lower it if your own function gives less than 1 for a right
    answer."""
    on_bad_reference: Literal["error", "drop", "keep"] = "error"
    """What to do where a built-in verifier cannot read a reference answer, or would not score it 1
    as a completion: stop before the model is loaded, drop the problem, or keep it. All such answers
    are listed."""
    timeout_s: Annotated[float, Field(gt=0, le=86400)] = 5.0
    """Seconds that a verifier may take for a completion before its worker is killed and it counts
    as 0."""
    workers: Annotated[int, Field(gt=0, le=1024)] = 2
    """Worker processes per rank."""
    memory_mib: NonNegative = 8192
    """Address space of a worker in MiB, beyond which the verifier gets a MemoryError and the
    completion scores 0; 0 sets no limit."""

    @property
    def verifiers(self) -> list[str]:
        """All of `verifier`, as a list."""
        return [self.verifier] if isinstance(self.verifier, str) else self.verifier

    def chosen(self, source: str) -> list[str]:
        """The verifiers' names, where `auto` stands for the own one of `data.source`."""
        own = "reasoning_gym" if source == "reasoning_gym" else "math_verify"
        return [own if name == "auto" else name for name in self.verifiers]

    @model_validator(mode="after")
    def _check(self) -> RewardConfig:
        given, wanted = self.weights, len(self.verifiers)
        refuse(
            given is not None and len(given) != wanted,
            f"reward.weights={shown(given)}: expected {wanted} numbers, one for each of "
            "reward.verifier",
        )
        return self
