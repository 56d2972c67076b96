"""What the kernels must give: loops over examples, heads and queries, in float64 NumPy, with their gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
from parity_features import Case

from mhajax import dropout


def loops(case: Case, q: Any, k: Any, v: Any, extras: dict, d_out: Any, d_log_sums: Any) -> list[np.ndarray]:
    """Heads, log-sum-exp, and the gradients of q, k, v and the extras for these cotangents, in NumPy and float64.

    What a bias or a score function makes of the products is differentiated by central differences.
    """
    b, n, group, t, s, h, hv = case.sizes._replace(k=case.sizes.n // case.sizes.k)
    q, k, v, d_out, d_log_sums = (np.asarray(a, np.float64) for a in (q, k, v, d_out, d_log_sums))
    extras = {name: np.asarray(a, np.float64) for name, a in extras.items()}
    gates = extras.get("gates", np.ones(n))
    raw = np.zeros((b, n, t, s))
    for i, j, row in np.ndindex(b, n, t):
        raw[i, j, row] = k[i, j // group] @ q[i, j, row] * h**-0.5
    logits = raw if case.logits is None else case.logits(raw, extras) + np.zeros(raw.shape)
    allowed = np.broadcast_to(case.allowed, raw.shape) & (logits > -np.inf)
    factor = np.ones(raw.shape)
    if case.dropped:
        kept = dropout.keep(case.dropped["dropout_key"], case.dropped["dropout_rate"], raw.shape)
        factor = np.asarray(kept) / (1 - case.dropped["dropout_rate"])

    out, log_sums, d_logits = np.zeros((b, n, t, hv)), np.full((b, n, t), -np.inf), np.zeros(raw.shape)
    d_q, d_k, d_v = (np.zeros(a.shape) for a in (q, k, v))
    d_extras = {name: np.zeros(a.shape) for name, a in extras.items()}
    for i, j, row in np.ndindex(b, n, t):
        seen = allowed[i, j, row]
        if not seen.any():  # a query with nothing to attend to gives zeros
            continue
        x, values, cotangent = logits[i, j, row, seen], v[i, j // group, seen], d_out[i, j, row] * gates[j]
        sink = extras["sinks"][j] if "sinks" in extras else -np.inf
        log_sum = x.max() + np.log(np.sum(np.exp(x - x.max())))
        whole = np.logaddexp(log_sum, sink)
        weights, share = np.exp(x - whole), factor[i, j, row, seen]
        head = (weights * share) @ values
        out[i, j, row], log_sums[i, j, row] = head * gates[j], log_sum
        d_weights = values @ cotangent * share
        owed = weights @ d_weights
        d_logits[i, j, row, seen] = weights * (d_weights - owed) + np.exp(x - log_sum) * d_log_sums[i, j, row]
        d_v[i, j // group, seen] += np.outer(weights * share, cotangent)
        if "sinks" in extras:
            d_extras["sinks"][j] -= np.exp(sink - whole) * owed
        if "gates" in extras:
            d_extras["gates"][j] += head @ d_out[i, j, row]

    def slope(up: Any, down: Any) -> Any:
        with np.errstate(invalid="ignore"):  # -inf - -inf, which nobody may see
            return np.where(allowed, (up - down) / (2 * step), 0)

    step, d_raw = 1e-5, d_logits
    if case.logits is not None:
        d_raw = d_logits * slope(case.logits(raw + step, extras), case.logits(raw - step, extras))
        for name in set(extras) - {"sinks", "gates"}:
            for place in np.ndindex(extras[name].shape):
                moved = np.zeros(extras[name].shape)
                moved[place] = step
                up, down = (case.logits(raw, extras | {name: extras[name] + d}) for d in (moved, -moved))
                d_extras[name][place] = np.sum(d_logits * slope(up, down))
    for i, j, row in np.ndindex(b, n, t):
        d_q[i, j, row] = d_raw[i, j, row] @ k[i, j // group] * h**-0.5
        d_k[i, j // group] += np.outer(d_raw[i, j, row], q[i, j, row]) * h**-0.5
    return [out, log_sums, d_q, d_k, d_v, *(d_extras[name] for name in sorted(d_extras))]
