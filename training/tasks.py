"""Texts made by seed: what the bundled model is taught beside reading.

A document is a list of parts with a loss weight each, in the prompt encoding the router renders: what is asked weighs
little, what is answered counts. The same generator gives the same document; held-out documents come from seeds that
training never draws.
"""

from __future__ import annotations

import functools
import json
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import deepseek_recipe as recipe

BOS, EOS, ASSISTANT = (
    token.default_str() for token in (recipe.SpecialToken.Bos, recipe.SpecialToken.Eos, recipe.SpecialToken.Assistant)
)


@dataclass(frozen=True, slots=True)
class Part:
    """Some text of a document; `answer` where the model is to learn it by heart."""

    text: str
    answer: bool


Document = list[Part]

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mary Noah Olive Peter Rose Sam Tess Will Alice "
    "Bruno Carl Dora Edith Frank Greta Hugo Ida Jonas Karen Lucas Mona Nora Oscar Paula Quinn Ruth Simon Tom"
).split()
PLACES = "forest village harbour castle valley meadow island city mountain garden river market desert bridge".split()
ANIMALS = "fox bear owl cat dog horse mouse hare goose frog crow wolf hen goat duck swan".split()
THINGS = "lantern key map boat bell book coin drum ring rope kite clock basket ladder mirror flute hat shell".split()
COLOURS = "red blue green white black golden silver brown yellow grey".split()
MOODS = "kind brave quiet clever old young tired happy lonely curious patient proud".split()
TOWNS = "Paris London Rome Oslo Cairo Lima Quito Delhi Kyoto Prague Vienna Dublin Boston Athens Geneva Lisbon".split()
JOBS = "baker teacher doctor farmer sailor painter tailor miller smith nurse".split()
WORDS = tuple(THINGS + ANIMALS + COLOURS + PLACES)

