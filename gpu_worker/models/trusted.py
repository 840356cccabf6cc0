"""Loading an exported folder again, without running the code that is in it.

The modeling file of a folder may have been changed by anybody. transformers prefers classes that are registered with it
to those of a folder, so we register what this version renders, and `trust_remote_code` stays False.
"""

import sys
from functools import cache
from types import ModuleType

import transformers

from gpu_worker.models.exported import MODELINGS, class_names, module_name, render_modeling
from gpu_worker.models.families import PRUNED


@cache
def register_pruned_classes() -> None:
    """Teach the auto classes of transformers the model types of exported folders, with this version's own code."""
    for model_type in MODELINGS:
        module = _built(model_type)
        names = class_names(model_type)
        config = getattr(module, names["AutoConfig"])
        transformers.AutoConfig.register(PRUNED + model_type, config)
        for auto in ("AutoModel", "AutoModelForCausalLM"):
            getattr(transformers, auto).register(config, getattr(module, names[auto]))


def _built(model_type: str) -> ModuleType:
    """The module that the rendered modeling file is."""
    name = f"{__package__}.{module_name(model_type)}"
    module = ModuleType(name)
    # The decorators of its classes look their module up.
    sys.modules[name] = module
    exec(compile(render_modeling(model_type), f"<{name}>", "exec"), module.__dict__)
    return module
