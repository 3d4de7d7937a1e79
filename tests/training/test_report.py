"""From a recorded comparison (report.json beside this file) to a verdict and a page."""

import copy
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from unsloth_ext.errors import UsageError
from unsloth_ext.training import compare, curves, report

RECORDED = json.loads(Path(__file__).with_name("report.json").read_text())
HOSTILE = "</pre><script>alert(1)</script>&amp;\"'$title ${body}"


class Page(HTMLParser):
    """Complains about anything that is not closed in order, and keeps tags and text."""

    VOID = ("meta", "br", "line", "rect", "circle", "polyline")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def runs():
    return copy.deepcopy(RECORDED["runs"])


def page_of(runs, tolerance=1e-2):
    return Page(report.render(runs, compare.judge(runs, tolerance)))


def test_the_recorded_comparison_holds(runs):
    verdict = compare.judge(runs, 1e-2)
    assert verdict["holds"] and verdict["same_data"]
    page = page_of(runs)
    assert verdict["headline"] in page.text
    assert page.tags.count("svg") == 6  # three charts, wide and narrow
    assert "script" not in page.tags


def test_a_difference_beyond_the_tolerance_is_named(runs):
    runs[1]["steps"][2]["loss"] += 0.02
    verdict = compare.judge(runs, 1e-2)
    assert not verdict["holds"] and verdict["at_step"] == 3
    assert "differ by 0.02 at step 3" in page_of(runs).text
    assert compare.judge(runs, 0.03)["holds"]


def test_other_data_voids_the_comparison(runs):
    runs[1]["steps"][1]["batch"] = "0" * 16
    assert "different data from step 2" in "".join(compare.judge(runs, 1.0)["problems"])


def test_a_loss_that_does_not_fall_is_named(runs):
    summary = runs[0]["summary"]
    summary["last_quarter_loss"] = summary["first_quarter_loss"]
    assert compare.judge(runs, 1.0)["problems"][0].startswith("pristine: the loss did not fall")


def test_a_loss_that_is_no_number_interrupts_the_curve(runs):
    runs[1]["steps"][2]["loss"] = None
    assert any("not finite at step 3" in problem for problem in compare.judge(runs, 1.0)["problems"])
    page_of(runs)


def test_an_adapter_that_answers_otherwise_is_named(runs):
    runs[1]["sample"]["same_tokens"] = False
    assert "patched: the reloaded adapter gives other tokens" in "".join(compare.judge(runs, 1.0)["problems"])


def test_hostile_text_stays_text(runs):
    for run in runs:
        run["sample"].update(prompt=HOSTILE, trained=HOSTILE, reloaded=HOSTILE, same_tokens=False)
        run["options"].update(model=HOSTILE, dataset=HOSTILE)
        run["environment"].update(cpu=HOSTILE, date=HOSTILE)
        run["summary"]["memory"] = HOSTILE
        run["patches"] = [dict.fromkeys(("id", "challenge", "state", "reason", "summary"), HOSTILE)]
    runs[0].update(status="failed", error=HOSTILE, log_tail=[HOSTILE])
    page = page_of(runs)
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) > 10


def test_a_crashed_side_keeps_the_other(tmp_path, runs):
    for run in runs[:1]:
        (tmp_path / run["side"]).mkdir()
        (tmp_path / run["side"] / "run.json").write_text(json.dumps(run))
    crashed = tmp_path / "patched"
    crashed.mkdir()
    steps = [json.dumps(record) for record in runs[1]["steps"][:3]]
    (crashed / "steps.jsonl").write_text("\n".join(steps) + '\n{"step": 4, "lo')  # killed in the middle of a line
    (crashed / "log.txt").write_text("".join(f"line {number}\n" for number in range(100)))
    loaded, tolerance, folder = report.load(tmp_path)
    verdict = compare.judge(loaded, tolerance)
    assert not verdict["holds"] and verdict["headline"] == "Patched did not finish"
    page = report.write(loaded, verdict, folder).read_text()
    text = Page(page).text
    assert "line 99" in text and "line 69\n" not in text and "after 3 steps" in text
    assert "pristine Unsloth: the reloaded adapter gives the same tokens" in text
    assert report.load(tmp_path / "report.json")[0] == loaded


def test_one_run_is_a_report_too(runs):
    page = page_of(runs[1:])
    assert "Loss went from" in page.text and "Difference" not in page.text


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"runs": []}'])
def test_what_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UsageError, match=r"report\.json is not a report"):
        report.load(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        report.load(tmp_path)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3.2, 7.9), (-0.01, 0.01), (0, 0), (5e-9, 5.1e-9), (1e-3, 1e6), (-3, -3)]
)
def test_ticks_are_round_and_enclose(low, high):
    ticks = curves.round_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
    assert len({curves.number(tick, ticks) for tick in ticks}) == len(ticks)
