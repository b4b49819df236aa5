"""Errors name the argument, its value and what was expected, before anything runs."""

from __future__ import annotations

import math

import pytest
import torch

import papo_kernels
from papo_kernels import (
    Compute,
    Head,
    Logits,
    Objective,
    PolarityWeighting,
    policy_loss,
    token_stats,
)

N, V = 3, 11


def good(device="cpu", **changes):
    """Arguments of a correct `policy_loss` call, with changes; also of `Logits` and `Compute`."""
    arguments = {
        "logits": torch.zeros(N, V, device=device),
        "targets": torch.zeros(N, dtype=torch.int64, device=device),
        "advantages": torch.ones(N, device=device),
        "token_weight": torch.ones(N, device=device),
    }
    arguments = {**arguments, **changes}
    row = {name: arguments.pop(name) for name in ("softcap", "vocab_size") if name in arguments}
    if row:
        arguments["logits"] = Logits(arguments["logits"], **row)
    if "backend" in arguments:
        arguments["compute"] = Compute(arguments.pop("backend"))
    return arguments


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


# changed argument, value, error, message: for both functions.
ROW_ERRORS = [
    ("logits", [[0.0]], TypeError, r"logits: expected a tensor, .*head.hidden.; got list"),
    ("logits", zeros(N, V, dtype=torch.int64), TypeError, r"logits: .*float16.*torch\.int64"),
    ("logits", zeros(N, V, dtype=torch.complex64), TypeError, r"logits: .*torch\.complex64"),
    ("logits", zeros(N, V, dtype=torch.bool), TypeError, r"logits: .*torch\.bool"),
    ("logits", torch.tensor(0.0), ValueError, r"logits: expected shape \[\.\.\., V\].*\(\)"),
    ("logits", zeros(N, 0), ValueError, r"logits: .*V >= 1.*\(3, 0\)"),
    ("logits", zeros(2, V), ValueError, r"targets: expected shape \(2,\).*\(3,\)"),
    ("targets", 3, TypeError, r"targets: expected Tensor, got int"),
    ("targets", zeros(N), TypeError, r"targets: expected int64, got torch\.float32"),
    ("targets", zeros(N, dtype=torch.int32), TypeError, r"targets: .*torch\.int32"),
    ("targets", zeros(N, 1, 1, dtype=torch.int64), ValueError, r"targets: .*\(3,\).*\(3, 1, 1\)"),
    ("targets", zeros(2, 4, dtype=torch.int64), ValueError, r"targets: expected shape \(3,\)"),
    ("temperature", 0.0, ValueError, r"temperature: expected a number in .*, got 0\.0"),
    ("temperature", 1e-39, ValueError, r"temperature: .* in \[1e-18, 1e\+18\], got 1e-39"),
    ("temperature", 1e38, ValueError, r"temperature: .*got 1e\+38"),
    ("temperature", -1.0, ValueError, r"temperature: .*got -1\.0"),
    ("temperature", math.nan, ValueError, r"temperature: .*got nan"),
    ("temperature", math.inf, ValueError, r"temperature: .*got inf"),
    ("temperature", zeros(N), ValueError, r"temperature: .*, got 0\.0 at flat position 0"),
    (
        "temperature",
        torch.tensor([1.0, 1e-19, 1.0]),
        ValueError,
        r"temperature: expected numbers in \[1e-18, 1e\+18\], got 9\.99.*e-20 at flat position 1",
    ),
    ("temperature", torch.full((N,), 1e19), ValueError, r"temperature: .*got 9\.99.*e\+18 at"),
    ("temperature", None, TypeError, r"temperature: expected a number.*, got NoneType None"),
    ("softcap", "30", TypeError, r"softcap: expected None or a number, got str '30'"),
    ("softcap", True, TypeError, r"softcap: .*got bool True"),
    ("softcap", 0.0, ValueError, r"softcap: expected None or a number in .*, got 0\.0"),
    ("softcap", 4e38, ValueError, r"softcap: .* in \[1e-18, 1e\+18\], got 4e\+38"),
    ("softcap", -30.0, ValueError, r"softcap: .*got -30\.0"),
    ("softcap", math.nan, ValueError, r"softcap: .*got nan"),
    ("vocab_size", 0, ValueError, r"vocab_size: expected a value in \[1, 11\].*got 0"),
    ("vocab_size", 12, ValueError, r"vocab_size: .*\[1, 11\].*got 12"),
    ("vocab_size", 5.0, TypeError, r"vocab_size: expected an int or None, got float"),
    ("vocab_size", True, TypeError, r"vocab_size: .*got bool"),
    ("compute", "cpu", TypeError, r"compute: expected Compute, got str"),
    ("backend", "cudnn", ValueError, r"backend: expected one of .*'cudnn'"),
]
LOSS_ERRORS = [
    ("targets", zeros(N, 1, dtype=torch.int64), ValueError, r"targets: .*\(3,\).*\(3, 1\)"),
    ("advantages", 1.0, TypeError, r"advantages: expected a tensor, got float"),
    ("advantages", None, TypeError, r"advantages: expected a tensor, got NoneType"),
    ("advantages", zeros(N, 1), ValueError, r"advantages: expected shape \(3,\).*\(3, 1\)"),
    ("advantages", zeros(N, dtype=torch.complex64), TypeError, r"advantages: .*torch\.complex64"),
    ("token_weight", zeros(2), ValueError, r"token_weight: expected shape \(3,\).*\(2,\)"),
    ("token_weight", None, TypeError, r"token_weight: expected a tensor, got NoneType"),
    ("old_logp", zeros(2), ValueError, r"old_logp: expected shape \(3,\).*\(2,\)"),
    ("old_logp", [0.0] * N, TypeError, r"old_logp: expected a tensor, got list"),
    ("old_logp", zeros(N).requires_grad_(), ValueError, r"old_logp: .*without gradient.*detach"),
    ("ref_logp", zeros(N, V), ValueError, r"ref_logp: expected shape \(3,\).*\(3, 11\)"),
    ("objective", {"clip_low": 0.2}, TypeError, r"objective: expected Objective, got dict"),
    ("objective", Objective(kl_coef=0.1), ValueError, r"ref_logp: .*kl_coef is 0\.1"),
    ("weighting", 0.5, TypeError, r"weighting: expected PolarityWeighting, got float"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), ROW_ERRORS)
