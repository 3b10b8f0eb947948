"""Head sets: written, read, checked."""

import pytest

from dittune import HeadSet
from dittune.call import Site
from dittune.errors import ConfigError, SelectionError
from dittune.heads import parse_layers

SITES = [Site(i, "joint", f"blocks.{i}", 4) for i in range(3)]


def test_round_trip_order_and_duplicates():
    heads = HeadSet(" 2:1, 0:3 ,2:1,1:*")
    assert str(heads) == "2:1,0:3,1:*" and len(heads) == 3
    assert str(HeadSet(str(heads))) == str(heads)
    assert str(HeadSet([(2, 1), (0, 3)])) == "2:1,0:3"
    assert len(HeadSet("")) == 0 and HeadSet("").select(SITES) == []


def test_selection():
    heads = HeadSet("2:1,2:0,1:*")
    assert heads.select(SITES) == [SITES[1], SITES[2]]
    assert heads.at(SITES[1]) == [0, 1, 2, 3] and heads.at(SITES[2]) == [0, 1]


@pytest.mark.parametrize(
    "text", ["2", "2:", ":1", "a:b", "2:1;3:0", "-1:0", "1:2:3", "2.0:1", "²:1", "*:1"]
)
def test_unreadable(text):
    with pytest.raises(ConfigError, match="layer:head"):
        HeadSet(text)


@pytest.mark.parametrize(("text", "match"), [("3:0", "layers 0 to 2"), ("1:4", "heads 0 to 3")])
def test_out_of_range(text, match):
    with pytest.raises(SelectionError, match=match):
        HeadSet(text).select(SITES)


def test_layers_as_text():
    assert parse_layers("3, 5-7,5") == (3, 5, 6, 7)
    assert parse_layers("") == ()
    for wrong in ("3:1", "a", "3,,4", "-2", "7-5"):
        with pytest.raises(ConfigError, match=r"layers are written like '3,5-7'"):
            parse_layers(wrong)
