"""Every wrong argument of a head and of its calls: which, its value, what was expected."""

from __future__ import annotations

import pytest
import torch

from papo_kernels import Compute, Head, KeepSet, LoRA, policy_loss, token_stats

N, D, V = 4, 6, 9
HIDDEN, WEIGHT = torch.randn(N, D), torch.randn(V, D)
TARGETS, ONES = torch.tensor([0, 3, -100, 8]), torch.ones(N)
LORA = LoRA(torch.randn(2, D), torch.randn(V, 2))
KEEP = KeepSet(torch.tensor([0, 1, 2, 2, 3]), torch.tensor([0, 3, 8]))

# What a `Head` refuses when it is made,
OF_HEAD = {
    "weight_kind": ({"weight": None}, TypeError, "weight: expected Tensor, got NoneType"),
    "softcap": (
        {"softcap": -1.0},
        ValueError,
        "softcap: expected None or a number .*, got -1.0",
    ),
    "logit_scale": ({"logit_scale": 0.0}, ValueError, "logit_scale: expected None or .* got 0.0"),
    "vocab_size_kind": ({"vocab_size": 3.0}, TypeError, "vocab_size: expected an int or None"),
    "lora_kind": ({"lora": tuple(LORA)}, TypeError, "lora: expected LoRA, got tuple"),
    "lora_scaling": (
        {"lora": LORA._replace(scaling=None)},
        TypeError,
        "lora.scaling: expected a number",
    ),
    "lora_infinite": (
        {"lora": LORA._replace(scaling=1e999)},
        ValueError,
        "lora.scaling: .* finite",
    ),
    "softcap_kind": ({"softcap": True}, TypeError, "softcap: expected None or .* got bool True"),
    "softcap_nan": ({"softcap": float("nan")}, ValueError, "softcap: expected None or .* got nan"),
    "logit_scale_infinite": ({"logit_scale": 1e999}, ValueError, "logit_scale: .* got inf"),
    "logit_scale_small": (
        {"logit_scale": 1e-320},
        ValueError,
        r"logit_scale: expected None or a number in \[1e-18, 1e\+18\], got 1e-320",
    ),
    "logit_scale_kind": ({"logit_scale": "1"}, TypeError, "logit_scale: .* got str '1'"),
    "vocab_size_bool": (
        {"vocab_size": True},
        TypeError,
        "vocab_size: expected an int or None, got b",
    ),
    "group_name": ({"group": "x"}, ValueError, "group: expected 'world', a process group or None"),
    "group_kind": ({"group": [0, 1]}, TypeError, "group: expected .* or None, got list"),
    "shards_value": (
        {"group": "world", "shards": (9, -9)},
        ValueError,
        "shards: .* >= 0, got .9, -9",
    ),
    "shards_kind": ({"group": "world", "shards": 9}, TypeError, "shards: expected Sequence"),
    "bias_kind": ({"bias": 0.0}, TypeError, "bias: expected Tensor, got float"),
    "lora_a_kind": (
        {"lora": LORA._replace(a=None)},
        TypeError,
        "lora.a: expected Tensor, got NoneT",
    ),
    "lora_b_kind": ({"lora": LORA._replace(b=2)}, TypeError, "lora.b: expected Tensor, got int"),
    "shards": (
        {"shards": [9]},
        ValueError,
        "group: expected the process group that shards .* None",
    ),
}
# what a `Compute` does,
OF_COMPUTE = {
    "chunk_bytes": ({"chunk_bytes": 0}, ValueError, "chunk_bytes: expected at least 1, got 0"),
    "chunk_bytes_kind": ({"chunk_bytes": 1e6}, TypeError, "chunk_bytes: expected an int or None"),
    "chunk_bytes_bool": ({"chunk_bytes": True}, TypeError, "chunk_bytes: .* or None, got bool"),
    "chunk_bytes_negative": ({"chunk_bytes": -5}, ValueError, "expected at least 1, got -5"),
    "backend_kind": ({"backend": 3}, TypeError, "backend: expected str, got int"),
    "logits_dtype_kind": ({"logits_dtype": "bf16"}, TypeError, "logits_dtype: expected dtype"),
    "inplace_kind": ({"inplace": "no"}, TypeError, "inplace: expected bool, got str"),
}
# and what only a call can know.
OF_CALL = {
    "hidden_dtype": (
        {"hidden": HIDDEN.long()},
        TypeError,
        "hidden: expected float16, .*, got torch.int64",
    ),
    "hidden_kind": ({"hidden": [1.0]}, TypeError, "hidden: expected Tensor, got list"),
    "hidden_width": (
        {"hidden": torch.randn(N, D + 1)},
        ValueError,
        r"hidden: expected shape \[\.\.\., 6\], as weight is \(9, 6\), got \(4, 7\)$",
    ),
    "weight_dtype": (
        {"weight": WEIGHT.bfloat16()},
        TypeError,
        "weight: expected torch.float32 like hidden, got torch.bfloat16; cast .*autocast",
    ),
    "weight_dims": (
        {"weight": WEIGHT[0]},
        ValueError,
        r"weight: expected shape \[V, D\], got \(6,\)",
    ),
    "weight_empty": ({"weight": WEIGHT[:0]}, ValueError, r"V >= 1, got shape \(0, 6\): zero elem"),
    "weight_device": (
        {"weight": WEIGHT.to("meta")},
        ValueError,
        "weight: expected a tensor on cpu like hidden, got meta",
    ),
    "targets_shape": (
        {"targets": TARGETS[:3]},
        ValueError,
        r"targets: expected shape \(4,\), that of hidden \(4, 6\) without its .* got \(3,\)",
    ),
    "targets_dtype": (
        {"targets": TARGETS.int()},
        TypeError,
        "targets: expected int64, got torch.int32",
    ),
    "targets_value": (
        {"targets": torch.tensor([0, 9, 1, 1])},
        ValueError,
        r"targets: expected values in \[0, 9\) or -100 \(ignored\), got 9 at flat position 1",
    ),
    "targets_elsewhere": (
        {"targets": torch.tensor([0, -1, 1, 1])},
        ValueError,
        "got -1 at flat pos",
    ),
    "temperature": (
        {"temperature": 0.0},
        ValueError,
        "temperature: expected a number .*, got 0.0",
    ),
    "vocab_size": (
        {"vocab_size": 10},
        ValueError,
        r"vocab_size: .* \[1, 9\] \(rows of weight\), got 10",
    ),
    "backend": ({"backend": "tpu"}, ValueError, "backend: expected one of .*'tpu'"),
    "logits_dtype": (
        {"logits_dtype": torch.float16},
        TypeError,
        "logits_dtype: expected None, torch.float32, that of hidden, got torch.float16",
    ),
    "bias_shape": (
        {"bias": torch.zeros(8)},
        ValueError,
        r"bias: expected shape \(9,\), .* got \(8,\)",
    ),
    "bias_dtype": (
        {"bias": torch.zeros(9).half()},
        TypeError,
        "bias: expected torch.float32 like weight",
    ),
    "lora_a": (
        {"lora": LORA._replace(a=torch.randn(2, 5))},
        ValueError,
        r"lora.a: expected shape \(2, 6\), as weight is \(9, 6\), got \(2, 5\)",
    ),
    "lora_rank": (
        {"lora": LORA._replace(a=LORA.a[:0])},
        ValueError,
        r"lora.a: .* r >= 1, got \(0, 6\)",
    ),
    "lora_b": (
        {"lora": LORA._replace(b=LORA.b.t())},
        ValueError,
        r"lora.b: expected shape \(9, 2\)",
    ),
    "lora_dtype": (
        {"lora": LORA._replace(b=LORA.b.half())},
        TypeError,
        "lora.b: expected torch.float32",
    ),
    "keep_kind": ({"keep": tuple(KEEP)}, TypeError, "keep: expected KeepSet, got tuple"),
    "keep_dtype": (
        {"keep": KEEP._replace(ids=KEEP.ids.int())},
        TypeError,
        "keep.ids: expected int64",
    ),
    "keep_dims": (
        {"keep": KEEP._replace(ids=KEEP.ids[None])},
        ValueError,
        "keep.ids: expected one dim",
    ),
    "keep_offsets": (
        {"keep": KEEP._replace(offsets=KEEP.offsets[:4])},
        ValueError,
        "keep.offsets: expected 5 values, one more than there are targets, got 4",
    ),
    "keep_end": (
        {"keep": KEEP._replace(ids=KEEP.ids[:2])},
        ValueError,
        r"keep.offsets: expected nondecreasing values from 0 to 2 .*, got 0 to 3",
    ),
    "keep_decrease": (
        {"keep": KEEP._replace(offsets=torch.tensor([0, 2, 1, 2, 3]))},
        ValueError,
        "got 0 to 3 with a decrease",
    ),
    "compute_kind": ({"compute": "cpu"}, TypeError, "compute: expected Compute, got str"),
}


