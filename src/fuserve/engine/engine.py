"""The engine: requests in, one step of the model at a time, outputs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from fuserve.decoder.step import BLOCK_SIZE_TOKENS, Executor
from fuserve.engine.admission import Limits
from fuserve.engine.block_manager import BlockManager
from fuserve.engine.embedding import Embedding, Pooling
from fuserve.engine.generation import Generation
from fuserve.engine.guided import Constraint, GuideCompiler
from fuserve.engine.outputs import RequestOutput, RequestUpdate
from fuserve.engine.prompt_scores import PromptScores, max_rows
from fuserve.engine.request import Request
from fuserve.engine.sampler import draw_seed
from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.scheduler import Scheduler
from fuserve.engine.sequence import Chunk, SequenceStatus
from fuserve.engine.sequence import Sequence as TokenSequence
from fuserve.engine.speculation import Speculator
from fuserve.engine.step_builder import ChunkResults, build_step, split_rows
from fuserve.engine.text_codec import TextCodec
from fuserve.errors import FuserveError, InvalidRequestError, RequestFailedError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_model_len: tokens of the longest sequence.
        max_num_seqs: completions computed together.
        max_num_batched_tokens: token budget of a step.
        num_speculative_tokens: the most tokens guessed ahead in a step; 0 guesses none.
    """

    max_model_len: int
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    num_speculative_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_speculative_tokens < 0:
            raise InvalidRequestError(
                f"num_speculative_tokens must be at least 0, got {self.num_speculative_tokens}."
            )


