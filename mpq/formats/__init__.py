"""What a number format is: bits, range, scales, rounding, and the noise that rounding adds."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
