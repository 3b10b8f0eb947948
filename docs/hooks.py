"""What mkdocs cannot do by itself: pictures of the gallery, and tables of a method's settings.

A line `<!-- settings: NAME -->` becomes a table of the fields of that method, with the types and
defaults of its dataclass and the words of its docstring, so that no page can say anything else.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"^<!-- settings: (\w+) -->$", re.MULTILINE)


def on_startup(**_):
    """The modules laid out as in a wheel: the API pages read files and import nothing."""
    package = ROOT / "build" / "docs" / "dittune"
    for source, target in ((ROOT / "dittune", package), (ROOT / "pipelines", package / "pipelines"),
                           (ROOT / "kernels", package / "kernels")):  # fmt: skip
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in source.iterdir():
            (target / path.name).symlink_to(path)
        if not (source / "__init__.py").exists():
            (target / "__init__.py").touch()


def on_files(files, config):
    """Pictures and cards are shown from where they lie."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / "samples" / "gallery").iterdir()):
        files.append(File.generated(config, f"gallery/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    return MARK.sub(lambda match: settings_table(match[1]), markdown)


def settings_table(name: str) -> str:
    """The settings of a method as a Markdown table."""
    import dittune
    from dittune.pipelines.settings import settings_of

    rows = ["| setting | type | default | what it is |", "| --- | --- | --- | --- |"]
    for setting in settings_of(dittune.load_method(name)):
        kind = setting.type.replace(" | ", " or ")
        cells = (f"`{setting.name}`", f"`{kind}`", f"`{setting.default!r}`", setting.help)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
