from .errors import MpqError as MpqError
from .method import best_plan as best_plan
from .method import evaluate_plan as evaluate_plan
from .method import gains_of as gains_of
from .method import groups_of as groups_of
from .method import read_text as read_text
from .method import sensitivity_of as sensitivity_of
from .method import times_of as times_of
from .models.checkpoint import fetch as fetch
from .models.checkpoint import load_config as load_config
from .models.loading import load_model as load_model
from .program.plan import Plan as Plan
from .report.runs import read_run as read_run
from .running.apply import apply_plan as apply_plan
from .spec.reading import load_spec as load_spec

__version__: str
