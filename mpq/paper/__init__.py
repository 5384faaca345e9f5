"""The paper's own evaluation: figures 1 to 9, Table 1. Nothing that a run of yours needs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
