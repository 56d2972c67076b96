"""tokamax's own tests of attention, run on ours; they are imported from the installed package."""

import unittest

import pytest

# Part of the names of their tests: whether it takes minutes. The rest of a name is a number or a shape.
THEIRS = {
    "test_small_sequences": True,
    "test_causal_mask_q_indices": True,
    "test_causal_mask_k_indices": True,
    "test_padding_mask_with_nans": False,
    "test_self_attention": True,
    "test_cross_attention": True,
    "test_different_output_head_dim": True,
    "test_multi_query_attention": True,
    "test_grouped_query_attention": True,
    "test_no_batch_dim": True,
    "test_multiple_batch_dims": True,
    "test_non_power_of_two": True,
    "test_small_non_power_of_two": True,
    "test_bias": True,
    "test_mask": True,  # and test_mask_api
    "test_causal_mask": True,
    "test_causal_mask_cross_attention": True,
    "test_q_start_end_indices": True,
    "test_padding_mask": True,
    "test_local_attention_mask": True,
    "test_tanh_clipping": True,
    "test_normalize_output": True,
    "test_partial_attention": True,
    "test_quantized": True,  # our adapter widens what is quantised
    "test_dropout": True,  # must be refused: ours is drawn from a key, not handed over
    "test_logits_dtype": True,  # must be refused: logits are float32
    "test_vmap": True,  # they skip it, and the next two
    "test_invalid_shapes": True,
    "test_bench": True,
}


@pytest.fixture(scope="module")
def tests(request) -> type[unittest.TestCase]:
    request.config.addinivalue_line("markers", "long: of tokamax")
    pytest.importorskip("tokamax", reason="tokamax is not installed; it needs a newer jax than our oldest")
    from absl import flags
    from tokamax._src.ops.attention import test_base  # pyright: ignore[reportMissingImports]

    from drop_in import of_tokamax

    if not flags.FLAGS.is_parsed():  # tokamax would read our command line
        flags.FLAGS(["tests"])

    class OnOurs(test_base.AttentionTestBase):
        def __init__(self, *args):
            super().__init__(
                *args,
                attention_fn=of_tokamax.attention,
                supports_dropout=False,
                supports_precisions=False,
                supports_logits_dtype=False,
            )

    return OnOurs


def names(tests: type[unittest.TestCase]) -> list[str]:
    return list(unittest.TestLoader().getTestCaseNames(tests))


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[pytest.mark.slow] if slow else []) for part, slow in THEIRS.items()]
)
def test_tokamax(tests, part):
    result = unittest.TestResult()
    chosen = [name for name in names(tests) if best(name) == part]
    assert chosen, "tokamax has no such test any more"
    for name in chosen:
        tests(name).run(result)
    assert result.testsRun == len(chosen)
    assert [f"{test}\n{trace}" for test, trace in result.failures + result.errors] == []
    if len(result.skipped) == len(chosen):
        pytest.skip(f"tokamax skips it: {result.skipped[0][1]}")


def test_none_of_theirs_is_left_out(tests):
    assert [name for name in names(tests) if best(name) is None] == []


def best(name: str) -> str | None:
    """The longest part that a name begins with."""
    return max((part for part in THEIRS if name.startswith(part)), key=len, default=None)
