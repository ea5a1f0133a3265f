"""RopeSpec from the rotary fields of Hugging Face configs, old and new."""

from __future__ import annotations

from fuserve.architectures.fields import MAX_POSITION, Fields
from fuserve.architectures.spec import RopeScaling, RopeScalingKind, RopeSpec

KINDS: dict[str, RopeScalingKind | None] = {
    "default": None,
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",
}


def rope_from_config(
    config: Fields,
    head_dim: int,
    max_position: int,
    *,
    default_base: float = 10_000.0,
    interleaved: bool = False,
    partial: bool = False,
    layer_type: str | None = None,
) -> RopeSpec:
    """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4).

    Args:
        config: the model's config.
        head_dim: features of one head.
        max_position: the config's ``max_position_embeddings``.
        default_base: the family's base where the config names none.
        interleaved: see RopeSpec.
        partial: whether the family rotates only a part of the features if so configured.
        layer_type: which entry of per-layer-type parameters is meant.

    Raises:
        UnsupportedModelError: for unknown kinds and values out of range.
    """
    parameters = config.nested("rope_parameters") or config.nested("rope_scaling")
    if parameters is not None and layer_type is not None and _is_per_layer_type(parameters):
        parameters = parameters.nested(layer_type)
    parameters = parameters or Fields({}, where="rope_parameters")
    base = config.number("rope_theta", default_base, above=1.0)
    base = parameters.number("rope_theta", base, above=1.0)
    fraction = config.number("partial_rotary_factor", 1.0, high=1.0)
    fraction = parameters.number("partial_rotary_factor", fraction, high=1.0)
    if fraction != 1.0 and not partial:
        owner = parameters if parameters.get("partial_rotary_factor") is not None else config
        owner.refuse("partial_rotary_factor", "1.0 for this architecture")
    dim = int(head_dim * fraction)
    if dim < 2 or dim % 2:
        config.refuse("head_dim", f"an even number of rotated features, not {dim} of {head_dim}")
    scaling = _scaling(config, parameters, dim, max_position)
    return RopeSpec(dim=dim, base=base, interleaved=interleaved, scaling=scaling)


def extended_max_position(max_position: int, scaling: RopeScaling | None) -> int:
    """Tokens a model can read when the config's own limit is that before the stretching."""
    if scaling is None:
        return max_position
    if scaling.kind in ("linear", "dynamic"):
        return min(int(max_position * max(scaling.factor, 1.0)), MAX_POSITION)
    if scaling.kind == "yarn":
        stretched = int(scaling.original_max_position * scaling.factor)
        return min(max(max_position, stretched), MAX_POSITION)
    return max_position


def _is_per_layer_type(parameters: Fields) -> bool:
    return any(parameters.get(kind) is not None for kind in ("full_attention", "sliding_attention"))


def _scaling(config: Fields, parameters: Fields, dim: int, max_position: int) -> RopeScaling | None:
    kind_field = "rope_type" if parameters.get("rope_type") is not None else "type"
    kind = parameters.choice(kind_field, KINDS, "default")
    if kind is None:
        return None
    if kind in ("linear", "dynamic"):
        if kind == "dynamic" and dim < 4:
            parameters.refuse(kind_field, "at least 4 rotated features for dynamic NTK")
        return RopeScaling(
            kind, parameters.number("factor", high=1e6), original_max_position=max_position
        )
    original = parameters.integer(
        "original_max_position_embeddings", max_position, low=2, high=MAX_POSITION
    )
    original = config.integer(
        "original_max_position_embeddings", original, low=2, high=MAX_POSITION
    )
    if kind == "llama3":
        return _llama3(parameters, original)
    factor = parameters.number("factor", max_position / original, high=1e6)
    attention_factor = parameters.optional_number("attention_factor")
    if kind == "longrope":
        return RopeScaling(
            kind,
            factor,
            original,
            attention_factor,
            short_factor=parameters.numbers("short_factor", count=dim // 2),
            long_factor=parameters.numbers("long_factor", count=dim // 2),
        )
    return RopeScaling(
        kind,
        factor,
        original,
        attention_factor,
        beta_fast=parameters.number("beta_fast", 32.0),
        beta_slow=parameters.number("beta_slow", 1.0),
        mscale=parameters.optional_number("mscale", above=-1e-9),
        mscale_all_dim=parameters.optional_number("mscale_all_dim", above=-1e-9),
        truncate=parameters.flag("truncate", True),
    )


def _llama3(parameters: Fields, original: int) -> RopeScaling:
    low = parameters.number("low_freq_factor")
    high = parameters.number("high_freq_factor")
    if high <= low:
        parameters.refuse("high_freq_factor", f"a number above low_freq_factor, {low:g}")
    return RopeScaling(
        "llama3",
        parameters.number("factor", high=1e6),
        original,
        low_freq_factor=low,
        high_freq_factor=high,
    )
