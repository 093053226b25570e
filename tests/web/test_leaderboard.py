"""The pages of runs and of the leaderboard: the same ranking as the API's, and plots that say what they show."""

from __future__ import annotations

import re
from collections.abc import Callable

import httpx2
import pytest
from playwright.sync_api import expect

from app.web import leaderboard_pictures
from gradient_blueprints.record_models import Leaderboard
from gradient_blueprints.run_models import Resource
from tests.api.test_leaderboard import board, configured, report
from tests.api.test_runs import begin, points, tally
from tests.conftest import Server
from tests.web.conftest import Visitor
from tests.web.plain import PlainBrowser


@pytest.fixture
def server(empty_registry: Server) -> Server:
    return empty_registry


def ranking(page: str) -> list[tuple[str, str]]:
    """Learning rate and value of each row, in order."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    found = (
        (re.search(r"rate</span> ([\d.]+)", row), re.findall(r'<td class="number">(.*?)</td>', row)) for row in rows
    )
    return [(rate[1], numbers[1]) for rate, numbers in found if rate]


def test_the_board_is_that_of_the_api_at_any_place(publisher: httpx2.Client, plain: PlainBrowser) -> None:
    report(publisher, (1, 9.0), (4, 5.0), task="rank/loss", **configured(0.1), seed=0)
    report(publisher, (1, 9.0), (4, 5.5), task="rank/loss", **configured(0.1), seed=1)
    report(publisher, (1, 8.0), (2, 7.0), task="rank/loss", **configured(0.2))
    begin(publisher, task="rank/loss")
    page = plain.get("/leaderboard?task=rank/loss&resource=seconds").raise_for_status().text
    assert ranking(page) == [("0.1", "5.250"), ("0.2", "7.000")]
    assert "Ranked by eval_loss at 4.000 seconds" in page
    assert "1 not finished" in page
    at_two = plain.get("/leaderboard?task=rank/loss&resource=seconds&axis=gamma&value=2").text
    assert ranking(at_two) == [("0.2", "7.000"), ("0.1", "7.750")]
    reached = plain.get("/leaderboard?task=rank/loss&resource=seconds&axis=psi&value=7&metric=").text
    assert ranking(reached) == [("0.2", "2.000"), ("0.1", "2.607")]
    for number, (rate, value) in enumerate(ranking(reached)):
        entry = board(publisher, task="rank/loss", at="psi:7")["groups"][0]["entries"][number]
        assert (entry["settings"]["rate"], round(entry["value"], 3)) == (float(rate), float(value))
    assert plain.get("/leaderboard?task=rank/loss&axis=psi&value=x").status_code == 422
    for query in ("task=%21", "task=rank/loss&metric=%21", f"task={'a' * 129}"):
        assert plain.get(f"/leaderboard?{query}").status_code == 422
        assert plain.get(f"/leaderboard/plots/0.svg?{query}").status_code == 422
    assert ranking(plain.get("/leaderboard?task=rank/loss+&resource=seconds&metric=+").text) == ranking(page)
    assert plain.get("/leaderboard/plots/0.svg?task=").status_code == 422
    assert "tells its tokens" in plain.get("/leaderboard?task=rank/loss&resource=tokens").text


def test_runs_are_filtered_and_lead_to_their_page(publisher: httpx2.Client, plain: PlainBrowser) -> None:
    mine = report(publisher, (1, 9.0), (4, 5.0), task="list/loss")
    other = begin(publisher, task="law/accuracy").rpartition("/")[2]
    assert {mine, other} <= set(re.findall(r'href="/runs/([\w-]{36})"', plain.get("/runs").text))
    for query in ("task=list/loss", "model=tiny&task=list/loss&lab=lab-a"):
        assert re.findall(r'href="/runs/([\w-]{36})"', plain.get(f"/runs?{query}").text) == [mine]
    assert "No runs of this kind" in plain.get("/runs?lab=nobody").text
    assert plain.get(f"/runs/{other}").status_code == 200  # begun, without a point
    assert plain.get(f"/runs/{other}/curve.svg?resource=seconds").status_code == 404
    assert plain.get("/runs/00000000-0000-7000-8000-000000000000").status_code == 404
    assert plain.get("/leaderboard/plots/0.svg?task=nothing").status_code == 404


def test_the_pages_are_accessible_and_their_plots_are_drawn(
    server: Server, publisher: httpx2.Client, open_visitor: Callable[..., Visitor]
) -> None:
    for rate in (0.1, 0.2):
        run = report(
            publisher, *[(float(step), 9 - rate * step) for step in range(1, 40)], task="look/loss", **configured(rate)
        )
    visitor = open_visitor(server.url, width=390, dark=True)
    page = visitor.visit("/leaderboard")
    visitor.check()
    page.get_by_role("link", name="look/loss", exact=True).click()
    expect(page).to_have_title("Leaderboard of look/loss · Gradient blueprints")
    page.get_by_label("Resource").select_option("seconds")
    page.get_by_role("button", name="Rank").click()
    plot = page.get_by_role("img", name="eval_loss over seconds of 2 runs")
    plot.wait_for()
    assert plot.evaluate("image => image.decode().then(() => image.naturalWidth)") > 200
    visitor.check()
    assert visitor.overflow() == 0
    page.get_by_role("link", name=f"Run {run}").click()
    curve = page.get_by_role("img", name="eval_loss over seconds, 39 points, ending with 1.20 at 39.0")
    assert curve.evaluate("image => image.decode().then(() => image.naturalWidth)") > 200
    visitor.check()
    assert visitor.overflow() == 0
    page.get_by_label("Pages").get_by_role("link", name="Runs").click()
    expect(page).to_have_title("Runs · Gradient blueprints")
    visitor.check()
    assert visitor.overflow() == 0


def test_a_plot_names_the_best_entries_and_its_axes(publisher: httpx2.Client) -> None:
    for rate in range(1, 8):
        report(publisher, (1, 9.0), (2, 8.0 - rate / 10), task="plot/loss", **configured(rate))
    answer = Leaderboard.model_validate(board(publisher, task="plot/loss"))
    svg = leaderboard_pictures.draw_group(answer, answer.groups[0], narrow=False).decode()
    assert [f"{rank}. tiny" in svg for rank in (1, 5, 6)] == [True, True, False]
    assert ">seconds<" in svg
    assert ">eval_loss<" in svg
    assert set(leaderboard_pictures.UNITS) == set(Resource)


def test_a_long_curve_and_one_that_spent_nothing_are_drawn(publisher: httpx2.Client, plain: PlainBrowser) -> None:
    path = begin(publisher, task="long/loss")
    for first in range(0, 3_000, 1_000):
        pairs = [(float(number), 9 - number / 1_000) for number in range(first, first + 1_000)]
        publisher.post(f"{path}/points", json=points(*pairs, first=first)).raise_for_status()
    svg = plain.get(f"/runs/{path.rpartition('/')[2]}/curve.svg?resource=seconds").raise_for_status()
    assert svg.headers["content-type"] == "image/svg+xml"
    assert len(svg.content) < 60_000
    idle = report(publisher, (0, 9.0), task="long/loss", given=tally(seconds=0.0))
    assert plain.get(f"/runs/{idle}/curve.svg?resource=seconds&narrow=true").status_code == 200
    assert plain.get("/leaderboard/plots/0.svg?task=long/loss&resource=seconds").status_code == 200
