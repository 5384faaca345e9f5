"""What rounding does to the loss: first-order sensitivity of each product, by calibration shard."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
