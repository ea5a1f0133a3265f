"""Generation: one completion in the making, from a row of logits to a piece of text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fuserve.engine.guided import Constraint
from fuserve.engine.outputs import (
    CompletionOutput,
    FinishReason,
    Piece,
    TokenLogprobs,
    token_logprobs,
)
from fuserve.engine.sampler import TokenSampler
from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.sequence import Sequence
from fuserve.engine.speculation import Speculator
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
        constraint: what the text must look like, at its beginning.
        speculator: guesses what follows; None decodes a token a step.
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
        constraint: Constraint | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self.index = index
        self.sequence = sequence
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.speculator = speculator
        self._params = params
        self._max_len = max_len
        self._codec = codec
        self._stop = StopStrings(params.stop_strings, keep=params.include_stop_str_in_output)
        self._stop_ids = params.stop_ids
        self._eos_ids: frozenset[int] = frozenset()
        self._stream: TextStream | None = None
        if codec is not None:
            self._stream = codec.stream(
                sequence.tokens, skip_special_tokens=params.skip_special_tokens
            )
            # A grammar has no more to say once it has let the end of the sequence pass.
            if not params.ignore_eos or constraint is not None:
                self._eos_ids = codec.eos_token_ids
        self._sampler = TokenSampler(
            params,
            sequence.tokens,
            seed=seed,
            branch=index,
            end_ids=self._eos_ids | self._stop_ids,
            constraint=constraint,
        )
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []

    def advance(self, logits: npt.NDArray[np.float32]) -> Piece:
        """Choose the next token from its logits  # [vocab]

        Raises:
            RequestFailedError: the logits cannot be sampled or the constraint cannot be kept up;
                this completion alone is affected.
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

    def propose(self, num_decoding: int) -> list[int]:
        """A guess of the next tokens, for a step in which so many sequences decode."""
        room = self._max_len - len(self.sequence.tokens) - 1  # the last token needs no guess
        if self.speculator is None or room <= 0 or self.finish_reason is not None:
            return []
        return self.speculator.propose(self.sequence.tokens, num_decoding)[:room]

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Note how many tokens of the latest guess were tried, and how many were right."""
        if self.speculator is not None:
            self.speculator.observe(num_drafted, num_accepted)

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
            text = self._stream.step(token)
            if self._num_generated > self._params.min_tokens:
                text = self._stop.push(text)
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
        entry = token_logprobs(chosen, self._display)
        self._logprobs.append(entry)
        return (entry,)

    def _display(self, token: int) -> str:
        return "" if self._codec is None else self._codec.token_text(token)
