"""Adapt pretrained vision models inside a memory budget."""

import lazy_loader

__version__ = "0.1.0"

# Each name is imported on first use, so that `toolkit.budget` alone costs no more than torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
