from .engines import ENGINES as ENGINES
from .exporting import TARGETS as TARGETS
from .exporting import Exported as Exported
from .exporting import export as export
