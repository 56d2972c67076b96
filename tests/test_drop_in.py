"""Our attention in the place of others': `jax.nn`'s function, and what all of ours refuse.

What the tests of those libraries look at is looked at here, against the library itself where it is right;
test_drop_in_flax.py does it for Flax's layers, drop_in/test_tokamax.py and test_onnx.py with two other yardsticks.
"""

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drop_in_cases import LENGTHS, QUERY_LENGTHS, SEEN, B, H, K, N, S, T, arrays, near
from flax import linen as nn
from flax import nnx
from reference import numbers
from tiers import tiered

from mhajax import drop_in, linen, masks
from mhajax import nnx as our_nnx

pytestmark = pytest.mark.usefixtures("quick_compiles")

jax_nn: Any = jax.nn.dot_product_attention

# name: (options of jax.nn's function, heads of keys and values, dtype)
OPTIONS: dict[str, tuple[dict[str, Any], int, str]] = {
    "nothing": ({}, N, "float32"),
    "grouped": ({}, K, "float32"),
    "one head of keys": ({}, 1, "float32"),
    "scale": ({"scale": 0.7}, K, "float32"),
    "causal, T ≠ S": ({"is_causal": True}, K, "float32"),
    "mask": ({"mask": SEEN}, K, "float32"),
    "mask of examples": ({"mask": SEEN[:, :1]}, K, "float32"),
    "mask of keys": ({"mask": SEEN[:, :1, :1]}, N, "float32"),
    "mask of two axes": ({"mask": SEEN[0, 0]}, K, "float32"),
    "bias": ({"bias": numbers(4, B, N, T, S)}, K, "float32"),
    "bias of heads": ({"bias": numbers(5, 1, N, T, S)}, K, "float32"),
    "window": ({"local_window_size": 2}, K, "float32"),
    "window behind, causal": ({"local_window_size": (3, 1), "is_causal": True}, N, "float32"),
    "window behind and ahead": ({"local_window_size": (1, 3)}, K, "float32"),
    "lengths of keys": ({"key_value_seq_lengths": LENGTHS}, K, "float32"),
    "lengths of both": (
        {"key_value_seq_lengths": LENGTHS, "query_seq_lengths": QUERY_LENGTHS, "is_causal": True},
        K,
        "float32",
    ),
    "all": (
        {"mask": SEEN, "bias": numbers(6, B, N, T, S), "is_causal": True, "scale": 0.2, "local_window_size": (9, 0)},
        K,
        "float32",
    ),
    "bfloat16": ({"mask": SEEN, "is_causal": True}, K, "bfloat16"),
}
BLOCKWISE = ("all", "lengths of both", "bfloat16")  # the others cost a program each, and test_kernels.py has them


def forward_and_back(function, q, k, v, bias):
    """The output, and what a fixed cotangent gives for q, k, v and bias; all as float32."""
    out, back = jax.vjp(function, q, k, v, bias)
    return jax.tree.map(lambda a: a.astype(jnp.float32), (out, *back(jnp.asarray(numbers(9, *out.shape), out.dtype))))


@pytest.mark.parametrize("name", tiered(OPTIONS, "all"))
def test_jax_nn(name):
    """Forward and gradient, by every path; half precision by the rule of flash attention: twice the peer's error."""
    options, kv_heads, dtype = OPTIONS[name]
    options = dict(options)
    bias = options.pop("bias", None)

    @jax.jit
    def run(q, k, v, bias):
        paths = [
            forward_and_back(partial(drop_in.dot_product_attention, implementation=kernel, **options), q, k, v, bias)
            for kernel in (("dense", "blockwise") if name in BLOCKWISE else ("dense",))
        ]
        everybody = {"mask": np.ones((1, 1, T, S), bool)}  # without a mask jax.nn of 0.7 forgets a window
        peer = partial(forward_and_back, partial(jax_nn, **everybody | options), bias=bias)
        exact = peer(*(a.astype(jnp.float32) for a in (q, k, v)))
        return paths, peer(q, k, v) if dtype != "float32" else None, exact

    ours, theirs, exact = run(*arrays(kv_heads, dtype), bias)
    for got in ours:
        if dtype == "float32":
            near(got, exact)
        else:
            for mine, other, truth in zip(*map(jax.tree.leaves, (got, theirs, exact)), strict=True):
                assert np.abs(mine - truth).max() <= 2 * np.abs(other - truth).max() + 1e-5


