"""The training loop: build, resume, update, log, checkpoint, evaluate."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dmdr_fast.algorithm.recipe import Decode, Recipe, RewardModel
from dmdr_fast.algorithm.step import Outcome, dmdr_update
from dmdr_fast.algorithm.streams import Shard, Streams
from dmdr_fast.algorithm.update import Update
from dmdr_fast.cli import dump
from dmdr_fast.config import Config
from dmdr_fast.disk import refusal
from dmdr_fast.engine import inputs, runtime
from dmdr_fast.engine.checkpoint import CheckpointFolder, Trained
from dmdr_fast.engine.compute import compiled_graphs
from dmdr_fast.engine.conditions import Conditions, build_conditions, drawn
from dmdr_fast.engine.engines import DTYPES
from dmdr_fast.engine.evaluation import Evaluator, Shown, drop_evaluations_after
from dmdr_fast.engine.finished import COLD_START, FINAL, SETTINGS, is_finished
from dmdr_fast.engine.go_on import resume_command
from dmdr_fast.engine.identity import run_settings
from dmdr_fast.engine.logs import RunLog
from dmdr_fast.engine.memory import build_probe
from dmdr_fast.engine.model import Model, open_model
from dmdr_fast.engine.monitors import CollapseMonitor
from dmdr_fast.engine.networks import Roles, build_roles
from dmdr_fast.engine.recipe import describe, learning_rates, recipe_of, table_text
from dmdr_fast.engine.reward_weight import RewardWeight, first_rl_loss
from dmdr_fast.engine.rewards import RewardError, RewardSet
from dmdr_fast.engine.run_lock import lock_run
from dmdr_fast.engine.score import Rounding, can_measure, rounding_line, score_rounding, take_overflow
from dmdr_fast.engine.shards import EMA, save_generator
from dmdr_fast.engine.starts import read_starts
from dmdr_fast.engine.stopping import StopRequest
from dmdr_fast.engine.summary import SUMMARY, origin, write_summary
from dmdr_fast.engine.telemetry import Telemetry
from dmdr_fast.errors import RunEnded
from dmdr_fast.eval.report import write_report


def train(config: Config) -> None:
    """Run the whole job of ``config``: see the README for what it leaves in run_dir.

    Raises:
        UserError: something in the configuration or on disk must be changed.
        RunEnded: ``train.max_skipped`` updates in a row had non-finite gradients, a reward failed, or a monitor saw
            collapse and ``train.stop_on_collapse`` is set: a checkpoint was written. Or the disk refuses a file.
    """
    with StopRequest(config.run_dir / "stop" if os.environ.get("RANK", "0") == "0" else None) as stop:
        ranks = runtime.start()
        lock = lock_run(config.run_dir, ranks)
        try:
            model = open_model(config)
            checkpoints = CheckpointFolder(config, run_settings(config, model, ranks), ranks)
            start = checkpoints.find(config.resume)
            changes = [] if start is None else checkpoints.changes(start)
            for change in changes:
                ranks.say(f"since the checkpoint: {change}")
            if is_finished(config, checkpoints.settings, start, changes, ranks):
                ranks.say(
                    f"nothing to do: {config.run_dir} is finished; raise train.generator_steps to go on, name another "
                    "run_dir for another run, or start anew with --resume never"
                )
                return
            _run(Run.build(config, model, ranks, checkpoints, start), stop)
        except Exception as error:
            if (fault := refusal(error)) is None:
                raise
            raise RunEnded(
                f"a file cannot be written ({fault}). Free some space, and go on with --resume auto"
            ) from None
        finally:
            if lock is not None:
                lock.release()


def _run(run: Run, stop: StopRequest) -> None:
    try:
        stop.finishes()
        if run.updates(stop):
            rest = resume_command(run.config.run_dir)
            stop.leaves(f"in the final evaluation; the weights are whole, for the rest: {rest}")
            run.finish()
    finally:
        if run.rewards is not None:
            run.rewards.close()


@dataclass
class Run:
    """One run on one rank: what it is made of, and where it stands."""

    config: Config
    now: Config  # of the update that is made, or was last: ``config`` with the phases that had begun
    ranks: runtime.Runtime
    model: Model
    conditions: Conditions  # trained on
    shown: Conditions  # of the evaluation
    recipe: Recipe
    weight: RewardWeight
    streams: Streams
    roles: Roles
    ema: EMA | None
    rewards: RewardSet | None
    decoder: Decode
    monitor: CollapseMonitor
    evaluation: inputs.EvaluationData | None
    checkpoints: CheckpointFolder
    log: RunLog
    telemetry: Telemetry
    origin: dict[str, str | None]  # of the process, for the report; empty but on rank 0
    step: int
    skipped: int = 0
    skipped_in_a_row: int = 0
    pending: list[dict[str, Tensor]] = field(default_factory=list)  # metrics since the last flush, on the device
    began_at: float = 0.0  # on the monotonic clock, had the run never stopped
    flushed_at: float = 0.0
    elapsed: float = 0.0  # seconds from the first update on to the last flush, those before a resume included
    samples_seen: int = 0  # by this process, over all ranks
    samples_flushed: int = 0  # those before the last flush

    @classmethod
    def build(
        cls,
        config: Config,
        model: Model,
        ranks: runtime.Runtime,
        checkpoints: CheckpointFolder,
        resume_from: Path | None,
    ) -> Run:
        """Build every part, resume from a checkpoint where there is one, and print the effective recipe once."""
        streams, starts = Streams(config.seed), read_starts(config, ranks) if resume_from is None else {}
        conditions, shown = build_conditions(config, model, ranks)
        rewards = inputs.build_rewards(config, model.num_classes, ranks.device)
        seed = int(streams.rng("lora").integers(2**31))
        roles = build_roles(config, model, conditions, ranks, lora_seed=seed, starts=starts)
        ema = None if config.student.ema is None else EMA(roles.generator.trained, config.student.ema)
        state: dict[str, Any] = {"step": 0, "counters": {}}
        if resume_from is not None:
            state = checkpoints.load(resume_from, Trained(_trained(roles), ema))
            if rewards is not None:
                rewards.load_state_dict(state["rewards"])
            ranks.say(f"resumed from {resume_from}, step {state['step']}")
        monitor = CollapseMonitor(config.monitors, state["counters"].pop("beyond", {}))
        weight = RewardWeight(ranks)
        weight.load_state_dict(state["counters"].pop("reward_weight", weight.state_dict()))
        checkpoints.drop_after(state["step"])
        now = config.at(state["step"])
        run = cls(
            config=config,
            now=now,
            ranks=ranks,
            model=model,
            conditions=conditions,
            shown=shown,
            recipe=recipe_of(now, model),
            weight=weight,
            streams=streams,
            roles=roles,
            ema=ema,
            rewards=rewards,
            decoder=model.decoder(ranks.device),
            monitor=monitor,
            evaluation=inputs.build_evaluation(config),
            checkpoints=checkpoints,
            log=RunLog(
                config.run_dir,
                total_steps=config.train.generator_steps,
                start_step=state["step"],
                wandb=config.log.wandb,
                enabled=ranks.is_main,
            ),
            telemetry=Telemetry(ranks.device),
            origin=origin() if ranks.is_main else {},
            step=state["step"],
            **state["counters"],
        )
        if ranks.is_main:
            (config.run_dir / "config.yaml").write_text(dump(config))
            (config.run_dir / SUMMARY).unlink(missing_ok=True)  # that of a run that was finished
            drop_evaluations_after(config.run_dir, run.step)
        ranks.say(describe(config, run.step, run.recipe, roles, ranks))
        if can_measure(config):
            ranks.say(rounding_line(run._rounding(), config))
        return run

    def updates(self, stop: StopRequest) -> bool:
        """Generator updates until the last one, then the final weights (True), or until asked to stop (False)."""
        config, ranks = self.config, self.ranks
        data = drawn(self.conditions, self.streams)
        chunk = config.rl.refl_options.chunk
        reward = None if self.rewards is None else RewardModel(self.decoder, self._score, chunk)
        self.flushed_at = time.monotonic()
        self.elapsed = self.log.elapsed_before
        self.began_at = self.flushed_at - self.elapsed
        if config.resume == "auto" and self._evaluation_due and not self._evaluator().has_row(self.step):
            self._evaluate(stop)  # the run was stopped in it
        while self.step < config.train.generator_steps:
            self._begin_update()
            shards = self._shards()
            update = Update(
                recipe=self.recipe,
                streams=self.streams,
                networks=self.roles.networks,
                data=data,
                reward=reward,
                shards=shards,
                device=ranks.device,
                step=self.step,
                gather=ranks.global_batch,
            )
            outcome = dmdr_update(self._weighted(update))
            overflow = take_overflow(self.roles.scorers)
            if overflow is not None:
                outcome.metrics["score_overflow"] = overflow
            if self.rewards is not None and self.recipe.method_at(self.step).uses_reward:
                self.rewards.end_update(ranks.sum)
            self.step += 1
            self.samples_seen += shards[0].total
            self._account(outcome)
            ends = (config.train.cold_start_steps, config.train.generator_steps)
            due = self.step % config.checkpoint.every == 0 or self.step in ends
            asked = ranks.any(stop.asked)
            if due or asked or self.step % config.log.every == 0:
                self._flush()
            if self._evaluation_due and not asked:
                asked = self._evaluate(stop)
            if due or asked:
                self._checkpoint()
            if asked:
                self.log.close()
                ranks.say(f"stopped at step {self.step}; to go on: {resume_command(config.run_dir)}")
                return False
        self._snapshot_cold_start()
        settings = config.run_dir / SETTINGS
        if ranks.is_main:
            settings.unlink(missing_ok=True)
        self._save_generator(config.run_dir / FINAL, DTYPES[config.export.dtype])
        if ranks.is_main:
            settings.write_text(json.dumps(self.checkpoints.settings, indent=1))
        return True

    @property
    def _evaluation_due(self) -> bool:
        evaluation = self.config.eval
        return bool(evaluation.every and evaluation.samples and self.step and self.step % evaluation.every == 0)

    def _evaluate(self, stop: StopRequest) -> bool:
        """Measure and show the generator as it is; True, and maybe nothing done, where the run is asked to stop."""

        def asked() -> bool:
            return self.ranks.any(stop.asked)

        try:
            self._show(self._evaluator().append(self._role_in_training(), self.step, asked))
        except RewardError as error:
            self._end(str(error), "fix the reward and go on with --resume auto")
        return asked()

    def _show(self, shown: Shown | None) -> None:
        if shown is not None:
            self.log.evaluation(self.step - 1, shown.row, shown.sheet)

    def _begin_update(self) -> None:
        """What changes with the step: the phases, the cold start, the reference, rates, batch, weights of rewards."""
        self._snapshot_cold_start()
        if any(phase.start == self.step for phase in self.config.phases):
            self.now = self.config.at(self.step)
            self.recipe = recipe_of(self.now, self.model)
            self.ranks.say(f"phase at step {self.step}: {', '.join(self.config.switches[self.step])}")
        if self.roles.frozen_reference is not None and self.step >= self.config.train.cold_start_steps:
            self.roles.frozen_reference.load(self._cold_start_weights)
        optimizer, train = self.now.optimizer, self.now.train
        lengths = self.step, train.cold_start_steps, train.generator_steps
        before = self.config.fake_updates_before(self.step)
        self.roles.generator.set_lr(learning_rates(optimizer.generator, *lengths))
        self.roles.fake.set_lr(learning_rates(optimizer.fake, *lengths, train.fake_updates, before))
        for role in _trained(self.roles).values():
            role.set_batch(train.micro_batch_size, train.gradient_accumulation)
        if self.rewards is not None:
            self.rewards.weights = [term.weight for term in self.now.reward.terms]

    def _shards(self) -> list[Shard]:
        """This rank's micro-batches of the global batch."""
        train, ranks = self.now.train, self.ranks
        batch, count = train.micro_batch_size, train.gradient_accumulation
        return [Shard.of_rank(ranks.rank, ranks.world_size, batch, m, count) for m in range(count)]

    def _weighted(self, update: Update) -> Update:
        """The update at the weight of ``reward.weight: auto``, which is found once, as RL starts."""
        if self.now.reward.weight != "auto" or not self.recipe.rl_active(self.step):
            return update
        if self.weight.value is None:
            assert self.rewards is not None  # RL has some
            rewards = self.rewards
            alone = RewardModel(self.decoder, lambda images, given, batch: rewards.score(images, given, batch=batch))
            loss = first_rl_loss(replace(update, reward=alone))
            self._look_at_rewards()
            try:
                value = self.weight.match(loss)
            except ValueError as error:
                self._end(str(error), "go on with --resume auto")
            self.ranks.say(f"step {self.step}: reward.weight {value!r} (auto)")
        assert self.weight.value is not None
        self.recipe = replace(self.recipe, reward_weight=self.weight.value)
        return replace(update, recipe=self.recipe)

    def _score(self, images: Tensor, given: dict, batch: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards for the update: the total, each by its name in the log, held-out ones where a log line is due."""
        assert self.rewards is not None  # RL has some
        total, each = self.rewards.score(images, given, batch=batch)
        named = {f"reward_{name}": values for name, values in each.items()} if len(each) > 1 else {}
        if (self.step + 1) % self.config.log.every == 0:
            held_out = self.rewards.held_out_scores(images, given, batch=batch)
            named |= {f"held_out_{name}": values for name, values in held_out.items()}
        return total, named

    def _rounding(self) -> Rounding:
        """How much of the DMD gradient is the rounding of the score pass, now."""
        roles, config = self.roles, self.config
        probe = build_probe(self.model, self.conditions, config, self.ranks.device)
        return score_rounding(roles.networks.score, roles.scorers, roles.generator, probe, self.recipe, self.step)

    def finish(self) -> None:
        """Write the evaluation and the report."""
        config, final = self.config, self.config.run_dir / FINAL
        table = None
        if self._evaluates:
            generators = {"cold_start": self._cold_start_weights, "dmdr": final}
            generators = {name: path for name, path in generators.items() if path.is_file()}
            try:
                table, shown = self._evaluator().run(self.roles.teacher, generators, self.step)
            except RewardError as error:
                self.log.close()
                raise RunEnded(
                    f"{error}. The weights are in {final}; fix the reward and go on with --resume auto"
                ) from None
            if not self._evaluation_due:  # which has shown it
                self._show(shown)
        self.log.close()
        if table is not None:
            self.ranks.say(table_text(table))
        if self.ranks.is_main:
            write_summary(
                config,
                self.ranks,
                self.origin,
                self.roles.trained_parameters,
                updates=self.step,
                skipped=self.skipped,
                elapsed=self.elapsed,
            )
            self.ranks.say(f"weights: {final}")
            if config.log.report:
                self.ranks.say(f"report: {write_report(config.run_dir)}")
        self.ranks.barrier()

    @property
    def _evaluates(self) -> bool:
        """Classes are compared with real images or not at all; prompts show images and rewards."""
        return self.evaluation is not None or (self.config.eval.samples > 0 and self.model.num_classes is None)

    def _evaluator(self) -> Evaluator:
        data = None if self.evaluation is None else self.evaluation.to(self.ranks.device)
        return Evaluator(self.config, self.ranks, self.model, self.shown, self.decoder, self.rewards, data, self.recipe)

    def _save_generator(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        merges = self.model.merges_lora
        save_generator(self.roles.generator, self.ema, path, self.ranks, merges_lora=merges, dtype=dtype)

    def _role_in_training(self) -> Path:
        """The weights that would be saved now, in a file that the next evaluation overwrites."""
        path = self.config.run_dir / "evaluated.safetensors"
        self._save_generator(path)
        return path

    @property
    def _cold_start_weights(self) -> Path:
        return self.config.run_dir / COLD_START

    def _snapshot_cold_start(self) -> None:
        if self.step == self.config.train.cold_start_steps:
            self._save_generator(self._cold_start_weights)

    def _account(self, outcome: Outcome) -> None:
        """EMA and skip counters after one update; ends a run that no longer moves."""
        self.pending.append(outcome.metrics)
        if self.config.reward.weight == "auto" and not self.recipe.rl_active(self.step - 1):
            self.weight.note(outcome.metrics["dmd_loss"])
        if self.ema is not None and "generator" not in outcome.skipped:
            self.ema.update()
        if not outcome.skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        cause = diagnosis(outcome, self.roles, self.ranks)
        self.ranks.say(f"step {self.step}: update of {cause} skipped, {self.skipped_in_a_row} in a row")
        self._look_at_rewards()
        if self.skipped_in_a_row >= self.config.train.max_skipped:
            self._end(
                f"{self.skipped_in_a_row} updates in a row were skipped (train.max_skipped): {cause}",
                "lower optimizer.*.lr or reward.weight, or go back to an earlier checkpoint with --resume PATH",
            )

    def _look_at_rewards(self) -> None:
        """End the run if a reward failed on any rank: its NaN had this update skipped everywhere, nothing is lost."""
        errors = self.ranks.gather(None if self.rewards is None else self.rewards.first_error())
        error = next((str(e) for e in errors if e is not None), None)
        if error is not None:
            self._end(error, "fix the reward and go on with --resume auto")

    def _end(self, reason: str, remedy: str) -> NoReturn:
        try:
            self._checkpoint()
        except RunEnded as error:
            raise RunEnded(f"{reason.rstrip('.')}. Then {error}") from None
        self.log.close()
        raise RunEnded(f"{reason.rstrip('.')}. A checkpoint of step {self.step} was written; {remedy}")

    def _flush(self) -> None:
        """Fetch the metrics of the updates since the last flush and log their mean."""
        if not self.pending:
            return
        names = sorted(set().union(*self.pending))
        stacked = torch.stack([torch.stack([m[n].float() for m in self.pending if n in m]).nanmean() for n in names])
        values = dict(zip(names, self.ranks.nanmean(stacked).tolist(), strict=True))
        now, samples = time.monotonic(), self.samples_seen - self.samples_flushed
        self.samples_flushed = self.samples_seen
        self.elapsed = now - self.began_at
        alpha, beta = self.recipe.renoise.beta(self.step - 1)
        values |= {
            "samples_per_second": samples / (now - self.flushed_at),
            "elapsed_seconds": self.elapsed,
            "skipped": float(self.skipped),
            "renoise_alpha": alpha,
            "renoise_beta": beta,
            "real_lora_scale": self.recipe.real_scale(self.step - 1),
        }
        for name, role in _trained(self.roles).items():
            values |= {f"{name}_grad_norm": role.gradient_norm, f"{name}_lr": role.lr}
            role.gradient_norm = math.nan  # a role that takes no step until the next line has none in it
        if graphs := compiled_graphs():
            values["compilations"] = float(graphs)
        if self.roles.graphs is not None:
            values["cuda_graphs"] = float(self.roles.graphs.count)
        values |= {f"{n}_loss_scale": r.loss_scale for n, r in _trained(self.roles).items() if r.loss_scale is not None}
        if self.config.monitors.max_score_rounding is not None and can_measure(self.config):
            values["score_rounding"] = self._rounding().error
        values |= self.telemetry.sample(self.samples_seen // self.ranks.world_size)
        phase = "dmdr" if self.recipe.rl_active(self.step - 1) else "cold_start"
        if self.recipe.method_at(self.step - 1).uses_reward:
            values["reward_weight"] = self.recipe.rl_weight(self.step - 1)
        self.log.log(self.step - 1, phase, {n: v for n, v in values.items() if math.isfinite(v)})
        self.pending.clear()
        self.flushed_at = now
        warnings, collapse = self.monitor.look(values)
        for warning in warnings:
            self.ranks.say(f"step {self.step}: {warning}")
        if self.rewards is not None:
            self._look_at_rewards()
        if collapse is not None and self.config.train.stop_on_collapse:
            self.monitor.in_a_row.clear()  # who goes on from here has changed something
            self._end(
                f"collapse: {collapse}, {self.config.monitors.patience} log intervals in a row",
                "lower reward.weight or raise what holds the generator (rl.regularizer, rl.kl_weight), and go on from "
                "an earlier checkpoint with --resume PATH",
            )

    def _checkpoint(self) -> None:
        counters: dict[str, Any] = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        counters["beyond"] = self.monitor.in_a_row
        if self.config.reward.weight == "auto":
            counters["reward_weight"] = self.weight.state_dict()
        rewards = {} if self.rewards is None else self.rewards.state_dict()
        self.checkpoints.save(self.step, Trained(_trained(self.roles), self.ema), counters, rewards)


def _trained(roles: Roles) -> dict:
    return {"generator": roles.generator, "fake": roles.fake}


def diagnosis(outcome: Outcome, roles: Roles, ranks: runtime.Runtime) -> str:
    """Which role was skipped and why. Fetches the metrics: only on a skipped update."""
    metrics = {n: v for n, v in outcome.metrics.items() if n != "diversity"}  # NaN where a batch has no two of a class
    bad = [n for n, v in metrics.items() if not torch.isfinite(v).item()]
    found = ranks.gather((bad, metrics.get("score_overflow", torch.zeros(())).item()))
    everywhere = sorted({n for part, _ in found for n in part})
    causes = [f"not finite: {', '.join(everywhere) or 'gradient only'}"]
    skipped = sorted(set(outcome.skipped))
    scales = {n: r.loss_scale for n, r in _trained(roles).items() if n in skipped and r.loss_scale is not None}
    if scales and not everywhere:
        causes = ["fp16 gradients overflowed; loss scale now " + ", ".join(f"{n} {s:g}" for n, s in scales.items())]
    if any(samples for _, samples in found):
        causes.insert(0, f"the scores overflowed in fp16, set dmd.score_dtype to {roles.scorers[0].instead}")
    return f"{' and '.join(skipped)} ({'; '.join(causes)})"
