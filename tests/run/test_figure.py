"""How pictures look, and that their files are whole."""

import pytest
from PIL import Image

from fulmen.config import UserError
from fulmen.run.figure import make_figure, save_figure, style_axes


def test_a_figure_has_its_size_and_its_axes_their_names(tmp_path):
    figure = make_figure(4, 2)
    axes = figure.add_subplot()
    style_axes(axes, "step", "loss")
    save_figure(figure, tmp_path / "new" / "figure.png")
    assert Image.open(tmp_path / "new" / "figure.png").size == (600, 300)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    assert {side for side, spine in axes.spines.items() if spine.get_visible()} == {"left", "bottom"}


def test_where_there_is_no_folder_nothing_is_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_figure(make_figure(1, 1), tmp_path / "file" / "figure.png")
