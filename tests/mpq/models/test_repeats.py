"""A trace that repeats the layers that are alike, against one of every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import MIXTURES, SMALL, small_config
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.qwen3_next import modeling_qwen3_next

from mpq.models.graph import _traced, build_on_meta
from mpq.models.partition import groups_table, partition
from mpq.models.repeats import UnlikeLayersError, each_kind_once, unrolled

GQA = {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = ["sliding_attention", "full_attention"]
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mlp_only_layers": [0, 1, 2],
}


def check_alike(config: Any, caplog: pytest.LogCaptureFixture, repeated: int) -> None:
    """Hold a trace that repeats as many layers as are said to one of every layer: the same groups, and the same graph."""
    model = build_on_meta(config)
    ids = torch.zeros((2, 16), dtype=torch.long, device="meta")
    asked = {"input_ids": ids, "use_cache": False}
    with caplog.at_level("INFO", "mpq"):
        found, _ = _traced(model, asked, 16)
    assert f"{repeated} layers are like others" in caplog.text
    whole, _ = _traced(model, asked, 16, nullcontext)
    assert sorted(found.dag.edges) == sorted(whole.dag.edges)
    table = groups_table(partition(found), 2, 16)
    assert table.equals(groups_table(partition(whole), 2, 16))
    assert table["op"].n_unique() == len(table)


@pytest.mark.parametrize(
    ("model_type", "more", "repeated"),
    [
        ("llama", GQA, 2),
        ("gemma3_text", {**GQA, "num_hidden_layers": 4, "layer_types": [*SLIDING, *SLIDING]}, 2),
        ("deepseek_v3", MIXTURES["deepseek_v3"], 1),
        ("gpt_neox", {"use_parallel_residual": True}, 2),
        ("qwen3_next", {**GQA, **LINEAR}, 1),
    ],
)
def test_groups_are_those_of_every_layer(
    model_type: str,
    more: dict[str, object],
    repeated: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Layers of one kind or of two: dense, sliding, routed from the second on, parallel, linear attention."""
    chunks = partial(modeling_qwen3_next.torch_chunk_gated_delta_rule, chunk_size=8)
    monkeypatch.setattr(modeling_qwen3_next, "torch_chunk_gated_delta_rule", chunks)
    check_alike(small_config(model_type, **{"num_hidden_layers": 3, **more}), caplog, repeated)


def test_a_multimodal_model(caplog: pytest.LogCaptureFixture) -> None:
    """Text enters the language model alone: its layers are repeated, those of the tower are not there."""
    text = {**SMALL, **GQA, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "patch_size": 14}
    vision = {**tower, "num_hidden_layers": 3, "image_size": 28}
    more = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    config = AutoConfig.for_model("gemma3", **more)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    check_alike(config, caplog, 2)


class Layer(nn.Module):
    """A layer for `Stack`: what its forward does is the test's."""

    def __init__(self, number: int, config: PretrainedConfig, does: Callable[..., Any]) -> None:
        super().__init__()
        self.layer_idx, self.config, self.does = number, config, does
        self.kind = config.kinds[number]
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.does(self, x, *more)


class Stack(nn.Module):
    """Four layers, one after the other, each given what the stack's forward was."""

    def __init__(self, does: Callable[..., Any], kinds: Sequence[int] = (1, 1, 1, 1)) -> None:
        super().__init__()
        config = PretrainedConfig.from_dict({"kinds": kinds})
        self.layers = nn.ModuleList(Layer(i, config, does) for i in range(4))

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *more)
        return x


class Twice(Stack):
    """The same, with other things the second time."""

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return super().forward(super().forward(x), *more)


def plain(layer: Any, x: Tensor, *more: Any) -> Any:
    return x + layer.two(layer.one(x).relu())


def by_number(layer: Any, x: Tensor) -> Any:
    return layer.one(x) if layer.layer_idx % 2 else layer.two(layer.one(x))


