"""LLM: a model in this process, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from fuserve.architectures import DecoderSpec
from fuserve.checkpoints import Tokenizer, load_tokenizer
from fuserve.decoder import ExecutorOptions, LoadReport
from fuserve.decoder.options import (
    Activations,
    Dtype,
    ExecutorKind,
    KVCacheDtype,
    LoadFormat,
    Quantization,
)
from fuserve.engine.completion_stream import CompletionStream
from fuserve.engine.config import EngineConfig
from fuserve.engine.engine import Engine
from fuserve.engine.outputs import RequestOutput
from fuserve.engine.prompts import Message, Prompt, as_conversations, as_prompts, is_conversation
from fuserve.engine.sampling_params import SamplingParams
from fuserve.engine.shared_engine import Query, SharedEngine
from fuserve.errors import InvalidRequestError
from fuserve.parallel.loading import load_parallel
from fuserve.parallel.options import Balance, ParallelOptions


class LLM:
    """A loaded model. Use it in a ``with`` block, or ``close`` it.

    Several threads may use one: their requests are computed together.

    Args:
        model: a folder, a ``.gguf`` file, a hub id, or ``"demo"``.
        dtype: type of the weights that are not quantized; "auto" keeps the checkpoint's own.
        quantization: "int8", "int4", "w8a8" or "llm-int8" quantizes on load; None keeps the
            checkpoint's own grid.
        group_size: input features that share a scale; None takes the scheme's default.
        symmetric: int4 without zero points.
        quantize_embeddings: quantize embedding and head too.
        quantize_layers: exceptions, such as ``layers.1.down=int8`` or ``*.o=keep``.
        outlier_threshold: magnitude beyond which "llm-int8" keeps a value in float.
        activations: "int8" or "float"; "auto" is int8 where weights are quantized.
        kv_cache_dtype: "float32", "float16", "int8" or "int4"; "auto" follows the weights.
        max_model_len: tokens of the longest sequence; None takes the model's, limited by memory.
        max_num_seqs: completions computed together.
        max_num_batched_tokens: token budget of a step; longer prompts run in chunks.
        num_speculative_tokens: the most tokens guessed ahead in a step, from what the prompt and
            the answer have said before; the answers do not change. 0 guesses none.
        kv_cache_bytes: memory for the KV cache; None plans it.
        num_threads: None counts the usable cores.
        load_format: "dummy" makes random weights from a config alone; there is no tokenizer then.
        executor: "native", or "reference" (extra ``torch``).
        device: of the reference executor.
        rank_invariant: give the same bits over 1, 2 and 4 processes that share layers.
        tensor_parallel_size: processes that share each layer.
        pipeline_parallel_size: stages of consecutive layers, each in processes of its own. This
            process is one of the group; the others run as long as it does.
        balance: stages of equal "bytes", or of equal time as "measured".
        step_timeout_s: a step that takes longer has a process that hangs.
        join_timeout_s: how long a starting process may say nothing.
        progress: called with the stage of loading, the work done, and the work in all.

    Raises:
        ModelNotFoundError, CheckpointError, UnsupportedModelError, CapacityError: on loading.
        RankFailedError: another process does not start, or has another model or version.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: Dtype = "auto",
        quantization: Quantization | None = None,
        group_size: int | None = None,
        symmetric: bool = False,
        quantize_embeddings: bool = False,
        quantize_layers: Sequence[str] = (),
        outlier_threshold: float | None = None,
        activations: Activations = "auto",
        kv_cache_dtype: KVCacheDtype = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 512,
        num_speculative_tokens: int = 0,
        kv_cache_bytes: int | None = None,
        num_threads: int | None = None,
        load_format: LoadFormat = "auto",
        executor: ExecutorKind = "native",
        device: str = "cpu",
        rank_invariant: bool = False,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        balance: Balance = "bytes",
        step_timeout_s: float = 60.0,
        join_timeout_s: float = 60.0,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        options = ExecutorOptions(
            dtype=dtype,
            quantization=quantization,
            group_size=group_size,
            symmetric=symmetric,
            quantize_embeddings=quantize_embeddings,
            quantize_layers=tuple(quantize_layers),
            outlier_threshold=outlier_threshold,
            activations=activations,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_bytes=kv_cache_bytes,
            num_threads=num_threads,
            load_format=load_format,
            executor=executor,
            device=device,
            rank_invariant=rank_invariant,
        )
        parallel = ParallelOptions(
            tensor_parallel_size, pipeline_parallel_size, balance, step_timeout_s, join_timeout_s
        )
        self._loaded = loaded = load_parallel(str(model), options, parallel, progress)
        checkpoint = loaded.checkpoint
        self._tokenizer = None if checkpoint is None else load_tokenizer(checkpoint)
        config = EngineConfig(
            loaded.max_model_len,
            max_num_seqs,
            max_num_batched_tokens,
            num_speculative_tokens=num_speculative_tokens,
        )
        self._engine = SharedEngine(Engine(loaded.executor, self._tokenizer, config))

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def spec(self) -> DecoderSpec:
        """What the model is."""
        return self._loaded.spec

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence, prompt and output."""
        return self._loaded.max_model_len

    @property
    def load_report(self) -> LoadReport:
        """How the model was loaded: seconds, bytes, threads, formats."""
        return self._loaded.report

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InvalidRequestError: a dummy model has none.
        """
        if self._tokenizer is None:
            raise InvalidRequestError(
                'A model loaded with load_format="dummy" has no tokenizer: pass token ids.'
            )
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's ``generation_config.json`` recommends; used where none are given."""
        checkpoint = self._loaded.checkpoint
        config = {} if checkpoint is None else checkpoint.generation_config
        return SamplingParams.from_generation_config(config)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete all prompts together.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            params: for all prompts, or one for each; None takes the model's defaults.

        Returns:
            One output a prompt, in their order. An output whose request failed while it ran has
            its ``error`` set; the others are complete.

        Raises:
            InvalidRequestError, CapacityError: a prompt is refused; none is run then.
        """
        self._engine.check_open()
        encoded = [self._encode(prompt) for prompt in as_prompts(prompts)]
        return self._engine.run(self._queries(encoded, params))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_args: Any,
    ) -> list[RequestOutput]:
        """Answer conversations, all together.

        Args:
            messages: one conversation, or a list of them.
            params: for all conversations, or one for each; None takes the model's defaults.
            tools: JSON schemas of functions, for templates that know them.
            add_generation_prompt: open the assistant's turn.
            template_args: further variables of the chat template.

        Returns:
            As ``generate``.

        Raises:
            InvalidRequestError: the model has no chat template, or it refuses the messages.
        """
        self._engine.check_open()
        encoded = [
            self._encode_chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                **template_args,
            )
            for conversation in as_conversations(messages)
        ]
        return self._engine.run(self._queries(encoded, params))

    def stream(
        self, request: Prompt | Sequence[Message], params: SamplingParams | None = None
    ) -> CompletionStream:
        """Answer a prompt or a conversation piece by piece.

        Args:
            request: a text, token ids, or the messages of a conversation.
            params: None takes the model's defaults.

        Raises:
            InvalidRequestError, CapacityError: the request is refused.
        """
        self._engine.check_open()
        if is_conversation(request):
            encoded = [self._encode_chat(request)]
        else:
            encoded = [self._encode(prompt) for prompt in as_prompts(cast(Prompt, request))]
        if len(encoded) != 1:
            raise InvalidRequestError("stream takes one prompt; generate takes several.")
        (query,) = self._queries(encoded, params)
        return CompletionStream(len(query.token_ids), self._engine.updates(query))

    def close(self) -> None:
        """End unfinished requests and free the model's memory. May be called twice."""
        if self._engine.close():
            self._loaded.close()

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        return None, list(prompt)

    def _encode_chat(
        self, messages: Sequence[Message], **template_args: Any
    ) -> tuple[str | None, list[int]]:
        text = self.tokenizer.apply_chat_template(messages, **template_args)
        # The template has written the special tokens already.
        return text, self.tokenizer.encode(text, add_special_tokens=False)

    def _queries(
        self,
        encoded: Sequence[tuple[str | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Query]:
        """Pair prompts with parameters; check all before any is run."""
        if params is None:
            params = self.get_default_sampling_params()
        each = [params] * len(encoded) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(encoded):
            raise InvalidRequestError(f"{len(each)} SamplingParams for {len(encoded)} prompts.")
        pairs = zip(encoded, each, strict=True)
        queries = [Query(text, ids, chosen) for (text, ids), chosen in pairs]
        self._engine.check(queries)
        return queries
