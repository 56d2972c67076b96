"""softmax(q kᵀ) v for given queries, keys and values: one contract, one function per path.

Every path takes

    attend(q [..., N, T, H], k [..., K, S, H], v [..., K, S, Hv], *, mask, bias, queries, keys, scale,
           dropout_rate, dropout_key, capture) -> (heads [..., N, T, Hv], {name: captured array})

and gives the same numbers as `dense`, which is the definition. This is the one place where a path is chosen; today the
dense path is the only one.
"""

from mhajax.kernels.dense import attend

__all__ = ["attend"]
