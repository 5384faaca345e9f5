from .cross_entropy import sample_losses as sample_losses
from .sensitivity import measure_sensitivity as measure_sensitivity
from .sensitivity import merge as merge
