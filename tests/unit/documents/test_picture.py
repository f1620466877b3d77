"""Plots are written atomically and show texts literally, for all user settings."""

import os
from pathlib import Path

import pytest
from hostile_texts import HOSTILE, SURROGATE

from vllm_steer import SteerError
from vllm_steer.picture import label, picture
from vllm_steer.untrusted_text import printable

matplotlib = pytest.importorskip("matplotlib")
FORMULAS = ["$x$", "$", "$$", r"\$", r"\$x\$", r"a\\$b$", r"$\frac{$", "$_{^", "_hidden", r"\alpha"]
TEXTS = [*HOSTILE.values(), SURROGATE, *FORMULAS]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_text_is_drawn_unchanged(tmp_path: Path, text: str) -> None:
    output = label(text)
    assert not matplotlib.cbook.is_math_text(output)
    assert output.replace(r"\$", "$").strip() == printable(text, 100).strip()
    with picture(tmp_path / "a.png", dpi=50, figsize=(3, 2), layout="constrained") as figure:
        axis = figure.subplots()
        axis.plot([1, 2], [1, 2000], label=output)
        axis.set(xlabel=output, ylabel=output, title=output, yscale="log")
        axis.legend()
        assert [text_item.get_text() for text_item in axis.get_legend().get_texts()] == [output]
        figure.suptitle(output)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_tex_from_the_users_settings_is_not_used(tmp_path: Path) -> None:
    with matplotlib.rc_context({"text.usetex": True}):
        with picture(tmp_path / "a.png", dpi=50) as figure:
            figure.text(0, 0, label("%&#_^{}"))
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "a.png").exists()


def test_a_failed_plot_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), picture(tmp_path / "a.png", dpi=50):
        raise ZeroDivisionError
    nowhere = picture(tmp_path / "no" / "a.png", dpi=50)
    with pytest.raises(SteerError, match="cannot be written"), nowhere:
        pass
    assert os.listdir(tmp_path) == []
