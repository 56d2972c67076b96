"""What is changed in the heads of an attention, and what of them is looked at.

An `Intervention` is a pytree of arrays: it goes through `jit`, `vmap`, `grad` and the scan over layers, so all
ablations of a model are one `vmap` over amounts, and the gradient with respect to an amount at 0 is attribution
patching. In a stack of layers every leaf has a leading L; a leaf without axes is shared by all layers.

    zero(amount)                 the heads' outputs are 0
    mean(heads, amount)          ... their mean over examples
    resample(heads, order, ...)  ... those of other examples
    uniform(amount)              equal weights on all visible keys
    frozen(weights, amount)      weights of another run
    without_edges(pairs)         pairs of query and key that are cut
    patched(name, value, amount) any quantity, from wherever

A `Capture` says what is looked at: which quantities of which layers, heads and queries. It is hashable: static under
`jit`.

What is captured and what is patched under one name is the same quantity at the same place: a patch with what the same
run captured changes nothing.

    >>> import jax
    >>> from mhajax import attention
    >>> config = attention.Config(d_model=16, num_heads=4)
    >>> params = attention.init_params(jax.random.key(0), config)
    >>> x = jax.random.normal(jax.random.key(1), (2, 7, 16))

Without each of the heads, all at once (of a stack the amounts are [L·N, L, N]):

    >>> without = lambda amount: attention.apply(params, x, config, intervention=zero(amount))
    >>> jax.vmap(without)(jnp.eye(4, dtype=bool)).shape
    (4, 2, 7, 16)

Head 2 always as it is on average:

    >>> _, seen = attention.apply_captured(params, x, config, capture=("heads",))
    >>> changed = mean(seen["heads"], jnp.arange(4) == 2)
    >>> attention.apply(params, x, config, intervention=changed).shape
    (2, 7, 16)

Where head 2 looks from the first and the last token, and nothing else:

    >>> asked = Capture(("weights",), heads=(2,), rows=(0, 6))
    >>> attention.apply_captured(params, x, config, capture=asked, intervention=changed)[1]["weights"].shape
    (2, 1, 2, 7)

References:
  Gates: Michel et al. 2019, "Are Sixteen Heads Really Better than One?".
  Patches: Vig et al. 2020, "Investigating Gender Bias in Language Models Using Causal Mediation Analysis"; Nanda 2023,
  "Attribution Patching".
  Edges: Geva et al. 2023, "Dissecting Recall of Factual Associations in Auto-Regressive Language Models", section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mhajax import arguments
from mhajax.masks import Mask, as_mask


class Patch(NamedTuple):
    """A quantity of some heads replaced: x · (1 - amount) + value · amount.

    Attributes:
      value: broadcasts to the quantity, from the right.
      amount: bool, where it is replaced; or numbers, how much. [N] or [..., N], or [..., N, T] with one for every
        query, 1 for an axis that is shared; [] is all heads. For keys and values K and S instead of N and T.
    """

    value: ArrayLike
    amount: ArrayLike = True


class Intervention(NamedTuple):
    """What is changed in one attention; None changes nothing and costs nothing.

    Attributes:
      gates: factor of the heads' outputs, shaped as the amount of a Patch.
      edges: pairs that remain, besides what the mask allows; the other weights sum to 1 again.
      queries: [..., N, T, H], as they enter the dot product, so after rotation.
      keys: [..., K, S, H], likewise.
      values: [..., K, S, Hv].
      logits: [..., N, T, S], after score and bias. Pairs that are masked stay so; a value of -inf masks.
      weights: [..., N, T, S], after the softmax and before dropout. Those of pairs that are masked stay 0.
      heads: [..., N, T, Hv], the heads' outputs after gates, before w_o.
    """

    gates: ArrayLike | None = None
    edges: Mask | None = None
    queries: Patch | None = None
    keys: Patch | None = None
    values: Patch | None = None
    logits: Patch | None = None
    weights: Patch | None = None
    heads: Patch | None = None


PATCHES = ("queries", "keys", "values", "logits", "weights", "heads")


def patched(name: str, value: ArrayLike, amount: ArrayLike = True) -> Intervention:
    """The quantity `name`, one of PATCHES, replaced by a value.

    Args:
      name: of a field of `Intervention`.
      value: what replaces it, such as what another run captured under this name.
      amount: as in `Patch`.

    Raises:
      ValueError: for a name that does not exist.
    """
    if name not in PATCHES:
        raise ValueError(f"interventions.patched: name must be one of {', '.join(PATCHES)}, got {name!r}.")
    return Intervention()._replace(**{name: Patch(value, amount)})


def zero(amount: ArrayLike = True) -> Intervention:
    """Heads whose output is 0.

    >>> zero(jnp.arange(4) == 2).heads.amount.tolist()
    [False, False, True, False]
    """
    return patched("heads", 0.0, amount)


def mean(heads: ArrayLike, amount: ArrayLike = True, real: ArrayLike | None = None) -> Intervention:
    """Heads whose output is always its mean over examples and tokens.

    Args:
      heads: outputs that were captured for some examples, [B, N, T, Hv] or [L, B, N, T, Hv].
      amount: as in `Patch`.
      real: bool [B, T], the tokens that count; None: all.
    """
    heads = jnp.asarray(heads)
    _examples("mean", heads)
    counts = None if real is None else jnp.broadcast_to(jnp.asarray(real)[:, None, :, None], heads.shape)
    return patched("heads", jnp.mean(heads, axis=(-4, -2), where=counts, keepdims=True), amount)


def resample(heads: ArrayLike, order: ArrayLike, amount: ArrayLike = True) -> Intervention:
    """Heads whose output is that of another example.

    Args:
      heads: outputs that were captured for a batch, [B, N, T, Hv] or [L, B, N, T, Hv].
      order: which example each one gets, integers [B], such as a permutation. Under jit, where it is not known, an
        example that is not there is NaN.
      amount: as in `Patch`.

    Raises:
      ValueError: if the outputs are of no batch, or an example is known not to be there.

    References:
      Chan et al. 2022, "Causal Scrubbing" (resampling ablation).
    """
    heads = jnp.asarray(heads)
    _examples("resample", heads)
    arguments.below("interventions.resample", "order", order, heads.shape[-4], "examples")
    others = jnp.moveaxis(heads, -4, 0).at[jnp.asarray(order)]
    others = others.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return patched("heads", jnp.moveaxis(others, 0, -4), amount)


def uniform(amount: ArrayLike = True) -> Intervention:
    """Heads that attend equally to all keys that they may see.

    It is a patch of the logits, after score and bias, with 0: what they add is replaced too, and a bias of -inf masks
    as ever.
    """
    return patched("logits", 0.0, amount)


def frozen(weights: ArrayLike, amount: ArrayLike = True) -> Intervention:
    """Heads that attend as in another run, whose weights [..., N, T, S] were captured; only the values follow x."""
    return patched("weights", weights, amount)


def without_edges(pairs: Mask | ArrayLike) -> Intervention:
    """Without these pairs of query and key, True = cut; the weights of the others sum to 1 again (attention knockout).

    Args:
      pairs: a Mask, or booleans [T, S] or [B, N, T, S] in which any axis may be 1; for a stack [L, B, N, T, S].
    """
    mask = as_mask(pairs, "interventions.without_edges")
    if mask is None:
        raise TypeError("interventions.without_edges: pairs must be a Mask or booleans, got None.")
    return Intervention(edges=~mask)


def _examples(who: str, heads: Array) -> None:
    if heads.ndim < 4:
        raise ValueError(
            f"interventions.{who}: heads must be [B, N, T, Hv] or [L, B, N, T, Hv], got {heads.shape}; capture "
            '"heads" of a batch of examples.'
        )


@dataclass(frozen=True)
class Capture:
    """What is looked at; everything else stays on the fast path.

    Attributes:
      names: any of `attention.CAPTURES`.
      layers: of a stack, in the order in which they are wanted; None: all.
      heads: query heads; for "keys" and "values" those that answer them. None: all.
      rows: indices of queries; "column_sums" are then those of these queries. "keys" and "values" have none. None: all.

    >>> Capture(("weights",), layers=(2,), heads=(0, 5), rows=(-1 + 10,))
    Capture(names=('weights',), layers=(2,), heads=(0, 5), rows=(9,))
    """

    names: tuple[str, ...] = ("weights",)
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None

    def __post_init__(self):
        if isinstance(self.names, str):
            raise TypeError(
                f"attention.apply_captured: capture must be a tuple of names, got {self.names!r}; "
                f"write ({self.names!r},)."
            )
        object.__setattr__(self, "names", tuple(self.names))
        for name in ("layers", "heads", "rows"):
            given = getattr(self, name)
            if given is None:
                continue
            given = tuple(map(int, given))
            if not given or min(given) < 0 or len(set(given)) < len(given):
                raise ValueError(
                    f"interventions.Capture: {name} must be different indices from 0, at least one, got {given}; None "
                    "is all of them."
                )
            object.__setattr__(self, name, given)

    def check(self, who: str, known: Sequence[str], num_heads: int, length: int) -> None:
        """Raise a ValueError for names of what cannot be captured, and for heads and rows that do not exist."""
        unknown = [name for name in self.names if name not in known]
        if unknown:
            raise ValueError(f"{who}: capture must name any of {', '.join(known)}; got {unknown}.")
        for name, indices, size in (("heads", self.heads, num_heads), ("rows", self.rows, length)):
            if indices is not None and max(indices) >= size:
                raise ValueError(
                    f"{who}: capture.{name} must be below {size}, the number of "
                    f"{'heads' if name == 'heads' else 'queries'}, got {indices}."
                )


def as_capture(given: Sequence[str] | Capture) -> Capture:
    """A Capture as it is, names as a Capture of all layers, heads and rows."""
    return given if isinstance(given, Capture) else Capture(given)  # pyright: ignore[reportArgumentType]
