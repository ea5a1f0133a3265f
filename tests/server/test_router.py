"""The door's routing inside Ray Serve's router, without a cluster."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.request_router import PendingRequest

from fuserve.server.replicas.messages import ForwardedRequest
from fuserve.server.replicas.router import PrefixRouter

DEPLOYMENT = DeploymentID("Replica", "fuserve")


def replica(name: str) -> Any:
    async def get_queue_len(*, deadline_s: float) -> int:
        return 0

    return SimpleNamespace(
        replica_id=ReplicaID(name, DEPLOYMENT),
        actor_id=None,
        max_ongoing_requests=100_000,
        get_queue_len=get_queue_len,
    )


def request(number: int, prompt: str = "") -> PendingRequest:
    body = json.dumps({"prompt": prompt or f"{number} is"}).encode()
    forwarded = ForwardedRequest("POST", "/v1/completions", b"", (), body, None)
    return PendingRequest([forwarded], {}, RequestMetadata(str(number), str(number)))


def routed(story: Callable[[PrefixRouter], Coroutine[Any, Any, None]]) -> None:
    """Tell a story of a router in front of two replicas."""

    async def run() -> None:
        router = PrefixRouter(
            DEPLOYMENT, DeploymentHandleSource.UNKNOWN, use_replica_queue_len_cache=True
        )
        router.initialize_state()
        router.update_replicas([replica(name) for name in ("a", "b")])
        await story(router)

    asyncio.run(run())


async def chosen(router: PrefixRouter, *pending: PendingRequest) -> Counter[str]:
    """The replicas of requests that come at once."""
    choices = (router._choose_replica_for_request(one) for one in pending)
    return Counter(one.replica_id.unique_id for one in await asyncio.gather(*choices))


def ended(router: PrefixRouter, name: str, number: int) -> None:
    router.on_request_completed(ReplicaID(name, DEPLOYMENT), str(number))


def test_requests_count_before_their_replica_has_accepted_them() -> None:
    async def story(router: PrefixRouter) -> None:
        assert await chosen(router, *map(request, range(8))) == {"a": 4, "b": 4}
        assert await chosen(router, *map(request, range(8, 11))) in (
            {"a": 2, "b": 1},
            {"a": 1, "b": 2},
        )

    routed(story)


def test_a_request_goes_where_the_fewest_have_not_ended() -> None:
    async def story(router: PrefixRouter) -> None:
        homes = {}
        for number in range(6):
            (homes[number],) = await chosen(router, request(number))
        for number, home in homes.items():
            if home == "b":
                ended(router, "b", number)
        assert await chosen(router, *map(request, range(10, 13))) == {"b": 3}

    routed(story)


def test_a_popular_prefix_spreads_when_its_replica_is_busy() -> None:
    async def story(router: PrefixRouter) -> None:
        alike = [request(number, "Once upon a time " * 20) for number in range(9)]
        (home,) = await chosen(router, *alike[:5])  # as many as it may have beyond the other
        other = {"a": "b", "b": "a"}[home]
        assert await chosen(router, *alike[5:]) == {other: 4}

    routed(story)


def test_questions_for_metrics_are_no_load() -> None:
    """Ray says that they have ended too, and a replica that started later was asked less often."""

    async def story(router: PrefixRouter) -> None:
        for number in range(20):
            ended(router, "a", 1000 + number)
        assert await chosen(router, *map(request, range(8))) == {"a": 4, "b": 4}

    routed(story)


@pytest.mark.parametrize("turns", range(5))
def test_requests_that_are_given_up_while_they_wait_are_no_load(turns: int) -> None:
    """Whenever their client goes away, also right when they have been given a replica."""

    async def story(router: PrefixRouter) -> None:
        waiting = [
            asyncio.create_task(router._choose_replica_for_request(request(number)))
            for number in range(5)
        ]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        for number, answer in enumerate(answers):
            if not isinstance(answer, BaseException):  # it was too late to give up
                ended(router, answer.replica_id.unique_id, number)
        assert all(router._placements.load(one) == 0 for one in router.curr_replicas)

    routed(story)


def test_a_request_that_is_sent_again_counts_once() -> None:
    async def story(router: PrefixRouter) -> None:
        again = request(0)
        (first,) = await chosen(router, again)
        other = {"a": "b", "b": "a"}[first]
        router.on_replica_actor_died(ReplicaID(first, DEPLOYMENT))
        home = await router._choose_replica_for_request(again, is_retry=True)
        assert home.replica_id.unique_id == other
        ended(router, first, 0)  # Ray says so late
        assert router._placements.load(home.replica_id) == 1
        ended(router, other, 0)
        assert router._placements.load(home.replica_id) == 0

    routed(story)


def test_a_replica_that_answers_late_is_not_passed_over() -> None:
    """Ray asks for the length of a queue that it has not heard of for a while."""

    async def slow(*, deadline_s: float) -> int:
        await asyncio.sleep(0.3)
        return 0

    async def story(router: PrefixRouter) -> None:
        prefix = "Once upon a time " * 20
        (home,) = await chosen(router, request(0, prefix))
        ended(router, home, 0)
        busy = ReplicaID(home, DEPLOYMENT)
        router.replica_queue_len_cache.invalidate_key(busy)
        router.curr_replicas[busy].get_queue_len = slow
        assert await chosen(router, request(1, prefix)) == {home: 1}

    routed(story)
