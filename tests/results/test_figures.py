"""Charts: whatever is drawn is drawn, and can be read."""

import re
import shutil
import sys
from xml.etree import ElementTree

import pytest
from browser import look
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_report import all_runs, runs  # noqa: F401  (fixtures)

from axolotl_loram.cli import main
from axolotl_loram.results.figures import (
    NARROW,
    WIDE,
    Bar,
    Bars,
    Dot,
    Dots,
    Lines,
    Series,
    plain,
    svg,
)
from axolotl_loram.results.page import html
from axolotl_loram.results.report import build

finite = st.floats(-1e6, 1e6)


@pytest.mark.parametrize("examples", [2, pytest.param(20, marks=pytest.mark.matrix)])
def test_any_numbers_and_names_can_be_drawn(examples):
    drawn = given(st.lists(st.tuples(st.floats(0, 1e5), finite), min_size=1, max_size=9), st.text())
    tried = settings(deadline=None, max_examples=examples)(drawn(draw))
    example([(0, 1.0), (1, 1.0)], "_\x00\ud800 $x^2$ é <b>&")(tried)()


def draw(points, name):
    points.sort()
    dots = [Dot(name, "blue", y, y - 1, None, name) for _, y in points]
    positive = [Dot(name, "blue", abs(y), 0, 9, "") for _, y in points]
    charts = [
        Lines("l", name, [Series(name, "blue", points)]),
        Bars("b", name, [Bar(name, {name: abs(y)}, {name: abs(y)}) for _, y in points]),
        Dots("d", name, {name: dots}, name),
        Dots("d", name, {name: positive}, "", True),
    ]
    for chart in charts:
        drawn = svg(chart, NARROW)
        assert not re.search(r'[" ,]-?(nan|inf)[" ,]', drawn)
        assert ElementTree.fromstring(drawn).get("aria-label") == plain(name)


def contrast(first, second):
    """WCAG 2's contrast ratio of two #rrggbb colours, 1 to 21."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_colours_can_be_read_in_light_and_dark(runs):
    page = html(build([runs / "lora"]))
    for scheme in re.findall(r":root \{(.*?)\}", page, re.DOTALL)[:2]:
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", scheme))
        texts = ("ink", "muted", "accent", "blue", "orange", "grey", "green", "purple", "red")
        assert all(contrast(colors[t], colors[b]) >= 4.5 for t in texts for b in ("page", "card"))
        assert contrast(colors["warn"], colors["warn-card"]) >= 4.5
        parts = [f"part{i}" for i in range(6)] + ["kept", "ink"]
        assert all(contrast(colors[part], colors["card"]) >= 3 for part in parts)


LOOK = """(() => {
  const shown = [...document.querySelectorAll("figure svg[role=img]")]
    .filter(e => e.getClientRects().length);
  const boxes = shown.map(e => e.getBoundingClientRect());
  return {
    overflow: document.documentElement.scrollWidth - innerWidth,
    figures: document.querySelectorAll("figure").length,
    sized: boxes.filter(b => b.width > 200 && b.height > 50).length,
    outside: boxes.filter(b => b.right > innerWidth).length,
    smallest: Math.min(...shown.map((e, i) => boxes[i].width / e.viewBox.baseVal.width)),
    page: getComputedStyle(document.body).backgroundColor,
  };
})()"""


def test_a_browser_shows_it_on_a_desk_and_on_a_phone(all_runs, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    report = build(all_runs)
    page = tmp_path / "report.html"
    page.write_text(html(report), encoding="utf-8")
    views = [
        {"width": width, "height": 800, "dark": dark}
        for width in (1280, 390)
        for dark in (False, True)
    ]
    seen = look(chromium, page, views, LOOK)
    for each in seen:
        assert each.requests == [page.as_uri()] and each.complaints == []
        assert each.value["overflow"] <= 0 and each.value["outside"] == 0
        assert each.value["sized"] == each.value["figures"] == len(report.charts)
        assert each.value["smallest"] > 0.9  # text keeps its size
    assert [each.value["page"] for each in seen[:2]] == ["rgb(251, 251, 250)", "rgb(18, 22, 28)"]


def test_charts_take_every_colour_from_the_page(all_runs):
    """So that light, dark and print have their own."""
    report = build(all_runs)
    page = html(report)
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    expected = [(chart.title, width) for chart in report.charts for width in (WIDE, NARROW)]
    for (title, width), chart in zip(expected, charts, strict=True):
        drawn = ElementTree.fromstring(chart)
        assert drawn.get("aria-label") == title and len(drawn) > 0
        assert drawn.get("viewBox").split()[2] == drawn.get("width") == str(width)
        colors = {e.get(name) for e in drawn.iter() for name in ("fill", "stroke")}
        for color in colors - {None, "none"}:
            assert re.fullmatch(r"var\(--\w+\)", color) and f"{color[4:-1]}: #" in page


def test_without_matplotlib_one_sentence_says_what_to_install(runs, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["report", str(runs / "lora"), "--output", str(tmp_path / "report.html")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "pip install 'axolotl-loram[plot]'" in result.output
    assert result.output.count("\n") == 1 and not (tmp_path / "report.html").exists()
