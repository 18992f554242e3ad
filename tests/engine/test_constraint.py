"""Grammars on a worker: what they allow, that answers replay to the same place, and that a model follows them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine.batch import Sampled, Sequence
from engine.config import EngineConfig
from engine.constraint import KEPT_GRAMMARS, Follower, Grammars
from engine.kernels.sample import sample
from engine.model.tiny import tokenizer_json, write_tiny
from engine.runner import Runner
from engine.sampler import Draws
from tests.engine.speculation import Guesser, Speculator, half_right
from wire.errors import InvalidRequest
from wire.types import SamplingParams

VOCAB_SIZE = 320
EOS = 1
FIRST_CONTROL = 259


def ids(text: str) -> list[int]:
    """The tiny tokenizer has one id per byte, behind BOS, EOS and pad."""
    return [3 + byte for byte in text.encode()]


def allowed(follower: Follower, *drafts: int) -> set[int]:
    mask = follower.mask(drafts)
    assert mask is not None
    assert mask.shape == (VOCAB_SIZE,)
    return set(np.flatnonzero(mask).tolist())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return directory


@pytest.fixture
def grammars(checkpoint: Path) -> Grammars:
    return Grammars(checkpoint, VOCAB_SIZE, (EOS,))


def test_only_what_the_grammar_goes_on_with_is_allowed_and_at_its_end_the_end(grammars: Grammars) -> None:
    follower = grammars.follow('start: "ab" | "ac" "d"?')
    assert allowed(follower) == set(ids("a"))
    follower.push(ids("a"))
    assert allowed(follower) == set(ids("bc"))
    follower.push(ids("c"))
    assert allowed(follower) == {*ids("d"), EOS}
    follower.push(ids("d"))
    assert allowed(follower) == {EOS}
    follower.push([EOS, *ids("x")])
    assert follower.problem == ""


def test_text_never_holds_control_tokens_or_ids_that_stand_for_nothing(grammars: Grammars) -> None:
    tokens = allowed(grammars.follow("start: /(?s:.*)/"))
    assert {token for token in tokens if token >= FIRST_CONTROL} == {263}  # the one that tool calls are written with
    assert 0 not in tokens
    assert EOS in tokens
    assert set(ids("ab\n<")) <= tokens


def test_a_mask_behind_drafts_is_the_one_after_them_and_leaves_the_answer_where_it_was(grammars: Grammars) -> None:
    follower = grammars.follow('start: %json {"enum": ["abc", "abd", "x"]}')
    whole = ids('"abc"')
    follower.push(whole[:1])
    for n in range(1, 5):
        fresh = grammars.follow('start: %json {"enum": ["abc", "abd", "x"]}')
        fresh.push(whole[: 1 + n])
        assert allowed(follower, *whole[1 : 1 + n]) == allowed(fresh)
    assert follower.mask(ids("az")) is None
    assert allowed(follower) == set(ids("ax"))
    assert follower.problem == ""


def test_a_token_that_breaks_the_grammar_is_a_problem_and_not_an_answer(grammars: Grammars) -> None:
    follower = grammars.follow('start: "ab"')
    follower.push(ids("z"))
    assert "can not be followed" in follower.problem


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("start: /(/", "unclosed group"),
        ("start: nothing", "nothing"),
        ('start: %json {"type": "strin"}', "Invalid type: strin"),
        ('start: %json {"not": {"type": "string"}}', "not"),
        ('start: %json {"$ref": "#"}', "no answer satisfies it"),
        ('start: %json {"type": "integer", "minimum": 5, "maximum": 4}', "minimum"),
        ('start: %json {"$ref": "http://127.0.0.1:1/schema"}', "http://127.0.0.1:1/schema"),
    ],
)
async def test_a_grammar_that_can_not_be_followed_is_refused_with_the_reason(
    grammars: Grammars, grammar: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match="grammar: ") as refused:
        async with grammars.hold(grammar):
            pytest.fail("it was held")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.param == "grammar"
    assert len(grammars) == 0


async def test_only_so_many_grammars_are_kept_besides_those_in_use(grammars: Grammars) -> None:
    async with grammars.hold('start: "held"'):
        for i in range(2 * KEPT_GRAMMARS):
            async with grammars.hold(f'start: "{i}"'):
                pass
        assert len(grammars) == KEPT_GRAMMARS + 1
    assert len(grammars) == KEPT_GRAMMARS
    async with grammars.hold(""):
        assert len(grammars) == KEPT_GRAMMARS


def test_a_sequence_that_is_made_again_from_its_tokens_draws_as_before(grammars: Grammars) -> None:
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 6, "maxItems": 6}
    params = SamplingParams(
        max_tokens=99,
        seed=3,
        grammar=f"start: %json {json.dumps(schema)}",
        frequency_penalty=0.5,
        repetition_penalty=1.2,
    )
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((99, VOCAB_SIZE)).astype(np.float32)
    answer: list[int] = []
    kept = Draws(Sequence(request_id="r", sampling=params, slot=1, prompt=(5, 6), answer=answer), (EOS,), grammars)
    while EOS not in answer:
        n = len(answer)
        again = Draws(
            Sequence(request_id="r", sampling=params, slot=1, prompt=(5, 6), answer=list(answer)), (EOS,), grammars
        )
        rows = [kept.row(2 + n, n), again.row(2 + n, n)]
        one, other = sample(logits[[n, n]], rows)
        assert one == other
        # Behind any number of drafts a row is what it is behind the same tokens in the answer.
        for cut in range(max(0, n - 3), n):
            less = Sequence(request_id="r", sampling=params, slot=1, prompt=(5, 6), answer=answer[:cut])
            row = Draws(less, (EOS,), grammars).row(2 + n, n, answer[cut:])
            assert sample(logits[[n]], [row]) == [one]
        answer.append(one.token_id)
        kept.push([one.token_id])
    jsonschema.validate(json.loads(bytes(token - 3 for token in answer[:-1])), schema)


# Random schemas through a model


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose answers are bounded, so that a model of random weights comes to the end of one."""
    kinds = ["string", "integer", "boolean", "enum", "null"] + ["object", "array"] * (depth > 0)
    match rng.choice(kinds):
        case "string":
            return {"type": "string", "maxLength": rng.randrange(1, 6)}
        case "integer":
            least = rng.randrange(-50, 50)
            return {"type": "integer", "minimum": least, "maximum": least + rng.randrange(0, 200)}
        case "boolean":
            return {"type": "boolean"}
        case "null":
            return {"type": "null"}
        case "enum":
            return {"enum": rng.sample(["red", "größe", 'quo"te', 1, 2.5, None, True, [1], {"a": 2}], 3)}
        case "array":
            least = rng.randrange(0, 3)
            items = random_schema(rng, depth - 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randrange(0, 3)}
        case _:
            names = rng.sample(["a", "b", "long name", "ü", "x-y"], rng.randrange(1, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth - 1) for name in names},
                "required": rng.sample(names, rng.randrange(0, len(names) + 1)),
                "additionalProperties": False,
            }


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    model = write_tiny(
        tmp_path_factory.mktemp("models") / "small",
        seed=3,
        layers=(0, 4),
        hidden=64,
        heads=2,
        index_heads=2,
        experts=4,
        mtp=True,
    )
    return Runner.load(EngineConfig(model=model, kv_memory_bytes=160 << 20, max_requests=30))


