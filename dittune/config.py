"""Run configurations: YAML, presets and `METHOD.FIELD=VALUE` become checked settings and methods.

Merged in this order: defaults, the model's preset, a file, overrides. OmegaConf checks each part
against the dataclass it is meant for; classes of dittune never see a configuration object.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from dittune.errors import ConfigError
from dittune.method import Method
from dittune.methods import load_method


@dataclass
class RunConfig:
    """Everything that decides a picture, but the versions of the software.

    `methods` maps a label to settings; the label is the method's name unless the settings hold
    `method: NAME`, so that one method can be used twice. None means the pipeline's own default.
    `num_images` counts videos too; `frames` and `fps`, of the files, are of videos only.
    """

    model: str = "shapes-sd3"
    prompts: list[str] = field(default_factory=list)
    negative_prompt: str = ""
    seed: int | None = None
    num_images: int = 1
    steps: int | None = None
    guidance_scale: float | None = None
    size: str = ""
    frames: int | None = None
    fps: int = 16
    device: str = "auto"
    dtype: str = "auto"
    methods: dict[str, Any] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """YAML without base-60 numbers (`2:1` would be 121), with floats such as `1e-3`, and in which a
    key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag[-4:] not in (":int", "loat")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


class _Dumper(yaml.SafeDumper):
    """Quotes also what only `_Loader` would take for a number."""


_Dumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_Loader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file cannot be read, or is no YAML mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except Exception as error:  # constructors raise what they like where a tag does not fit
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot read configuration {path}: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping, holds {type(content).__name__}")
    return content


def write_yaml(config: RunConfig) -> str:
    """The configuration as YAML that `read_yaml` reads back."""
    values = dataclasses.asdict(config)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def preset_files() -> dict[str, Path]:
    """The file of each preset, by model."""
    spec = importlib.util.find_spec("dittune.samples")
    folder = Path(next(iter(spec.submodule_search_locations))) / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def preset(model: str) -> dict[str, Any]:
    """Recommended settings of a model; its `methods` are defaults for methods, it selects none."""
    found = preset_files()
    return read_yaml(found[model]) if model in found else {}


def resolve(
    content: Mapping[str, Any],
    methods: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Merge and check a configuration.

    Args:
        content: settings by the names of `RunConfig`, from a file, a record and flags. None for
            one that may be None is a choice, which a preset does not override.
        methods: further methods, each `NAME` or `LABEL=NAME`.
        overrides: settings of methods, each `LABEL.FIELD=VALUE`.

    Raises:
        ConfigError: an unknown key or method, or a value of the wrong type.
    """
    required = {f.name for f in dataclasses.fields(RunConfig) if "None" not in f.type}
    content = {k: v for k, v in content.items() if v is not None or k not in required}
    recommended = preset(str(content.get("model", RunConfig.model)))
    defaults = recommended.pop("methods", {})
    config = RunConfig(**_checked(RunConfig, {**recommended, **content}, "configuration"))
    wanted = {}
    for label, settings in config.methods.items():
        if not isinstance(settings or {}, dict):
            raise ConfigError(f"method {label}: expected settings by name, got {settings!r}")
        wanted[label] = dict(settings or {})
    for text in methods:
        label, _, name = text.rpartition("=")
        wanted.setdefault(label or name, {"method": name} if label else {})
    for text in overrides:
        label, key, value = _split_override(text)
        if label not in wanted:
            raise ConfigError(f"--set {text}: method {label!r} is not in use; add --method {label}")
        wanted[label][key] = value
    config.methods = {
        label: _method_settings(label, settings, defaults) for label, settings in wanted.items()
    }
    build_methods(config)
    return config


def build_methods(config: RunConfig) -> dict[str, Method]:
    """The methods of a configuration, by label."""
    built = {}
    for label, settings in config.methods.items():
        settings = dict(settings)
        built[label] = load_method(settings.pop("method", label))(**settings)
    return built


def _method_settings(label: str, settings: dict, defaults: Mapping[str, Any]) -> dict[str, Any]:
    name = settings.pop("method", label)
    if not isinstance(name, str):
        raise ConfigError(f"method {label}: method is the name of one, got {name!r}")
    cls = load_method(name)
    merged = _checked(cls, {**defaults.get(name, {}), **settings}, f"method {label}")
    return {"method": name, **merged} if name != label else merged


def _split_override(text: str) -> tuple[str, str, str]:
    path, equals, value = text.partition("=")
    label, dot, key = path.strip().partition(".")
    if not (equals and dot and label and key):
        raise ConfigError(f"--set is written METHOD.FIELD=VALUE, got {text!r}")
    return label, key, value


def _checked(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All fields of a dataclass, with `values` converted to their types."""
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise ConfigError(f"{where} has no setting {key!r}; {hint}")
    checked = OmegaConf.structured(cls)
    OmegaConf.set_readonly(checked, False)
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if (
            isinstance(value, str)
            and "None" in types[key]
            and value.lower() in ("none", "null", "")
        ):
            value = None
        try:
            is_text = types[key] == "str"
            if isinstance(value, str) and not is_text and ("${" in value or value == "???"):
                raise ValidationError  # OmegaConf would look into it later, or take it for missing
            OmegaConf.update(checked, key, _escaped(value), merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}: {key} is of type {types[key]}, got {value!r}") from error
        except UnicodeEncodeError as error:
            raise ConfigError(f"{where}: {key} is no Unicode text: {value!r}") from error
    return OmegaConf.to_container(checked, resolve=True)


def _escaped(value: Any) -> Any:
    """Keep `${...}` in prompts literal: nothing is interpolated."""
    if isinstance(value, str):
        value.encode()  # fails for surrogates, which no tokenizer, file or terminal takes
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + "\\${", value)
    if isinstance(value, (list, tuple)):
        return [_escaped(item) for item in value]
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return value
