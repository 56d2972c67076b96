"""softmax(q kᵀ) v for given queries, keys and values: one contract, one function per path.

`attend` is the contract. `dense` is the definition and holds every logit; `blockwise` gives the same numbers in memory
that grows with T; `cudnn` and `splash` call what a platform has. `choice` is the one place where a path is picked, by
the numbers of `rules`, which `bench tune` measures on a machine; `explain` prints what it picks and why. `rows` is for
who looks at weights or changes them. `ring` is for a sequence that is cut over devices, and is called by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax.interventions import Capture, Patch, as_capture
from mhajax.kernels import blockwise, cudnn, dense, devices, rows, rules, splash
from mhajax.kernels.choice import NAMES, Choice, Request, choose, spread
from mhajax.kernels.grid import Tiling
from mhajax.kernels.pairs import hoist
from mhajax.masks import Mask, Tokens

__all__ = ["CAPTURES", "NAMES", "Choice", "Tiling", "attend", "explain", "rules"]

CAPTURES = ("logits", "weights", "log_sum_exp", "entropy", "column_sums")


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    queries: Tokens,
    keys: Tokens,
    mask: Mask | None = None,
    bias: Array | None = None,
    score: Callable[[Any, Any, Any, Any], Any] | None = None,
    scale: float | Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    capture: Sequence[str] | Capture = (),
    kernel: str = "auto",
    cached: bool = False,
    logits: Patch | None = None,
    weights: Patch | None = None,
    real: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Scaled dot-product attention of every head, softmax(score(scale · q kᵀ) + bias, mask) v.

    Logits, softmax and sums are float32 (float64 for float64 input), whatever the dtype of q, k and v. A query with
    nothing to attend to gives zeros. With a mask or a bias, keys and values that are not finite harm only the queries
    that may see them: those get NaN, and pass no gradient to q, k, v and the rest, whatever their cotangent. Numbers of
    q and k of 2⁵⁵ and more, whose products overflow in float32, then count as not finite.

    Args:
      q: queries [..., N, T, H].
      k: keys [..., K, S, H]; query head n uses key head n // (N/K).
      v: values [..., K, S, Hv].
      queries: indices and positions of the T queries.
      keys: indices and positions of the S keys.
      mask: who may attend to whom; None is everybody to everybody.
      bias: added to the logits, broadcasts to [..., N, T, S]; -inf masks.
      score: function (score, head, q_position, k_position) → score of one scaled product, before bias and mask; what it
        closes over has gradients. -inf hides the pair, of a whole row too; but only a mask or a bias keeps a key that
        is not finite away. `mhajax.scores` has the known ones.
      scale: factor of the products, 1/√H if None; or an array that broadcasts to [..., N, T, 1], say [N, 1, 1] for one
        of every head, which has a gradient: the queries are multiplied by it.
      dropout_rate: share of the weights that is dropped.
      dropout_key: PRNG key; None is no dropout. Every path drops the same weights.
      capture: any of "logits" (after score and bias, -inf where masked) and "weights" (before dropout), [..., N, T, S],
        "log_sum_exp" [..., N, T] (-inf where nothing may be attended to), "entropy" [..., N, T] of the weights in nats,
        "column_sums" [..., N, S], the weights that every key receives. The first two hold T × S numbers, the others are
        summed up in memory that grows with T. A Capture chooses heads and rows: only these are computed. Asking changes
        no bit of the output.
      kernel: "auto", or one of NAMES. All paths but the dense one have no forward-mode derivative:
        `jax.jvp`, `jax.hessian` and the like need kernel="dense".
      cached: k and v come from a cache: values are finite, and keys that are not have NaN.
      logits, weights: patches as in `interventions.Intervention`. All heads are then computed by whole rows, a few
        hundred at a time: "auto" or "dense".
      real: bool [..., T], queries that count in "column_sums"; None: all.

    Returns:
      The heads' outputs [..., N, T, Hv] in the dtype of v, and the captured arrays.

    Raises:
      ValueError: if the kernel cannot do what is asked; it names one that can. If what is to be captured does not
        exist. If a score function does not give one
        number, holds something (slopes, a table) for another number of heads than N or, inside `shard_map`, closes over
        a traced array that is the same on all devices where q is not. If scale has another shape.
    """
    q, scale = dense.scaled(q, scale)
    if dropout_key is None:
        dropout_rate = 0.0
    if bias is not None:
        bias = dense.full_rank("bias", bias, (*q.shape[:-1], k.shape[-2]))
    everything = q, k, v, mask, queries, keys, bias, dropout_key, logits, weights, real
    constants: tuple[Array, ...] = ()
    if score is not None:
        score, constants = hoist(score, jnp.promote_types(q.dtype, jnp.float32), q.shape[-3], everything)
    everything = devices.over(devices.axes(everything, constants), everything)
    q, k, v, mask, queries, keys, bias, dropout_key, logits, weights, real = everything
    request = Request(
        jax.default_backend(), q, k, v, mask, queries, keys, bias is not None, score is not None, bool(dropout_rate),
        log_sum_exp=False, cached=cached, spread=spread(), rules=rules.current(),
    )  # fmt: skip
    choice = choose(request, kernel)
    asked = as_capture(capture)
    asked.check("kernels.attend", CAPTURES, *q.shape[-3:-1])
    patched = logits is not None or weights is not None
    if patched and kernel not in ("auto", "dense"):
        raise ValueError(
            f"kernels: kernel={kernel!r} cannot do this: a patch of logits or weights needs whole rows of them; use "
            "kernel='auto' or 'dense'."
        )

    given: dict[str, Any] = {
        "mask": mask, "bias": bias, "score": score, "constants": constants, "queries": queries, "keys": keys,
        "scale": scale, "dropout_rate": dropout_rate, "dropout_key": dropout_key,
    }  # fmt: skip
    by_rows = rows.Given(**given, cached=cached, logits=logits, weights=weights)
    tiled = lambda by: blockwise.attend(  # noqa: E731
        q, k, v, tiling=by.tiling, values_at_once=by.values_at_once, **given
    )
    paths = {
        "dense": lambda: dense.attend(q, k, v, cached=cached, **given),
        "blockwise": lambda: tiled(choice),
        "cudnn": lambda: (cudnn.attend(q, k, v, mask=mask, scale=given["scale"]), None),
        "splash": lambda: (splash.attend(q, k, v, mask=mask, scale=given["scale"]), None),
    }
    heads, log_sums = rows.attend(q, k, v, by_rows) if patched else paths[choice.kernel]()
    names = asked.names
    if log_sums is None and "log_sum_exp" in names:
        log_sums = tiled(choose(request, "blockwise"))[1]
    captured: dict[str, Any] = {}
    if "log_sum_exp" in names and log_sums is not None:
        captured["log_sum_exp"] = of_heads(log_sums.whole[..., None], asked)[..., 0]
    whole = choice.kernel == "dense" and not patched and asked.heads is None and asked.rows is None
    if whole and ("logits" in names or "weights" in names):
        captured |= dense.look(q, k, v, cached=cached, **given)
    looked_at = [name for name in names if name not in ("log_sum_exp", *captured)]
    if looked_at:
        captured |= rows.look(
            q, k, v, by_rows, names=looked_at, heads=asked.heads, rows=asked.rows, log_sums=log_sums, real=real
        )
    return heads, {name: captured[name] for name in names}


