"""Every structure that is recognised."""

from milkernels.integrations import abmil, clam, dsmil, others, scores

STRUCTURES = scores.STRUCTURES + abmil.STRUCTURES + clam.STRUCTURES + dsmil.STRUCTURES + others.STRUCTURES
