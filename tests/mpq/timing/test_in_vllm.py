"""Times by an engine's process, with a stand-in for it: what is asked, and what a process that ends costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small import small_config

from mpq.errors import MpqError
from mpq.export.scheme import quantization_config
from mpq.export.skeleton import skeleton
from mpq.method import groups_of
from mpq.serving import EngineDied, Environment
from mpq.serving.schemes import runs_in_vllm
from mpq.timing import in_vllm
from mpq.timing.in_vllm import measure_each_in_vllm, measure_ttft_in_vllm

CONFIG = small_config("llama", num_key_value_heads=2)
SECONDS = {"": 0.10, "int8": 0.08, "fp8_e4m3": 0.11, "w4a16": 0.09}
_READ = {("int", 8): "int8", ("float", 8): "fp8_e4m3", ("int", 4): "w4a16"}
TOKEN_S = {"": 0.01, "int8": 0.03, "fp8_e4m3": 0.02, "w4a16": 0.01}
HOW: dict[str, Any] = {"base": "fp32", "batch": 1, "length": 8, "repeats": 2}


class StandIn:
    """An engine's process that takes as long as the formats say, and ends where a linear is in `deadly`."""

    begun: list[StandIn] = []  # noqa: RUF012 (the fixture empties it)
    deadly = ""
    misread: frozenset[str] = frozenset()  # linears that stay in base, whatever config.json says

    def __init__(self, environment: Environment, threads: int | None = None):
        self.environment, self.opened, self.dead = environment, list[str](), False
        self.sections: list[dict[str, Any]] = []  # each compiled configuration's
        self.compiled: dict[str, set[str]] = {}  # engines that are open, and their formats
        self.most = 0
        StandIn.begun.append(self)

    def ask(self, what: str, **how: Any) -> Any:
        """What vLLM would answer."""
        if what == "time":
            formats = self.compiled.get(how["name"], set()) | set(how["linears"].values())
            if StandIn.deadly in formats:
                self.dead = True
                raise EngineDied("vLLM's process ended.")
            first = SECONDS[min(formats, default="")]
            return [first + k * TOKEN_S[min(formats, default="")] for k in range(how["output"])]
        if what == "open":
            self.opened.append(how["name"])
            parent = "model.layers.0"
            linears = [f"{parent}.self_attn.qkv_proj", f"{parent}.self_attn.o_proj"]
            linears += [f"{parent}.mlp.gate_up_proj", f"{parent}.mlp.down_proj"]
            every = [x.replace("layers.0", f"layers.{k}") for k in (0, 1) for x in linears]
            packed = {
                "qkv_proj": ["q_proj", "k_proj", "v_proj"],
                "gate_up_proj": ["gate_proj", "up_proj"],
            }
            lowered = self._read(how, every, packed) if how["compiled"] else {}
            return {"linears": every, "packed": packed, "lowered": list(lowered)}
        if what == "close":
            self.compiled.pop(how["name"], None)
        return None

    def _read(
        self, how: dict[str, Any], linears: list[str], packed: dict[str, list[str]]
    ) -> dict[str, str]:
        """The linears that config.json lowers, as vLLM goes by its names: each with its group's type."""
        config = json.loads((Path(how["folder"]) / "config.json").read_text())
        section = config.get("quantization_config") or {"config_groups": {}}
        if section["config_groups"]:
            self.sections.append(section)
        type_of = {
            target: _READ[group["weights"]["type"], group["weights"]["num_bits"]]
            for group in section["config_groups"].values()
            for target in group["targets"]
        }
        found = {}
        for linear in linears:
            parent, _, child = linear.rpartition(".")
            (name,) = {type_of.get(f"{parent}.{part}") for part in packed.get(child, [child])}
            if name and linear not in StandIn.misread:
                found[linear] = name
        self.compiled[how["name"]] = set(found.values())
        self.most = max(self.most, len(self.compiled))
        return found

    def kill(self) -> None:
        """Nothing lives."""
        self.dead = True

    close = kill


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """No vLLM is started, and none is kept."""
    monkeypatch.setattr(in_vllm, "EngineProcess", StandIn)
    monkeypatch.setattr(in_vllm, "find_environment", lambda: Environment("x", "0.0"))  # type: ignore[arg-type]
    monkeypatch.setattr(in_vllm, "_idle", {})
    StandIn.begun, StandIn.deadly, StandIn.misread = [], "none", frozenset()


def times(
    *configurations: tuple[str, ...], op: str = "mlp.down_proj", **how: Any
) -> dict[int, float]:
    """The gains of configurations of the group with this op (both layers' are switched)."""
    groups = groups_of(CONFIG, batch=1, length=8)
    signature = groups.filter(op=f"model.layers.0.{op}")["signature"][0]
    found = measure_each_in_vllm(
        CONFIG.to_dict(), groups, [(signature, list(configurations))], **HOW, **how
    )
    return {place: row["gain_s"][0] for place, row in found}


def test_gains_are_the_engines() -> None:
    """A gain is base's time less the configuration's, shared by the groups that are switched; one process serves all calls."""
    assert times(("int8",), ("fp8_e4m3",), ("fp32",)) == pytest.approx({0: 0.01, 1: -0.005, 2: 0})
    assert StandIn.begun[0].opened == ["base", "fp8_e4m3", "int8"]
    times(("int8",))
    assert len(StandIn.begun) == 1


