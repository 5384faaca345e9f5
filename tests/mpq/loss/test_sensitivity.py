"""Sensitivity against a slow reference: autograd on fresh aliases of every operand, one sample at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from small import small_model

from mpq.errors import MpqError
from mpq.evaluation.losses import evaluate_loss, losses
from mpq.formats.format import FORMATS, NOISE_MODELS, get_format
from mpq.formats.quantize import Granularity, fake_quantize, noise_variance
from mpq.formats.scheme import SCHEMES, Scheme, get_scheme
from mpq.loss.cross_entropy import drawn_labels, log_probabilities, of_labels
from mpq.loss.sensitivity import measure_sensitivity
from mpq.loss.shared import estimated
from mpq.loss.taps import Tally
from mpq.models.attention import AttentionHandler, intercept
from mpq.models.blocks import Blocks
from mpq.program.costs import loss_by_op

FORMAT_NAMES = ["bf16", "fp8_e4m3", "fp8_e5m2", "int8"]


MODELS = {
    "llama": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "gpt_neox": {"use_parallel_residual": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
}


def ops_of(model: torch.nn.Module) -> list[tuple[str, str]]:
    """Every linear and every attention product of a model."""
    linears = [
        (n, "linear")
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"
    ]
    attentions = [n for n, m in model.named_modules() if type(m).__name__.endswith("Attention")]
    return linears + [(f"{n}.{p}", "bgemm") for n in attentions for p in ("qk_matmul", "av_matmul")]


class _Alias(AttentionHandler):
    """Keeps a fresh alias of each operand; written for this test, apart from the code under test."""

    def __init__(self, name: str, kept: dict[tuple[str, str], torch.Tensor]) -> None:
        self.name, self.kept = name, kept

    def _keep(self, product: str, operand: str, u: torch.Tensor) -> torch.Tensor:
        alias = u * 1.0
        alias.retain_grad()
        self.kept[f"{self.name}.{product}", operand] = alias
        return alias

    def operands(self, query, key, value):
        return (
            self._keep("qk_matmul", "lhs", query),
            self._keep("qk_matmul", "rhs", key),
            self._keep("av_matmul", "rhs", value),
        )

    def probabilities(self, p):
        return self._keep("av_matmul", "lhs", p)


Operands = dict[tuple[str, str], torch.Tensor]


def aliased(
    model: torch.nn.Module, tokens: np.ndarray, drawn: bool = False
) -> Iterator[tuple[float, Operands]]:
    """One sample after the other: its loss, and an alias of every operand with its gradient.

    `drawn`: the loss of labels that drawn_labels takes from the model, in place of the text's.
    """
    ops = ops_of(model)
    for row in tokens:
        kept: dict[tuple[str, str], torch.Tensor] = {}
        originals = {}
        for name, kind in ops:
            if kind != "linear":
                continue
            module = model.get_submodule(name)
            weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight

            def forward(x, name=name, weight=weight, module=module):
                x_alias, w_alias = (x * 1.0), weight.detach().clone().requires_grad_()
                x_alias.retain_grad()
                kept[name, "input"], kept[name, "weight"] = x_alias, w_alias
                return F.linear(x_alias, w_alias, module.bias)

            originals[module] = forward
            module.forward = forward
        handlers = {
            n.rpartition(".")[0]: _Alias(n.rpartition(".")[0], kept)
            for n, kind in ops
            if kind == "bgemm"
        }
        ids = torch.from_numpy(row)[None]
        with intercept(model, handlers), torch.enable_grad():
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits
            labels = ids[:, 1:]
            if drawn:
                labels = drawn_labels(logits[:, :-1].log_softmax(-1), ids, 0)
            loss = F.cross_entropy(logits[0, :-1], labels[0])
            loss.backward()
        for module in originals:
            del module.forward
        yield float(loss.detach()), kept


def granularity_of(op: str, operand: str) -> Granularity:
    return "column" if op.endswith("av_matmul") and operand == "rhs" else "row"


def by_token(
    u: torch.Tensor, op: str, operand: str, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the tokens of one sample's operand: Σ (∂g/∂u_n e_n)² over what belongs to the token, e the error of rounding u, and
    (Σ ∂g/∂u_n e_n)²; of V and weights, the first in one number, and nothing."""
    of = u.detach()
    moved = fake_quantize(of, FORMATS[name], granularity_of(op, operand)) - of
    effect = u.grad.double() * moved.double()
    if operand == "weight" or granularity_of(op, operand) == "column":
        return effect.square().sum()[None], effect.square().sum()[None]
    effect = effect.movedim(-2, 0).flatten(1)  # tokens first
    return effect.square().sum(1), effect.sum(1).square()


