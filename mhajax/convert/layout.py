"""What the layouts have in common: names that must be there, sizes that must agree, axes that move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mhajax.attention import Config, Params

Arrays = list[Any]  # of queries, keys, values, output; a bias may be None


def leaves(tree: Any, separator: str = ".", path: str = "") -> dict[str, Any]:
    """Nested dicts as one, {"query.kernel": …}; what is None is not there."""
    if not isinstance(tree, Mapping):
        return {} if tree is None else {path: tree}
    inner = [
        leaves(value, separator, f"{path}{separator}{name}" if path else str(name)) for name, value in tree.items()
    ]
    return {name: leaf for part in inner for name, leaf in part.items()}


def nest(names: Sequence[str], arrays: Arrays, separator: str = ".") -> dict[str, dict[str, Any]]:
    """{"query": {"kernel": …}} of "query.kernel" …; arrays that are None are left out."""
    tree: dict[str, dict[str, Any]] = {}
    for name, array in zip(names, arrays, strict=True):
        if array is not None:
            outer, inner = name.rsplit(separator, 1)
            tree.setdefault(outer, {})[inner] = array
    return tree


def under(who: str, found: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The names that begin with the prefix, without it."""
    inside = {name.removeprefix(prefix): leaf for name, leaf in found.items() if name.startswith(prefix)}
    if not inside:
        raise ValueError(f"{who}: no parameter's name begins with {prefix!r}; the names are {sorted(found)}.")
    return inside


def read(
    who: str, found: Mapping[str, Any], weights: Mapping[str, str], biases: Mapping[str, str], *, some: bool = False
) -> tuple[Arrays, Arrays]:
    """The arrays of these names, in their order; a bias that is not there is None.

    Args:
      who: the function, for errors.
      found: arrays by name.
      weights: axes by name, such as {"query.kernel": "[D, N, H]"}; all must be there.
      biases: axes by name; all or none must be there.
      some: any of the biases may be there.

    Raises:
      ValueError: for names that are missing or unknown, for another number of axes.
      TypeError: for what is not an array.
    """
    present = [name for name in biases if name in found]
    expected = [*weights, *(biases if present and not some else present)]
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"{who}: the parameters must be {', '.join(weights)} and {'any' if some else 'all or none'} of "
            f"{', '.join(biases)}; got {', '.join(sorted(found)) or 'nothing'} "
            f"(missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'})."
        )
    axes = {**weights, **biases}
    arrays = {name: as_array(who, name, found[name]) for name in expected}
    for name, array in arrays.items():
        check_axes(who, name, array, axes[name])
    return [arrays[name] for name in weights], [arrays.get(name) for name in biases]


def as_array(who: str, name: str, value: Any) -> Any:
    """JAX arrays as they are; everything else copied to NumPy, lest a change there is a change here."""
    if isinstance(value, jax.Array):
        return value
    if hasattr(value, "__jax_array__"):  # a variable of nnx
        return value.__jax_array__()
    try:
        array = np.array(np.asarray(value))
    except TypeError as error:
        raise TypeError(f"{who}: {name} must be an array that NumPy can read, got {type(value)}: {error}") from error
    if array.dtype == object:
        raise TypeError(
            f"{who}: {name} must be an array, got {type(value)}; take it out of its box (flax: nn.meta.unbox)."
        )
    return array


def check_axes(who: str, name: str, array: Any, axes: str) -> None:
    """As many axes as are written, "[D, N, H]"."""
    if array.ndim != axes.count(",") + 1:
        raise ValueError(
            f"{who}: {name} must be {axes}, got {array.shape}; layers that are stacked along an axis are converted "
            "under jax.vmap."
        )


def config_of(who: str, params: Params) -> Config:
    """The config that parameters have by their shapes, with None for what is the default.

    Raises:
      ValueError: if the shapes do not agree with each other.
    """
    check_axes(who, "w_q", params.w_q, "[N, D, H]")
    n, d, h = params.w_q.shape
    k, hv = params.w_k.shape[0], params.w_v.shape[-1]
    biased = any(getattr(params, name) is not None for name in ("b_q", "b_k", "b_v", "b_o"))
    expected = {"w_k": ("[K, D, H]", (k, d, h)), "w_v": ("[K, D, Hv]", (k, d, hv)), "w_o": ("[N, Hv, D]", (n, hv, d))}
    if biased:
        expected |= {"b_q": ("[N, H]", (n, h)), "b_k": ("[K, H]", (k, h)), "b_v": ("[K, Hv]", (k, hv))}
        expected |= {"b_o": ("[D]", (d,))}
    for name, (axes, shape) in expected.items():
        array = getattr(params, name)
        if array is None or array.shape != shape:
            raise ValueError(
                f"{who}: {name} must be {axes} = {shape} beside w_q [N, D, H] = {(n, d, h)}, got "
                f"{None if array is None else array.shape}; here x, memory and output have one width D, queries and "
                "keys one width H, keys and values one number of heads K, and biases are on all four or on none."
            )
    return Config(
        d_model=d,
        num_heads=n,
        num_kv_heads=None if k == n else k,
        head_dim=None if n * h == d else h,
        value_dim=None if hv == h else hv,
        use_bias=biased,
    )


