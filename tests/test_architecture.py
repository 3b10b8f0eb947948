"""The house rules: import arrows, file sizes, names, and a light `import dittune`."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("dittune", "pipelines", "kernels", "samples")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# What a file may import of dittune, by the folder or file it is.
MAY_IMPORT = {
    "dittune/call.py": set(),
    "dittune/errors.py": set(),
    "dittune/class_swap.py": set(),
    "dittune/run.py": {"call"},
    "dittune/method.py": {"call", "errors", "run"},
    "dittune/heads.py": {"call", "errors"},
    "dittune/scheduler_seam.py": {"class_swap", "errors", "run"},
    "dittune/step_end.py": {"errors", "run"},
    "dittune/perturbation.py": {"call", "kernels"},
    "dittune/together.py": {"call", "errors", "method"},
    "dittune/padded_row.py": {"call"},
    "dittune/uncompiled.py": set(),
    "dittune/local_path.py": set(),
    "dittune/seam.py": {"call", "errors", "method", "padded_row", "run"},
    "dittune/denoiser.py": {
        "call", "class_swap", "errors", "method", "models", "run", "seam", "together",
    },
    "dittune/guider.py": {"methods", "models", "run", "seam"},
    "dittune/attach.py": {
        "class_swap", "denoiser", "errors", "method", "models", "run", "scheduler_seam", "step_end",
    },
    "dittune/words/": {
        "call", "errors", "heads", "method", "run", "scheduler_seam", "uncompiled", "words",
    },
    "dittune/subjects/": {
        "call", "errors", "heads", "local_path", "method", "run", "subjects", "words",
    },
    "dittune/sparse/": {
        "call", "errors", "heads", "kernels", "method", "patterns", "run", "sparse",
    },
    "dittune/methods/": {
        "call", "errors", "heads", "kernels", "method", "patterns", "perturbation", "run",
        "scheduler_seam", "sparse", "subjects", "uncompiled", "words",
    },
    "dittune/models/": {"call", "errors"},
    "dittune/patterns/": {"errors", "patterns"},
    "kernels/": {"kernels"},
}  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_arrows(path):
    name = path.relative_to(ROOT).as_posix()
    inside = {m.split(".")[1] for m in imports(path) if m.startswith("dittune.")}
    if not name.startswith("pipelines/"):  # only there may public names come from the package
        assert "dittune" not in imports(path), f"{name} imports from the package itself"
    for prefix, allowed in MAY_IMPORT.items():
        if name.startswith(prefix):
            assert inside <= allowed, f"{name} imports {inside - allowed}"
    if not name.startswith(("pipelines/", "samples/")) and name != "dittune/__init__.py":
        assert "pipelines" not in inside
    assert not any(m.split(".")[0] in ("kernels", "pipelines", "samples") for m in imports(path))


def test_every_core_file_has_a_rule():
    core = {p.name for p in (ROOT / "dittune").glob("*.py")}
    ruled = {Path(name).name for name in MAY_IMPORT if name.endswith(".py")}
    assert core - ruled == {"__init__.py", "config.py", "checkpoints.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_size_and_name(path):
    limit = 400 if "triton" in path.name else 275 if path.name == "world.py" else 250
    assert len(path.read_text().splitlines()) <= limit
    assert path.name not in ("utils.py", "common.py", "helpers.py", "misc.py")


def test_top_level_folders_are_no_packages():
    for folder in ("kernels", "pipelines", "samples"):
        assert not (ROOT / folder / "__init__.py").exists()


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_dittune_is_light():
    loaded = run("import sys, dittune; print(*sys.modules)")
    heavy = ("diffusers", "transformers", "triton", "gradio", "omegaconf", "typer")
    assert not [m for m in loaded if m.split(".")[0] in heavy]
    lazy = ("dittune.methods.", "dittune.models.", "dittune.pipelines.", "dittune.samples.")
    assert not [m for m in loaded if m.startswith(lazy)]


def test_the_name_kernels_is_left_to_the_published_package():
    """With the repository root first on the path, as in a checkout."""
    code = (
        "import sys, importlib.util as u, transformers, diffusers, dittune;"
        "import diffusers.models.attention_dispatch, dittune.kernels.diagonal_columns;"
        "import transformers.integrations;"
        "names = ('kernels', 'pipelines', 'samples');"
        "print(*(n for n in names if getattr(u.find_spec(n), 'origin', None)"
        " and 'site-packages' not in u.find_spec(n).origin));"
        "print(*(n for n in names if n in sys.modules));"
        f"ours = [(n, getattr(m, '__file__', None) or '') for n, m in sys.modules.items()];"
        f"print(*(n for n, f in ours if f.startswith({str(ROOT)!r})"
        " and 'site-packages' not in f))"  # the environment may lie in the checkout
    )
    loaded = run(code)
    assert "dittune.kernels.diagonal_columns.api" in loaded
    assert not [name for name in loaded if not name.startswith(("dittune", "__main__"))], loaded


def test_everything_public_can_be_imported_and_is_listed():
    import dittune

    for name in set(dittune.__all__) - {"__version__"}:
        assert getattr(dittune, name).__name__ == name
    assert {"attach", "Pipeline", "SoftPAG", "HeadSet", "Method", "checkpoint"} <= set(
        dittune.__all__
    )
    assert set(dittune._LAZY) <= set(dittune.__all__) <= set(dir(dittune))
    with pytest.raises(AttributeError, match="no attribute 'SoftPag'"):
        _ = dittune.SoftPag


@pytest.mark.slow
def test_import_time():
    def seconds(what):
        times = []
        for _ in range(3):
            started = time.perf_counter()
            run(f"import {what}")
            times.append(time.perf_counter() - started)
        return min(times)

    assert seconds("dittune") < 1.2 * seconds("torch")
