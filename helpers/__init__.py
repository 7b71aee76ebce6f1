"""tunebook's helpers: one noun a module; import the one you need."""

import os

# Before torch is imported: memory of a GPU in segments that grow. Lengths change from
# step to step, and blocks kept for each of them would fill it.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