def test_where_linears_are_compiled_in_each_configuration_has_an_engine() -> None:
    """Gains are the same; beside base's engine one is open at a time, and none afterwards. A plan has one as well."""
    gains = times(("int8",), ("fp8_e4m3",), ("fp32",), compiled=True)
    assert gains == pytest.approx({0: 0.01, 1: -0.005, 2: 0})
    (process,) = StandIn.begun
    assert len(process.sections) == 2
    plan = {f"model.layers.0.self_attn.{x}_proj": "int8" for x in "qkv"}
    frame = measure_ttft_in_vllm(CONFIG.to_dict(), [plan, {}], **HOW, compiled=True)
    assert frame["gain_s"].to_list() == pytest.approx([0.02, 0])
    assert set(frame["mode"]) == {"vllm compiled"}
    assert (process.most, process.compiled, len(process.sections)) == (2, {}, 3)


def test_on_a_gpu_a_compiled_configuration_has_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs hold what is one for a process: base's stays, a configuration's ends with its measurement."""
    monkeypatch.setattr(in_vllm, "vllm_device_name", lambda *_: "a GPU")
    gains = times(("int8",), ("w4a16",), device="cuda", compiled=True)
    assert gains[0] == pytest.approx(0.01)
    base, *others = StandIn.begun
    assert [process.opened for process in (base, *others)] == [["base"], *[["configuration"]] * 2]
    assert all(process.dead for process in StandIn.begun)


def test_an_engines_configuration_is_the_exports() -> None:
    """A mixture's config.json has the groups, and the linears in base, that an export of the same plan has."""
    ops = [op for op in skeleton(CONFIG).linears if ".layers." in op]
    lowered = {op: "int8" for op in ops if "layers.0.self_attn" in op}
    lowered |= {op: "fp8_e4m3" for op in ops if op.endswith(("gate_proj", "up_proj"))}
    plan = {op: lowered.get(op, "fp32") for op in ops}
    measure_ttft_in_vllm(CONFIG.to_dict(), [plan], **HOW, compiled=True)
    (ours,), theirs = StandIn.begun[0].sections, quantization_config(lowered, skeleton(CONFIG))

    def groups(section: dict[str, Any]) -> dict[str, Any]:
        every = section["config_groups"].items()
        return {name: {**group, "targets": sorted(group["targets"])} for name, group in every}

    assert groups(ours) == groups(theirs)
    named = {name for name in ours["ignore"] if not name.startswith("re:")}
    assert named == set(theirs["ignore"]) == {*skeleton(CONFIG).linears} - set(lowered)
    assert ours["format"] == theirs["format"] == "mixed-precision"


def test_an_engine_that_reads_another_mixture_is_told() -> None:
    """No time is taken of an engine that left in base what was to be lowered."""
    StandIn.misread = frozenset({"model.layers.1.mlp.down_proj"})
    with pytest.raises(MpqError, match=r"another configuration .* of model.layers.1.mlp.down_proj"):
        times(("int8",), compiled=True)


def test_further_tokens_count() -> None:
    """Of an answer of 33 tokens some are asked for; each of the 32 after the first is as much worth as the engine's took."""
    groups = groups_of(CONFIG, batch=1, length=8)
    signature = groups.filter(op="model.layers.0.mlp.down_proj")["signature"][0]
    measured = measure_each_in_vllm(
        CONFIG.to_dict(), groups, [(signature, [("int8",)])], **HOW, output=33
    )
    (row,) = (row.row(0, named=True) for _, row in measured)
    assert row["ttft_gain_s"] == pytest.approx(0.01)  # two groups are switched
    assert (row["base_tpot_s"], row["tpot_s"]) == pytest.approx((0.01, 0.03))
    assert row["gain_s"] == pytest.approx(0.01 - 32 * 0.01)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_death_costs_one_measurement(compiled: bool) -> None:
    """The process ends over one format: the others are measured, in new ones if need be, and then the lost one is told."""
    StandIn.deadly = "fp8_e4m3"
    groups, found = groups_of(CONFIG, batch=1, length=8), list[int]()
    signature = groups.filter(op="model.layers.0.mlp.down_proj")["signature"][0]
    requests = [(signature, [("int8",), ("fp8_e4m3",), ("fp32",)])]
    measured = measure_each_in_vllm(CONFIG.to_dict(), groups, requests, **HOW, compiled=compiled)
    with pytest.raises(MpqError, match=r"in fp8_e4m3 could not be timed .*all others were"):
        found.extend(place for place, _ in measured)
    assert sorted(found) == [0, 2]
    assert 2 <= len(StandIn.begun) <= 3


def test_an_engine_that_cannot_begin_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process ends while engines are made, nothing is tried again."""

    def ended(self: StandIn, what: str, **how: Any) -> Any:
        raise EngineDied("vLLM's process ended.")

    monkeypatch.setattr(StandIn, "ask", ended)
    with pytest.raises(EngineDied):
        times(("int8",))
    assert len(StandIn.begun) == 1


def test_what_it_cannot_run() -> None:
    """Formats without a scheme, products of attention and split fused layers are refused before anything runs."""
    with pytest.raises(MpqError, match="vLLM runs no linear in bf16: expected int8 and fp8_e4m3"):
        times(("bf16",))
    groups = groups_of(CONFIG, batch=1, length=8)
    rows = groups.filter(group=groups.filter(op="model.layers.0.self_attn.q_proj")["group"][0])
    split = ["int8" if op.endswith("q_proj") else "fp32" for op in rows.sort("order")["op"]]
    with pytest.raises(MpqError, match=r"runs model.layers.0.self_attn.qkv_proj in one format"):
        times(tuple(split), op="self_attn.q_proj")
    kinds = {"a": "linear", "b": "bgemm"}
    assert runs_in_vllm({"a": "int8", "b": "fp32"}, kinds, "fp32")
    assert not runs_in_vllm({"a": "fp32", "b": "fp8_e4m3"}, kinds, "fp32")
