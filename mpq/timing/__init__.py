"""How long a configuration takes on this device: pairs beside base, designs, and what was not measured."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
