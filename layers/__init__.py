"""Building blocks: embeddings and perceptrons (`layers`), the parent of the models (`base`), the actor (`esmm`), the
critics (`critic`), encoders of the session (`sequence`), and fast operations (`ops`)."""

from layers.base import MultiTaskModel
from layers.critic import Critic, CriticNeg
from layers.esmm import ESMM
from layers.layers import (
    EmbeddingLayer,
    Experts,
    FeatureEmbedding,
    Gate,
    LazyConcat,
    MultiLayerPerceptron,
    set_embedding_dropout,
    standardize,
)

__all__ = ["ESMM", "Critic", "CriticNeg", "EmbeddingLayer", "Experts", "FeatureEmbedding", "Gate", "LazyConcat",
           "MultiLayerPerceptron", "MultiTaskModel", "set_embedding_dropout", "standardize"]
