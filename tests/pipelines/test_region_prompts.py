"""`--region` on the command line: prompts name every phrase, the method gets the boxes."""

import json

import pytest

from dittune.errors import ConfigError
from dittune.pipelines.cli import main
from dittune.pipelines.region_prompts import with_regions

LEFT, RIGHT = "0,0,0.5,1: a red circle", "0.5,0,1,1: a blue square"


def test_prompts_name_every_region_once():
    joined = f"{LEFT}; {RIGHT}"
    assert with_regions([], [LEFT, RIGHT]) == (["a red circle and a blue square"], joined)
    assert with_regions([], [LEFT]) == (["a red circle"], LEFT)
    prompts = ["A red circle and a green ring", "a blue square, a red circle"]
    assert with_regions(prompts, [LEFT, RIGHT])[0] == [
        "A red circle and a green ring and a blue square",
        "a blue square, a red circle",
    ]


@pytest.mark.parametrize("wrong", ["a red circle", f"{LEFT}; {RIGHT}", " "])
def test_wrong_regions_are_refused(wrong):
    with pytest.raises(ConfigError, match="x0,y0,x1,y1"):
        with_regions([], [wrong])


def test_the_command_resolves_them(capsys):
    with pytest.raises(SystemExit) as done:
        main(
            ["generate", "--region", LEFT, "--region", RIGHT, "--dry-run", "--json", "--seed", "1"]
        )
    assert done.value.code == 0
    config = json.loads(capsys.readouterr().out)
    assert config["prompts"] == ["a red circle and a blue square"]
    assert config["methods"]["regions"]["regions"] == f"{LEFT}; {RIGHT}"
