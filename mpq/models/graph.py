"""The model as a graph of operations: traced from its configuration, without weights."""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import networkx as nx
import torch
from torch import nn

from mpq.errors import MpqError, first_line, is_out_of_memory
from mpq.models import experts
from mpq.models.architecture import auto_class
from mpq.models.attention import dispatched
from mpq.models.linears import holders, is_linear
from mpq.models.repeats import UnlikeLayersError, each_kind_once, unrolled

log = logging.getLogger(__name__)
OpKind = Literal["linear", "experts", "bgemm", "other"]
_Layers: TypeAlias = Callable[[nn.Module], AbstractContextManager[object]]


@dataclass(frozen=True)
class Op:
    """One matrix product.

    `name` is the fully qualified module name; attention's products are `<attention>.qk_matmul` and
    `<attention>.av_matmul`. A linear is (tokens, in_features) x (in_features, out_features). A bgemm is, per batch row
    and head, qk: (T, in_features) x (in_features, T), av: (T, T) x (T, out_features), the size that is the sequence
    length given as 0. Experts are one op for all experts of a layer, called as their tensor, of (tokens · `active`) rows.
    `kind` is `other` for a product that mpq can name but not lower (a router's, say); it stays in base and is reported.
    """

    name: str
    kind: OpKind
    in_features: int
    out_features: int
    heads: int = 0  # query heads of a bgemm
    kv_heads: int = 0  # heads of K and V before repetition
    parameters: int = 0
    window: int = 0  # tokens that a sliding attention sees; 0 where it sees all
    tied: bool = (
        False  # the weight is another module's too (the embedding's): lowered, it is one copy more
    )
    active: int = 0  # experts that each token is sent to
    feeds: tuple[str, ...] = ()  # the ops that read the output as it is, if nothing else reads it


@dataclass(frozen=True)
class Graph:
    """The computation that depends on the hidden states, from the embedding (`source`) to the logits (`sink`).

    `dag` has an integer per traced operation, in execution order; the matrix products among them are in `ops`.
    """

    dag: nx.DiGraph
    ops: dict[int, Op]
    source: int
    sink: int


_LINEAR = {"aten.linear.default", "aten.addmm.default", "aten.mm.default"}
_MATMUL = {
    "aten.matmul.default",
    "aten.bmm.default",
    "aten.baddbmm.default",
    "aten.mm.default",
    "aten.linear.default",
    "aten.addmm.default",
}
# what moves values without changing them
_MOVES = {
    "view",
    "_unsafe_view",
    "reshape",
    "flatten",
    "unflatten",
    "transpose",
    "permute",
    "t",
    "contiguous",
    "clone",
    "unsqueeze",
    "squeeze",
    "expand",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "chunk",
    "getitem",
    "alias",
    "detach",
}
_OTHER = ("conv", "einsum", "grouped_mm", "tensordot", "bilinear", "addbmm")
_ENCODERS = ("bert", "roberta", "distilbert", "electra")
_DRIVES_NOTHING = ("_assert", "sym_size", "sym_constrain")


def build_on_meta(config: Any) -> nn.Module:
    """The model without weights, eager attention so that both products are to be seen."""
    from transformers import AutoModelForMaskedLM

    config = copy.deepcopy(config)
    masked = (
        any("MaskedLM" in a for a in config.architectures or ()) or config.model_type in _ENCODERS
    )
    build: Any = AutoModelForMaskedLM if masked else auto_class(config)
    # a configuration of the checkpoint's own code was read with leave to run it; without, nobody is to be asked
    trusted = type(config).__module__.startswith("transformers_modules")
    with torch.device("meta"):
        return build.from_config(  # type: ignore[no-any-return]
            config, attn_implementation="eager", trust_remote_code=trusted
        ).eval()


def trace(config: Any, *, batch: int = 2, length: int = 64) -> Graph:
    """Trace the architecture's forward pass on (batch, length) tokens, with torch.export on meta tensors.

    Raises MpqError for a configuration that cannot be built or traced.
    """
    try:
        model = build_on_meta(config)
        ids = torch.zeros((batch, length), dtype=torch.long, device="meta")
        arguments = (
            {"input_ids": ids}
            if config.model_type in _ENCODERS
            else {"input_ids": ids, "use_cache": False}
        )
        graph, lost = _traced(model, arguments, length)
    except Exception as error:  # whatever the architecture's own code and torch.export raise
        if is_out_of_memory(error):
            raise MpqError(
                f"There is not enough memory to trace the architecture {config.model_type}: check the sizes in config.json, or use a larger machine."
            ) from None
        raise MpqError(
            f"The architecture {config.model_type} cannot be traced ({first_line(error)}): it needs a transformers causal or masked LM that torch.export accepts."
        ) from None
    if not graph.ops:
        raise MpqError(
            f"No matrix product of the architecture {config.model_type} is to be seen between its embedding and its logits: it runs them in code that torch.export does not enter."
        )
    if lost:
        log.warning("Products that do not reach the logits are left out: %s.", ", ".join(lost))
    return graph


