"""The building blocks: embeddings and perceptrons (`layers`), the critics (`critic`) and the actor (`esmm`)."""

from layers.critic import Critic, CriticNeg
from layers.esmm import ESMM
from layers.layers import EmbeddingLayer, Experts, FieldInput, Fields, Gate, MultiLayerPerceptron

__all__ = ["ESMM", "Critic", "CriticNeg", "EmbeddingLayer", "Experts", "FieldInput", "Fields", "Gate",
           "MultiLayerPerceptron"]
