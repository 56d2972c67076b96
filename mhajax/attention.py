"""Multi-head attention: project → attend → concatenate → combine.

One head turns the input into its own queries, keys and values and attends on its own:

    head_n = softmax(x w_q[n] (memory w_k[n])ᵀ / √H) memory w_v[n]            [T, Hv]
    out    = Σ_n head_n w_o[n]   (= concatenate the heads, then one linear map)  [T, D]

and everything else is that head lifted over the heads (the leading axis N of every parameter) and over the batch.

References:
  Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2; their h, d_k, d_v are our N, H, Hv.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mhajax import arguments, checks, kernels
from mhajax.interventions import Capture, Intervention, as_capture
from mhajax.kernels import Path, finite, patches
from mhajax.masks import Mask, Tokens, as_mask, conditions, tokens
from mhajax.masks.static import aligned
from mhajax.options import Options

CAPTURES = ("queries", "keys", "values", *kernels.CAPTURES, "heads", "contributions")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a multi-head attention.

    Attributes:
      d_model: D, width of the input and of the output.
      num_heads: N, query heads.
      num_kv_heads: K, heads of keys and values; N/K query heads share one. None: K = N. 1: multi-query attention.
      head_dim: H, width of one head's queries and keys. None: D/N.
      value_dim: Hv, width of one head's values. None: H.
      use_bias: add a bias after each of the four projections.
    """

    d_model: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    use_bias: bool = False

    def __post_init__(self):
        arguments.integers(self, "d_model", "num_heads")
        arguments.integers(self, "num_kv_heads", "head_dim", "value_dim", optional=True)
        arguments.booleans(self, "use_bias")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got num_heads={self.num_heads} and "
                f"num_kv_heads={self.num_kv_heads}; every key head serves the same number of query heads."
            )
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model must be a multiple of num_heads, got d_model={self.d_model} and num_heads={self.num_heads}; "
                "or give head_dim."
            )

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def width(self) -> int:
        """H."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def value_width(self) -> int:
        """Hv."""
        return self.width if self.value_dim is None else self.value_dim


class Params(NamedTuple):
    """The parameters; the leading axis is the heads', so a head is a slice. Biases are None without `use_bias`."""

    w_q: Array  # [N, D, H]
    w_k: Array  # [K, D, H]
    w_v: Array  # [K, D, Hv]
    w_o: Array  # [N, Hv, D]
    b_q: Array | None = None  # [N, H]
    b_k: Array | None = None  # [K, H]
    b_v: Array | None = None  # [K, Hv]
    b_o: Array | None = None  # [D]


class KeysValues(NamedTuple):
    """What the memory answers with: keys and values of all heads, projected once."""

    k: Array  # [..., K, S, H]
    v: Array  # [..., K, S, Hv]


def init_params(key: Array, config: Config) -> Params:
    """Parameters of N heads, each from its own key.

    Entries are normal with variance 1/fan_in (D for queries, keys and values, N·Hv for the output); biases are zero.

    Args:
      key: PRNG key.
      config: the shape.

    Returns:
      Float32 parameters (float64 where JAX runs in 64 bits).

    Raises:
      TypeError: if key is no PRNG key.

    >>> config = Config(d_model=16, num_heads=4)
    >>> jax.tree.map(jnp.shape, init_params(jax.random.key(0), config).w_q)
    (4, 16, 4)
    """
    arguments.init("attention.init_params", key, config, Config)
    d, n, k, h, hv = config.d_model, config.num_heads, config.kv_heads, config.width, config.value_width
    counts = (n, k, k, n)
    keys = jax.vmap(lambda key: jax.random.split(key, max(counts)))(jax.random.split(key, 4))
    # All heads are drawn at once: every draw is a large program to the compiler, whatever its size.
    keys = jnp.concatenate([of_heads[:count] for of_heads, count in zip(keys, counts, strict=True)])
    draws = jax.vmap(lambda key: jax.random.normal(key, (d * max(h, hv),)))(keys)
    w_q, w_k, w_v, w_o = jnp.split(draws, [n, n + k, n + 2 * k])
    biases = [jnp.zeros(s) for s in ((n, h), (k, h), (k, hv), (d,))] if config.use_bias else [None] * 4
    return Params(
        w_q[:, : d * h].reshape(n, d, h) * d**-0.5,
        w_k[:, : d * h].reshape(k, d, h) * d**-0.5,
        w_v[:, : d * hv].reshape(k, d, hv) * d**-0.5,
        w_o[:, : d * hv].reshape(n, hv, d) * (n * hv) ** -0.5,
        *biases,
    )


def attentions(params: Params) -> dict[str, Params]:
    """The attentions in parameters, by the names of their gates: here the only one, which has none.

    Every module that has Params with attentions in them says so, for those who measure and change heads of any model.
    """
    return {"": params}


