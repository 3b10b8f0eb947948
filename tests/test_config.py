"""Configurations: merged in order, checked by type, and literal."""

import pytest

import dittune
from dittune import config
from dittune.errors import ConfigError

AWKWARD = ["a = b, \"c\" ${d} 'e': f", "\\${x} 50%", "null", "2:1", "- dash # no comment"]


@pytest.fixture
def no_preset(monkeypatch):
    monkeypatch.setattr(config, "preset", lambda model: {})


@pytest.mark.usefixtures("no_preset")
def test_round_trip_through_yaml(tmp_path):
    resolved = config.resolve(
        {"prompts": AWKWARD, "negative_prompt": "${none}", "seed": 3},
        ["softpag", "pag=softpag"],
        ["softpag.heads=2:1,3:0", "softpag.u=5e-1", "pag.heads=3:*", "pag.batched=false"],
    )
    assert resolved.prompts == AWKWARD and resolved.negative_prompt == "${none}"
    path = tmp_path / "run.yaml"
    path.write_text(config.write_yaml(resolved))
    assert config.resolve(config.read_yaml(path)) == resolved
    assert config.build_methods(resolved) == {
        "softpag": dittune.SoftPAG(heads="2:1,3:0", u=0.5),
        "pag": dittune.SoftPAG(heads="3:*", batched=False),
    }


@pytest.mark.usefixtures("no_preset")
def test_yaml_is_not_base_60_and_knows_exponents(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 010\nmethods:\n  softpag: {heads: 2:1, scale: 1e-3, u: .5}\n")
    settings = config.resolve(config.read_yaml(path)).methods["softpag"]
    assert (settings["heads"], settings["scale"], settings["u"]) == ("2:1", 1e-3, 0.5)


def test_order_of_merging(monkeypatch):
    recommended = {
        "steps": 9,
        "guidance_scale": 2.0,
        "methods": {"softpag": {"u": 0.2, "scale": 9}},
    }
    monkeypatch.setattr(config, "preset", lambda model: dict(recommended))
    plain = config.resolve({"steps": 7})
    assert (plain.steps, plain.guidance_scale, plain.methods) == (7, 2.0, {})
    used = config.resolve(
        {"methods": {"softpag": {"scale": 8}}}, ["softpag"], ["softpag.start=0.1"]
    )
    settings = used.methods["softpag"]
    assert (settings["u"], settings["scale"], settings["start"]) == (0.2, 8.0, 0.1)


@pytest.mark.parametrize("model", dittune.available_checkpoints())
def test_the_presets_of_the_bundled_models_are_valid_and_select_no_method(model):
    recommended = config.preset(model)
    assert recommended["methods"]
    assert config.resolve({"model": model}).methods == {}
    built = config.build_methods(config.resolve({"model": model}, list(recommended["methods"])))
    assert not any(method.is_neutral for method in built.values())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (({"step": 3},), "no setting 'step'; did you mean 'steps'"),
        (({"steps": "many"},), "steps is of type int"),
        (({"prompts": "one"},), r"prompts is of type list\[str\]"),
        (({"methods": {"softpag": 3}},), "expected settings by name, got 3"),
        (({}, ["sofpag"]), "did you mean 'softpag'"),
        (({}, ["zzz"]), "known: .*softpag"),
        (({}, ["softpag"], ["softpag.us=1"]), "no setting 'us'; did you mean 'u'"),
        (({}, ["softpag"], ["softpag.u=much"]), "u is of type float, got 'much'"),
        (({}, ["softpag"], ["softpag.u=2"]), r"u is in \[0, 1\]"),
        (({}, ["softpag"], ["softpag.u"]), "METHOD.FIELD=VALUE"),
        (({}, [], ["softpag.u=1"]), "add --method softpag"),
    ],
)
def test_mistakes_are_named(arguments, match):
    with pytest.raises(ConfigError, match=match):
        config.resolve(*arguments)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("- a\n- b\n", "must hold a mapping"),
        ("a: [", "cannot read"),
        ("a: 1\nb: {c: 1, c: 2}", "'c' is given twice"),
    ],
)
def test_unreadable_files(tmp_path, text, match):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        config.read_yaml(path)
    with pytest.raises(ConfigError, match="cannot read"):
        config.read_yaml(tmp_path / "none.yaml")
