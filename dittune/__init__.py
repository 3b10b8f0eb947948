"""dittune."""

import importlib.util
import sys
from pathlib import Path


def _bootstrap_source_checkout() -> None:
    """Make `dittune.pipelines`, `.kernels` and `.samples` importable from a source checkout.

    In a wheel they are ordinary sub-packages. In a checkout they are top-level folders, which must
    not become the import names `kernels` and `pipelines`: a published package is called `kernels`.
    """
    here = Path(__file__).parent
    for name in ("pipelines", "kernels", "samples"):
        folder = here.parent / name
        if (here / name).exists() or not folder.is_dir():
            continue
        spec = importlib.util.spec_from_loader(f"{__name__}.{name}", loader=None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        globals()[name] = module


_bootstrap_source_checkout()
