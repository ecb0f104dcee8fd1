"""Charts of the page as markup."""

import re

from s2dcli.report import charts


def test_many_points_of_a_scatter_plot_have_numbers_and_their_names_below():
    points = [(f"route {index}", 512 * (index % 2), index / 10, index / 10 - 0.02, index / 10 + 0.02) for index in range(8)]
    few, many = (charts.scatter("avg@4", "labels", part) for part in (points[:6], points))
    assert "<ul" not in few
    assert all(f">{name}</text>" in few for name, *_ in points[:6])
    assert not any(f">{name}</text>" in many for name, *_ in points)
    assert re.findall(r"<li><b>(\d)</b> route (\d)</li>", many) == [
        (str(place), str(index)) for place, index in enumerate((0, 2, 4, 6, 1, 3, 5, 7), start=1)
    ]
    assert all(f">{place}</text>" in many for place in range(1, 9))
