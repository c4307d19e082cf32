"""Mini-batches of whole bags, up to a number of instances."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from milkernels.arguments import check_count, check_flag

_NARROW = 0.8  # the shortest bag of a bucket over its longest


class BagBatchSampler(Sampler[list[int]]):
    """Batches of whole bags with at most ``max_instances`` rows: the ``batch_sampler`` of a ``DataLoader``.

    Args:
        lengths: of the bags, ``FeatureFolder.lengths`` say.
        max_instances: in a batch; a longer bag is a batch of its own.
        shuffle: bags of about the same length change places in every epoch, and so do batches; every epoch has the same
            number of batches.  False: bags follow each other in their own order.
        seed: of the order, together with the epoch.
        drop_last: leaves out a last batch that another bag would have fitted into, and what is beyond a multiple of the
            number of ranks.
        num_replicas, rank: None asks ``torch.distributed``, if it is initialised.

    Every bag comes once in an epoch, over all ranks together.  All ranks have the same number of batches: some are cut
    in two for it, and where all are single bags already, some bags come twice.

    Iterating begins the next epoch, from 0 on.  ``set_epoch`` says which one it is: where a run goes on, or where ranks
    did not iterate equally often.  Lightning calls it; on several ranks give its trainer
    ``use_distributed_sampler=False``.

    Raises:
        TypeError, ValueError: no lengths, or one below 0; a size below 1; a rank that is none.

    >>> from milkernels.data import BagBatchSampler
    >>> list(BagBatchSampler([4, 4, 9, 2], max_instances=10, shuffle=False))
    [[0, 1], [2], [3]]
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        max_instances: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
    ):
        self.lengths = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
        if not self.lengths or min(self.lengths) < 0:
            raise ValueError(f"lengths must be those of one bag at least, from 0 on; got {self.lengths[:9]}")
        check_count("max_instances", max_instances)
        check_flag("shuffle", shuffle)
        check_flag("drop_last", drop_last)
        if (num_replicas is None) != (rank is None) or rank is not None and not 0 <= rank < num_replicas:
            raise ValueError(f"rank must be in [0, num_replicas), or both None; got {rank}, {num_replicas}")
        self.max_instances, self.shuffle, self.seed, self.drop_last = max_instances, shuffle, seed, drop_last
        self.num_replicas, self.rank, self.epoch = num_replicas, rank, 0

    @property
    def sampler(self) -> "BagBatchSampler":
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        ranks, rank = self._ranks()
        batches = self._cut(ranks)
        if self.shuffle:
            dealt = [iter(_shuffled(bucket, generator)) for bucket in self._buckets]
            batches = _shuffled([[next(dealt[bucket]) for bucket in batch] for batch in batches], generator)
        if self.drop_last:
            batches = batches[: len(batches) // ranks * ranks]
        batches += (batches * ranks)[: -len(batches) % ranks]
        return iter(batches[rank::ranks])

    def __len__(self) -> int:
        ranks, _ = self._ranks()
        count = len(self._cut(ranks))
        return count // ranks if self.drop_last else -(-count // ranks)

    def _ranks(self) -> tuple[int, int]:
        if self.num_replicas is not None:
            return self.num_replicas, self.rank
        dist = torch.distributed
        there = dist.is_available() and dist.is_initialized()
        return (dist.get_world_size(), dist.get_rank()) if there else (1, 0)

    def _cut(self, ranks: int) -> list[list[int]]:
        """The plan, batches cut in two until there are as many for each rank."""
        batches = list(self._plan)
        while not self.drop_last and len(batches) % ranks:
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch, half = batches[largest], len(batches[largest]) // 2
            if not half:
                break
            batches[largest : largest + 1] = [batch[:half], batch[half:]]
        return batches

    @functools.cached_property
    def _buckets(self) -> list[list[int]]:
        """Bags of about the same length, the longest first."""
        buckets: list[list[int]] = []
        for bag in sorted(range(len(self.lengths)), key=lambda bag: -self.lengths[bag]):
            if not buckets or self.lengths[bag] < _NARROW * self.lengths[buckets[-1][0]]:
                buckets.append([])
            buckets[-1].append(bag)
        return buckets

    @functools.cached_property
    def _plan(self) -> list[list[int]]:
        """The bags of each batch; of shuffled ones their buckets.  A bag is counted as the longest of its bucket there:
        whichever are dealt, they fit, and every epoch has as many batches."""
        batches: list[list[int]] = []
        if self.shuffle:
            sizes, left = [self.lengths[bucket[0]] for bucket in self._buckets], [len(b) for b in self._buckets]
            while any(left):
                batches.append([])
                room = self.max_instances
                for bucket, size in enumerate(sizes):
                    while left[bucket] and (size <= room or not batches[-1]):
                        batches[-1].append(bucket)
                        left[bucket] -= 1
                        room -= size
        else:
            room = -1
            for bag, length in enumerate(self.lengths):
                if length > room:
                    batches.append([])
                    room = self.max_instances
                batches[-1].append(bag)
                room -= length
        return batches[:-1] if self.drop_last and room >= min(self.lengths) else batches


def _shuffled(items: list, generator: torch.Generator) -> list:
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