@pytest.mark.parametrize("name", OF_HEAD)
def test_a_head_refuses_its_options_when_it_is_made(name):
    wrong, kind, message = OF_HEAD[name]
    with pytest.raises(kind, match=message):
        Head(**{"weight": WEIGHT, **wrong})


def test_a_rank_outside_of_the_group_may_make_the_head():
    """It is the call that only members make."""
    outside = torch.distributed.GroupMember.NON_GROUP_MEMBER
    assert Head(WEIGHT, group=outside).group is outside


@pytest.mark.parametrize("name", OF_COMPUTE)
def test_compute_refuses_its_options_when_it_is_made(name):
    wrong, kind, message = OF_COMPUTE[name]
    with pytest.raises(kind, match=message):
        Compute(**wrong)


def arguments_of(wrong):
    """The first two positional and the named arguments of a call that differs from a good one in
    `wrong`."""
    given = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **wrong}
    hidden, targets, keep = given.pop("hidden"), given.pop("targets"), given.pop("keep", None)
    named = {name: given.pop(name) for name in ("temperature", "compute") if name in given}
    compute = {name: given.pop(name) for name in ("backend", "logits_dtype") if name in given}
    return (Head(**given)(hidden, keep=keep), targets), {"compute": Compute(**compute), **named}


@pytest.mark.parametrize("name", OF_CALL)
def test_wrong_arguments(name):
    """In both functions, and before anything runs."""
    wrong, kind, message = OF_CALL[name]
    first, named = arguments_of(wrong)
    with pytest.raises(kind, match=message):
        token_stats(*first, **named)
    with pytest.raises(kind, match=message):
        policy_loss(*first, ONES, ONES, **named)


