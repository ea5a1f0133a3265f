"""The engine: requests in, one step of the model at a time, outputs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fuserve.decoder.step import BLOCK_SIZE_TOKENS, Executor, PipelinedExecutor
from fuserve.engine.admission import Limits
from fuserve.engine.block_manager import BlockManager
from fuserve.engine.config import EngineConfig
from fuserve.engine.embedding import Pooling
from fuserve.engine.generation import Generation
from fuserve.engine.guided import GuideCompiler
from fuserve.engine.intake import Intake, Terms
from fuserve.engine.open_requests import OpenRequests
from fuserve.engine.outputs import RequestOutput, RequestUpdate
from fuserve.engine.pace import Pace
from fuserve.engine.prompt_scores import max_rows
from fuserve.engine.request import Request
from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.scheduler import Scheduler
from fuserve.engine.sequence import Chunk, SequenceStatus
from fuserve.engine.sequence import Sequence as TokenSequence
from fuserve.engine.stats import EngineStats, TokenTotals
from fuserve.engine.step_builder import ChunkResults
from fuserve.engine.step_cost import StepCost, StepLoad
from fuserve.engine.steps_in_flight import StepsInFlight
from fuserve.engine.text_codec import TextCodec
from fuserve.engine.touch_ahead import TouchAhead
from fuserve.errors import DeadlineError, FuserveError, RankFailedError, RequestFailedError


@dataclass(frozen=True, slots=True)
class LastStep:
    """What the executor did last, and how long it took, earlier steps not counted."""

    load: StepLoad
    execute_s: float


class Engine:
    """Runs many requests together. Not thread-safe: one thread enqueues, aborts and steps.

    ``check_request`` and ``prepare`` may be called from any thread.

    A request's tokens do not depend on what else runs. One that fails ends alone; the others do
    not notice. Only when a rank of a parallel executor fails, all end, and ``restart`` is needed.

    Args:
        executor: the model and its KV cache.
        codec: the tokenizer; None generates token ids without text and knows no end of sequence.
        config: limits.
        clock: monotonic seconds.

    Attributes:
        last_step: None if the last ``step`` ran nothing.
    """

    def __init__(
        self,
        executor: Executor,
        codec: TextCodec | None,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._group = executor if isinstance(executor, PipelinedExecutor) else None
        self._codec = codec
        self._config = config
        self._clock = clock
        vocab_size = executor.spec.vocab_size
        self._intake = Intake(
            limits=Limits(
                vocab_size=vocab_size,
                max_model_len=config.max_model_len,
                cache_tokens=executor.num_blocks * BLOCK_SIZE_TOKENS,
            ),
            guides=GuideCompiler(codec, vocab_size),
            codec=codec,
            num_speculative_tokens=config.num_speculative_tokens,
            shares_prefixes=config.enable_prefix_caching,
            clock=clock,
        )
        self._in_flight = StepsInFlight(executor, clock)
        self._blocks = BlockManager(executor.num_blocks, retain=config.enable_prefix_caching)
        self._cost = StepCost()
        max_itl_s = None if config.max_itl_ms is None else config.max_itl_ms * 1e-3
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_prompt_logits=max_rows(vocab_size),
            pace=Pace(self._cost, max_itl_s),
            num_in_flight=self._in_flight.capacity,
        )
        self._touch_ahead = TouchAhead(executor, num_ahead=2 * config.max_num_seqs)
        self._open = OpenRequests()
        self._totals = TokenTotals()
        self.last_step: LastStep | None = None

    @property
    def hidden_size(self) -> int:
        """Length of an embedding."""
        return self._executor.spec.hidden_size

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has not ended."""
        return len(self._open) > 0

    @property
    def num_running(self) -> int:
        """Completions that take part in steps."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Completions that wait for room."""
        return self._scheduler.num_waiting

    @property
    def num_free_blocks(self) -> int:
        """KV-cache blocks that no request holds."""
        return self._blocks.num_free

    @property
    def num_queued_requests(self) -> int:
        """Requests that have not begun."""
        return self._open.num_queued

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens of the requests that have not begun."""
        return self._open.num_queued_tokens

    def stats(self) -> EngineStats:
        """All figures of this moment. May be called from any thread."""
        return EngineStats(
            num_running=len(self._open) - self._open.num_queued,
            num_waiting=self._open.num_queued,
            num_waiting_tokens=self._open.num_queued_tokens,
            num_preemptions_total=self._scheduler.num_preemptions,
            num_blocks=self._blocks.num_blocks,
            num_free_blocks=self._blocks.num_free,
            num_cached_blocks=self._blocks.num_retained,
            prefix_query_tokens_total=self._scheduler.num_prefix_queries,
            prefix_hit_tokens_total=self._scheduler.num_prefix_hits,
            draft_tokens_total=self._totals.draft,
            accepted_tokens_total=self._totals.accepted,
            prompt_tokens_total=self._totals.prompt,
            generation_tokens_total=self._totals.generation,
        )

    @property
    def failure(self) -> RankFailedError | None:
        """Why the executor cannot step until ``restart``; None while it can. For any thread."""
        return self._group.failure if self._group is not None else None

    def on_failure(self, notify: Callable[[], None]) -> None:
        """Call ``notify``, on some other thread, whenever ``failure`` is set."""
        if self._group is not None:
            self._group.on_failure(notify)

    def restart(self) -> None:
        """Start the executor's ranks anew after a failure, once ``fail_all`` has ended everything.

        Raises:
            RankFailedError: they do not start; it may be tried again.
        """
        if self._group is None:
            return
        self._group.restart()
        self._in_flight.forget()
        self._blocks.forget_all()
        self._touch_ahead.forget()

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise what ``add_request`` would, without adding.

        A constraint is compiled here, in the caller's thread, and kept for ``prepare``.
        """
        self._intake.check(prompt_token_ids, params)

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
    ) -> str:
        """Queue a request and return its id; ``prepare`` tells of arguments and errors."""
        request = self.prepare(prompt_token_ids, params, Terms(request_id, prompt))
        self.enqueue(request)
        return request.request_id

    def prepare(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, terms: Terms
    ) -> Request:
        """Make a request, all but queue it. It arrives now.

        Args:
            prompt_token_ids: what the model reads.
            params: how to go on from there, and when to end.
            terms: its id, priority and the like.

        Raises:
            InvalidRequestError: it could never be served.
            CapacityError: the cache is too small for the prompt.
        """
        return self._intake.completions(prompt_token_ids, params, terms)

    def check_embedding(self, prompt_token_ids: Sequence[int]) -> None:
        """Raise what ``prepare_embedding`` would, but for the pooling. Any thread may call it."""
        self._intake.check_embedding(prompt_token_ids)

    def add_embedding(
        self,
        prompt_token_ids: Sequence[int],
        pooling: Pooling,
        *,
        normalize: bool = True,
        request_id: str | None = None,
        prompt: str | None = None,
    ) -> str:
        """Queue a prompt to be embedded and return the request's id.

        ``prepare_embedding`` tells of arguments and errors.
        """
        terms = Terms(request_id, prompt)
        request = self.prepare_embedding(prompt_token_ids, pooling, terms, normalize=normalize)
        self.enqueue(request)
        return request.request_id

    def prepare_embedding(
        self,
        prompt_token_ids: Sequence[int],
        pooling: Pooling,
        terms: Terms,
        *,
        normalize: bool = True,
    ) -> Request:
        """Make a request for an embedding, all but queue it.

        Its ``RequestOutput`` has an ``embedding`` and no ``outputs``.

        Args:
            prompt_token_ids: what the model reads.
            pooling: of the hidden states of all tokens: their mean, or the last.
            terms: as of ``prepare``.
            normalize: to unit length.

        Raises:
            InvalidRequestError: it could never be served, or the pooling is not known.
            CapacityError: the cache is too small for the prompt.
        """
        return self._intake.embedding(prompt_token_ids, pooling, normalize, terms)

    def enqueue(self, request: Request) -> None:
        """Queue a prepared request.

        Raises:
            InvalidRequestError: its id is in use.
        """
        self._open.add(request)
        leader, *followers = request.sequences
        leader.followers = followers
        self._scheduler.add(leader)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free its blocks; None if it is unknown or has ended."""
        request = self._open.get(request_id)
        if request is None:
            return None
        for generation in request.generations:
            if generation.finish_reason is None:
                generation.end("abort")
        return self._retire(request)

    def abort_all(self) -> list[RequestUpdate]:
        """End all requests now."""
        outputs = [self.abort(request.request_id) for request in self._open.all()]
        return [RequestUpdate(o.request_id, [], o) for o in outputs if o is not None]

    def fail_all(self, error: FuserveError) -> list[RequestUpdate]:
        """End all requests with an error."""
        updates: dict[str, RequestUpdate] = {}
        self._end_all(error, updates)
        return list(updates.values())

    def step(self) -> list[RequestUpdate]:
        """Run one step of the model; return what it did to each request it touched.

        If the executor fails, the chunks of this step are run one by one, and the requests whose
        chunks fail again end with an error; all others go on. If a rank fails, ``failure`` is set
        and all requests end with it.
        """
        updates = self._expire()
        self.last_step = None
        try:
            self._fill_pipeline()
            if len(self._in_flight) > 0:
                self._finish_step(updates)
                self._touch_ahead.after_step(self._blocks.num_ever_used)
        except RankFailedError as error:
            self._in_flight.forget()  # what all had computed is gone with the ranks
            self._end_all(error, updates)
        return list(updates.values())

    def _fill_pipeline(self) -> None:
        """Begin as many steps as there is room and work for."""
        while self._in_flight.has_room:
            schedule = self._scheduler.schedule()
            if not schedule.chunks:
                break
            self._begin(schedule.chunks)
            self._in_flight.begin(schedule)

    def _finish_step(self, updates: dict[str, RequestUpdate]) -> None:
        step = self._in_flight.finish()
        self.last_step = LastStep(step.schedule.load, step.execute_s)
        if not step.outcome.failed and not step.schedule.copies:
            self._cost.observe(step.schedule.load, step.execute_s)
        for chunk, error in step.outcome.failed:
            self._fail_sequence(chunk.sequence, error, updates)
        for chunks, results in step.outcome.done:
            self._scheduler.advance(
                chunk for chunk in chunks if chunk.sequence.status is SequenceStatus.RUNNING
            )
            for of_chunk in results:
                self._read(of_chunk, updates)

    def _end_all(self, error: FuserveError, updates: dict[str, RequestUpdate]) -> None:
        for request in self._open.all():
            update = updates.setdefault(request.request_id, RequestUpdate(request.request_id, []))
            self._fail(request, update, error)

    def _begin(self, chunks: list[Chunk]) -> None:
        """Note which requests are in a step for the first time."""
        for chunk in chunks:
            request, _ = self._open.owner(chunk.sequence)
            if not request.has_begun:
                self._open.begin(request, self._clock())
                self._totals.prompt += len(request.prompt_token_ids)

    def _expire(self) -> dict[str, RequestUpdate]:
        """End the requests whose time is over."""
        updates: dict[str, RequestUpdate] = {}
        for request in self._open.expired(self._clock()):
            assert request.deadline_s is not None
            update = updates[request.request_id] = RequestUpdate(request.request_id, [])
            timeout_s = request.deadline_s - request.arrival_s
            message = f"{request.request_id} did not end within its {timeout_s:g} s."
            self._fail(request, update, DeadlineError(message), keep_cached=True)
        return updates

    def _read(self, results: ChunkResults, updates: dict[str, RequestUpdate]) -> None:
        """Give what a step computed to the request, unless it has failed in this very step."""
        sequence = results.chunk.sequence
        if sequence.status is SequenceStatus.FINISHED:
            return
        request, generation = self._open.owner(sequence)
        update = updates.get(request.request_id) or RequestUpdate(request.request_id, [])
        try:
            if request.prompt_scores is not None:
                request.prompt_scores.read(results.prompt_logits)
            if request.embedding is not None:
                request.embedding.read(results.prompt_hidden)
            if generation is not None and results.chunk.samples:
                self._choose(request, generation, results, update)
        except Exception as error:
            self._fail(request, update, error)
        else:
            if request.finished:
                update.output = self._retire(request)
            elif generation is not None and generation.finish_reason is not None:
                self._release(sequence)
        if update.pieces or update.output is not None:
            updates[request.request_id] = update

    def _choose(
        self,
        request: Request,
        generation: Generation,
        results: ChunkResults,
        update: RequestUpdate,
    ) -> None:
        """The next token, and one more for each draft that proves right."""
        drafts = results.chunk.draft_tokens
        num_accepted = 0
        for row, draft in zip(results.next_logits, (*drafts, None), strict=True):
            piece = generation.advance(row)
            update.pieces.append(piece)
            self._totals.generation += 1
            if request.first_token_s is None:
                request.first_token_s = self._clock()
                if request.prompt_scores is not None:
                    update.prompt_logprobs = request.prompt_scores.entries
            num_accepted += piece.token_ids[-1] == draft
            if generation.finish_reason is not None or piece.token_ids[-1] != draft:
                break
        self._scheduler.accept(generation.sequence, num_accepted)
        generation.learn(len(drafts), num_accepted)
        self._totals.draft += len(drafts)
        self._totals.accepted += num_accepted
        generation.sequence.draft_tokens = generation.propose(self._scheduler.num_running)

    def _fail_sequence(
        self, sequence: TokenSequence, error: Exception, updates: dict[str, RequestUpdate]
    ) -> None:
        """End the request of a sequence that the executor could not compute."""
        if sequence.status is SequenceStatus.FINISHED:
            return  # another completion of the request has failed before
        request, _ = self._open.owner(sequence)
        failure = RequestFailedError(
            f"The model's step failed, and {request.request_id} with it: {error!r}"
        )
        failure.__cause__ = error
        update = updates.setdefault(request.request_id, RequestUpdate(request.request_id, []))
        self._fail(request, update, failure)

    def _fail(
        self,
        request: Request,
        update: RequestUpdate,
        error: Exception,
        *,
        keep_cached: bool = False,
    ) -> None:
        """End a request with an error; the cause of an unexpected one is kept."""
        failure = error if isinstance(error, FuserveError) else RequestFailedError(repr(error))
        if failure is not error:
            failure.__cause__ = error
        for generation in request.generations:
            if generation.finish_reason is None:
                update.pieces.append(generation.end("error"))
        update.output = self._retire(request, failure, keep_cached=keep_cached)

    def _retire(
        self, request: Request, error: FuserveError | None = None, *, keep_cached: bool = True
    ) -> RequestOutput:
        for sequence in request.sequences:
            self._release(sequence, keep_cached=keep_cached)
        self._open.remove(request)
        return request.output(self._clock(), error)

    def _release(self, sequence: TokenSequence, *, keep_cached: bool = True) -> None:
        if sequence.status is not SequenceStatus.FINISHED:
            self._scheduler.finish(sequence, failed=not keep_cached)
            self._open.release(sequence)
