"""Offline RL: the replay buffer and the agents, from the general one to the one that only trains critics."""

from agents.DDPG_ESMM import DDPG_ESMM
from agents.DDPG_ESMM_BC import DDPG_ESMM_BC
from agents.DDPG_ESMM_multiweight import DDPG_ESMM_multiweight
from agents.ReplayBuffer import ReplayBuffer

AGENTS: dict[str, type[DDPG_ESMM]] = {"bc": DDPG_ESMM_BC, "multiweight": DDPG_ESMM_multiweight, "ddpg": DDPG_ESMM}

__all__ = ["AGENTS", "DDPG_ESMM", "DDPG_ESMM_BC", "DDPG_ESMM_multiweight", "ReplayBuffer"]
