"""Attention over a sequence that is cut over devices: the queries stay, keys and values go round in a ring.

Every device holds a run of the queries and a run of the keys. It attends to the keys that it holds, hands them to its
neighbour, and after as many steps as there are devices it has seen them all. The parts are put together by their
log-sum-exp (in two parts each, see `log_sum_exp`):

    out = Σ_i exp(lse_i - lse) out_i,    lse = log Σ_i exp(lse_i)

The backward pass goes round once more and computes every part again, so a device holds one run of keys at a time, and
their gradients travel with them. This path is called by its name, inside `shard_map`: "auto" does not know the axis.

References:
  Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context", section 3. The sum of parts:
  Dao 2023, "FlashAttention-2", section 2.3.1. Balanced causal work: Brandon et al. 2023, "Striped Attention".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mhajax.kernels import finite, shapes
from mhajax.kernels.choice import choose, request_for
from mhajax.kernels.contract import Inputs
from mhajax.kernels.external import guard
from mhajax.kernels.log_sum_exp import LogSumExp, merge, share
from mhajax.kernels.score import hoist
from mhajax.masks import Mask, Tokens


class _Static(NamedTuple):
    axis_name: str
    kernel: str
    scale: float
    score: Callable | None  # with its constants as arguments


class _Operands(NamedTuple):
    """What has a gradient."""

    q: Array  # [..., N, T, H]
    k: Array  # [..., K, S, H]
    v: Array  # [..., K, S, Hv]
    constants: tuple[Array, ...]  # of the score function


_Context = tuple[Mask | None, Tokens, Tokens]  # what has none: the mask, queries and keys


def attend(
    q: Array, k: Array, v: Array, *, axis_name: str, queries: Tokens | None = None, keys: Tokens | None = None,
    mask: Mask | None = None, score: Callable[[Any, Any, Any, Any], Any] | None = None,
    scale: float | Array | None = None, kernel: str = "auto",
) -> tuple[Array, Array]:  # fmt: skip
    """What `kernels.attend` gives for the whole sequence: this device's part of it. Call it inside `shard_map`:

        cut = PartitionSpec(None, None, "sequence", None)
        ring_attend = jax.shard_map(
            lambda q, k, v: ring.attend(q, k, v, axis_name="sequence", mask=masks.causal())[0],
            mesh=mesh, in_specs=(cut, cut, cut), out_specs=cut, check_vma=False,
        )

    The device's run of tokens is known by its positions, so any order is right. In the plain order the first devices of
    a causal ring have little to do, as parts that a mask rules out are left out; if device i of P holds the tokens i,
    i + P, i + 2P, … and says so in `queries` and `keys`, all have as much. There is no bias, no dropout and no
    forward-mode derivative here; a bias that is a function of positions is a `score`.

    Args:
      q: this device's queries [..., N, T, H].
      k: this device's keys [..., K, S, H].
      v: this device's values [..., K, S, Hv].
      axis_name: the mesh axis that the sequence is cut over.
      queries, keys: this device's tokens: `start` is the index of its first one in the whole sequence, where lengths,
        segments and pairs are looked up. None: device i has the i-th run of T (or S) tokens at positions 0, 1, 2, ….
      mask: of the whole sequence, the same on every device: what it looks up is not cut.
      score, scale: as in `kernels.attend`.
      kernel: the path for one part: "auto", "dense" or "blockwise".

    Returns:
      [..., N, T, Hv] in the dtype of v, and the log-sum-exp [..., N, T] (-inf where nothing may be attended to).

    Raises:
      ValueError: if the kernel is another. If a score function does not give one number, or holds something for another
        number of heads than this device has.
    """
    if kernel not in ("auto", "dense", "blockwise"):
        raise ValueError(f"kernels.ring: kernel must be auto, dense or blockwise, got {kernel!r}.")
    constants: tuple[Array, ...] = ()
    if score is not None:
        score, constants = hoist(score, jnp.promote_types(q.dtype, jnp.float32), q.shape[-3])
    q, scale = shapes.scale_queries(q, scale)
    queries = _tokens(axis_name, q.shape[-2], queries)
    keys = _tokens(axis_name, k.shape[-2], keys)
    static = _Static(axis_name, kernel, scale, score)
    whole: Any = lambda operands: _attend(static, operands, (mask, queries, keys))  # noqa: E731
    if mask is None:
        heads, log_sums = whole(_Operands(q, k, v, constants))
        return heads, log_sums.whole
    q, k, v, nonfinite = finite.replace_nonfinite(q, k, v)
    heads, log_sums = whole(_Operands(q, k, v, constants))
    rows = _reached(axis_name, nonfinite, mask, queries, keys)
    inputs = Inputs(q, k, v, queries, keys, mask)
    heads, captured = finite.mark(heads, {"log_sum_exp": log_sums}, rows, nonfinite, inputs)
    return heads, captured["log_sum_exp"].whole


def _tokens(axis_name: str, size: int, tokens: Tokens | None) -> Tokens:
    """Tokens as arrays, which can travel."""
    if tokens is not None:
        return Tokens(jnp.asarray(tokens.start, jnp.int32), jnp.asarray(tokens.position))
    start = jax.lax.axis_index(axis_name) * size
    return Tokens(start, start + jnp.arange(size, dtype=jnp.int32))


def _around(axis_name: str, body: Callable, travelling: Any, state: Any) -> tuple[Any, Any]:
    """(travelling, state) = body(travelling, state) at every stop, with a step to the next device after each.

    What travels is back at its own device in the end.
    """
    size = jax.lax.axis_size(axis_name)
    to_next = [(i, (i + 1) % size) for i in range(size)]

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        travelling, state = body(*carry)
        return (jax.tree.map(lambda a: jax.lax.ppermute(a, axis_name, to_next), travelling), state), None

    return jax.lax.scan(step, (travelling, state), None, length=size)[0]


def _part(
    static: _Static, mask: Mask | None, queries: Tokens, keys: Tokens, operands: _Operands
) -> tuple[Array, LogSumExp]:
    """Attention to the keys that are here."""
    q, k, v, constants = operands
    inputs = Inputs(q, k, v, queries, keys, mask, None, static.score, constants, static.scale)
    choice = choose(request_for(inputs, log_sum_exp=True), static.kernel)
    heads, log_sums = choice.path.attend(inputs._replace(tiling=choice.tiling))
    assert log_sums is not None  # the request says that the path must give them
    return heads, log_sums


def _where_seen(mask: Mask | None, queries: Tokens, keys: Tokens, function: Callable, otherwise: Any) -> Any:
    """The function's value, or the other one if the mask is known to allow no pair of these tokens."""
    if mask is None:
        return function()
    nonempty, _ = mask.tiles(queries, keys, queries.size, keys.size)
    return jax.lax.cond(jnp.any(jnp.asarray(nonempty)), function, lambda: otherwise)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, operands: _Operands, context: _Context) -> tuple[Array, LogSumExp]:
    return _forward(static, operands, context)[0]


