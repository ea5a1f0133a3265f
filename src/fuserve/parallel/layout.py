"""Which rank has which part of the model."""

from __future__ import annotations

from dataclasses import dataclass

from fuserve.decoder.shard import Shard


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Ranks 0 to ``tensor_size - 1`` share the first stage, the next ones the second, and so on.

    So that the ranks that exchange in every layer are neighbours, and mostly on one host.

    Attributes:
        tensor_size: ranks of each stage.
        stage_layers: the layers of each stage.
    """

    tensor_size: int
    stage_layers: tuple[range, ...]

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.stage_layers)

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return self.tensor_size * self.num_stages

    @property
    def last_leader(self) -> int:
        """The rank that has the logits in the end."""
        return self.rank(self.num_stages - 1, 0)

    def stage(self, rank: int) -> int:
        """The rank's place in the pipeline."""
        return rank // self.tensor_size

    def tensor_rank(self, rank: int) -> int:
        """The rank's number among those of its stage."""
        return rank % self.tensor_size

    def rank(self, stage: int, tensor_rank: int) -> int:
        """The rank at a place."""
        return stage * self.tensor_size + tensor_rank

    def ranks_of(self, stage: int) -> range:
        """The ranks of a stage."""
        return range(self.rank(stage, 0), self.rank(stage + 1, 0))

    def shard(self, rank: int) -> Shard:
        """The rank's part of the model."""
        layers = self.stage_layers[self.stage(rank)]
        return Shard(self.tensor_rank(rank), self.tensor_size, layers.start, layers.stop)
