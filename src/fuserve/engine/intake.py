"""Makes requests: checks what is asked for, and prepares all that the engine will need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from fuserve.engine.admission import Limits
from fuserve.engine.embedding import Embedding, Pooling
from fuserve.engine.generation import Generation
from fuserve.engine.guided import GuideCompiler
from fuserve.engine.prompt_scores import PromptScores
from fuserve.engine.request import Request
from fuserve.engine.sampler import draw_seed
from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.sequence import Sequence as TokenSequence
from fuserve.engine.speculation import Speculator
from fuserve.engine.text_codec import TextCodec


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a request is served.

    Attributes:
        request_id: unique among the unfinished; None draws one.
        prompt: the prompt's text, for the output.
        priority: the lower is served first.
        client: shares the machine evenly with other clients of its priority.
        timeout_s: when to give up, from now on.
    """

    request_id: str | None = None
    prompt: str | None = None
    priority: int = 0
    client: str = ""
    timeout_s: float | None = None


@dataclass(slots=True)
class Intake:
    """Checks and prepares requests. Any thread may call it.

    Attributes:
        limits: what can be served.
        guides: compiles constraints, in the caller's thread.
        codec: the tokenizer, if the model has one.
        num_speculative_tokens: the most tokens guessed ahead; 0 guesses none.
        shares_prefixes: whether requests use what others have computed.
        clock: monotonic seconds.
    """

    limits: Limits
    guides: GuideCompiler
    codec: TextCodec | None
    num_speculative_tokens: int
    shares_prefixes: bool
    clock: Callable[[], float]
    _arrivals: count[int] = field(default_factory=count)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise what ``completions`` would; a constraint is compiled and kept.

        Raises:
            InvalidRequestError: it could never be served.
            CapacityError: the cache is too small for the prompt.
        """
        self.limits.check(prompt_token_ids, params)
        if params.guided is not None:
            self.guides.check(params.guided)

    def completions(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, terms: Terms
    ) -> Request:
        """A request to go on from a prompt; raises as ``check``."""
        self.check(prompt_token_ids, params)
        request, arrival = self._request(prompt_token_ids, params, terms)
        seed = draw_seed() if params.seed is None else params.seed
        for branch in range(params.n):
            sequence = self._sequence(request, terms, arrival, branch)
            constraint = None if params.guided is None else self.guides.constraint(params.guided)
            speculator = None
            if self.num_speculative_tokens > 0:
                speculator = Speculator(self.num_speculative_tokens, constraint)
            generation = Generation(
                branch,
                sequence,
                params,
                seed=seed,
                max_len=self.limits.max_len(len(prompt_token_ids), params),
                codec=self.codec,
                constraint=constraint,
                speculator=speculator,
            )
            request.generations.append(generation)
        if params.prompt_logprobs is not None:
            scores = PromptScores(request.prompt_token_ids, params.prompt_logprobs, self.codec)
            request.prompt_scores = scores
            request.sequences[0].prompt_rows = scores.rows
        return request

    def check_embedding(self, prompt_token_ids: Sequence[int]) -> None:
        """Raise what ``embedding`` would, but for the pooling; raises as ``check``."""
        self.limits.check_prompt(prompt_token_ids, room=0)

    def embedding(
        self, prompt_token_ids: Sequence[int], pooling: Pooling, normalize: bool, terms: Terms
    ) -> Request:
        """A request to embed a prompt; raises as ``check``."""
        self.check_embedding(prompt_token_ids)
        embedding = Embedding(len(prompt_token_ids), pooling, normalize=normalize)
        request, arrival = self._request(prompt_token_ids, SamplingParams(), terms)
        request.embedding = embedding
        request.reader = self._sequence(request, terms, arrival, 0)
        request.reader.prompt_rows = embedding.rows
        return request

    def _request(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, terms: Terms
    ) -> tuple[Request, int]:
        arrival = next(self._arrivals)
        now_s = self.clock()
        request = Request(
            f"request-{arrival}" if terms.request_id is None else terms.request_id,
            terms.prompt,
            tuple(prompt_token_ids),
            params,
            now_s,
            deadline_s=None if terms.timeout_s is None else now_s + terms.timeout_s,
        )
        return request, arrival

    def _sequence(self, request: Request, terms: Terms, arrival: int, branch: int) -> TokenSequence:
        prompt = list(request.prompt_token_ids)
        return TokenSequence(
            (terms.priority, arrival, branch),
            prompt,
            len(prompt),
            client=terms.client,
            # Without sharing between requests, the completions of one still share their prompt.
            cache_salt=b"" if self.shares_prefixes else str(arrival).encode(),
        )
