"""Starting and stopping replicas: an embedded Ray, or a cluster that runs already."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from fuserve.errors import FuserveError, MissingExtraError
from fuserve.kernels.machine import num_threads
from fuserve.server.build import ServeSettings

try:
    import ray
    import ray.exceptions
    from ray import serve
    from ray.serve.config import ProxyLocation, RequestRouterConfig
    from ray.serve.schema import LoggingConfig
except ImportError as error:
    raise MissingExtraError("ray", "ray", "fuserve serve --replicas") from error

from fuserve.server.replicas.door import DEPLOYMENT, Door
from fuserve.server.replicas.replica import Replica
from fuserve.server.replicas.router import PrefixRouter

MOST_ONGOING = 100_000
"""Requests that Ray Serve lets a replica have: how many it takes is its own queue's decision."""


@contextmanager
def replicas(
    settings: ServeSettings, num_replicas: int, address: str | None = None
) -> Iterator[Door]:
    """Replicas that take requests, until the block ends.

    Args:
        settings: of each replica. Without a number of threads, replicas on this machine divide
            its cores, and each replica in a cluster has as many as this machine.
        num_replicas: how many.
        address: of a Ray cluster, as ``ray.init`` takes it; None embeds a Ray in this process.

    Raises:
        FuserveError: the cluster cannot be joined, or a replica could not be started; the message
            has the reason.
    """
    is_embedded = address is None
    share = num_replicas if is_embedded else 1
    threads = settings.options.num_threads or max(1, num_threads() // share)
    settings = replace(
        settings,
        options=replace(settings.options, num_threads=threads),
        memory_share=1 / share,
    )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    if is_embedded:
        ray.init(
            address="local",
            num_cpus=num_replicas * threads,
            include_dashboard=False,
            logging_level="error",
        )
    else:
        _join(address)
    application = f"fuserve-{uuid.uuid4().hex[:8]}"  # a cluster may have several doors
    try:
        handle = _deploy(application, settings, num_replicas, threads)
        yield Door(handle, application, num_replicas, settings.config.max_body_bytes)
    finally:
        serve.delete(application)
        if is_embedded:
            serve.shutdown()
        ray.shutdown()


def _join(address: str | None) -> None:
    """Become part of a cluster.

    Raises:
        FuserveError: it is not there, or does not let this process in.
    """
    try:
        ray.init(address=address, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise FuserveError(
            f"no Ray cluster can be joined at {address} ({str(error).partition(chr(10))[0]}). "
            "`ray status --address` shows whether it is up; Ray and Python must be of the same "
            "versions there as here."
        ) from error


def _deploy(application: str, settings: ServeSettings, num_replicas: int, threads: int) -> object:
    """The handle of replicas that are ready."""
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    deployment = serve.deployment(
        Replica,
        name=DEPLOYMENT,
        num_replicas=num_replicas,
        max_ongoing_requests=MOST_ONGOING,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": threads},
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        health_check_period_s=2.0,
        logging_config=quiet,
    )
    try:
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config=quiet)
        return serve.run(
            deployment.bind(settings), name=application, route_prefix=None, logging_config=quiet
        )
    except RuntimeError as error:
        reason = [line for line in str(error).splitlines() if line.strip()][-1]
        raise FuserveError(f"the replicas could not be started: {reason.strip()}") from error
