"""What a load test does, as a TOML file says it. Unknown keys are refused: a misspelt one would test something else.

Times are seconds from the run's start, lengths are tokens of the server's tokenizer.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SHIPPED = Path(__file__).parent / "scenarios"

Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1)]


class ScenarioError(ValueError):
    """A scenario that can not run. The text names the file, the key and what is wrong with it."""


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arrivals(Form):
    """When requests (or sessions) begin, whatever became of those before them.

    poisson   `per_s` on average, gaps exponential
    constant  `per_s`, evenly
    ramp      from `per_s` to `to_per_s` over the traffic's time, gaps exponential
    once      `count` at the traffic's start
    """

    kind: Literal["poisson", "constant", "ramp", "once"]
    per_s: Rate = 1.0
    to_per_s: Rate | None = None
    count: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.kind == "ramp") != (self.to_per_s is not None):
            raise ValueError("to_per_s belongs to a ramp, and a ramp needs it")
        return self


class Length(Form):
    """One length of a mix; shares are relative to each other."""

    tokens: Tokens
    share: Rate = 1.0


class Session(Form):
    """A conversation: each turn sends all that was said before. It arrives as `arrivals` say; inside it, as with an
    agent, a turn follows the answer to the one before.
    """

    turns: int = Field(ge=2)
    turn_tokens: Tokens = 64  # that each later turn brings
    shared_prefix_tokens: int = Field(default=0, ge=0)  # with which every session of the traffic begins
    think_s: Seconds = 0.0  # before a later turn, on average; exponential
    again: bool = False  # every second turn asks what the one before it asked, word for word


class Cancel(Form):
    """A share of clients that hang up, after so many seconds or so many pieces of the answer."""

    share: Share
    after_s: Seconds | None = None
    after_pieces: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.after_s is None) == (self.after_pieces is None):
            raise ValueError("give either after_s or after_pieces")
        return self


class Slow(Form):
    """A share of clients that read so slowly, with a receive buffer of a few KB."""

    share: Share
    bytes_per_s: Rate


class Traffic(Form):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    arrivals: Arrivals
    endpoint: Literal["chat", "completions"] = "chat"
    start_s: Seconds = 0.0
    stop_s: Seconds | None = None  # None: the scenario's duration
    until: str | None = None  # instead: until this other traffic is over
    prompt: tuple[Length, ...] = Field(min_length=1)
    answer_tokens: Tokens = 32
    temperature: float = Field(default=0.0, ge=0)
    repeat_share: Share = 0.0  # ask what an earlier request asked, word for word
    needles: int = Field(default=0, ge=0, le=400)  # facts hidden in the prompt, one of which is asked for
    tenants: tuple[str, ...] = ()  # whose keys are shown, in turn by chance; keys come with --tenant-key
    cancel: Cancel | None = None
    slow: Slow | None = None
    session: Session | None = None
    body: dict[str, Any] = {}  # more fields of each request, as the server knows them

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.until is not None and self.stop_s is not None:
            raise ValueError("give stop_s or until, not both")
        if self.until is not None and self.arrivals.kind == "ramp":
            raise ValueError("a ramp needs an end that is known: give stop_s instead of until")
        if self.stop_s is not None and self.stop_s <= self.start_s:
            raise ValueError("stop_s must be later than start_s")
        if self.session is not None and self.repeat_share:
            raise ValueError("sessions repeat by `again`; repeat_share is for single requests")
        return self

    @property
    def longest_tokens(self) -> int:
        """Prompt and answer of its longest request."""
        most = max(length.tokens for length in self.prompt) + self.answer_tokens
        if self.session is not None:
            most += (self.session.turns - 1) * (self.session.turn_tokens + self.answer_tokens)
        return most


class Slo(Form):
    """The promise that goodput counts: the first token after the request was due, and the later ones on average."""

    ttft_ms: Rate
    tpot_ms: Rate
    long_tokens: Tokens = 32_768  # prompts from here on ...
    long_ttft_ms: Rate | None = None  # ... may take so long, or have no bound


class Fault(Form):
    """Something done to the cluster through `penumbra chaos --strike`; other servers have no such door."""

    at_s: Seconds
    strike: str


class Beside(Form):
    """Compare the TTFT of one traffic while the first token of another is waited for, with its TTFT otherwise."""

    traffic: str
    during: str
    goal: Rate = 3.0  # times, of the 99th percentiles


class ClusterWanted(Form):
    """What `penumbra loadtest run` starts when it is not told of a server."""

    prefill: int = Field(default=1, ge=1)
    decode: int = Field(default=1, ge=1)
    flags: tuple[str, ...] = ()


class Scenario(Form):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    about: str
    seed: int = 1
    duration_s: float = Field(gt=0, allow_inf_nan=False)
    drain_s: float = Field(default=60.0, gt=0)  # after it, when whatever has not ended counts as unfinished
    silence_s: float = Field(default=120.0, gt=0)  # a client's patience with a silent connection
    watch_s: float = Field(default=1.0, gt=0)  # between two looks at the server's pages
    refusals_fit: bool = False  # "too much at once" (408, 429, 503, 529) is an answer this scenario is out for
    slo: Slo
    traffic: tuple[Traffic, ...] = Field(min_length=1)
    faults: tuple[Fault, ...] = ()
    beside: Beside | None = None
    cluster: ClusterWanted = ClusterWanted()

    @model_validator(mode="after")
    def _names_meet(self) -> Self:
        names = [traffic.name for traffic in self.traffic]
        if len(set(names)) != len(names):
            raise ValueError("two traffics have one name")
        for traffic in self.traffic:
            if traffic.until is not None and (traffic.until not in names or traffic.until == traffic.name):
                raise ValueError(f"traffic '{traffic.name}' lasts until '{traffic.until}', which is no other traffic")
            if traffic.until is not None and self.of(traffic.until).until is not None:
                raise ValueError(f"traffic '{traffic.name}' waits for '{traffic.until}', which waits for another")
        for name in (self.beside.traffic, self.beside.during) if self.beside else ():
            if name not in names:
                raise ValueError(f"beside names '{name}', which is no traffic")
        return self

    def of(self, name: str) -> Traffic:
        return next(traffic for traffic in self.traffic if traffic.name == name)

    def window(self, traffic: Traffic) -> float | None:
        """Seconds in which requests of a traffic arrive; None: as long as another lasts."""
        if traffic.until is not None:
            return None
        return (self.duration_s if traffic.stop_s is None else traffic.stop_s) - traffic.start_s

    def scaled(self, *, rate: float = 1.0, length: float = 1.0, duration_s: float | None = None) -> Scenario:
        """The same with all arrivals `rate` times as often, prompts `length` times as long, or another duration."""

        def adapted(traffic: Traffic) -> Traffic:
            speed = {"per_s": traffic.arrivals.per_s * rate}
            if traffic.arrivals.to_per_s is not None:
                speed["to_per_s"] = traffic.arrivals.to_per_s * rate
            mix = tuple(
                one.model_copy(update={"tokens": max(16, round(one.tokens * length))}) for one in traffic.prompt
            )
            return traffic.model_copy(update={"arrivals": traffic.arrivals.model_copy(update=speed), "prompt": mix})

        changes: dict[str, Any] = {"traffic": tuple(map(adapted, self.traffic))}
        if duration_s is not None:
            changes["duration_s"] = duration_s
        return self.model_copy(update=changes)


def shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load(word: str) -> Scenario:
    """The scenario in the file `word`, or the shipped one of that name. Raises ScenarioError."""
    path = Path(word)
    if path.suffix != ".toml" and not path.exists():
        if word not in shipped():
            raise ScenarioError(f"'{word}' is neither a file nor one of the scenarios {', '.join(shipped())}.")
        path = SHIPPED / f"{word}.toml"
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ScenarioError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ScenarioError(f"{path} does not parse: {error}.") from error
    return parse(data, str(path))


def parse(data: dict[str, Any], name: str) -> Scenario:
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        first, *more = error.errors()
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        unknown = "is no key of a scenario" if first["type"] == "extra_forbidden" else first["msg"]
        rest = f" (and {len(more)} more)" if more else ""
        raise ScenarioError(f"{name}: {where}: {unknown}{rest}.") from error
