"""examples/train_demo.py: which models it makes."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mpq.models.graph import trace

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", EXAMPLES / "train_demo.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_default_is_the_committed_checkpoint(script: ModuleType) -> None:
    """Without options the script's model is the one in examples/demo, by its config.json."""
    committed = json.loads((EXAMPLES / "demo" / "config.json").read_text())
    made = script.configuration("llama", script.SIZES["demo"], script.BLOCK).to_dict()
    since = {"architectures", "dtype", "transformers_version"}  # known once the model is saved
    assert {k: made.get(k) for k in committed if k not in since} == {
        k: v for k, v in committed.items() if k not in since
    }


@pytest.mark.parametrize(
    ("arch", "linears", "parallel"),
    [("llama", 7, False), ("qwen3", 7, False), ("neox", 4, True)],
)
def test_architectures(script: ModuleType, arch: str, linears: int, parallel: bool) -> None:
    """Each architecture has its own linears in a layer; a GPT-NeoX's attention and MLP are one group."""
    from mpq.models.partition import partition

    config = script.configuration(arch, script.SIZES["tiny"], 2048)
    assert config.max_position_embeddings == 2048
    groups = partition(trace(config))
    first = [[op.name for op in group.ops if ".layers.0." in op.name] for group in groups]
    assert sum(not name.endswith("_matmul") for ops in first for name in ops) == linears
    whole = [ops for ops in first if len(ops) == linears + 2]
    assert bool(whole) == parallel
