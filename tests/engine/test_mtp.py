"""The draft layer against a dense reference, and drafts that never change what comes out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.batch import Sampled, Segment
from engine.cache.pools import KvPools
from engine.config import C4_RING, KvLayout
from engine.kernels.rows import read_rows
from engine.runner import Runner
from tests.engine.dense_forward import dense_draft
from tests.engine.speculation import Speculator, drafting_model, echoing, half_right, runner_of
from wire.types import PAGE_TOKENS, PageClass, SamplingParams

PACKED = {"head_dim": 512, "rope_dim": 64, "index_head_dim": 128, "hidden_size": 64, "index_topk": 32}
GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0)


def prompt_of(config, length: int, seed: int = 0) -> list[int]:
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Recorded:
    """Stands where the runner calls its draft layer, and keeps every guess's logits."""

    def __init__(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        assert runner.draft is not None
        self.logits: list[Tensor] = []
        self.streams: list[Tensor] = []
        guess, remember = runner.draft.guess, runner.draft.remember

        def recording(*args) -> tuple[Tensor, Tensor]:
            logits, streams = guess(*args)
            self.logits.append(logits.clone())
            return logits, streams

        def remembering(streams: Tensor, *args) -> tuple[Tensor, Tensor]:
            self.streams.append(streams.clone())
            return remember(streams, *args)

        monkeypatch.setattr(runner.draft, "guess", recording)
        monkeypatch.setattr(runner.draft, "remember", remembering)


@pytest.mark.parametrize(("seed", "pattern", "chunk"), [(1, "flash", 1), (2, "pro", 7), (3, "all", 100)])
def test_guesses_match_a_dense_draft_layer_at_every_position(
    monkeypatch: pytest.MonkeyPatch, seed: int, pattern: str, chunk: int
) -> None:
    """Page ends, the window's edge and chunk borders included; three guesses deep, each on the ones before."""
    config, tensors = drafting_model(seed, pattern)
    runner = runner_of(config, tensors, "exact")
    recorded = Recorded(runner, monkeypatch)
    tokens = prompt_of(config, 285)
    run = Speculator(runner, 3)
    request = run.prefill(tokens[:1], GREEDY)
    checked, drafts = 0, [request]
    guesses = {1: ([request.answer[-1], *request.guesses], recorded.logits[:])}
    for at in range(1, len(tokens), chunk):
        recorded.logits.clear()
        part = tokens[at : at + chunk]
        run._step(drafts, [Segment(sequence=request.sequence, start=at, tokens=part, sample=True)])
        guesses[at + len(part)] = ([request.answer[-1], *request.guesses], recorded.logits[:])
    streams = torch.cat(recorded.streams)
    for n, (following, got) in guesses.items():
        if chunk == 1 and n > 8 and not (120 < n < 136 or 250 < n < 262 or n > 280):
            continue  # the reference is quadratic
        assert len(got) == 3
        before, ids = streams[:n], torch.tensor([*tokens[1:n], following[0]])
        for depth in range(3):
            want, out = dense_draft(config, tensors, before, ids)
            error = (want[-1] - got[depth][0]).abs().max()
            assert error <= 1e-4, f"guess {depth} behind {n} tokens: {error:.2e}"
            before, ids = torch.cat([before, out[-1:]]), torch.cat([ids, torch.tensor([following[1 + depth]])])
            checked += 1
    assert checked == 3 * {1: 39, 7: 42, 100: 4}[chunk]


def plain_answers(runner: Runner, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[Sampled]]:
    run = Speculator(runner, 0)
    for prompt, options in zip(prompts, params, strict=True):
        run.prefill(prompt, options)
    run.run()
    return [request.drawn for request in run.requests]


LENGTHS = (1, 2, 5, 120, 126, 127, 128, 129, 240, 250, 254, 255, 256, 257, 370, 383, 384, 500, 505, 509, 512, 513)


@pytest.mark.parametrize("layout", ["exact", "v4"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tokens_and_logprobs_are_those_of_a_run_without_drafts(layout: KvLayout, depth: int) -> None:
    """Across page, window and ring borders, several requests at once, greedy and sampled, right and wrong drafts."""
    config, tensors = drafting_model(31, "flash", **(PACKED if layout == "v4" else {}))
    compared = kept = refused = 0
    for batch in range(0, len(LENGTHS), 6):
        lengths = LENGTHS[batch : batch + 6]
        prompts = [prompt_of(config, n, n) for n in lengths]
        params = [
            SamplingParams(
                max_tokens=18, seed=n, temperature=float(n % 2), logprobs=True, top_logprobs=2, ignore_eos=True
            )
            for n in lengths
        ]
        plain = runner_of(config, tensors, layout, draft=False)
        want = plain_answers(plain, prompts, params)
        run = Speculator(runner_of(config, tensors, layout), depth, guesser=half_right(want, config.vocab_size, depth))
        for prompt, options in zip(prompts, params, strict=True):
            run.prefill(prompt, options)
        run.run()
        for n, request, expected in zip(lengths, run.requests, want, strict=True):
            assert request.drawn == expected, f"{n} prompt tokens"
            compared += len(expected)
            kept += request.kept
            refused += request.tried - request.kept
    assert compared == 18 * len(LENGTHS)
    assert kept > compared / 4
    assert refused > compared / 10


def the_bytes_of(pools: KvPools, run: Speculator) -> dict[str, Tensor]:
    """Everything in the pools that stands for the only request's tokens: what may be read of it later."""
    (request,) = run.requests
    sequence, n = request.sequence, request.sequence.length
    full, swa = sequence.pages, sequence.swa_pages
    whole = n // PAGE_TOKENS
    found = {
        "whole full pages": pools.copy_out(PageClass.FULL, full[:whole]),
        "whole window pages": pools.copy_out(PageClass.SWA, swa[:whole]),
    }

    def rows_of(pool, pages: list[int], end: int, start: int = 0) -> Tensor:
        at, per_page = torch.arange(start, end), pool.rows_per_item
        return read_rows(pool, torch.tensor(pages)[at // per_page] * per_page + at % per_page)

    for name, pool_of, pages, end in (
        ("window", pools.window, swa, n),
        ("c4", pools.c4, full, n // 4),
        ("index", pools.index, full, n // 4),
        ("c128", pools.c128, full, n // 128),
    ):
        for layer, pool in pool_of.items():
            found[f"{name}.{layer}"] = rows_of(pool, pages, end, 1 if layer == len(run.runner.model.layers) else 0)
    open_c4 = torch.arange(max(n // PAGE_TOKENS * PAGE_TOKENS, n // 4 * 4 - 4), n)
    for layer in pools.c4_ring:
        item = swa[(n - 1) // PAGE_TOKENS]
        found[f"c4_ring.{layer}"] = pools.c4_ring[layer][item, open_c4 % C4_RING]
        found[f"index_ring.{layer}"] = pools.index_ring[layer][item, open_c4 % C4_RING]
    open_c128 = torch.arange(n // 128 * 128, n)
    for layer in pools.c128_ring:
        found[f"c128_ring.{layer}"] = pools.c128_ring[layer][sequence.slot, open_c128 % 256]
    assert pools.draft_state is not None
    found["draft_state"] = pools.draft_state[swa[(n - 1) // PAGE_TOKENS]]
    return found


@pytest.mark.parametrize("layout", ["exact", "v4"])
@pytest.mark.parametrize(("prompt", "answer"), [(245, 20), (380, 9), (3, 14), (505, 12)])
def test_refused_drafts_leave_no_trace_in_any_pool(layout: KvLayout, prompt: int, answer: int) -> None:
    config, tensors = drafting_model(41, "flash", **(PACKED if layout == "v4" else {}))
    params = SamplingParams(max_tokens=answer, seed=0, temperature=0, ignore_eos=True)
    found, answers = [], []
    for depth in (0, 3):
        guesser = (lambda r, done: [(answers[0][done].token_id + 1) % config.vocab_size] * 3) if depth else None
        run = Speculator(runner_of(config, tensors, layout), depth, keep=True, guesser=guesser)
        run.prefill(prompt_of(config, prompt), params)
        run.run()
        answers.append(run.requests[0].drawn)
        assert run.requests[0].kept == 0
        found.append(the_bytes_of(run.runner.pools, run))
    assert answers[0] == answers[1]
    for name, without in found[0].items():
        assert torch.equal(without, found[1][name]), name


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_layer_that_agrees_with_its_model_has_every_draft_kept(temperature: float) -> None:
    """Positions, tokens and noise line up: also a sampled token is guessed, because the guess uses the same noise."""
    config, tensors = drafting_model(51, "flash")
    echoing(config, tensors)
    runner = runner_of(config, tensors, "exact")
    run = Speculator(runner, 3)
    for n in (1, 130, 255):
        options = SamplingParams(max_tokens=41, seed=n, temperature=temperature, ignore_eos=True)
        run.prefill(prompt_of(config, n, n), options)
    run.run()
    for request in run.requests:
        assert len(request.answer) == 41
        assert (request.tried, request.kept) == (30, 30)


def moved(source: Speculator, target: Speculator) -> None:
    """Bring the only request of one worker to the other, as pages travel."""
    (request,) = source.requests
    sequence, theirs, ours = request.sequence, source.runner.pools, target.runner.pools
    arrived = target.prefill([], sequence.sampling)
    for name in ("prompt", "answer"):
        getattr(arrived, name).extend(getattr(request, name))
    arrived.drawn, arrived.guesses, arrived.sequence.length = list(request.drawn), [], sequence.length
    target.window.cover(arrived.sequence, 0, sequence.length)
    arrived.sequence.pages = ours.full.allocate(len(sequence.pages))
    for cls, mine, his in (
        (PageClass.FULL, arrived.sequence.pages, sequence.pages),
        (PageClass.SWA, arrived.sequence.swa_pages, sequence.swa_pages[: len(arrived.sequence.swa_pages)]),
        (PageClass.STATE, *([2 * s.slot, 2 * s.slot + 1] for s in (arrived.sequence, sequence))),
    ):
        ours.copy_in(cls, mine, theirs.copy_out(cls, his))


@pytest.mark.parametrize("first_drafts", [True, False])
def test_prefill_with_and_without_a_draft_layer_serves_a_worker_that_drafts(first_drafts: bool) -> None:
    """Signatures agree either way. With one, decode guesses at once as prefill would have; without, rows begin anew."""
    config, tensors = drafting_model(61, "flash")
    params = SamplingParams(max_tokens=30, seed=0, temperature=0, ignore_eos=True, logprobs=True)
    prompt = prompt_of(config, 300)
    (want,) = plain_answers(runner_of(config, tensors, "exact"), [prompt], [params])
    source = Speculator(runner_of(config, tensors, "exact", draft=first_drafts), 0, keep=True)
    source.prefill(prompt, params)
    target = Speculator(runner_of(config, tensors, "exact"), 2, keep=True)
    assert source.runner.pools.signature == target.runner.pools.signature
    whole = Speculator(runner_of(config, tensors, "exact"), 2, keep=True)
    whole.prefill(prompt, params)
    moved(source, target)
    guessed: list[list[list[int]]] = [[], []]
    for run, seen in zip((target, whole), guessed, strict=True):
        (request,) = run.requests
        while len(request.answer) < 30:
            request.guesses = []  # so that both advance alike
            segment = Segment(
                sequence=request.sequence,
                start=request.sequence.length,
                tokens=[request.answer[-1]],
                sample=True,
                index=len(request.answer),
            )
            run._step([request], [segment])
            seen.append(request.guesses)
        assert request.drawn == want
    assert all(len(g) == 2 for g in guessed[0])
    if first_drafts:
        assert guessed[0] == guessed[1]
    pools, pages = target.runner.pools, target.requests[0].sequence.swa_pages
    assert pools.draft_state is not None
    assert pools.draft_state[pages[1], :2].tolist() == [329, 1 if first_drafts else 301]


def test_a_page_does_not_depend_on_the_token_behind_it() -> None:
    """Two prompts that share their first page bit for bit go on with different tokens."""
    config, tensors = drafting_model(71, "pro")
    checksums = []
    for seed in (1, 2):
        run = Speculator(runner_of(config, tensors, "exact"), 1, keep=True)
        request = run.prefill(prompt_of(config, 256) + prompt_of(config, 40, seed), GREEDY, chunk=256)
        pools, sequence = run.runner.pools, request.sequence
        checksums.append(pools.export_pages(PageClass.SWA, sequence.swa_pages[:1]))
    assert checksums[0] == checksums[1]
