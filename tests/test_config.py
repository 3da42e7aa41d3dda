"""Sections of a run (mempar.runtime.sections, mempar.runtime.train_config) and what they derive and refuse."""

import math
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config_samples import BASE, MEMORY, MODEL
from mempar.errors import ConfigError
from mempar.memory.config import MemoryConfig
from mempar.runtime.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(num_layers=0), r"model\.num_layers=0 "),
        (lambda: ModelConfig(hidden_size=-1), r"model\.hidden_size=-1 "),
        (lambda: ModelConfig(vocab_multiple=0), r"model\.vocab_multiple=0 "),
        (lambda: ModelConfig(vocab_size=-5), r"model\.vocab_size=-5 "),
        (lambda: ModelConfig(hidden_size=100, num_attention_heads=12), r"model\.hidden_size=100 .*heads=12"),
        (lambda: ModelConfig(num_query_groups=5), r"model\.num_attention_heads=12 .*model\.num_query_groups=5"),
        (lambda: ParallelConfig(tp=0), r"parallel\.tp=0 "),
        (lambda: ParallelConfig(mp=-2), r"parallel\.mp=-2 "),
        (lambda: ParallelConfig(mp_rows=-1), r"parallel\.mp_rows=-1 "),
        (lambda: ParallelConfig(vpp=2), r"parallel\.vpp=2 with parallel\.pp=1"),
        (lambda: ParallelConfig(sequence_parallel=True), r"sequence_parallel=true with parallel\.tp=1"),
        (lambda: ParallelConfig(mp=6, mp_rows=4), r"parallel\.mp_rows=4 .*parallel\.mp=6"),
        (lambda: ParallelConfig(mp_hops=3), r"parallel\.mp_hops=3 "),
        (lambda: ParallelConfig(mp=4, mp_hops=2), r"mp_hops=2 with parallel\.mp_rows=0, parallel\.mp=4.*mp_hops=1\."),
        (lambda: ParallelConfig(mp=4, mp_rows=4, mp_hops=2), r"mp_hops=2 with parallel\.mp_rows=4"),
        (lambda: ParallelConfig(mp=4, mp_rows=1, mp_hops=2), r"mp_hops=2 with parallel\.mp_rows=1"),
        (lambda: MemoryConfig(merge_duplicates="yes"), r"merge_duplicates=yes .*auto, on, off"),
        (lambda: OptimConfig(schedule="step"), r"optim\.schedule=step .*linear, cosine, wsd, constant"),
        (lambda: OptimConfig(lr=-0.1), r"optim\.lr=-0\.1 "),
        (lambda: OptimConfig(lr=math.nan), r"optim\.lr=nan "),
        (lambda: OptimConfig(clip_grad=math.inf), r"optim\.clip_grad=inf "),
        (lambda: OptimConfig(beta1=1.0), r"optim\.beta1=1\.0 "),
        (lambda: OptimConfig(beta2=-0.5), r"optim\.beta2=-0\.5 "),
        (lambda: OptimConfig(lr=0.001, min_lr=0.25), r"optim\.min_lr=0\.25 .*optim\.lr=0\.001"),
        (lambda: TrainConfig(dtype="fp16"), r"train\.dtype=fp16 .*float64, float32, bf16"),
        (lambda: TrainConfig(steps=-1), r"train\.steps=-1 "),
        (lambda: TrainConfig(log_interval=0), r"train\.log_interval=0 "),
        (lambda: TrainConfig(global_batch_size=6, micro_batch_size=8), r"micro_batch_size=8 .*global_batch_size=6"),
        (lambda: TrainConfig(recompute="some"), r"train\.recompute=some .*none, selective, full"),
        (
            lambda: TrainConfig(recompute="selective", recompute_modules=("mlp", "layernorm")),
            r"recompute_modules=\['mlp', 'layernorm'\] .*core_attn, mlp",
        ),
        (lambda: TrainConfig(recompute="selective", recompute_modules=()), r"recompute_modules=\[\] "),
        (lambda: DataConfig(paths=("a", "b"), weights=(1.0,)), r"data\.weights has 1 numbers for 2 data\.paths"),
        (lambda: DataConfig(paths=("a", "b"), weights=(1.0, 0.0)), r"data\.weights=\[1\.0, 0\.0\]"),
        (lambda: DataConfig(paths=("a",), weights=(math.nan,)), r"data\.weights=\[nan\]"),
        (lambda: MemoryConfig(usage_interval=-5), r"memory\.usage_interval=-5 "),
        (lambda: RunConfig(memory=MemoryConfig()), r"memory\.layers is empty"),
        (lambda: replace(BASE, name="../x"), r"name='\.\./x' .*one part of a path"),
        (lambda: replace(BASE, name=""), r"name='' "),
        (lambda: replace(BASE, train=TrainConfig(seq_length=30)).with_parallel(cp=2), r"=30 .*cp=2.*2\*cp = 4"),
        (
            lambda: replace(BASE, train=TrainConfig(seq_length=12)).with_parallel(cp=2, tp=4, sequence_parallel=True),
            r"train\.seq_length=12 ",
        ),
        (
            lambda: replace(
                BASE, memory=replace(MEMORY, moments_dtype="bf16"), train=TrainConfig(dtype="float64", seq_length=32)
            ),
            r"memory\.moments_dtype=bf16 with a table in float64",
        ),
        (
            lambda: replace(
                BASE, memory=replace(MEMORY, score_dtype="bf16"), train=TrainConfig(dtype="float64", seq_length=32)
            ),
            r"memory\.score_dtype=bf16 with train\.dtype=float64: .*; set memory\.score_dtype=float32",
        ),
        (lambda: replace(BASE, memory=replace(MEMORY, layers=(4, 24))), r"\[4, 24\] .*blocks 0 to 23"),
        (lambda: replace(BASE, memory=replace(MEMORY, layers=(-1, 4))), r"\[-1, 4\] .*blocks 0 to 23"),
        (
            lambda: replace(BASE, memory=replace(MEMORY, variant="memory", value_dim=32)),
            r"memory\.value_dim=32 .*model\.hidden_size=64",
        ),
        (
            lambda: replace(BASE, more_memories=(replace(MEMORY, layers=(2,), variant="peer", value_dim=32),)),
            r"memory1\.value_dim=32 .*model\.hidden_size=64.*`peer`",
        ),
        (lambda: replace(BASE, more_memories=(replace(MEMORY, layers=(5, 12)),)), r"blocks \[12\] belong to several"),
        (lambda: replace(BASE, more_memories=(replace(MEMORY, layers=(24,)),)), r"memory1\.layers=\[24\] .*0 to 23"),
        (lambda: replace(BASE, more_memories=(MemoryConfig(enabled=False),)), r"more_memories .*enabled=false"),
        (lambda: BASE.with_parallel(pp=5), r"model\.num_layers=24 .*= 5 x 1"),
        (lambda: BASE.with_parallel(pp=4, vpp=4), r"model\.num_layers=24 .*= 4 x 4"),
        (lambda: BASE.with_parallel(tp=3), r"parallel\.tp=3 .*model\.num_attention_heads=4"),
        (lambda: replace(BASE.with_parallel(tp=2), model=replace(MODEL, num_query_groups=1)), r"tp=2 .*groups=1;"),
        (lambda: replace(BASE.with_parallel(tp=4), model=replace(MODEL, ffn_hidden_size=98)), r"tp=4 .*ffn.*=98;"),
        (lambda: replace(BASE.with_parallel(tp=4), model=replace(MODEL, vocab_multiple=10)), r"tp=4 .*multiple=10;"),
        (
            lambda: replace(BASE, train=TrainConfig(seq_length=33)).with_parallel(tp=2, sequence_parallel=True),
            r"parallel\.tp=2 .*train\.seq_length=33",
        ),
    ],
)
def test_config_refuses_with_the_numbers(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_run_config_derives_what_is_not_set() -> None:
    run = replace(BASE, optim=OptimConfig(lr=0.25, weight_decay=0.5))
    derived = (run.values_lr_of(MEMORY), run.values_weight_decay_of(MEMORY), run.value_dim_of(MEMORY))
    assert derived == (2.5, 0.5, 64)
    own = replace(MEMORY, lr=0.125, weight_decay=0.0, value_dim=16)
    assert (run.values_lr_of(own), run.values_weight_decay_of(own), run.value_dim_of(own)) == (0.125, 0.0, 16)
    runs = {dtype: replace(run, train=TrainConfig(dtype=dtype)) for dtype in ("float64", "bf16")}
    assert {dtype: run.value_bytes_of(MEMORY) for dtype, run in runs.items()} == {"float64": 8, "bf16": 2}
    assert ModelConfig(num_attention_heads=6, num_query_groups=0).query_groups == 6


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 10**6), st.integers(1, 10**4))
@example(257, 128)
@example(256, 128)
def test_padded_vocabulary_is_the_next_multiple(vocab_size: int, multiple: int) -> None:
    padded = ModelConfig(vocab_multiple=multiple).padded_vocab(vocab_size)
    assert padded % multiple == 0
    assert vocab_size <= padded < vocab_size + multiple
    assert ModelConfig(vocab_multiple=multiple, vocab_size=vocab_size).padded_vocab(3) == padded


def test_padded_vocabulary_does_not_depend_on_the_layout() -> None:
    sizes = [{}, {"tp": 2}, {"tp": 4, "sequence_parallel": True}, {"tp": 4, "pp": 2, "mp": 8}]
    assert {BASE.with_parallel(**size).model.padded_vocab(257) for size in sizes} == {384}
