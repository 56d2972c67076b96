"""softmax(q kᵀ) v for given queries, keys and values: one contract, and a table of paths that keep it.

`attend` is the contract, `explain` prints which path it takes and why. `choice.PATHS` is the table: `dense` is the
definition and holds every logit; `blockwise` gives the same numbers in memory that grows with T; `external.cudnn` and
`external.splash` call what a platform has. What a path says of itself, `contract.Path` tells; one of your own may take
the place of a name. `rules` are the numbers that "auto" goes by, which `bench tune` measures on a machine. `rowwise` is
for who captures weights or changes them. `ring` is for a sequence that is cut over devices, and is called by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax.arguments import kind_of
from mhajax.interventions import Capture, Patch, as_capture
from mhajax.kernels import rowwise, rules, shapes, varying
from mhajax.kernels.choice import PATHS, choose, request_for
from mhajax.kernels.contract import Choice, Inputs, Path, Plan, Request, Tiling
from mhajax.kernels.log_sum_exp import LogSumExp
from mhajax.kernels.score import hoist
from mhajax.masks import Mask, Tokens, tokens

__all__ = [
    "CAPTURES", "NAMES", "PATHS", "Choice", "Inputs", "LogSumExp", "Path", "Plan", "Request", "Tiling", "attend",
    "explain", "rules",
]  # fmt: skip

CAPTURES = ("logits", "weights", "log_sum_exp", "entropy", "column_sums")
NAMES = tuple(PATHS)


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    queries: Tokens | None = None,
    keys: Tokens | None = None,
    mask: Mask | None = None,
    bias: Array | None = None,
    score: Callable[[Any, Any, Any, Any], Any] | None = None,
    scale: float | Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    capture: Sequence[str] | Capture = (),
    kernel: str | Path = "auto",
    cached: bool = False,
    logits: Patch | None = None,
    weights: Patch | None = None,
    real: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Scaled dot-product attention of every head, softmax(score(scale · q kᵀ) + bias, mask) v.

    Logits, softmax and sums are float32 (float64 for float64 input), whatever the dtype of q, k and v. A query with
    nothing to attend to gives zeros. With a mask or a bias, non-finite keys and values reach only the queries that may
    see them: those get NaN, and pass no gradient to q, k, v and the rest, whatever their cotangent. Numbers of q and k
    of 2⁵⁵ and more, whose products overflow in float32, then count as non-finite.

    Args:
      q: queries [..., N, T, H].
      k: keys [..., K, S, H]; query head n uses key head n // (N/K).
      v: values [..., K, S, Hv].
      queries, keys: indices and positions of the T queries and of the S keys; 0, 1, 2, … if None.
      mask: which query may attend to which key; None: every one to every one.
      bias: added to the logits, broadcasts to [..., N, T, S]; -inf masks.
      score: function (score, head, q_position, k_position) → score of one scaled product, before bias and mask; what it
        closes over has gradients. -inf hides the pair, of a whole row too; but only a mask or a bias keeps a key that
        is not finite away. `mhajax.scores` has the known ones.
      scale: factor of the products, 1/√H if None; or an array that broadcasts to [..., N, T, 1], say [N, 1, 1] for one
        of every head, which has a gradient: the queries are multiplied by it.
      dropout_rate: fraction of the weights that is dropped.
      dropout_key: PRNG key; None is no dropout. Every path drops the same weights.
      capture: any of "logits" (after score and bias, -inf where masked) and "weights" (before dropout), [..., N, T, S],
        "log_sum_exp" [..., N, T] (-inf where nothing may be attended to), "entropy" [..., N, T] of the weights in nats,
        "column_sums" [..., N, S], the weights that every key receives. The first two hold T × S numbers, the others are
        summed up in memory that grows with T. A Capture chooses heads and rows: only these are computed. Asking changes
        no bit of the output.
      kernel: "auto", one of NAMES, or a path of your own: a module or an object with `refusal`, `reluctance` and
        `attend`, as `Path` describes them (static under jit). Of the library's, all but the dense one have no
        forward-mode derivative: `jax.jvp`, `jax.hessian` and the like need kernel="dense".
      cached: k and v come from a cache: values are finite, and keys that are not have NaN.
      logits, weights: patches as in `interventions.Intervention`. All heads are then computed by whole rows, a few
        hundred at a time: "auto" or "dense".
      real: bool [..., T], queries that count in "column_sums"; None: all.

    Returns:
      The heads' outputs [..., N, T, Hv] in the dtype of v, and the captured arrays.

    Raises:
      ValueError: if the kernel cannot do what is asked; it names one that can. If what is to be captured does not
        exist. If a score function does not give one number, holds something (slopes, a table) for another number of
        heads than N or, inside `shard_map`, closes over a traced array that is the same on all devices where q is not.
        If scale has another shape.
      TypeError: if the kernel is neither a name nor a path.
    """
    inputs = Inputs(
        q, k, v, _tokens(q, queries), _tokens(k, keys), mask, bias, score, (), 1.0,
        0.0 if dropout_key is None else dropout_rate, dropout_key, cached, logits, weights,
    )  # fmt: skip
    inputs, real = _prepare(inputs, scale, real)
    request = request_for(inputs)
    choice = choose(request, kernel)
    selection = as_capture(capture)
    selection.check("kernels.attend", CAPTURES, *inputs.q.shape[-3:-1])
    heads, log_sums = _run(choice, inputs)
    if log_sums is None and "log_sum_exp" in selection.names:
        _, log_sums = _run(choose(request, "dense" if cached else "blockwise"), inputs)
    captured = _captured(choice.path, inputs, selection, log_sums, real)
    return heads, {name: captured[name] for name in selection.names}


