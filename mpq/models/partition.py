"""From the graph to sequential groups (Sec. 2.3.1, App. B): sub-graphs that run one after the other, so times add."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass

import networkx as nx
import polars as pl

from mpq.errors import MpqError
from mpq.models.graph import Graph, Op
from mpq.store.tables import table


@dataclass(frozen=True)
class Group:
    """Ops decided and timed together, in execution order. Groups of equal `signature` do the same work."""

    index: int
    ops: tuple[Op, ...]
    signature: str


def partition(graph: Graph) -> tuple[Group, ...]:
    """The graph's groups, in execution order."""
    order = sorted(graph.dag)  # numbered in execution order, which is topological
    # a node is on every source→sink path exactly when no edge jumps over it
    reach, cuts = -1, set()
    for place, jump in enumerate(_furthest(graph.dag, order)):
        if reach <= place:
            cuts.add(order[place])
        reach = max(reach, jump)
    groups: list[tuple[Op, ...]] = []
    pending: list[Op] = []
    for node in order:
        if node in graph.ops:
            pending.append(graph.ops[node])
        if node in cuts and pending:
            groups.append(tuple(pending))
            pending = []
    return tuple(Group(i, ops, _signature(ops)) for i, ops in enumerate(groups))


def _furthest(dag: nx.DiGraph, order: list[int]) -> list[int]:
    """The place in `order` of each node's furthest successor in the transitive reduction; −1 where it has none.

    What a node leads to is one integer, a bit a place, kept until all that leads to the node was visited: networkx's own
    reduction takes time by the square of a graph's length, which has a thousand nodes a layer of linear attention.
    """
    place = {node: i for i, node in enumerate(order)}
    waiting, behind = dict(dag.in_degree), dict[int, int]()
    furthest = [-1] * len(order)
    for node in reversed(order):
        led_to = 0
        for i in sorted(place[s] for s in dag.successors(node)):
            if not led_to >> i & 1:  # else a path goes there, and the edge is redundant
                led_to |= 1 << i | behind[order[i]]
                furthest[place[node]] = i
            waiting[order[i]] -= 1
            if not waiting[order[i]]:
                del behind[order[i]]
        behind[node] = led_to
    return furthest


def _signature(ops: tuple[Op, ...]) -> str:
    # ops without experts have the signatures that they had before there were any: what was timed stays timed
    shape = [
        {k: v for k, v in asdict(op).items() if k != "tied" and (k != "active" or v)}
        | {"name": _role(op.name), "feeds": [_role(name) for name in op.feeds]}
        for op in ops
    ]
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:8]
    return "+".join(dict.fromkeys(op.name.rpartition(".")[2] for op in ops)) + "-" + digest


def _role(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def macs(op: Op, batch: int, length: int) -> int:
    """Multiply-accumulates of one prefill of batch × length tokens: of experts, those that each token is sent to."""
    if op.kind == "bgemm":
        return batch * op.heads * length * length * max(op.in_features, op.out_features)
    return batch * length * max(1, op.active) * op.in_features * op.out_features


# an op's fields that the table has under another name, behind its schema, or in the signature alone
_BESIDE = ("name", "feeds", "tied", "active", "window")


def groups_table(groups: tuple[Group, ...], batch: int, length: int) -> pl.DataFrame:
    """The `groups` table of a prefill of `batch` × `length` tokens, and three columns more: `feeds`, the ops that read an
    op's output as it is, where nothing else does; `tied`, whether the op's weight is another module's too; `window`, the
    tokens that a sliding attention sees, 0 where it sees all.

    Raises MpqError for a prefill with more multiply-accumulates than its column holds.
    """
    if any(macs(op, batch, length) >= 2**63 for group in groups for op in group.ops):
        raise MpqError(
            f"A prefill of {batch:,} × {length:,} tokens has more multiply-accumulates than 64 bits count: lower batch or length."
        )
    rows: list[dict[str, object]] = []
    for group in groups:
        for op in group.ops:
            fields = {k: v for k, v in asdict(op).items() if k not in _BESIDE}
            rows.append(
                {
                    "group": group.index,
                    "order": len(rows),
                    "op": op.name,
                    "signature": group.signature,
                    "macs": macs(op, batch, length),
                    **fields,
                }
            )
    feeds = pl.Series(
        "feeds", [list(op.feeds) for group in groups for op in group.ops], dtype=pl.List(pl.String)
    )
    tied = pl.Series("tied", [op.tied for group in groups for op in group.ops], dtype=pl.Boolean)
    window = pl.Series("window", [op.window for group in groups for op in group.ops], pl.Int64)
    return table("groups", rows).with_columns(feeds, tied, window)


def feeds_of(groups: pl.DataFrame) -> dict[str, tuple[str, ...]]:
    """Op → the ops that read its output as it is, from a groups table; none where the table does not say."""
    if "feeds" not in groups.columns:
        return {}
    return {
        op: tuple(readers) for op, readers in groups.select("op", "feeds").iter_rows() if readers
    }
