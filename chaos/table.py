"""The faults, what is promised of each, and how it is done here.

A fault is done live, to a cluster of the kind that `where` names; or by tests that do it without processes (pytest
nodes). What a machine or its user can not do is found out when it is tried, and the row says why.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    id: str
    what: str
    promise: str
    live: str = ""  # a function of the class for `where`
    where: str = "local"
    tests: tuple[str, ...] = ()
    long: bool = False  # the tests' long forms too


RELAY, SERVICE = "tests/router/test_router_attempts.py", "tests/decode_worker/test_service.py"
OWNER, READER = "tests/kvtransfer/test_owner.py", "tests/kvtransfer/test_reader_core.py"

FAULTS = (
    Fault(id="F01", what="prefill killed while prompts wait", promise="lossless", live="prefill_killed_in_queue"),
    Fault(id="F02", what="prefill killed in mid-prompt", promise="lossless", live="prefill_killed_in_prompt"),
    Fault(id="F03", what="prefill killed when its pages are ready", promise="lossless",
          live="prefill_killed_when_ready"),
    Fault(id="F04", what="prefill killed in mid-transfer, decode busy", promise="lossless; decode survives",
          live="prefill_killed_in_transfer"),
    Fault(id="F05", what="decode killed before its transfer", promise="lossless; claims gone <= 10 s",
          live="decode_killed_before_transfer"),
    Fault(id="F06", what="decode killed in mid-transfer", promise="lossless; claims gone <= 10 s",
          live="decode_killed_in_transfer"),
    Fault(id="F07", what="decode killed at token 1, 2, in the middle, before the last", promise="lossless",
          live="decode_killed_at_token"),
    Fault(id="F08", what="decode killed after the last token, before it says so", promise="whole, once",
          live="decode_killed_before_its_end"),
    Fault(id="F09", what="router killed with streams open", promise="they break without [DONE]; nothing stays held",
          live="router_killed"),
    Fault(id="F10", what="router stopped gracefully", promise="running answers end whole", live="router_stopped"),
    Fault(id="F11", what="all prefill workers dead", promise="clean 503 at once, or an answer", live="no_prefill"),
    Fault(id="F12", what="all decode workers dead", promise="an error event or a whole answer, no hang",
          live="no_decode"),
    Fault(id="F13", what="decode frozen, thawed later", promise="lossless", live="decode_frozen"),
    Fault(id="F14", what="prefill frozen in mid-prompt, thawed later", promise="lossless", live="prefill_frozen"),
    Fault(id="F15", what="half-open connection: a cable is cut", promise="lossless; silent <= 5 s",
          live="half_open", where="apart"),
    Fault(id="F16", what="one-way partition from prefill to decode", promise="lossless; recomputed once",
          live="one_way", where="apart"),
    Fault(id="F17", what="Redis restarts empty", promise="no request fails", live="redis_killed"),
    Fault(id="F18", what="FLUSHALL under load", promise="no request fails", live="redis_flushed"),
    Fault(id="F19", what="Redis answers after seconds", promise="no request fails", live="redis_paused"),
    Fault(id="F20", what="Redis partitioned from some", promise="no request fails for 30 s",
          live="redis_partitioned", where="proxied"),
    Fault(id="F21", what="Redis failover loses writes", promise="lossless",
          live="redis_fails_over", where="proxied"),
    Fault(id="F22", what="Redis out of memory", promise="serving continues", live="redis_full"),
    Fault(id="F23", what="clients leave in the queue, the prompt, the transfer, the answer",
          promise="nothing stays held", live="clients_leave"),
    Fault(id="F24", what="a client reads a byte a second", promise="its buffer is bounded",
          tests=("tests/router/test_router_stream.py",)),
    Fault(id="F25", what="transfer stalls halfway", promise="progress deadline, quarantine, retry",
          tests=(f"{SERVICE}::test_a_frozen_owner_fails_the_attempt_and_its_pages_wait_in_quarantine_until_quiet",)),
    Fault(id="F26", what="a read can not be posted", promise="said at once", tests=(READER,)),
    Fault(id="F27", what="one read fails, its siblings still write", promise="their pages wait", tests=(READER,)),
    Fault(id="F28", what="a late reader finds its page given to another", promise="claim refused", tests=(OWNER,)),
    Fault(id="F29", what="late write into a page in use", promise="no corruption",
          tests=("tests/decode_worker/test_page_faults.py",)),
    Fault(id="F30", what="messages delivered twice", promise="no second effect", tests=(OWNER, RELAY)),
    Fault(id="F31", what="messages late or out of order", promise="put right or refused", tests=(OWNER, RELAY)),
    Fault(id="F32", what="monotonic clocks of hosts differ by up to a year", promise="no effect",
          live="clocks_differ", where="apart"),
    Fault(id="F33", what="a request that kills its worker", promise="two deaths, then quarantine; neighbours whole",
          live="poison"),
    Fault(id="F34", what="logits that are not numbers, one request of a batch", promise="it alone fails",
          tests=("tests/decode_worker/test_scheduler.py::"
                 "test_a_result_that_is_not_finite_fails_its_request_and_its_neighbours_go_on",)),
    Fault(id="F35", what="logits that are not numbers, every request of a worker", promise="the worker leaves the pool",
          tests=(f"{SERVICE}::test_a_worker_whose_numbers_are_none_fails_its_requests_and_then_leaves",)),
    Fault(id="F36", what="a page with another bit", promise="0 wrong tokens", long=True,
          tests=("tests/decode_worker/test_page_faults.py",)),
    Fault(id="F37", what="no page free on decode", promise="requests take turns",
          tests=(f"{SERVICE}::test_more_requests_than_fit_take_turns_and_all_are_answered",)),
    Fault(id="F38", what="prefill full of pages nobody reads", promise="they give way",
          tests=("tests/decode_worker/test_resume.py::"
                 "test_pages_are_held_for_as_long_as_the_caller_stays_and_while_there_is_room",)),
    Fault(id="F39", what="both pools tiny, each waits for the other", promise="progress",
          tests=(f"{SERVICE}::test_more_requests_than_fit_take_turns_and_all_are_answered",)),
    Fault(id="F40", what="worker over its memory limit", promise="lossless, as a kill",
          live="decode_out_of_memory"),
    Fault(id="F41", what="more load than slots", promise="503 with Retry-After, p99 <= 50 ms",
          live="saturated", where="overload"),
    Fault(id="F42", what="disk full", promise="lossless",
          live="disk_full"),
    Fault(id="F43", what="no file descriptors left", promise="streams finish",
          live="no_descriptors"),
    Fault(id="F44", what="SIGTERM to prefill under load", promise="lossless", live="prefill_stopped"),
    Fault(id="F45", what="SIGTERM to decode under load", promise="lossless", live="decode_stopped"),
    Fault(id="F46", what="pair of another protocol or layout", promise="never paired",
          tests=("tests/router/test_router_placement.py",)),
    Fault(id="F47", what="records of a later version", promise="unknown fields ignored, unknown protocols skipped",
          tests=("tests/wire/test_registry.py",)),
    Fault(id="F48", what="an old life of a worker resumes beside its new one", promise="refused",
          tests=("tests/wire/test_registry.py::test_of_two_lives_of_a_worker_the_one_that_began_last_keeps_its_record",)),
    Fault(id="F49", what="one request at two routers", promise="each whole, never mixed",
          live="one_request_at_two_routers", where="proxied"),
    Fault(id="F50", what="everybody reconnects at once", promise="no retry storm: attempts <= 1.2 a request",
          live="everybody_comes_at_once"),
    Fault(id="F51", what="a minute of threefold load", promise="goodput >= 90% of peak; normal again <= 15 s",
          live="recovered", where="overload"),
    Fault(id="F52", what="workers come back under their names with other memory", promise="peers connect anew",
          live="everybody_restarts"),
    Fault(id="F53", what="half an hour of silence", promise="the first request succeeds",
          live="silence", where="silence"),
    Fault(id="F54", what="a peer that connects slowly", promise="others do not wait",
          live="a_peer_is_slow", where="proxied"),
    Fault(id="F55", what="decode refuses a prompt prefill has computed", promise="pages free at once",
          tests=(f"{SERVICE}::test_a_request_larger_than_the_worker_is_refused_with_its_numbers",)),
    Fault(id="F56", what="several answers to one prompt", promise="a claim for each",
          tests=("tests/router/test_router_stream.py",)),
    Fault(id="F57", what="prefixes that decode holds, of every length", promise="exact",
          tests=("tests/decode_worker/test_reuse.py",)),
    Fault(id="F58", what="a step that takes seconds", promise="no lease runs out",
          tests=("tests/wire/test_worker.py",)),
    Fault(id="F59", what="certificates change", promise="new connections get the new one, streams go on",
          tests=("tests/router/test_router_tls.py",)),
    Fault(id="F60", what="a worker more and a worker less under load", promise="lossless", live="scaled"),
)  # fmt: skip