def _tokens(array: Any, given: Tokens | None) -> Tokens:
    """Indices and positions of the tokens of [..., t, H]: 0, 1, 2, … unless they are given."""
    return tokens(array.shape[-2]) if given is None else given


def _prepare(inputs: Inputs, scale: float | Array | None, real: Array | None) -> tuple[Inputs, Array | None]:
    """The inputs in the form that paths take, all varying over the same axes of the devices."""
    q, scale = shapes.scale_queries(inputs.q, scale)
    bias, score = inputs.bias, inputs.score
    if bias is not None:
        bias = shapes.check_full_rank("bias", bias, (*q.shape[:-1], inputs.k.shape[-2]))
    inputs, constants = inputs._replace(q=q, scale=scale, bias=bias, score=None), ()
    if score is not None:
        score, constants = hoist(score, jnp.promote_types(q.dtype, jnp.float32), q.shape[-3], inputs, real)
    inputs, real = varying.over(varying.axes(inputs, real, constants), (inputs, real))
    return inputs._replace(score=score, constants=constants), real


def _run(choice: Choice, inputs: Inputs) -> tuple[Array, LogSumExp | None]:
    """What the path gives, of the shape that it must have."""
    given = choice.path.attend(inputs._replace(tiling=choice.tiling, values_at_once=choice.values_at_once))
    full = (*inputs.q.shape[:-1], inputs.v.shape[-1])
    pair = isinstance(given, tuple) and len(given) == 2
    if not pair or np.shape(given[0]) != full or not isinstance(given[1], LogSumExp | None):
        raise ValueError(
            f"kernels: attend of kernel={choice.kernel!r} must return heads {list(full)} and a LogSumExp or None, got "
            f"{jax.tree.map(kind_of, given)}."
        )
    return given[0].astype(inputs.v.dtype), given[1]


def _captured(
    path: Path, inputs: Inputs, selection: Capture, log_sums: LogSumExp | None, real: Array | None
) -> dict[str, Any]:
    """What is captured: from the log-sum-exp, from a path that holds every logit, the rest by whole rows."""
    captured: dict[str, Any] = {}
    if "log_sum_exp" in selection.names and log_sums is not None:
        captured["log_sum_exp"] = of_heads(log_sums.whole[..., None], selection)[..., 0]
    of_path = getattr(path, "capture", None)
    everywhere = selection.heads is None and selection.rows is None and not inputs.patched
    if of_path is not None and everywhere and not {"logits", "weights"}.isdisjoint(selection.names):
        captured |= of_path(inputs)
    missing = [name for name in selection.names if name not in captured]
    if missing:
        captured |= rowwise.capture(
            inputs, missing, heads=selection.heads, rows=selection.rows, log_sums=log_sums, real=real
        )
    return captured


def of_heads(array: Array, selection: Capture) -> Array:
    """The heads and rows of [..., N, T, s] that are selected."""
    if selection.heads is not None:
        array = array[..., np.array(selection.heads), :, :]
    return array if selection.rows is None else array[..., np.array(selection.rows), :]


def explain(
    q: Any, k: Any, v: Any, *, queries: Tokens | None = None, keys: Tokens | None = None, platform: str | None = None,
    kernel: str | Path = "auto", mask: Mask | None = None, bias: Any = None, score: Callable | None = None,
    dropout_rate: float = 0.0, capture: Sequence[str] = (), cached: bool = False,
) -> Choice:  # fmt: skip
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
    inputs = Inputs(
        q, k, v, _tokens(q, queries), _tokens(k, keys), mask, bias, score, dropout_rate=dropout_rate, cached=cached
    )
    return choose(request_for(inputs, platform), kernel)
