"""The building blocks: embeddings and perceptrons (`layers`), the critics (`critic`), the actor (`esmm`), and what lets
any of them see the session (`session`)."""

from layers.critic import Critic, CriticNeg
from layers.esmm import ESMM
from layers.layers import EmbeddingLayer, Experts, FieldInput, Fields, Gate, MultiLayerPerceptron, MultiTaskModel

__all__ = ["ESMM", "Critic", "CriticNeg", "EmbeddingLayer", "Experts", "FieldInput", "Fields", "Gate",
           "MultiLayerPerceptron", "MultiTaskModel"]
