"""What a compressed-tensors checkpoint can say of a plan; what it cannot is told in one sentence, before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mpq.errors import MpqError
from mpq.export.engines import check_engine, split_ties
from mpq.export.skeleton import Skeleton
from mpq.formats.scheme import get_scheme, of_cache
from mpq.running.attention import PRODUCTS
from mpq.serving.schemes import EXPORTED, OF_EXPERTS, stored_as

# experts for transformers, which rounds their weights alone and reads integers where they are packed
_WEIGHTS_ALONE = {"int8": "w8a16", "w4a8": "w4a16", "w4a8_mse": "w4a16_mse"}
# what compressed-tensors 0.20 decompresses to BF16 whatever the model is in (compressors/nvfp4, mx_utils)
_BF16_ONLY = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")


def lowered_linears(
    formats: Mapping[str, str], base: str, model: Skeleton, engine: str
) -> dict[str, str]:
    """The lowered ops of a plan (op → format), all linears or experts, in the model's order; for transformers experts in
    integers are stored as weights alone, which is what it makes of them. What reads a lowered cache is left to cache.py.

    Raises MpqError for attention's products, ops that the model lacks or that are no nn.Linear, formats that the file has
    no scheme for, weights that two linears share, and fused layers of the engine whose parts differ.
    """
    check_engine(engine)
    lowered = {op: f for op, f in formats.items() if f != base and not of_cache([f])}
    if products := [op for op in lowered if op.rpartition(".")[2] in PRODUCTS]:
        raise MpqError(
            f"The plan lowers {len(products)} of attention's products ({products[0]} among them), which a checkpoint cannot express: pin them to base (*.qk_matmul, *.av_matmul), solve again, and export that plan."
        )
    for op, name in lowered.items():
        if op in model.transposed:
            raise MpqError(
                f"{op} is a Conv1D, whose weight lies transposed: compressed-tensors reads nn.Linear alone and transformers would leave its codes as they are, so plans that lower {op} run in mpq only."
            )
        if op in model.expert_ops:
            _check_experts(op, formats, base, model, engine)
            if model.in_vllm_alone and engine != "vllm":
                raise MpqError(
                    f"{op} is lowered in this plan, but of a {model.model_type} vllm alone reads lowered experts: export it for vllm, or solve again with *.experts.* pinned to base."
                )
        elif op not in model.linears:
            raise MpqError(
                f"The model has no linear {op}, which the plan lowers: make the plan for this architecture."
            )
        elif op not in model.plain:
            raise MpqError(
                f"{op} computes more than a product with its weight, and cannot be lowered: pin it to base and solve again."
            )
        if name not in EXPORTED:
            raise MpqError(
                f"{op} runs in {name} in this plan, which a compressed-tensors checkpoint in {base} cannot express: it can hold {', '.join(EXPORTED)}, and all else in its one base format; make the plan with those."
            )
        if base != "bf16" and stored_as(get_scheme(name)) in _BF16_ONLY:
            raise MpqError(
                f"{op} runs in {name} in this plan, which compressed-tensors reads back as BF16, beside {base}, which then does not multiply: make the plan with base bf16."
            )
        shared = model.sharing(f"{op}.weight") - {f"{op}.weight", model.embedding}
        if shared:
            raise MpqError(
                f"{op} shares its weight with {min(shared)}, so that one cannot be lowered without the other: pin both to base and solve again."
            )
    check_ties(formats, base, model, engine)
    if engine == "transformers":
        lowered |= {
            o: _WEIGHTS_ALONE.get(f, f) for o, f in lowered.items() if o in model.expert_ops
        }
        if op := unread_experts(lowered, base, model):
            raise MpqError(
                f"transformers reads experts in fp8_e4m3, or all of a model in one of {', '.join(OF_EXPERTS[engine])} (of 4 bits beside base bf16), but the plan has {op} in {formats[op]}: solve again with that, or with *.experts.* pinned to base, or export it for another engine."
            )
    return {op: lowered[op] for op in (*model.linears, *model.expert_ops) if op in lowered}


def unread_experts(lowered: Mapping[str, str], base: str, model: Skeleton) -> str:
    """An op of experts that transformers does not read back from its file, "" where it reads all of them.

    It takes one group for all experts of a model; experts in base pass by it where it is in FP8, and are lost otherwise. Of some
    models it knows no names for single experts.
    """
    ops = [op for op in model.expert_ops if op in lowered]
    if ops and model.in_vllm_alone:
        return ops[0]
    alike = len({lowered.get(op, base) for op in model.expert_ops}) == 1
    for op in ops:
        scheme = get_scheme(lowered[op])
        packed = stored_as(scheme) in ("pack-quantized", "mxfp4-pack-quantized")
        multiplies = base == "bf16" or scheme.weights.scale == "fp32"
        in_fp8 = all(lowered[o] == "fp8_e4m3" for o in ops)
        if not (in_fp8 or (alike and packed and multiplies)):
            return op
    return ""


def _check_experts(
    op: str, formats: Mapping[str, str], base: str, model: Skeleton, engine: str
) -> None:
    """Raise MpqError for experts in a format that is none of theirs, or that differs within a layer
    where the engine has one; what the plan does not name is in `base`."""
    name, owner = formats[op], op.rpartition(".")[0]
    if name not in OF_EXPERTS.get(engine, ()):
        can = ", ".join(OF_EXPERTS.get(engine, ()))
        told = f"experts for {engine} in {can} alone" if can else f"no experts for {engine}"
        raise MpqError(
            f"{op} runs in {name} in this plan, but mpq writes {told}: solve again with *.experts.* pinned to base{', or to one of those' if can else ''}."
        )
    of_layer = (o for o in model.expert_ops if o.rpartition(".")[0] == owner)
    other = next((o for o in of_layer if formats.get(o, base) != name), None)
    if other and engine != "transformers":
        raise MpqError(
            f"{engine} has one format for all experts of a layer, but the plan has {op} in {name} and {other} in {formats.get(other, base)}: it would answer wrongly; tie them and solve again, or export with --engine transformers."
        )


def check_ties(formats: Mapping[str, str], base: str, model: Skeleton, engine: str) -> None:
    """Raise MpqError where the engine would multiply linears of different formats in one product."""
    broken = list(split_ties(formats, model.linears, base, engine))
    if broken:
        layer, chosen = broken[0]
        found = ", ".join(f"{op.rpartition('.')[2]} in {name}" for op, name in chosen.items())
        parent = next(iter(chosen)).rpartition(".")[0]
        more = f" ({len(broken)} fused layers differ so)" if len(broken) > 1 else ""
        raise MpqError(
            f"{engine} multiplies {', '.join(op.rpartition('.')[2] for op in chosen)} of {parent} in one product ({layer.into}), but the plan has {found}{more}: it would take one format for all and answer wrongly; tie them and solve again, or export with --engine transformers."
        )


def check_held(
    lowered: Mapping[str, str],
    model: Skeleton,
    form: str,
    held: Collection[str],
    of_experts: Collection[str] = (),
) -> None:
    """Raise MpqError for schemes of linears other than the `held` ones, and of experts other than those `of_experts`, in a `form` of
    checkpoint."""
    for op, name in lowered.items():
        if op in model.expert_ops:
            if name not in of_experts or model.in_vllm_alone:
                known = "" if model.in_vllm_alone else ", ".join(of_experts)
                can = f"experts in {known} alone" if known else "no lowered experts of this model"
                raise MpqError(
                    f"{op} runs in {name} in this plan, but {form} has {can}: export to compressed-tensors, or pin *.experts.* to base and solve again."
                )
            continue
        if name not in held:
            raise MpqError(
                f"{op} runs in {name} in this plan, which {form} cannot express: it can hold {', '.join(held)}; make the plan with those, or export to compressed-tensors."
            )