def with_attentions(params: Params, changed: dict[str, Params]) -> Params:
    """The parameters with some attentions replaced, named as by `attentions`."""
    return changed.get("", params)


@arguments.shown
def apply(params: Params, x: Array, config: Config, **options: Unpack[Options]) -> Array:
    """Multi-head attention of x to itself, or to `memory`.

    Works in the dtype of x: parameters are cast to it; logits and softmax are float32 (float64 for float64).

    Args:
      params: from `init_params`, or any arrays of those shapes.
      x: the stream that asks, [..., T, D].
      config: the shape; static under jit.
      memory: the stream that answers, [..., S, D] with the leading axes of x; x itself if None.
      mask: a Mask, or booleans [T, S] or [..., N, T, S], True = may attend. A three-axis array is refused. Of padding,
        booleans [B, S] that are True at real keys, write `masks.dense(array[:, None, None, :])`, or `masks.lengths(n)`.
      bias: numbers added to the logits, broadcast to [..., N, T, S]; -inf masks.
      score: function (score, head, q_position, k_position) → score of one scaled product, before bias and mask, such as
        `scores.alibi(8)`; what it closes over has gradients.
      kernel: "auto", one of `kernels.NAMES`, or a path of your own as `kernels.Path` describes it, static under jit;
        `kernels.explain` says which it is. Only "dense" has forward-mode derivatives (`jax.jvp`, `jax.hessian`).
      positions: positions of the queries, integers [T] or [..., T]; 0, 1, 2, … if None.
      memory_positions: positions of the keys, [S] or [..., S]; those of x in self-attention, else 0, 1, 2, ….
      rotate: function (x [..., T, H], positions [..., T]) → [..., T, H] applied to queries and keys, such as
        `positions.rotary`.
      gates: factor of every head's output, [N], [..., N], or [..., N, T] for every query: 1 leaves a head alone, 0
        removes it. Short for `intervention=Intervention(gates=…)`.
      intervention: an `interventions.Intervention`: gates, edges, patches of any quantity of the heads.
      real: bool [..., T], queries that count in the "column_sums" of `apply_captured`. None: those below the length, in
        self-attention with `masks.lengths`; else all.
      dropout_rate: share of the attention weights that is dropped; needs dropout_key.
      dropout_key: PRNG key of the dropout; None is evaluation.

    Returns:
      [..., T, D] in the dtype of x. A query that may attend to nothing gets the bias b_o, or zeros without biases.

    Raises:
      ValueError: for shapes that do not fit, with the sizes expected and got.
      TypeError: for a mask that is not boolean, an option that does not exist, arguments in another order.

    >>> config = Config(d_model=16, num_heads=4)
    >>> params = init_params(jax.random.key(0), config)
    >>> apply(params, jnp.ones((2, 5, 16)), config).shape
    (2, 5, 16)

    References:
      Vaswani et al. 2017, section 3.2. Grouped heads: Ainslie et al. 2023, "GQA", section 2.2. Gates: Michel et al.
      2019, "Are Sixteen Heads Really Better than One?", section 2.2 (their ξ).
    """
    arguments.named("attention.apply", options, Options, capture="write attention.apply_captured, which returns it")
    return apply_captured(params, x, config, capture=(), **options)[0]


@arguments.shown
def apply_captured(
    params: Params,
    x: Array,
    config: Config,
    *,
    capture: Sequence[str] | Capture = ("weights",),
    **options: Unpack[Options],
) -> tuple[Array, dict[str, Array]]:
    """`apply`, and what it computed on the way; the output is the same.

    Args:
      params, x, config: as in `apply`, and so are all its options.
      capture: what to return, any of
        "queries" [..., N, T, H], "keys" [..., K, S, H], "values" [..., K, S, Hv] as they enter the dot product,
        "logits" and "weights" [..., N, T, S] (scaled, scored and biased, -inf where masked; before dropout),
        "log_sum_exp" [..., N, T], the logarithm of the sum that the weights are divided by (-inf: nothing is visible),
        "heads" [..., N, T, Hv], every head's own output after its gate, before w_o,
        "contributions" [..., N, T, D], what each head adds to the output,
        "entropy" [..., N, T] of the weights, in nats, and "column_sums" [..., N, S], the attention that every key
        receives, summed over the queries: both in memory that grows with T.
        A Capture chooses heads and rows too: only these are computed, and the axes N and T have their number.
        Everything is as the output is made of, so with the intervention.

    Returns:
      The output [..., T, D], and a dict with an array for every name.

    Raises:
      ValueError: for a name that does not exist; else as `apply`.
    """
    arguments.named("attention.apply_captured", options, Options)
    arguments.order("attention.apply(params, x, config)", params, config, Params, Config, x=x)
    checks.stream("x", x, config)
    memory, places = options.pop("memory", None), options.pop("memory_positions", None)
    mask = options["mask"] = as_mask(options.get("mask"))
    if memory is None:
        memory, places = x, options.get("positions") if places is None else places
        if options.get("real") is None and "column_sums" in as_capture(capture).names:
            lengths = conditions(mask).lengths
            if lengths is not None:
                options["real"] = jnp.arange(x.shape[-2]) < jnp.asarray(lengths)[..., None]
    else:
        arguments.order("attention.apply(params, x, config)", params, config, Params, Config, memory=memory)
        checks.stream("memory", memory, config)
        checks.same_leading(x, memory)
    intervention = options.get("intervention", Intervention())
    checks.changes("attention.apply", intervention)
    masked = _masked(mask, options.get("bias"), intervention)
    answers = keys_values(params, memory, config, positions=places, rotate=options.get("rotate"), masked=masked)
    rest: Any = options  # those of `apply_to`
    return apply_to(params, x, answers, config, capture=capture, keys=tokens(memory.shape[-2], places), **rest)