def _traced(
    model: nn.Module, arguments: dict[str, Any], length: int, layers: _Layers = each_kind_once
) -> tuple[Graph, list[str]]:
    """As `_graph`. Where layers that seem alike are not, each is traced."""
    try:
        program = _program(model, arguments, layers)
        if _graph(program, list(program.graph.nodes), model, length)[1]:
            # written in place, their results seem to lead nowhere: in the functional form they do; it takes twice the time
            program = program.run_decompositions({})
        return _graph(program, unrolled(program), model, length)
    except (
        Exception
    ) as error:  # whatever an architecture's own code makes of calls that are one node
        if layers is nullcontext or is_out_of_memory(error):
            raise
        log.info("Each layer is traced by itself: %s.", first_line(error))
    return _traced(model, arguments, length, nullcontext)


def _program(model: nn.Module, arguments: dict[str, Any], layers: _Layers) -> Any:
    try:
        with layers(model):
            return torch.export.export(model, (), arguments, strict=False)
    except UnlikeLayersError:
        raise
    except Exception:  # what torch.export raises over a loop as long as the data says
        with layers(model), experts.each_weight_once(model) as any_experts:
            if not any_experts:
                raise
            return torch.export.export(model, (), arguments, strict=False)


def _graph(
    program: Any, nodes: list[Any], model: nn.Module, length: int
) -> tuple[Graph, list[str]]:
    """The graph of a program's nodes, and the names of the products whose results do not reach the sink."""
    number = {node: i for i, node in enumerate(nodes)}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    embedding_name = next(name for name, m in model.named_modules() if m is embedding)
    source = next(
        n
        for n in nodes
        if n.op == "call_function"
        and "embedding" in str(n.target)
        and _module(n)[0] == embedding_name
    )
    dag, ops = nx.DiGraph(), {}
    seen: dict[str, int] = {}  # products met in each attention module
    dag.add_node(number[source])
    fqn = dict(program.graph_signature.inputs_to_parameters)  # placeholder → parameter
    shapes = {p: tuple(program.state_dict[name].shape) for p, name in fqn.items()}
    modules, held = dict(model.named_modules()), holders(model)
    tokens = math.prod(source.meta["val"].shape[:-1])
    for node in nodes:
        above = [a for a in node.all_input_nodes if number[a] in dag]
        if (
            node.op != "call_function"
            or not above
            or any(s in str(node.target) for s in _DRIVES_NOTHING)
        ):
            continue
        dag.add_edges_from((number[a], number[node]) for a in above)
        if op := _op(node, above, fqn, shapes, seen, model, tokens):
            ops[number[node]] = op
    output = next(n for n in nodes if n.op == "output")
    sink = number[next(a for a in output.args[0] if hasattr(a, "op") and number[a] in dag)]
    useful = nx.ancestors(dag, sink) | {sink}
    lost = [op.name for i, op in ops.items() if i not in useful]
    ops = _told_apart(
        {i: op for i, op in ops.items() if i in useful},
        {number[n]: n for n in nodes},
        model,
        length,
    )
    ops = {
        i: replace(op, tied=op.kind == "linear" and held[id(modules[op.name].weight)] > 1)
        for i, op in ops.items()
    }
    ops = {i: replace(op, feeds=_feeds(nodes[i], ops, number)) for i, op in ops.items()}
    return Graph(dag.subgraph(useful).copy(), ops, number[source], sink), lost


def _told_apart(
    ops: dict[int, Op], nodes: dict[int, Any], model: nn.Module, length: int
) -> dict[int, Op]:
    """The ops with kind `other` for what mpq must not take for a linear or for attention: products of modules that do
    more than a linear (a router of experts), a linear that is called twice (one weight, two places in the model), and
    products that are not the two of an attention which Transformers dispatches by name.
    """
    modules = dict(model.named_modules())
    calls: dict[str, list[int]] = defaultdict(list)
    for i, op in ops.items():
        calls[op.name.rpartition(".")[0] if op.kind == "bgemm" else op.name].append(i)
    told = dict(ops)
    for name, places in calls.items():
        products = [i for i in places if ops[i].kind == "bgemm"]
        if len(places) == 1 and not products:
            if ops[places[0]].kind == "linear" and not is_linear(modules.get(name, model)):
                told[places[0]] = replace(ops[places[0]], kind="other")
            continue
        # scores (T, T) come out of the first product and, as probabilities, go into the second
        passed = [nodes[i] if k == 0 else _operands(nodes[i])[0] for k, i in enumerate(products)]
        more = any(op.name.startswith(f"{name}.matmul") for op in ops.values())
        if (
            len(products) == 2
            and not more
            and dispatched(modules.get(name, model))
            and all(_sizes(node) == (length, length) for node in passed)
        ):
            continue
        for number, i in enumerate(places, 1):
            label = f"{name}.matmul{number}" if products else f"{name}.call{number}"
            told[i] = replace(ops[i], name=label, kind="other")
    return told


