"""Where an answer stands in a text, and which spellings of it are the same: both ways, for a wrong
reward of 1 does more harm than a wrong 0.
"""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papo.reward.answers import after_thinking, extract, for_sympy, latex, normalize, only_number
from papo.reward.verifiers import Task, judge, judge_reference


@pytest.fixture(autouse=True)
def quiet(caplog):
    """math-verify warns in every process that its own timeouts are off."""
    caplog.set_level(logging.ERROR, logger="math_verify")


def scores(verifier, how, answer, text, **options):
    value, status, why = judge(verifier, how, 0.99, Task(text, answer, {}, **options))
    assert status == "ok", why
    return value == 1.0


# Extraction


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4 + 5 = 9.", "9"),
        ("1.5.", "1.5"),
        ("it is -3", "-3"),
        ("it is \u22123", "-3"),
        ("it is \u20133", "-3"),
        ("pages 3\u20135", "5"),
        ("a loss of -$5", "-5"),
        ("-\u20ac1,234.50", "-1234.50"),
        ("10-$3", "3"),
        ("5-3", "3"),
        ("10 - 3", "3"),
        ("(2)-3", "3"),
        ("x=-3", "-3"),
        ("x=5,", "5"),
        ("5 - -3", "-3"),
        ("3,000,000", "3000000"),
        ("total 1,234,567.5 units", "1234567.5"),
        ("$1,234.50", "1234.50"),
        (r"1{,}234", "1234"),
        (r"1\,234", "1234"),
        (r"1,\!234", "1234"),
        ("1\u202f234", "1234"),
        ("50%", "50"),
        ("1, 2", "2"),
        ("1,2", "2"),
        ("12,34", "34"),
        ("of .5", ".5"),
        ("the answer is...5", "5"),
        ("v1.2.3", "3"),
        ("2024-05-01", "01"),
        ("5/12/2024", "2024"),
        ("2e-3 m", "2e-3"),
        ("so 1/2", "1/2"),
        ("so -1 / 2.", "-1/2"),
        (r"so $\frac{1}{2}$", "1/2"),
        (r"so $-\dfrac12$", "-1/2"),
        (r"so $3\frac{1}{2}$", "3 1/2"),
        ("48/2 = 24", "24"),
        ("none here", None),
        ("", None),
    ],
)
def test_last_number(text, expected):
    assert extract(text, "last_number") == expected


@pytest.mark.parametrize(
    ("text", "how", "expected"),
    [
        (r"so \boxed{7}", "boxed", "7"),
        (r"\boxed{1} or \boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}"),
        (r"\boxed {5}.", "boxed", "5"),
        (r"$\boxed 5$.", "boxed", "5"),
        (r"so \boxed 5. Done", "boxed", "5"),
        (r"\fbox{5}", "boxed", "5"),
        (r"\boxed{\left\{ x \right.}", "boxed", r"\left\{ x \right."),
        (r"\boxed{1", "boxed", None),
        (r"\boxed{1} and \boxed{2", "boxed", None),
        (r"\boxedfoo{1}", "boxed", None),
        ("7", "boxed", None),
        ("a\n b \n\n", "last_line", "b"),
        ("\n", "last_line", None),
        (" all of it ", "none", "all of it"),
    ],
)
def test_other_extractions(text, how, expected):
    assert extract(text, how) == expected


def test_extract_refuses_unknown_rule():
    with pytest.raises(ValueError, match="first_word"):
        extract("a", "first_word")


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("5", False, "5"),
        ("<think>4</think> 5", False, " 5"),
        ("<think>4</think> 5 <think>6</think> 7", False, " 7"),
        ("4</think> 5", False, " 5"),
        ("4</think> 5", True, " 5"),
        ("<think>4", False, None),
        ("<think>4</think> 5 <think> 6", False, None),
        ("4", True, None),
    ],
)
def test_what_stands_behind_the_thinking(text, opened, expected):
    """A template may open the thinking itself; a completion then only closes it, if it does."""
    assert after_thinking(text, opened) == expected


@pytest.mark.parametrize("how", ["boxed", "last_number", "last_line", "none"])
@pytest.mark.parametrize("verifier", ["exact", "math_verify"])
def test_an_answer_inside_the_thinking_does_not_count(verifier, how):
    right, wrong = r"\boxed{7}", r"\boxed{8}"
    assert not scores(verifier, how, "7", f"<think>{right}</think>\n{wrong}")
    assert not scores(verifier, how, "7", f"{right}</think>\n{wrong}")
    assert not scores(verifier, how, "7", f"<think>\n{right}")
    assert not scores(verifier, how, "7", right, thinks=True)
    assert scores(verifier, how, "7", f"<think>{wrong}</think>\n{right}")


# What is equal