def test_logits_passed_as_hidden():
    """unsloth-zoo #708, unsloth #5121: a shape error that says what the tensor looks like."""
    logits = torch.randn(N, V)
    with pytest.raises(
        ValueError, match=r"got \(4, 9\); these look like logits, which token_stats"
    ):
        token_stats(Head(WEIGHT)(logits), TARGETS)


def test_wrong_token_inputs():
    """Those of the loss, whose message names what the loss is differentiable in."""
    logits = Head(WEIGHT)(HIDDEN)
    with pytest.raises(
        ValueError, match=r"advantages: .* hidden states, weight, bias and lora only"
    ):
        policy_loss(logits, TARGETS, ONES.clone().requires_grad_(), ONES)
    with pytest.raises(ValueError, match=r"token_weight: expected shape \(4,\) like targets"):
        policy_loss(logits, TARGETS, ONES, ONES[:2])


def test_good_arguments_pass():
    """The arguments that the wrong ones are made of."""
    head = Head(WEIGHT, bias=torch.zeros(V), lora=LORA, vocab_size=V, softcap=9.0, logit_scale=0.5)
    stats = token_stats(head(HIDDEN, keep=KEEP), TARGETS, compute=Compute(chunk_bytes=1))
    assert stats.logp[:2].isfinite().all()
