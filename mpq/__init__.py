"""mpq: choose, layer by layer, the numerical format in which a language model runs."""

__version__ = "0.1.0"
