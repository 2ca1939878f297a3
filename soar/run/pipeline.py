"""A whole run, stage by stage; each can stop at its safe points and goes on from there. `measure` is `soar eval`."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, get_args

from soar import seeds
from soar.config import FEWEST_HARD, Config, ConfigError, TrainedArm
from soar.domains.candidates import candidates
from soar.engine.policy import AdapterStack, concat
from soar.files import Row, digest, finite, json_bytes, scrub, shell_words, storage_errors, write_atomic, write_json
from soar.loop import arms
from soar.loop.evaluate import count_correct, results_of, summarize
from soar.loop.rollout import RolloutEnv
from soar.loop.student import Plan, TrainState
from soar.loop.teacher import OuterLoop, TeacherReward, new_state
from soar.loop.write import Bound, TeacherError, row_of
from soar.problems.load import DataError, find_leaks, split
from soar.report.alarms import TEXTS, alarm, lost_alarms, screen_alarms, step_alarms, step_vendi
from soar.report.page import report_at_the_end
from soar.report.runs import HASHES, NOW_FILE, PAUSE_FILE, TEACHER_SILENT, loop_end, number, read_arm, summary_of
from soar.report.text import fill, held_out
from soar.report.watch import step_lines
from soar.run.folder import ADVICE, REJECTED, REVIEW_FILE, RunFolder, ask_review, write_hashes
from soar.run.interrupts import Stopped, StopRequest, limit_reached, resume_command, saved_run
from soar.run.jobs import FileLoop
from soar.run.progress import Progress
from soar.run.ray import check_cluster, open_parallel
from soar.run.screen import find_hard, left_out_before
from soar.run.setup import STAGES, Pending, RunState, Stage, labelled, open_env, save_adapter
from soar.run.sinks import Loggers
from soar.types import Interrupted, Problem, Screening, UserError


@dataclass
class Run:
    """One run in its folder; `execute` does what is left of it, and asks `stop` at every safe point."""

    config: Config
    folder: RunFolder
    env: RolloutEnv
    progress: Progress
    stop: StopRequest
    teacher_reward: TeacherReward | None

    def __post_init__(self) -> None:
        self._began = self._counted = time.monotonic()
        self.state = RunState("loop", new_state(self.env, self.config))
        self.hard_train, self.hard_test = list[Problem](), list[Problem]()
        self.screened: list[tuple[Problem, Screening]] = []
        self.real = list[Problem]()

    def execute(self) -> Row:
        """Do every stage that is not done; returns the summary. Raises Stopped at a safe point when asked to stop."""
        checkpoint = self.folder.load()
        (self.folder.path / PAUSE_FILE).unlink(missing_ok=True)
        if checkpoint is None:  # files of others and the teacher's keys: what is wrong is told before the work
            OuterLoop(self.env, [], self.config, self.state.loop)
            material = self._material()
            if "real" in self.config.arms.run:
                arms.real_problems(self.env, self.config, material)
        else:
            self.state = RunState.read(checkpoint, self.env.backbone, self.config)
        self._find_hard(first=checkpoint is None)
        self._count_seconds("screen")
        self.env.tokens = self.state.tokens  # the screening is not counted
        if checkpoint is None:
            self._save()
        stages = (self._loop, self._arms, lambda: self._evaluate(self.state.arms))
        for now, stage, then in zip(STAGES, stages, STAGES[1:], strict=False):
            if self.state.stage == now:
                stage()
                self._save(then)
        for name, stack in self.state.adapters.items():  # a finished run that is resumed writes them again
            save_adapter(self.env.backbone, stack, self.folder.path / name)
        (self.folder.path / HASHES).unlink(missing_ok=True)  # of what is written again from here on
        summary = summary_of(self.folder.rows("metrics.jsonl"), self.config, self.state.seconds)
        write_json(self.folder.path / "summary.json", summary)
        self.progress.now("drawing the report", tell=False)
        report_at_the_end(self.folder.path, self.progress.insist)
        write_hashes(self.folder.path)
        return summary

    def _safe_point(self) -> None:
        """Raises Stopped when a signal or a limit asks for it; everything that was done is saved here."""
        hours = (time.monotonic() - self._began) / 3600
        if (reason := self.stop.reason or limit_reached(self.config.limits, hours, self.state.tokens)) is not None:
            raise Stopped(reason, f"Continue with: {self._resume_command()}", self.stop.exit_code)

    def _resume_command(self) -> str:
        return resume_command(self.folder.path, self.config.limits, self.state.tokens)

    def pause(self, reason: str) -> None:
        """Leave word of why the run is not finished, and the report so far."""
        where = {"stage": self.state.stage, "step": self.state.loop.step, "resume": self._resume_command()}
        write_json(self.folder.path / PAUSE_FILE, {"reason": reason, **where})
        report_at_the_end(self.folder.path, self.progress.insist)

    def _count_seconds(self, phase: str) -> None:
        """Add the seconds since the last call to those of a phase."""
        now, seconds = time.monotonic(), self.state.seconds
        seconds[phase] = seconds.get(phase, 0.0) + now - self._counted
        self._counted = now

    def _find_hard(self, first: bool) -> None:
        config, screen = self.config, self.config.screen
        found = find_hard(self.env, config, self.folder, self.progress, self._safe_point)
        hard, self.screened = found.problems, found.screened
        of_all = f"{len(hard)} of {len(self.screened)}"
        rule = f"at most {screen.max_successes} of {screen.attempts} attempts correct"
        if len(hard) < FEWEST_HARD:
            about = {"screen": screen, "before": left_out_before(found.event), "verifier": self.env.verifier.name}
            raise DataError(fill("few_hard.txt", of_all=of_all, rule=rule, fewest=FEWEST_HARD, **about))
        self.hard_train, self.hard_test = split(hard, config.seed, config.problems.test_share)
        halves = {"train": self.hard_train, "test": self.hard_test}
        hard_set = digest([[problem.id for problem in half] for half in halves.values()])
        self.folder.note_hashes(hard_set=hard_set)  # a damaged count could make it another one
        for name, half in halves.items():
            found.write(self.folder.path / "hard" / f"{name}.jsonl", half)
        if first:
            self.folder.append("metrics.jsonl", [found.event, *screen_alarms(found.event)])
            for key, of in {"pq_from": config.arms.pq_from, "teacher_from": config.arms.teacher_from}.items():
                if seen := len(find_leaks(arms.training_half(of), self.hard_test)):
                    self._warn(alarm("held-out reward", TEXTS["half"].format(key, of, seen, len(self.hard_test))))
        of_halves = f"{len(self.hard_train)} to train, {len(self.hard_test)} held out"
        self.progress.say(f"{of_all} candidates are hard: {rule}; {of_halves}")

    def _loop(self) -> None:
        config, state = self.config, self.state.loop
        steps = self.progress.task("outer loop", config.teacher.steps)
        with steps as advance, self.progress.task("  students", 1, transient=True) as inner:
            advance(state.step)
            kind = partial(FileLoop, self.folder, self._save) if config.backend.kind == "files" else OuterLoop
            loop = kind(self.env, self.hard_train, config, state, lambda *done: inner(0, *done), self.teacher_reward)
            while True:
                self._settle()
                self._safe_point()  # before the first step too: on a resume a limit may be reached already
                self.folder.append("metrics.jsonl", loop.validate())
                if loop_end(config, state.step, state.promotions) is not None:
                    break
                try:
                    self._outer_step(loop)
                except TeacherError as error:  # of a first step: the prompts do not fit the model; later: a result
                    if not state.step:
                        raise
                    self._warn(alarm(TEACHER_SILENT, f"the loop ends here: {error}", state.step))
                    break
                advance(1)

    def _outer_step(self, loop: OuterLoop) -> None:
        """One step, its lines in the files, and a checkpoint."""
        state = self.state.loop
        before = [row for row in self.folder.rows("metrics.jsonl") if row["event"] == "outer_step"]
        baseline, pass_rates, known = state.baseline, state.pass_rates, len(state.pq)
        events, rows = loop.step()
        events[0]["vendi"] = step_vendi([row["question"] for row in rows])
        rows, promoted = labelled(self.config, rows), labelled(self.config, state.pq[known:])
        alarms = step_alarms(finite(events[0]), rows, before, self.config.teacher.reward == "grounded")
        if leaks := find_leaks(self.hard_test, [Problem("", row["question"], "") for row in rows]):
            alarms.append(alarm("held-out question", TEXTS["leak"].format(len(leaks)), events[0]["step"]))
        promotion = next((event for event in events if event["event"] == "promotion"), None)
        self.folder.append("metrics.jsonl", [*(event for event in events if event is not promotion), *alarms])
        self.folder.append("questions.jsonl", rows)
        self._keep(loop.kept, step=events[0]["step"])
        if promotion is not None and self.config.promotion.review:
            self.state.pending = Pending(promotion, promoted, baseline, pass_rates)
        elif promotion is not None:
            self._enter(promotion, promoted, "automatic", None)
        self._save()
        held = promotion if self.state.pending is not None else None
        for line in step_lines([event for event in (*events, *alarms) if event is not held], rows, self.progress.width):
            self.progress.say(line)
        if any(event.get("kind") == "all students failed" for event in events):
            raise Interrupted(TEXTS["diverged"].format(state.step - 1, self._resume_command()))

    def _keep(self, groups: list[list[Row]], **place: Any) -> None:
        """Completions to rollouts.jsonl, in turn from each group, as fit in the share of a step or of a third of an arm."""
        hard, size, rows = {problem.id for problem in self.hard_train}, 0, []
        room = self.config.log.rollouts_mb * 1e6 / (self.config.teacher.steps + 3 * len(self.config.arms.run))
        for row in filter(None, chain(*zip_longest(*groups))):
            kind = "teacher" if "id" not in row else "hard" if row["id"] in hard else "question"
            rows.append(finite(scrub({"by": "student" if "id" in row else "teacher", "kind": kind, **place, **row})))
            if (size := size + len(json_bytes(rows[-1]))) > room:
                del rows[-1]
                break
        self.folder.append("rollouts.jsonl", rows)

    def _enter(self, promotion: Row, rows: list[Row], decision: str, by: str | None) -> None:
        """A promotion that stands into the files."""
        self.folder.append("metrics.jsonl", [{**promotion, "decision": decision, "by": by}])
        self.folder.append("pq.jsonl", rows)

    def _settle(self) -> None:
        """Do what a person decided on the promotion on hold; raises Stopped while there is no decision."""
        pending, loop, path = self.state.pending, self.state.loop, self.folder.path
        if pending is None:  # one that was decided may lie there still, where the process was killed right after
            (path / REVIEW_FILE).unlink(missing_ok=True)
            return
        promotion, step = finite(pending.promotion), pending.promotion["step"]
        answer = ask_review(path, promotion, finite(pending.rows))
        if answer is None:
            show, go_on = f"soar review {shell_words(path)}", self._resume_command()
            advice = f"See it with `{show}`, decide with --accept or --reject, then continue with `{go_on}`"
            raise Stopped(f"the promotion of outer step {step} waits for a person", advice)
        decision, by = answer
        if decision == REJECTED:
            loop.baseline, loop.pass_rates = pending.baseline, pending.pass_rates
            loop.promotions -= 1
            del loop.pq[len(loop.pq) - len(pending.rows) :]
        else:
            self._enter(promotion, pending.rows, decision, by)
        self.folder.append("metrics.jsonl", [{"event": "review", "step": step, "decision": decision, "by": by}])
        self.state.pending = None
        self._save()
        (path / REVIEW_FILE).unlink(missing_ok=True)  # the events hold the decision
        self.progress.say(f"promotion of outer step {step}: {decision} by {by}")

    def _arms(self) -> None:
        config, state = self.config, self.state
        base = self.env.backbone.new_stack(seeds.derive(config.seed, "student", "init"))  # every student starts from it
        self._evaluate({"base": base, "ps": state.adapters["student"]})  # nothing will change them
        self._safe_point()
        material = self._material()
        plans: dict[str, Plan] = {}
        told = {row["arm"] for row in self.folder.rows("metrics.jsonl") if row.get("kind") == "arm left out"}
        for arm in get_args(TrainedArm):
            if arm not in config.arms.run or arm in told | state.arms.keys():
                continue
            try:
                plans[arm] = self._plan(arm, material)
            except (TeacherError, arms.NothingLeft) as error:
                # A teacher that writes nothing acceptable any more is a result; the other arms are still worth having.
                self._warn(alarm("arm left out", f"the arm {arm} is left out: {error}") | {"arm": arm})
        if self.env.parallel is None and plans:
            self._evaluate(state.arms)  # an arm that was saved as final right before the process was killed
        begun = {arm: (plan, state.arm_progress.get(arm, TrainState(0, base))) for arm, plan in plans.items()}
        with self.progress.task("arms", sum(map(self._expected_steps, plans.values()))) as advance:
            advance(sum(training.step for _, training in begun.values()))
            how = (lambda: self.stop.reason is not None, lambda: advance(1))
            for moved in arms.train_arms(self.env, begun, config, *how):
                for arm, now in moved.items():
                    self.folder.append("metrics.jsonl", arms.arm_events(arm, plans[arm], now))
                    self._keep([now.kept], by=arm)
                    if plans[arm].finished(now):
                        state.arms[arm], state.arm_rollouts[arm] = now.stack, now.rollouts
                        state.arm_progress.pop(arm, None)
                    else:
                        state.arm_progress[arm] = replace(now, metrics=[], kept=[])
                    state.arm_tokens[arm] |= {"training": now.tokens}
                self._curve(moved)
                self._save()
                if self.env.parallel is None and moved.keys() & state.arms.keys() and plans.keys() - state.arms.keys():
                    self._evaluate(state.arms)  # workers would be amid the other arms
                self._safe_point()

    def _warn(self, row: Row) -> None:
        """An alarm into the events, and to whoever looks on."""
        self.folder.append("metrics.jsonl", [row])
        self.progress.say(f"alarm: {row['kind']}: {row['message']}")

    def _plan(self, arm: str, material: arms.Material) -> Plan:
        """What an arm trains on, written down in its folder. Raises NothingLeft, TeacherError."""
        config, before = self.config, self.env.tokens
        budget, search = config.arms.tokens, self._search_tokens(arm)
        if 0 < budget <= search:
            raise arms.NothingLeft(TEXTS["search"].format(search, budget))
        bound = Bound(before + (budget - search) // 2) if budget else Bound()  # so that the other half trains
        material, cut = replace(material, bound=bound), TEXTS["cut"].format(arm, budget)
        try:
            questions = arms.training_questions(arm, self.env, config, material)
            hints = arms.write_hints(self.env, config, material) if arm == "hinted" else {}
        except (TeacherError, arms.NothingLeft) as error:
            raise arms.NothingLeft(f"{cut}. Until then: {error}") if bound.full else error from None
        if bound.full and arm not in self.state.arm_tokens:  # else told before this run was resumed
            self._warn(alarm("preparation cut", cut) | {"arm": arm})
        if arm == "real" and self.real:
            self.folder.note_hashes(real=digest([row_of(p) for p in self.real]))
        rows = labelled(config, [row_of(p) for p in questions])
        rows += [{**row_of(p), "hint": hints[p.id]} for p in self.hard_train if p.id in hints]
        if rows:
            write_atomic(self.folder.path / "arms" / arm / "questions.jsonl", b"".join(map(json_bytes, rows)))
        took = self.env.tokens - before
        if arm in self.state.arm_tokens:
            self.env.tokens = before  # counted before this run was resumed
        self.state.arm_tokens.setdefault(arm, {"search": search, "preparation": took, "training": 0})
        steps = config.arm_steps(arm, self.state.loop.student_rollouts)
        plan = arms.arm_plan(arm, config, self.hard_train, questions, steps)
        return replace(plan, hints=hints, tokens=budget and budget - search - took)

    def _search_tokens(self, arm: str) -> int:
        """Tokens of the outer loop, for an arm that uses what it found; else 0."""
        return sum(self.state.loop.spent.values()) if self.config.uses_search(arm) else 0

    def _expected_steps(self, plan: Plan) -> int:
        """RLOO steps of an arm, for the bar: with a budget of tokens as if completions filled half of their room."""
        student = self.config.student
        half = self.config.arm_prompts * student.attempts * student.sampling.max_tokens / 2
        return min(len(plan.batches), round(plan.tokens / half) or 1) if plan.tokens else len(plan.batches)

    def _curve(self, moved: dict[str, TrainState]) -> None:
        """pass@k of arms on their way, where evaluate.every is due: one `curve` event each."""
        every, tokens = self.config.evaluate.every, self.state.arm_tokens
        due = {arm: now for arm, now in moved.items() if every and now.step % every == 0}
        rows = self._held_out({arm: now.stack for arm, now in due.items()}, lambda count: None)
        curves = [
            {"event": "curve", "arm": arm, "step": now.step, "total_tokens": sum(tokens[arm].values()), **row}
            for (arm, now), row in zip(due.items(), rows, strict=True)
        ]
        self.folder.append("metrics.jsonl", curves)

    def _material(self) -> arms.Material:
        """What the arms can train on: this run's promotion questions and teacher, or those that the config names."""
        config, rows, teacher = self.config.arms, self.state.loop.pq, self.state.loop.teacher
        if config.pq_from:
            rows = arms.read_pq(Path(config.pq_from))
            self.folder.note_hashes(pq_from=digest([[row["question"], row["answer"]] for row in rows]))
        if config.teacher_from:
            teacher = arms.read_teacher(self.env.backbone, Path(config.teacher_from), self.progress.insist)
            self.folder.note_hashes(teacher_from=teacher.digest())
        pq = [
            Problem(f"pq-{i}", row["question"], row["answer"], agreement=number(row.get("agreement")))
            for i, row in enumerate(rows)
        ]
        return arms.Material(pq, teacher, self.hard_test, self.progress.say, self.screened, self.hard_train, self.real)

    def _evaluate(self, final: dict[str, AdapterStack]) -> None:
        """Held-out pass@k of arms that are final and not measured yet; saved."""
        config = self.config
        written = self.folder.rows("metrics.jsonl")
        measured = {row["arm"] for row in written if row["event"] == "evaluation"}
        policies: dict[str, AdapterStack] = {a: final[a] for a in config.arms.run if a in final.keys() - measured}
        if not policies:
            return
        rollouts = {"base": 0, "ps": self.state.loop.student_rollouts, **self.state.arm_rollouts}
        tokens = {"base": {}, "ps": {"search": self._search_tokens("ps")}, **self.state.arm_tokens}
        name = "evaluation" if self.state.stage == "evaluate" else f"evaluation of {' and '.join(policies)}"
        with self.progress.task(name, len(self.hard_test)) as advance:
            rows = self._held_out(policies, advance)
        events, curves = [], [row for row in written if row["event"] == "curve"]
        for arm, row in zip(policies, rows, strict=True):
            spent = {"total_tokens": sum(tokens[arm].values()), "tokens": tokens[arm]}
            head = {"event": "evaluation", "arm": arm, "problems": len(self.hard_test)}
            events.append({**head, **row, "student_rollouts": rollouts[arm], **spent})
        self.folder.append("metrics.jsonl", events)
        for event in events:
            self.progress.say(f"held out, {held_out(read_arm(event['arm'], event))}")
            for row in lost_alarms([row for row in curves if row["arm"] == event["arm"]], event):
                self._warn(row)
        self._save()

    def _held_out(self, policies: dict[str, AdapterStack], advance: Callable[[int], None]) -> list[Row]:
        """pass@k of every policy on the held-out half, with its counts and the tokens that measuring it took."""
        if not policies:
            return []
        config, seed = self.config.evaluate, seeds.derive(self.config.seed, "evaluate")
        stack = concat(list(policies.values()))
        correct_P_H, _, tokens_P_H = count_correct(self.env, stack, self.hard_test, self.config, seed, advance).tolist()
        summaries = [summarize(correct_H, config, seed) for correct_H in correct_P_H]
        return [
            {**summary, "attempts": config.attempts, "evaluation_tokens": sum(tokens_H), "correct": correct_H}
            for summary, tokens_H, correct_H in zip(summaries, tokens_P_H, correct_P_H, strict=True)
        ]

    def _save(self, then: Stage | None = None) -> None:
        """A checkpoint. then: the stage that comes next, where one is over."""
        self._count_seconds(self.state.stage)
        self.state.stage, self.state.tokens = then or self.state.stage, self.env.tokens
        self.folder.save(self.state.checkpoint())


