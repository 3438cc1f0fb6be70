import pytest

from pymerge.replay import decontaminate, dedup_exact, filter_quality, minhash_dedup

FOX = "The quick brown fox jumps over the lazy dog while seven bright wizards mix the potion in a deep dark cave"


def test_exact_duplicates_ignore_case_and_punctuation():
    result = dedup_exact(["Hello, World!", "hello   world", "other", "Known"], against=["known."])
    assert result.kept == [0, 2]
    assert result.dropped == {1: "the same as 0", 3: "the same as 0 of the data compared against"}
    assert list(result.of(["a", "b", "c", "d"])) == ["a", "c"]


def test_near_duplicates_are_found_and_others_kept():
    pytest.importorskip("datasketch")
    near = FOX + " today"
    half = " ".join(FOX.split()[:10]) + " but then everything went another way and nobody ever knew why it did"
    result = minhash_dedup([FOX, "nothing alike at all in this text of ours", near, half], threshold=0.7)
    assert result.kept == [0, 1, 3] and "with 0" in result.dropped[2]
    assert minhash_dedup([near], against=[FOX], threshold=0.7).kept == []
    assert minhash_dedup(["", "", "x"], threshold=0.9).kept == [0, 2]


def test_evaluation_data_are_left_out():
    leaked = "an introduction " + " ".join(FOX.split()[3:18]) + " and an end"
    result = decontaminate([leaked, "clean text without any of it", FOX[:40]], [FOX, "what is 2 plus 2"], ngram=13)
    assert result.kept == [1, 2] and "brown fox" not in result.kept
    assert "with 0 of the evaluation data" in result.dropped[0]
    assert decontaminate(["So, what is 2 plus 2?"], ["what is 2 plus 2"]).kept == []  # shorter than 13 words: as a whole
    assert decontaminate(["what is it"], ["what is"]).kept == [0]  # too short to mean anything


def test_quality():
    result = filter_quality([1, 2, 3, float("nan")], keep=lambda x: x != 2, quality=float, min_quality=3)
    assert result.kept == [2]
    assert result.dropped == {0: "quality 1 is below 3", 1: "refused by the filter", 3: "quality nan is below 3"}
    with pytest.raises(ValueError, match="go together"):
        filter_quality([1], quality=float)


def test_samples_that_are_no_text_need_a_function():
    with pytest.raises(TypeError, match="text="):
        dedup_exact([{"a": 1}])
    assert dedup_exact([{"a": "x"}, {"a": "X"}], text=lambda s: s["a"]).kept == [0]
