from __future__ import annotations

import pytest

from hemiola_search.errors import SearchError
from hemiola_search.targets import Target, target_from_text

UNCACHED = {"relative_l2": 0.0, "psnr": 100.0, "ssim": 1.0, "agreement": 0.975}


@pytest.mark.parametrize(
    ("text", "target", "words"),
    [
        ("relative_l2<=0.05", Target("relative_l2", "<=", 0.05, False), "relative_l2 <= 0.05"),
        (" psnr >= 40 ", Target("psnr", ">=", 40.0, False), "psnr >= 40"),
        ("relative_l2<=5e-2", Target("relative_l2", "<=", 0.05, False), "relative_l2 <= 0.05"),
        ("ssim>=.9", Target("ssim", ">=", 0.9, False), "ssim >= 0.9"),
        ("agreement>=uncached-0.005", Target("agreement", ">=", -0.005, True), "agreement >= uncached-0.005"),
        ("agreement >= uncached - 0.005", Target("agreement", ">=", -0.005, True), "agreement >= uncached-0.005"),
        ("agreement>=uncached", Target("agreement", ">=", 0.0, True), "agreement >= uncached+0"),
        ("relative_l2<=uncached+0.1", Target("relative_l2", "<=", 0.1, True), "relative_l2 <= uncached+0.1"),
    ],
)
def test_a_target_is_read_and_written(text: str, target: Target, words: str) -> None:
    assert target_from_text(text) == target
    assert str(target) == words
    assert target_from_text(words) == target


@pytest.mark.parametrize(
    "text",
    [
        "",
        "relative_l2",
        "relative_l2<=",
        "relative_l2<0.05",
        "relative_l2=0.05",
        "fid<=3",
        "0.05>=relative_l2",
        "psnr>=forty",
        "psnr>=1.2.3",
        "psnr>=.",
        "psnr>=nan",
        "psnr>=inf",
        "agreement>=cached-0.005",
        "agreement>=uncached 0.005",
        "agreement>=uncached-",
        "psnr>=40 and ssim>=0.9",
    ],
)
def test_what_is_no_target_is_refused_with_one_that_is(text: str) -> None:
    with pytest.raises(SearchError, match="is no target") as raised:
        target_from_text(text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize(
    ("text", "figure", "is_met"),
    [
        ("relative_l2<=0.05", 0.05, True),
        ("relative_l2<=0.05", 0.0501, False),
        ("psnr>=40", 40.0, True),
        ("psnr>=40", 39.9, False),
        ("agreement>=uncached-0.025", 0.95, True),
        ("agreement>=uncached-0.025", 0.925, False),
        ("agreement>=uncached", 0.975, True),
        ("relative_l2<=uncached+0.1", 0.1, True),
    ],
)
def test_a_target_is_a_bound_that_the_figure_may_touch(text: str, figure: float, is_met: bool) -> None:
    target = target_from_text(text)
    assert target.is_met({target.figure: figure}, UNCACHED) == is_met


@pytest.mark.parametrize("num_images", [10, 40, 200])
@pytest.mark.parametrize("right", [4, 8, 10])
def test_shares_of_images_touch_a_bound_whatever_floats_round(num_images: int, right: int) -> None:
    """An agreement of k of n images keeps to 1 of n less than that of k + 1."""
    target = Target("agreement", ">=", -1 / num_images, True)
    uncached = {"agreement": right / num_images}
    assert target.is_met({"agreement": (right - 1) / num_images}, uncached)
    assert not target.is_met({"agreement": (right - 2) / num_images}, uncached)


def test_without_a_judge_there_is_no_agreement() -> None:
    figures = {"relative_l2": 0.01, "psnr": 40.0, "ssim": 0.99}
    with pytest.raises(SearchError, match=r"agreement cannot be a target: there is no judge.*--judge"):
        target_from_text("agreement>=0.9").is_met(figures, figures)
