"""Makes transformers' Auto classes know this package's, without loading either before one is used.

transformers loads its modelling code when it is first asked for, and takes longer over that than over everything else
that an import of this package does. So nothing is registered until a class of this package is touched, or one of the
Auto classes is asked to load something.
"""

import sys
from functools import wraps
from importlib.abc import MetaPathFinder
from threading import RLock


# The classes through which every loading begins, by the modules that define them.
ENTRANCES = {
    "transformers.models.auto.configuration_auto": ("AutoConfig", ("from_pretrained", "for_model")),
    "transformers.models.auto.auto_factory": ("_BaseAutoModelClass", ("from_config",)),
    "transformers.models.auto.video_processing_auto": ("AutoVideoProcessor", ("from_pretrained",)),
}
_lock = RLock()  # several threads may be the first
_done = False


def register() -> None:
    """Register our classes with AutoConfig, AutoModel, AutoModelForVideoClassification and AutoVideoProcessor."""
    global _done
    if _done:
        return
    with _lock:
        if not _done:
            _register()
            _done = True


def _register() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor  # at the top it needs torchvision

    from .model.configuration_inti_clip import InTIClipVisionConfig
    from .model.modeling_inti_clip import InTIClipForVideoClassification, InTIClipVisionModel
    from .model.video_processing_inti_clip import InTIClipVideoProcessor

    AutoConfig.register(InTIClipVisionConfig.model_type, InTIClipVisionConfig, exist_ok=True)  # as after an interrupt
    AutoModel.register(InTIClipVisionConfig, InTIClipVisionModel, exist_ok=True)
    AutoModelForVideoClassification.register(InTIClipVisionConfig, InTIClipForVideoClassification, exist_ok=True)
    AutoVideoProcessor.register(InTIClipVisionConfig, InTIClipVideoProcessor, exist_ok=True)


def _register_first(auto_class: type, method: str) -> None:
    """Let `auto_class.method`, a class or static method, register our classes before it does its work."""
    original = vars(auto_class)[method]
    kind, function = type(original), original.__func__

    @wraps(function)
    def with_ours(*args, **kwargs):
        register()
        return function(*args, **kwargs)

    setattr(auto_class, method, kind(with_ours))


class _AutoFinder(MetaPathFinder):
    """Finds the modules of `ENTRANCES` as ever, and sees to their classes when they are loaded."""

    def find_spec(self, name, path=None, target=None):
        if name not in ENTRANCES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_prepare(module):
            execute(module)
            _prepare(module)

        spec.loader.exec_module = execute_and_prepare
        return spec


def _prepare(module) -> None:
    name, methods = ENTRANCES[module.__name__]
    auto_class = getattr(module, name, None)
    for method in methods:
        if auto_class is not None and method in vars(auto_class):
            _register_first(auto_class, method)


def register_when_used() -> None:
    """To be called once, when the package is imported."""
    for name in ENTRANCES:
        if name in sys.modules:
            _prepare(sys.modules[name])
    sys.meta_path.insert(0, _AutoFinder())
