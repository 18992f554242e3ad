"""From the constraint that deepseek-recipe reads in a request to a grammar, and whether that grammar is any good.

Clients write schemas and regular expressions, so they are compiled in a child process that may be killed: one that
takes too long or too much memory is refused, and no worker ever sees it.
"""

from __future__ import annotations

import hashlib
import json
import resource
import selectors
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llguidance import regex_to_lark

from wire.errors import InvalidRequest, Overloaded, PenumbraError
from wire.grammar import DSML, compile_grammar, load_tokenizer

Json = dict[str, Any]

MAX_SOURCE_CHARS = 64 << 10
COMPILE_S = 2.0
START_S = 30.0
CHILD_MEMORY_BYTES = 4 << 30
KEPT_VERDICTS = 1024

# Compact, as Python and DeepSeek's own examples print it; any more whitespace a model could go on with for ever.
_LAYOUT = {"whitespace_pattern": r"(\n {0,32}| )?"}
# Tools that are not strict may be described with words that no grammar knows; those then bind nobody.
_ARGUMENT_LAYOUT = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", ", "lenient": True}


# Constraint to grammar


def grammar_of(kind: str, source: str, *, thinking_end: int | None, one_call: bool = False) -> str:
    """The llguidance grammar (Lark) of a constraint as deepseek-recipe names it.

    thinking_end  id of the token that ends the reasoning an answer begins with; None when it begins without
    one_call      no second call may follow the first
    Raises InvalidRequest for what can not be a grammar; most mistakes only compiling shows.
    """
    if len(source) > MAX_SOURCE_CHARS:
        raise InvalidRequest(f"it has {len(source)} characters, at most {MAX_SOURCE_CHARS} are allowed")
    calls = "call" if one_call else "call+"
    match kind:
        case "json":
            rules = [f"answer: {_json_rule(json.loads(source) if source else {'type': 'object'}, _LAYOUT)}"]
        case "regex":
            rules = [f"answer: /{regex_to_lark(source, 'd')}/"]
        case "tool_call_required":
            rules = [f'answer: {calls} "</{DSML}tool_calls>"', *_calls(json.loads(source))]
        case "tool_call":
            begin = f"<{DSML}tool_calls>"
            rules = [
                f'answer: TEXT | opening {calls} "</{DSML}tool_calls>"',
                f"TEXT: /(?s:.*)/ & ~/(?s:.*){begin}(?s:.*)/",
                f'opening[suffix="{begin}\\n"]: /(?s:.*)/',
                *_calls(json.loads(source)),
            ]
        case _:
            raise InvalidRequest(f"constraints of the kind {kind!r} are not supported")
    if thinking_end is None:
        return "\n".join(["start: answer", *rules])
    return "\n".join(["start: THINKING <[" + str(thinking_end) + "]> answer", "THINKING: /(?s:.*)/", *rules])


def _json_rule(schema: Any, layout: Json) -> str:
    if not isinstance(schema, dict):  # true and false are schemas too
        schema = {} if schema is True else {"not": {}}
    return "%json " + json.dumps(schema | {"x-guidance": layout})


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _calls(tools: Sequence[Json]) -> Iterator[str]:
    """Rules of one call, of whichever tool, as DeepSeek-V4 writes calls."""
    yield "call: " + " | ".join(f"tool_{i}" for i in range(len(tools)))
    # Ends with its suffix, whatever the text: a value may hold anything but the end of a value.
    yield f'raw[suffix="</{DSML}parameter>\\n"]: /(?s:.*)/'
    for i, tool in enumerate(tools):
        function = tool["function"]
        schema = function.get("parameters") or {}
        properties: Json = schema.get("properties") or {}
        required = schema.get("required") or ()
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        parts = [_literal(f'<{DSML}invoke name="{_attribute(function["name"])}">\n')]
        rules = []
        for j, (name, value) in enumerate(properties.items()):
            parts.append(f"tool_{i}_{j}" + ("" if name in required else "?"))
            rules += _parameter(f"tool_{i}_{j}", name, value, shared)
        parts.append(_literal(f"</{DSML}invoke>\n"))
        yield f"tool_{i}: " + " ".join(parts)
        yield from rules


