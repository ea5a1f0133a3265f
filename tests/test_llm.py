from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

import fuserve
from fuserve import LLM, CompletionStream, FuserveError, InvalidRequestError, SamplingParams
from fuserve.decoder import ExecutorOptions
from fuserve.errors import CapacityError, RequestFailedError
from fuserve.parallel.options import ParallelOptions
from tests.engine.fake_model import ByteCodec, FakeExecutor, Logits, hashed_logits, saying

GREEDY = SamplingParams(temperature=0, max_tokens=50)
USER = {"role": "user", "content": "hi"}


class Loader:
    """Stands in for load_parallel; remembers what it was asked and what it gave."""

    def __init__(self) -> None:
        self.logits_of: Callable[[Sequence[int]], Logits] = saying("hello")
        self.generation_config: dict[str, Any] = {}
        self.has_checkpoint = True
        self.options: ExecutorOptions | None = None
        self.num_closed = 0

    def __call__(
        self, model: str, options: ExecutorOptions, parallel: ParallelOptions, progress: object
    ) -> Any:
        self.options = options
        self.executor = FakeExecutor(logits_of=self.logits_of)
        checkpoint = SimpleNamespace(generation_config=self.generation_config)
        return SimpleNamespace(
            executor=self.executor,
            spec=self.executor.spec,
            checkpoint=checkpoint if self.has_checkpoint else None,
            max_model_len=options.max_model_len or 500,
            report=None,
            close=self._close,
        )

    def _close(self) -> None:
        self.num_closed += 1


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    loader = Loader()
    monkeypatch.setattr("fuserve.llm.load_parallel", loader)
    monkeypatch.setattr("fuserve.llm.load_tokenizer", lambda checkpoint: ByteCodec())
    return loader


@pytest.fixture
def llm(loader: Loader) -> Iterator[LLM]:
    with LLM("fake") as llm:
        yield llm


def test_a_prompt_is_completed(llm: LLM) -> None:
    (output,) = llm.generate("who?", GREEDY)
    assert output.outputs[0].text == "hello"
    assert output.prompt == "who?"
    assert bytes(output.prompt_token_ids) == b"^who?"


def test_prompts_of_both_kinds_run_together_in_their_order(llm: LLM, loader: Loader) -> None:
    prompts: list[str | Sequence[int]] = ["a?", [*b"b??"], "c?"]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in outputs] == ["a?", None, "c?"]
    assert [output.outputs[0].text for output in outputs] == ["hello"] * 3
    assert max(len(batch.query_starts) - 1 for batch in loader.executor.batches) == 3


def test_one_prompt_of_token_ids_is_one_prompt(llm: LLM) -> None:
    (output,) = llm.generate([*b"a?"], GREEDY)
    assert output.prompt_token_ids == tuple(b"a?")


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 3)]
    outputs = llm.generate(["a?", "b?"], params)
    assert [output.outputs[0].text for output in outputs] == ["h", "hel"]


def test_a_wrong_number_of_parameters_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="1 SamplingParams for 2 prompts"):
        llm.generate(["a?", "b?"], [GREEDY])


def test_one_bad_prompt_is_named_and_none_is_run(llm: LLM, loader: Loader) -> None:
    with pytest.raises(InvalidRequestError, match=r"prompts\[1\]: The prompt holds the token id"):
        llm.generate([[*b"a?"], [999]], GREEDY)
    assert loader.executor.batches == []


@pytest.mark.parametrize("prompts", [5, b"bytes", [b"bytes"], ["text", None], None])
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequestError, match="must be text or token ids"):
        llm.generate(prompts, GREEDY)


def test_a_conversation_is_encoded_without_a_second_start_token(llm: LLM) -> None:
    (output,) = llm.chat([USER], GREEDY)
    assert bytes(output.prompt_token_ids) == b"^user: hi?"
    assert output.outputs[0].text == "hello"


def test_conversations_run_together(llm: LLM) -> None:
    outputs = llm.chat([[USER], [USER, USER]], GREEDY)
    assert [output.num_prompt_tokens for output in outputs] == [10, 19]


@pytest.mark.parametrize("messages", ["hi", [], [[]], [USER, [USER]], 5])
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any) -> None:
    if messages == []:
        assert llm.chat(messages, GREEDY) == []
        return
    with pytest.raises(InvalidRequestError, match="messages must be a list"):
        llm.chat(messages, GREEDY)


@pytest.mark.parametrize("request_", ["hi?", [*b"hi?"], [USER]])
def test_an_answer_is_streamed(llm: LLM, request_: Any) -> None:
    stream = llm.stream(request_, GREEDY)
    texts = [piece.text for piece in stream]
    assert texts == [*"hello", ""]
    assert stream.output is not None
    assert stream.output.outputs[0].text == "hello"
    assert stream.num_prompt_tokens == len(stream.output.prompt_token_ids)


def test_a_bad_request_is_refused_before_the_first_piece(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="one prompt"):
        llm.stream(["a?", "b?"], GREEDY)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="no room"):
        llm.stream([1] * 500, GREEDY)


