import pytest
from hypothesis import given, strategies as st

from proxy.stops import END_OF_TEXT, Cutter


def run(cutter: Cutter, pieces: list[str]) -> str:
    return "".join([*map(cutter.feed, pieces), cutter.end()])


@pytest.mark.parametrize(
    ("stops", "ends", "pieces", "answer"),
    [
        ([], [], ["a", "b"], "ab"),
        (["\n\n"], [], ["a\n", "\nb"], "a"),
        (["\n\n"], [], ["a\n", "b\n", "c"], "a\nb\nc"),
        (["\n\n"], [], ["a\n"], "a\n"),
        (["stop"], [], ["a st", "o", "p b"], "a "),
        (["stop"], [], ["a sto", "sto", "stop"], "a stosto"),
        (["bb", "b"], [], ["abb"], "a"),
        (["abc", "b"], [], ["abc"], "a"),
        ([], ["</s>"], ["a", "</s>"], "a"),
        ([], ["</s>"], ["a<", "/s", ">"], "a"),
        ([], ["</s>"], ["<s>a</s> b"], "<s>a</s> b"),
        ([], ["</s>"], ["a</s>", "</s>"], "a</s>"),
        (["\n\n"], ["<|endoftext|>"], ["x\n", "<|endof", "text|>"], "x\n"),
        (["x"], [], ["x"], ""),
    ],
)
def test_cutter_gives_the_answer(stops, ends, pieces, answer):
    assert run(Cutter(stops, ends), pieces) == answer


def test_feed_passes_on_what_cannot_be_a_stop():
    cutter = Cutter(["\n\n"])
    assert cutter.feed("a\n") == "a"
    assert cutter.feed("b") == "\nb"


def test_feed_after_cut_gives_nothing():
    cutter = Cutter(["x"])
    assert cutter.feed("ax") == "a"
    assert cutter.is_cut
    assert cutter.feed("b") == ""
    assert cutter.end() == ""


texts = st.text("ab\n<>/s", max_size=12)


@given(
    st.lists(texts, max_size=8),
    st.lists(texts.filter(bool), max_size=3),
)
def test_any_cut_of_the_text_gives_the_same_answer(pieces, stops):
    whole = "".join(pieces)
    ends = ["</s>"]
    found = [(at + len(s), at) for s in stops if (at := whole.find(s)) >= 0]
    expected = whole[: min(found)[1]] if found else whole.removesuffix("</s>")
    assert run(Cutter(stops, ends), pieces) == expected


def test_no_end_marker_is_blank():
    assert all(marker.strip() for marker in END_OF_TEXT)
