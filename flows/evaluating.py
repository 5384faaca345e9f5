"""What plans really do: a task for each plan, seed and text or harness task, so that a sweep goes on where it was cut off."""

from __future__ import annotations

from typing import Any

from mpq.flows.planning import Planning, code_of
from mpq.flows.stages import Call
from mpq.store.entries import TableRef, content_key
from mpq.tasks import evaluation
from mpq.tasks.stage import read

# the modules of mpq by which a model runs under an emulated plan
EMULATION = (
    "models.checkpoint",
    "models.quantized",
    "models.linears",
    "loss.cross_entropy",
    "running.apply",
    "models.attention",
    "formats.format",
    "formats.quantize",
    "kernels.emulated",
    "kernels.rounding",
    "kernels.compiler",
)
Plans = list[dict[str, Any]]


class Evaluating(Planning):
    """The stages from plans to the evaluation table."""

    def evaluate(
        self, groups: TableRef, plans: Plans, blocks: TableRef, architecture: str
    ) -> TableRef:
        """The evaluation table. Plans with equal formats are evaluated once, whatever strategy or τ made them."""
        from mpq.kernels import runs_natively

        distinct = {content_key(p["formats"]): p["formats"] for p in plans}
        names = {
            content_key(p["formats"]): f"{p['strategy']} {p['objective']} τ={p['tau']:g}"
            for p in reversed(plans)
        }
        measured = {k: [*of_text] for k, of_text in self._losses(distinct, names, blocks).items()}
        for k, of_tasks in self._tasks(distinct, names).items():
            measured[k] += of_tasks
        kinds = dict(read(groups).select("op", "kind").iter_rows())
        where = (kinds, self.spec.model.base, self.spec.model.device)
        native = {
            k: f
            for k, f in distinct.items()
            if "et" in self.objectives and self.stages.place.ask(runs_natively, f, *where)
        }
        ttft = (
            self.time_plans(groups, list(native.values()), self.held_out.ttft_repeats, architecture)
            if native
            else None
        )
        timed = {k: i for i, k in enumerate(native)}
        rows = [
            {
                **{c: p[c] for c in ("strategy", "objective", "tau", "seed")},
                "measured": measured[k],
                "ttft": timed.get(k),
            }
            for p in plans
            for k in [content_key(p["formats"])]
        ]
        content = [{**row, "measured": [r.sha256 for r in row["measured"]]} for row in rows]
        return self.stages.run_one(
            "collect",
            (
                evaluation.collect_evaluation,
                content_key(content, ttft and ttft.sha256, code_of("store.tables")),
                f"collect {self.spec.title}",
                {"plans": rows, "ttft": ttft},
            ),
        )["evaluation"]

    def _losses(
        self, distinct: dict[str, dict[str, str]], names: dict[str, str], blocks: TableRef
    ) -> dict[str, list[TableRef]]:
        """Loss MSE, drift and perplexity on the held-out text, a table a plan and seed, in the order of `distinct`."""
        part, code = self.held_out, code_of("evaluation.losses", *EMULATION)
        base_losses = self.stages.run_one(
            "evaluate base",
            (
                evaluation.evaluate_base,
                content_key(self.content, blocks.sha256, code),
                f"evaluate base {self.spec.title}",
                {"model": self.model, "blocks": blocks, "batch": part.batch},
            ),
            "workers",
        )["base_losses"]
        calls: list[Call] = [
            (
                evaluation.evaluate_plan,
                content_key(formats, self.content, blocks.sha256, seed, code),
                f"evaluate {self.spec.title} {names[k]} seed {seed}",
                {
                    "model": self.model,
                    "formats": formats,
                    "blocks": blocks,
                    "base_losses": base_losses,
                    "seed": seed,
                    "batch": part.batch,
                    "what": names[k],
                },
            )
            for k, formats in distinct.items()
            for seed in range(part.seeds)
        ]
        results = [r["plan_losses"] for r in self.stages.run("evaluate", calls, "workers")]
        return _by_plan(distinct, results)

    def _tasks(
        self, distinct: dict[str, dict[str, str]], names: dict[str, str]
    ) -> dict[str, list[TableRef]]:
        """Scores on the harness's tasks, a table a plan, seed and task; keyed by the datasets' content where they are local."""
        from mpq.evaluation.task_data import data_key, harness_version

        part = self.held_out
        if not part.tasks:
            return {}
        code, harness = (
            code_of("evaluation.harness", "evaluation.task_data", *EMULATION),
            harness_version(),
        )
        data = {task: data_key([task], part.data_dir) for task in part.tasks}
        key = {
            task: content_key(self.content, task, data[task], part.task_limit, harness, code)
            for task in part.tasks
        }
        asked = {
            task: {
                "model": self.model,
                "task": task,
                "data": data[task],
                "data_dir": part.data_dir,
                "limit": part.task_limit,
                "batch": part.batch,
            }
            for task in part.tasks
        }
        base = self.stages.run(
            "tasks base",
            [
                (
                    evaluation.evaluate_base_task,
                    content_key("base", key[task]),
                    f"{task} base {self.spec.title}",
                    asked[task],
                )
                for task in part.tasks
            ],
            "workers",
        )
        calls: list[Call] = [
            (
                evaluation.evaluate_plan_task,
                content_key(formats, seed, key[task]),
                f"{task} {self.spec.title} {names[k]} seed {seed}",
                {
                    **asked[task],
                    "formats": formats,
                    "seed": seed,
                    "base_scores": scores["task_scores"],
                    "what": names[k],
                },
            )
            for k, formats in distinct.items()
            for seed in range(part.seeds)
            for task, scores in zip(part.tasks, base, strict=True)
        ]
        results = [r["plan_tasks"] for r in self.stages.run("tasks", calls, "workers")]
        return _by_plan(distinct, results)


def _by_plan(
    distinct: dict[str, dict[str, str]], results: list[TableRef]
) -> dict[str, list[TableRef]]:
    each = len(results) // max(1, len(distinct))
    return {k: results[i * each : (i + 1) * each] for i, k in enumerate(distinct)}
