"""Writes `objectives.json`: ``python tests/golden/generate.py > tests/golden/objectives.json``.

mpmath computes everything with 60 digits from the formulas of docs/method.md. A gradient is the
central difference of the loss by each logit, in which what the loss takes for constant keeps its
value; no formula of a derivative is used. mpmath comes with torch.
"""

from __future__ import annotations

import json
from typing import Any

from mpmath import exp, log, mp, mpf, tanh

mp.dps = 60
STEP = mpf(10) ** -20
EPS = mpf(10) ** -8  # of dppo's binary KL

# Seven tokens: rewarded and punished ones above, below and within the clip bounds, then an ignored
# one. All numbers are exact in bfloat16 or, where a loss takes float32, in that.
BATCH: dict[str, Any] = {
    "logits": [
        [0.5, -1.25, 0.75, 2.0, -0.5],
        [1.5, 0.25, -2.0, 0.125, 1.0],
        [-0.75, 2.5, None, 0.5, 0.0],
        [0.0, 1.75, -0.25, -1.5, 0.625],
        [3.0, -0.5, 1.25, 0.375, -2.5],
        [-1.0, 0.875, 1.125, -0.125, 2.25],
        [9.0, 0.0, None, -3.0, 0.5],
    ],
    "targets": [3, 1, 1, 4, 0, 2, -100],
    "advantages": [1.5, -0.75, -2.0, 1.0, 0.5, -1.25, 3.0],
    "old_logp": [-0.90625, -1.46875, -1.671875, -0.96875, -0.3125, -1.53125, -1.0],
    "ref_logp": [-1.25, -1.1875, -1.78125, -0.15625, -0.5, -1.296875, -1.0],
    "log_ratio": [0.40625, -0.46875, 1.375, -0.5, 0.0625, -0.0625, 0.25],
    "policy_weight": [0.25, 0.5, 0.125, 0.375, 0.75, 0.0, 1.0],
    "kl_weight": [0.5, 0.0, 0.25, 0.375, 0.125, 0.625, 1.0],
    "entropy_weight": [0.125, 0.25, 0.5, 0.0, 0.375, 0.25, 1.0],
    "temperatures": [0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 1.0],
    "sequences": [4, 4, 9, 9, 9, -1, 4],
    "upstream": [1.5, -0.5, 0.25, 2.0, 0.0, -1.0, 4.0],
    # Of logp, entropy, unit polarity and lse.
    "upstream_stats": [
        [1.0, -0.5, 0.25, 0.0, 2.0, -1.5, 1.0],
        [0.5, 1.0, 0.0, -1.0, 0.75, 1.25, 1.0],
        [-1.0, 2.0, 1.5, 0.5, 0.0, -0.25, 1.0],
        [0.25, -0.75, 1.0, 2.0, -1.25, 0.5, 1.0],
    ],
}
TERMS = {"kl_coef": 0.25, "entropy_coef": 0.0625}
# Name: options of `Objective`, then how the batch is used.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": ({"kl_estimator": "k1", **TERMS}, {}),
    "clip, bounds by sign": (
        {"clip_high": 0.5, "negative_clip": [0.5, 0.25], "kl_estimator": "k2", **TERMS},
        {"ratio": "given"},
    ),
    "clip, dual": ({"dual_clip": 2.5, "kl_estimator": "abs", **TERMS}, {"weights": 3}),
    "clip, log-ratio limit": ({"log_ratio_limit": 0.25, "kl_ratio": True, **TERMS}, {}),
    "clip, on-policy": ({"kl_estimator": "k1+", **TERMS}, {"ratio": "none"}),
    "clip, by polarity": ({"kl_ratio": True, "kl_estimator": "k3+", **TERMS}, {"shape": "sign"}),
    "cispo": ({"surrogate": "cispo", "kl_estimator": "abs+", **TERMS}, {"weights": 3}),
    "cispo, by polarity": (
        {"surrogate": "cispo", "negative_clip": [0.1, 0.4]},
        {"shape": "tanh", "temperature": "rows"},
    ),
    "sapo": ({"surrogate": "sapo", "kl_limit": 0.25, **TERMS}, {}),
    "sapo, temperatures": (
        {"surrogate": "sapo", "sapo_temperature": [2.0, 0.5]},
        {"shape": "sign", "ratio": "given"},
    ),
    "dppo_tv": ({"surrogate": "dppo_tv", "clip_low": 0.1, "clip_high": 0.1}, {"shape": "tanh"}),
    "dppo_tv, ratio cap": ({"surrogate": "dppo_tv", "ratio_cap": 2.0}, {"weights": 3}),
    "dppo_kl": (
        {"surrogate": "dppo_kl", "clip_low": 0.01, "clip_high": 0.05, **TERMS},
        {"weights": 3},
    ),
    "ce_gppo": (
        {"surrogate": "ce_gppo", "gppo_scale": [0.5, 0.25], "kl_estimator": "k3+", **TERMS},
        {"temperature": "rows", "softcap": 4.0},
    ),
    "a loss per token": ({"reduce": False, "kl_ratio": True, **TERMS}, {"weights": 3}),
    "gspo": (
        {"ratio_level": "sequence", "clip_low": 0.05, "clip_high": 0.5, **TERMS},
        {"ratio": "sequences", "weights": 3},
    ),
    "gspo, a gradient per token": (
        {"ratio_level": "sequence_token", "reduce": False, "kl_ratio": True, **TERMS},
        {"ratio": "sequences", "shape": "tanh"},
    ),
}
STATISTICS: dict[str, dict[str, Any]] = {
    "statistics": {"softcap": 4.0},
    "statistics, temperatures": {"temperature": "rows"},
}
DEFAULTS = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "surrogate": "clip",
    "ratio_level": "token",
    "sapo_temperature": [1.0, 1.05],
    "gppo_scale": [0.75, 1.0],
    "kl_estimator": "k3",
}
WEIGHTING = {"strength": 0.5, "phase": -0.75, "sigma": 0.5, "scale": 1.25}