def _parameter(rule: str, name: str, schema: Any, shared: Json) -> list[str]:
    """Strings are written as they are, everything else as JSON; which of the two, the parameter says."""
    opening, end = f'<{DSML}parameter name="{_attribute(name)}" string=', f"</{DSML}parameter>\n"
    as_text = _literal(f'{opening}"true">')
    as_json = _literal(f'{opening}"false">')
    schema = schema if isinstance(schema, dict) else {}
    has_text = False
    types = schema.get("type")
    types = [types] if isinstance(types, str) else types if isinstance(types, list) else None
    fixed = [schema["const"]] if "const" in schema else schema.get("enum")
    ways, rules = [], []
    if isinstance(fixed, list):
        words = [value for value in fixed if isinstance(value, str)]
        if words:
            ways.append(f"{as_text} ({' | '.join(_literal(word) for word in words)}) {_literal(end)}")
        schema = {"enum": [value for value in fixed if not isinstance(value, str)]}
        has_rest = bool(schema["enum"])
    else:
        # Where it takes a resolver to know, a string is written as JSON: both ways of writing it are read alike.
        plain = not schema.keys() & {"anyOf", "oneOf", "allOf", "$ref"}
        has_text = plain if types is None else "string" in types
        if has_text:
            text = _text_of(schema)
            if text is None:
                ways.append(f"{as_text} raw")
            else:
                ways.append(f"{as_text} {rule.upper()}_TEXT {_literal(end)}")
                rules.append(f"{rule.upper()}_TEXT: {text}")
        if types is not None:
            schema = schema | {"type": [kind for kind in types if kind != "string"]}
        elif has_text:
            schema = schema | {"type": ["null", "boolean", "number", "array", "object"]}
        has_rest = types is None or bool(schema["type"])
    if has_rest:
        ways.append(f"{as_json} {rule}_json {_literal(end)}")
        rules.append(f"{rule}_json: {_json_rule(schema | shared, _ARGUMENT_LAYOUT)}")
    return [f"{rule}: " + " | ".join(ways), *rules]


def _text_of(schema: Json) -> str | None:
    """A string's rule where its schema says more than that it is one."""
    pattern, least, most = schema.get("pattern"), schema.get("minLength", 0), schema.get("maxLength", "")
    # A value so described never holds "<", which begins its end.
    parts = []
    if isinstance(pattern, str):
        begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
        inner = regex_to_lark(pattern[begins : len(pattern) - ends], "d")
        parts.append(f"/{'' if begins else '[^<]*'}({inner}){'' if ends else '[^<]*'}/")
    if parts or least or most != "":
        parts.append(f"/[^<]{{{least},{most}}}/")
    return " & ".join(parts) or None


def _attribute(name: str) -> str:
    if not name or any(char in '"<>&' or not char.isprintable() for char in name):
        raise InvalidRequest(f"the name {name[:40]!r} can not be written in a tool call")
    return name


# Whether it compiles


def python() -> list[str]:
    """How a process of the same kind is started: one that looks for modules in its working folder only if this does."""
    return [sys.executable, *(["-P"] if sys.flags.safe_path else [])]


class GrammarChecker:
    """Compiles grammars in a child process, started with the first one and again whenever one had to be killed.

    Safe to use from several threads; they take turns. `close` ends the child.
    """

    def __init__(
        self, model: Path, vocab_size: int, eos_token_ids: Sequence[int], *, compile_s: float = COMPILE_S
    ) -> None:
        self._command = [*python(), "-m", __name__, str(model), str(vocab_size), json.dumps([*eos_token_ids])]
        self._compile_s = compile_s
        self._turn = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()  # digest of the grammar -> what is wrong with it

    def check(self, grammar: str) -> None:
        """Raises InvalidRequest with the reason a grammar can not be followed."""
        key = hashlib.sha256(grammar.encode()).digest()
        with self._turn:
            problem = self._verdicts.get(key)
            if problem is None:
                problem = self._ask(grammar)
                self._verdicts[key] = problem
                if len(self._verdicts) > KEPT_VERDICTS:
                    self._verdicts.popitem(last=False)
            else:
                self._verdicts.move_to_end(key)
        if problem:
            raise InvalidRequest(problem)

    def close(self) -> None:
        with self._turn:
            self._end()

    def _ask(self, grammar: str) -> str:
        child = self._child
        if child is None or child.poll() is not None:
            self._end()
            child = self._child = subprocess.Popen(
                # In a session of its own: Ctrl-C is for the router, which ends it.
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            if self._read(child, START_S) is None:
                self._end()
                raise Overloaded("The process that checks grammars did not start. Retry in a moment.")
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(grammar).encode() + b"\n")
            child.stdin.flush()
            answer = self._read(child, self._compile_s)
        except BrokenPipeError:
            answer = None
        if answer is None:
            self._end()
            return f"it takes more than {self._compile_s:g} s or too much memory to compile"
        return str(json.loads(answer))

    def _read(self, child: subprocess.Popen[bytes], limit_s: float) -> bytes | None:
        """One line; None when it does not come in time, or the child is gone."""
        assert child.stdout is not None
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            # A line is shorter than a pipe's buffer and written at once, so the first byte means all of it.
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
        return child.stdout.readline() or None

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def main(model: str, vocab_size: str, eos_token_ids: str) -> None:
    """The child: a line in is a grammar, a line out what is wrong with it. Ends with its input."""
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY_BYTES, CHILD_MEMORY_BYTES))
    tokenizer = load_tokenizer(Path(model), int(vocab_size), json.loads(eos_token_ids))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin.buffer:
        problem = ""
        try:
            compile_grammar(tokenizer, json.loads(line))
        except PenumbraError as error:
            problem = str(error)
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