def execute(
    folder: RunFolder,
    config: Config,
    progress: Progress,
    stop: StopRequest | None = None,
    teacher_reward: TeacherReward | None = None,
) -> Row:
    """Run `config` in an open folder; returns the summary. Raises ConfigError, DataError, RunFolderError; Stopped when
    `stop`, a limit or a promotion on hold ends it; TeacherError and Interrupted with the state kept.
    """
    check_cluster(config)
    with (
        closing(Loggers(config, folder.path, progress.say)) as folder.on_events,
        open_env(config) as env,
        open_parallel(config, env, progress.say) as env.parallel,
    ):
        progress.file = folder.path / NOW_FILE  # not before the folder is this run's
        run = Run(config, folder, env, progress, stop or StopRequest(), teacher_reward)
        try:
            with saved_run(resume_command(folder.path)), storage_errors(folder.path, ADVICE):
                return run.execute()
        except Stopped as stopped:
            run.pause(stopped.reason)
            raise


def measure(config: Config, adapters: dict[str, Path], progress: Progress) -> tuple[Row, list[Problem]]:
    """The base model and the named adapters on the problems of `config.problems`, at the same seeds.

    Returns problems (source, sha256, count, ids, left_out), attempts, temperature, seed, policies (name -> pass_at and
    interval_95 for k = 1..attempts, correct counts) and paired (`NAME - base` -> k -> difference with interval), and the
    problems themselves. Raises UserError when no problem can be used, ConfigError for an adapter named `base`.
    """
    if "base" in adapters:
        raise ConfigError("an adapter is named 'base', as the base model is: give another name, or a longer path to it")
    loaded = candidates(config)
    for line in loaded.report.lines():
        progress.say(line)
    check_cluster(config)
    with open_env(config) as env:
        stacks = {"base": env.backbone.new_stack(0)}
        stacks |= {n: arms.read_adapter(env.backbone, folder, progress.insist) for n, folder in adapters.items()}
        if bad := [n for n, s in stacks.items() if not all(t.isfinite().all() for t in s.tensors.values())]:
            raise ConfigError(f"the adapter {bad[0]} holds NaN or infinity, so its attempts say nothing; leave it out")
        problems, left_out = arms.usable(env, config, loaded.problems, progress.say)
        if not problems:
            raise UserError(TEXTS["unusable"].format(config.problems.source, env.verifier.name, **left_out))
        stack, seed = concat(list(stacks.values())), seeds.derive(config.seed, "evaluate")
        bar = progress.task("evaluation", len(problems))
        with open_parallel(config, env, progress.say) as env.parallel, bar as task:
            correct_P_H, truncated_P_H, _ = count_correct(env, stack, problems, config, seed, task)
    attempts = config.evaluate.attempts
    every_k = config.evaluate.model_copy(update={"ks": tuple(range(1, attempts + 1))})
    results = results_of(dict(zip(stacks, correct_P_H.tolist(), strict=True)), every_k, config.seed)
    for name, share in zip(stacks, truncated_P_H.mean(1) / attempts, strict=True):
        results["policies"][name]["truncated_share"] = float(share)
    about = {"source": config.problems.source, "sha256": loaded.digest, "count": len(problems)}
    about |= {"ids": [problem.id for problem in problems], "left_out": left_out}
    return {"problems": about, **results}, problems
