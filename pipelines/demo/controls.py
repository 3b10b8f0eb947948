"""Controls of the methods, made of their dataclasses: name, type, default and docstring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

import dittune
from dittune.config import preset, resolve
from dittune.pipelines.settings import Setting, settings_of

NONE = "none"
YES_NO = {"auto": None, "yes": True, "no": False}


def control(setting: Setting, value: Any) -> gr.components.Component:
    """One control for a field, of the kind its type asks for."""
    label = {"label": setting.name, "info": setting.help, "interactive": True}
    if setting.choices:
        shown = [(choice or "(the model's own)", choice) for choice in setting.choices]
        return gr.Dropdown(shown, value=value, **label)
    if setting.type == "bool":
        return gr.Checkbox(value, **label)
    if setting.type == "bool | None":
        return gr.Radio(list(YES_NO), value=shown_value(setting, value), **label)
    if setting.name in ("start", "stop"):
        return gr.Slider(0, 1, value, step=0.01, **label)
    if setting.type in ("int", "int | None"):
        return gr.Number(value, precision=0, placeholder="none", **label)
    if setting.type == "float":
        return gr.Number(value, step=0.1, **label)
    return gr.Textbox(value, max_lines=3, **label)


def shown_value(setting: Setting, value: Any) -> Any:
    """What a control shows for a setting."""
    if setting.type == "bool | None":
        return next(text for text, meant in YES_NO.items() if meant is value)
    return value


def meant_value(setting: Setting, value: Any) -> Any:
    """The setting that a control shows."""
    if setting.type == "bool | None":
        return YES_NO[value]
    if setting.type == "str":
        return value or ""
    return value


class MethodPicker:
    """A choice of methods, and the controls of the one that is chosen.

    Args:
        model: whose preset gives the first values.
        names: of the methods.
        place: where the choice goes; None is above the controls.
        hidden: settings the page gives itself. Those that name a file of the server have no
            control either.
        optional: whether there is `none` to choose.
    """

    def __init__(
        self,
        model: str,
        names: Sequence[str],
        value: str,
        place: gr.Column | None = None,
        hidden: Sequence[str] = (),
        optional: bool = True,
    ):
        self.names, self.hidden = list(names), hidden
        choices = [NONE] * optional + self.names
        with place or gr.Column():
            self.choice = gr.Dropdown(choices, value=value, label="Method", filterable=True)
        self.groups, self.fields, self.components = [], [], []
        with gr.Accordion("Settings of the method", open=False):
            for name in self.names:
                preset = defaults(model, name)
                cls = dittune.load_method(name)
                with gr.Column(visible=name == value) as group:
                    gr.Markdown(f"**{name}**: {cls.__doc__.splitlines()[0]}")
                    for setting in settings_of(cls):
                        if setting.name not in hidden and not setting.is_path:
                            self.fields.append((name, setting))
                            made = control(setting, preset[setting.name])
                            self.components.append(made)
                self.groups.append(group)
        self.choice.change(
            self.show, self.choice, self.groups, queue=False, api_visibility="private"
        )

    def show(self, chosen: str) -> list:
        """The controls of one method."""
        return [gr.update(visible=name == chosen) for name in self.names]

    def recommend(self, model: str) -> list:
        """The recommended values of another model."""
        presets = {name: defaults(model, name) for name in self.names}
        return [shown_value(s, presets[name][s.name]) for name, s in self.fields]

    def methods(self, chosen: str, values: Sequence[Any]) -> dict[str, dict[str, Any]]:
        """The `methods` of a configuration."""
        if chosen == NONE:
            return {}
        given = zip(self.fields, values, strict=True)
        return {chosen: {s.name: meant_value(s, v) for (name, s), v in given if name == chosen}}


def defaults(model: str, method: str) -> dict[str, Any]:
    """Settings of a method as the preset of a model recommends them."""
    return resolve({"model": model}, [method]).methods[method]


def method_of(model: str) -> str | None:
    """The first method that the preset of a model has settings for."""
    return next(iter(preset(model).get("methods") or {}), None)
