"""Scores of short answers: what stands around words does not count, what is in them does."""

import pytest

from cometlm.tasks.scoring import exact, exact_found_f1, found

AROUND = [
    "**{}**",
    "***{}***",
    "_{}_",
    "`{}`",
    "“{}”",
    "„{}“",
    "‘{}’",
    "«{}»",
    "‹{}›",
    "[{}]",
    "{{{}}}",
    "<{}>",
    "({}).",
    "**{}:**",
    "{}…",
]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("answer", ["Paris", "New York", "$1,200", "[b08eff00]", "it's", "8.5%"])
def test_what_surrounds_words_does_not_count(around, answer):
    said = around.format(answer)
    assert exact(said, [answer]) == 1
    assert exact_found_f1(f"The answer is {said} indeed", [answer])["found"] == 1


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("It cost $1200", "$1,200"),
        ("It cost 1.200", "$1,200"),
        ("The code is b08eff001", "[b08eff00]"),
        ("snakecase", "snake_case"),
        ("Parisian", "Paris"),
        ("**", "Paris"),
        ("", "*"),
    ],
)
def test_what_is_in_a_word_counts(said, answer):
    assert found(said, [answer]) == exact(said, [answer]) == 0


def test_three_scores_of_a_short_answer():
    scores = exact_found_f1("It is **Ada**", ["Ada", "Countess Ada"])
    assert scores == {"exact": 0, "found": 1, "f1": pytest.approx(0.5)}