def test_streams_read_in_turn_run_together(llm: LLM, loader: Loader) -> None:
    streams = [llm.stream("a?", GREEDY), llm.stream("b?", GREEDY)]
    for pieces in zip(*streams, strict=True):
        assert len({piece.text for piece in pieces}) == 1
    assert len(loader.executor.batches) < 2 * 6


@pytest.mark.parametrize("leave", [CompletionStream.close, lambda stream: None])
def test_a_stream_left_early_frees_its_blocks(
    llm: LLM, loader: Loader, leave: Callable[[CompletionStream], None]
) -> None:
    stream = llm.stream("a?", GREEDY)
    next(stream)
    leave(stream)
    del stream
    llm.generate("b?", GREEDY)
    assert {len(batch.query_starts) for batch in loader.executor.batches} == {2}


def test_a_failed_request_raises_from_its_stream_and_leaves_generate_an_error(
    loader: Loader,
) -> None:
    loader.logits_of = lambda history: (
        hashed_logits(history) * (float("nan") if 66 in history else 1)
    )
    with LLM("fake") as llm:
        good, bad = llm.generate(["A", "B"], SamplingParams(max_tokens=3))
        assert good.error is None and good.num_generated_tokens == 3
        assert isinstance(bad.error, RequestFailedError)
        with pytest.raises(RequestFailedError, match="NaN"):
            list(llm.stream("B"))


def test_threads_share_one_model(loader: Loader) -> None:
    loader.logits_of = hashed_logits
    params = SamplingParams(seed=3, max_tokens=30)
    with LLM("fake") as llm:
        alone = [llm.generate(str(i), params)[0].outputs for i in range(4)]
        together: dict[int, object] = {}

        def work(i: int) -> None:
            together[i] = llm.generate(str(i), params)[0].outputs

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    assert [together[i] for i in range(4)] == alone


def test_an_interrupted_generate_leaves_nothing_running(loader: Loader) -> None:
    def interrupted(history: Sequence[int]) -> Logits:
        raise KeyboardInterrupt

    loader.logits_of = interrupted
    with LLM("fake") as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a?", "b?"], GREEDY)
        loader.executor.logits_of = saying("fine")
        assert llm.generate("c?", GREEDY)[0].outputs[0].text == "fine"
        assert len(loader.executor.batches[-1].query_starts) == 2


def test_without_parameters_the_models_own_defaults_apply(loader: Loader) -> None:
    loader.generation_config = {"temperature": 0.0, "max_new_tokens": 2}
    with LLM("fake") as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=2)
        assert llm.generate("a?")[0].outputs[0].text == "he"


def test_a_closed_model_says_so(loader: Loader) -> None:
    with LLM("fake") as llm:
        stream = llm.stream("a?", GREEDY)
        next(stream)
    llm.close()
    assert loader.num_closed == 1
    for use in (lambda: llm.generate("a?"), lambda: next(stream), lambda: llm.stream("a?")):
        with pytest.raises(FuserveError, match="closed"):
            use()


def test_a_dummy_model_takes_token_ids_only(loader: Loader) -> None:
    loader.has_checkpoint = False
    with LLM("fake", load_format="dummy") as llm:
        (output,) = llm.generate([[63]], SamplingParams(temperature=0, max_tokens=4))
        assert output.outputs[0].token_ids == tuple(b"hell")
        assert output.outputs[0].text == ""
        with pytest.raises(InvalidRequestError, match="no tokenizer: pass token ids"):
            llm.generate("text")


def test_options_reach_the_executor_and_the_engine(loader: Loader) -> None:
    with LLM("fake", quantization="int4", max_model_len=40, max_num_batched_tokens=8) as llm:
        llm.generate("a" * 30 + "?", GREEDY)
        assert llm.max_model_len == 40
    assert loader.options == ExecutorOptions(
        quantization="int4", max_model_len=40, max_num_batched_tokens=8
    )
    assert loader.executor.largest_step == 8


def test_a_cache_too_small_for_a_prompt_is_a_capacity_error(loader: Loader) -> None:
    with LLM("fake", max_model_len=5000) as llm, pytest.raises(CapacityError, match="KV cache"):
        llm.generate([[1] * 4000], GREEDY)


def test_importing_fuserve_loads_neither_numpy_nor_the_native_core() -> None:
    script = (
        "import sys, time; start = time.perf_counter(); import fuserve;"
        "seconds = time.perf_counter() - start;"
        "heavy = {'numpy', 'fuserve._native', 'tokenizers', 'torch'} & set(sys.modules);"
        "assert not heavy, heavy; assert seconds < 0.3, seconds;"
        "assert 'LLM' in dir(fuserve); fuserve.SamplingParams()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_every_public_name_exists_and_others_do_not() -> None:
    for name in fuserve.__all__:
        if name != "__version__":
            assert getattr(fuserve, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = fuserve.Nonsense  # type: ignore[attr-defined]
