from .harness import Scores as Scores
from .harness import evaluate_tasks as evaluate_tasks
from .harness import score as score
from .losses import evaluate_loss as evaluate_loss
from .task_data import open_tasks as open_tasks
