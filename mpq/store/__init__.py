"""Content-addressed tables and files on any URL: written whole or not at all, checked when read."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
