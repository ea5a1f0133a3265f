"""Quantizing a model into a new folder, layer by layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fuserve.architectures import tensor_shapes
from fuserve.calibration.forward import LayerForward
from fuserve.calibration.layer import (
    Recipes,
    needs_hessian,
    needs_statistics,
    quantize_layer,
    with_rounded_weights,
)
from fuserve.calibration.layout import Layout, LayoutName, choose_layout
from fuserve.calibration.options import CalibrationOptions
from fuserve.calibration.output_folder import OutputFolder
from fuserve.calibration.places import Layer, Place, places_of
from fuserve.calibration.progress_file import ProgressFile
from fuserve.calibration.report import QuantizationReport, reading_limits
from fuserve.calibration.source import SourceModel, open_source
from fuserve.calibration.stored_tensors import stored_arrays, stored_layers
from fuserve.calibration.text import packaged_text, sample_windows
from fuserve.checkpoints import Checkpoint, load_tokenizer
from fuserve.errors import InvalidRequestError
from fuserve.quantization import LayerChoice, QuantizedLinear, QuantScheme
from fuserve.quantization.statistics import InputObserver, InputStatistics

Floats = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]

BATCH_TOKENS = 2048
"""Tokens that are run together; a layer's activations for them are held at once."""


def quantize_model(
    checkpoint: Checkpoint,
    output: Path,
    choice: LayerChoice,
    options: CalibrationOptions,
    *,
    layout: LayoutName = "auto",
    text: Path | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Write a quantized copy of a model; goes on where an earlier call was interrupted.

    Layers are calibrated on the outputs of the quantized layers before them, one after the other;
    memory holds one layer and its statistics, hidden states lie in files beside the output.

    Args:
        checkpoint: an unquantized model (GGUF's block types count as values).
        output: a new folder, or one that an interrupted call has left.
        choice: what each linear layer becomes.
        options: of calibration.
        layout: of the quantized layers.
        text: to calibrate on; by default the English prose that comes with the package.
        progress: called with what is done, how many of how many.

    Raises:
        InvalidRequestError: options contradict each other, or the text cannot be used.
        UnsupportedModelError: the model, or how it would be stored, is not supported.
    """
    source = open_source(checkpoint)
    return _Quantization(source, output, choice, options, layout, text, progress).run()


class _Quantization:
    def __init__(
        self,
        source: SourceModel,
        output: Path,
        choice: LayerChoice,
        options: CalibrationOptions,
        layout: LayoutName,
        text: Path | None,
        progress: Progress | None,
    ) -> None:
        self._source = source
        self._options = options
        self._places = places_of(source.spec)
        self._progress = progress or (lambda _stage, _done, _total: None)
        self._choice = choice
        self._recipes = {
            name: choice.recipe_of(name)
            for name, shape in tensor_shapes(source.spec).items()
            if len(shape) == 2 and name not in ("embedding", "position_embedding")
        }
        # A tied head is none of its own, but may be named: it stays with the embedding.
        choice.check_patterns((*self._recipes, "head", "embedding"))
        chosen = [recipe for recipe in self._recipes.values() if recipe is not None]
        if not chosen or choice.recipe_of("embedding") is not None:
            raise InvalidRequestError(
                "no layer is left to quantize"
                if not chosen
                else "the embedding cannot be quantized in a folder; --quantize-embeddings does it "
                "while a model is loaded"
            )
        schemes = [recipe.scheme for recipe in chosen]
        self._layout: Layout = choose_layout(layout, schemes, options.damping)
        self._tokens = (
            self._sample(text) if any(recipe.needs_calibration for recipe in chosen) else None
        )
        self._state = ProgressFile(output, self._digest(layout))
        self._output = OutputFolder(output, source.spec.num_layers + 1)
        self._path = output

    def run(self) -> QuantizationReport:
        """All layers, then what belongs to none."""
        num_layers = self._source.spec.num_layers
        runner = None
        if self._tokens is not None:
            runner = LayerForward(self._source.spec, self._tokens.shape[1])
            if self._state.next_layer == 0:
                self._embed(runner, self._tokens)
        for index in range(self._state.next_layer, num_layers):
            self._progress("quantizing layers", index, num_layers)
            self._layer(index, runner)
        self._rest(runner)
        self._progress("quantizing layers", num_layers, num_layers)
        return self._finish()

    def _sample(self, text: Path | None) -> npt.NDArray[np.int32]:
        options = self._options
        longest = self._source.spec.max_position
        if options.sample_tokens > longest:
            raise InvalidRequestError(
                f"samples have {options.sample_tokens} tokens, but the model takes {longest}"
            )
        tokenizer = load_tokenizer(self._source.checkpoint)
        path = packaged_text() if text is None else text
        return sample_windows(
            path, tokenizer, options.num_samples, options.sample_tokens, options.seed
        )

    def _digest(self, layout: str) -> str:
        digest = hashlib.sha256(self._source.checkpoint.content_key().encode())
        digest.update(repr((self._choice, self._options, layout)).encode())
        if self._tokens is not None:
            digest.update(self._tokens.tobytes())
        return digest.hexdigest()

    def _embed(self, runner: LayerForward, tokens: npt.NDArray[np.int32]) -> None:
        names = [name for name in self._source.names(None) if "embedding" in name]
        tensors = {name: self._source.array(name) for name in names}
        shape = (*tokens.shape, self._source.spec.hidden_size)
        hidden = self._state.hidden(0, shape)
        for batch in self._batches(tokens):
            hidden[batch] = runner.embed(tokens[batch], tensors)
        hidden.flush()  # type: ignore[attr-defined]
        self._state.advance(0)

    def _layer(self, index: int, runner: LayerForward | None) -> None:
        prefix = f"layers.{index}."
        source = self._source
        layer: Layer = {n.removeprefix(prefix): source.array(n) for n in source.names(index)}
        recipes = {
            n.removeprefix(prefix): r for n, r in self._recipes.items() if n.startswith(prefix)
        }
        statistics: dict[str, InputStatistics] = {}
        if runner is not None:
            statistics = self._observe(index, runner, layer, recipes)
        quantized = quantize_layer(layer, self._places, recipes, statistics, self._options)
        self._write(index + 1, prefix, layer, quantized)
        if runner is None:
            self._state.advance(index + 1)
            return
        hidden = self._state.saved_hidden()
        following = self._state.hidden(index + 1, hidden.shape)
        rounded = with_rounded_weights(layer, quantized)
        for batch in self._batches(hidden):
            following[batch] = runner.layer(source.spec.layers[index], rounded, hidden[batch])
        following.flush()  # type: ignore[attr-defined]
        self._state.advance(index + 1)

    def _observe(
        self, index: int, runner: LayerForward, layer: Layer, recipes: Recipes
    ) -> dict[str, InputStatistics]:
        """Statistics of the inputs of each place that a recipe asks for."""
        hidden = self._state.saved_hidden()
        num_rows = hidden.shape[0] * hidden.shape[1]
        observers = {
            place.name: self._observer(place, layer[place.linears[0]].shape[1], num_rows, recipes)
            for place in self._places
            if needs_statistics(place, recipes)
        }
        if not observers:
            return {}

        def observe(name: str, rows: Floats) -> None:
            if name in observers:
                observers[name].add(rows.reshape(-1, rows.shape[-1]))

        for batch in self._batches(hidden):
            runner.layer(self._source.spec.layers[index], layer, hidden[batch], observe)
        return {name: observer.result() for name, observer in observers.items()}

    @staticmethod
    def _observer(place: Place, features: int, rows: int, recipes: Recipes) -> InputObserver:
        return InputObserver(features, rows, with_hessian=needs_hessian(place, recipes))

    def _rest(self, runner: LayerForward | None) -> None:
        """Embeddings, last norm and head."""
        source = self._source
        tensors: Layer = {name: source.array(name) for name in source.names(None)}
        recipes = {"head": self._recipes.get("head")}
        quantized: dict[str, QuantizedLinear] = {}
        if recipes["head"] is not None:
            place = Place("head", ("head",), None)
            statistics = {}
            if runner is not None and needs_statistics(place, recipes):
                hidden = self._state.saved_hidden()
                num_rows = hidden.shape[0] * hidden.shape[1]
                observer = self._observer(place, source.spec.hidden_size, num_rows, recipes)
                for batch in self._batches(hidden):
                    last = runner.last(tensors, hidden[batch])
                    observer.add(last.reshape(-1, last.shape[-1]))
                statistics["head"] = observer.result()
            quantized = quantize_layer(tensors, (place,), recipes, statistics, self._options)
        self._write(source.spec.num_layers + 1, "", tensors, quantized)

    def _write(
        self, shard: int, prefix: str, layer: Layer, quantized: Mapping[str, QuantizedLinear]
    ) -> None:
        targets = self._source.targets
        kept = {prefix + name: array for name, array in layer.items() if name not in quantized}
        arrays: dict[str, npt.NDArray[np.generic]] = {}
        for name, array in stored_arrays(kept, targets).items():
            arrays[name] = self._as_stored(array)
        named = {prefix + name: one for name, one in quantized.items()}
        for module, one in stored_layers(named, targets).items():
            arrays.update(self._layout.write(module, one))
        self._output.write_shard(shard, arrays)

    def _as_stored(self, array: Floats) -> npt.NDArray[np.generic]:
        """Matrices in the model's type; vectors stay exact, as smoothing is folded into them."""
        if array.ndim < 2 or self._source.float_dtype == "F32":
            return array
        if self._source.float_dtype == "F16":
            return array.astype(np.float16)
        return bfloat16_bits(array)

    def _finish(self) -> QuantizationReport:
        targets = self._source.targets
        modules: dict[str, QuantScheme] = {}
        kept: list[str] = []
        counts: dict[str, int] = {}
        for name, recipe in self._recipes.items():
            module = targets[name].name.removesuffix(".weight")
            if recipe is None:
                kept.append(module)
                continue
            modules[module] = recipe.scheme
            counts[recipe.scheme.describe()] = counts.get(recipe.scheme.describe(), 0) + 1
        if self._source.spec.tied_head:
            kept.append("lm_head")
        names, num_bytes = self._output.finish(self._source.checkpoint)
        quantization = self._layout.config(modules, list(dict.fromkeys(kept)), names)
        config = self._source.config | {"quantization_config": quantization}
        self._output.write_config(config)
        self._state.finish()
        num_samples = 0 if self._tokens is None else len(self._tokens)
        limits = reading_limits(self._source.spec, self._recipes, quantization)
        return QuantizationReport(self._path, num_bytes, num_samples, counts, limits)

    def _batches(self, sequences: npt.NDArray[np.generic]) -> list[slice]:
        step = max(BATCH_TOKENS // sequences.shape[1], 1)
        return [slice(start, start + step) for start in range(0, len(sequences), step)]


def bfloat16_bits(values: Floats) -> npt.NDArray[np.uint16]:
    """Values rounded to the nearest bfloat16, ties to even, as its bits."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)