class Engine:
    """Runs many requests together. Not thread-safe: one thread adds, aborts and steps.

    A request's tokens do not depend on what else runs. One that fails ends alone; the others do
    not notice.

    Args:
        executor: the model and its KV cache.
        codec: the tokenizer; None generates token ids without text and knows no end of sequence.
        config: limits.
        clock: monotonic seconds.
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
        self._codec = codec
        self._clock = clock
        self._config = config
        self._guides = GuideCompiler(codec, executor.spec.vocab_size)
        self._limits = Limits(
            vocab_size=executor.spec.vocab_size,
            max_model_len=config.max_model_len,
            cache_tokens=executor.num_blocks * BLOCK_SIZE_TOKENS,
        )
        self._blocks = BlockManager(executor.num_blocks)
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_prompt_logits=max_rows(executor.spec.vocab_size),
        )
        self._arrivals = count()
        self._requests: dict[str, Request] = {}
        # Which completion a scheduled sequence belongs to; None where its prompt is embedded.
        self._owners: dict[TokenSequence, tuple[Request, Generation | None]] = {}

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._requests)

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

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise what ``add_request`` would, without adding. Any thread may call it.

        A constraint is compiled here, in the caller's thread, and kept for ``add_request``.
        """
        self._limits.check(prompt_token_ids, params)
        if params.guided is not None:
            self._guides.check(params.guided)

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
    ) -> str:
        """Queue a request and return its id.

        Args:
            prompt_token_ids: what the model reads.
            params: how to go on from there, and when to end.
            request_id: unique among the unfinished; None draws one.
            prompt: its text, for the output.

        Raises:
            InvalidRequestError: it could never be served, or the id is in use.
            CapacityError: the cache is too small for the prompt.
        """
        self._limits.check(prompt_token_ids, params)
        arrival = next(self._arrivals)
        request_id = f"request-{arrival}" if request_id is None else request_id
        if request_id in self._requests:
            raise InvalidRequestError(f"The request id {request_id!r} is in use.")
        request = Request(request_id, prompt, tuple(prompt_token_ids), params, self._clock())
        seed = draw_seed() if params.seed is None else params.seed
        if params.prompt_logprobs is not None:
            request.prompt_scores = PromptScores(
                request.prompt_token_ids, params.prompt_logprobs, self._codec
            )
        for branch in range(params.n):
            sequence = TokenSequence(
                (arrival, branch), list(prompt_token_ids), len(prompt_token_ids)
            )
            constraint = None if params.guided is None else self._guides.constraint(params.guided)
            generation = Generation(
                branch,
                sequence,
                params,
                seed=seed,
                max_len=self._limits.max_len(len(prompt_token_ids), params),
                codec=self._codec,
                constraint=constraint,
                speculator=self._speculator(constraint),
            )
            request.generations.append(generation)
            self._owners[sequence] = (request, generation)
        leader, *followers = request.sequences
        leader.followers = followers
        if request.prompt_scores is not None:
            leader.prompt_rows = request.prompt_scores.rows
            leader.reuses_prefix = False
        self._requests[request_id] = request
        self._scheduler.add(leader)
        return request_id

    def check_embedding(self, prompt_token_ids: Sequence[int]) -> None:
        """Raise what ``add_embedding`` would, without adding. Any thread may call it."""
        self._limits.check_prompt(prompt_token_ids, room=0)

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

        Its ``RequestOutput`` has an ``embedding`` and no ``outputs``.

        Args:
            prompt_token_ids: what the model reads.
            pooling: of the hidden states of all tokens: their mean, or the last.
            normalize: to unit length.
            request_id: unique among the unfinished; None draws one.
            prompt: its text, for the output.

        Raises:
            InvalidRequestError: it could never be served, or the id is in use.
            CapacityError: the cache is too small for the prompt.
        """
        self.check_embedding(prompt_token_ids)
        embedding = Embedding(len(prompt_token_ids), pooling, normalize=normalize)
        arrival = next(self._arrivals)
        request_id = f"request-{arrival}" if request_id is None else request_id
        if request_id in self._requests:
            raise InvalidRequestError(f"The request id {request_id!r} is in use.")
        request = Request(
            request_id, prompt, tuple(prompt_token_ids), SamplingParams(), self._clock()
        )
        request.embedding = embedding
        request.reader = TokenSequence(
            (arrival, 0),
            list(prompt_token_ids),
            len(prompt_token_ids),
            reuses_prefix=pooling == "last",
            prompt_rows=embedding.rows,
        )
        self._owners[request.reader] = (request, None)
        self._requests[request_id] = request
        self._scheduler.add(request.reader)
        return request_id

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free its blocks; None if it is unknown or has ended."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for generation in request.generations:
            if generation.finish_reason is None:
                generation.end("abort")
        return self._retire(request)

    def step(self) -> list[RequestUpdate]:
        """Run one step of the model; return what it did to each request it touched.

        If the executor fails, the requests of this step end with an error; others go on.
        """
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        now_s = self._clock()
        for chunk in chunks:
            request, _ = self._owners[chunk.sequence]
            if request.scheduled_s is None:
                request.scheduled_s = now_s
        batch = build_step(chunks)
        try:
            logits = self._executor.step(batch)
        except Exception as error:
            return self._fail_step(chunks, error)
        self._scheduler.advance(chunks)
        updates: dict[str, RequestUpdate] = {}
        for results in split_rows(chunks, logits, batch.hidden):
            self._read(results, updates)
        return list(updates.values())

    def _read(self, results: ChunkResults, updates: dict[str, RequestUpdate]) -> None:
        """Give what a step computed to the request, unless it has failed in this very step."""
        sequence = results.chunk.sequence
        if sequence.status is SequenceStatus.FINISHED:
            return
        request, generation = self._owners[sequence]
        update = RequestUpdate(request.request_id, [])
        update = updates.get(request.request_id, update)
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
            self._settle(request, generation, update)
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
            if request.first_token_s is None:
                request.first_token_s = self._clock()
            num_accepted += piece.token_ids[-1] == draft
            if generation.finish_reason is not None or piece.token_ids[-1] != draft:
                break
        self._scheduler.accept(generation.sequence, num_accepted)
        if generation.speculator is not None:
            generation.speculator.observe(len(drafts), num_accepted)
        generation.sequence.draft_tokens = generation.propose(self._scheduler.num_running)

    def _settle(
        self, request: Request, generation: Generation | None, update: RequestUpdate
    ) -> None:
        """Let go of what has come to its end."""
        if request.finished:
            update.output = self._retire(request)
        elif generation is not None and generation.finish_reason is not None:
            self._release(generation.sequence)

    def _speculator(self, constraint: Constraint | None) -> Speculator | None:
        longest = self._config.num_speculative_tokens
        return Speculator(longest, constraint) if longest > 0 else None

    def _fail_step(self, chunks: list[Chunk], error: Exception) -> list[RequestUpdate]:
        failure = RequestFailedError(f"The model's step failed: {error!r}")
        failure.__cause__ = error
        requests = {self._owners[c.sequence][0].request_id for c in chunks}
        updates = [RequestUpdate(request_id, []) for request_id in sorted(requests)]
        for update in updates:
            self._fail(self._requests[update.request_id], update, failure)
        return updates

    def _fail(self, request: Request, update: RequestUpdate, error: Exception) -> None:
        """End a request with an error; the cause of an unexpected one is kept."""
        failure = error if isinstance(error, FuserveError) else RequestFailedError(repr(error))
        if failure is not error:
            failure.__cause__ = error
        for generation in request.generations:
            if generation.finish_reason is None:
                update.pieces.append(generation.end("error"))
        update.output = self._retire(request, failure)

    def _retire(self, request: Request, error: FuserveError | None = None) -> RequestOutput:
        for sequence in request.sequences:
            self._release(sequence)
        del self._requests[request.request_id]
        return request.output(self._clock(), error)

    def _release(self, sequence: TokenSequence) -> None:
        if sequence.status is not SequenceStatus.FINISHED:
            self._scheduler.finish(sequence)
            del self._owners[sequence]
