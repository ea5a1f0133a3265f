"""``UNet2DConditionModel`` as data, read from the config of a diffusers folder.

The general form of Stable Diffusion 1.5, 2.1 and XL, their Turbo and LCM variants, and smaller
models of the same blocks (Rombach et al., arXiv 2112.10752; Podell et al., arXiv 2307.01952).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fuserve.architectures.fields import Fields
from fuserve.diffusion.config_fields import (
    MAX_BLOCKS,
    MAX_CHANNELS,
    MAX_GROUPS,
    MAX_LAYERS,
    per_block,
    require,
    sizes,
    texts,
)

_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
_MID = {"UNetMidBlock2DCrossAttn": True}

_FIXED: dict[str, tuple[object, ...]] = {
    "addition_embed_type": ("text_time",),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (),
    "encoder_hid_dim_type": (),
    "mid_block_only_cross_attention": (False,),
    "mid_block_scale_factor": (1, 1.0),
    "num_attention_heads": (),
    "num_class_embeds": (),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (),
    "time_embedding_act_fn": (),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (),
}
"""Fields of which only these values, or none, are computed."""


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """A down or up block, or the middle one.

    Attributes:
        path: the module's path, such as ``down_blocks.0``.
        channels: of all its outputs.
        resnets: how many.
        transformer_layers: of the transformer behind each resnet; 0 where there are none.
        heads: of its attention.
        resampled: the block ends with a stride-2 convolution, or with upsampling.
    """

    path: str
    channels: int
    resnets: int
    transformer_layers: int
    heads: int
    resampled: bool


@dataclass(frozen=True, slots=True)
class TextTimeSpec:
    """SDXL's added conditioning: pooled text and the sinusoids of six sizes, through an MLP.

    Attributes:
        time_dim: features of each size's sinusoid.
        in_channels: pooled text and all sinusoids.
    """

    time_dim: int
    in_channels: int


@dataclass(frozen=True, slots=True)
class UNetSpec:
    """What the network computes, apart from weights and sizes.

    Attributes:
        in_channels: of the latents, with mask and masked image for an inpainting model.
        text_channels: features of the text's hidden states.
        time_channels: features of the time embedding, before the MLP.
        sin_first: the sinusoids' order, which is cosines first by default.
        freq_shift: what is taken from the number of frequencies.
        guidance_channels: of the embedding of the guidance scale (LCM), or None.
        sample_size: of the latents that the model was trained on, the larger side.
    """

    in_channels: int
    out_channels: int
    down: tuple[BlockSpec, ...]
    middle: BlockSpec
    up: tuple[BlockSpec, ...]
    text_channels: int
    groups: int
    eps: float
    time_channels: int
    time_embedding_channels: int
    sin_first: bool
    freq_shift: float
    guidance_channels: int | None
    text_time: TextTimeSpec | None
    sample_size: int

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All blocks in the order in which they run."""
        return (*self.down, self.middle, *self.up)

    @property
    def size_multiple(self) -> int:
        """Height and width of the latents must be multiples of this."""
        return int(2 ** sum(block.resampled for block in self.down))

    @property
    def num_skips(self) -> int:
        """Skip connections from the way down to the way up."""
        return sum(block.resnets for block in self.up)

    def up_steps(self) -> Iterator[tuple[BlockSpec, int]]:
        """Block and index of every residual block of the way up: each joins one skip connection."""
        for block in self.up:
            for index in range(block.resnets):
                yield block, index

    def feature_channels(self, skip: int) -> int:
        """Channels of what is joined with a skip connection, 0 being that of the latents."""
        before = [self.middle, *(block for block, _ in self.up_steps())]
        return before[self.num_skips - 1 - skip].channels

    def resnets(self) -> Iterator[tuple[str, int]]:
        """Path and channels of every residual block."""
        for block in self.blocks:
            for index in range(block.resnets):
                yield f"{block.path}.resnets.{index}", block.channels

    def transformer_layers(self) -> Iterator[tuple[str, int]]:
        """Path and channels of every transformer layer; each has one cross-attention."""
        for block in self.blocks:
            count = block.resnets - (block is self.middle)
            for index in range(count if block.transformer_layers else 0):
                for layer in range(block.transformer_layers):
                    path = f"{block.path}.attentions.{index}.transformer_blocks.{layer}"
                    yield path, block.channels


