"""The arms of a run after the outer loop: what is trained, on what, with which budget.

`soar/assets/arms.toml` says what each arm is, docs/concepts.md where it comes from. Every arm trains a fresh base
student. SOAR with a teacher that is never trained is no arm but `teacher.reward = "none"`.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from soar import seeds
from soar.config import HARD_ARMS, HINT_TRIES, ORACLE_ARMS, VARIANT_ATTEMPTS, Config, ConfigError, resolve_path
from soar.domains.candidates import arranged
from soar.domains.world import get_world
from soar.engine.policy import AdapterStack, Backbone, load_adapter
from soar.engine.rollouts import Request
from soar.files import Row, asset, read_jsonl, read_object
from soar.loop.parallel import Tick
from soar.loop.population import train_chunk
from soar.loop.rewards import success_rates
from soar.loop.rollout import RolloutEnv, masked, mentions
from soar.loop.student import HINT_LEVELS, Begun, Plan, TrainState, at_rate, hinted, shuffled_passes
from soar.loop.write import Bound, Outcome, read_pairs, teacher_prompt, vote, write_questions
from soar.problems.load import Dropped, find_leaks, load_problems, read_hard
from soar.types import Problem, Screening, UserError, Verdict, columns_of

PROMPTS = asset("arm_prompts")
SOLVABLE, EASIER = 0.7, (0.3, 0.7)  # rates of what is trained on: below; least and most of a variant
VARIANT_ROUNDS, VARIANT_TEXTS = 8, 4


@dataclass(frozen=True)
class Material:
    """What a run offers its arms.

    pq: promotion questions. teacher: the trained one. hard_test: the held-out problems, which no training set may hold. say:
    where notes go. screened: the candidates with what screening found. hard_train: the hard problems to train on. real: the
    usable ones of arms.real, once they are read. bound: of questions and hints.
    """

    pq: list[Problem]
    teacher: AdapterStack
    hard_test: list[Problem]
    say: Callable[[str], None]
    screened: list[tuple[Problem, Screening]] = field(default_factory=list)
    hard_train: list[Problem] = field(default_factory=list)
    real: list[Problem] = field(default_factory=list)
    bound: Bound = field(default_factory=Bound)


def training_questions(arm: str, env: RolloutEnv, config: Config, material: Material) -> list[Problem]:
    """Questions of an arm, none that is held out; [] for those on hard problems alone.

    Raises ConfigError where the config names no source, NothingLeft where there are none, TeacherError for too few written.
    """
    if arm in HARD_ARMS:
        return []
    if arm.startswith("pq") and not material.pq:
        raise NothingLeft("no promotion, so there are no promotion questions")
    makers = {"solvable": solvable_problems, "variants": variant_problems, "real": real_problems}
    makers |= dict.fromkeys(("base_t", "teacher_t"), partial(teacher_questions, arm))
    makers |= dict.fromkeys(ORACLE_ARMS, partial(pq_subset, arm))
    questions = makers[arm](env, config, material) if arm in makers else material.pq
    if not (kept := not_held_out(arm, material, questions)):  # who never saw them may have written one all the same
        raise NothingLeft("each of its questions is held out for the test")
    return kept


def teacher_questions(arm: str, env: RolloutEnv, config: Config, material: Material) -> list[Problem]:
    """arms.questions accepted pairs of the trained teacher, of base_t of the base model; the arm enters the seed."""
    teacher, prompt = material.teacher if arm == "teacher_t" else None, teacher_prompt(env, config)
    one_set = config.teacher.model_copy(update={"datasets": 1, "questions": config.arms.questions})
    own = config.model_copy(update={"teacher": one_set, "seed": seeds.derive(config.seed, "arm", arm, "questions")})
    (problems,) = write_questions(env, teacher, prompt, own, 0, material.bound).problems_G_Q
    return problems


def real_problems(env: RolloutEnv, config: Config, material: Material) -> list[Problem]:
    """arms.questions problems of arms.real (a random choice), or of the embedded world; none that is held out.

    Raises ConfigError, and DataError for the file.
    """
    source, count, world = config.arms.real, config.arms.questions, config.problems.world
    if source:
        if not material.real:
            problems, report = load_problems(source, origin="arms.real", skip_bad_rows=config.problems.skip_bad_rows)
            for line in report.lines():
                material.say(line)
            problems = arranged(env.verifier.domain, problems, report)
            material.real.extend(usable(env, config, problems, material.say)[0])
        problems = material.real
    elif not world:
        found = f'arms.real = "" and problems.source = {config.problems.source!r} is no embedded world'
        raise ConfigError(f'arms.run has "real", but {found}; set arms.real to a file of easier problems')
    else:
        try:
            problems = get_world(world).problems("real", count, config.seed)
        except ValueError as error:
            raise ConfigError(f"arms.questions = {count} for the arm real: {error}") from error
    problems = not_held_out("real", material, problems)
    if not problems:
        raise ConfigError(f"arms.real = {source!r} has no problem left to train on; give another file")
    order = seeds.generator(config.seed, "arm", "real", "questions").permutation(len(problems)).tolist()
    return [problems[i] for i in order[:count]]


def not_held_out(arm: str, material: Material, problems: list[Problem]) -> list[Problem]:
    """The problems without those that are held out for the test."""
    leaks = {problem.id for problem in find_leaks(material.hard_test, problems)}
    if leaks:
        material.say(f"{arm}: {len(leaks)} problems are held out for the test, so they are left out")
    return [problem for problem in problems if problem.id not in leaks]


def write_hints(env: RolloutEnv, config: Config, material: Material) -> dict[str, str]:
    """Id of a hard training problem -> hint, made once by the base model from question and gold answer.

    The first of HINT_TRIES texts that ended and does not hold the answer; where all do, the first with it masked; none where
    hint and answer do not fit, NothingLeft where none do. A prompt without turns is continued: its hint begins a working.
    """
    turns, problems = env.fmt.turns, material.hard_train
    fmt = replace(env.fmt, student_template=PROMPTS["hint"]) if turns else env.fmt
    told = [f"{p.question} The answer is {p.answer}." if turns else p.question for p in problems]
    prompts = [fmt.student_ids(env.backbone.tokenizer, text) for text in told]
    asked = [pair for pair in zip(problems, prompts, strict=True) if len(pair[1]) < env.backbone.context]
    room = env.backbone.context - max((len(prompt) for _, prompt in asked), default=0)
    most, hints = min(config.arms.hint_tokens, room), dict[str, str]()
    sampling = config.teacher.sampling.model_copy(update={"max_tokens": most, "stop": ()})
    for part in material.bound.pieces(env, asked, HINT_TRIES * most):
        seed_Q = [seeds.derive(config.seed, "arm", "hinted", problem.id) for problem, _ in part]
        rollouts = env.draw(None, Request([[prompt for _, prompt in part]], HINT_TRIES, [seed_Q], sampling))
        texts, ended = rollouts.texts(env.backbone), rollouts.ended_B.tolist()
        for k, (problem, _) in enumerate(part):
            rows = range(k * HINT_TRIES, (k + 1) * HINT_TRIES)
            tries = [texts[row].strip() for row in rows if ended[row]] or [texts[rows[0]].strip()]
            silent = (text for text in tries if text and not mentions(text, problem.answer))
            hint = next(silent, "") or masked(tries[0], problem.answer)
            if hint and env.room(hinted(problem, hint, HINT_LEVELS), config.student.sampling):
                hints[problem.id] = hint
    if not hints:
        raise NothingLeft("no hint was written that fits in the model's context beside problem and completion")
    return hints


def solvable_problems(env: RolloutEnv, config: Config, material: Material) -> list[Problem]:
    """The problems at 0 < p < SOLVABLE of this run's screening."""
    if not (between := [p for p, screening in material.screened if 0 < screening.pass_rate < SOLVABLE]):
        raise NothingLeft(f"screening found no problem at 0 < p < {SOLVABLE}")
    return between


