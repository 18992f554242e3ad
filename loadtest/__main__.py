"""`python -m loadtest SCENARIO --url URL`: one run against any OpenAI-compatible server.

Exit code 0: all as it should be; 1: a request failed, an answer differs or pages are held; 4: measuring was saturated;
78: the scenario or the server can not be used. Everything is written to the folder --out: report.html and record.json.

Keys come in the environment, since everybody on a machine sees its command lines: PENUMBRA_API_KEY, and for the
scenario's tenants PENUMBRA_TENANT_KEYS, such as a=KEY,b=KEY.
"""

from __future__ import annotations

import locust  # isort: skip  patches the process for gevent, so before anything else

import argparse
import contextlib
import datetime
import os
import sys
from pathlib import Path

import gevent
from locust.env import Environment

from loadtest import report
from loadtest.client import Server, Unanswered
from loadtest.play import Run, start, tell_locust
from loadtest.progress import showing
from loadtest.record import Record
from loadtest.scenario import Scenario, ScenarioError, load
from loadtest.summary import Summary

FAILED, SATURATED, UNUSABLE = 1, 4, 78


def main(words: list[str]) -> int:
    given = _parser().parse_args(words)
    try:
        scenario = load(given.scenario).scaled(
            rate=given.rate_scale, length=given.length_scale, duration_s=given.duration_s
        )
        return _run(scenario, given)
    except (ScenarioError, Unanswered) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        return 130


def _run(scenario: Scenario, given: argparse.Namespace) -> int:
    tenants = [pair for pair in os.environ.get("PENUMBRA_TENANT_KEYS", "").split(",") if pair]
    keys = {"": os.environ.get("PENUMBRA_API_KEY", "")} | _pairs("PENUMBRA_TENANT_KEYS", tenants)
    server = Server(given.url, {name: key for name, key in keys.items() if key}, given.model)
    server.meet()
    longest = max(traffic.longest_tokens for traffic in scenario.traffic)
    if server.max_tokens is not None and longest > server.max_tokens:
        raise ScenarioError(
            f"{scenario.name} asks for {longest:,} tokens of context and {server.model} has {server.max_tokens:,}. "
            f"Shorten its prompts with --length-scale {server.max_tokens / longest * 0.95:.2f}."
        )
    about = _pairs("--about", given.about) | {
        "server": server.url,
        "model": server.model,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "locust": locust.__version__,
    }
    environment = Environment()
    run = Run(scenario, server, about, strike=given.strike, tell=tell_locust(environment, scenario))
    out = Path(given.out or f"build/loadtest/{scenario.name}")
    out.mkdir(parents=True, exist_ok=True)
    runner, over = start(environment, run)
    if given.web_port is not None:
        del sys.argv[1:]  # Locust's page reads them as its own
        environment.create_web_ui("127.0.0.1", given.web_port)
        print(f"Locust's page: http://127.0.0.1:{given.web_port}", flush=True)
    try:
        with showing(scenario, run):
            over.get()
    except KeyboardInterrupt:
        run.record.about["interrupted"] = f"after {run.clock():.0f} s"
        runner.quit()
        _keep(run.record, out)
        raise
    summary = _keep(run.record, out)
    if given.web_port is not None:
        print("Ctrl-C ends Locust's page", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            gevent.sleep(float("inf"))
    runner.quit()
    return verdict(run.record, summary)


def _keep(record: Record, out: Path) -> Summary:
    record.save(out / "record.json")
    summary = report.write(record, out / "report.html")
    for kind, sentence in report.verdicts(record, summary):
        print(f"{'!!' if kind == 'bad' else '  '} {sentence}")
    print(f"report: {out / 'report.html'}", flush=True)
    return summary


def verdict(record: Record, summary: Summary) -> int:
    """The exit code: broken promises weigh more than figures that can not be trusted."""
    if summary.failed or summary.checks.different or record.pages_balanced is False:
        return FAILED
    return SATURATED if summary.saturated else 0


def _pairs(flag: str, words: list[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise ScenarioError(f"{flag} {bad[0]}: write NAME=VALUE.")
    return {name: value for name, _, value in pairs}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description="One load test over HTTP.")
    add = parser.add_argument
    add("scenario", help="a TOML file, or the name of a shipped scenario")
    add("--url", required=True, help="the server, such as http://127.0.0.1:8000")
    add("--model", default="", help="its model; else the first it names")
    add("--out", default="", help="folder for the report; else build/loadtest/<scenario>")
    add("--rate-scale", type=float, default=1.0, help="all arrivals so many times as often")
    add("--length-scale", type=float, default=1.0, help="all prompts so many times as long")
    add("--duration-s", type=float, default=None, help="another duration than the scenario's")
    add("--web-port", type=int, default=None, help="serve Locust's page there, until Ctrl-C")
    add("--strike", default=None, help="command that does a fault to the cluster, its name put behind it")
    add("--about", action="append", default=[], metavar="NAME=VALUE", help="a fact for the report")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
