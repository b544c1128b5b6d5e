"""The page of charts: complete, without anything that runs, and with the numbers of the records."""

import re
from xml.etree import ElementTree

from swacompile.tuning.chart import page
from swacompile.tuning.database import Choice, Level
from swacompile.tuning.record import Origin, Status
from swacompile.tuning.tune import Tuned
from tests.tuning.records import config, record


def test_page():
    default = record(100.0, origin=Origin.DEFAULT)
    chosen = record(50.0, of=config(keys=48))
    broken = record(status=Status.CRASHED, rung=0, of=config(keys=24), message="<script>alert(1)</script>")
    screened = [record(110.0, rung=0, origin=Origin.DEFAULT), broken, record(55.0, rung=0, of=config(keys=48))]
    choice = Choice(workload=chosen.workload, config=chosen.config, level=Level.EXACT, record=chosen)
    tuned = Tuned(
        workload=chosen.workload,
        choice=choice,
        default=default,
        records=(*screened, default, chosen),
        interrupted=False,
    )
    text = page([tuned])
    assert "<script" not in text and "2.00 times" in text
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]
    assert len(drawings) == 2
    search = drawings[1]
    assert len(search.findall("circle")) == 2 and len(search.findall("rect")) == 1
    points = search.find("polyline").attrib["points"].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(points) == 2 and heights[1] > heights[0], "the best time falls, and the axis points up"
    assert page([]).endswith("</html>\n")


def test_nothing_measured():
    broken = record(status=Status.HUNG, rung=0)
    choice = Choice(workload=broken.workload, config=config(), level=Level.DEFAULT, record=None)
    tuned = Tuned(workload=broken.workload, choice=choice, default=None, records=(broken,), interrupted=False)
    assert "Nothing was measured successfully" in page([tuned])
