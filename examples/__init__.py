"""Training on ragged batches: the classic data sets, MNIST-bags and a simulated slide.  See README.md."""
