"""What developers of milkernels run from a checkout: ``python -m tools.aot`` and so on.  Not a part of the package."""