def keys_values(
    params: Params,
    memory: Array,
    config: Config,
    *,
    positions: Array | None = None,
    rotate: Callable[[Array, Array], Array] | None = None,
    masked: bool = True,
) -> KeysValues:
    """The memory projected to keys and values of every head, to be attended to with `apply_to`, once or often.

    Args:
      params, config: as in `apply`.
      memory: [..., S, D].
      positions: [S] or [..., S], for `rotate`.
      rotate: as in `apply`.
      masked: whether a mask will be used: then a token that is not finite spoils nothing but the queries that see it,
        not even the gradient of the projections.

    Returns:
      Keys [..., K, S, H] and values [..., K, S, Hv].
    """
    arguments.order("attention.keys_values(params, memory, config)", params, config, Params, Config, memory=memory)
    checks.stream("memory", memory, config)
    checks.parameters(params, config)
    checks.functions(None, rotate)
    checks.positions("memory_positions", positions, memory)
    params = jax.tree.map(lambda w: jnp.asarray(w, memory.dtype), params)
    k = _project(memory, params.w_k, params.b_k, masked)
    v = _project(memory, params.w_v, params.b_v, masked)
    if rotate is not None:
        k = _rotated(rotate, k, _with_heads(positions, memory.shape[-2]), masked)
    return KeysValues(k, v)


