"""ImageGroup: the other ranks of an image model, as rank 0 holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from fuserve.diffusion.program import Array
from fuserve.errors import RankFailedError
from fuserve.parallel.images.assignment import ImageAssignment
from fuserve.parallel.images.commands import Command, Stop, encode
from fuserve.parallel.images.wiring import BANDS, HALVES, ImageWiring
from fuserve.parallel.local_communicator import LocalCommunicator
from fuserve.parallel.local_group import LocalGroup
from fuserve.parallel.placement import Cpus

_LEAVE_S = 5.0
_PROGRAM = "fuserve.parallel.images.local_worker"


class Link:
    """Rank 0's communicator, whichever ranks have been started last; see ``Gatherer``.

    Args:
        size: how many ranks exchange.
    """

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size
        self.current: LocalCommunicator | None = None

    def all_gather(self, parts: Sequence[Array]) -> None:
        """Bring every rank's part to all ranks."""
        if self.current is None:
            raise RankFailedError("The processes that paint together have been ended.")
        self.current.all_gather(parts)

    def abort(self) -> None:
        """Let all ranks' present and later exchanges fail at once. For any thread."""
        current = self.current
        if current is not None:
            current.abort()

    def close(self) -> None:
        """Let go of the memory."""
        self.current = None


class ImageGroup:
    """Ranks 1, 2, ... on this host: started, told what to do, ended.

    When one dies or hangs all are killed; ``ensure`` starts them again.

    Args:
        assignment: what all ranks are told.
        places: the CPUs of each.

    Attributes:
        assignment: as given, or as of ``reassign``.
        bands: to exchange what bands need; None: every rank has the whole image.
        halves: to exchange the halves of guidance; None: there are none.
        starts: how often the ranks have been started.
    """

    def __init__(self, assignment: ImageAssignment, places: Sequence[Cpus]) -> None:
        self.assignment, self._places = assignment, places
        parallel = assignment.parallel
        self.bands = Link(parallel.patch_parallel) if parallel.patch_parallel > 1 else None
        self.halves = Link(parallel.cfg_parallel) if parallel.cfg_parallel > 1 else None
        self.starts = 0
        self._group: LocalGroup | None = None
        self._resources = ExitStack()

    @property
    def process_ids(self) -> list[int]:
        """Of all ranks but 0."""
        return [] if self._group is None else self._group.process_ids

    def ensure(self) -> None:
        """Start the ranks, if they do not run.

        Raises:
            RankFailedError: one does not start.
        """
        if self._group is not None and self._group.failure is None:
            return
        self.close()
        with ExitStack() as resources:
            wiring = ImageWiring(self.assignment.parallel)
            resources.callback(wiring.release)
            for link, use in ((self.bands, BANDS), (self.halves, HALVES)):
                communicator = wiring.communicator(use)
                if link is None or communicator is None:
                    continue
                link.current = communicator
                resources.callback(link.close)
            parallel = self.assignment.parallel
            group = LocalGroup(
                _PROGRAM,
                wiring.descriptors(),
                step_timeout_s=parallel.step_timeout_s,
                join_timeout_s=parallel.join_timeout_s,
                on_failure=lambda _: self._abort(),
            )
            resources.callback(group.close)
            told = {
                rank: {
                    "rank": rank,
                    "assignment": self.assignment.to_json(),
                    "cpus": sorted(self._places[rank]),
                    "ends": wiring.ends(rank),
                }
                for rank in range(1, parallel.num_ranks)
            }
            wiring.release()
            group.tell(told)
            group.hear("ready")
            self.starts += 1
            self._group, self._resources = group, resources.pop_all()

    def reassign(self, assignment: ImageAssignment) -> None:
        """Have ranks that are told this from the next start on; those that run end."""
        self.assignment = assignment
        self.close()

    def check(self) -> None:
        """Raise RankFailedError if a rank has failed, or none runs."""
        if self._group is None:
            raise RankFailedError("The processes that paint together have been ended.")
        self._group.check()

    @contextmanager
    def telling(self, command: Command) -> Iterator[None]:
        """Tell the ranks what this one does in the block.

        Raises:
            RankFailedError: a rank has died or hangs, or something went wrong in the block.
        """
        self.check()
        group = self._group
        assert group is not None
        data = encode(command)
        try:
            with group.stepping():
                for process in group.processes:
                    process.control.send_bytes(data)
                yield
        except Exception:
            raise
        except BaseException:
            self._abort()  # interrupted: the others would go on with a step that ended here
            self.close()
            raise

    def close(self) -> None:
        """End the ranks, and give back what this process has of them. May be called twice."""
        group, self._group = self._group, None
        if group is None:
            return
        if group.failure is None:
            with suppress(OSError):
                for process in group.processes:
                    process.control.send_bytes(encode(Stop()))
            group.close(leave_s=_LEAVE_S)
        self._resources.close()

    def _abort(self) -> None:
        """Let all present exchanges fail at once. For any thread."""
        for link in (self.bands, self.halves):
            if link is not None:
                link.abort()
