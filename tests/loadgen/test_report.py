"""From times to figures."""

from __future__ import annotations

import pytest

from fuserve.loadgen import Answer, Percentiles, Run, summarize


def answer(due_s: float, chunk_s: list[float], **fields: object) -> Answer:
    values: dict[str, object] = {
        "end_s": chunk_s[-1] if chunk_s else due_s,
        "finish_reason": "length",
        "output_tokens": len(chunk_s),
        "usage_reported": True,
        "prompt_tokens": 10,
    }
    return Answer(due_s, chunk_s=chunk_s, **(values | fields))  # type: ignore[arg-type]


def test_latencies_count_from_when_a_request_was_due() -> None:
    run = Run(0.0, 3.0, [answer(1.0, [1.5, 1.75, 2.0]), answer(2.0, [2.1, 2.2, 2.3, 3.0])])
    report = summarize(run)
    assert report.ttft_ms is not None and report.tpot_ms is not None
    assert report.ttft_ms.max == pytest.approx(500)
    assert report.tpot_ms.mean == pytest.approx((250 + 300) / 2)
    assert report.itl_ms is not None and report.itl_ms.max == pytest.approx(700)
    assert report.e2e_ms is not None and report.e2e_ms.mean == pytest.approx(1000)
    assert (report.output_tokens_per_s, report.requests_per_s) == (7 / 3, 2 / 3)


def test_tokens_that_share_a_chunk_count_in_time_per_token() -> None:
    report = summarize(Run(0.0, 1.0, [answer(0.0, [0.1, 0.5], output_tokens=9)]))
    assert report.tpot_ms is not None and report.tpot_ms.p50 == pytest.approx(50)


def test_failed_requests_are_left_out_of_the_figures() -> None:
    failed = answer(0.0, [9.0], error="500: step failed", end_s=9.0)
    report = summarize(Run(0.0, 10.0, [failed, answer(0.0, [1.0, 2.0])]))
    assert (report.num_requests, report.num_completed, report.output_tokens) == (2, 1, 2)
    assert report.ttft_ms is not None and report.ttft_ms.max == pytest.approx(1000)
    assert report.errors == {"500": 1}


def test_a_run_without_a_success_has_no_latencies() -> None:
    report = summarize(Run(0.0, 1.0, [answer(0.0, [], error="429: full")]))
    assert (report.ttft_ms, report.tpot_ms, report.e2e_ms) == (None, None, None)
    assert report.output_tokens_per_s == 0


def test_requests_that_follow_each_other_are_not_concurrent() -> None:
    apart = [answer(0.0, [1.0]), answer(1.0, [2.0])]
    assert summarize(Run(0.0, 2.0, apart)).peak_concurrency == 1
    assert summarize(Run(0.0, 2.0, [*apart, answer(0.5, [1.5])])).peak_concurrency == 2


def test_percentiles_are_in_milliseconds() -> None:
    found = Percentiles.of([i / 1000 for i in range(101)])
    assert found == Percentiles(50.0, 50.0, 90.0, 99.0, 100.0)
