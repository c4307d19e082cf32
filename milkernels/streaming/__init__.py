"""Bags that are larger than memory: read in pieces, pooled and differentiated exactly.

from milkernels.streaming import StreamedBag

stream = StreamedBag("slide.npy", rows=32768)
loss = criterion(model(stream).logits, label)   # one read
loss.backward()                                 # one more
"""

from milkernels.streaming.bag import StreamedBag

__all__ = ["StreamedBag"]
