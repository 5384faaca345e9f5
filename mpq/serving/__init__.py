"""Engines as programs of their own: where they are installed, how a process of one is asked, what their checkpoints say."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