def unet_spec(fields: Fields) -> UNetSpec:
    """From ``unet/config.json``; absent fields have diffusers' defaults.

    Raises:
        UnsupportedModelError: a field asks for what fuserve does not compute; it is named.
    """
    for name, supported in _FIXED.items():
        require(fields, name, *supported)
    require(fields, "act_fn", "silu", "swish")
    if fields.get("only_cross_attention") not in (None, False):
        values = fields.get("only_cross_attention")
        if not isinstance(values, list) or any(one is not False for one in values):
            fields.refuse("only_cross_attention", "false for all blocks")
    channels = sizes(fields, "block_out_channels", (320, 640, 1280, 1280), high=MAX_CHANNELS)
    count = len(channels)
    groups = fields.integer("norm_num_groups", 32, high=MAX_GROUPS)
    if any(one % groups for one in channels):
        fields.refuse("block_out_channels", f"multiples of norm_num_groups, which is {groups}")
    down, middle, up = _blocks(fields, channels)
    text_channels = set(per_block(fields, "cross_attention_dim", count, 1280, high=MAX_CHANNELS))
    if len(text_channels) != 1:
        fields.refuse("cross_attention_dim", "the same for all blocks")
    time_channels = channels[0]
    return UNetSpec(
        in_channels=fields.integer("in_channels", 4, high=MAX_CHANNELS),
        out_channels=fields.integer("out_channels", 4, high=MAX_CHANNELS),
        down=down,
        middle=middle,
        up=up,
        text_channels=text_channels.pop(),
        groups=groups,
        eps=fields.number("norm_eps", 1e-5, high=1.0),
        time_channels=time_channels,
        time_embedding_channels=fields.integer(
            "time_embedding_dim", 4 * time_channels, high=8 * MAX_CHANNELS
        ),
        sin_first=not fields.flag("flip_sin_to_cos", True),
        freq_shift=fields.number("freq_shift", 0.0, above=-1e-9, high=1.0),
        guidance_channels=fields.optional_integer("time_cond_proj_dim", high=MAX_CHANNELS),
        text_time=_text_time(fields),
        sample_size=max(per_block(fields, "sample_size", 2, 64, high=1 << 14)),
    )


def _blocks(
    fields: Fields, channels: tuple[int, ...]
) -> tuple[tuple[BlockSpec, ...], BlockSpec, tuple[BlockSpec, ...]]:
    count = len(channels)
    default_down = ("CrossAttnDownBlock2D",) * (count - 1) + ("DownBlock2D",)
    default_up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (count - 1)
    down_attends = _kinds(fields, "down_block_types", _DOWN, default_down)
    up_attends = _kinds(fields, "up_block_types", _UP, default_up)
    for name, kinds in (("down_block_types", down_attends), ("up_block_types", up_attends)):
        if len(kinds) != count:
            fields.refuse(name, f"{count} blocks, one for each of block_out_channels")
    fields.choice("mid_block_type", _MID, "UNetMidBlock2DCrossAttn")
    layers = per_block(fields, "layers_per_block", count, 2, high=MAX_BLOCKS)
    depths = per_block(fields, "transformer_layers_per_block", count, 1, high=MAX_LAYERS)
    # The field's name is a mistake that diffusers keeps for its checkpoints: it counts heads.
    heads = per_block(fields, "attention_head_dim", count, 8, high=MAX_CHANNELS)
    if any(
        channels[i] % heads[i]
        for i in range(count)
        if down_attends[i] or up_attends[-1 - i] or i == count - 1
    ):
        fields.refuse("attention_head_dim", f"numbers of heads that divide the channels {channels}")

    def block(path: str, index: int, resnets: int, attends: bool, resampled: bool) -> BlockSpec:
        depth = depths[index] if attends else 0
        return BlockSpec(path, channels[index], resnets, depth, heads[index], resampled)

    last = count - 1
    down = [
        block(f"down_blocks.{i}", i, layers[i], down_attends[i], i < last) for i in range(count)
    ]
    middle = block("mid_block", last, 2, True, False)
    up = [
        block(f"up_blocks.{i}", last - i, layers[last - i] + 1, up_attends[i], i < last)
        for i in range(count)
    ]
    return tuple(down), middle, tuple(up)


def _kinds(
    fields: Fields, name: str, known: dict[str, bool], default: tuple[str, ...]
) -> tuple[bool, ...]:
    kinds = texts(fields, name, default)
    if any(kind not in known for kind in kinds):
        fields.refuse(name, "only the kinds " + ", ".join(map(repr, known)))
    return tuple(known[kind] for kind in kinds)


def _text_time(fields: Fields) -> TextTimeSpec | None:
    if fields.get("addition_embed_type") is None:
        return None
    time_dim = fields.integer("addition_time_embed_dim", high=MAX_CHANNELS)
    in_channels = fields.integer("projection_class_embeddings_input_dim", high=1 << 17)
    if in_channels <= 6 * time_dim:
        fields.refuse(
            "projection_class_embeddings_input_dim",
            f"more than the 6 x {time_dim} features of the sizes",
        )
    return TextTimeSpec(time_dim, in_channels)
