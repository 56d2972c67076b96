"""Attention parameters of other libraries, to ours and back; only names and axes change, never a number.

    params, config = convert.from_linen(variables["params"]["attention"])
    y = mhajax.apply(params, x, config)
    variables["params"]["attention"] = convert.to_linen(params, config)

Nested dicts of arrays go in and come out, so none of the libraries is imported, and a file of weights is as good as a
module. Every function says how its library takes the parameters back.

    library                             weights of queries; of the output       has beside D and N
    linen MultiHeadDotProductAttention  [D, N, H]; [N, H, D]                    H
    nnx MultiHeadAttention              [D, N, H]; [N, H, D]                    H, K
    haiku MultiHeadAttention            [D, N·H]; [N·Hv, D]                     H, Hv
    equinox MultiheadAttention          [N·H, D]; [D, N·Hv]                     H, Hv
    torch MultiheadAttention            three of [D, D] in one; [D, D]          (H = D/N)

What a layer cannot hold, and what `attention.Params` cannot hold, is refused, not dropped. JAX arrays stay JAX arrays,
traced ones too: under `jax.vmap` the functions convert the parameters of a scanned stack of layers, under `jax.jit`
they cost a transposition. Everything else becomes a NumPy array of its own, which keeps its dtype. Gradients, and
whatever else has the shape of parameters, convert in the same way.
"""

from mhajax.convert.equinox import from_equinox, to_equinox
from mhajax.convert.flax import from_linen, from_nnx, to_linen, to_nnx
from mhajax.convert.haiku import from_haiku, to_haiku
from mhajax.convert.torch import from_torch, to_torch

__all__ = [
    "from_equinox",
    "from_haiku",
    "from_linen",
    "from_nnx",
    "from_torch",
    "to_equinox",
    "to_haiku",
    "to_linen",
    "to_nnx",
    "to_torch",
]
