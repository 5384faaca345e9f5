from .apply import Mixed as Mixed
from .apply import apply_plan as apply_plan
from .prefill import Prefill as Prefill
