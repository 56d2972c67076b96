"""What attention may not see reaches nothing: the future, empty rows, what is not finite; and no more is hidden."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import SMALL, apply, apply_captured, random_params, small
from reference import numbers
from tiers import tiered

from mhajax import attention, masks, positions
from mhajax.attention import Config


@pytest.mark.parametrize("rotate", tiered([None, positions.rotary], positions.rotary))
def test_causal_by_gradient(rotate):
    params, x, _ = small(leading=())
    out = lambda x: attention.apply(params, x, SMALL, mask=masks.causal(), rotate=rotate)  # noqa: E731
    jacobian = np.abs(jax.jit(jax.jacrev(out))(x)).max(axis=(1, 3))  # [T, T]: of output t with respect to input s
    future = np.triu(np.ones((5, 5), bool), 1)
    assert np.all(jacobian[future] == 0) and np.all(jacobian[~future] > 1e-4)


@pytest.mark.parametrize("bias_instead", [False, True])
def test_a_query_with_nothing_to_attend_to(bias_instead):
    """Exact zeros (plus b_o), zero weights, zero gradients."""
    params, x, memory = small(memory=7)
    mask: Any = np.ones((2, 1, 5, 7), bool)
    mask[0] = False  # a whole example
    mask[1, :, 3] = False  # one query
    nothing = ~np.any(mask, axis=-1)[:, 0]
    options: Any = {"bias": np.where(mask, 0.0, -np.inf)} if bias_instead else {"mask": mask}

    def loss(params, x, memory):
        out, seen = attention.apply_captured(
            params, x, SMALL, memory=memory, capture=("weights", "heads", "contributions"), **options
        )
        return jnp.sum(jnp.where(nothing[..., None], out, 0) ** 2), (out, seen)

    (gradient, x_gradient, memory_gradient), (out, seen) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(
        params, x, memory
    )
    np.testing.assert_array_equal(out[nothing], np.broadcast_to(params.b_o, out[nothing].shape))
    for name in ("weights", "heads", "contributions"):
        rows = np.moveaxis(seen[name], 1, 2)[nothing]
        assert np.all(rows == 0), name
    assert np.all(np.isfinite(out))
    zero = jax.tree.map(lambda g: np.all(np.asarray(g) == 0), gradient._replace(b_o=np.zeros(1)))
    assert all(jax.tree.leaves(zero)), zero
    assert np.all(np.asarray(x_gradient) == 0) and np.all(np.asarray(memory_gradient) == 0)


def test_without_biases_such_a_query_gives_zeros():
    config = Config(d_model=6, num_heads=3)
    out = apply(random_params(config), numbers(1, 2, 5, 6), config, mask=masks.lengths(np.array([0, 3])))
    assert np.all(out[0] == 0) and np.all(out[1] != 0)


SPOILS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("spoil", tiered(SPOILS, "nan"))
@pytest.mark.parametrize("how", ["mask", "bias", "gates"])
def test_what_is_not_finite_in_a_masked_memory_reaches_nothing(spoil, how):
    params, x, memory = small(memory=7)
    spoilt = memory.copy()
    spoilt[0, 4:] = SPOILS[spoil]
    spoilt[1, 6, 2] = SPOILS[spoil]
    lengths = np.array([4, 6])
    visible = np.arange(7) < lengths[:, None, None, None]
    options = {"bias": np.where(visible, 0.5, -np.inf)} if how == "bias" else {"mask": masks.lengths(lengths)}
    if how == "gates":
        options["gates"] = numbers(9, 2, 3)

    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(params, x, memory):
        out = attention.apply(params, x, SMALL, memory=memory, **options)
        return jnp.sum(out**2), out

    loss = jax.jit(loss)
    (value, out), gradient = loss(params, x, spoilt)
    (sound_value, sound_out), sound_gradient = loss(params, x, np.where(np.isfinite(spoilt), memory, 0))
    chex.assert_tree_all_finite((value, out, gradient))
    chex.assert_trees_all_equal((value, out, gradient), (sound_value, sound_out, sound_gradient))


@pytest.mark.parametrize("spoil", tiered(SPOILS, "inf"))
def test_what_is_not_finite_in_the_future_reaches_nothing(spoil):
    """Neither earlier rows, nor the gradient of anything if the loss ignores the spoilt rows."""
    params, x, _ = small()
    spoilt = x.copy()
    spoilt[:, 3] = SPOILS[spoil]
    gates = numbers(9, 2, 3)

    @partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def loss(params, x, gates):
        out = attention.apply(params, x, SMALL, mask=masks.causal(), gates=gates)
        return jnp.sum(out[:, :3] ** 2), out

    loss = jax.jit(loss)
    gradient, out = loss(params, spoilt, gates)
    sound_gradient, sound_out = loss(params, x, gates)
    np.testing.assert_array_equal(out[:, :3], sound_out[:, :3])
    assert np.all(np.isnan(out[:, 3:]))  # those who see it, and the token itself
    chex.assert_tree_all_finite(gradient)
    chex.assert_trees_all_close(gradient, sound_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", tiered([False, True], True))
def test_what_is_not_finite_and_visible_is_not_hidden(masked):
    params, x, memory = small(memory=7)
    memory[0, 2] = np.nan
    mask = masks.lengths(3) if masked else None
    out, seen = apply_captured(params, x, SMALL, memory=memory, mask=mask, capture=attention.CAPTURES)
    assert np.all(np.isnan(out[0])) and np.all(np.isfinite(out[1]))
    for name in ("weights", "heads", "contributions"):
        assert np.all(np.isnan(seen[name][0])) and np.all(np.isfinite(seen[name][1])), name
    assert np.all(np.isnan(seen["logits"][0, :, :, 2])) and not np.any(np.isnan(seen["logits"][1]))

    memory = np.where(np.isnan(memory), 0, memory)
    x[1, 4] = np.inf
    out = np.asarray(apply(params, x, SMALL, memory=memory, mask=mask))
    assert np.all(np.isnan(out[1, 4])) and np.all(np.isfinite(out[0])) and np.all(np.isfinite(out[1, :4]))


@pytest.mark.slow
def test_keys_and_values_given_directly_are_kept_apart_too():
    """A cache's empty slots may hold anything; and NaN of only the keys or only the values is NaN where it is seen."""
    params, x, memory = small(memory=7)
    answers = attention.keys_values(params, memory, SMALL)
    apply_to = jax.jit(partial(attention.apply_to, config=SMALL))
    expected, _ = apply_to(params, x, answers, mask=masks.lengths(4))
    for name in ("k", "v"):
        spoilt = answers._replace(**{name: getattr(answers, name).at[..., 4:, :].set(jnp.nan)})
        out, _ = apply_to(params, x, spoilt, mask=masks.lengths(4))
        np.testing.assert_array_equal(out, expected)
        out, _ = apply_to(params, x, spoilt, mask=masks.lengths(5))
        assert np.all(np.isnan(out))


def test_nan_in_a_bias_is_not_a_mask():
    params, x, _ = small()
    bias = np.zeros((5, 5), np.float32)
    bias[2, 1] = np.nan
    out = np.asarray(apply(params, x, SMALL, bias=bias))
    assert np.all(np.isnan(out[:, 2])) and np.all(np.isfinite(np.delete(out, 2, axis=1)))
    hidden = apply(params, x, SMALL, bias=bias, mask=~np.isnan(bias))
    assert np.all(np.isfinite(hidden))
