"""What attention computes, in other words and libraries; how wide a head must be: oracles, rules, whole studies."""

import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from reference import multi_head_attention, numbers, random_params

from experiments.studies import expressiveness, process
from mhajax import attention

SHAPE = attention.Config(d_model=6, num_heads=2)


def test_every_way_computes_the_same_and_a_mistake_shows():
    params, x = random_params(attention.init_params, SHAPE), numbers(1, 2, 5, 6)
    wanted = multi_head_attention(params, x)
    for name in process.available():
        assert_allclose(process.WAYS[name](params, x, SHAPE), wanted, rtol=2e-5, atol=2e-5, err_msg=name)
    turned = params._replace(w_o=params.w_o[::-1])  # the heads in another order
    assert np.abs(process.in_numpy(turned, x, SHAPE) - wanted).max() > 0.1


def test_the_verdict_on_the_process():
    assert process.verdict({"a": [1e-7, 2e-7], "b": [1e-8]}, 1e-6).word == "supported"
    said = process.verdict({"a": [1e-7], "b": [1e-8, 1e-5]}, 1e-6)
    assert said.word == "refuted" and "1.0e-05" in said.because and "“b”" in said.because


def test_the_nearest_logits_give_the_matrix_where_the_rank_is_enough():
    n = 6
    wanted = np.random.default_rng(0).dirichlet(np.ones(n), size=(2, n))
    assert_allclose(expressiveness.attended(*expressiveness.nearest_logits(wanted, n - 1)), wanted, atol=1e-6)
    low = jax.nn.softmax(numbers(3, 1, n, 2) @ numbers(4, 1, 2, n), axis=-1)  # of rank 2, which a width of 3 suffices
    assert_allclose(expressiveness.attended(*expressiveness.nearest_logits(np.asarray(low), 3)), low, atol=1e-5)
    assert np.abs(expressiveness.attended(*expressiveness.nearest_logits(wanted, 2)) - wanted).max() > 1e-2


def test_the_verdicts_on_width():
    words = lambda errors: [one.word for one in expressiveness.verdicts(errors, 1e-6)]  # noqa: E731
    assert words({4: [1e-7, 9e-7], 3: [1e-7, 2e-7], 2: [0.1, 0.2]}) == ["supported", "refuted", "supported"]
    assert words({4: [1e-7, 2e-6], 3: [1e-7, 2e-3], 2: [1e-8, 1e-8]}) == ["refuted", "not resolved", "refuted"]
    assert expressiveness.widths(16) == [1, 2, 4, 8, 14, 15, 16] and expressiveness.widths(4) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: process.Config(num_heads=7), "d_model must be a multiple of num_heads"),
        (lambda: process.Config(draws=0), "draws must be at least 1"),
        (lambda: process.Config(tolerance=0.0), "tolerance must be above 0"),
        (lambda: expressiveness.Config(length=3), "length must be at least 4"),
        (lambda: expressiveness.Config(tolerance=2.0), "tolerance must be above 0"),
    ],
)
def test_bad_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("study", [process, expressiveness])
def test_a_quick_look_answers_and_its_verdicts_follow_from_its_numbers(study):
    config = study.shrink(study.Config())
    answer = study.answer(config)
    result = json.loads(json.dumps(answer.numbers, allow_nan=False))
    assert study.judge(config, result) == answer.verdicts
    for verdict in answer.verdicts:
        assert verdict.claim in answer.page.html()
