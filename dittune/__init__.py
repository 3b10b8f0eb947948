"""dittune: attention control for diffusion transformers.

with dittune.attach(pipe, dittune.SoftPAG(heads="2:1,3:0", u=0.5, scale=3.0)):
    image = pipe("a red circle and a blue square").images[0]
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dittune.attach import Attachment, attach
from dittune.errors import DittuneError
from dittune.heads import HeadSet
from dittune.method import Method

__version__ = "0.1.0"

# Public name -> module it comes from, imported at first use so that `import dittune` stays light.
_LAZY = {
    "Pipeline": "dittune.pipelines.pipeline",
    "checkpoint": "dittune.checkpoints",
    "available_checkpoints": "dittune.checkpoints",
    "available_methods": "dittune.methods",
    "load_method": "dittune.methods",
    "available_models": "dittune.models",
    "AStar": "dittune.methods.a_star",
    "AttendAndExcite": "dittune.methods.attend_and_excite",
    "AttentionRegulation": "dittune.methods.attention_regulation",
    "Clear": "dittune.methods.clear",
    "Conform": "dittune.methods.conform",
    "Isolation": "dittune.methods.isolation",
    "Radial": "dittune.methods.radial",
    "Regions": "dittune.methods.regions",
    "Reweight": "dittune.methods.reweight",
    "SharedAttention": "dittune.methods.shared_attention",
    "Natten": "dittune.methods.natten",
    "ScaleDiT": "dittune.methods.scale_dit",
    "SoftPAG": "dittune.methods.softpag",
    "SoftPAGGuidance": "dittune.guider",
    "SparseD": "dittune.methods.sparsed",
    "Vmoba": "dittune.methods.vmoba",
}
__all__ = [
    "AStar",
    "Attachment",
    "AttendAndExcite",
    "AttentionRegulation",
    "Clear",
    "Conform",
    "DittuneError",
    "HeadSet",
    "Isolation",
    "Method",
    "Natten",
    "Pipeline",
    "Radial",
    "Regions",
    "Reweight",
    "ScaleDiT",
    "SharedAttention",
    "SoftPAG",
    "SoftPAGGuidance",
    "SparseD",
    "Vmoba",
    "__version__",
    "attach",
    "available_checkpoints",
    "available_methods",
    "available_models",
    "checkpoint",
    "load_method",
]

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers
    from dittune.checkpoints import available_checkpoints, checkpoint
    from dittune.guider import SoftPAGGuidance
    from dittune.methods import available_methods, load_method
    from dittune.methods.a_star import AStar
    from dittune.methods.attend_and_excite import AttendAndExcite
    from dittune.methods.attention_regulation import AttentionRegulation
    from dittune.methods.clear import Clear
    from dittune.methods.conform import Conform
    from dittune.methods.isolation import Isolation
    from dittune.methods.natten import Natten
    from dittune.methods.radial import Radial
    from dittune.methods.regions import Regions
    from dittune.methods.reweight import Reweight
    from dittune.methods.scale_dit import ScaleDiT
    from dittune.methods.shared_attention import SharedAttention
    from dittune.methods.softpag import SoftPAG
    from dittune.methods.sparsed import SparseD
    from dittune.methods.vmoba import Vmoba
    from dittune.models import available_models
    from dittune.pipelines.pipeline import Pipeline
else:

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'dittune' has no attribute {name!r}")
        return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


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
        spec = ModuleSpec(f"{__name__}.{name}", loader=None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        globals()[name] = module


_bootstrap_source_checkout()
