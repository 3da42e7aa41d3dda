"""mempar.tools.study.variants, plan and settings: equal FLOPs, equal parameters, and what may be asked for."""

import dataclasses

import pytest

from mempar.errors import ConfigError
from mempar.runtime.config import DataConfig, RunConfig
from mempar.runtime.size import model_size
from mempar.tools.study import variants
from mempar.tools.study.plan import STUDIES, check_variants, study_of
from mempar.tools.study.settings import Settings
from mempar.tools.study.variants import PARAMS_TOLERANCE, TOLERANCE, VARIANTS, Entrant, run_of
from study_runs import MICRO

DATA = DataConfig(paths=("none",))


def runs(size: str) -> dict[Entrant, RunConfig]:
    study = STUDIES[size]
    vocab = study.settings.vocab_size
    return {entrant: run_of(entrant, study.settings, 1, DATA, vocab) for entrant in study.entrants}


@pytest.mark.parametrize("size", list(STUDIES))
def test_every_model_of_every_study_takes_equal_flops_and_one_twice_as_many(size: str) -> None:
    vocab = STUDIES[size].settings.vocab_size
    flops = {entrant: model_size(run, vocab).flops_per_token for entrant, run in runs(size).items()}
    dense = flops[Entrant(variant="dense")]
    for entrant, found in flops.items():
        wanted = 2 * dense if entrant.variant == "dense_2x" else dense
        assert abs(found - wanted) <= TOLERANCE * wanted, (entrant, found / wanted)


@pytest.mark.parametrize("size", list(STUDIES))
def test_experts_and_peer_have_the_parameters_of_a_memory(size: str) -> None:
    study, vocab = STUDIES[size], STUDIES[size].settings.vocab_size
    params = {entrant: model_size(run, vocab).total_params for entrant, run in runs(size).items()}
    wanted = params[Entrant(variant="memory_plus", slots=study.matched_slots)]
    for variant in ("moe", "peer", "memory"):
        found = params[Entrant(variant=variant, slots=study.matched_slots)]
        assert abs(found - wanted) <= PARAMS_TOLERANCE * wanted, (variant, found / wanted)


@pytest.mark.parametrize("size", list(STUDIES))
def test_runs_of_a_study_differ_in_model_and_seed_alone(size: str) -> None:
    study = STUDIES[size]
    settings = study.settings
    found = [
        run_of(entrant, settings, seed, DATA, settings.vocab_size) for entrant in study.entrants for seed in (1, 2)
    ]
    assert len({run.name for run in found}) == len(found)
    for run in found:
        lr = settings.lr_of.get(run.name.split("-")[0], settings.lr)
        assert run.optim.lr == lr and run.optim.min_lr == lr * settings.final_lr_share and run.data == DATA
        assert dataclasses.replace(run.optim, lr=1.0, min_lr=0.0) == dataclasses.replace(
            found[0].optim, lr=1.0, min_lr=0.0
        )
        assert dataclasses.replace(run.train, seed=1) == found[0].train
        narrow = [dataclasses.replace(each.model, ffn_hidden_size=1) for each in (run, found[0])]
        assert narrow[0] == narrow[1]


def test_flops_that_cannot_be_matched_are_one_message() -> None:
    with pytest.raises(ConfigError, match=r"memory_plus-1048576 takes .* FLOPs a token where .* are wanted"):
        run_of(Entrant(variant="memory_plus", slots=1 << 20), MICRO, 1, DATA, MICRO.vocab_size)


@pytest.mark.parametrize("variant", ["memory_plus", "memory", "peer"])
def test_table_in_every_block_is_one_message(variant: str) -> None:
    setting = "memory_plus_layers" if variant == "memory_plus" else "memory_layers"
    settings = dataclasses.replace(MICRO, **{setting: (0, 1, 2)})
    message = rf"{variant}-64 has a table in every block \({setting}=\[0, 1, 2\]\): no feed-forward network is left"
    with pytest.raises(ConfigError, match=message):
        run_of(Entrant(variant=variant, slots=64), settings, 1, DATA, MICRO.vocab_size)


def test_settings_of_a_model_that_takes_no_part_keep_no_other_from_running() -> None:
    settings = dataclasses.replace(MICRO, memory_plus_layers=(0, 1, 2))
    run_of(Entrant(variant="memory", slots=64), settings, 1, DATA, MICRO.vocab_size)
    with pytest.raises(ConfigError, match="memory_plus-64 has a table in every block"):
        run_of(Entrant(variant="moe", slots=64), settings, 1, DATA, MICRO.vocab_size)


def test_experts_that_cannot_have_as_many_parameters_are_one_message() -> None:
    settings = STUDIES["full"].settings
    with pytest.raises(ConfigError, match=r"moe takes at best .* parameters where .* are wanted, at equal FLOPs"):
        run_of(Entrant(variant="moe", slots=16384), settings, 1, DATA, settings.vocab_size)


