"""Tracing and partition: groups written out by hand for each architecture, and the cut against a brute force."""

from __future__ import annotations

import random
import re
import resource

import networkx as nx
import polars as pl
import pytest
from small import MIXTURES, small_config

from mpq.models.architecture import architecture_key
from mpq.models.graph import Graph, Op, build_on_meta, trace
from mpq.models.partition import groups_table, partition
from mpq.program.memory import bytes_of

GQA = {"num_key_value_heads": 2, "head_dim": 8}


ATTENTION = [
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.qk_matmul self_attn.av_matmul",
    "self_attn.o_proj",
]


GATED = ["mlp.gate_proj mlp.up_proj", "mlp.down_proj"]


LLAMA = ("model.layers", ATTENTION + GATED, ["lm_head"])


EXPERTS = "mlp.experts.gate_up_proj mlp.experts.down_proj"


# architecture → further configuration, (path of the layers, groups of one layer, groups after them)
BY_HAND: dict[str, tuple[dict[str, object], tuple[str, list[str], list[str]]]] = {
    "llama": ({**GQA, "tie_word_embeddings": True}, LLAMA),
    "qwen2": (GQA, LLAMA),
    "qwen3": (GQA, LLAMA),
    "mistral": (GQA, LLAMA),
    "gemma2": (GQA, LLAMA),
    "gemma3_text": (GQA, LLAMA),
    "olmo": (GQA, LLAMA),
    "olmo2": (GQA, LLAMA),
    "phi3": (
        {**GQA, "pad_token_id": 0},
        (
            "model.layers",
            [
                "self_attn.qkv_proj",
                "self_attn.qk_matmul self_attn.av_matmul",
                "self_attn.o_proj",
                "mlp.gate_up_proj",
                "mlp.down_proj",
            ],
            ["lm_head"],
        ),
    ),
    "starcoder2": (GQA, ("model.layers", [*ATTENTION, "mlp.c_fc", "mlp.c_proj"], ["lm_head"])),
    "gpt2": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4},
        (
            "transformer.h",
            [
                "attn.c_attn",
                "attn.qk_matmul attn.av_matmul",
                "attn.c_proj",
                "mlp.c_fc",
                "mlp.c_proj",
            ],
            ["lm_head"],
        ),
    ),
    "opt": (
        {"ffn_dim": 64, "word_embed_proj_dim": 32},
        ("model.decoder.layers", [ATTENTION[0], "self_attn.out_proj", "fc1", "fc2"], ["lm_head"]),
    ),
    "gpt_neox": (
        {"use_parallel_residual": True},
        (
            "gpt_neox.layers",
            [
                "attention.query_key_value attention.qk_matmul attention.av_matmul attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"
            ],
            ["embed_out|lm_head"],
        ),
    ),
    "phi": ({}, ("model.layers", [ATTENTION[0] + " self_attn.dense mlp.fc1 mlp.fc2"], ["lm_head"])),
    "bert": (
        {},
        (
            "bert.encoder.layer",
            [
                "attention.self.query attention.self.key attention.self.value attention.self.qk_matmul attention.self.av_matmul",
                "attention.output.dense",
                "intermediate.dense",
                "output.dense",
            ],
            ["cls.predictions.transform.dense", "cls.predictions.decoder"],
        ),
    ),
    "mixtral": (GQA, ("model.layers", [*ATTENTION, "mlp.gate", EXPERTS], ["lm_head"])),
    "qwen3_moe": (GQA, ("model.layers", [*ATTENTION, "mlp.gate", EXPERTS], ["lm_head"])),
}


@pytest.mark.parametrize("model_type", BY_HAND)
def test_groups_by_hand(model_type: str) -> None:
    """Every layer has the groups that one draws by hand, in execution order, with one signature a kind of group."""
    more, (layers, inside, after) = BY_HAND[model_type]
    groups = partition(trace(small_config(model_type, **more)))
    expected = [
        [f"{layers}.{i}.{op}" for op in group.split()] for i in range(2) for group in inside
    ] + [[op] for op in after]
    got = [[op.name for op in group.ops] for group in groups]
    assert len(got) == len(expected), got
    for one, other in zip(got, expected, strict=True):
        assert all(name in names.split("|") for name, names in zip(one, other, strict=True)), (
            one,
            other,
        )
    first, second = groups[: len(inside)], groups[len(inside) : 2 * len(inside)]
    if model_type not in (
        "gemma2",
        "gemma3_text",
    ):  # whose layers alternate between sliding and full attention
        assert [g.signature for g in first] == [g.signature for g in second]
    assert len({g.signature for g in first}) == len(first)