def reference(
    model: torch.nn.Module, tokens: np.ndarray, base: str
) -> tuple[dict[tuple[str, str, str, str], float], float]:
    """d of method.md for every (op, operand, format, noise model), and E[g²], one sample after the other in FP64 sums.

    Of `actual` with a token's errors summed before they are squared, where that differs by more than three standard errors.
    """
    sums: dict[tuple[str, str, str, str], float] = {}
    tokens_of: dict[tuple[str, str, str, str], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    squares = 0.0
    for loss, kept in aliased(model, tokens):
        squares += loss**2
        for (op, operand), u in kept.items():
            granularity = granularity_of(op, operand)
            for noise_model in NOISE_MODELS:
                for name in FORMAT_NAMES:
                    key = (op, operand, name, noise_model)
                    if noise_model == "actual":
                        tokens_of.setdefault(key, []).append(by_token(u, op, operand, name))
                        continue
                    noise = noise_variance(
                        u.detach(), FORMATS[name], noise_model, granularity
                    ).double()
                    noise = noise - noise_variance(u.detach(), FORMATS[base], noise_model).double()
                    d = float((u.grad.double() ** 2 * noise).sum())
                    sums[key] = sums.get(key, 0.0) + d / len(tokens)
    sums |= {key: float(np.mean(of_samples(each))) for key, each in tokens_of.items()}
    return sums, squares / len(tokens)


def of_samples(each: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """What rounding an operand costs each sample, of what `by_token` says of it: a token's errors summed before they are
    squared where that differs, over all samples, by more than three standard errors."""
    apart, together = (torch.cat(t) for t in zip(*each, strict=True))
    more = together - apart
    sure = bool(more.sum().abs() > 3 * more.square().sum().sqrt())
    return [float(sample[sure].sum()) for sample in each]


@pytest.mark.parametrize("model_type", MODELS)
def test_equals_a_slow_reference(model_type: str) -> None:
    """Every op, operand, format and noise model agrees to 1e-4 with autograd on aliases, one sample at a time."""
    model = small_model(model_type, **MODELS[model_type])
    tokens = np.random.default_rng(1).integers(0, 97, (5, 16))
    frame, loss = measure_sensitivity(
        model, ops_of(model), Blocks(tokens), formats=FORMAT_NAMES, base="fp32", batch=3
    )
    expected, mean_square = reference(model, tokens, "fp32")
    got = {
        tuple(r[c] for c in ("op", "operand", "format", "noise_model")): r["loss_mse"]
        for r in frame.iter_rows(named=True)
        if r["format"] != "fp32"
    }
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-4), key
    assert loss["mean_square_loss"][0] == pytest.approx(mean_square, rel=1e-5)


@pytest.mark.parametrize("model_type", MODELS)
def test_kl_equals_a_slow_reference(model_type: str) -> None:
    """b of every op, operand and format, and its standard error over samples, in FP64 from each sample by itself."""
    model = small_model(model_type, **MODELS[model_type])
    tokens = np.random.default_rng(11).integers(0, 97, (5, 16))
    frame, _ = measure_sensitivity(
        model,
        ops_of(model),
        Blocks(tokens),
        formats=FORMAT_NAMES,
        base="fp32",
        batch=3,
        first_layer=False,
    )
    samples: dict[tuple[str, str, str], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for _, kept in aliased(model, tokens, drawn=True):
        for (op, operand), u in kept.items():
            for name in FORMAT_NAMES:
                each = by_token(u, op, operand, name)
                samples.setdefault((op, operand, name), []).append(each)
    rows = frame.filter(pl.col("noise_model") == "actual", pl.col("format") != "fp32")
    assert rows.height == len(samples)
    for op, operand, name, kl, stderr in rows.select(
        "op", "operand", "format", "kl", "kl_stderr"
    ).iter_rows():
        of_each = 15 / 2 * np.array(of_samples(samples[op, operand, name]))
        assert kl == pytest.approx(np.mean(of_each), rel=1e-4), (op, operand, name)
        assert stderr == pytest.approx(np.std(of_each, ddof=1) / math.sqrt(5), rel=1e-3)
    assert frame.filter(pl.col("noise_model") != "actual")["kl"].null_count() > 0
    assert frame.filter(pl.col("format") == "fp32")["kl"].max() == 0


def test_kl_alone_is_the_same() -> None:
    """Asked for alone, KL costs no pass for the loss, whose columns are null; its numbers are those of both together."""
    model = small_model("llama", **MODELS["llama"])
    blocks = Blocks(np.random.default_rng(12).integers(0, 97, (3, 12)))
    options = {"formats": ["int8"], "base": "fp32"}
    both, _ = measure_sensitivity(model, ops_of(model), blocks, **options)
    alone, loss = measure_sensitivity(model, ops_of(model), blocks, measures=["kl"], **options)
    without, _ = measure_sensitivity(model, ops_of(model), blocks, measures=["loss"], **options)
    keys = ["op", "operand", "format", "noise_model"]
    assert alone.sort(keys)["kl"].equals(both.sort(keys)["kl"])
    assert alone["loss_mse"].null_count() == alone.height == without["kl"].null_count()
    assert without.sort(keys)["loss_mse"].equals(both.sort(keys)["loss_mse"])
    assert loss["mean_square_loss"][0] > 0


def test_several_draws_of_labels_are_averaged() -> None:
    """With three draws KL is the mean of three measurements by their seeds, sample by sample, and the loss is as with one;
    sixteen draws leave a smaller spread between seeds, and a smaller standard error."""
    model = small_model("llama", **MODELS["llama"])
    op = "model.layers.1.mlp.down_proj"
    blocks = Blocks(np.random.default_rng(13).integers(0, 97, (6, 12)))
    how = {"formats": ["int8"], "base": "fp32", "batch": 4}

    def kl(seed: int, labels: int) -> pl.DataFrame:
        frame, _ = measure_sensitivity(
            model, [(op, "linear")], blocks, label_seed=seed, labels=labels, **how
        )
        return frame.filter(pl.col("noise_model") == "actual", pl.col("format") == "int8")

    each = [kl(seed, 1) for seed in range(3)]
    together = kl(0, 3)
    assert together["kl"].to_list() == pytest.approx(np.mean([f["kl"] for f in each], 0))
    assert together["loss_mse"].equals(each[0]["loss_mse"])
    alone = [kl(16 * i, 1) for i in range(6)]
    many = [kl(16 * i, 16) for i in range(6)]
    for i in range(2):  # input, weight
        assert np.std([f["kl"][i] for f in many]) < 0.6 * np.std([f["kl"][i] for f in alone])
        errors = [np.mean([f["kl_stderr"][i] for f in of]) for of in (many, alone)]
        assert errors[0] < errors[1]
    with pytest.raises(MpqError, match="one draw or more, got 0"):
        kl(0, 0)


def test_labels_are_drawn_as_predicted() -> None:
    """Each label as often as its probability says; one seed and one text always draw the same."""
    predicted = torch.tensor([0.5, 0.0, 0.2, 0.3]).log().expand(1, 40_000, 4)
    tokens = torch.arange(6)[None]
    labels = drawn_labels(predicted, tokens, 0)
    shares = torch.bincount(labels.flatten(), minlength=4) / 40_000
    torch.testing.assert_close(shares, predicted[0, 0].exp(), atol=0.015, rtol=0)
    assert shares[1] == 0
    assert torch.equal(labels, drawn_labels(predicted, tokens, 0))
    for other in (drawn_labels(predicted, tokens, 1), drawn_labels(predicted, tokens + 1, 0)):
        assert not torch.equal(labels, other)


INT4 = replace(FORMATS["int8"], name="int4", bits=4, maximum=7.0)


def test_an_integer_format_has_its_own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error predicted of a registered int4 is that of its own step: what real rounding gives, (127/7)² times int8's."""
    monkeypatch.setitem(SCHEMES, "int4", Scheme("int4", INT4, INT4, "", ""))
    model = small_model("llama", **MODELS["llama"])
    blocks = Blocks(np.random.default_rng(5).integers(0, 97, (24, 16)))
    op = "model.layers.0.mlp.down_proj"
    frame, _ = measure_sensitivity(
        model, [(op, "linear")], blocks, formats=["int4", "int8"], base="fp32"
    )
    predicted = loss_by_op(frame, "ulp")
    assert predicted[op, "int4"] == pytest.approx(predicted[op, "int8"] * (127 / 7) ** 2, rel=1e-6)
    base = losses(model, blocks)
    measured = evaluate_loss(
        model, {op: "int4"}, blocks, base, base="fp32", seeds=list(range(8))
    ).filter(pl.col("metric") == "loss_mse")
    assert 0.5 < predicted[op, "int4"] / measured["value"].mean() < 2


def test_schemes_have_the_errors_of_their_operands() -> None:
    """The KL of each operand of a linear is ½ T Σ g² e² with the error of that operand's own storage, by autograd alone;
    activations that stay in base have none, and attention's products no row in a scheme of weights."""
    model = small_model("llama", **MODELS["llama"])
    op = "model.layers.1.mlp.down_proj"
    names = ["nvfp4", "w4a16_g32", "fp8_block", "w4a8", "int8"]
    blocks = Blocks(np.random.default_rng(7).integers(0, 97, (2, 12)))
    ops = [(op, "linear"), ("model.layers.0.self_attn.qk_matmul", "bgemm")]
    frame, _ = measure_sensitivity(
        model, ops, blocks, formats=names, base="fp32", batch=1, measures=["kl"]
    )
    kl = {(o, w, f): v for o, w, f, v in frame.select("op", "operand", "format", "kl").iter_rows()}
    assert {f for o, _, f in kl if o == ops[1][0]} == {"fp32", "int8"}
    linear, sums = model.get_submodule(op), dict[tuple[str, str], float]()
    for tokens in blocks.batches(1):
        seen: list[torch.Tensor] = []
        handle = linear.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].detach().requires_grad_()) or (seen[-1],)
        )
        linear.weight.requires_grad_()
        predicted = log_probabilities(model, tokens)
        labels = drawn_labels(predicted, tokens, 0)
        (-of_labels(predicted, labels)).mean().backward()
        handle.remove()
        operands = {"input": (seen[0], seen[0].grad), "weight": (linear.weight, linear.weight.grad)}
        linear.weight.requires_grad_(False)
        for operand, (u, g) in operands.items():
            for name in names:
                scheme = SCHEMES[name]
                fmt = scheme.weights if operand == "weight" else scheme.activations
                if fmt is not None:
                    x = u.detach().squeeze(0) if operand == "input" else u.detach()
                    error = (fake_quantize(x, fmt, "row") - x).square()
                    b = 11 / 2 * float((g.detach().squeeze(0).square() * error).sum()) / 2
                    sums[operand, name] = sums.get((operand, name), 0.0) + b
        linear.weight.grad = None
    for operand, name in itertools.product(("input", "weight"), names):
        want = sums.get((operand, name), 0.0)
        assert kl[op, operand, name] == pytest.approx(want, rel=1e-3), (operand, name)
    assert kl[op, "input", "w4a16_g32"] == 0