EQUAL = [
    # extract, reference, completion; `exact`
    ("last_number", "1,234", "so 1234"),
    ("last_number", "1234", "so $1,234."),
    ("last_number", "1234", r"so 1{,}234"),
    ("last_number", r"\$40", "$40.00"),
    ("last_number", "$40", "it is 40"),
    ("last_number", "40 dollars", "it is 40"),
    ("last_number", r"40\%", "40 percent"),
    ("last_number", "1e-05", "it is 0.00001"),
    ("last_number", "0.00001", "it is 1e-05"),
    ("last_number", "27.0", "it is 27"),
    ("last_number", "27", "it is 27.00"),
    ("last_number", "0.5", "it is .5"),
    ("last_number", "+5", "it is 5"),
    ("last_number", "-5", "it is \u22125"),
    ("last_number", "1/2", r"it is \frac{1}{2}"),
    ("last_number", r"3\frac{1}{2}", "it is 3 1/2"),
    ("last_number", r"\text{40}", "40"),
    ("boxed", "5", r"\boxed 5"),
    ("boxed", "5", r"\boxed {5.}"),
    ("boxed", "5", r"\fbox{$5$}"),
    ("boxed", "yes", r"\boxed{\text{yes}}"),
    ("boxed", r"\frac{1}{2}", r"\boxed{\dfrac12}"),
    ("boxed", r"\left(1, \dfrac{x}{2}\right)", r"\boxed{(1, \frac{x}{2})}"),
    ("last_line", "5", "so\n**5**"),
    ("none", "1,234", "1234.0"),
    ("none", "-$5", "$-5"),
    ("none", r"40\%", "40"),
    ("none", r"$\frac{1}{2}$", "1/2"),
    ("none", r"\frac{1}{2}", "1/2."),
    ("last_number", "-5", "a loss of -$5"),
    ("last_number", "-$5", "a loss of $-5"),
    ("none", r"\(x\)", r"\[x\]"),
    ("none", "5", r"$\,5\ $"),
    ("none", r"2\pi r", r"2\,\pi r"),
    ("none", "1e99999999999999999999", "1e99999999999999999999"),
]
UNEQUAL = [
    ("last_number", "5", "a loss of -$5"),
    ("last_number", "2", r"it is \frac{1}{2}"),
    ("last_number", "1/2", "it is 3 1/2"),
    ("last_number", "-3", "10 - 3"),
    ("last_number", "3", "it is -3"),
    ("last_number", "5.5", "it is 5"),
    ("last_number", "12", "it is 1,2"),
    ("last_number", "1e5", "it is 1e-5"),
    ("last_number", "1e-05", "it is 1"),
    ("none", "(1,234)", "1234"),
    ("none", "(1,234)", "1,234"),
    ("none", "1,2", "12"),
    ("none", "x^2", "x2"),
    ("none", "x\u00b2", "x2"),
    ("none", "0.5", "1/2"),
    ("none", "1/2", "2/4"),
    ("none", "0101", "101"),
    ("none", "5 cm", "5 m"),
    ("none", "5", "5 cm"),
    ("none", "-5", "- 5"),
    ("none", "Yes", "yes"),
    ("none", "yes", "yes."),
    ("none", "1 0\n0 1", "1 0 0 1"),
    ("none", "0.4", "40%"),
    ("none", "123", r"1\,23"),
    ("none", r"1 \\ 2", r"1 \\2"),
]


@pytest.mark.parametrize(("how", "answer", "text"), EQUAL)
def test_exact_treats_as_equal(how, answer, text):
    assert scores("exact", how, answer, text)


@pytest.mark.parametrize(("how", "answer", "text"), UNEQUAL)
def test_exact_tells_apart(how, answer, text):
    assert not scores("exact", how, answer, text)


MATH_EQUAL = [
    ("none", "1e-05", "it is 1e-05"),
    ("none", "1e-05", r"it is \boxed{10^{-5}}"),
    ("none", "0.00001", r"\boxed{1e-05}"),
    ("none", "1e-8", r"\boxed{10^{-8}}"),
    ("none", "0.6666666667", r"\boxed{\frac23}"),
    ("none", r"\$40", "The answer is $40."),
    ("none", "40", r"The answer is \$40."),
    ("none", r"40\%", "40%"),
    ("none", r"40\%", r"\boxed{0.4}"),
    ("none", "5", r"so \boxed 5."),
    ("none", "5", r"so \boxed {5}."),
    ("none", "5", r"so \fbox{5}."),
    ("none", "5", r"so \boxed{5.}"),
    ("none", "5", "+5"),
    ("none", "-5", "it is \u22125"),
    ("none", "-0.5", "it is -.5"),
    ("none", "1234", r"it is $1\,234$"),
    ("none", "1 1/2", r"\boxed{\frac32}"),
    ("none", r"x^2+1", "x^2+1"),
    ("boxed", "27.0", r"\boxed{27}"),
    ("boxed", "1,234", r"\boxed{1234}"),
    ("boxed", "1234", r"\boxed{1,\!234}"),
    ("boxed", "x=5", r"\boxed{5}"),
    ("boxed", "5", r"\boxed{5\text{ cm}}"),
    ("boxed", r"\sqrt{8}", r"\boxed{2\sqrt2}"),
    ("last_number", "0.5", "it is 1/2"),
]
MATH_UNEQUAL = [
    ("none", "1", "it is 1e-05"),
    ("none", "1", "it is 1e5"),
    ("none", "1e-07", "it is 2e-07"),
    ("none", "1e-8", r"\boxed{10^{-9}}"),
    ("none", "235", r"it is $1\,234$"),
    ("none", "(1,234)", "1234"),
    ("none", "1234", r"\boxed{(1,234)}"),
    ("none", "12", r"\boxed{1,2}"),
    ("none", "x^2", r"\boxed{x2}"),
    ("none", "x\u00b2", r"\boxed{x2}"),
    ("none", "1 1/2", "it is 1"),
    ("boxed", "3", r"\boxed{-3}"),
    ("boxed", "5.5", r"\boxed{5}"),
    ("boxed", "10000000001", r"\boxed{10000000002}"),
]


