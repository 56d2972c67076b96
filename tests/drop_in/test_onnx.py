"""The reference of ONNX's Attention operator, in NumPy, against ours."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from reference import numbers

from mhajax import kernels, masks, scores
from mhajax.masks import tokens

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
B, T, S, PAST, N, K, H, HV = 2, 5, 7, 3, 6, 2, 4, 9
SEEN = np.random.default_rng(0).random((B, N, T, S)) < 0.5
SEEN[:, :, 2] = False  # a query that sees nothing gives zeros there too
BIAS = numbers(3, 1, N, T, S)

# name: (attributes of theirs, the mask they get, options of ours)
CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "grouped heads": ({}, None, {}),
    "scale": ({"scale": 0.3}, None, {"scale": 0.3}),
    "causal, T ≠ S": ({"is_causal": 1}, None, {"mask": masks.causal()}),
    "mask": ({}, SEEN, {"mask": masks.dense(SEEN)}),
    "mask and causal": ({"is_causal": 1}, SEEN, {"mask": masks.dense(SEEN) & masks.causal()}),
    "bias": ({}, BIAS, {"bias": BIAS}),
    "soft cap": ({"softcap": 0.5}, None, {"score": scores.soft_cap(0.5)}),
    "soft cap below a bias": ({"softcap": 0.5}, BIAS, {"bias": BIAS, "score": scores.soft_cap(0.5)}),
}


def theirs(inputs: dict[str, Any], attributes: dict[str, Any]) -> Any:
    """The output of a model of one node."""
    from onnx import helper, reference  # pyright: ignore[reportMissingImports]

    order = ("Q", "K", "V", "attn_mask", "past_key", "past_value")
    outputs = ["Y", "present_key", "present_value"] if "past_key" in inputs else ["Y"]
    node = helper.make_node("Attention", [name if name in inputs else "" for name in order], outputs, **attributes)
    kind = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, kind[name], array.shape) for name, array in inputs.items()],
        [helper.make_tensor_value_info("Y", kind["Q"], None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    return reference.ReferenceEvaluator(model).run(["Y"], inputs)[0]


@pytest.mark.parametrize("kernel", ["dense", "blockwise"])
@pytest.mark.parametrize("name", CASES)
def test_onnx(name, kernel):
    attributes, mask, options = CASES[name]
    q, k, v = numbers(0, B, N, T, H), numbers(1, B, K, S, H), numbers(2, B, K, S, HV)
    expected = theirs({"Q": q, "K": k, "V": v} | ({} if mask is None else {"attn_mask": mask}), attributes)
    options = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    got, _ = kernels.attend(*map(jnp.asarray, (q, k, v)), queries=tokens(T), keys=tokens(S), kernel=kernel, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)
    if mask is SEEN:
        assert not np.any(got[:, :, 2])


def test_onnx_with_keys_of_the_past():
    """Their past is ours where queries have later positions."""
    q, k, v = numbers(0, B, N, T, H), numbers(1, B, K, PAST + T, H), numbers(2, B, K, PAST + T, HV)
    past = {"past_key": k[:, :, :PAST], "past_value": v[:, :, :PAST]}
    expected = theirs({"Q": q, "K": k[:, :, PAST:], "V": v[:, :, PAST:]} | past, {"is_causal": 1})
    queries = tokens(T, np.arange(PAST, PAST + T))
    got, _ = kernels.attend(*map(jnp.asarray, (q, k, v)), queries=queries, keys=tokens(PAST + T), mask=masks.causal())
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)