@pytest.mark.slow
def test_jax_nn_without_batch_and_with_residual():
    q, k, v = (a[1] for a in arrays())
    mask, bias = SEEN[1], numbers(3, N, T, S)
    attend = jax.jit(drop_in.dot_product_attention, static_argnames="return_residual")
    out, residual = attend(q, k, v, bias, mask, return_residual=True)
    near(out, jax.jit(jax_nn)(q, k, v, bias, mask))
    logits = np.einsum("tnh,snh->nts", q, np.repeat(k, N // K, axis=1)) / np.sqrt(H) + bias
    near(residual, np.log(np.sum(np.exp(logits), axis=-1, where=mask)).T)
    near(attend(q, k, v, key_value_seq_lengths=np.array([4])), jax.jit(jax_nn)(q, k[:4], v[:4]))


@pytest.mark.slow
def test_jax_nn_mapped_over_examples_and_shared_arguments():
    q, k, v = arrays()
    bias, mask = numbers(4, B, N, T, S), SEEN[0, :1]
    attend = drop_in.dot_product_attention

    @jax.jit
    def both(q, k, v):
        mapped = jax.vmap(attend, in_axes=(0, 0, 0, 0, None))(q, k, v, bias, mask)
        shared = jax.vmap(attend, in_axes=(0, None, None))(q, k[0], v[0])
        return (mapped, shared[2]), (attend(q, k, v, bias, mask[None]), attend(q[2], k[0], v[0]))

    near(*both(q, k, v))


@pytest.mark.parametrize("kernel", tiered(["dense", "blockwise"], "dense"))
def test_right_where_jax_nn_is_not(kernel):
    """jax.nn gives the mean of all values to a query that sees none, lets NaN through a mask, and makes one of -inf."""
    q, k, v = arrays()
    mask = np.array(SEEN)
    mask[:, :, 1] = False  # a query that sees nothing
    mask[:, :, :, 3] = False  # a key that nobody sees
    attend: Any = partial(drop_in.dot_product_attention, implementation=kernel)
    theirs = jax.jit(lambda q, k, v: jax_nn(q, k, v, mask=np.delete(mask, 3, -1)).at[:, 1].set(0))
    expected = theirs(q, np.delete(k, 3, 1), np.delete(v, 3, 1))
    k, v = k.at[:, 3].set(jnp.nan), v.at[:, 3].set(jnp.inf)

    @jax.jit
    def run(q, k, v, **given):
        (out, residual), back = jax.vjp(lambda *a: attend(*a, **given, return_residual=True), q, k, v)
        return out, residual, back((jnp.ones_like(out), jnp.zeros_like(residual)))

    for given in ({"mask": mask}, {"bias": np.where(mask, 0.0, -np.inf).astype(np.float32)}):
        out, residual, grads = run(q, k, v, **given)
        near(out, expected)
        assert np.all(residual[:, 1] == -np.inf)
        assert all(np.isfinite(grad).all() for grad in grads)
        assert not np.any(grads[0][:, 1]) and not np.any(grads[1][:, 3]) and not np.any(grads[2][:, 3])


def test_values_may_have_a_width_of_their_own_and_masks_need_not_be_arrays():
    q, k, _ = arrays()
    v = numbers(8, B, S, K, 13)
    mask = masks.causal() & masks.lengths(LENGTHS)
    got = jax.jit(drop_in.dot_product_attention)(q, k, v, mask=mask)
    theirs = jax.jit(partial(jax_nn, is_causal=True, key_value_seq_lengths=LENGTHS))
    for part in (slice(0, H), slice(13 - H, 13)):
        near(got[..., part], theirs(q, k, v[..., part]))


Q, KEYS, V = (np.ones(shape, np.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
linen_fn, of_nn = linen.attention_fn, drop_in.dot_product_attention
# what is done: (the function, its arguments, what the message must hold)
ERRORS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "mask of three axes": (of_nn, (Q, KEYS, V), {"mask": SEEN[:, 0]}, ("mask must have 4 axes", "(3, 5, 7)", "[None]")),
    "Flax's too": (linen_fn, (Q, KEYS, V), {"mask": SEEN[:, 0]}, ("mask must have 4 axes", "(3, 5, 7)", "[:, None]")),
    "bias of three axes": (of_nn, (Q, KEYS, V), {"bias": numbers(1, N, T, S)}, ("bias must have 4 axes", "(6, 5, 7)")),
    "heads before tokens": (of_nn, (Q.swapaxes(1, 2), KEYS, V), {}, ("multiple", "(3, 6, 5, 11)", "(3, 7, 2, 11)")),
    "ranks": (linen_fn, (Q, KEYS[0], V), {}, ("same rank", "(7, 2, 11)")),
    "examples": (linen_fn, (Q, KEYS[:2], V[:2]), {}, ("batch dims", "(2, 7, 2, 11)")),
    "lengths": (linen_fn, (Q, KEYS, V[:, 1:]), {}, ("lengths must match", "(3, 6, 2, 11)")),
    "widths": (linen_fn, (Q, KEYS[..., 1:], V), {}, ("depths must match", "(3, 7, 2, 10)")),
    "five axes": (of_nn, (Q[None], KEYS[None], V[None]), {}, ("[B, T, N, H] or [T, N, H]", "jax.vmap")),
    "lengths of others": (of_nn, (Q, KEYS, V), {"key_value_seq_lengths": np.array([1])}, ("[B] = (3,)", "(1,)")),
    "a path of other platforms": (of_nn, (Q, KEYS, V), {"implementation": "cudnn"}, ("cudnn", "GPU", "dense")),
    "products": (linen_fn, (Q, KEYS, V), {"einsum_dot_general": jax.lax.dot_general}, ("einsum_dot_general", "None")),
    "one product": (linen_fn, (Q, KEYS, V), {"qk_attn_weights_einsum": jnp.einsum}, ("qk_attn_weights_einsum",)),
    "the other": (linen_fn, (Q, KEYS, V), {"attn_weights_value_einsum": jnp.einsum}, ("attn_weights_value_einsum",)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    function, inputs, options, parts = ERRORS[name]
    with pytest.raises(ValueError) as caught:
        function(*inputs, **options)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_every_argument_of_the_original_has_a_place():
    """Linen drops what a signature does not name, so none may be missing."""
    for original, adapter in (
        (jax_nn, of_nn),
        (nn.dot_product_attention, linen_fn),
        (nnx.dot_product_attention, our_nnx.attention_fn),
    ):
        theirs, ours = (inspect.signature(f).parameters for f in (original, adapter))
        assert [name for name in theirs if name not in ours] == []
        assert [name for name in theirs if theirs[name].default != ours[name].default] == []
