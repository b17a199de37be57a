import pytest
from matplotlib.figure import Figure

from shadowtune.tables import format_value, keep_within, line_style


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (1234.5, "1,234"), (0.25, "0.250"), (12345, "12,345"), (True, "True"), ("a", "a")]
)
def test_values_look_alike_everywhere(value, text):
    assert format_value(value) == text


@pytest.mark.parametrize("values", [(0, 0), (0, 100), (100, 100), (40, 60), (0, 3)])
def test_an_axis_of_percentages_shows_none_that_there_cannot_be(values):
    axes = Figure().subplots()
    axes.plot(values, values, "o-")
    keep_within(axes.xaxis, 0, 100)
    keep_within(axes.yaxis, 0, 100)
    for low, high in (axes.get_xlim(), axes.get_ylim()):
        assert 0 <= low <= min(values)
        assert max(values) <= high <= 100
        assert low < high


def test_an_axis_of_costs_has_no_end_above():
    axes = Figure().subplots()
    axes.plot([0, 500], [1, 2])
    keep_within(axes.xaxis, 0)
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] > 500


def test_a_single_point_gets_a_mark():
    assert (line_style(1), line_style(2), line_style(2, "--"), line_style(1, "--")) == ("o", "-", "--", "o")
