"""Our own Metal kernels: their sources, their launches, and which of them a pass uses."""
