"""What attention refuses, and what it says then."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import SMALL, random_params

from mhajax import attention, masks, positions
from mhajax.attention import Config


def call(x=(2, 5, 6), config=SMALL, params=None, memory=None, captured=False, **options):
    """Trace attention of zeros; nothing is computed."""
    zeros = lambda a: jnp.zeros(a) if isinstance(a, tuple) else a  # noqa: E731
    params = (
        jax.eval_shape(partial(attention.init_params, config=SMALL), jax.random.key(0)) if params is None else params
    )
    function = attention.apply_captured if captured else attention.apply
    evaluate = lambda params, x, memory: function(params, x, config, memory=memory, **options)  # noqa: E731
    return jax.eval_shape(evaluate, params, zeros(x), zeros(memory))


def params_with(**shapes):
    params = jax.eval_shape(partial(attention.init_params, config=SMALL), jax.random.key(0))
    return params._replace(**{name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})


ODD = Config(d_model=6, num_heads=2)

# what is done: (kind of error, what its message must hold)
ERRORS = {
    "width of x": (
        lambda: call((2, 5, 7)),
        ValueError,
        ("attention.apply: x must be", "[..., T, D=6]", "(2, 5, 7)", "config.d_model"),
    ),
    "axes of x": (lambda: call((6,)), ValueError, ("x must be [..., T, D=6]", "(6,)")),
    "tokens as x": (lambda: call(jnp.zeros((2, 6), int)), TypeError, ("x must be floating point", "int32", "embed")),
    "width of memory": (
        lambda: call(memory=(2, 7, 5)),
        ValueError,
        ("memory must be [..., S, D=6]", "(2, 7, 5)", "config.d_model"),
    ),
    "leading axes of memory": (
        lambda: call(memory=(7, 6)),
        ValueError,
        ("memory must have the leading axes of x, (2,), got ()", "(2, 5, 6)", "(7, 6)", "broadcast_to"),
    ),
    "w_q": (
        lambda: call(params=params_with(w_q=(2, 6, 2))),
        ValueError,
        ("params.w_q must be [N, D, H] = (3, 6, 2)", "(2, 6, 2)", "do not belong together"),
    ),
    "w_k": (lambda: call(params=params_with(w_k=(3, 6, 2))), ValueError, ("params.w_k", "[K, D, H] = (1, 6, 2)")),
    "w_v": (lambda: call(params=params_with(w_v=(1, 6, 2))), ValueError, ("params.w_v", "[K, D, Hv] = (1, 6, 5)")),
    "w_o": (
        lambda: call(params=params_with(w_o=(3, 2, 6))),
        ValueError,
        ("params.w_o must be [N, Hv, D] = (3, 5, 6)",),
    ),
    "gates": (
        lambda: call(gates=jnp.ones(2)),
        ValueError,
        ("gates must be [N] = (3,) or [..., N] = (2, 3)", "got (2,)"),
    ),
    "gates of another batch": (lambda: call(gates=jnp.ones((3, 3))), ValueError, ("[..., N] = (2, 3)", "got (3, 3)")),
    "dropout without key": (
        lambda: call(dropout_rate=0.25),
        ValueError,
        ("dropout_rate=0.25 needs dropout_key", "for evaluation leave dropout_rate out"),
    ),
    "dropout rate": (
        lambda: call(dropout_rate=1.0, dropout_key=jax.random.key(0)),
        ValueError,
        ("attention.apply: dropout_rate must be in [0, 1), got 1.0",),
    ),
    "capture": (
        lambda: call(captured=True, capture=("weights", "probabilities")),
        ValueError,
        ("attention.apply_captured: capture", *attention.CAPTURES, "got ['probabilities']"),
    ),
    "unknown option": (lambda: call(masks=None), TypeError, ("attention.apply: there is no option 'masks'", "'mask'")),
    "mask per example or per head": (
        lambda: call((3, 5, 6), mask=np.ones((3, 5, 5), bool)),  # B = N: other libraries take it for per head
        ValueError,
        ("[T, S] or [B, N, T, S]", "(3, 5, 5)", "masks.per_example(array)", "masks.per_head(array)"),
    ),
    "mask of numbers": (
        lambda: call(mask=np.ones((5, 5), int)),
        TypeError,
        ("boolean", "True = may attend", "int", "bias="),
    ),
    "mask of floats": (lambda: call(mask=np.zeros((5, 5))), TypeError, ("boolean", "float")),
    "mask too small": (lambda: call(mask=np.ones((4, 5), bool)), ValueError, ("T=5 queries", "written out for 4")),
    "mask of another batch": (
        lambda: call(mask=np.ones((3, 1, 5, 5), bool)),
        ValueError,
        ("mask must broadcast to [..., N, T, S] = (2, 3, 5, 5)", "got (3, 1, 5, 5)", "use 1"),
    ),
    "mask with a batch for x without": (
        lambda: call((5, 6), mask=np.ones((1, 1, 5, 5), bool)),
        ValueError,
        ("[..., N, T, S] = (3, 5, 5)", "got (1, 1, 5, 5)"),
    ),
    "lengths of another batch": (
        lambda: call(mask=masks.lengths(np.array([1, 2, 3]))),
        ValueError,
        ("[..., N, T, S] = (2, 3, 5, 5)", "got (3, 1, 1, 5)"),
    ),
    "bias of another batch": (
        lambda: call(bias=jnp.zeros((4, 1, 5, 5))),
        ValueError,
        ("bias must broadcast to [..., N, T, S] = (2, 3, 5, 5)", "got (4, 1, 5, 5)", "use 1"),
    ),
    "bias per example or per head": (
        lambda: call((3, 5, 6), bias=jnp.zeros((3, 5, 5))),
        ValueError,
        ("bias must be [T, S] or have 4 axes", "(3, 5, 5)", "bias[None]", "bias[:, None]"),
    ),
    "bias of booleans": (lambda: call(bias=jnp.ones((5, 5), bool)), TypeError, ("bias", "bool", "mask=")),
    "positions of another length": (
        lambda: call(positions=jnp.arange(4)),
        ValueError,
        ("positions must be (5,) or (2, 5)", "got (4,)"),
    ),
    "one position": (lambda: call(positions=jnp.zeros(1, int)), ValueError, ("positions", "got (1,)")),
    "positions of the memory": (
        lambda: call(memory=(2, 7, 6), memory_positions=jnp.arange(5)),
        ValueError,
        ("memory_positions must be (7,) or (2, 7)", "got (5,)"),
    ),
    "no memory": (lambda: call(memory=(2, 0, 6)), ValueError, ("memory", "at least one token", "S=0")),
    "mask too large": (lambda: call(mask=np.ones((7, 5), bool)), ValueError, ("T=5 queries", "7", "cut")),
    "mask of too many keys": (lambda: call(mask=np.ones((1, 7), bool)), ValueError, ("S=5 keys", "7")),
    "masks that do not fit": (
        lambda: call(mask=masks.segments(np.zeros(5, int)) & masks.dense(np.ones((4, 5), bool))),
        ValueError,
        ("the same tokens", "T=5", "4"),
    ),
    "b_q": (lambda: call(params=params_with(b_q=(2, 2))), ValueError, ("b_q", "[N, H] = (3, 2)", "(2, 2)")),
    "biases that are not there": (
        lambda: call(params=params_with()._replace(b_o=None)),
        ValueError,
        ("params.b_o must be [D] = (6,)", "None"),
    ),
    "capture as one word": (lambda: call(captured=True, capture="weights"), TypeError, ("tuple", "('weights',)")),
    "odd heads, rotated": (
        lambda: call(config=ODD, params=random_params(ODD), rotate=positions.rotary),
        ValueError,
        ("H=3", "head_dim"),
    ),
    "no heads": (lambda: Config(d_model=6, num_heads=0), ValueError, ("num_heads must be at least 1, got 0",)),
    "negative width": (lambda: Config(d_model=6, num_heads=2, head_dim=-1), ValueError, ("head_dim", "-1")),
    "groups that do not divide": (
        lambda: Config(d_model=12, num_heads=6, num_kv_heads=4),
        ValueError,
        ("multiple of num_kv_heads", "num_heads=6", "num_kv_heads=4"),
    ),
    "heads that do not divide": (
        lambda: Config(d_model=10, num_heads=4),
        ValueError,
        ("d_model must be a multiple of num_heads", "d_model=10", "num_heads=4", "or give head_dim"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name):
    do, kind, parts = ERRORS[name]
    with pytest.raises(kind) as caught:
        do()
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize("mask", [np.ones((7, 7), bool), masks.segments(np.zeros(9, int))])
def test_a_mask_made_for_more_tokens_is_refused(mask):
    with pytest.raises(ValueError):
        call(mask=mask)


def test_every_option_is_documented():
    text = inspect.getdoc(attention.apply) or ""  # without indentation, on every Python
    assert [name for name in inspect.signature(attention.apply).parameters if f"\n  {name}:" not in text] == []