def by_its_place(layer: Any, x: Tensor) -> Any:
    return layer.one(x) if [0, 1, 1, 0][layer.layer_idx] else layer.two(layer.one(x))


def by_configuration(layer: Any, x: Tensor) -> Any:
    return layer.one(x) if layer.config.kinds[layer.layer_idx] else layer.two(layer.one(x))


def hands_on(layer: Any, x: Tensor, kept: dict[str, Tensor]) -> Any:
    kept.setdefault("first", layer.one(x))
    return layer.two(x) + kept["first"]


def in_place(layer: Any, x: Tensor, y: Tensor) -> Any:
    y.add_(layer.one(x))
    return layer.two(x) + y


def keeps(layer: Any, x: Tensor) -> Any:
    layer.config.kept = getattr(layer.config, "kept", layer.one(x)) + 1
    return layer.two(x) + layer.config.kept


def hides(layer: Any, x: Tensor, hidden: Any = SimpleNamespace()) -> Any:
    hidden.kept = getattr(hidden, "kept", None) or [layer.one(x)]
    return layer.two(x) + hidden.kept[0]


def export(model: nn.Module, more: tuple[Any, ...] = ()) -> Any:
    """The program of a call with (3, 4) ones, and whatever more."""
    return torch.export.export(model, (torch.ones(3, 4), *more), strict=False)


def operations(nodes: list[Any]) -> list[tuple[str, str, list[int]]]:
    """What each node of a graph is, in which module, and of which nodes it is made, parameters by their names."""
    place = {node: i for i, node in enumerate(nodes)}
    return [
        (
            str(node.target),
            next(iter([*(node.meta.get("nn_module_stack") or {"": [""]}).values()][::-1]))[0],
            [place[a] for a in node.all_input_nodes],
        )
        for node in nodes
    ]


@pytest.mark.parametrize(
    ("does", "more", "kinds", "run"),
    [
        (plain, (), [1, 1, 1, 1], 1),
        (plain, (torch.ones(3, 4), 7, [None, "x"]), [1, 1, 1, 1], 1),
        (plain, (), [1, 2, 1, 2], 2),
        (by_number, (), [1, 1, 1, 1], 4),
        (by_its_place, (), [1, 1, 1, 1], 4),
        (by_configuration, (), [1, 2, 2, 1], 4),
    ],
)
def test_layers_that_are_alike_run_once(
    does: Callable[..., Any], more: tuple[Any, ...], kinds: list[int], run: int
) -> None:
    """As many layers run as are of different kinds, or all that make something of their number; the operations are those of all."""
    ran: list[int] = []

    def told(layer: Any, *given: Any) -> Any:
        ran.append(id(layer))
        return does(layer, *given)

    stack = Stack(told, kinds)
    every = operations(list(export(stack, more).graph.nodes))
    del ran[:]
    with each_kind_once(stack):
        program = export(stack, more)
    assert len(ran) == run
    assert operations(unrolled(program)) == every
    assert "forward" not in vars(stack.layers[0])


def test_layers_that_are_called_twice() -> None:
    """Called alike, the second call is a repetition, too; called otherwise, each layer is to be traced."""
    for more in ((), (3,)):
        stack = Twice(plain)
        with each_kind_once(stack), pytest.raises(UnlikeLayersError) if more else nullcontext():
            found = operations(unrolled(export(stack, more)))
        if not more:
            assert found == operations(list(export(stack).graph.nodes))


@pytest.mark.parametrize(
    ("does", "more"),
    [(hands_on, ({},)), (in_place, (torch.ones(3, 4),)), (keeps, ()), (hides, ())],
)
def test_layers_that_share_something_are_told(does: Callable[..., Any], more: Any) -> None:
    """A value that goes from layer to layer by another way than their calls is found: in what they are given, in the
    configuration, or, between layers of two kinds, in the trace."""
    stack = Stack(does, [1, 2, 2, 2])
    with each_kind_once(stack), pytest.raises(UnlikeLayersError):
        unrolled(export(stack, more))
