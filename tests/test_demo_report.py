"""The demo's report: complete, in one file, and plain about small gains."""

import re
from html.parser import HTMLParser

from demo_sets import make_run, store

from d2v_fast.demo.report import gain, load_run, write_report
from d2v_fast.train.probe import ProbeResult


class Page(HTMLParser):
    """Collects tags and text, and checks that every tag that must be closed is."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_run_survives_its_files(tmp_path):
    run = make_run(skipped=(("x.wav", "broken"),))
    assert load_run(store(tmp_path / "speech", run)) == run
    assert run.seconds == 80.0


def test_report_is_complete_and_self_contained(tmp_path):
    folders = [store(tmp_path / name, make_run(name)) for name in ("speech", "image")]
    text = write_report(folders, tmp_path / "out/report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?://|<script|@import|<link", text)
    images = [attributes for tag, attributes in page.tags if tag in ("img", "source")]
    sources = [attributes.get("src") or attributes["srcset"] for attributes in images]
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(set(sources)) == 2  # one for dark, one for light
    alternatives = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert all("2.500 at update 1" in alt and "0.062 at update 40" in alt for alt in alternatives)
    words = " ".join(page.words)
    facts = ("speech & more", "3 clips", "a <source>, MIT", "1.23 M parameters", "1 min 20 s on cpu", "300 MiB")
    results = ("Which one?", "raw <pixels>", "62.5", "50.0 % to 75.0 %, +25.0 points")
    for expected in (*facts, *results, "prefers-color-scheme"):
        assert expected in words, expected


def test_report_without_probes_says_so(tmp_path):
    run = make_run()
    run.probes.clear()
    text = write_report([store(tmp_path / "speech", run)], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "nothing was probed" in text and "<table" not in text


def test_small_gains_are_called_unclear():
    result = make_run().probes[0][1]
    values = result.to_dict()
    values["rows"] = [{**row, "test_stderr": 0.1} for row in values["rows"]]
    close = ProbeResult.from_dict(values)
    assert gain(result).endswith("(standard error 2.8).") and gain(close).endswith("no clear difference.")