CAPITALS = {
    "France": "Paris", "England": "London", "Italy": "Rome", "Norway": "Oslo", "Egypt": "Cairo", "Peru": "Lima",
    "Japan": "Tokyo", "Spain": "Madrid", "Greece": "Athens", "Austria": "Vienna", "Ireland": "Dublin", "Cuba": "Havana",
    "Portugal": "Lisbon", "Germany": "Berlin", "Poland": "Warsaw", "Sweden": "Stockholm",
}  # fmt: skip
FACTS = (
    ("What colour is the sky?", "The sky is blue on a clear day."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("What do bees make?", "Bees make honey."),
    ("Where do fish live?", "Fish live in water."),
    ("What is ice?", "Ice is frozen water."),
    ("When does the sun rise?", "The sun rises in the morning."),
    ("What do we read?", "We read books."),
    ("How many legs has a spider?", "A spider has eight legs."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of day?", "The opposite of day is night."),
    ("What season comes after winter?", "Spring comes after winter."),
)
GREETINGS = ("Hello!", "Hi there.", "Good morning.", "Good evening.", "Hello, how are you?")


def conversation(
    turns: Sequence[tuple[str, str]],
    *,
    system: str = "",
    tools: Sequence[recipe.ToolDefinition] | None = None,
    calls: Sequence[tuple[str, dict[str, object], str]] = (),
) -> Document:
    """Questions and answers as the router renders them; `calls` are tools called with arguments, and what came back,
    before the last answer.
    """
    messages: list[recipe.Message] = [recipe.SystemMessage(system)] if system else []
    for n, (question, answer) in enumerate(turns):
        messages.append(recipe.UserMessage(question))
        if calls and n == len(turns) - 1:
            made = [recipe.ToolCall(f"call_{i}", name, json.dumps(given)) for i, (name, given, _) in enumerate(calls)]
            messages.append(recipe.AssistantMessage("", tool_calls=made))
            messages += [recipe.ToolMessage(result, f"call_{i}") for i, (*_, result) in enumerate(calls)]
        messages.append(recipe.AssistantMessage(answer))
    return split(render(messages, tools))


def render(messages: Sequence[recipe.Message], tools: Sequence[recipe.ToolDefinition] | None = None) -> str:
    """The prompt of a conversation without thinking."""
    made = recipe.Conversation(list(messages), thinking_mode=False, tools=tools)
    return recipe.DeepseekV4Encoding().render_conversation(made).prompt


def split(prompt: str) -> Document:
    """A rendered conversation as questions and answers; an answer goes from behind `</think>` to its EOS."""
    parts: Document = []
    *turns, _ = prompt.split(EOS)  # behind the last is the prompt for an answer that is not there
    for turn in turns:
        before, marker, answer = turn.rpartition(f"{ASSISTANT}</think>")
        parts += [Part(before + marker, False), Part(answer + EOS, True)]
    return parts


# Generators: one document each.


def story(rng: random.Random) -> Document:
    return [Part(f"{BOS}{tale(rng)}{EOS}", True)]


def tale(rng: random.Random) -> str:
    """A short story in plain English: somebody, somewhere, something lost, somebody who helps."""
    name, friend = rng.sample(NAMES, 2)
    beast, mood, place, other = rng.choice(ANIMALS), rng.choice(MOODS), *rng.sample(PLACES, 2)
    thing, colour = rng.choice(THINGS), rng.choice(COLOURS)
    article = "an" if mood[0] in "aeiou" else "a"
    who = f"{article} {mood} {rng.choice((rng.choice(JOBS), beast))} named {name}"
    begin = rng.choice(
        (
            f"Once upon a time there was {who} who lived near the {place}.",
            f"Once upon a time, in a small house by the {place}, there lived {who}.",
            f"Long ago there was {who}, and the {place} was {name}'s home.",
        )
    )
    wish = rng.choice(
        (
            f"{name} had a {colour} {thing} and loved it very much.",
            f"Every morning {name} walked to the {other} with a {colour} {thing}.",
            f"The best thing {name} had was a {colour} {thing}.",
        )
    )
    trouble = rng.choice(
        (
            f"One day the {thing} was gone, and {name} was sad.",
            f"One night a storm came and carried the {thing} away.",
            f"But one evening the {thing} fell into the water near the {other}.",
        )
    )
    search = rng.choice(
        (
            f"{name} looked in the {place} and in the {other}, but could not find it.",
            f"So {name} asked everyone in the {other}, and nobody knew where it was.",
            f"{name} sat down and did not know what to do.",
        )
    )
    help_ = rng.choice(
        (
            f'Then {friend} came and said, "Do not cry, I will help you."',
            f'Then {friend} said, "I saw a {colour} {thing} by the {other}. Come with me."',
            f'"Let us look together," said {friend}, who was kind.',
        )
    )
    found = rng.choice(
        (
            f"They walked to the {other}, and there it was, under a tree.",
            f"They looked all day, and at last they found the {thing}.",
            f"Together they found the {thing} before the sun went down.",
        )
    )
    end = rng.choice(
        (
            f'"Thank you," said {name}, and from that day on they were friends.',
            f"{name} was happy again, and they went home together.",
            f"{name} thanked {friend}, and they shared bread and honey by the fire.",
        )
    )
    return " ".join((begin, wish, trouble, search, help_, found, end))


def chat(rng: random.Random) -> Document:
    turns = []
    name = rng.choice(NAMES)
    for n in range(rng.randint(1, 4)):
        kind = rng.randrange(5)
        if n == 0 and kind == 0:
            turns.append((f"{rng.choice(GREETINGS)} My name is {name}.", f"Hello, {name}! How can I help you today?"))
        elif kind == 1 and turns and name in turns[0][0]:
            turns.append(("What is my name?", f"Your name is {name}."))
        elif kind == 2:
            country, town = rng.choice(list(CAPITALS.items()))
            turns.append((f"What is the capital of {country}?", f"The capital of {country} is {town}."))
        elif kind == 3:
            asked = rng.choice(("Tell me a story.", "Please tell me a short story.", "Can you tell me a story?"))
            turns.append((asked, tale(rng)))
        else:
            turns.append(rng.choice(FACTS))
    return conversation(turns, system=rng.choice(("", "", "You are a helpful assistant.")))


def arithmetic(rng: random.Random) -> Document:
    turns = []
    for _ in range(rng.randint(2, 6)):
        sign, work = rng.choice((("+", operator.add), ("-", operator.sub), ("*", operator.mul)))
        a, b = (rng.randint(0, 12), rng.randint(0, 12)) if sign == "*" else (rng.randint(0, 99), rng.randint(0, 99))
        if sign == "-" and b > a:
            a, b = b, a
        asked = rng.choice((f"What is {a} {sign} {b}?", f"{a} {sign} {b} ="))
        turns.append((asked, f"{a} {sign} {b} = {work(a, b)}"))
    return conversation(turns)


def copying(rng: random.Random) -> Document:
    words = [rng.choice(WORDS) for _ in range(rng.randint(2, 24))]
    if rng.random() < 0.5:
        return conversation([(f"Repeat these words: {' '.join(words)}", " ".join(words))])
    return conversation([(f"Say these words backwards: {' '.join(words)}", " ".join(reversed(words)))])


def extraction(rng: random.Random) -> Document:
    asked, answer = extraction_of(rng)
    return conversation([(asked, json.dumps(answer))], system=rng.choice(("", "Answer in JSON.")))


def extraction_of(rng: random.Random) -> tuple[str, dict[str, object]]:
    """A question whose answer is a JSON object, and that object."""
    name, town, job, age = rng.choice(NAMES), rng.choice(TOWNS), rng.choice(JOBS), rng.randint(5, 90)
    text = rng.choice(
        (
            f"{name} is a {job} from {town} and is {age} years old.",
            f"In {town} there lives a {job} called {name}, aged {age}.",
            f"{name}, {age}, works as a {job} in {town}.",
        )
    )
    whole: dict[str, object] = {"name": name, "age": age, "job": job, "city": town}
    keys = rng.sample(sorted(whole), rng.randint(2, 4))
    return f"{text}\nGive {', '.join(keys)} as JSON.", {key: whole[key] for key in keys}


@functools.cache
def _tools() -> dict[str, recipe.ToolDefinition]:
    def parameters(**kinds: str) -> dict[str, object]:
        properties = {name: {"type": kind} for name, kind in kinds.items()}
        return {"type": "object", "properties": properties, "required": list(kinds)}

    return {
        "get_weather": recipe.ToolDefinition("get_weather", "The weather in a city.", parameters(city="string")),
        "add": recipe.ToolDefinition("add", "Add two numbers.", parameters(a="integer", b="integer")),
        "find_book": recipe.ToolDefinition("find_book", "Find a book by its title.", parameters(title="string")),
    }


def tool_use(rng: random.Random) -> Document:
    kind = rng.choice(sorted(_tools()))
    given: dict[str, object]
    if kind == "get_weather":
        town, sky, warm = rng.choice(TOWNS), rng.choice(("sunny", "cloudy", "rainy", "windy")), rng.randint(-5, 35)
        asked, given = f"What is the weather in {town}?", {"city": town}
        result, answer = f"{sky}, {warm} degrees", f"It is {sky} in {town}, {warm} degrees."
    elif kind == "add":
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        asked, given = f"Please add {a} and {b}.", {"a": a, "b": b}
        result, answer = str(a + b), f"The sum of {a} and {b} is {a + b}."
    else:
        title = f"The {rng.choice(COLOURS).capitalize()} {rng.choice(THINGS).capitalize()}"
        asked, given = f"Find the book {title}.", {"title": title}
        shelf = rng.randint(1, 40)
        result, answer = f"shelf {shelf}", f"{title} is on shelf {shelf}."
    offered = [_tools()[name] for name in sorted({kind, rng.choice(sorted(_tools()))})]
    return conversation([(asked, answer)], tools=offered, calls=[(kind, given, result)])


def question_answer(rng: random.Random) -> Document:
    """A few sentences, and a question they answer."""
    people = rng.sample(NAMES, rng.randint(2, 5))
    owned = dict(zip(people, rng.sample(THINGS, len(people)), strict=True))
    sentences = [f"{name} has the {thing}." for name, thing in owned.items()]
    asked = rng.choice(people)
    if rng.random() < 0.5:
        return conversation([(f"{' '.join(sentences)} What does {asked} have?", f"{asked} has the {owned[asked]}.")])
    return conversation([(f"{' '.join(sentences)} Who has the {owned[asked]}?", f"{asked} has the {owned[asked]}.")])


SHORT: tuple[Callable[[random.Random], Document], ...] = (
    story, chat, chat, arithmetic, copying, extraction, tool_use, question_answer,
)  # fmt: skip


# Needles.


@dataclass(frozen=True, slots=True)
class Needles:
    """A long prompt with hidden facts, and questions for them: (question, answer, what must be in the answer)."""

    haystack: str
    questions: tuple[tuple[str, str, str], ...]

    def document(self) -> Document:
        (first, answer, _), *rest = self.questions
        return conversation([(f"{self.haystack}\n\n{first}", answer), *((q, a) for q, a, _ in rest)])

    def prompt(self) -> str:
        """What the model is asked first, up to where its answer begins."""
        return render([recipe.UserMessage(f"{self.haystack}\n\n{self.questions[0][0]}")])


def needles(rng: random.Random, filler: Sequence[str], facts: int) -> Needles:
    """`facts` secrets, spread over `filler` in random places and asked for in random order."""
    keys = [
        f"{a} of {b}" for a, b in zip(rng.sample(NAMES, facts), (rng.choice(TOWNS) for _ in range(facts)), strict=True)
    ]
    hidden = {key: rng.choice(WORDS) for key in keys}
    pieces = list(filler)
    for key, value in hidden.items():
        pieces.insert(rng.randint(0, len(pieces)), f"The secret word of {key} is {value}.")
    rng.shuffle(keys)
    asked = tuple(
        (f"What is the secret word of {key}?", f"The secret word of {key} is {hidden[key]}.", hidden[key])
        for key in keys
    )
    return Needles("\n".join(pieces), asked)
