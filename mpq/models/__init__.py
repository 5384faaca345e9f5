"""Checkpoints and what is in them: files, text and tokens, the traced graph, its groups, the seam in attention."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
