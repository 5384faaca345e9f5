from .entries import Damaged as Damaged
from .entries import Store as Store
from .entries import TableRef as TableRef
from .entries import content_key as content_key
from .tables import SCHEMAS as SCHEMAS
from .tables import table as table
from .tables import validate as validate
from .transport import open_filesystem as open_filesystem
