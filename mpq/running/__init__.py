"""A plan on a model, and off again; a forward pass made ready to be timed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
