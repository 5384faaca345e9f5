from .apply import Mixed as Mixed
from .prefill import Prefill as Prefill
