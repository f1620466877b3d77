"""Pictures: whole or not there, and their texts shown as they are, whatever the user's settings."""

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
def test_a_text_is_drawn_as_it_is(tmp_path: Path, text: str) -> None:
    shown = label(text)
    assert not matplotlib.cbook.is_math_text(shown)
    assert shown.replace(r"\$", "$").strip() == printable(text, 100).strip()
    with picture(tmp_path / "a.png", dpi=50, figsize=(3, 2), layout="constrained") as figure:
        axis = figure.subplots()
        axis.plot([1, 2], [1, 2000], label=shown)
        axis.set(xlabel=shown, ylabel=shown, title=shown, yscale="log")
        axis.legend()
        assert [each.get_text() for each in axis.get_legend().get_texts()] == [shown]
        figure.suptitle(shown)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_tex_of_the_users_settings_is_not_used(tmp_path: Path) -> None:
    with matplotlib.rc_context({"text.usetex": True}):
        with picture(tmp_path / "a.png", dpi=50) as figure:
            figure.text(0, 0, label("%&#_^{}"))
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "a.png").exists()


def test_a_picture_that_fails_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), picture(tmp_path / "a.png", dpi=50):
        raise ZeroDivisionError
    nowhere = picture(tmp_path / "no" / "a.png", dpi=50)
    with pytest.raises(SteerError, match="cannot be written"), nowhere:
        pass
    assert os.listdir(tmp_path) == []