@pytest.mark.parametrize(("how", "answer", "text"), MATH_EQUAL)
def test_math_verify_treats_as_equal(how, answer, text):
    assert scores("math_verify", how, answer, text)


@pytest.mark.parametrize(("how", "answer", "text"), MATH_UNEQUAL)
def test_math_verify_tells_apart(how, answer, text):
    assert not scores("math_verify", how, answer, text)


SPELLINGS = [
    "{0}",
    "{0:,}",
    "{0:,}.00",
    "${0}",
    r"\${0:,}",
    "${0}$",
    r"\boxed{{{0}}}",
    r"{0}\%",
    "+{0}",
    "{0}.",
    "{0}e0",
]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**12), st.integers(0, 10**12), *[st.sampled_from(SPELLINGS) for _ in range(2)]
)
def test_whole_numbers_are_equal_where_their_values_are(a, b, one, other):
    for n in (a, b, a + 1, 10 * a):
        same = normalize(one.format(a)) == normalize(other.format(n))
        assert same == (n == a)


PIECES = st.sampled_from(
    [*"0123.,-+$%{}\\ /^e(*\n", "\\boxed", "\\frac", "\\text{", "\\fbox ", "\\,", "\u2212", "**"]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=20).map("".join))
def test_any_text_has_a_normal_form(text):
    """Normalizing it again changes nothing, and nothing in a text makes the functions raise."""
    assert normalize(normalize(text)) == normalize(text)
    for how in ("none", "boxed", "last_line", "last_number"):
        extract(text, how)
    for_sympy(text)
    latex(text)


# References


# As GSM8K (behind ####) and mawps (a JSON float) have them.
REAL = ["72", "1,234", "10,000,000", "-3", "43.0", "0.6666666667", "3.33333", "19.02", "387.85"]


@pytest.mark.parametrize(
    ("verifier", "how"),
    [
        ("exact", "last_number"),
        ("exact", "boxed"),
        ("exact", "none"),
        ("math_verify", "none"),
        ("math_verify", "boxed"),
        ("math_verify", "last_number"),
    ],
)
def test_references_as_data_sets_have_them_score_1_against_themselves(verifier, how):
    for answer in [*REAL, r"\$40", "$40", r"40\%", "1e-05", "27.0", "1{,}234"]:
        verdict = judge_reference(verifier, how, 0.99, Task("", answer, {}))
        assert verdict == (1.0, "ok", ""), answer


@pytest.mark.parametrize(
    ("verifier", "how", "answer", "why"),
    [
        ("exact", "last_number", "yes", "finds nothing in it"),
        ("exact", "last_number", "3 or 4", "holds 2 numbers"),
        ("exact", "last_number", "x^2", "part of a formula"),
        ("exact", "last_number", r"\sqrt{8}", "part of a formula"),
        ("math_verify", "last_number", "3x", "part of a formula"),
        ("exact", "last_line", "1 0\n0 1", "scores 0 against itself"),
        ("exact", "boxed", "3 + 4 = 7\n#### 7", "it has 2 lines"),
        ("math_verify", "none", "3 + 4 = 7\n#### 7", "it has 2 lines"),
        ("math_verify", "none", "", "it is empty"),
        ("exact", "none", r"\text{ }", "it is empty"),
        ("math_verify", "none", r"\frac{1}{", "scores 0 against itself"),
    ],
)
def test_a_reference_that_no_completion_can_match_says_why(verifier, how, answer, why):
    verdict = judge_reference(verifier, how, 0.99, Task("", answer, {}))
    assert verdict.value == 0.0 and why in verdict.why


def test_a_references_one_number_may_have_words_and_signs_around_it():
    for text in ("40", "$40", r"\$40", "40 dollars", "x = 40", "#### 40", r"40\%", "40."):
        assert only_number(text) == "40"
    assert only_number("about -1,234.50 m") == "-1234.50"
