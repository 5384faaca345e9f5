from .cross_entropy import sample_losses as sample_losses
from .effects import joined as joined
from .sensitivity import measure as measure
from .sensitivity import measure_sensitivity as measure_sensitivity
from .sensitivity import merge as merge
