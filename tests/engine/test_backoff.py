from __future__ import annotations

from fuserve.engine.backoff import Backoff


def test_delays_double_up_to_the_longest_and_begin_anew_after_a_quiet_time() -> None:
    now_s = 0.0
    backoff = Backoff(1.0, 5.0, forget_after_s=10.0, clock=lambda: now_s)
    assert [backoff.delay_s() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    now_s = 14.0
    assert backoff.delay_s() == 5.0
    now_s = 14.0 + 5.0 + 10.0
    assert backoff.delay_s() == 1.0
