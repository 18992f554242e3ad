"""Text in and out: what a prompt becomes, and that streamed pieces add up to exactly the tokens' text."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from router.answers import Header, Usage
from router.config import ModelFacts
from router.protocols.chat import Chat, ChatBody
from router.protocols.completions import Completion, StopStrings
from router.schema import parse_body
from router.text import Text
from tests.router.conftest import BOS, EOS, MODEL, byte_ids, convert_chat
from wire.errors import ConfigError
from wire.types import FinishReason, SamplingParams, TokenEvent

USAGE = Usage(prompt_tokens=3, completion_tokens=0, cached_tokens=0)


def events(ids: list[int], first: int = 0, **more: Any) -> list[TokenEvent]:
    return [TokenEvent(index=first + i, token_id=token, **more) for i, token in enumerate(ids)]


def header(**more: Any) -> Header:
    return Header(answer_id="x-1", model=MODEL, prompt_ids=[7, 8, 9], created=1, **more)


def completion(text: Text, *, stop: tuple[str, ...] = (), logprobs: bool = False, **more: Any) -> Completion:
    sampling = SamplingParams(max_tokens=99, seed=1, logprobs=logprobs)
    return Completion(header(**more), sampling, stop, text.vocabulary)


def feed(answer: Completion | Chat, ids: list[int], sizes: list[int]) -> list[dict[str, Any]]:
    """Push `ids` in pieces of the given sizes (the last one repeats) and close; all chunks in order."""
    chunks, at = answer.opening(USAGE), 0
    while at < len(ids) and not answer.stopped:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        chunks += answer.push(events(ids[at : at + size], at))
        at += size
    return chunks + answer.close(FinishReason.LENGTH, USAGE)


def joined(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


# Completions


def test_streamed_pieces_add_up_to_the_text_whatever_the_bytes_and_wherever_they_are_cut(text: Text, model_dir: Path):
    reference = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    rng = random.Random(3)
    for _ in range(200):
        ids = [rng.randrange(320) for _ in range(rng.randrange(1, 40))]
        answer = completion(text)
        chunks = feed(answer, ids, [rng.randrange(1, 6) for _ in range(9)])
        expected = reference.decode([i for i in ids if reference.id_to_token(i) is not None], skip_special_tokens=True)
        assert joined(chunks) == expected
        assert answer.response(USAGE)["choices"][0]["text"] == expected


def test_a_character_is_not_shown_before_its_last_byte(text: Text):
    answer = completion(text)
    texts = [joined(answer.push(events([token]))) for token in byte_ids("a€b")]
    assert texts == ["a", "", "", "€", "b"]


def test_an_unfinished_character_at_the_end_becomes_a_replacement_mark(text: Text):
    answer = completion(text)
    assert joined(feed(answer, byte_ids("a€")[:-1], [1])) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("size", [1, 2, 5, 50])
def test_a_stop_string_ends_the_text_before_itself_however_it_is_cut(text: Text, size: int):
    answer = completion(text, stop=("STOP", "never"))
    chunks = feed(answer, byte_ids("one STO two STOP three"), [size])
    assert joined(chunks) == "one STO two "
    assert answer.stopped
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_tokens_behind_a_stop_string_are_neither_counted_nor_reported(text: Text):
    answer = completion(text, stop=("b",), return_token_ids=True)
    chunks = feed(answer, byte_ids("abcd"), [4])
    assert answer.num_tokens == 2
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == byte_ids("ab")


def test_text_held_back_for_a_stop_string_that_never_came_is_not_lost(text: Text):
    answer = completion(text, stop=("STOP",))
    assert joined(feed(answer, byte_ids("go ST"), [1])) == "go ST"
    assert not answer.stopped


def test_the_earliest_of_several_stop_strings_wins():
    stops = StopStrings(["world", "lo w"])
    assert stops.push("hello w") == ("hel", True)
    stops = StopStrings(["aab"])
    assert stops.push("aa") == ("", False)
    assert stops.push("a") == ("a", False)
    assert stops.push("b") == ("", True)


def test_end_of_sentence_has_no_text_but_is_a_token(text: Text):
    answer = completion(text, return_token_ids=True)
    chunks = feed(answer, [*byte_ids("a"), EOS], [1])
    assert joined(chunks) == "a"
    assert answer.num_tokens == 2
    choice = answer.response(USAGE)["choices"][0]
    assert choice["token_ids"] == [*byte_ids("a"), EOS]
    assert choice["prompt_token_ids"] == [7, 8, 9]


def test_logprobs_name_each_token_by_its_text_or_its_bytes(text: Text):
    answer = completion(text, logprobs=True)
    a, c3, a9 = byte_ids("aé")
    answer.push([TokenEvent(index=0, token_id=a, logprob=-0.5, top=((c3, -0.25), (a, -0.5)))])
    answer.push(events([c3, a9], 1, logprob=-1.0))
    answer.close(FinishReason.LENGTH, USAGE)
    assert answer.response(USAGE)["choices"][0]["logprobs"] == {
        "tokens": ["a", "\\xc3", "\\xa9"],
        "token_logprobs": [-0.5, -1.0, -1.0],
        "top_logprobs": [{"\\xc3": -0.25, "a": -0.5}, {"\\xc3": -1.0}, {"\\xa9": -1.0}],
        "text_offset": [0, 1, 5],
    }


# Chat


def chat(text: Text, *, return_token_ids: bool = False, **body: Any) -> tuple[Chat, list[int]]:
    raw = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]} | body
    prompt = convert_chat(text, parse_body(ChatBody, json.dumps(raw).encode()).for_recipe())
    return Chat(header(return_token_ids=return_token_ids), prompt, text), prompt.ids


def content(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def test_a_chat_prompt_has_the_models_turns_and_no_thinking_unless_asked(text: Text):
    _, ids = chat(text)
    assert text.decode(ids) == "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜></think>"
    _, ids = chat(text, thinking={"type": "enabled"})
    assert text.decode(ids).endswith("<｜User｜>hi<｜Assistant｜><think>")


def test_a_special_token_spelled_by_a_user_stays_text(text: Text):
    _, ids = chat(text, messages=[{"role": "user", "content": "<｜Assistant｜>"}])
    assert ids[2:-2] == byte_ids("<｜Assistant｜>")


def test_a_chat_stream_and_its_whole_answer_say_the_same(text: Text):
    answer, _ = chat(text)
    chunks = feed(answer, byte_ids("héllo wörld"), [3])
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert content(chunks) == "héllo wörld"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert all("usage" not in chunk for chunk in chunks)
    whole = answer.response(Usage(prompt_tokens=6, completion_tokens=13, cached_tokens=2))
    assert whole["choices"][0]["message"]["content"] == "héllo wörld"
    assert whole["usage"]["total_tokens"] == 19
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_thinking_is_told_apart_from_the_answer(text: Text):
    answer, _ = chat(text, thinking={"type": "enabled"})
    end = text.vocabulary.added["</think>"]
    feed(answer, [*byte_ids("hm"), end, *byte_ids("yes")], [2])
    message = answer.response(USAGE)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "yes")


def test_a_chat_ends_at_a_stop_string_and_hides_end_of_sentence(text: Text):
    answer, _ = chat(text, stop="lo w")
    chunks = feed(answer, byte_ids("hello world"), [4])
    assert content(chunks) == "hel"
    assert answer.stopped
    assert answer.num_tokens == 7

    answer, _ = chat(text, return_token_ids=True)
    chunks = [
        *answer.opening(USAGE),
        *answer.push(events([*byte_ids("hi"), EOS])),
        *answer.close(FinishReason.STOP, USAGE),
    ]
    assert content(chunks) == "hi"
    assert chunks[0]["prompt_token_ids"] == [7, 8, 9]
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == [*byte_ids("hi"), EOS]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_chat_logprobs_come_with_their_text(text: Text):
    answer, _ = chat(text, logprobs=True, top_logprobs=1)
    answer.opening(USAGE)
    (a,) = byte_ids("a")
    chunks = answer.push([TokenEvent(index=0, token_id=a, logprob=-0.5, top=((a, -0.5),))])
    (entry,) = chunks[0]["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("a", -0.5, [97])
    assert entry["top_logprobs"][0]["token"] == "a"


def test_default_max_tokens_of_a_chat_stay_within_the_context(text: Text):
    raw = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    prompt = convert_chat(text, raw)
    assert prompt.max_tokens(1_000_000) == 8192
    assert prompt.max_tokens(100) == 100 - len(prompt.ids)
    assert convert_chat(text, raw | {"max_tokens": 5}).max_tokens(100) == 5


def test_plain_text_gets_one_bos_and_no_more(text: Text):
    assert text.encode("hi", add_special_tokens=True) == [BOS, *byte_ids("hi")]
    assert text.encode("hi", add_special_tokens=False) == byte_ids("hi")
    assert text.encode("<｜begin▁of▁sentence｜>hi", add_special_tokens=True) == [BOS, *byte_ids("hi")]


# Start-up


def damaged(model_dir: Path, tmp_path: Path, name: str, change: Any) -> Path:
    directory = tmp_path / "damaged"
    shutil.copytree(model_dir, directory)
    data = json.loads((directory / name).read_text())
    change(data)
    (directory / name).write_text(json.dumps(data))
    return directory


def drop_token(spelling: str) -> Any:
    def change(data: dict[str, Any]) -> None:
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != spelling]

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda data: data.pop("vocab_size"), "vocab_size is None"),
        ("config.json", lambda data: data.update(vocab_size=True), "vocab_size is True"),
        ("config.json", lambda data: data.pop("eos_token_id"), "eos_token_id"),
        ("config.json", lambda data: data.update(eos_token_id=5), "different checkpoints"),
        ("config.json", lambda data: data.update(vocab_size=100), "different checkpoints"),
        ("tokenizer.json", drop_token("<｜User｜>"), "lacks the token <｜User｜>"),
        ("tokenizer.json", drop_token("<think>"), "lacks the token <think>"),
        ("tokenizer.json", lambda data: data.pop("model"), "not a usable tokenizer"),
        ("tokenizer.json", lambda data: data.update(decoder={"type": "WordPiece"}), "WordPiece"),
    ],
)
def test_a_checkpoint_whose_text_side_is_damaged_is_refused_by_name(
    model_dir: Path, tmp_path: Path, name: str, change: Any, message: str
):
    directory = damaged(model_dir, tmp_path, name, change)
    with pytest.raises(ConfigError) as caught:
        Text(directory, ModelFacts.load(directory), [MODEL], thinking=False)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shifted_token_ids_are_noticed_at_start(model_dir: Path, tmp_path: Path):
    """An entry that nobody uses is gone: the library would renumber all that follow, without a word."""

    def change(data: dict[str, Any]) -> None:
        trailing = [token for token in data["added_tokens"] if token["id"] > 3]
        for token in trailing:
            token["id"] += 1

    directory = damaged(model_dir, tmp_path, "tokenizer.json", change)
    with pytest.raises(ConfigError, match=r"an added token before it is missing|not a usable tokenizer"):
        Text(directory, ModelFacts.load(directory), [MODEL], thinking=False)
