"""From messages to token ids: the template's variables, what a tokenizer adds itself, and prompts
too long to be tokenized.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from papo.config import DataConfig
from papo.data.problems import ProblemSource
from papo.data.prompts import PromptEncoder
from papo.rollout import HFSampler, SamplingParams
from papo.types import Problem
from tests.trainer.tiny import CHAT_TEMPLATE, build_tokenizer, small_llama

QUESTION = ({"role": "user", "content": "2+2?"},)
THINKING = CHAT_TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}",
)
END, START = "<|im_end|>", "<|im_start|>"


def encoded(tokenizer, **options) -> str:
    encoder = PromptEncoder(tokenizer, options.pop("max_tokens", 100), options)
    return tokenizer.decode(encoder.encode(QUESTION))


def adding(pattern: str, chat_template: str | None = None):
    """A tokenizer whose post-processor adds special tokens, as `add_bos_token` and `add_eos_token`
    do."""
    tokenizer = build_tokenizer(chat_template)
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (START, END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=pattern, special_tokens=ids
    )
    return tokenizer


@pytest.mark.parametrize("value", [True, False])
def test_thinking_is_an_argument_of_the_template(value, caplog):
    tokenizer = build_tokenizer(THINKING)
    with caplog.at_level(logging.WARNING, logger="papo.data.prompts"):
        assert encoded(tokenizer, enable_thinking=value).endswith("<think></think>") is not value
    assert not caplog.text


def test_argument_that_the_template_does_not_know_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="papo.data.prompts"):
        encoded(build_tokenizer(THINKING), enable_thinkng=False)
    assert "data.chat_template_args.enable_thinkng=False: the chat template knows no such name" in (
        caplog.text
    )


def test_thinking_reaches_the_problems(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "2+2?", "answer": 4}\n')
    config = DataConfig(
        source="jsonl",
        train_path=str(tmp_path / "x.jsonl"),
        held_out_size=0,
        chat_template_args={"enable_thinking": False},
    )
    tokenizer = build_tokenizer(THINKING)
    (problem,) = ProblemSource(config, tokenizer, seed=0).batch(0, 1)
    assert tokenizer.decode(problem.prompt_ids).endswith("<think></think>")


def test_end_that_the_tokenizer_appends_is_left_out_and_said_once(caplog):
    tokenizer = adding(f"$A {END}")
    encoder = PromptEncoder(tokenizer, 4)
    with caplog.at_level(logging.WARNING, logger="papo.data.prompts"):
        for _ in range(3):
            assert tokenizer.decode(encoder.encode(QUESTION)) == "2+2?"
    said = f"the tokenizer appends its end-of-sequence token '{END}' to prompts: left out"
    assert caplog.text.count(said) == 1


def test_end_that_the_template_writes_is_kept_and_said(caplog):
    """As in DialoGPT's, whose turns end so and have no other mark."""
    tokenizer = build_tokenizer("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    with caplog.at_level(logging.WARNING, logger="papo.data.prompts"):
        assert encoded(tokenizer) == f"2+2?{END}"
    assert f"prompts end in the end-of-sequence token '{END}', written by the chat" in caplog.text


def test_end_of_a_turn_before_the_generation_prompt_is_nothing_to_say(caplog):
    with caplog.at_level(logging.WARNING, logger="papo.data.prompts"):
        text = encoded(build_tokenizer())
    assert text.count(END) == 1 and text.endswith("assistant\n") and not caplog.text


def test_beginning_of_sequence_is_written_once():
    """By the template alone where there is one, else by the tokenizer."""
    pattern = f"{START} $A"
    template = "{{ '<|im_start|>' }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for chat_template in (template, None):
        assert encoded(adding(pattern, chat_template)) == f"{START}2+2?"


class Counting:
    """A tokenizer that counts what it tokenizes."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self.characters = 0

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options):
        self.characters += len(text)
        return self._tokenizer(text, **options)

    def apply_chat_template(self, messages, *, tokenize: bool, **options):
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return self(text, add_special_tokens=False) if tokenize else text


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE])
def test_30_mb_line_is_refused_before_it_is_tokenized(tmp_path, chat_template):
    path = Path(tmp_path / "x.jsonl")
    rows = [{"prompt": f"{i} + 1?", "answer": i + 1} for i in range(3)]
    rows.append({"prompt": "many words " * (30_000_000 // 11), "answer": 0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Counting(build_tokenizer(chat_template))
    config = DataConfig(source="jsonl", train_path=str(path), held_out_size=1)
    source = ProblemSource(config, tokenizer, seed=0)
    assert source.dropped_long == 1 and len(source) == 2
    assert 0 < tokenizer.characters < 1000


def test_long_messages_that_the_template_shortens_are_kept():
    """As templates that drop the reasoning of earlier turns."""
    tokenizer = build_tokenizer("{{ messages[-1]['content'] }}")
    long = {"role": "assistant", "content": "x" * 100_000}
    assert len(PromptEncoder(tokenizer, 4).encode((long, *QUESTION))) == 4
    assert PromptEncoder(tokenizer, 3).encode((long, *QUESTION)) is None


def test_marks_of_thinking_stay_in_the_text_where_they_are_special_tokens():
    """Without them an answer inside the thinking would count, and one after it might not."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", START]})
    model = small_llama(0, vocab_size=len(tokenizer)).eval()
    problem = Problem(0, QUESTION, "4", {}, tuple(tokenizer("2+2?")["input_ids"]))
    sampler = HFSampler(tokenizer, [tokenizer.eos_token_id], tokenizer.eos_token_id)
    found = sampler.sample(model, [problem], 32, SamplingParams(24), [0])
    marks = {tokenizer.convert_tokens_to_ids(t): t for t in ("<think>", "</think>")}
    sampled = [[marks[i] for i in c.response_ids if i in marks] for c in found]
    assert any(sampled)
    assert sampled == [re.findall("</?think>", c.text) for c in found]
    assert not any(START in c.text or "<unk>" in c.text for c in found)


def test_special_tokens_in_a_completions_text_are_an_option():
    """Reward functions may look for such tokens; the end of the sequence is never among them."""
    tokenizer = build_tokenizer()
    model = small_llama(0, vocab_size=len(tokenizer)).eval()
    end = tokenizer.eos_token_id
    problem = Problem(0, QUESTION, "4", {}, tuple(tokenizer("2+2?")["input_ids"]))
    texts = {}
    for skip in (True, False):
        sampler = HFSampler(tokenizer, [end], end, skip_special_tokens=skip)
        found = sampler.sample(model, [problem], 32, SamplingParams(24), [0])
        texts[skip] = [c.text for c in found]
    assert any(not c.truncated for c in found)
    assert any(START in text for text in texts[False])
    assert not any(END in text for text in texts[False])
    assert [text.replace(START, "").replace("<unk>", "") for text in texts[False]] == texts[True]