def test_arguments_of_both_functions(name, value, error, message):
    arguments = good(**{name: value})
    with pytest.raises(error, match=message):
        policy_loss(**arguments)
    del arguments["advantages"], arguments["token_weight"]
    with pytest.raises(error, match=message):
        token_stats(**arguments)


@pytest.mark.parametrize(("name", "value", "error", "message"), LOSS_ERRORS)
def test_arguments_of_the_loss(name, value, error, message):
    with pytest.raises(error, match=message):
        policy_loss(**good(**{name: value}))


def test_hidden_states_passed_as_logits():
    """[B, T, D] with targets of another length says which shapes disagree."""
    hidden, targets = torch.zeros(2, 6, 8), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"targets: expected shape \(2, 6\).*\(2, 6, 8\).*\(2, 5\)"
    ):
        token_stats(hidden, targets)
    with pytest.raises(ValueError, match=r"targets: expected values in \[0, 8\).*got 4000"):
        token_stats(hidden[:, :5], targets + 4000)


@pytest.mark.parametrize("bad", [-1, -2, -99, -101, V, V + 1, 2**40, -(2**40)])
def test_targets_out_of_range(bad, backend, device):
    """On a CPU an error with value and position. On a GPU, where the check would cost a sync, a
    NaN row. Nothing is read or written outside the row either way."""
    targets = torch.tensor([2, bad, 3], device=device)
    logits = torch.zeros(N, V, device=device).requires_grad_()
    calls = [
        lambda z: token_stats(z, targets, compute=Compute(backend)),
        lambda z: policy_loss(**good(device, logits=z, targets=targets), compute=Compute(backend)),
        lambda z: policy_loss(
            **good(device, logits=z, targets=targets), compute=Compute(backend, inplace=True)
        ),
    ]
    message = rf"targets: expected values in \[0, 11\) or -100.*got {bad} at flat position 1"
    for call in calls:
        z = logits.mul(1.0)
        if device == "cpu":
            with pytest.raises(ValueError, match=message):
                call(z)
            assert z.eq(0).all()
        else:
            out = call(z)
            assert out.logp.isnan().tolist() == [False, True, False]
    if device == "cpu":
        with pytest.raises(ValueError, match=r"targets: expected values in \[0, 5\).*got 7"):
            token_stats(
                Logits(logits, vocab_size=5), torch.tensor([0, 7, 1]), compute=Compute(backend)
            )


