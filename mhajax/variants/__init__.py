"""Attention that does one thing differently, each in a file of its own around `attention`, which knows none of them.

    qk_norm         queries and keys of unit mean square, before they are turned
    gated           the heads' outputs times a gate that the query's token opens, before w_o
    sinks           a learned logit for every head that takes part in the softmax and has no value
    differential    the difference of two softmaxes
    talking_heads   logits and weights mixed between heads (holds all T × S logits)
    sigmoid         every weight on its own, no softmax (holds all T × S logits)

Each has `Config` (that of attention), `Params`, `init_params(key, config)` and `apply(params, x, config, **options)`,
with the options of `attention.apply`. Parameters of one head are a slice of the leading axis of every array.

>>> import jax, jax.numpy as jnp
>>> from mhajax import masks
>>> config = gated.Config(d_model=16, num_heads=4)
>>> params = gated.init_params(jax.random.key(0), config)
>>> gated.apply(params, jnp.ones((2, 5, 16)), config, mask=masks.causal()).shape
(2, 5, 16)
"""

from mhajax.variants import differential, gated, qk_norm, sigmoid, sinks, talking_heads

__all__ = ["differential", "gated", "qk_norm", "sigmoid", "sinks", "talking_heads"]
