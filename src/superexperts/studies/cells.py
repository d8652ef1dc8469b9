"""How a cell of a study is run.

A cell is one command with its settings and its own folder. Every command knows from the hashes of its inputs whether
its result is up to date, so running a finished cell again only costs that check. This is the one module of a study that
runs other commands.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from superexperts.adapters import export
from superexperts.adapters.borrow import ModelCache
from superexperts.adapters.export import ExportConfig
from superexperts.core.errors import OptionError
from superexperts.core.runs import completed, new_folder, write_json, write_manifest
from superexperts.core.types import ExpertSet
from superexperts.data.corpora import takes_column
from superexperts.evaluation import evaluate
from superexperts.evaluation.evaluate import EvaluateConfig
from superexperts.extraction import extract
from superexperts.extraction.extract import ExtractConfig
from superexperts.extraction.judge import Judge
from superexperts.pocket import write_data
from superexperts.profiling import profile, select
from superexperts.profiling.profile import ProfileConfig
from superexperts.profiling.select import SelectConfig
from superexperts.results.variants import Run
from superexperts.studies.cell_list import Cell, judged_here, needs_checkpoints
from superexperts.studies.plan import Plan, expert_files, reads
from superexperts.surgery import prune
from superexperts.surgery.prune import PruneConfig
from superexperts.training import train
from superexperts.training.resume import checkpoints_folder
from superexperts.training.train import TrainConfig

__all__ = ["Worker", "extraction_settings"]


def extraction_settings(plan: Plan, folder: Path, device: str = "auto") -> ExtractConfig:
    """The settings of `extract` for the run in `folder`."""
    return ExtractConfig(folder=folder, device=device, **plan.extraction)


class Worker:
    """Runs cells of one study in this process. Runs that differ only in silenced experts or adapter share one model."""

    def __init__(self, plan: Plan, out: Path, device: str = "auto") -> None:
        self.plan, self.out, self.device = plan, out, device
        self.runs = {run.name: run for run in plan.runs}
        self.models = ModelCache()
        self.data_dir = Path(plan.data_dir) if plan.data_dir else None
        self.train_data = Path(plan.train_data) if plan.train_data else None
        if plan.data_dir == "pocket":
            self.data_dir, self.train_data = out / "data", self.train_data or out / "data" / "train.json"
        self._judge: Judge | None = None

    def work(self, cell: Cell) -> None:
        """Run a cell; it returns at once if its result is up to date."""
        if cell.run is None:
            {"data": self._data, "profile": self._profile, "select": self._select}[cell.stage]()
            return
        run = self.runs[cell.run]
        {
            "train": self._train,
            "checkpoint": self._checkpoint,
            "evaluate": self._evaluate,
            "extract": self._extract,
        }[cell.stage](run)

    def _folder(self, run: Run) -> Path:
        return self.out / "variants" / run.name

    def _experts(self, stem: str) -> str:
        return str(self.out / "experts" / f"{stem}.json")

    def _data(self) -> None:
        if not completed(self.out / "data", "pocket-data", {}):
            with new_folder(self.out / "data", "pocket-data") as folder:
                write_data(folder)
                write_manifest(folder, "pocket-data", {}, [file.name for file in sorted(folder.iterdir())], 0)

    def _profile(self) -> None:
        plan = self.plan
        self.models.clear()
        profile.run(
            ProfileConfig(
                overwrite=True,
                model=plan.model,
                revision=plan.revision,
                corpus=plan.corpus,
                out=self.out / "profile",
                tokens=plan.tokens,
                seq_len=plan.seq_len,
                depth=plan.depth,
                data_dir=None if plan.data_dir == "pocket" else self.data_dir,
                device=self.device,
                **plan.profile,
            )
        )

    def _select(self) -> None:
        plan = self.plan
        for stem, (name, seed) in expert_files(plan).items():
            options: dict[str, Any] = dict(plan.experts[name])
            file = Path(self._experts(stem))
            if "experts" in options:
                write_json(file, ExpertSet.parse(options["experts"]).to_json())
                continue
            if options.get("like") in plan.experts:
                options["like"] = self._experts(options["like"])
            if reads(options, "depth"):
                options["depth"] = plan.depth
            if plan.drawn(name):
                options["seed"] = seed
            select.run(SelectConfig(profile=self.out / "profile", out=file, **options))

    def _train(self, run: Run) -> None:
        plan = self.plan
        assert self.train_data is not None
        config = TrainConfig(
            overwrite=True,
            model=plan.model,
            revision=plan.revision,
            data=self.train_data,
            experts=self._experts(run.experts) if run.experts else None,
            attention=run.experts is None,
            out=self._folder(run) / "train",
            seed=run.seed,
            device=self.device,
            **plan.training_of(run),
        )
        less_memory = config.load_in_4bit or config.offload
        if less_memory:
            self.models.clear()
        load = None if less_memory else self.models.take
        if checkpoints_folder(config.out).is_dir():  # an earlier training was killed
            with contextlib.suppress(OptionError):  # that training had other settings
                train.train(dataclasses.replace(config, resume=True), load=load)
        train.train(config, load=load)

    def _checkpoint(self, run: Run) -> None:
        """Write the variant as a checkpoint, for engines that cannot silence experts or attach our adapters."""
        plan, out = self.plan, self._folder(run) / "model"
        self.models.clear()
        if run.kind == "prune":
            assert run.experts is not None
            experts = self._experts(run.experts)
            prune.run(PruneConfig(model=plan.model, revision=plan.revision, experts=experts, out=out, overwrite=True))
        else:
            adapter = self._folder(run) / "train" / "adapter"
            export.run(ExportConfig(adapter=adapter, format="merged", out=out, overwrite=True))

    def _evaluate(self, run: Run) -> None:
        plan, built = self.plan, needs_checkpoints(self.plan) and run.kind != "base"
        if needs_checkpoints(plan):
            self.models.clear()
        lora, pruned = run.kind == "lora" and not built, run.kind == "prune" and not built
        options: dict[str, Any] = {**plan.asking, "perplexity": plan.perplexity}
        takes = plan.perplexity is not None and takes_column(plan.perplexity)
        options["column"] = plan.perplexity_column if takes else None
        if plan.perplexity is not None:
            options["seq_len"] = plan.seq_len
            if not options.get("reference_windows"):
                options["tokens"] = plan.tokens
        evaluate.run(
            EvaluateConfig(
                overwrite=True,
                model=str(self._folder(run) / "model") if built else plan.model,
                revision=None if built else plan.revision,
                adapter=self._folder(run) / "train" / "adapter" if lora else None,
                silence=self._experts(run.experts) if pruned and run.experts else None,
                tasks=",".join(plan.tasks),
                out=self._folder(run),
                limit=plan.limit,
                max_new_tokens=plan.max_new_tokens,
                variant=run.name,
                data_dir=self.data_dir,
                seed=plan.seed,
                device=self.device,
                **options,
            ),
            load=self.models.take,
        )

    def _extract(self, run: Run) -> None:
        config = extraction_settings(self.plan, self._folder(run), self.device)
        if judged_here(self.plan):
            self.models.clear()  # a judge with 32 B parameters needs the memory
        # One judge and one file of its verdicts for all runs, since variants often give the same answers.
        self._judge = self._judge or extract.judge_of(config, self.out / "judge.jsonl")
        extract.run(config, self._judge)
