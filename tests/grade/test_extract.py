r"""Which part of a completion is its answer."""

import pytest

from s2dcli.grade.extract import asks_for_order, extract, last_box, opens_thinking, text_of_answer, text_of_completion

BOXES = [
    (r"so \boxed{17}", "17"),
    (r"so \boxed 17.", "17"),
    (r"so \fbox{17}", "17"),
    (r"so \boxed {17}", "17"),
    (r"\boxed{3} then \boxed{4}", "4"),
    (r"\boxed{3} then \fbox{4} then prose says 5", "4"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{9} and then \boxed{cut of", "9"),
    (r"\boxed{8 = \boxed{6}}", "6"),
    (r"text \\boxed{5}", "5"),
    (r"$\boxed{7}$ for $x\}$ and {", "7"),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    (r"never opened </think> \boxed{2}", "2"),
    ("\\boxed{" + "{" * 5000 + "1" + "}" * 5001, "{" * 5000 + "1" + "}" * 5000),
]


@pytest.mark.parametrize(("completion", "answer"), BOXES, ids=range(len(BOXES)))
def test_the_last_complete_box_is_the_answer(completion, answer):
    assert extract(completion, False, False) == (answer, "")


@pytest.mark.parametrize(
    "completion",
    [
        "the answer is 4",
        r"\boxed{}",
        r"\boxed{3} oh no \boxed{ }",
        r"\boxed{\frac{1}{2}",
        r"\boxedanswer{4}",
        r"<think> \boxed{4}",
        r"<think>a</think> \boxed{4} <think> wait",
        r"<think> \boxed{4} </think> so four",
        "",
        "\\boxed{" * 2000,
        "\\" * 20000,
    ],
)
def test_no_answer(completion):
    answer, why = extract(completion, False, False)
    assert answer is None
    assert why


def test_a_prompt_that_opens_thinking_needs_its_end():
    assert extract(r"so \boxed{4}", True, False)[0] is None
    assert extract(r"so four </think> \boxed{4}", True, False)[0] == "4"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Question\n<think>\n", True),
        ("Question: think inside <think> and </think>", False),
        ([{"role": "user", "content": "Use <think> tags."}], False),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nLet me"}], True),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>a</think>"}], False),
        (None, False),
        (7, False),
    ],
)
def test_whether_a_prompt_opens_thinking(prompt, expected):
    assert opens_thinking(prompt) is expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Find all $x$ with $x^2=4$.", False),
        ("What are the roots of p?", False),
        ("If f(x) > a for all real values of x, what are a, b and c?", None),
        ("Give the angles in increasing order.", True),
        ("Find all a, b and c, respectively.", True),
        ("What must be done in order to win?", None),
        ([{"role": "system", "content": "in order"}, {"role": "user", "content": "Solve x^2=4"}], False),
        ([], None),
        (None, None),
    ],
)
def test_whether_a_problem_asks_for_an_order(prompt, expected):
    assert asks_for_order(prompt) is expected


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("The answer is 12.", "12"),
        ("Answer: 3\nso the final answer is $\\frac{1}{2}$. Done", r"$\frac{1}{2}$"),
        ("#### 1,200", "1,200"),
        ("**Final Answer**: **42**", "42"),
        ("[Answer: 009\\]", "009"),
    ],
)
def test_lenient_takes_the_last_stated_answer(completion, answer):
    assert extract(completion, False, True) == (answer, "")


def test_lenient_still_prefers_a_box():
    assert extract(r"\boxed{4}. The answer is 5.", False, True)[0] == "4"


def test_completions_come_as_text_and_as_messages():
    assert text_of_completion("a") == "a"
    assert text_of_completion([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]) == "a\nb"
    assert text_of_completion([{"role": "assistant", "content": "a"}, {"role": "tool", "content": r"\boxed{1}"}]) == "a"
    assert text_of_completion([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]) == "a"
    for odd in (None, 5, [None, 5], [{"role": "assistant", "content": None}], {}):
        assert text_of_completion(odd) == ""


def test_gold_answers_come_as_text_and_as_numbers():
    assert [text_of_answer(value) for value in ("05", 5, 0.5, None, True, [1], "")] == ["05", "5", "0.5", "", "", "", ""]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{1} and \boxed{-2}.", "1, -2"),
        (r"\(\boxed{1}\) or \(\boxed{-2}\)", "1, -2"),
        (r"\[\boxed{(2,5)} \quad \text{and} \quad \boxed{(4,1)}\]", "(2,5), (4,1)"),
        (r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$", "1, 2, 3"),
        (r"\boxed{8} \boxed{9}", "8, 9"),
        (r"\boxed 8 or \boxed 9", "8, 9"),
        ("\\boxed{9}\n\n\\boxed{9}", "9"),
        (r"\boxed{9}, \boxed{9}", "9, 9"),
        (r"first \boxed{1}, which by a long argument leads us to \boxed{-2}.", "-2"),
        (r"\boxed{1}, so \boxed{2}", "2"),
        (r"\boxed{1}. \boxed{2}", "2"),
        (r"\frac{1}{2} and \boxed{2}", "2"),
        (r"\boxed{7} no, \boxed{1} and \boxed{2}", "1, 2"),
    ],
)
def test_boxes_that_only_and_or_or_a_comma_joins_are_one_answer(completion, answer):
    assert last_box(completion) == answer


def test_many_joined_boxes_take_no_long():
    assert last_box(r"\boxed{1}, " * 20_000).count("1") == 20_000
    assert last_box("\\boxed{1}" + " ," * 50_000 + "\\boxed{2}") == "2"