def variant_problems(env: RolloutEnv, config: Config, material: Material) -> list[Problem]:
    """Up to arms.questions easier variants of the hard training problems, of VARIANT_ROUNDS x VARIANT_TEXTS texts for each.

    The base model sees it and writes one with its answer, kept when a share within EASIER of VARIANT_ATTEMPTS gives that
    answer; with teacher.votes their vote decides, as over a teacher's questions. A prompt without turns can only be
    continued: the variant begins as the problem does.
    """
    fmt, sampling, kept, labels = env.fmt, config.teacher.sampling, dict[str, Problem](), dict[str, Outcome]()
    asked = fmt.teacher_template.replace("{subject}", config.teacher.subject or fmt.default_subject)
    shown = {p.id: p.question for p in material.hard_train}
    if fmt.turns:
        shape = replace(fmt, teacher_template=asked + PROMPTS["variant"])
    else:
        shown = {key: " ".join(text.split()[: (len(text.split()) + 1) // 2]) for key, text in shown.items()}
        head = asked + fmt.teacher_prefill
        shape = replace(fmt, teacher_template=head + " {subject}"[head.endswith("\n") :], teacher_prefill="")
    prompts = {key: shape.teacher_ids(env.backbone.tokenizer, text) for key, text in shown.items()}
    prompts = {key: ids for key, ids in prompts.items() if len(ids) + sampling.max_tokens <= env.backbone.context}
    tries = config.teacher.votes or VARIANT_ATTEMPTS
    most = VARIANT_TEXTS * (sampling.max_tokens + tries * config.student.sampling.max_tokens)  # tokens of one problem
    due = list(prompts) * VARIANT_ROUNDS
    for turn, keys in enumerate(material.bound.pieces(env, due, most, len(prompts))):
        seed = seeds.derive(config.seed, "arm", "variants", turn, "text")
        seed_Q = [seeds.derive(seed, key) for key in keys]
        asked_Q = [prompts[key] for key in keys]
        rollouts = env.draw(None, Request([asked_Q], VARIANT_TEXTS, [seed_Q], sampling))
        texts = rollouts.texts(env.backbone)
        if not fmt.turns:
            heads = (shown[key] for key in keys for _ in range(VARIANT_TEXTS))
            texts = [head + text for head, text in zip(heads, texts, strict=True)]
        written = read_pairs(env, config, texts, rollouts.ended_B.tolist())
        fresh = {p.question: p for p in written if isinstance(p, Problem) and p.question not in kept}
        tried = not_held_out("variants", material, list(fresh.values()))
        seed = seeds.derive(config.seed, "arm", "variants", turn, "attempts")
        if config.teacher.votes:
            outcomes = vote(env, config, [*tried], seed, labels)
            kept |= {p.question: p for p in outcomes if isinstance(p, Problem)}
        elif tried:
            batch = env.rollout(None, [tried], VARIANT_ATTEMPTS, [seed], config.student.sampling)
            rates = zip(tried, success_rates(batch), strict=True)
            kept |= {p.question: p for p, rate in rates if rate is not None and EASIER[0] <= rate <= EASIER[1]}
        if len(kept) >= config.arms.questions:
            break
    if not kept:
        raise NothingLeft("no variant was solved at the rates that are kept")
    return list(kept.values())[: config.arms.questions]


def pq_subset(arm: str, env: RolloutEnv, config: Config, material: Material) -> list[Problem]:
    """Promotion questions of one kind, as many as the smaller of the well-posed and the correct ones (finding 3).

    So a difference between these arms is one of kind, not of number.
    """
    labelled = list(zip(material.pq, oracle(env, config, material.pq), strict=True))
    well_posed = [p for p, (posed, _) in labelled if posed]
    correct = [p for p, (_, right) in labelled if right]
    pool = {"pq_sample": material.pq, "pq_well_posed": well_posed, "pq_correct": correct}[arm]
    size = min(len(well_posed), len(correct))
    counts = f"{len(well_posed)} are well-posed and {len(correct)} have a correct answer"
    says = f"{size} of {len(material.pq)} promotion questions; {counts}"
    if not size:
        raise NothingLeft(says)
    material.say(f"{arm}: {says}")
    order = seeds.generator(config.seed, "arm", arm, "subset").permutation(len(pool)).tolist()
    return [pool[i] for i in sorted(order[:size])]


def oracle(env: RolloutEnv, config: Config, problems: list[Problem]) -> list[tuple[bool, bool]]:
    """(well-posed, correctly answered) of every question: exact, by the domain's own solver or by the embedded world.

    Raises NothingLeft where neither is there.
    """
    questions = [p.question for p in problems]
    if env.verifier.domain.solve is not None:
        answers = env.verifier.solve(questions)
    elif config.problems.world:
        answers = list(map(get_world(config.problems.world).solve, questions))
    else:
        why = "so nobody knows which are well-posed and which answers correct; give the domain a `solve`"
        raise NothingLeft(f"problems.domain = {config.problems.domain!r} cannot solve questions, {why}")
    golds = [replace(p, answer=answer or "") for p, answer in zip(problems, answers, strict=True)]
    right = env.verifier.check_answers([p.answer for p in problems], [p.answer for p in golds], columns_of(golds))
    return [(a is not None, a is not None and v.solved) for a, v in zip(answers, right, strict=True)]


def read_pq(place: Path) -> list[Row]:
    """Rows of a pq.jsonl file, or of the run folder that holds it. Raises ConfigError when there is no question."""
    path = place / "pq.jsonl" if place.is_dir() else place
    rows, notes = read_jsonl(path)
    good = [row for row in rows if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)]
    if not good:
        why = "; ".join(notes) or "no line has a question and an answer"
        raise ConfigError(f"arms.pq_from = {str(place)!r}: {why}; give a run folder that promoted, or its pq.jsonl")
    return good


def training_half(place: str) -> list[Problem]:
    """The hard training problems of the run that a folder, or what lies in it, is of; none where there is no run."""
    paths = (folder / "hard" / "train.jsonl" for folder in (Path(place), Path(place).parent) if place)
    return next((read_hard(path)[0] for path in paths if path.is_file()), [])


def read_adapter(backbone: Backbone, folder: Path, say: Callable[[str], None]) -> AdapterStack:
    """`load_adapter`; told to say where the adapter was trained on a base model of another name."""
    stack, ours = load_adapter(backbone, folder), backbone.config.path
    theirs = str(read_object(folder / "adapter_config.json")[0].get("base_model_name_or_path") or ours)
    if ours != theirs and os.path.realpath(resolve_path(ours)) != os.path.realpath(theirs):
        found = f"{folder} was trained on {theirs}, but is used on {ours}"
        say(f"warning: {found}; unless they are one model it says nothing")
    return stack


def read_teacher(backbone: Backbone, place: Path, say: Callable[[str], None]) -> AdapterStack:
    """The teacher in a run folder or in an adapter folder, as by `read_adapter`. Raises ConfigError."""
    folders = [folder for folder in (place, place / "teacher") if (folder / "adapter_config.json").is_file()]
    try:
        if not folders:
            raise ConfigError("neither it nor its folder teacher/ holds an adapter (adapter_config.json)")
        return read_adapter(backbone, folders[0], say)
    except ConfigError as error:
        advice = "give a finished run folder or an adapter folder"
        raise ConfigError(f"arms.teacher_from = {str(place)!r}: {error}; {advice}") from error


def arm_plan(name: str, config: Config, hard_train: list[Problem], questions: list[Problem], steps: int) -> Plan:
    """What an arm trains on.

    With arms.curriculum_steps questions alone first, then hard problems alone; with 0 passes over both together.
    `hard_only_128` shows as many copies of a problem side by side as make 128 attempts.
    """
    seed, per_step = seeds.derive(config.seed, "arm", name), config.arm_prompts
    copies = 128 // config.student.attempts if name == "hard_only_128" else 1
    first = 0 if name in HARD_ARMS else min(steps, config.arms.curriculum_steps)
    if first:
        batches = shuffled_passes(questions, seed, first, per_step)
        batches += shuffled_passes(hard_train, seed + 1, steps - first, per_step)
    else:
        mixed = hard_train if name in HARD_ARMS else [*questions, *hard_train]
        batches = shuffled_passes(mixed, seed, steps, per_step // copies)
        batches = [[problem for problem in batch for _ in range(copies)] for batch in batches]
    return Plan(batches, seeds.derive(config.seed, "arm", name, "student"), copies, name == "likelihood")


class NothingLeft(UserError):
    """An arm that cannot be trained; the run goes on with the others."""


def arm_events(name: str, plan: Plan, state: TrainState) -> list[Row]:
    """One arm_step event for each of the state's metrics, and at the end the alarm of a student that diverged."""
    first = state.step - len(state.metrics)
    rows: list[Row] = [{"event": "arm_step", "arm": name, "step": i, **m} for i, m in enumerate(state.metrics, first)]
    if plan.finished(state) and state.failed:
        message = f"the student of the arm {name} produced NaN or inf in training; its result says nothing"
        rows.append({"event": "alarm", "step": None, "kind": "arm failed", "arm": name, "message": message})
    return rows


def train_arms(
    env: RolloutEnv, begun: dict[str, Begun], config: Config, stopping: Callable[[], bool], tick: Tick
) -> Iterator[dict[str, TrainState]]:
    """Train every arm from its state to its end; yields, segment by segment, where the arms that went on stand.

    A segment ends where an arm is at its end, is to be saved, or stopping() says so. tick(): after each step. Arms with
    equally many steps done train as one population: on a GPU all of them, on a CPU one (its last bits would depend on its
    neighbours), whose sampling the threads share out; worker processes train one arm each.
    """
    ends, rate = partial(segment_ends, config), config.arms.learning_rate or config.student.optimizer.lr
    common = (at_rate(config.student, rate), env.threads)
    left = {name: (plan, state) for name, (plan, state) in begun.items() if not plan.finished(state)}
    if env.parallel is not None:
        queue = deque((name, ([student],)) for name, student in left.items())
        for name, (state,) in env.parallel.stream(train_chunk, (*common, ends), queue, tick):
            plan, _ = begun[name]
            if not plan.finished(state):
                queue.append((name, ([(plan, state)],)))
            yield {name: state}
        return
    size = arms_at_once(env.backbone, len(begun))
    while left:
        _, first = next(iter(left.values()))
        together = [name for name, (_, state) in left.items() if state.step == first.step][:size]
        mine = [left[name] for name in together]
        trained = train_chunk(env, tick, *common, lambda step: ends(step) or stopping(), mine)
        yield (moved := dict(zip(together, trained, strict=True)))
        left |= {name: (begun[name][0], state) for name, state in moved.items()}
        left = {name: (plan, state) for name, (plan, state) in left.items() if not plan.finished(state)}


def arms_at_once(backbone: Backbone, arms: int) -> int:
    """Arms of one population: on a GPU model.chunk or all, on a CPU one."""
    return (backbone.config.chunk or arms) if backbone.device.type == "cuda" else 1


def segment_ends(config: Config, steps: int) -> bool:
    """Whether an arm is saved, or measured on its way, after so many steps."""
    return steps % config.arms.save_steps == 0 or bool(config.evaluate.every and steps % config.evaluate.every == 0)


def usable(
    env: RolloutEnv, config: Config, problems: list[Problem], say: Callable[[str], None]
) -> tuple[list[Problem], dict[str, int]]:
    """Problems that fit in the context and whose gold answer can be graded; how many are left out, by reason.

    The first five of each are named by say. Raises ConfigError where the verifier fails at every gold answer.
    """
    sampling, context = config.student.sampling, env.backbone.context
    kept = [problem for problem in problems if env.room(problem, sampling)]
    long = [problem for problem in problems if not env.room(problem, sampling)]
    for problem in long[:5]:
        sizes = f"prompt {len(env.prompt(problem))} + completion {sampling.max_tokens} > context {context} tokens"
        say(f"left out: {Dropped('prompt too long', sizes, where=problem.id)}")
    verdicts = env.verifier.check_golds([p.answer for p in kept], columns_of(kept))
    if kept and not any(verdict.judged for verdict in verdicts) and (error := env.verifier.last_error):
        says = f"the verifier {env.verifier.name!r} failed at each of the {len(kept):,} gold answers"
        raise ConfigError(f"{says}, the last: {error}; mend it, soar check shows what it is given")
    judged = list(zip(kept, verdicts, strict=True))
    bad, wrong = ([p for p, v in judged if v is verdict] for verdict in (Verdict.UNSCORABLE, Verdict.WRONG))
    if 2 * len(wrong) > len(kept):
        share = f"{len(wrong):,} of {len(kept):,} gold answers grade as wrong by {env.verifier.name!r}"
        ask = "are these problems hard, or never paid? soar check shows what it is given"
        say(f"{share}, as {wrong[0].answer[:80]!r}: {ask}")
    for problem in bad[:5]:
        say(f"left out: the gold answer of {problem.id} cannot be graded: {problem.answer[:80]!r}")
    return [p for p, v in judged if v is not Verdict.UNSCORABLE], {"too_long": len(long), "ungradable": len(bad)}