def answers_of(
    runner: Runner, ways: list[SamplingParams], depth: int = 0, guesser: Guesser | None = None
) -> tuple[list[list[Sampled]], int, int]:
    """What each request answers, eight side by side; drafts tried, and kept."""
    found: list[list[Sampled]] = []
    tried = kept = 0
    for at in range(0, len(ways), 8):
        offset = None if guesser is None else (lambda r, done, at=at: guesser(at + r, done))
        run = Speculator(runner, depth, guesser=offset, ends=(EOS,))
        for sampling in ways[at : at + 8]:
            run.prefill(ids("json"), sampling)
        run.run()
        run.give_back()
        found += [request.drawn for request in run.requests]
        tried += sum(request.tried for request in run.requests)
        kept += sum(request.kept for request in run.requests)
    return found, tried, kept


def test_200_random_schemas_and_seeds_give_json_that_validates_with_drafts_as_without(runner: Runner) -> None:
    rng = random.Random(11)
    schemas: list[dict[str, Any]] = [
        {
            "type": "object",
            "properties": {"one": random_schema(rng), "two": random_schema(rng)},
            "required": ["one", "two"],
            "additionalProperties": False,
        }
        for _ in range(200)
    ]
    ways = [
        SamplingParams(
            max_tokens=600,
            seed=seed,
            temperature=rng.choice([0.0, 0.8, 1.5]),
            top_p=rng.choice([0.9, 1.0]),
            logprobs=True,
            grammar="start: %json " + json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}}),
        )
        for seed, schema in enumerate(schemas)
    ]
    plain, _, _ = answers_of(runner, ways)
    seen = set()
    for schema, drawn in zip(schemas, plain, strict=True):
        answer = [sampled.token_id for sampled in drawn]
        assert answer[-1] == EOS, f"came to no end: {schema}"
        text = bytes(token - 3 for token in answer[:-1]).decode()
        jsonschema.validate(json.loads(text), schema)
        seen.add(text)
    assert len(seen) > 100
    # The draft layer of random weights is refused nearly always, so the drafts are the truth, often enough.
    drafted, tried, kept = answers_of(runner, ways, 3, half_right(plain, VOCAB_SIZE, seed=1))
    assert tried > kept > tried / 3
    for schema, want, got in zip(schemas, plain, drafted, strict=True):
        assert [s for s in got[: len(want)]] == want, f"other with drafts: {schema}"
