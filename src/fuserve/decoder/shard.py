"""Which part of a model an executor holds: a rank's slice of each layer, and some of the layers."""

from __future__ import annotations

from dataclasses import dataclass

from fuserve.architectures import DecoderSpec
from fuserve.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's slice of a contiguous range of layers.

    The stage with layer 0 has the embedding, the stage with the last layer the final norm and the
    head; tensor-parallel ranks have a slice of both. The default is the whole model.

    Attributes:
        tensor_rank: this rank among those that share the layers.
        tensor_size: how many share them.
        first_layer: the stage's first layer.
        end_layer: the layer after its last; None is the end of the model.

    Raises:
        InvalidRequestError: there is no such part of any model.
    """

    tensor_rank: int = 0
    tensor_size: int = 1
    first_layer: int = 0
    end_layer: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tensor_rank < self.tensor_size:
            raise InvalidRequestError(
                f"tensor_rank {self.tensor_rank} is not one of {self.tensor_size} ranks"
            )
        if self.first_layer < 0 or (
            self.end_layer is not None and self.end_layer <= self.first_layer
        ):
            raise InvalidRequestError(
                f"layers {self.first_layer} to {self.end_layer} are no range: a stage has at least "
                "one layer"
            )

    def layers(self, spec: DecoderSpec) -> range:
        """Its layers' numbers in the model.

        Raises:
            InvalidRequestError: the model has fewer layers.
        """
        end = spec.num_layers if self.end_layer is None else self.end_layer
        if end > spec.num_layers or self.first_layer >= end:
            raise InvalidRequestError(
                f"a stage of layers {self.first_layer} to {end} does not fit a model of "
                f"{spec.num_layers} layers"
            )
        return range(self.first_layer, end)

    @property
    def is_first_stage(self) -> bool:
        """Whether it begins with tokens, not with hidden states."""
        return self.first_layer == 0

    def is_last_stage(self, spec: DecoderSpec) -> bool:
        """Whether it ends with logits, not with hidden states."""
        return self.layers(spec).stop == spec.num_layers


WHOLE_MODEL = Shard()
