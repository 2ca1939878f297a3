"""`soar eval`: the base model and adapters measured on a problem file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from soar import seeds
from soar.config import Config, ConfigError
from soar.domains.candidates import candidates
from soar.engine.policy import concat, load_adapter
from soar.files import Row
from soar.loop.arms import usable
from soar.loop.evaluate import count_correct, results_of
from soar.run.ray import check_cluster, open_parallel
from soar.run.setup import choose_threads, open_env
from soar.types import UserError


def measure(
    config: Config, adapters: dict[str, Path], say: Callable[[str], None], advance: Callable[[int, int], None]
) -> Row:
    """The base model and the named adapters on the problems of `config.problems`, at the same seeds.

    Returns problems (source, sha256, count, ids, left_out), attempts, temperature, seed, policies (name -> pass_at and
    interval_95 for k = 1..attempts, correct counts) and paired (`NAME - base` -> k -> difference with interval).
    advance(done, total): progress in problems. Raises UserError when no problem can be used, ConfigError for an adapter named
    as the base model is.
    """
    if "base" in adapters:
        raise ConfigError("an adapter is named 'base', as the base model is: give another name, or a longer path to it")
    loaded = candidates(config)
    for line in loaded.report.lines():
        say(line)
    attempts = config.evaluate.attempts
    sampling = config.student.sampling.model_copy(update={"temperature": config.evaluate.temperature})
    done = 0
    check_cluster(config)
    with open_env(config) as env:
        threads = choose_threads(env.backbone, config.threads)
        stacks = {"base": env.backbone.new_stack(0)}
        stacks |= {name: load_adapter(env.backbone, folder) for name, folder in adapters.items()}
        problems, left_out = usable(env, config, loaded.problems, say)
        if not problems:
            raise UserError(
                f"problems.source = {config.problems.source!r}: no problem can be used ({left_out['too_long']} too long, "
                f"{left_out['ungradable']} with an answer that {env.verifier.name!r} cannot grade)"
            )

        def note(part: list[Any], counts: Any) -> None:
            nonlocal done
            done += len(part)
            advance(done, len(problems))

        stack, seed = concat(list(stacks.values())), seeds.derive(config.seed, "evaluate")
        with open_parallel(config, env, say) as parallel:
            correct_P_H, truncated_P_H, _ = count_correct(
                env, stack, problems, attempts, seed, sampling, threads, on_block=note, parallel=parallel
            )
    every_k = config.evaluate.model_copy(update={"ks": tuple(range(1, attempts + 1))})
    results = results_of(dict(zip(stacks, correct_P_H.tolist(), strict=True)), every_k, config.seed)
    for name, share in zip(stacks, truncated_P_H.mean(1) / attempts, strict=True):
        results["policies"][name]["truncated_share"] = float(share)
    about = {"source": config.problems.source, "sha256": loaded.digest, "count": len(problems)}
    return {"problems": {**about, "ids": [problem.id for problem in problems], "left_out": left_out}, **results}
