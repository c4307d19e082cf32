"""Training with milkernels, end to end: see README.md."""

import importlib.util

# Asked for before anything is computed, not after an hour of training.
NEEDED = ("numpy", "rich", "matplotlib", "psutil", "sklearn", "h5py")
_missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(f'the examples need {", ".join(_missing)}: pip install "milkernels[examples]"')