def _forward(static: _Static, operands: _Operands, context: _Context) -> tuple:
    q, k, v, constants = operands
    mask, queries, keys = context
    wide = jnp.promote_types(q.dtype, jnp.float32)
    nobody = LogSumExp(jnp.zeros(q.shape[:-1], wide), jnp.full(q.shape[:-1], -jnp.inf, wide))
    nothing = jnp.zeros((*q.shape[:-1], v.shape[-1]), v.dtype), nobody

    def stop(travelling: tuple, state: tuple) -> tuple[tuple, tuple]:
        k, v, keys = travelling
        local = lambda: _part(static, mask, queries, keys, _Operands(q, k, v, constants))  # noqa: E731
        part, log_sum = _where_seen(mask, queries, keys, local, nothing)
        out, before = state
        whole = merge(before, log_sum)
        out = out * share(before, whole)[..., None] + part * share(log_sum, whole)[..., None]
        return travelling, (out, whole)

    _, (out, log_sums) = _around(static.axis_name, stop, (k, v, keys), (nothing[0].astype(wide), nothing[1]))
    out = out.astype(v.dtype)
    return (out, log_sums), (operands, context, out, log_sums)


def _backward(static: _Static, saved: tuple, cotangents: tuple) -> tuple:
    """Every part's own gradient, from the cotangents of the whole output and of its log-sum-exp."""
    operands, (mask, queries, keys), out, log_sums = saved
    q, k, v, constants = operands
    wide = log_sums.log_total.dtype
    out, d_out = out.astype(wide), cotangents[0].astype(wide)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, wide), operands)

    def stop(travelling: tuple, state: tuple) -> tuple[tuple, tuple]:
        k, v, keys, d_k, d_v = travelling

        def local() -> _Operands:
            compute = partial(_part, static, mask, queries, keys)
            (part, log_sum), backward = jax.vjp(compute, _Operands(q, k, v, constants))
            of_part = share(log_sum, log_sums)
            delta = jnp.sum(d_out * (part - out), axis=-1) + cotangents[1].log_total
            d_log_sum = LogSumExp(jnp.zeros_like(log_sum.top), of_part * delta)
            d_part = (d_out * of_part[..., None]).astype(part.dtype)
            return jax.tree.map(lambda a: a.astype(wide), backward((d_part, d_log_sum))[0])

        d = _where_seen(mask, queries, keys, local, zeros)
        d_q, d_constants = jax.tree.map(jnp.add, state, (d.q, d.constants))
        return (k, v, keys, d_k + d.k, d_v + d.v), (d_q, d_constants)

    (*_, d_k, d_v), (d_q, d_constants) = _around(
        static.axis_name, stop, (k, v, keys, zeros.k, zeros.v), (zeros.q, zeros.constants)
    )
    gradients = _Operands(d_q, d_k, d_v, d_constants)
    return jax.tree.map(lambda d, a: d.astype(a.dtype), gradients, operands), None


_attend.defvjp(_forward, _backward)


def _reached(axis_name: str, nonfinite: finite.NonFinite, mask: Mask, queries: Tokens, keys: Tokens) -> Array:
    """This device's queries that see something non-finite anywhere, bool [..., N, T]."""

    def stop(travelling: tuple, rows: Array) -> tuple[tuple, Array]:
        bad, keys = travelling
        return travelling, rows | guard.reached(nonfinite._replace(keys=bad), mask, queries, keys)

    return _around(axis_name, stop, (nonfinite.keys, keys), jnp.zeros(nonfinite.queries.shape, bool))[1]