def checked(who: str, params: Params, config: Config) -> Params:
    """The parameters as arrays, if they are the config's."""
    arrays: Arrays = [None if a is None else as_array(who, name, a) for name, a in params._asdict().items()]
    params = Params(*arrays)
    own = config_of(who, params)
    if _sizes(own) != _sizes(config):
        raise ValueError(
            f"{who}: params and config do not belong together, the params have {_sizes(own)}, the config "
            f"{_sizes(config)}."
        )
    return params


def refuse_groups(who: str, config: Config) -> None:
    """For layers in which every query head has its own key head."""
    if config.kv_heads != config.num_heads:
        group = config.num_heads // config.kv_heads
        raise ValueError(
            f"{who}: the layer has as many key heads as query heads, got num_heads={config.num_heads} and "
            f"num_kv_heads={config.kv_heads}; jnp.repeat(w, {group}, axis=0) of w_k, w_v, b_k and b_v makes an equal "
            "attention that it can hold."
        )


def refuse_value_dim(who: str, config: Config) -> None:
    """For layers whose values are as wide as their keys."""
    if config.value_width != config.width:
        raise ValueError(
            f"{who}: the layer's values are as wide as its keys, got head_dim={config.width} and "
            f"value_dim={config.value_width}."
        )


def heads_of(who: str, module: Any, num_heads: int | None) -> int:
    """The number of heads that is given, or that the module itself has."""
    own = getattr(module, "num_heads", None)
    if num_heads is None and own is None:
        raise ValueError(f"{who}: num_heads must be given, the shapes of the arrays do not tell it.")
    if None not in (num_heads, own) and num_heads != own:
        raise ValueError(f"{who}: num_heads must be that of the module, {own}, got {num_heads}; leave it out.")
    return own if num_heads is None else num_heads  # pyright: ignore[reportReturnType]


def from_matrices(who: str, weights: Arrays, biases: Arrays, num_heads: int) -> tuple[Params, Config]:
    """Heads side by side in the columns: three of [D, N·H], and [N·Hv, D]; biases [N·H] …, all or none."""
    rows = [*(w.shape[1] for w in weights[:3]), weights[3].shape[0]]
    for name, size in zip(("query", "key", "value", "output"), rows, strict=True):
        if num_heads < 1 or size % num_heads:
            raise ValueError(
                f"{who}: num_heads must divide the width of all heads together, got num_heads={num_heads} and {size} "
                f"in the {name} projection."
            )
    for w, b, name in zip(weights, biases, ("query", "key", "value", "output"), strict=True):
        if b is not None and b.shape != w.shape[1:]:
            raise ValueError(f"{who}: the {name} projection's bias must be {w.shape[1:]}, got {b.shape}.")
    split = lambda w: w.reshape(w.shape[0], num_heads, -1).transpose(1, 0, 2)  # noqa: E731
    heads = lambda b: None if b is None else b.reshape(num_heads, -1)  # noqa: E731
    w_o = weights[3].reshape(num_heads, -1, weights[3].shape[1])
    params = Params(*[*map(split, weights[:3]), w_o, *map(heads, biases[:3]), biases[3]])
    return params, config_of(who, params)


def to_matrices(params: Params) -> tuple[Arrays, Arrays]:
    """The inverse of `from_matrices`."""
    join = lambda w: w.transpose(1, 0, 2).reshape(w.shape[1], -1)  # noqa: E731
    flat = lambda b: None if b is None else b.reshape(-1)  # noqa: E731
    w_o = params.w_o.reshape(-1, params.w_o.shape[-1])
    return [*map(join, params[:3]), w_o], [*map(flat, params[4:7]), params.b_o]


def concatenate(arrays: Arrays) -> Any:
    """One after the other; NumPy's stay NumPy's."""
    return (jnp if any(isinstance(a, jax.Array) for a in arrays) else np).concatenate(arrays)


def _sizes(config: Config) -> dict[str, int | bool]:
    return {
        "d_model": config.d_model, "num_heads": config.num_heads, "num_kv_heads": config.kv_heads,
        "head_dim": config.width, "value_dim": config.value_width, "use_bias": config.use_bias,
    }  # fmt: skip
