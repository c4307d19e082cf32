"""What `accelerate` did, in words: what share of a pooling is fused, and what would fuse the rest."""

from dataclasses import dataclass, field
from typing import NamedTuple

THREE_LINES = """where the model has the rows h [N, L] and their scores [N, K], write
        pooled = milkernels.softmax_pool(h, scores)
        bag = pooled.bag[0]  # [K, L]
        weights = milkernels.attention_weights(pooled)  # [N, K], if they are needed
    or take milkernels.nn.AttentionPool, which makes the scores as well"""
EXAMPLE = "accelerate(model, example=...) with the arguments of one call, by which the whole pooling can be found"


class Entry(NamedTuple):
    """A module that was recognised: its name in the model ("" is the model itself), its class, the structure it was
    taken for ("" where it is none that has a name), and what there is to say: why it was left alone, or where it
    returns something else on purpose."""

    name: str
    kind: str
    structure: str
    remark: str
    share: str = ""  # what is fused: scores; scores + softmax; scores + softmax + sum; that + embedding
    next_step: str = ""  # what would fuse more

    def __str__(self) -> str:
        what = f"{self.name or '(the model)'}: {self.kind}" + (self.structure and f" as {self.structure}")
        said = ": ".join(filter(None, (what, self.share and f"{self.share} fused", self.remark)))
        return said + (self.next_step and f"\n    next step: {self.next_step}")


@dataclass
class Report:
    """What `accelerate` did."""

    changed: list[Entry] = field(default_factory=list)
    waiting: list[Entry] = field(default_factory=list)  # parameters not initialised: checked at their first call
    left: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for title, entries in (("changed", self.changed), ("waiting for a first call", self.waiting)):
            lines += [f"{title}: {entry}" for entry in entries]
        lines += [f"left alone: {entry}" for entry in self.left]
        return "\n".join(lines or ["nothing was recognised"])
