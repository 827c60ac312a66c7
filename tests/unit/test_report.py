"""The page is whole, self-contained, and escaped; names in plots don't lie on each other."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from interfuse.errors import OptionError
from interfuse.evaluation.comparison import ClassWeights, Comparison, Row, Score
from interfuse.evaluation.cost import Cost
from interfuse.report.html import write_report
from interfuse.report.labels import Box, place

NASTY = '<script>alert("x")</script> $a^b$ #010101'


def comparison(*names: str) -> Comparison:
    """Rows close together, the first two of them parents, the last with weights."""
    rows = []
    for i, name in enumerate(names):
        score = Score(0.9 + 0.001 * i, 0.89 + 0.001 * i, 0.91 + 0.001 * i)
        weights = {"data": ClassWeights(("m1", "m2"), ("cat", "<dog>"), ((0.25, 0.75), (0.5, 0.5)))}
        rows.append(
            Row(
                name=name,
                parent=i < 2,
                score=score,
                scores={"data": score},
                cost=Cost(1000 + 10 * i, 10, 4000, 2000, 0.01 + 0.0001 * i, 32, 9000),
                difference=None if i < 2 else Score(0.001, -0.01, 0.01),
                weights=weights if i == len(names) - 1 else {},
            )
        )
    return Comparison("accuracy", True, ("data",), (500,), tuple(rows), 0.95, 1000, names[1], True, "cpu")


class Elements(HTMLParser):
    """Tags with attributes, and the text outside of style."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Elements:
    page = Elements()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    path = write_report(comparison("a", "b", "c"), tmp_path / "new" / "report.html")
    text, page = path.read_text(encoding="utf-8"), read(path)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"@import|url\((?!#)", text)
    assert not re.search(r"(?<!xmlns=\")(?<!xlink=\")https?://", text)


def test_rows_figures_weights_and_methods_are_there(tmp_path: Path) -> None:
    page = read(write_report(comparison("a", "b", "c"), tmp_path / "r.html", title="My pool", notes=["One.", "Two & 3."]))
    for shown in (
        "My pool",
        "One.",
        "Two & 3.",
        "Best accuracy: c, 0.9020 [0.8920, 0.9120]",
        "The interval holds zero",
        "Accuracy against parameters",
        "Accuracy against latency",
        "Peak memory",
        "75",
        "<dog>",
        "1,000 resamples",
        "best score on this same data",
    ):
        assert shown in page.text
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) == 4
    assert all(drawing["role"] == "img" and "c 0.9020" in (drawing["aria-label"] or "") for drawing in drawings)
    heads = [attributes for tag, attributes in page.tags if tag == "th"]
    assert heads
    assert all(head.get("scope") in ("col", "row") for head in heads)


def test_rows_without_an_input_are_in_the_table_and_not_in_the_plots(tmp_path: Path) -> None:
    table = comparison("one", "two", "three")
    part = dataclasses.replace(
        table.rows[2], name="three without text", whole="three", change=Score(-0.3, -0.4, -0.2), weights={}
    )
    table = dataclasses.replace(table, rows=(*table.rows, part))
    text = read(write_report(table, tmp_path / "r.html")).text
    assert "vs all inputs" in text
    assert "-0.3000" in text or "\u22120.3000" in text
    assert "The same model with that input missing from every example" in text
    names = [tag for tag, _ in read(tmp_path / "r.html").tags if tag == "li"]
    assert len(names) == 2 * 3  # two plots' keys, three models


def test_ids_are_unique(tmp_path: Path) -> None:
    page = read(write_report(comparison("a", "b", "c"), tmp_path / "r.html"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    used = re.findall(r"(?:url\(|href=\")#([^)\"]+)", (tmp_path / "r.html").read_text(encoding="utf-8"))
    assert used
    assert set(used) <= set(ids)


def test_names_are_escaped(tmp_path: Path) -> None:
    path = write_report(comparison("a", "b", NASTY), tmp_path / "r.html", title=NASTY, notes=NASTY)
    assert "<script" not in path.read_text(encoding="utf-8")
    page = read(path)
    assert page.text.count('<script>alert("x")</script> $a^b$ #010101') >= 4
    assert any(NASTY in (attributes.get("aria-label") or "") for tag, attributes in page.tags if tag == "svg")


def test_a_model_without_parameters_is_named_below_the_plot(tmp_path: Path) -> None:
    made = comparison("a", "b", "c").to_dict()
    made["rows"][2]["cost"]["parameters"] = 0
    page = read(write_report(Comparison.from_dict(made), tmp_path / "r.html"))
    assert page.text.count("a log axis has no zero: c.") == 1


def test_the_same_comparison_gives_the_same_page(tmp_path: Path) -> None:
    pages = [write_report(comparison("a", "b", "c"), tmp_path / name).read_bytes() for name in ("1.html", "2.html")]
    assert pages[0] == pages[1]


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("before")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(comparison("a", "b"), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]
    assert path.read_text() == "before"
    monkeypatch.undo()
    write_report(comparison("a", "b"), path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=rf"{tmp_path.name} is a folder; give the name of a file"):
        write_report(comparison("a", "b"), tmp_path)


def test_names_of_twelve_close_points_do_not_overlap() -> None:
    points = [(300 + 3 * (i % 4), 200 + 4 * (i // 4)) for i in range(12)]
    bounds = Box(50, 40, 540, 380)
    places = place(points, [(40.0 + 5 * (i % 5), 14.0) for i in range(12)], bounds)
    boxes = [found.box for found in places]
    for i, box in enumerate(boxes):
        assert box.overlap(bounds) == pytest.approx((box.right - box.left) * (box.top - box.bottom))
        assert all(box.overlap(other) == 0 for other in boxes[:i])
        assert not any(box.left < x < box.right and box.bottom < y < box.top for x, y in points)


def test_a_lone_name_is_next_to_its_point_and_within_bounds() -> None:
    (right,) = place([(100, 100)], [(40, 12)], Box(0, 0, 200, 200))
    assert right == (Box(108, 94, 148, 106), None)
    (left,) = place([(195, 100)], [(40, 12)], Box(0, 0, 200, 200))
    assert left.box.right < 195