def test_zeros_have_no_noise() -> None:
    """A row of zeros is exact in every format: it adds nothing to the error predicted for an integer."""
    model = small_model("llama", **MODELS["llama"])
    weight = model.model.layers[0].mlp.up_proj.weight
    weight[3:] = 0
    zeros = torch.zeros(2, 4)
    assert not noise_variance(zeros, FORMATS["int8"], "ulp").any()
    blocks = Blocks(np.random.default_rng(6).integers(0, 97, (2, 12)))
    frame, _ = measure_sensitivity(
        model, [("model.layers.0.mlp.up_proj", "linear")], blocks, formats=["int8"], base="fp32"
    )
    of_int8 = frame.filter(
        (pl.col("format") == "int8")
        & (pl.col("operand") == "weight")
        & (pl.col("noise_model") == "ulp")
    )
    weight[:3] = 0
    nothing, _ = measure_sensitivity(
        model, [("model.layers.0.mlp.up_proj", "linear")], blocks, formats=["int8"], base="fp32"
    )
    assert of_int8["loss_mse"][0] > 0
    assert nothing.filter(pl.col("operand") == "weight")["loss_mse"].max() == 0


def test_errors_with_signs_in_common_are_summed_before_they_are_squared() -> None:
    """A linear whose inputs all round down: the squares of each element miss what they do together, by the number of
    elements. Inputs that round up and down by turns have nothing in common. The table says both, and how sure it is."""
    gradient = torch.ones(2, 40, 32)
    down = torch.full((2, 40, 32), 0.3)  # in steps of one
    down[..., 0] = 127.0
    apart = down.clone()
    apart[..., 1::2] *= -1
    tally = Tally([get_scheme("int8")])
    with tally.of("kl", 2):
        tally.add_each("down", "input", "row", gradient, down)
        tally.add_each("apart", "input", "row", gradient, apart)
    found = {
        op: estimated(tally.sums["kl"][op, "input"], tally.shared["kl"][op, "input"], 2)
        for op in ("down", "apart")
    }
    assert found["down"].values[-1] == pytest.approx(40 * (31 * 0.3) ** 2, rel=1e-5)
    assert found["down"].shared == pytest.approx([40 * 0.3**2 * (31**2 - 31)], rel=1e-5)
    assert found["apart"].values[-1] == pytest.approx(40 * 0.3**2, rel=1e-4)  # one is left over
    # as sure as if it had been added: signs that are apart take away what the squares have
    assert found["apart"].shared == pytest.approx([40 * (0.3**2 - 31 * 0.3**2)], rel=1e-4)


def test_paper_form_keeps_the_base_noise() -> None:
    """Without the base term, d is s·2^(-2m)/12 exactly (eq. 24), base format included."""
    model = small_model("llama", dtype=torch.bfloat16, **MODELS["llama"])
    blocks = Blocks(np.random.default_rng(4).integers(0, 97, (2, 12)))
    frame, _ = measure_sensitivity(
        model, ops_of(model), blocks, formats=["fp8_e4m3"], base="bf16", base_term=False
    )
    paper = frame.filter(pl.col("noise_model") == "paper")
    for row in paper.iter_rows(named=True):
        m = get_format(row["format"]).mantissa_bits
        assert row["loss_mse"] == pytest.approx(
            row["sensitivity"] * 2.0 ** (-2 * m) / 12, rel=1e-12
        )
