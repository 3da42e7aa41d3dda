"""Micro studies: settings that train in a second, and results that nobody has run."""

from mempar.tools.study.results import Model, Point, Result
from mempar.tools.study.settings import Settings

MICRO = Settings(
    facts=40,
    vocab_size=256,
    seq_length=64,
    steps=6,
    batch_size=4,
    hidden_size=16,
    num_layers=3,
    attention_heads=2,
    ffn_hidden_size=48,
    warmup_steps=1,
    memory_heads=2,
    top_k=2,
    key_dim=8,
    evaluation_interval=2,
    asked=20,
)


def made_up_result(variant: str, slots: int, seed: int, accuracy: float, seconds: float = 100.0) -> Result:
    """A result that ends at some accuracy, with a curve that leads there."""
    tables = slots * 64 if variant in ("memory", "memory_plus", "peer") else 0
    return Result(
        variant=variant,
        slots=slots,
        seed=seed,
        params=280_000 + 64 * slots,
        table_params=tables,
        flops_per_token=2_700_000 if variant == "dense_2x" else 1_350_000,
        steps=300,
        tokens=300 * 4096,
        accuracy=accuracy,
        loss=2.0 - accuracy,
        answer_loss=1.5 - accuracy,
        coverage=0.9 if tables else None,
        coverage_ever=0.95 if tables else None,
        by_kind={"name": accuracy, "block": 0.9},
        device="cpu",
        seconds=3 * seconds,
        cpu_seconds=seconds * (2 if tables else 1),
        model=Model(
            ffn_hidden_size=172,
            experts=8 if variant == "moe" else 0,
            experts_of_a_token=2 if variant == "moe" else 0,
            memory_layers=[1, 2] if tables else [],
            tables=1 if tables else 0,
            table_slots=slots if tables else 0,
            lr=3e-3,
            values_lr=6e-3 if tables else None,
        ),
        curve=[
            Point(
                step=step,
                accuracy=accuracy * step / 300,
                answer_loss=3.0 - step / 300,
                loss=4.0 - step / 300,
                seconds=seconds * step / 300,
                cpu_seconds=seconds * step / 300,
            )
            for step in (100, 200, 300)
        ],
    )


# Recall of each model; seeds lie a hundredth apart.
RECALL = {
    ("dense", 0): 0.40,
    ("dense_2x", 0): 0.52,
    ("moe", 16384): 0.55,
    ("peer", 16384): 0.50,
    ("memory", 1024): 0.405,
    ("memory", 16384): 0.45,
    ("memory_plus", 1024): 0.44,
    ("memory_plus", 16384): 0.60,
}


def made_up_results(num_seeds: int = 3) -> list[Result]:
    """Results of a study in which Memory+ is ahead and the smallest Memory is not."""
    wiggle = {"memory": (0.0, 0.02, -0.02)}
    return [
        made_up_result(variant, slots, seed, share + 0.01 * seed + wiggle.get(variant, (0.0,) * 3)[seed - 1])
        for (variant, slots), share in RECALL.items()
        for seed in range(1, num_seeds + 1)
    ]
