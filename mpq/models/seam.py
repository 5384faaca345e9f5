"""How a module is sent to a function of ours that Transformers picks by the name in its configuration, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

NAME = "mpq"


@contextmanager
def diverted(of: Iterable[tuple[nn.Module, object]], field: str, kept_as: str) -> Iterator[None]:
    """Within, each module has a private copy of its configuration in which `field` names `mpq`, and what belongs to it in its
    attribute `kept_as`: on the module itself, so that torch.compile's guards look at that of the module they are for.

    Leaving restores everything; nested, the inner one stands for the outer.
    """
    undo: list[tuple[nn.Module, Any, object]] = []
    try:
        for module, own in of:
            undo.append((module, module.config, module.__dict__.get(kept_as)))
            config = copy.copy(module.config)
            # not a public attribute: its setter would reach into the sub-configurations, which are shared
            setattr(config, field, NAME)
            module.config, module.__dict__[kept_as] = config, own
        yield
    finally:
        for module, config, outer in reversed(undo):
            module.config = config
            if outer is None:
                del module.__dict__[kept_as]
            else:
                module.__dict__[kept_as] = outer