class Constants(dict):
    """What keeps the value that it had first."""

    def __call__(self, key: Any, value: mpf) -> mpf:
        return self.setdefault(key, value)


def clamped(x: mpf, low: mpf, high: mpf) -> mpf:
    return max(low, min(high, x))


def bounded(x: mpf, limit: float | None) -> mpf:
    return x if limit is None else clamped(x, -mpf(limit), mpf(limit))


def statistics(row: list[Any], target: int, i: int, use: dict[str, Any]) -> list[mpf]:
    """logp, entropy, unit polarity and lse of the row."""
    of_rows = use.get("temperature") == "rows"
    temperature = mpf(BATCH["temperatures"][i]) if of_rows else mpf(0.8)
    cap = use.get("softcap")
    u = {v: cap * tanh(z / cap) if cap else z for v, z in enumerate(row) if z is not None}
    u = {v: x / temperature for v, x in u.items()}
    lse = log(sum(exp(x) for x in u.values()))
    p = {v: exp(x - lse) for v, x in u.items()}
    entropy = -sum(p[v] * log(p[v]) for v in p)
    c = sum(p[v] ** 2 * (log(p[v]) + entropy) for v in p)
    logp = u[target] - lse
    return [logp, entropy, c - p[target] * (logp + entropy), lse]


def log_ratios(logps: dict[int, mpf], o: dict[str, Any], use: dict[str, Any], sg: Constants):
    """Of every live token."""
    given, own = use.get("ratio", "old_logp"), {}
    for i, logp in logps.items():
        moving = logp - sg(("logp", i), logp)
        if given == "none":
            own[i] = moving
        elif given == "given":
            own[i] = BATCH["log_ratio"][i] + moving
        else:
            own[i] = logp - mpf(BATCH["old_logp"][i])
        own[i] = bounded(own[i], o.get("log_ratio_limit"))
    if given != "sequences":
        return own
    ids, result = BATCH["sequences"], {}
    for i in logps:
        members = [j for j in logps if ids[j] == ids[i]]
        mean = sum(own[j] for j in members) / len(members)
        if o["ratio_level"] == "sequence_token":
            mean = sg(("mean", i), mean) + logps[i] - sg(("logp", i), logps[i])
        result[i] = mpf(0) if ids[i] < 0 else mean
    return result


def surrogate(i: int, A: mpf, logp: mpf, r: mpf, o: dict[str, Any], sg: Constants):
    """The policy term and the bound that acted: low 1, high 2, dual 3."""
    name = o["surrogate"]
    bounds = [o["clip_low"], o["clip_high"]]
    low, high = (mpf(x) for x in (bounds if A > 0 else o.get("negative_clip", bounds)))
    lo, hi = 1 - low, 1 + high
    if name == "sapo":
        t = mpf(o["sapo_temperature"][0 if A > 0 else 1])
        return -4 / t / (1 + exp(-t * (r - 1))) * A, 0
    if name.startswith("dppo"):
        p, old = exp(logp), exp(mpf(BATCH["old_logp"][i]))
        rest = (1 - old) * log((1 - old + EPS) / (1 - p + EPS))
        far = abs(p - old) if name == "dppo_tv" else old * log(old / p) + rest
        if A > 0 and p > old and far > high:
            return mpf(0), 2
        if A <= 0 and p < old and far > low:
            return mpf(0), 1
        return -sg(("kept", i), min(r, mpf(o.get("ratio_cap", "inf")))) * A * logp, 0
    if name == "cispo":
        return -sg(("kept", i), clamped(r, lo, hi)) * A * logp, 1 if r < lo else 2 * (r > hi)
    side = 1 if r < lo and A < 0 else 2 if r > hi and A > 0 else 0
    if name == "ce_gppo":
        scale = (1, o["gppo_scale"][0] * lo, o["gppo_scale"][1] * hi)[side]
        return -scale * A * (r / sg(("r", i), r) if side else r), side
    loss = -min(r * A, clamped(r, lo, hi) * A)
    if A < 0 and "dual_clip" in o and r > o["dual_clip"]:
        return -o["dual_clip"] * A, 3
    return loss, side


