from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fuserve.engine.stop import StopStrings


def push_all(stop: StopStrings, pieces: list[str]) -> list[str]:
    emitted = []
    for piece in pieces:
        emitted.append(stop.push(piece))
        if stop.matched is not None:
            return emitted
    return [*emitted, stop.flush()]


def test_a_stop_string_across_pieces_is_never_partly_emitted() -> None:
    stop = StopStrings(("</end>",))
    assert push_all(stop, ["so <", "/", "en", "d> more"]) == ["so ", "", "", ""]
    assert stop.matched == "</end>"


def test_a_false_start_is_emitted_once_it_is_known_to_be_false() -> None:
    stop = StopStrings(("</end>",))
    assert push_all(stop, ["a</e", "x"]) == ["a", "</ex", ""]


def test_a_false_start_may_hold_the_true_one() -> None:
    stop = StopStrings(("aab",))
    assert "".join(push_all(stop, ["a", "a", "a", "b", "c"])) == "a"


def test_what_is_held_at_the_end_is_given_out() -> None:
    assert push_all(StopStrings(("###",)), ["x##"]) == ["x", "##"]


def test_the_stop_string_is_kept_if_asked() -> None:
    stop = StopStrings(("\n\n",), keep=True)
    assert "".join(push_all(stop, ["one\n", "\ntwo"])) == "one\n\n"


texts = st.text(alphabet="ab", max_size=20)


@given(st.lists(texts, max_size=8), st.lists(texts.filter(bool), min_size=1, max_size=3))
def test_the_outcome_does_not_depend_on_how_the_text_is_cut(
    pieces: list[str], strings: list[str]
) -> None:
    whole = "".join(pieces)
    in_pieces, by_letter = StopStrings(tuple(strings)), StopStrings(tuple(strings))
    emitted = "".join(push_all(in_pieces, pieces))
    assert emitted == "".join(push_all(by_letter, list(whole)))
    assert in_pieces.matched == by_letter.matched
    assert whole.startswith(emitted)
    assert not any(string in emitted for string in strings)
    if in_pieces.matched is None:
        assert emitted == whole
