"""Generation: one completion in the making, from a row of logits to a piece of text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fuserve.engine.outputs import CompletionOutput, FinishReason, Logprob, Piece, TokenLogprobs
from fuserve.engine.sampler import TokenSampler
from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.sequence import Sequence
from fuserve.engine.stop import StopStrings
from fuserve.engine.text_codec import TextCodec, TextStream
from fuserve.errors import RequestFailedError
from fuserve.kernels.sampling import SampledToken, SampleStatus


class Generation:
    """Chooses tokens, turns them into text, and sees when to stop.

    Args:
        index: among the ``n`` completions of the request.
        sequence: its tokens; every chosen token is appended.
        params: of the request.
        seed: of the request, given or drawn.
        max_len: tokens of prompt and output at which the completion ends.
        codec: None generates token ids only, with empty text.
    """

    def __init__(
        self,
        index: int,
        sequence: Sequence,
        params: SamplingParams,
        *,
        seed: int,
        max_len: int,
        codec: TextCodec | None,
    ) -> None:
        self.index = index
        self.sequence = sequence
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._params = params
        self._max_len = max_len
        self._codec = codec
        self._sampler = TokenSampler(params, sequence.tokens, seed=seed, branch=index)
        self._stop = StopStrings(params.stop_strings, keep=params.include_stop_str_in_output)
        self._stop_ids = params.stop_ids
        self._eos_ids: frozenset[int] = frozenset()
        self._stream: TextStream | None = None
        if codec is not None:
            self._stream = codec.stream(
                sequence.tokens, skip_special_tokens=params.skip_special_tokens
            )
            if not params.ignore_eos:
                self._eos_ids = codec.eos_token_ids
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []

    def advance(self, logits: npt.NDArray[np.float32]) -> Piece:
        """Choose the next token from its logits  # [vocab]

        Raises:
            RequestFailedError: the logits cannot be sampled; this completion alone is affected.
        """
        chosen = self._sampler.sample(logits)
        if chosen.status is not SampleStatus.OK:
            raise RequestFailedError(
                f"Token {self._num_generated + 1} could not be chosen: "
                f"{chosen.status.description}. Other requests go on."
            )
        self.sequence.tokens.append(chosen.token)
        text = self._text_of(chosen.token)
        self._texts.append(text)
        return Piece(
            self.index,
            text,
            (chosen.token,),
            self._report_logprobs(chosen),
            self.finish_reason,
            self.stop_reason,
        )

    def end(self, reason: FinishReason) -> Piece:
        """End the completion from outside; the piece holds the text that was held back."""
        self.finish_reason = reason
        # After an error the detokenizer is not asked again: it may be what has failed.
        text = self._stop.flush() if reason == "error" else self._rest()
        self._texts.append(text)
        return Piece(self.index, text, (), None, reason)

    def completion(self) -> CompletionOutput:
        """All that was generated so far."""
        wants_logprobs = self._params.logprobs is not None
        token_ids = tuple(self.sequence.tokens[self.sequence.num_prompt_tokens :])
        chosen = zip(token_ids, self._logprobs, strict=False)  # an error may leave one out
        return CompletionOutput(
            index=self.index,
            text="".join(self._texts),
            token_ids=token_ids,
            logprobs=tuple(self._logprobs) if wants_logprobs else None,
            cumulative_logprob=(
                sum(entry[token].logprob for token, entry in chosen) if wants_logprobs else None
            ),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    @property
    def _num_generated(self) -> int:
        return len(self.sequence.tokens) - self.sequence.num_prompt_tokens

    def _text_of(self, token: int) -> str:
        """The text that may be emitted with this token; decides whether it is the last one."""
        stops = token in self._stop_ids
        ends = stops or token in self._eos_ids
        text = ""
        if self._stream is not None and (not ends or self._params.include_stop_str_in_output):
            text = self._stop.push(self._stream.step(token))
        if self._stop.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._stop.matched
            return text
        if ends:
            self.finish_reason, self.stop_reason = "stop", token if stops else None
        elif len(self.sequence.tokens) >= self._max_len:
            self.finish_reason = "length"
        return text if self.finish_reason is None else text + self._rest()

    def _rest(self) -> str:
        """What was held back of the text's end, now that it has ended."""
        if self._stream is None:
            return ""
        return self._stop.push(self._stream.flush()) + self._stop.flush()

    def _report_logprobs(self, chosen: SampledToken) -> tuple[TokenLogprobs, ...] | None:
        if self._params.logprobs is None:
            return None
        entry = {chosen.token: Logprob(chosen.logprob, chosen.rank, self._display(chosen.token))}
        alternatives = zip(chosen.top_ids, chosen.top_logprobs, strict=True)
        for rank, (token, logprob) in enumerate(alternatives, start=1):
            if token != chosen.token:
                entry[token] = Logprob(logprob, rank, self._display(token))
        self._logprobs.append(entry)
        return (entry,)

    def _display(self, token: int) -> str:
        return "" if self._codec is None else self._codec.token_text(token)
