"""mpq: choose, layer by layer, the numerical format in which a language model runs.

The method by name, each loaded when it is asked for:

    fetch, load_config, load_model, read_text    a checkpoint and text
    groups_of                                    its matrix products, in groups that run one after the other
    sensitivity_of, times_of                     what rounding does to the loss; what a format gains on this device
    gains_of, best_plan                          the program's coefficients, and the plan that it chooses
    apply_plan, evaluate_plan                    a plan on a model, and what it really does
    load_spec, read_run, Plan, MpqError          a run's file, a finished run's tables, a plan, the one kind of error
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
