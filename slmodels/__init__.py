"""The supervised multi-task models, one a file, and the registry of their names.

All take ids (B, F) and numbers (B, N) and return predictions (B, T) in (0, 1). Behind an encoder of the session
(`layers.sequence`) they take windows, (B, W, F) and (B, W, N). A new model is one file with a `MultiTaskModel` and one
line in `MODELS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from layers import ESMM, MultiTaskModel
from layers.sequence import SequenceModel
from slmodels.aitm import AITM
from slmodels.metaheac import MetaHeac
from slmodels.mmoe import MMoE
from slmodels.omoe import OMoE
from slmodels.ple import PLE
from slmodels.sharedbottom import SharedBottom
from slmodels.singletask import SingleTask

MODELS: dict[str, type[MultiTaskModel]] = {
    "singletask": SingleTask,
    "sharedbottom": SharedBottom,
    "esmm": ESMM,
    "omoe": OMoE,
    "mmoe": MMoE,
    "ple": PLE,
    "aitm": AITM,
    "metaheac": MetaHeac,
}
__all__ = ["AITM", "ESMM", "MODELS", "PLE", "MMoE", "MetaHeac", "OMoE", "SharedBottom", "SingleTask", "build"]


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
    return SequenceModel(factory, encoder, len(categorical_field_dims), numerical_num, embed_dim, window)
