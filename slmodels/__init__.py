"""The supervised multi-task models, one a file, and the registry of their names.

All take ids (B, F) and numbers (B, N) and return predictions (B, T) in (0, 1). Behind an encoder of the session
(`layers.sequence`) they take windows, (B, W, F) and (B, W, N). A new model is one file with a `MultiTaskModel` and one
line in `MODELS`. The names alone, which settings need, import no torch.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layers.base import MultiTaskModel


class _Classes(Mapping[str, "type[MultiTaskModel]"]):
    """Classes by their names; each is imported when it is looked up.

    Args:
        places: of each class, `module:class`.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> type[MultiTaskModel]:
        cls: type[MultiTaskModel] = pkgutil.resolve_name(self.places[name])
        return cls

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


MODELS = _Classes({
    "singletask": "slmodels.singletask:SingleTask",
    "sharedbottom": "slmodels.sharedbottom:SharedBottom",
    "esmm": "layers.esmm:ESMM",
    "omoe": "slmodels.omoe:OMoE",
    "mmoe": "slmodels.mmoe:MMoE",
    "ple": "slmodels.ple:PLE",
    "aitm": "slmodels.aitm:AITM",
    "metaheac": "slmodels.metaheac:MetaHeac",
})
ENCODERS = ("none", "gru", "attention")  # of layers.sequence
BOTTOM_MLP_DIMS: tuple[int, ...] = (512, 256)  # the documented widths of all models and critics
TOWER_MLP_DIMS: tuple[int, ...] = (128, 64)


def __getattr__(name: str) -> Any:
    """A model's class, for `from slmodels import PLE`."""
    for place in MODELS.places.values():
        if place.endswith(f":{name}"):
            return pkgutil.resolve_name(place)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build(name: str, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
          bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], task_num: int, expert_num: int,
          dropout: float, encoder: str = "none", window: int = 10, calibrator_weight: float = 0.0,
          given: Sequence[int] | None = None) -> MultiTaskModel:
    """Build a model by its name, with an encoder of `layers.sequence` over windows, or none.

    A class takes `expert_num`, `calibrator_weight` and `given` (see `layers.ESMM`) if they are parameters of its own.

    Raises ValueError, with the list, for a name that is not in `MODELS`; for an encoder before a model that takes none;
    and for a calibrator of a model that has none.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model '{name}': one of {', '.join(MODELS)}")
    cls = MODELS[name]
    parameters = inspect.signature(cls).parameters
    optional = {"expert_num": expert_num, "calibrator_weight": calibrator_weight, "given": given}
    extra: dict[str, Any] = {key: value for key, value in optional.items() if key in parameters}
    if calibrator_weight and "calibrator_weight" not in extra:
        raise ValueError(f"--calibrator_weight: only aitm has a calibrator, not {name}")

    def factory(numerical_num: int) -> MultiTaskModel:
        return cls(categorical_field_dims, numerical_num, embed_dim, bottom_mlp_dims, tower_mlp_dims, task_num,
                   dropout=dropout, **extra)

    if encoder == "none":
        return factory(numerical_num)
    from layers.sequence import SequenceModel

    return SequenceModel(factory, encoder, len(categorical_field_dims), numerical_num, embed_dim, window)