def test_a_head_as_wide_as_the_sequence_is_long() -> None:
    """Attention is told apart by what flows from product to product, not by a size that may be another's too."""
    names = [
        op.name
        for g in partition(
            trace(small_config("llama", num_key_value_heads=2, head_dim=16), length=16)
        )
        for op in g.ops
    ]
    assert (
        sum(name.endswith("qk_matmul") for name in names)
        == sum(name.endswith("av_matmul") for name in names)
        == 2
    )


def test_shapes_and_macs() -> None:
    """Sizes, heads before and after repetition, and MACs of a Llama with grouped-query attention."""
    frame = groups_table(partition(trace(small_config("llama", **GQA))), batch=3, length=10)
    rows = {r["op"].removeprefix("model.layers.0."): r for r in frame.iter_rows(named=True)}
    assert (rows["self_attn.k_proj"]["in_features"], rows["self_attn.k_proj"]["out_features"]) == (
        32,
        16,
    )
    assert rows["self_attn.k_proj"]["macs"] == 3 * 10 * 32 * 16
    assert rows["self_attn.k_proj"]["parameters"] == 32 * 16
    assert (rows["self_attn.qk_matmul"]["heads"], rows["self_attn.qk_matmul"]["kv_heads"]) == (4, 2)
    assert (
        rows["self_attn.qk_matmul"]["macs"]
        == rows["self_attn.av_matmul"]["macs"]
        == 3 * 4 * 10 * 10 * 8
    )
    assert rows["lm_head"]["out_features"] == 97


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_are_one_op_for_all_of_a_layer(model_type: str) -> None:
    """Each tensor of a layer's experts is an op by its name: MACs of the experts that a token is sent to, bytes of all;
    the router is `other`, a shared expert's linears are linears."""
    config = small_config(model_type, **MIXTURES[model_type])
    frame = groups_table(partition(trace(config)), batch=3, length=10)
    layer = "model.layers.1.mlp."
    frame = frame.filter(pl.col("op").str.starts_with(layer))
    rows = {r["op"].removeprefix(layer): r for r in frame.iter_rows(named=True)}
    model = build_on_meta(config)
    wide = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    for name, (k, c) in {"gate_up_proj": (32, 2 * wide), "down_proj": (wide, 32)}.items():
        row = rows[f"experts.{name}"]
        assert row["kind"] == "experts"
        assert (row["in_features"], row["out_features"]) == (k, c)
        assert row["macs"] == 3 * 10 * 2 * k * c
        assert row["parameters"] == model.get_parameter(row["op"]).numel() == 4 * k * c
        assert (
            bytes_of(row, "int8", "bf16") == 4 * k * c + 4 * 4 * c
        )  # a scale a channel and expert
        assert bytes_of(row, "bf16", "bf16") == 2 * 4 * k * c
    assert rows.get("gate", rows.get("router"))["kind"] == "other"
    shared = [op for op in rows if "shared_expert" in op and op.endswith("_proj")]
    assert len(shared) == (3 if model_type in ("qwen2_moe", "deepseek_v3") else 0)
    assert {rows[op]["kind"] for op in shared} <= {"linear"}


def test_an_op_without_experts_keeps_its_signature() -> None:
    """What was timed before there were ops of experts is found again: the signature of a dense layer is the one it had."""
    groups = partition(trace(small_config("llama", **GQA)))
    assert groups[1].signature == "o_proj-2aa66c34"


GEMMA_3N = GQA | {
    "head_dim": 8,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
    "intermediate_size": [48, 48],
}


