"""The two scores of a translator: right on a worked example, and refused where there is nothing to score."""

import pytest

from experiments import translation


@pytest.mark.parametrize("score", [translation.bleu, translation.chrf])
def test_scores_and_what_has_none(score):
    text = ["the old man reads a book", "she sings"]
    value, signature = score(text, text)
    assert value == pytest.approx(100) and "version" in signature
    assert score(text, text[::-1])[0] < 30
    for outputs, references, part in (
        ([], [], "at least one sentence"),
        (text, text[:1], "got 2 and 1"),
        ([], text, "got 0 and 2"),
        ("text", text, "got one text"),
    ):
        with pytest.raises(ValueError, match=part) as caught:
            score(outputs, references)
        assert f"translation.{score.__name__}: " in str(caught.value)