def test_experts_between_whose_steps_a_total_lies_are_told_so() -> None:
    # With 2 experts this model has too few parameters and with 3 too many: no routers are at fault.
    settings = STUDIES["large"].settings
    with pytest.raises(ConfigError, match=r"moe takes at best .* whole experts make steps .* more slots, or fewer"):
        run_of(Entrant(variant="moe", slots=2304), settings, 1, DATA, settings.vocab_size)


def test_peer_that_cannot_have_as_many_parameters_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    entrant = Entrant(variant="peer", slots=144)
    run_of(entrant, MICRO, 1, DATA, MICRO.vocab_size)
    # Settings at which squares lie too far apart are far from any that train.
    monkeypatch.setattr(variants, "PARAMS_TOLERANCE", 0.01)
    message = r"peer takes at best .* its two tables of 64 slots stand for one of 144, all squares; use more slots"
    with pytest.raises(ConfigError, match=message):
        run_of(entrant, MICRO, 1, DATA, MICRO.vocab_size)


@pytest.mark.parametrize("slots", [64, 1024, 4096])
def test_memory_has_the_parameters_of_memory_plus_by_its_flops(slots: int) -> None:
    settings = STUDIES["full"].settings
    runs = [run_of(Entrant(variant=name, slots=slots), settings, 1, DATA, 1024) for name in ("memory", "memory_plus")]
    one, other = (model_size(run, 1024).total_params for run in runs)
    assert abs(one - other) <= 0.001 * other


def test_experts_are_found_beyond_a_step_down() -> None:
    # Widths are whole: 34 experts of this model have fewer parameters than 33, and 90 more.
    settings = STUDIES["full"].settings
    totals = [
        model_size(run_of(Entrant(variant=variant, slots=10000), settings, 1, DATA, 1024), 1024).total_params
        for variant in ("moe", "memory_plus")
    ]
    assert abs(totals[0] - totals[1]) <= PARAMS_TOLERANCE * totals[1], totals


def test_full_study_has_what_it_is_to_compare() -> None:
    study = study_of("full")
    assert {entrant.variant for entrant in study.entrants} == set(VARIANTS) and study.num_seeds >= 3
    assert len([entrant for entrant in study.entrants if entrant.variant == "memory_plus"]) >= 3
    assert len(set(study.runs)) == len(study.entrants) * study.num_seeds
    # All models with a seed come before any with the next.
    assert [seed for _, seed in study.runs] == sorted(seed for _, seed in study.runs)


def test_study_is_changed_as_asked() -> None:
    given = ["steps=7", "memory_layers=[2]"]
    study = study_of("quick", variants=["memory_plus", "dense", "dense"], num_seeds=2, given=given)
    assert study.variants == ("dense", "memory_plus") and study.num_seeds == 2
    assert study.settings == dataclasses.replace(STUDIES["quick"].settings, steps=7, memory_layers=(2,))
    assert study_of("quick", given=["lr_of={moe: 0.02}"]).settings.lr_of["moe"] == 0.02
    assert study.settings.tokens == 7 * study.settings.batch_size * study.settings.seq_length


def test_sizes_of_tables_are_given() -> None:
    study = study_of("full", slots=[4096, 64, 4096])
    assert study.slots == (64, 4096) and study.matched_slots == 4096
    held = STUDIES["full"].matched_slots
    assert study_of("full", slots=[held, 4 * held]).matched_slots == held


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "ful"}, "--size ful is not known; a study is of one of: quick, full, large"),
        (
            {"size": "full", "variants": ["memoryplus"]},
            "'memoryplus' is no model of the study; did you mean memory_plus",
        ),
        ({"size": "full", "variants": ["xyz"]}, "use one of dense, dense_2x"),
        ({"size": "full", "slots": [4096, 5000]}, "--slots: no table has 5000 slots"),
        ({"size": "full", "num_seeds": 0}, "--seeds 0 runs nothing"),
        ({"size": "full", "given": ["stepz=3"]}, "'stepz' is no setting of the study; did you mean steps"),
        ({"size": "full", "given": ["steps"]}, "'steps' is no setting; write KEY=VALUE"),
        ({"size": "full", "given": ["steps=many"]}, "steps must be int"),
        ({"size": "full", "given": ["lr_of={sparse: 0.1}"]}, "lr_of: 'sparse' is no model of the study"),
        ({"size": "full", "given": ["lr_of={dense: fast}"]}, "lr_of must be"),
        ({"size": "full", "given": ["steps=???"]}, "steps must be int"),
        ({"size": "full", "given": ["steps=${lr}"]}, "steps must be int"),
        ({"size": "full", "given": ["memory_layers=[a]"]}, r"memory_layers must be tuple\[int, \.\.\.\]"),
        ({"size": "full", "given": ["evaluation_interval=0"]}, "evaluation_interval=0 leaves nothing to do"),
        ({"size": "full", "given": ["fact_seed=-1"]}, "fact_seed=-1 is negative"),
        ({"size": "full", "given": ["final_lr_share=2"]}, "from 0 to 1"),
    ],
)
def test_bad_input_is_one_message(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study_of(**arguments)


def test_known_variants_pass() -> None:
    check_variants(VARIANTS, "--variants")
    assert "steps" in Settings(facts=1, steps=1).to_json()
