"""Results on disk, one CSV line each, written at once: what a killed command had is kept."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dittune.errors import ConfigError

_READ = {"bool": lambda text: text == "True", "int": int, "float": float, "str": str}


class RowLog:
    """A CSV file of frozen dataclasses whose fields are bool, int, float or str.

    Args:
        path: made with the first row.
        row_type: the dataclass.
    """

    def __init__(self, path: Path, row_type: type):
        self.path, self.row_type = path, row_type
        self.types = {f.name: _READ[f.type] for f in fields(row_type)}

    def read(self) -> list[Any]:
        """All rows; a last line that was cut off by a kill is left out, and removed from the file.

        Raises:
            ConfigError: the file has other columns: something else wrote it.
        """
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with self.path.open("rb+") as file:
                file.truncate(len(whole))
        lines = list(csv.reader(io.StringIO(whole.decode("utf-8"), newline="")))
        if lines and lines[0] != list(self.types):
            raise ConfigError(
                f"{self.path} has columns {', '.join(lines[0])}, expected {', '.join(self.types)}; "
                "it was written by another version: move it away"
            )
        return [
            self.row_type(**{k: self.types[k](v) for k, v in zip(self.types, line, strict=True)})
            for line in lines[1:]
        ]

    def append(self, rows: Iterable[Any]) -> None:
        """Write rows through to the disk."""
        new = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.types), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(vars(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())


def claim(log: Path, settings: Mapping[str, Any]) -> None:
    """Write beside a log what its rows were made with, so that rows made otherwise never join them.

    Args:
        log: its settings are in the JSON file of the same name; the folder is made.
        settings: by name, written as JSON. Names that were not there before are added.

    Raises:
        ConfigError: a setting was another one before, or the file holds something else.
    """
    path = log.with_suffix(".json")
    there = log.exists() and path.exists()  # without rows nothing is held to its settings
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8"))) if there else {}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} does not hold the settings of {log}; move both away") from error
    given = json.loads(json.dumps(settings))
    changed = [name for name in given if name in known and known[name] != given[name]]
    if changed:
        raise ConfigError(
            f"{log} was made with other settings ({', '.join(changed)}); choose another --out, or "
            f"remove it together with {path.name}"
        )
    log.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known | given, indent=2), encoding="utf-8")