def test_tensors_on_different_devices():
    logits = torch.zeros(N, V, device="meta")
    with pytest.raises(ValueError, match=r"targets: expected a tensor on meta .*got cpu"):
        token_stats(logits, torch.zeros(N, dtype=torch.int64))
    for name in ("advantages", "token_weight", "old_logp", "ref_logp"):
        with pytest.raises(ValueError, match=rf"{name}: expected a tensor on cpu .*got meta"):
            policy_loss(**good(**{name: torch.zeros(N, device="meta")}))
    weighting = PolarityWeighting(0.5, torch.zeros((), device="meta"))
    with pytest.raises(ValueError, match=r"weighting\.phase: expected a tensor on cpu .*got meta"):
        policy_loss(**good(weighting=weighting))


# kind: how a tensor becomes of it, and what the error says of it.
KINDS = {
    "sparse": (lambda x: x.to_sparse(), r"got one of layout sparse_coo; pass its to_dense\(\)"),
    "rows": (lambda x: x[:, None].to_sparse_csr(), r"got one of layout sparse_csr"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged),
        r"got a nested tensor; pass its \.values\(\)",
    ),
    "nested": (
        lambda x: torch.nested.nested_tensor([x[:1], x[1:]]),
        r"got a nested tensor; pass its \.val",
    ),
    "mkldnn": (lambda x: x.float().to_mkldnn(), r"got one of layout mkldnn"),
    "spread": (
        lambda x: x.as_subclass(DTensor),
        r"got a DTensor; pass its full_tensor\(\), or for a Head\(group=\.\.\.\) its to_local\(\)",
    ),
}


class DTensor(torch.Tensor):
    """What tells torch.distributed's from an ordinary tensor."""

    def full_tensor(self): ...


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_other_kinds(kind):
    make, got = KINDS[kind]
    for name, value in good().items():
        with pytest.raises(TypeError, match=rf"{name}: expected an ordinary tensor, {got}"):
            policy_loss(**good(**{name: make(value)}))


def test_tensors_without_values():
    one = good("meta")
    with pytest.raises(ValueError, match=r"logits: expected a tensor with values, got .* meta"):
        policy_loss(**one)
    with pytest.raises(ValueError, match=r"hidden: expected a tensor with values, got .* meta"):
        policy_loss(**{**one, "logits": Head(one["logits"].T)(torch.zeros(N, N, device="meta"))})


def negated(x):
    """`x` in other words: memory that holds -x, read with its sign changed."""
    return torch._neg_view(-x)


