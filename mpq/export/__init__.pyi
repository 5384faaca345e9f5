from .engines import ENGINES as ENGINES
from .exporting import TARGETS as TARGETS
from .exporting import Exported as Exported
from .exporting import check_exportable as check_exportable
from .exporting import export as export
from .folder import holds as holds