def apply_to(
    params: Params,
    x: Array,
    answers: KeysValues,
    config: Config,
    *,
    mask: Mask | ArrayLike | None = None,
    bias: ArrayLike | None = None,
    score: Callable[[Any, Any, Any, Any], Any] | None = None,
    kernel: str | Path = "auto",
    positions: Array | None = None,
    start: ArrayLike = 0,
    keys: Tokens | None = None,
    cached: bool = False,
    rotate: Callable[[Array, Array], Array] | None = None,
    gates: ArrayLike | None = None,
    intervention: Intervention = Intervention(),  # noqa: B008 - an immutable tuple
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    capture: Sequence[str] | Capture = (),
    real: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Attention of x to keys and values that are already there: a cache, or a memory projected once.

    Args:
      answers: from `keys_values`, or a cache's.
      start: index of the first query, where a mask looks it up; the length of a cache.
      keys: indices and positions of the S keys; 0, 1, 2, … if None.
      cached: as in `kernels.attend`.
      params, x, config, and the others: as in `apply_captured`.

    Returns:
      The output [..., T, D], and a dict with an array for every name in `capture`.
    """
    arguments.order("attention.apply_to(params, x, answers, config)", params, config, Params, Config, x=x)
    checks.stream("x", x, config)
    checks.parameters(params, config)
    checks.functions(score, rotate)
    checks.changes("attention.apply", intervention)
    mask, asked = as_mask(mask), as_capture(capture)
    mask = intervention.edges if mask is None else mask if intervention.edges is None else mask & intervention.edges
    gates = _gates(gates, intervention)
    bias = None if bias is None else jnp.asarray(bias)
    whole = isinstance(start, int) and start == 0
    checks.mask_sizes(mask, x.shape[:-2], x.shape[-2] if whole else None, answers.k.shape[-2])
    checks.positions("positions", positions, x)
    checks.bias(bias, x)
    checks.gates(gates, x, config)
    checks.intervention(intervention, x, answers.k.shape[-2], config)
    checks.dropped(dropout_rate, dropout_key)
    asked.check("attention.apply_captured", CAPTURES, config.num_heads, x.shape[-2])
    queries = tokens(x.shape[-2], positions)._replace(start=start)
    params = jax.tree.map(lambda w: jnp.asarray(w, x.dtype), params)
    masked = _masked(mask, bias, intervention)
    q = _project(x, params.w_q, params.b_q, masked)
    if rotate is not None:
        q = _rotated(rotate, q, _with_heads(positions, x.shape[-2]), masked)
    q = patches.apply(q, intervention.queries)
    k, v = patches.apply(answers.k, intervention.keys), patches.apply(answers.v, intervention.values)
    heads, captured = kernels.attend(
        q, k, v,
        mask=mask, bias=bias, score=score, kernel=kernel, queries=queries,
        keys=tokens(k.shape[-2]) if keys is None else keys, cached=cached,
        dropout_rate=dropout_rate, dropout_key=dropout_key,
        logits=intervention.logits, weights=intervention.weights, real=real,
        capture=replace(asked, names=tuple(n for n in asked.names if n in kernels.CAPTURES)),
    )  # fmt: skip
    heads = heads.astype(x.dtype)
    if gates is not None:
        times = finite.guarded(jnp.multiply) if masked else jnp.multiply
        heads = times(heads, patches.by_token(gates, heads.ndim).astype(heads.dtype))
    heads = patches.apply(heads, intervention.heads)
    concatenated = jnp.swapaxes(heads, -3, -2).reshape(*x.shape[:-1], math.prod(params.w_o.shape[:2]))  # [..., T, N·Hv]
    combine = _guarded_matmul if masked else jnp.matmul
    out = combine(concatenated, params.w_o.reshape(-1, config.d_model))
    if params.b_o is not None:
        out = _plus(out, params.b_o)
    of_heads = partial(kernels.of_heads, selection=asked)
    # The key heads that answer the query heads that are asked for; keys are no queries, they have no rows.
    of_keys = lambda a: a if asked.heads is None else a[..., np.array(asked.heads) * k.shape[-3] // q.shape[-3], :, :]  # noqa: E731
    w_o = params.w_o if asked.heads is None else params.w_o[np.array(asked.heads)]
    on_the_way = {
        "queries": lambda: of_heads(q),
        "keys": lambda: of_keys(k),
        "values": lambda: of_keys(v),
        "heads": lambda: of_heads(heads),
        "contributions": lambda: jnp.einsum("...nth,nhd->...ntd", of_heads(heads), w_o),
    }
    return out, {name: captured[name] if name in captured else on_the_way[name]() for name in asked.names}


def _masked(mask: Mask | None, bias: Any, intervention: Intervention) -> bool:
    """Whether some pairs may not attend, so that what is not finite must stay where it is seen."""
    given = (mask, bias, intervention.edges, intervention.logits, intervention.weights)
    return any(a is not None for a in given)


def _gates(gates: ArrayLike | None, intervention: Intervention) -> Array | None:
    """Those of the option and those of the intervention, of which there is one."""
    if gates is not None and intervention.gates is not None:
        raise ValueError(
            "attention.apply: gates must be given once, got gates= and intervention.gates; gates is the short form."
        )
    factors = intervention.gates if gates is None else gates
    return None if factors is None else jnp.asarray(factors)


_guarded_matmul = finite.guarded(jnp.matmul)


def _project(x: Array, weights: Array, bias: Array | None, masked: bool) -> Array:
    """One head's linear map, x [..., T, D] by [D, H], for every head of `weights` [N, D, H]: [..., N, T, H]."""
    product = _guarded_matmul if masked else jnp.matmul
    one_head = lambda x, w, b: product(x, w) if b is None else _plus(product(x, w), b)  # noqa: E731
    # XLA merges the heads into one product, for which it transposes the weights. For few tokens that is most of the
    # work, so there every head gets its own x, which keeps the products apart.
    few = math.prod(x.shape[:-1]) <= 32
    given = jnp.broadcast_to(x, (weights.shape[0], *x.shape)) if few else x
    axes = (0 if few else None, 0, None if bias is None else 0)
    return jax.vmap(one_head, in_axes=axes, out_axes=-3)(given, weights, bias)


def _rotated(rotate: Callable[[Array, Array], Array], x: Array, positions: Array, masked: bool) -> Array:
    """The function of a user, whose derivative never sees what is not finite: such tokens are marked after it."""
    if not masked:
        return rotate(x, positions)
    nonfinite = ~jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
    return jnp.where(nonfinite, jnp.nan, rotate(jnp.where(nonfinite, 0, x), positions))


def _plus(x: Array, bias: Array) -> Array:
    """x [..., D] plus [D], of the same rank, which JAX can be told to insist on."""
    return jnp.add(*aligned(x, bias))


def _with_heads(positions: Array | None, length: int) -> Array:
    """Positions [T] or [..., T] as they broadcast against [..., N, T]."""
    if positions is None:
        return jnp.arange(length)
    return positions if positions.ndim == 1 else positions[..., None, :]
