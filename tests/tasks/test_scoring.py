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
    "¿{}?",
    "「{}」。",
    "“{}”！",
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
        ("5", "-5"),
        ("50", "50%"),
        ("南京", "北京"),
        ("102", "10²"),
        ("", "*"),
    ],
)
def test_what_is_in_a_word_counts(said, answer):
    assert found(said, [answer]) == exact(said, [answer]) == 0


def test_three_scores_of_a_short_answer():
    scores = exact_found_f1("It is **Ada**", ["Ada", "Countess Ada"])
    assert scores == {"exact": 0, "found": 1, "f1": pytest.approx(0.5)}


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("北京。", "北京"),
        ("Jos\u0065\u0301", "Jos\u00e9"),
        ("１２", "12"),
        ("ไทย", "ไทย"),
    ],
)
def test_other_scripts_and_forms_of_unicode(said, answer):
    assert exact_found_f1(said, [answer]) == {"exact": 1, "found": 1, "f1": 1}


def test_scripts_without_spaces_are_compared_sign_by_sign():
    scores = exact_found_f1("答案是北京。", ["北京"])
    assert scores == {"exact": 0, "found": 1, "f1": pytest.approx(2 * 2 / 7)}
