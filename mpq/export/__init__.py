"""From a plan to a checkpoint that an engine serves, reloaded and compared before it is called done."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
