"""The supervised multi-task models, one a file, and the registry that names them.

All take ids (B, F) and numbers (B, N) and return predictions (B, T) in (0, 1). With an encoder of the session
(`layers.session`) before it, a model takes windows, (B, W, F) and (B, W, N).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from layers import ESMM
from layers.session import SessionModel
from slmodels.aitm import AITM
from slmodels.metaheac import MetaHeac
from slmodels.mmoe import MMoE
from slmodels.omoe import OMoE
from slmodels.ple import PLE
from slmodels.sharedbottom import SharedBottom
from slmodels.singletask import SingleTask

MODELS: dict[str, type[nn.Module]] = {
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
WITH_EXPERTS = ("omoe", "mmoe", "ple", "metaheac")


def build(name: str, categorical_field_dims: Sequence[int], numerical_num: int, embed_dim: int,
          bottom_mlp_dims: Sequence[int], tower_mlp_dims: Sequence[int], task_num: int, expert_num: int,
          dropout: float, encoder: str = "none", window: int = 10) -> nn.Module:
    """Build a model by its name, with an encoder of `layers.session` over windows, or none.

    Raises ValueError, with the list, for a name that is not in `MODELS`; and for metaheac with an encoder.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model '{name}': one of {', '.join(MODELS)}")
    sizes = (embed_dim, bottom_mlp_dims, tower_mlp_dims, task_num)
    more = (expert_num, dropout) if name in WITH_EXPERTS else (dropout,)

    def make(numbers: int) -> nn.Module:
        return MODELS[name](categorical_field_dims, numbers, *sizes, *more)

    if encoder == "none":
        return make(numerical_num)
    if name == "metaheac":
        raise ValueError("metaheac trains without an encoder of the session: its inner step is differentiated twice")
    return SessionModel(make, encoder, len(categorical_field_dims), numerical_num, embed_dim, window)