def kl_estimate(i: int, logp: mpf, o: dict[str, Any], sg: Constants) -> mpf:
    x, name = logp - mpf(BATCH["ref_logp"][i]), o["kl_estimator"]
    values = {"k1": x, "k2": x**2 / 2, "k3": exp(-x) + x - 1, "abs": abs(x)}
    value = bounded(values[name.rstrip("+")], o.get("kl_limit"))
    if not name.endswith("+"):
        return value
    return sg(("kl", i), value) + values["k2"] - sg(("k2", i), values["k2"])


def weight_of(polarity: mpf, shape: str | None) -> mpf:
    if shape is None:
        return mpf(1)
    h = tanh(polarity / WEIGHTING["sigma"]) if shape == "tanh" else mpf(1 if polarity > 0 else -1)
    return WEIGHTING["scale"] * (1 + mpf(WEIGHTING["strength"]) * WEIGHTING["phase"] * h)


def tokens_of(rows: list[Any], o: dict[str, Any], use: dict[str, Any], sg: Constants):
    """Each live token's loss, ratio, polarity, weight and bound that acted."""
    live = [i for i, target in enumerate(BATCH["targets"]) if target >= 0]
    stats = {i: statistics(rows[i], BATCH["targets"][i], i, use) for i in live}
    logs = log_ratios({i: stats[i][0] for i in live}, o, use, sg)
    names = ("policy_weight", "kl_weight", "entropy_weight")
    found = {}
    for i in live:
        logp, entropy, c, _ = stats[i]
        own = [mpf(BATCH[name if "weights" in use else names[0]][i]) for name in names]
        r, A = exp(logs[i]), mpf(BATCH["advantages"][i])
        polarity = sg(("polarity", i), r * A * c)
        weight = weight_of(polarity, use.get("shape"))
        term, side = surrogate(i, weight * A, logp, r, o, sg)
        kl = kl_estimate(i, logp, o, sg) * (r if o.get("kl_ratio") else 1)
        loss = own[0] * term + own[1] * mpf(o.get("kl_coef", 0)) * kl
        loss -= own[2] * mpf(o.get("entropy_coef", 0)) * entropy
        if any(own):
            found[i] = (loss, r, polarity, weight, mpf(side))
    return found


def gradient(total: Any) -> list[list[float]]:
    """Of `total(rows)` by the logits."""
    rows = [[None if z is None else mpf(z) for z in row] for row in BATCH["logits"]]
    total(rows)  # fixes the constants
    result = []
    for row in rows:
        result.append([])
        for v, z in enumerate(row):
            ends = []
            for h in (STEP, -STEP) if z is not None else ():
                row[v] = z + h
                ends.append(total(rows))
            row[v] = z
            result[-1].append(float((ends[0] - ends[1]) / (2 * STEP)) if ends else 0.0)
    return result


def spread(values: dict[int, Any]) -> list[float]:
    """Over the batch, 0 where left out."""
    return [float(values.get(i, 0)) for i in range(len(BATCH["targets"]))]


def loss_case(name: str) -> dict[str, Any]:
    objective, use = CASES[name]
    o, sg = {**DEFAULTS, **objective}, Constants()
    upstream = [1.0] * 7 if o.get("reduce", True) else BATCH["upstream"]
    grad = gradient(
        lambda rows: sum(upstream[i] * x[0] for i, x in tokens_of(rows, o, use, sg).items())
    )
    rows = [[None if z is None else mpf(z) for z in row] for row in BATCH["logits"]]
    fields = ("loss", "ratio", "polarity", "weight", "clip_side")
    found = tokens_of(rows, o, use, sg)
    expected = {f: spread({i: x[k] for i, x in found.items()}) for k, f in enumerate(fields)}
    return {"name": name, "objective": objective, **use, "expected": {**expected, "grad": grad}}


def statistics_case(name: str) -> dict[str, Any]:
    use = STATISTICS[name]
    live = [i for i, target in enumerate(BATCH["targets"]) if target >= 0]

    def total(rows: list[Any]) -> mpf:
        stats = {i: statistics(rows[i], BATCH["targets"][i], i, use) for i in live}
        return sum(BATCH["upstream_stats"][k][i] * stats[i][k] for i in live for k in range(4))

    rows = [[None if z is None else mpf(z) for z in row] for row in BATCH["logits"]]
    stats = {i: statistics(rows[i], BATCH["targets"][i], i, use) for i in live}
    fields = ("logp", "entropy", "unit_polarity", "lse")
    expected = {f: spread({i: x[k] for i, x in stats.items()}) for k, f in enumerate(fields)}
    return {"name": name, **use, "expected": {**expected, "grad": gradient(total)}}


if __name__ == "__main__":
    result = {
        "batch": BATCH,
        "temperature": 0.8,
        "weighting": WEIGHTING,
        "losses": [loss_case(name) for name in CASES],
        "statistics": [statistics_case(name) for name in STATISTICS],
    }
    print(json.dumps(result, indent=1))
