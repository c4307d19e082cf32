"""Feature files as bags, and mini-batches of whole bags.

CLAM, TRIDENT and most others write one file for each slide: a tensor, or features beside the coordinates of the
patches.  NumPy, h5py and zarr are imported when a file needs them: ``pip install milkernels[data]``.

>>> import tempfile, torch
>>> from torch.utils.data import DataLoader
>>> from milkernels.data import BagBatchSampler, FeatureFolder
>>> root = tempfile.mkdtemp()
>>> for name, patches in (("first", 7), ("second", 4), ("third", 9)):
...     file = {"features": torch.randn(patches, 16), "coords": torch.zeros(patches, 2)}
...     torch.save(file, f"{root}/{name}.pt")
>>> folder = FeatureFolder(root, labels={"first": 0, "third": 1})
>>> sampler = BagBatchSampler(folder.lengths, max_instances=20)
>>> (batch,) = DataLoader(folder, batch_sampler=sampler, collate_fn=folder.collate)
>>> batch["features"]
Bags(2 bags, values=[16, 16] torch.float32 on cpu, extras=['coords'])
>>> sorted(zip(batch["name"], batch["label"].tolist()))
[('first', 0), ('third', 1)]
"""

from milkernels.data.batches import BagBatchSampler
from milkernels.data.files import FeatureFolder, read_bag

__all__ = ["BagBatchSampler", "FeatureFolder", "read_bag"]
