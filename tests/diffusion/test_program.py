"""A program that cannot be run is refused, and the operation at fault is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fuserve.diffusion.banding import banded, candidates
from fuserve.diffusion.program import (
    Attention,
    ChannelSums,
    Conv,
    Linear,
    Op,
    Program,
    Rows,
    Slice,
    Value,
)
from fuserve.diffusion.program_builder import ProgramBuilder, group_norm, layer_norm
from fuserve.diffusion.program_checks import check_program


def small_program() -> Program:
    """A residual block with a skip, and a transformer's attention, of a guided pair."""
    build = ProgramBuilder()
    image = build.input("image", 1, 8, 8, 4)
    time = build.input("time", 1, 1, 1, 96)
    text = build.input("text", 2, 1, 7, 64)
    first = build.conv("conv_in", image, 32)
    down = build.conv(
        "down",
        first,
        32,
        stride=2,
        norm=group_norm("norm", 8, 1e-5, silu=True),
        channel_add=Slice(time, 32),
    )
    qkv = build.linear(("q", "k", "v"), down, 96, bias=False, norm=layer_norm("norm1", 1e-5))
    self_attention = build.attention("attn1", Slice(qkv), Slice(qkv, 32), Slice(qkv, 64), 4, 8)
    down = build.linear("out", self_attention, 32, residual=down)
    query = build.linear("q2", down, 32)
    cross = build.attention("attn2", Slice(query), Slice(text), Slice(text, 32), 2, 16)
    cross = build.linear("ff", cross, 32, activation="geglu")
    up = build.conv("up", cross, 32, upsample=True)
    out = build.conv("conv_out", (up, first), 4, norm=group_norm("norm_out", 4, 1e-5))
    build.output("out", out)
    return build.finish()


def changed(program: Program, name: str, **fields: object) -> Program:
    ops: list[Op] = []
    for op in program.ops:
        ops.append(replace(op, **fields) if op.name == name else op)
    return replace(program, ops=tuple(ops))


def op(program: Program, name: str) -> Op:
    return next(op for op in program.ops if op.name == name)


def test_sizes_and_batches_follow_from_the_sources() -> None:
    program = small_program()
    shapes = {op.name: op.out.shape for op in program.ops}
    assert shapes["conv_in"] == (1, 8, 8, 32)  # shared by both rows of the pair
    assert shapes["down"] == (1, 4, 4, 32)
    assert shapes["attn2"] == (2, 4, 4, 32)  # the first that reads the text
    assert shapes["conv_out"] == (2, 8, 8, 4)


def test_shapes_of_stacked_and_gated_weights() -> None:
    shapes = {names: shape for _, names, shape in small_program().weight_shapes()}
    assert shapes["q.weight", "k.weight", "v.weight"] == (96, 32)
    assert shapes[("ff.weight",)] == (64, 32)
    assert shapes[("ff.bias",)] == (64,)
    assert shapes[("conv_out.weight",)] == (4, 64, 3, 3)
    assert shapes[("norm_out.weight",)] == (64,)