def test_tensors_that_are_read_with_another_sign(backend, device):
    """The kernels read memory, not what torch makes of it."""
    logits = torch.linspace(-2.0, 3.0, N * V, device=device).view(N, V)
    values = torch.tensor([0.5, -1.0, 2.0], device=device)
    given = {"advantages": values, "token_weight": values, "old_logp": values - 3.0}
    given["targets"] = torch.arange(N, device=device)
    compute, results = Compute(backend), []
    for change in (lambda x: x, negated):
        inputs = {name: change(x) for name, x in given.items()}
        inputs["weighting"] = PolarityWeighting(0.5, change(torch.tensor(0.5, device=device)))
        leaf = logits.clone().requires_grad_()
        head = Head(change(leaf.T.contiguous()))(change(torch.eye(N, device=device)))
        # Beside ordinary logits too: those with another sign make the call a torch operation, in
        # which torch itself reads all of them.
        out = [policy_loss(x, **inputs, compute=compute) for x in (leaf, change(leaf), head)]
        stats = token_stats(change(leaf), inputs["targets"], compute=compute)
        total = change(out[0].loss) + out[1].loss + out[2].loss + change(stats.entropy).sum()
        grads = torch.autograd.grad(total, leaf)
        results.append((*out[0], *out[1], *out[2], *stats, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


PARAM_ERRORS = [
    ({"clip_low": -0.1}, ValueError, r"clip_low: .*-0\.1"),
    ({"clip_low": 1.5}, ValueError, r"clip_low: .*\[0, 1\].*1\.5"),
    ({"clip_low": "0.2"}, TypeError, r"clip_low: expected a number, got str '0\.2'"),
    ({"clip_high": -0.1}, ValueError, r"clip_high: .*-0\.1"),
    ({"clip_high": math.nan}, ValueError, r"clip_high: .*nan"),
    ({"dual_clip": 1.0}, ValueError, r"dual_clip: .*> 1, got 1\.0"),
    ({"dual_clip": math.inf}, ValueError, r"dual_clip: .*inf"),
    ({"kl_coef": -1.0}, ValueError, r"kl_coef: .*>= 0, got -1\.0"),
    ({"kl_coef": math.nan}, ValueError, r"kl_coef: .*nan"),
    ({"kl_coef": True}, TypeError, r"kl_coef: expected a number, got bool"),
    ({"entropy_coef": math.inf}, ValueError, r"entropy_coef: .*inf"),
    ({"beta": 0.1}, TypeError, r"beta"),
]
WEIGHTING_ERRORS = [
    ({"strength": 1.0}, ValueError, r"strength: expected a number in \[0, 1\), got 1\.0"),
    ({"strength": -0.1}, ValueError, r"strength: .*-0\.1"),
    ({"strength": math.nan}, ValueError, r"strength: .*nan"),
    ({"strength": None}, TypeError, r"strength: expected a number, got NoneType"),
    ({"phase": 1.01}, ValueError, r"phase: .*\[-1, 1\].*1\.01"),
    ({"phase": math.nan}, ValueError, r"phase: .*nan"),
    ({"phase": torch.zeros(1)}, ValueError, r"phase: .*0-dim tensor, got shape \(1,\)"),
    ({"phase": torch.zeros((), dtype=torch.int64)}, TypeError, r"phase: .*torch\.int64"),
    ({"shape": "relu"}, ValueError, r"shape: expected one of .*'relu'"),
    ({"sigma": 0.0}, ValueError, r"sigma: .*> 0, got 0\.0"),
    ({"scale": -1.0}, ValueError, r"scale: .*> 0, got -1\.0"),
    ({"scale": math.inf}, ValueError, r"scale: .*inf"),
    ({"dead_zone": -1e-9}, ValueError, r"dead_zone: .*>= 0"),
]


@pytest.mark.parametrize(("options", "error", "message"), PARAM_ERRORS)
def test_objective(options, error, message):
    with pytest.raises(error, match=message):
        Objective(**options)


@pytest.mark.parametrize(("options", "error", "message"), WEIGHTING_ERRORS)
def test_polarity_weighting(options, error, message):
    with pytest.raises(error, match=message):
        PolarityWeighting(**{"strength": 0.5, "phase": 0.5, **options})


def test_bounds_are_inclusive_where_they_say_so():
    Objective(clip_low=1.0, clip_high=math.inf, kl_coef=0, entropy_coef=-1)
    Objective(clip_low=0, clip_high=0)
    PolarityWeighting(0, -1, dead_zone=0)
    PolarityWeighting(0.999, 1)


def test_dataclasses_are_frozen():
    with pytest.raises(AttributeError):
        Objective().clip_low = 0.1
    with pytest.raises(AttributeError):
        PolarityWeighting(0.5, 0.5).strength = 0.1


def test_public_names():
    names = {"Objective", "PolarityWeighting", "PolicyLossOutput", "TokenStats"}
    assert names | {"policy_loss", "token_stats"} <= set(papo_kernels.__all__)
    assert papo_kernels.TokenStats._fields == ("logp", "entropy", "unit_polarity", "lse")
    assert papo_kernels.PolicyLossOutput._fields == (
        "loss",
        "logp",
        "entropy",
        "unit_polarity",
        "polarity",
        "weight",
        "ratio",
        "clip_side",
    )
