"""Sentences put together: more than can be learned by heart, each question about its statement."""

import random
import re

import pytest

from examples.extend_smollm2.number_grammar import GRAMMAR_EN, GRAMMAR_ZH, KINDS

GRAMMARS = {"en": GRAMMAR_EN, "zh": GRAMMAR_ZH}


def draws(grammar, count=3000):
    rng = random.Random(0)
    return [grammar.telling(rng) for _ in range(count)]


def told_things(grammar, kind):
    return [o.replace("{noun}", noun) for o in grammar.objects[kind] for noun in grammar.nouns[kind]]


@pytest.mark.parametrize(("language", "most"), [("en", 1_000_000), ("zh", 50_000)])
def test_there_are_more_sentences_than_a_run_sees(language, most):
    grammar = GRAMMARS[language]
    things = sum(len(set(told_things(grammar, kind))) for kind in KINDS)
    told = sum(len(grammar.words) if "{word}" in statement else 1 for statement, _ in grammar.relations)
    assert things * told * (1 + len(grammar.contexts)) > most
    assert len({relation for pair in grammar.relations for relation in pair}) == 2 * len(grammar.relations)
    made = draws(grammar)
    assert len({telling.statement for telling in made}) > 0.8 * len(made)
    assert {telling.kind for telling in made} == set(KINDS)


@pytest.mark.parametrize("language", GRAMMARS)
def test_question_and_statement_are_about_one_thing_in_one_context(language):
    grammar = GRAMMARS[language]
    in_context = asked_in_context = behind = 0
    for telling in draws(grammar):
        statement, question = telling.statement.lower(), telling.question.lower()
        assert statement.count("{n}") == question.count("{n}") == 1
        assert statement.count("{v}") == 1
        assert "{v}" not in question
        assert not re.search(r"\{(?!n\}|v\})", statement + question), "nothing is left to fill in"
        things = told_things(grammar, telling.kind)
        assert any(thing.lower() in statement and thing.lower() in question for thing in things)
        told = [c for c in map(str.lower, grammar.contexts) if c in statement]
        asked = [c for c in map(str.lower, grammar.contexts) if c in question]
        assert len(told) <= 1
        assert asked in ([], told)
        in_context += len(told)
        asked_in_context += len(asked)
        behind += bool(told) and not statement.startswith(told[0])
        for text, end in ((telling.statement, ".。"), (telling.question, "?？")):
            assert text[-1] in end
            assert text[0] == text[0].upper()
    assert 0.45 < in_context / 3000 < 0.55
    assert 0.45 < asked_in_context / in_context < 0.55
    assert (0.28 < behind / in_context < 0.39) if grammar.asked_last else behind == 0


def test_english_contexts_stand_in_front_or_behind_and_chinese_in_front():
    told, asked = "{it} bears {v}.", "what does {it} bear?"
    assert GRAMMAR_EN.put(told, "in the yearbook", last=False) == "in the yearbook, {it} bears {v}."
    assert GRAMMAR_EN.put(asked, "in the yearbook", last=True) == "what does {it} bear in the yearbook?"
    assert GRAMMAR_ZH.put("{it}重{v}克。", "大火以后", last=True) == "大火以后，{it}重{v}克。"