@pytest.mark.parametrize(
    ("name", "fields", "fault"),
    [
        ("conv_out", {"padding": (0, 0, 0, 0)}, "6 x 6 pixels"),
        ("conv_out", {"norm": group_norm("n", 7, 1e-5)}, "64 channels in 7 groups"),
        ("down", {"channel_add": None, "activation": "geglu"}, "for linears only"),
        ("q", {"bias": ("q.bias",)}, "one bias for each"),
        ("conv_in", {"weight": ()}, "no weight"),
        ("attn2", {"causal": True}, "causal"),
        ("attn1", {"heads": 5}, "reads up to channel"),
    ],
)
def test_a_faulty_operation_is_named(name: str, fields: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as caught:
        check_program(changed(small_program(), name, **fields))
    assert repr(name) in str(caught.value)


def test_values_are_written_once_and_before_they_are_read() -> None:
    program = small_program()
    with pytest.raises(ValueError, match=r"'conv_in' reads .* nothing has written"):
        check_program(replace(program, inputs={"time": program.inputs["time"]}))
    with pytest.raises(ValueError, match="'conv_in' writes a value for the second time"):
        check_program(replace(program, ops=(program.ops[0], *program.ops)))
    with pytest.raises(ValueError, match="nothing writes the output 'out'"):
        check_program(replace(program, ops=program.ops[:-1]))
    with pytest.raises(ValueError, match="reads"):
        check_program(replace(program, ops=program.ops[::-1]))


def test_channels_that_are_not_there_and_batches_that_do_not_divide_are_refused() -> None:
    program = small_program()
    down, attention = op(program, "down"), op(program, "attn1")
    assert isinstance(down, Conv) and down.channel_add is not None
    assert isinstance(attention, Attention)
    beyond = replace(down.channel_add, first=65)
    with pytest.raises(ValueError, match="'down' reads up to channel 97"):
        check_program(changed(program, "down", channel_add=beyond))
    with pytest.raises(ValueError, match="'attn1' reads up to channel 97"):
        check_program(changed(program, "attn1", value=replace(attention.value, first=65)))
    build = ProgramBuilder()
    pair, three = build.input("pair", 2, 1, 1, 8), build.input("three", 3, 1, 1, 8)
    build.output("sum", build.linear("sum", pair, 8, residual=three))
    with pytest.raises(ValueError, match="'sum' reads a batch of 2 for one of 3"):
        build.finish()


def test_a_residual_of_geglu_has_both_halves() -> None:
    build = ProgramBuilder()
    source = build.input("source", 1, 1, 4, 8)
    wide = build.linear("up", source, 32)
    build.output("out", build.linear("ff", source, 16, activation="geglu", residual=wide))
    program = build.finish()
    linear = op(program, "ff")
    assert isinstance(linear, Linear)
    narrow = replace(program, inputs={**program.inputs, "narrow": Value(3, 1, 1, 4, 16)})
    narrow = replace(narrow, values=(*program.values[:2], program.values[2], Value(3, 1, 1, 4, 16)))
    with pytest.raises(ValueError, match="'ff' adds"):
        check_program(changed(narrow, "ff", residual=Value(3, 1, 1, 4, 16)))


def program_in_bands() -> Program:
    """Two convolutions, the value between them in eight bands."""
    build = ProgramBuilder()
    image = build.input("image", 1, 32, 16, 4)
    wide = build.conv("wide", image, 32)
    norm = group_norm("norm", 8, 1e-5)
    build.output("out", build.conv("end", wide, 4, norm=norm))
    whole = build.finish()
    (candidate,) = candidates(whole)
    return banded(whole, candidate)


def test_each_row_of_a_value_is_written_once_and_before_it_is_read() -> None:
    program = program_in_bands()
    ends = [op for op in program.ops if op.name == "end"]
    sums = [op for op in program.ops if isinstance(op, ChannelSums)]
    assert len(ends) == len(sums) == 8

    def without(left_out: Op) -> Program:
        return replace(program, ops=tuple(op for op in program.ops if op is not left_out))

    with pytest.raises(ValueError, match="nothing writes the output 'out'"):
        check_program(without(ends[3]))
    with pytest.raises(ValueError, match=r"Conv 'end' reads .* nothing has written"):
        check_program(without(sums[3]))
    with pytest.raises(ValueError, match="'end' writes a value for the second time"):
        check_program(replace(program, ops=(*program.ops, ends[3])))


def test_views_and_sums_that_do_not_fit_are_refused() -> None:
    program = program_in_bands()
    view, rows = next(iter(program.views.items()))
    beyond = {**program.views, view: Rows(rows.value, rows.value.height - view.height + 1)}
    with pytest.raises(ValueError, match="is no view of rows"):
        check_program(replace(program, views=beyond))
    end = next(op for op in program.ops if op.name == "end")
    assert isinstance(end, Conv) and end.sums is not None
    of_another = replace(end.sums, values=(program.inputs["image"],))
    with pytest.raises(ValueError, match="'end' has sums"):
        check_program(changed(program, "end", sums=of_another))
    with pytest.raises(ValueError, match="'end' has sums, but no group norm"):
        check_program(changed(program, "end", norm=None))
