import itertools
import json
import shutil

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from shadowtune.evaluation import report
from shadowtune.evaluation.report import (
    draw,
    html_page,
    html_table,
    markdown_table,
    new_figure,
    page,
    png,
    read_losses,
    write_page,
)

ROWS = [
    {"method": "base", "accuracy": 0.1, "accuracy_low": 0.05, "accuracy_high": 0.2, "train_seconds": None},
    {"method": "shadow", "accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "train_seconds": 12.5},
]


def test_losses_are_the_attached_models_where_both_are_logged(tmp_path):
    lines = [{"step": 1, "loss": 3.0, "base_loss": 2.0}, {"step": 1, "eval_loss": 9.0}, {"step": 2, "loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_losses(tmp_path / "metrics.jsonl") == [(1, 2.0), (2, 1.5)]


def test_the_picture_is_a_png_and_changes_with_the_numbers():
    first = draw(ROWS, {"shadow": [(1, 2.0), (2, 1.0)]})
    other = draw([ROWS[0], {**ROWS[1], "accuracy": 0.5, "accuracy_low": 0.4}], {"shadow": [(1, 2.0), (2, 1.0)]})
    assert first.startswith(b"\x89PNG")
    assert first != other


@pytest.mark.parametrize(
    "ends", [(0.21, 0.22), (0.02, 0.06), (0.02, 0.2), (0.3, 1.5), (0.01, 9), (1e-3, 100), (1e-5, 1e3)]
)
def test_a_logarithmic_axis_has_numbers_that_do_not_overlap(ends):
    figure = new_figure(11, 4.5)
    axes = figure.subplots(1, 2)[1]
    axes.plot(ends, [1, 2])
    axes.set(xscale="log")
    png(figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    labels = [label for label in axes.get_xticklabels(which="both") if label.get_text()]
    boxes = sorted((label.get_window_extent(renderer) for label in labels), key=lambda box: box.x0)
    boxes = [box for box in boxes if axes.bbox.x0 <= (box.x0 + box.x1) / 2 <= axes.bbox.x1]
    assert len(boxes) >= 2
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_the_page_shows_rows_examples_and_picture_and_escapes_what_it_is_given():
    example = {"request": "<b>hi</b>", "expected": "greeting", "attached": "greeting", "attached_seconds": 0.25}
    text = page("a & b", ROWS, [example], b"picture", "note")
    assert "a &amp; b" in text
    assert "&lt;b&gt;hi&lt;/b&gt;" in text
    assert "<b>" not in text
    assert "cGljdHVyZQ==" in text
    assert "<td>0.250</td>" in text
    assert "<td>-</td>" in text


def test_the_files_are_written_together(tmp_path):
    write_page(tmp_path / "new", b"picture", "text")
    assert (tmp_path / "new" / "report.png").read_bytes() == b"picture"
    assert (tmp_path / "new" / "report.html").read_text() == "text"


def axes_of(monkeypatch, draw_it):
    """The axes that a drawing function fills."""
    figures = []
    monkeypatch.setattr(report, "png", lambda figure: figures.append(figure) or b"")
    draw_it()
    return figures[0].axes


def test_a_loss_that_was_logged_once_is_a_mark_and_one_that_never_was_is_a_word(monkeypatch):
    losses = axes_of(monkeypatch, lambda: draw(ROWS, {"lora": [(1, 2.0), (2, 1.0)], "shadow": [(5, 2.0)]}))[2]
    assert [line.get_marker() for line in losses.lines] == ["None", "o"]
    losses = axes_of(monkeypatch, lambda: draw(ROWS, {"shadow": []}))[2]
    assert [text.get_text() for text in losses.texts] == ["no step was logged"]


def test_an_interval_that_begins_above_its_mean_by_rounding_is_drawn():
    assert draw([{**ROWS[0], "accuracy_low": ROWS[0]["accuracy"] + 1e-12}], {}).startswith(b"\x89PNG")


CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("width", [360, 800])
def test_the_page_fits_the_width_of_a_phone_and_its_tables_scroll_by_themselves(width, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    wide = [{f"a long heading of column {number}": "x" * 60 for number in range(14)}]
    text = page("shadowtune demo", wide, wide, png(new_figure(12, 3)), "/a/path/without/blanks" * 12)
    (tmp_path / "report.html").write_text(text)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        phone = browser.new_context(viewport={"width": width, "height": 700}, is_mobile=True, device_scale_factor=2)
        shown = phone.new_page()
        shown.goto((tmp_path / "report.html").as_uri())
        assert shown.evaluate("window.innerWidth") == width
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert shown.evaluate("document.querySelector('.table').scrollWidth") > width
        browser.close()


def test_the_page_tells_a_phone_its_width_and_every_table_stands_in_a_box_that_scrolls():
    text = page("title", ROWS, ROWS, b"", "note")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert text.count('<div class="table"><table>') == text.count("<table>") == 2
    assert ".table { overflow-x: auto" in text


def test_a_page_fits_a_phone_and_wide_tables_scroll():
    made = html_page("t", [html_table([{"a": 1}])])
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in made
    assert '<div class="table"><table>' in made
    assert "overflow-x: auto" in made


def test_markdown_has_a_head_a_rule_and_a_line_for_each_row():
    assert markdown_table(
        [{"case": "a", "baseline": "b", "ratio": 2.0}, {"case": "a", "baseline": "c", "ratio": None}]
    ) == ("| case | baseline | ratio |\n| --- | --- | --: |\n| a | b | 2.000 |\n| a | c | - |\n")