def of_heads(array: Array, asked: Capture) -> Array:
    """The heads and rows of [..., N, T, s] that are asked for."""
    if asked.heads is not None:
        array = array[..., np.array(asked.heads), :, :]
    return array if asked.rows is None else array[..., np.array(asked.rows), :]


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    queries: Tokens | None = None,
    keys: Tokens | None = None,
    platform: str | None = None,
    kernel: str = "auto",
    mask: Mask | None = None,
    bias: Any = None,
    score: Callable | None = None,
    dropout_rate: float = 0.0,
    capture: Sequence[str] = (),
    cached: bool = False,
) -> Choice:
    """Which path `attend` takes for these arguments, and why; print it.

    Args:
      q, k, v: arrays, or `jax.ShapeDtypeStruct`s.
      queries, keys: 0, 1, 2, … if None.
      platform: "cpu", "gpu" or "tpu"; the one that JAX runs on if None.
      kernel, mask, bias, score, dropout_rate, capture, cached: as in `attend`.

    >>> from mhajax import masks
    >>> head = jax.ShapeDtypeStruct((1, 8, 4096, 64), jnp.float32)
    >>> explain(head, head, head, mask=masks.causal(), platform="cpu").kernel
    'blockwise'
    """
    from mhajax.masks import tokens

    request = Request(
        jax.default_backend() if platform is None else platform,
        q, k, v, mask,
        tokens(q.shape[-2]) if queries is None else queries,
        tokens(k.shape[-2]) if keys is None else keys,
        bias is not None, score is not None, bool(dropout_rate),
        log_sum_exp=False, cached=cached, spread=spread(), rules=rules.current(),
    )  # fmt: skip
    return choose(request, kernel)
