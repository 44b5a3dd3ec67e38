"""Offline RL: the replay buffer and the agents, from the general one to the one that only trains critics."""

from agents.DDPG_ESMM import DDPG_ESMM
from agents.DDPG_ESMM_BC import DDPG_ESMM_BC
from agents.DDPG_ESMM_multiweight import DDPG_ESMM_multiweight
from agents.ReplayBuffer import ReplayBuffer
from agents.TD3BC_ESMM import TD3BC_ESMM

AGENTS: dict[str, type[DDPG_ESMM]] = {"bc": DDPG_ESMM_BC, "td3bc": TD3BC_ESMM, "multiweight": DDPG_ESMM_multiweight,
                                      "ddpg": DDPG_ESMM}

__all__ = ["AGENTS", "DDPG_ESMM", "DDPG_ESMM_BC", "TD3BC_ESMM", "DDPG_ESMM_multiweight", "ReplayBuffer"]
