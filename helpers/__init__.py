"""tunebook's helpers: one noun a module; import the one you need."""

import os

# Before torch is imported: memory of a GPU in segments that grow. Lengths change from
# step to step, and blocks kept for each of them fill it: the recipe demo-gpu reserved
# 13 GiB without, 5.6 with.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