@pytest.mark.parametrize(
    ("model_type", "more", "others", "linears"),
    [
        (
            "mamba",
            {"state_size": 8},
            r"mixer\.matmul16$",
            r"mixer\.in_proj$",
        ),  # a scan of products is no attention
        (
            "diffllama",
            GQA,
            r"self_attn\.matmul4$",
            r"self_attn\.q_proj$",
        ),  # nor are two attentions in one module
        # a router that is called twice; results written in place, which plain tracing loses
        ("gemma3n_text", GEMMA_3N, r"modality_router\.call2$", r"per_layer_projection$"),
    ],
)
def test_what_looks_like_attention_and_is_not(
    model_type: str, more: dict, others: str, linears: str
) -> None:
    """Products that mpq cannot lower are `other`, under names of their own; no product is lost, no name used twice."""
    ops = [
        op for g in partition(trace(small_config(model_type, **more), length=16)) for op in g.ops
    ]
    names = [op.name for op in ops]
    assert len(names) == len(set(names))
    assert (
        not any(name.endswith(("qk_matmul", "av_matmul")) for name in names)
        or model_type == "gemma3n_text"
    )
    for pattern, kind in ((others, "other"), (linears, "linear")):
        found = [op for op in ops if re.search(pattern, op.name)]
        assert len(found) == 2
        assert {op.kind for op in found} == {kind}


def _graph(edges: list[tuple[int, int]], ops: set[int], sink: int) -> Graph:
    return Graph(nx.DiGraph(edges), {i: Op(f"m.{i}", "linear", 1, 1) for i in ops}, 0, sink)


def _names(graph: Graph) -> list[list[int]]:
    return [[int(op.name[2:]) for op in g.ops] for g in partition(graph)]


def test_small_graphs() -> None:
    """A chain, a diamond, a residual skip beside a chain, and branches that an op merges."""
    assert _names(_graph([(0, 1), (1, 2), (2, 3)], {1, 2}, 3)) == [[1], [2]]
    assert _names(_graph([(0, 1), (0, 2), (1, 3), (2, 3), (3, 4)], {1, 2, 4}, 4)) == [[1, 2], [4]]
    assert _names(_graph([(0, 1), (1, 2), (2, 3), (0, 3), (3, 4)], {1, 2, 4}, 4)) == [[1], [2], [4]]
    assert _names(_graph([(0, 1), (0, 2), (1, 3), (2, 3), (3, 4)], {1, 2, 3}, 4)) == [[1, 2, 3]]


@pytest.mark.parametrize("seed", range(60))
def test_cuts_equal_brute_force(seed: int) -> None:
    """On random graphs the groups end exactly at the nodes that every source→sink path visits."""
    rng = random.Random(seed)
    n = rng.randint(4, 10)
    edges = {(i, i + 1) for i in range(n - 1) if rng.random() < 0.7} | {
        (a, b) for a in range(n) for b in range(a + 1, n) if rng.random() < 0.2
    }
    dag = nx.DiGraph(list(edges))
    dag.add_nodes_from(range(n))
    for i in range(n):  # one source, one sink
        if i and not dag.in_degree(i):
            dag.add_edge(0, i)
        if i < n - 1 and not dag.out_degree(i):
            dag.add_edge(i, n - 1)
    inner = list(range(1, n - 1))
    paths = [set(p) for p in nx.all_simple_paths(nx.transitive_reduction(dag), 0, n - 1)]
    cuts = {i for i in range(n) if all(i in p for p in paths)}
    expected: list[list[int]] = [[]]
    for i in inner:
        expected[-1].append(i)
        if i in cuts:
            expected.append([])
    graph = Graph(dag, {i: Op(f"m.{i}", "linear", 1, 1) for i in inner}, 0, n - 1)
    assert _names(graph) == [g for g in expected if g]


def test_an_8b_configuration_partitions_without_weights() -> None:
    """Llama-3.1-8B's shapes: 129 groups in 5 signatures, in less than 2 GiB more memory, where weights would take 32."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    groups = partition(trace(small_config("llama", vocab_size=128256, **sizes, **heads)))
    assert (len(groups), len({g.signature for g in groups})) == (129, 5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20


def test_architecture_key() -> None:
    """The key ignores names and dtype, and changes with any size."""
    one, other = small_config("llama"), small_config("llama")
    other._name_or_path, other.dtype = "elsewhere", "bfloat16"
    assert architecture_key(one) == architecture_key(other)
    assert architecture_key(one) != architecture_key(small_config("llama", intermediate_size=64))
