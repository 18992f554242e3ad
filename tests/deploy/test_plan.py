"""`penumbra plan` against figures worked out by hand from the model's tables."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from cli.main import main
from deploy.plan import (
    INDEX_ROW_BYTES,
    LATENT_ROW_BYTES,
    PREFILL_SHARE,
    SHEETS,
    Load,
    Step,
    Steps,
    Weights,
    measured_steps,
    parse_gpus,
    parse_seconds,
    parse_tokens,
    plan,
    prompt_flops,
    prompt_s,
    step_bytes,
)
from engine.config import FLASH, PRO
from engine.kernels.rows import RowPool
from wire.errors import ConfigError

# One sequence at two depths, and a batch: round numbers, so that what follows can be done in the head.
STEPS = Steps([Step(1, 4_096, 0.010, "abc"), Step(1, 104_096, 0.015, "abc"), Step(11, 4_096, 0.030, "abc")])
LOAD = Load(context=4_096, answer=100, per_s=1.0, ttft_s=10.0, tpot_s=0.05)
H200, B200 = SHEETS["H200"], SHEETS["B200"]


@pytest.mark.parametrize(
    ("config", "tokens", "teraflops"),
    [
        (FLASH, 4_096, 113),
        (FLASH, 131_072, 4_540),
        (FLASH, 900_000, 68_379),
        (PRO, 4_096, 419),
        (PRO, 900_000, 171_383),
    ],
)
def test_the_work_of_a_prompt_is_that_of_its_layers(config: Any, tokens: int, teraflops: float) -> None:
    work = prompt_flops(config, tokens)
    assert (work.fp8 + work.bf16) / 1e12 == pytest.approx(teraflops, rel=0.02)


@pytest.mark.parametrize(
    ("config", "context", "gigabytes"), [(FLASH, 4_096, 11.23), (FLASH, 900_000, 11.93), (PRO, 4_096, 39.70)]
)
def test_a_step_reads_the_chosen_experts_everything_else_and_the_rows_it_attends_to(
    config: Any, context: int, gigabytes: float
) -> None:
    assert step_bytes(config, 1, context) / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_a_batch_reads_the_experts_that_its_tokens_choose_by_chance() -> None:
    # Eight times six of 256: 256 (1 - (250/256)^8) = 44.3 experts a layer instead of 6.
    more = step_bytes(FLASH, 8, 1) - step_bytes(FLASH, 1, 1)
    assert more / (Weights.of(FLASH).routed / 256) == pytest.approx(44.29 - 6, rel=0.01)


def test_rows_are_as_long_as_those_of_a_page() -> None:
    # 72 latents are 73 whole units of 576 bytes, so nothing is rounded up.
    assert RowPool.item_bytes_for(72, "latent", "v4", FLASH.head_dim, FLASH.rope_dim) == 72 * LATENT_ROW_BYTES
    assert step_bytes(FLASH, 1, 8_192) - step_bytes(FLASH, 1, 4_096) == pytest.approx(
        21 * 1024 * INDEX_ROW_BYTES + 20 * 32 * LATENT_ROW_BYTES
    )


def test_the_weights_are_those_of_the_published_checkpoint_without_its_draft_layer() -> None:
    assert Weights.of(FLASH).all / 1e9 == pytest.approx(156.0, abs=0.05)
    assert Weights.of(PRO).all / 1e9 == pytest.approx(850.7, abs=0.1)


def test_a_cached_prefix_costs_nothing_but_what_is_left_is_computed_at_its_depth() -> None:
    cold = prompt_s(FLASH, H200, 1, replace(LOAD, context=900_000))
    half = prompt_s(FLASH, H200, 1, replace(LOAD, context=900_000, cached=0.5))
    first_half = prompt_s(FLASH, H200, 1, replace(LOAD, context=450_000))
    assert half == pytest.approx(cold - first_half)
    assert half > first_half
    assert prompt_s(FLASH, H200, 4, LOAD) == pytest.approx(prompt_s(FLASH, H200, 1, LOAD) / 4)
    work = prompt_flops(FLASH, 4_096)
    by_hand = (work.fp8 / 1979e12 + work.bf16 / 989e12) / PREFILL_SHARE
    assert prompt_s(FLASH, H200, 1, LOAD) == pytest.approx(by_hand)


def test_a_measured_step_is_read_off_its_rows_and_every_other_from_bandwidth() -> None:
    assert STEPS.seconds(FLASH, H200, 1, 4_096) == (pytest.approx(0.010), "measured")
    assert STEPS.seconds(FLASH, H200, 6, 4_096) == (pytest.approx(0.020), "measured")
    assert STEPS.seconds(FLASH, H200, 6, 54_096) == (pytest.approx(0.020 + 6 * 0.0025), "measured")
    # 11.23 GB in 10 ms are 23.4% of 4.8 TB/s; a B200 is taken to reach as much of its 8.
    assert STEPS.share == pytest.approx(0.234, abs=0.001)
    assert STEPS.seconds(FLASH, B200, 1, 4_096) == (pytest.approx(0.006, rel=1e-3), "datasheet")
    assert STEPS.seconds(PRO, H200, 1, 4_096)[1] == "datasheet"


def test_pools_are_as_small_as_the_latencies_allow() -> None:
    found = plan("flash", B200, 8, LOAD, STEPS)
    assert found.fits
    prefill, decode = found.pools
    # 156 of 180 GB, nine tenths of it usable: one GPU holds the weights and 6 GB of pages.
    assert (prefill.workers, prefill.gpus, decode.workers, decode.gpus) == (1, 1, 1, 1)
    room = 180e9 * 0.9 - Weights.of(FLASH).all
    assert decode.requests == room // decode.request_bytes
    # One answer of 100 tokens a second: as many at once as steps of that batch are worth.
    assert decode.running / (100 * decode.seconds) >= 1.0
    assert found.needed_gpus == 2
    assert found.tpot_s == decode.seconds <= LOAD.tpot_s
    assert prefill.seconds < found.ttft_s < 2 * prefill.seconds + decode.seconds


def test_flash_takes_two_h200_a_worker_and_the_plan_says_that_this_version_has_none_such() -> None:
    found = plan("flash", H200, 8, LOAD, STEPS)
    assert {pool.gpus for pool in found.pools} == {2}
    assert found.pools[1].basis == "measured"
    assert "abc" in found.pools[1].source
    assert "runs on 1 GPU" in found.notes[0]


def test_pro_takes_eight_b200_a_worker() -> None:
    found = plan("pro", B200, 16, replace(LOAD, per_s=0.1), STEPS)
    assert found.fits
    assert {pool.gpus for pool in found.pools} == {8}
    assert {pool.basis for pool in found.pools} == {"datasheet"}
    # 850.7 GB over eight.
    assert found.pools[0].weight_bytes == math.ceil(Weights.of(PRO).all / 8)


def test_too_few_gpus_are_told_with_what_they_carry_and_what_would_help() -> None:
    load = Load(context=128_000, answer=1_000, per_s=5.0, ttft_s=20.0, tpot_s=0.05)
    found = plan("flash", B200, 8, load, STEPS)
    assert not found.fits
    assert found.needed_gpus is not None
    assert found.needed_gpus > 8
    assert 0 < found.per_s < 5
    assert f"need {found.needed_gpus} GPUs" in found.problems[0]
    # What it says is carried is carried, and a tenth more is not.
    assert plan("flash", B200, 8, replace(load, per_s=found.per_s), STEPS).fits
    assert not plan("flash", B200, 8, replace(load, per_s=1.1 * found.per_s), STEPS).fits
    assert plan("flash", B200, found.needed_gpus, load, STEPS).fits
    assert not plan("flash", B200, found.needed_gpus - 1, load, STEPS).fits
    assert any("tokens instead of 128,000" in line for line in found.advice)


def test_a_latency_that_no_number_of_gpus_keeps_is_named_and_the_rest_planned_without_it() -> None:
    found = plan("flash", H200, 8, replace(LOAD, context=900_000, tpot_s=0.001, ttft_s=1.0), STEPS)
    assert not found.fits
    assert "One request alone takes" in found.problems[0]
    assert "A prompt takes" in found.problems[1]
    assert len(found.pools) == 2


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_tokens, "900k", 900_000),
        (parse_tokens, "1M", 1_000_000),
        (parse_tokens, "512", 512),
        (parse_seconds, "30s", 30.0),
        (parse_seconds, "20ms", 0.02),
        (parse_seconds, "1.5", 1.5),
        (parse_gpus, "8xH200", (8, H200)),
        (parse_gpus, "4xb200", (4, B200)),
    ],
)
def test_units_are_read(parse: Any, text: str, value: Any) -> None:
    assert parse(text) == pytest.approx(value) if isinstance(value, float) else parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((parse_tokens, text) for text in ("", "0", "-1k", "k", "nank", "1e400")),
        *((parse_seconds, text) for text in ("", "0s", "-3s", "infs", "nan", "ms")),
        *((parse_gpus, text) for text in ("", "H200", "0xH200", "8xA100", "xH200", "-1xH200")),
    ],
)
def test_what_is_no_quantity_is_refused_in_words(parse: Any, text: str) -> None:
    with pytest.raises(ConfigError, match="write"):
        parse(text)


@pytest.mark.parametrize("wrong", [{"context": 0}, {"per_s": 0.0}, {"cached": 1.0}, {"cached": -0.1}])
def test_a_load_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(LOAD, **wrong)


def test_a_prompt_longer_than_the_model_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than the 1,048,576"):
        plan("flash", H200, 8, replace(LOAD, context=1_048_576), STEPS)


def test_the_measured_rows_are_those_of_the_results() -> None:
    rows = measured_steps()
    assert {(row.batch, row.context) for row in rows} >= {(1, 4_096), (1, 900_000), (8, 4_096), (32, 4_096)}
    assert all(row.commit and 0 < row.seconds < 1 for row in rows)
    assert 0 < Steps(rows).share < 1


def test_the_command_shows_a_table_or_json_and_fails_where_it_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int | str | None, str]:
        with pytest.raises(SystemExit) as ended:
            main(["plan", *words])
        return ended.value.code, capsys.readouterr().out

    asked = [
        "--gpus",
        "8xH200",
        "--model",
        "flash",
        "--context",
        "900k",
        "--rps",
        "2",
        "--ttft",
        "30s",
        "--tpot",
        "20ms",
    ]
    code, told = run(*asked, "--json")
    found = json.loads(told)
    assert code == 1
    assert found["load"] == {
        "context": 900_000, "answer": 1_000, "per_s": 2.0, "ttft_s": 30.0, "tpot_s": 0.02, "cached": 0.0,
    }  # fmt: skip
    code, shown = run(*asked)
    assert code == 1
    assert f"need {found['needed_gpus']} GPUs" in shown
    assert "measured: bench/results/step.csv at" in shown
    assert "datasheet: 40% of the peak" in shown
    assert run("--gpus", "2xB200", "--context", "4k", "--rps", "0.1", "--tpot", "100ms")[0] == 0
    assert run("--gpus", "eight")[0] == 2
