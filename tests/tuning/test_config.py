"""Config: one text everywhere."""

import pytest

from swacompile.errors import ArgumentError
from swacompile.tuning.config import Config


def test_text_both_ways():
    config = Config.of("cpu_tiles", {"queries": 48, "pingpong": True})
    assert str(config) == "cpu_tiles:queries=48,pingpong=1"
    assert Config.parse(str(config)) == config
    assert {config: 1}[Config.parse(str(config))] == 1
    assert config.replaced({"queries": 64}).as_dict() == {"queries": 64, "pingpong": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cpu_tiles",
        "cpu_tiles:",
        "a:b=-1",
        "a:b=1,b=2",
        "a:b=1;c=2",
        "a:b=__import__",
        "a:b=1,",
        " a:b=1",
        "a:b=1\n",
    ],
)
def test_refused_text(text):
    with pytest.raises(ArgumentError, match="not a config"):
        Config.parse(text)
