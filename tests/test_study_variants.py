"""mempar.tools.study.variants, plan and settings: equal FLOPs, equal parameters, and what may be asked for."""

import dataclasses

import pytest

from mempar.errors import ConfigError
from mempar.runtime.config import DataConfig, RunConfig
from mempar.runtime.size import model_size
from mempar.tools.study.plan import STUDIES, check_variants, study_of
from mempar.tools.study.settings import Settings
from mempar.tools.study.variants import VARIANTS, Entrant, run_of

DATA = DataConfig(paths=("none",))


def runs(size: str) -> dict[Entrant, RunConfig]:
    study = STUDIES[size]
    vocab = study.settings.vocab_size
    return {entrant: run_of(entrant, study.settings, 1, DATA, vocab) for entrant in study.entrants}


@pytest.mark.parametrize("size", list(STUDIES))
def test_all_models_take_equal_flops_and_one_twice_as_many(size: str) -> None:
    vocab = STUDIES[size].settings.vocab_size
    flops = {entrant: model_size(run, vocab).flops_per_token for entrant, run in runs(size).items()}
    dense = flops[Entrant(variant="dense")]
    for entrant, found in flops.items():
        wanted = 2 * dense if entrant.variant == "dense_2x" else dense
        assert abs(found - wanted) <= 0.01 * wanted, (entrant, found / wanted)


@pytest.mark.parametrize("size", list(STUDIES))
def test_experts_and_peer_have_the_parameters_of_a_memory(size: str) -> None:
    study, vocab = STUDIES[size], STUDIES[size].settings.vocab_size
    params = {entrant: model_size(run, vocab).total_params for entrant, run in runs(size).items()}
    wanted = params[Entrant(variant="memory_plus", slots=study.matched_slots)]
    for variant in ("moe", "peer", "memory"):
        found = params[Entrant(variant=variant, slots=study.matched_slots)]
        assert abs(found - wanted) <= 0.05 * wanted, (variant, found / wanted)


def test_runs_of_a_study_differ_in_model_and_seed_alone() -> None:
    settings = STUDIES["full"].settings
    found = [
        run_of(Entrant(variant=name, slots=4096 * (not name.startswith("dense"))), settings, seed, DATA, 1024)
        for name in VARIANTS
        for seed in (1, 2)
    ]
    assert len({run.name for run in found}) == len(found)
    for run in found:
        assert run.optim == found[0].optim and run.data == DATA
        assert dataclasses.replace(run.train, seed=1) == found[0].train
        assert dataclasses.replace(run.model, ffn_hidden_size=1) == dataclasses.replace(
            found[0].model, ffn_hidden_size=1
        )


def test_flops_that_cannot_be_matched_are_one_message() -> None:
    settings = dataclasses.replace(STUDIES["full"].settings, ffn_hidden_size=8)
    with pytest.raises(ConfigError, match="memory_plus-65536 takes .* FLOPs a token where .* are wanted"):
        run_of(Entrant(variant="memory_plus", slots=65536), settings, 1, DATA, 1024)


def test_full_study_has_what_it_is_to_compare() -> None:
    study = study_of("full")
    assert {entrant.variant for entrant in study.entrants} == set(VARIANTS) and study.num_seeds >= 3
    for variant in ("memory", "memory_plus"):
        assert len([entrant for entrant in study.entrants if entrant.variant == variant]) >= 3
    assert len(set(study.runs)) == len(study.entrants) * study.num_seeds
    # All models with a seed come before any with the next.
    assert [seed for _, seed in study.runs] == sorted(seed for _, seed in study.runs)


def test_study_is_changed_as_asked() -> None:
    study = study_of("quick", variants=["memory_plus", "dense"], num_seeds=2, given=["steps=7", "memory_layers=[2]"])
    assert study.variants == ("dense", "memory_plus") and study.num_seeds == 2
    assert study.settings == dataclasses.replace(STUDIES["quick"].settings, steps=7, memory_layers=(2,))
    assert study.settings.tokens == 7 * study.settings.batch_size * study.settings.seq_length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "ful"}, "--size ful is not known; a study is of one of: quick, full, large"),
        (
            {"size": "full", "variants": ["memoryplus"]},
            "'memoryplus' is no model of the study; did you mean memory_plus",
        ),
        ({"size": "full", "variants": ["xyz"]}, "use one of dense, dense_2x"),
        ({"size": "full", "num_seeds": 0}, "--seeds 0 runs nothing"),
        ({"size": "full", "given": ["stepz=3"]}, "'stepz' is no setting of the study; did you mean steps"),
        ({"size": "full", "given": ["steps"]}, "'steps' is no setting; write KEY=VALUE"),
        ({"size": "full", "given": ["steps=many"]}, "steps must be int"),
    ],
)
def test_bad_input_is_one_message(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study_of(**arguments)


def test_known_variants_pass() -> None:
    check_variants(VARIANTS)
    assert "steps" in Settings(facts=1, steps=1).to_json()
