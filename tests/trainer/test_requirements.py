"""What users of other trainers ran into, as numbered requirements, each with a test of its own.

A test names the requirements it holds in its name (`test_requirement_6_7_...`) or in the first line
of its docstring ("Requirement 6: ..."). The numbers are those of our survey of complaints; the
missing ones concern what this trainer does not have.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REQUIREMENTS = {
    1: "the fused head under ZeRO-3 on two ranks gives the unfused loss's update (TRL 3368)",
    2: "the head's gradient arrives though its gather has ended, or there is an error (TRL 6372)",
    3: "evaluating before the first training step works under ZeRO-3 (TRL 6384)",
    4: "sampling gathers whole weights once, and logs how long that takes (TRL 3858)",
    6: "ranks with unequal numbers of micro-batches do not hang (ms-swift 8102)",
    7: "a rank whose completions are all filtered away does not hang the others (trlx 373)",
    8: "an exhausted sampling budget follows a stated policy (DAPO 22)",
    9: "rows keep their identity through dynamic sampling (NeMo-RL 3794)",
    10: "zero spread is the range of the rewards, not their float std; it is logged (NeMo-RL 4158)",
    11: "a loss of 0 is shown beside what tells that training works, and explained (TRL 3452)",
    12: "a None or NaN reward masks its row alone and is counted (ms-swift 8123)",
    13: "a group of one is refused: its std is NaN (DeepAnalyze 116)",
    14: "a fully masked batch has loss 0 and finite gradients (TRL 3248, 6369)",
    15: "ranks, micro-batches and accumulation change nothing (TRL 5619, ms-swift 10117)",
    16: "entropy, logp and polarity are at the sampling temperature (OpenRLHF 1319)",
    17: "entropy is not negative and covers exactly the loss's tokens (TRL 6121, 5620)",
    18: "memory of a step does not grow with tokens times vocabulary (TRL 4013, 3678)",
    19: "entropy neither collapses nor explodes (verl 5953, 2738)",
    20: "a resumed run is the unbroken run (open-instruct 1523, TRL 5863)",
    21: "the first rollout after a resume uses the restored weights (TRL 3247)",
    22: "a checkpoint loads under another stage and number of ranks (OpenRLHF 891)",
    26: "the first update's ratio is exactly 1 (TRL 6789)",
    27: "a tied head trains its embedding and is saved once (labs-molt 26, vLLM 51665)",
    28: "a sequence's logp depends on neither padding nor batch mates (TRL 2708, 6800)",
    29: "token in, token out: masks have the length of the sampled ids (TRL 5224, 5144)",
    30: "masks are never inferred from ids: padding may be the end of a sequence (TRL 4974)",
    31: "rewards time out without SIGALRM, off the main thread too (verl 5635, 5839)",
    32: "hung verifiers never use the workers up (AReaL 1426)",
    34: "every completion is written once, without a tracker (TRL 3217, 2948)",
}
TESTS = Path(__file__).parents[1]


def named_in(function: ast.FunctionDef) -> set[int]:
    """The requirements that a test's name and the first line of its docstring give."""
    first_line = (ast.get_docstring(function) or "").split("\n")[0]
    in_name = re.findall(r"_requirement((?:_\d+)+)", function.name)
    in_docstring = re.findall(r"\b[Rr]equirements? ((?:\d+(?:, | and )?)+)", first_line)
    return {int(n) for text in in_name + in_docstring for n in re.findall(r"\d+", text)}


def requirements_by_test() -> dict[str, set[int]]:
    """The requirements of every test of the trainer."""
    return {
        f"{path.name}::{node.name}": named_in(node)
        for folder in ("trainer", "distributed")
        for path in (TESTS / folder).glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_numbers_are_read_from_names_and_docstrings() -> None:
    source = '''
def test_requirement_3_14_a(): pass
def test_b(): "Requirements 31, 32 and 34: five 5."
def test_c():
    """Nothing.

    Requirement 7."""
'''
    found = [named_in(node) for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert found == [{3, 14}, {31, 32, 34}, set()]


@pytest.mark.parametrize("number", REQUIREMENTS)
def test_every_requirement_has_a_test(number: int) -> None:
    assert any(number in numbers for numbers in requirements_by_test().values()), REQUIREMENTS[
        number
    ]


def test_no_test_names_a_requirement_that_is_not_listed() -> None:
    unlisted = {name: n - set(REQUIREMENTS) for name, n in requirements_by_test().items()}
    assert {name: numbers for name, numbers in unlisted.items() if numbers} == {}