def _feeds(node: Any, ops: dict[int, Op], number: dict[Any, int]) -> tuple[str, ...]:
    """The ops that the node's output reaches through moves alone; none where anything else reads it."""
    found, behind = dict[str, None](), list(node.users)
    while behind:
        user = behind.pop()
        if number[user] in ops:
            found[ops[number[user]].name] = None
        elif user.op == "call_function" and _operation(user) in _MOVES:
            behind += user.users
        else:
            return ()
    return tuple(sorted(found))


def _operation(node: Any) -> str:
    """`view` of `aten.view.default`, `getitem` of Python's own."""
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0]


def _operands(node: Any) -> list[Any]:
    """The two factors of a product: of its tensor arguments the last two (baddbmm's first is added)."""
    return [a for a in node.args if hasattr(a, "meta") and "val" in a.meta][-2:]


def _sizes(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape[-2:])


def _module(node: Any) -> tuple[str, str]:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (stack[-1][0], str(stack[-1][1])) if stack else ("", "")


def _op(
    node: Any,
    above: list[Any],
    fqn: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    seen: dict[str, int],
    model: nn.Module,
    tokens: int,
) -> Op | None:
    target, name = str(node.target), _module(node)[0]
    # biases are parameters too
    weight = next(
        (p for a in node.all_input_nodes if (p := _parameter(a, fqn)) and len(shapes[p]) > 1), None
    )
    written_out = target in _MATMUL and is_linear(model.get_submodule(name))
    if (target in _LINEAR or written_out) and weight is not None and len(shapes[weight]) == 2:
        count, out = math.prod(shapes[weight]), int(node.meta["val"].shape[-1])
        return Op(name, "linear", count // out, out, parameters=count)
    if target in _MATMUL and len(above) >= 2:
        index = seen[name] = seen.get(name, 0) + 1
        if index > 2:
            return Op(f"{name}.matmul{index}", "other", 0, 0)
        return _attention_product(node, above, name, index, model)
    if weight is not None and (target in _MATMUL or any(o in target for o in _OTHER)):
        # an expert's product: many experts in one parameter, (experts, in, out) or (experts, out, in)
        sizes = shapes[weight][-2:]
        rows, out = math.prod(node.meta["val"].shape[:-1]), int(node.meta["val"].shape[-1])
        grouped = "grouped_mm" in target and experts.dispatched(model.get_submodule(name))
        return Op(
            fqn[weight].removesuffix(".weight"),
            "experts" if grouped else "other",
            math.prod(sizes) // out,
            out,
            parameters=math.prod(shapes[weight]),
            active=rows // tokens if grouped else 0,
        )
    if target in _MATMUL or any(o in target for o in _OTHER):
        return Op(f"{name}.{target.split('.')[-2]}", "other", 0, 0)
    return None


def _parameter(node: Any, fqn: dict[str, str]) -> str | None:
    """The parameter that a node is a mere view of (transposed, cast), if it is one."""
    while node.name not in fqn and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.name if node.name in fqn else None


def _attention_product(node: Any, above: list[Any], name: str, index: int, model: nn.Module) -> Op:
    left, right = (a.meta["val"].shape for a in above[-2:])
    text = model.config.get_text_config()  # type: ignore[union-attr,operator]
    if node.meta["val"].ndim == 4:
        heads = int(node.meta["val"].shape[1])
    else:  # a state-space model's products look like these, and it has no heads
        heads = getattr(text, "num_attention_heads", None) or 0
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    window = _window(text, name)
    if index == 1:
        return Op(f"{name}.qk_matmul", "bgemm", int(left[-1]), 0, heads, kv_heads, window=window)
    return Op(f"{name}.av_matmul", "bgemm", 0, int(right[-1]), heads, kv_heads, window=window)


def _window(text: Any, name: str) -> int:
    """The sliding window of the attention called `name`: it changes the time, so the signature must know."""
    layer = next((int(part) for part in name.split(".") if part.isdigit()), 0)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * (layer + 1)
    window = getattr(text, "sliding_window", None) or 0
    if not (isinstance(window, int) and 0 <= window < 2**31):
        raise TypeError(f"sliding_window is {window!r}, no number of tokens")
    return window if kinds[layer] == "sliding_attention" else 0
