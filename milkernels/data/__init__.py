"""Feature files as bags, and mini-batches of whole bags.

CLAM, TRIDENT and most others write one file for each slide: a tensor, or features beside the coordinates of the
patches.  NumPy, h5py and zarr are imported when a file needs them: ``pip install milkernels[data]``.
"""

from milkernels.data.batches import BagBatchSampler
from milkernels.data.files import FeatureFolder, read_bag

__all__ = ["BagBatchSampler", "FeatureFolder", "read_bag"]
