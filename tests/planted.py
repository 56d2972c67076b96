"""An attention whose heads have known parts: each writes into a channel of its own, but for the duplicates."""

import jax
import jax.numpy as jnp

from mhajax import attention

DUPLICATES, DEAD, HARMFUL, NEEDED = (0, 1), 2, 3, 4
PLANTED = attention.Config(d_model=4, num_heads=5, head_dim=2)
_CHANNELS = {0: 0, 1: 0, HARMFUL: 1, NEEDED: 2}


def planted(x):
    """Parameters, and what the attention should give for x: the outputs of all but the harmful head."""
    params = attention.init_params(jax.random.key(7), PLANTED)
    same = lambda w: w.at[1].set(w[0])  # noqa: E731
    w_o = jnp.zeros((5, 2, 4))
    for head, channel in _CHANNELS.items():
        w_o = w_o.at[head, :, channel].set(1.0 + jnp.arange(2))
    params = params._replace(w_q=same(params.w_q), w_k=same(params.w_k), w_v=same(params.w_v), w_o=w_o)
    return params, attention.apply(params, x, PLANTED, gates=jnp.ones(5).at[HARMFUL].set(0))
