"""`--region` on the command line: prompts name every phrase, the method gets the boxes."""

import json

import pytest

from dittune.errors import ConfigError
from dittune.pipelines.cli import main
from dittune.pipelines.region_prompts import joined, naming

LEFT, RIGHT = "0,0,0.5,1: a red circle", "0.5,0,1,1: a blue square"


def test_prompts_name_every_region_once():
    assert joined([LEFT, RIGHT]) == f"{LEFT}; {RIGHT}" and joined([LEFT]) == LEFT
    assert naming([], [LEFT, RIGHT]) == ["a red circle and a blue square"]
    assert naming([], [LEFT]) == ["a red circle"]
    prompts = ["A red circle and a green ring", "a blue square, a red circle"]
    assert naming(prompts, [LEFT, RIGHT]) == [
        "A red circle and a green ring and a blue square",
        "a blue square, a red circle",
    ]


@pytest.mark.parametrize("wrong", ["a red circle", f"{LEFT}; {RIGHT}", " "])
def test_wrong_regions_are_refused(wrong):
    with pytest.raises(ConfigError, match="x0,y0,x1,y1"):
        joined([wrong])


def test_the_command_resolves_them(capsys):
    with pytest.raises(SystemExit) as done:
        main(
            ["generate", "--region", LEFT, "--region", RIGHT, "--dry-run", "--json", "--seed", "1"]
        )
    assert done.value.code == 0
    config = json.loads(capsys.readouterr().out)
    assert config["prompts"] == ["a red circle and a blue square"]
    assert config["methods"]["regions"]["regions"] == f"{LEFT}; {RIGHT}"


def test_prompts_of_a_file_are_kept(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("prompts: [a red circle on a white background, a ring]\n")
    with pytest.raises(SystemExit) as done:
        main(["generate", "--config", str(path), "--region", RIGHT, "--dry-run", "--json"])
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == [
        "a red circle on a white background and a blue square",
        "a ring and a blue square",
    ]
