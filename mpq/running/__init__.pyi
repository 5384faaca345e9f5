from .apply import Mixed as Mixed
from .apply import applied as applied
from .prefill import Prefill as Prefill
