"""From recordings to a report, its table, its advice and the comparison of two: with made-up recordings of toy runs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mempar.errors import ConfigError
from mempar.marks import Note, Span
from mempar.parallel.cost import exchange_bytes
from mempar.runtime.config import RunConfig
from mempar.runtime.placement import place
from mempar.runtime.profile.recording import Recording, ShardReads
from mempar.tools.profile.advice import advice, cuts_advice
from mempar.tools.profile.command import make_report
from mempar.tools.profile.compare import compare, comparison_table, differences
from mempar.tools.profile.merge import merge_rows, merge_tables
from mempar.tools.profile.phases import phase_figures
from mempar.tools.profile.predicted import PhaseKey, predicted_bytes
from mempar.tools.profile.report import Report, load_report, save_report
from mempar.tools.profile.summary import say_summary, show_bytes, summary_table
from profile_reports import made_up_profile
from toy import toy_run

TOKENS, READS = 32, 8


def recordings_of(run: RunConfig, *, slow: int = 0, skew: bool = False) -> list[Recording]:
    """Two ranks, two steps of one micro-batch; rank `slow` takes twice as long."""
    reads = run.memory.heads * run.memory.top_k
    made = []
    for rank in range(2):
        scale = 2 if rank == slow else 1
        spans, notes = [], []
        for step in (2, 3):
            spans += [
                Span(step, 1, 0, "query", "", 0, 1_000 * scale),
                Span(step, 1, 0, "values", "mp", 2_000, 2_000 + 4_000 * scale, 4_000 * scale, 600, 1_200),
                Span(step, -1, -1, "all_reduce/dp", "dp", 9_000, 11_000, 500, 1_000, 1_000),
            ]
            notes.append(Note(step, 1, 0, "owned", (TOKENS, TOKENS * reads // 2, TOKENS * reads // 2)))
        served = [(40, 1), (3, 1), (1, 1)] if not (skew and rank) else [(400, 3)]
        made.append(
            Recording(
                rank=rank,
                seconds=[0.02 * scale, 0.01 * scale],
                mark_us=2.0,
                group_sizes={"mp": 2, "dp": 2},
                spans=spans,
                notes=notes,
                tables=[ShardReads(table="memory.values", num_rows=72, rows_by_reads=served)],
                device="cpu",
            )
        )
    return made


def rows_run(**changes: Any) -> RunConfig:
    return toy_run(mp=2, mp_rows=2, **changes)


def advise(run: RunConfig, recordings: list[Recording]) -> list[str]:
    return [*advice(run, recordings, make_report(run, recordings))]


def test_rows_sum_calls_and_tell_bandwidths() -> None:
    rows = merge_rows(rows_run(), recordings_of(rows_run()))
    rows = [row for row in rows if row.calls]
    assert len(rows) == 2 * 2 * 3
    assert [(row.rank, row.step) for row in rows] == sorted((row.rank, row.step) for row in rows)
    (values,) = [row for row in rows if (row.rank, row.step, row.phase) == (1, 3, "values")]
    assert (values.calls, values.bytes_measured, values.microseconds) == (1, 600, 4.0)
    assert (values.algorithm_gb_per_s, values.bus_gb_per_s) == (0.3, 0.15)
    assert (values.exposed_us, values.overlapped_us) == (4.0, 0.0)
    (reduce,) = [row for row in rows if (row.rank, row.step, row.phase) == (1, 3, "all_reduce/dp")]
    assert (reduce.bytes_predicted, reduce.bytes_measured, reduce.layer) == (None, 1_000, -1)
    # Of two ranks each sends what it holds once: 2 (n - 1) / n.
    assert reduce.bus_gb_per_s == reduce.algorithm_gb_per_s == 0.5
    assert (reduce.exposed_us, reduce.overlapped_us) == (0.5, 1.5)
    (query,) = [row for row in rows if (row.rank, row.step, row.phase) == (1, 3, "query")]
    assert (query.bytes_predicted, query.exposed_us, query.overlapped_us) == (None, 0.0, 0.0)


def test_phase_that_was_predicted_and_never_seen_has_a_row_that_differs() -> None:
    run = rows_run()
    recordings = recordings_of(run)
    report = make_report(run, recordings)
    missing = [row for row in report.rows if not row.calls]
    assert {(row.layer, row.phase, row.group, row.bytes_measured, row.microseconds) for row in missing} == {
        (1, phase, "mp", 0, 0.0) for phase in ("split_sizes", "entries", "output_grads", "score_grads")
    }
    assert len(missing) == 2 * 2 * 4
    predicted = predicted_bytes(run, recordings)
    for row in missing:
        assert row.bytes_predicted == predicted[PhaseKey(rank=row.rank, step=row.step, layer=1, phase=row.phase)] > 0
    said: list[str] = []
    say_summary(report, [], said.append)
    # The bytes of values are made up, too.
    (line,) = [line for line in said if "NOT those predicted" in line]
    assert "values (4)" in line and "entries (4)" in line
    assert "NOT 3" in said[0] and "the same" not in said[0]
    rows = [
        dataclasses.replace(row, bytes_measured=row.bytes_predicted if row.bytes_predicted is not None else 0)
        for row in report.rows
    ]
    said.clear()
    say_summary(dataclasses.replace(report, rows=rows), [], said.append)
    assert len(said) == 1 and "the same" in said[0] and "NOT" not in said[0]


def test_sums_that_are_the_same_do_not_hide_rows_that_differ() -> None:
    report = made_up_profile(2, layers=(4,))[0]
    values = [number for number, row in enumerate(report.rows) if row.phase == "values"][:2]
    for number, change in zip(values, (-1, 1), strict=True):
        row = report.rows[number]
        report.rows[number] = dataclasses.replace(row, bytes_measured=row.bytes_measured + change)
    (figures,) = [each for each in phase_figures(report) if each.phase == "values"]
    assert (figures.predicted_bytes, figures.differing_rows) == (figures.sent_bytes, 2)


def test_calls_without_a_time_count_but_tell_no_bandwidth() -> None:
    recording = recordings_of(rows_run())[1]
    unseen = [Span(2, -1, -1, "all_reduce/dp", "dp", 9_000, 9_000, 0, 700, 700)]
    spans = [span for span in recording.spans if span.step == 2]
    recordings = [dataclasses.replace(recording, rank=rank, spans=[*spans, *unseen]) for rank in range(2)]
    rows = [row for row in merge_rows(rows_run(), recordings) if row.phase == "all_reduce/dp"]
    assert [(row.calls, row.bytes_measured, row.bus_gb_per_s) for row in rows] == [(2, 1_700, 0.5)] * 2


def test_predictions_are_the_formulas_in_the_noted_counts() -> None:
    run = rows_run()
    found = predicted_bytes(run, recordings_of(run))
    reads = run.memory.heads * run.memory.top_k
    owned = [[TOKENS * reads // 2] * 2] * 2
    plan = place(run, 2).memories["memory"].plan
    expected = exchange_bytes(plan, 1, owned, [TOKENS] * 2, reads=reads, value_bytes=4)
    for phase, num_bytes in vars(expected).items():
        assert found[PhaseKey(rank=1, step=2, layer=1, phase=phase)] == num_bytes, phase


def test_reads_of_a_shard_are_told_by_powers_of_two() -> None:
    first, second = merge_tables(recordings_of(rows_run()))
    assert (first.rank, second.rank) == (0, 1)
    assert (first.rows_read, first.unique_rows, first.num_rows) == (44, 3, 72)
    assert first.histogram == [[1, 1], [2, 1], [32, 1]]
    assert first.top_share == 40 / 44
    # One row in a hundred of these 72.
    assert merge_tables(recordings_of(rows_run(), skew=True))[1].top_share == 400 / 1200


def test_report_of_recordings_is_written_and_read(tmp_path: Path) -> None:
    run = rows_run()
    report = make_report(run, recordings_of(run))
    save_report(report, tmp_path)
    assert load_report(tmp_path) == report
    assert (report.run.steps, report.run.seconds_per_step) == (2, 0.03)
    assert (report.run.marks_per_step, report.run.mark_us) == (3, 2.0)
    assert report.run.mark_cost_share == pytest.approx(3 * 2e-6 / 0.03)
    assert report.run.layout["mp_rows"] == report.run.group_sizes["mp"] == 2
    assert report.run.config["parallel"]["mp"] == 2


def test_phases_are_means_over_ranks_and_steps_with_the_slowest_rank() -> None:
    values, reduce, query, *_ = phase_figures(make_report(rows_run(), recordings_of(rows_run(), slow=1)))
    assert (values.phase, values.us, values.sent_bytes, values.slowest_rank, values.slowest_us) == (
        *("values", 6.0, 600.0),
        *(1, 8.0),
    )
    assert values.exposed_share == 1.0
    assert values.bus_gb_per_s == pytest.approx(0.1)
    assert (reduce.phase, reduce.predicted_bytes, reduce.exposed_share) == ("all_reduce/dp", None, 0.25)
    assert (query.phase, query.group, query.sent_bytes) == ("query", "", 0.0)


def test_table_has_ten_lines_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    run = rows_run()
    recordings = recordings_of(run)
    extra = [Span(2, 1, 0, f"phase{number}", "", 0, 100) for number in range(12)]
    recordings[0] = dataclasses.replace(recordings[0], spans=[*recordings[0].spans, *extra])
    text = summary_table(make_report(run, recordings))
    assert "a step takes 30.0 ms" in text and "values (mp)" in text
    # Four phases are predicted that these recordings lack.
    assert "9 others" in text
    assert len(text.splitlines()) < 18 and all(len(line) <= 120 for line in text.splitlines()[1:])


def test_advice_names_the_cut_that_sends_fewest_bytes() -> None:
    run = toy_run(mp=2, mp_rows=2)
    wide = dataclasses.replace(run, model=dataclasses.replace(run.model, hidden_size=480))
    few = cuts_advice(wide, "memory", place(wide, 2).memories["memory"], [64, 64])
    assert "columns would send" in few and "fewer bytes than rows at D=480" in few and "parallel.mp_rows=1" in few
    columns = wide.with_parallel(mp_rows=1)
    kept = cuts_advice(columns, "memory", place(columns, 2).memories["memory"], [64, 64])
    assert "no other cut would send notably fewer bytes than columns" in kept and "rows would send" in kept


@pytest.mark.parametrize(("merge", "kept"), [("off", 1.0), ("on", 0.5)])
def test_advice_ratio_is_that_of_the_formulas(merge: str, kept: float) -> None:
    run = toy_run(mp=4, mp_rows=4, merge=merge)
    said = cuts_advice(run, "memory", place(run, 4).memories["memory"], [64] * 4, kept=kept)
    reads = run.memory.heads * run.memory.top_k

    def total(rows: int) -> int:
        plan = place(run.with_parallel(mp_rows=rows), 4).memories["memory"].plan
        owned = [[int(64 * reads * kept) // rows] * rows] * 4
        widths = {"reads": reads, "value_bytes": 4, "merged": merge == "on"}
        return sum(sum(vars(exchange_bytes(plan, rank, owned, [64] * 4, **widths)).values()) for rank in range(4))

    sent = {rows: total(rows) for rows in (1, 2, 4)}
    best = min(sent, key=lambda rows: sent[rows])
    assert best != 4
    assert f"would send {sent[4] / sent[best]:.1f}x fewer bytes than rows" in said


def test_advice_sees_uneven_shards_and_hot_rows() -> None:
    run = rows_run()
    said = advise(run, recordings_of(run, skew=True))
    assert any("rank 1 serves 1.9x the reads of a shard's mean" in sentence for sentence in said)
    assert any("memory.values: the 1% of rows that are read most take" in sentence for sentence in said)
    even = toy_run(kind="dense")
    assert advise(even, [dataclasses.replace(recordings_of(run)[0], tables=[], notes=[], spans=[])]) == []


def test_advice_compares_shards_of_one_stage() -> None:
    run = toy_run(kind="two", pp=2)
    # The first memory has a layer on each stage, but a stage's share of the reads is its own.
    layers = [
        ShardReads(table="memory.values", num_rows=72, rows_by_reads=[(1, 10 * (1 + rank // 2))]) for rank in range(4)
    ]
    recordings = [
        dataclasses.replace(recordings_of(rows_run())[0], rank=rank, tables=[layers[rank]], spans=[], notes=[])
        for rank in range(4)
    ]
    assert not any("reads of a shard's mean" in sentence for sentence in advise(run, recordings))
    busy = dataclasses.replace(layers[3], rows_by_reads=[(1, 40)])
    recordings[3] = dataclasses.replace(recordings[3], tables=[busy])
    assert any("rank 3 serves 1.3x the reads of a shard's mean" in sentence for sentence in advise(run, recordings))


def test_advice_tells_ranks_that_wait_for_each_other() -> None:
    run = rows_run()
    waiting = [Span(step, 1, 0, "split_sizes", "mp", 0, 8_000_000, 8_000_000, 8, 16) for step in (2, 3)]
    recordings = [dataclasses.replace(each, spans=[*each.spans, *waiting]) for each in recordings_of(run)]
    assert (
        "ranks wait 27% of a step in collectives of a few bytes, most of it in split_sizes"
        in advise(run, recordings)[0]
    )
    assert not any("ranks wait" in sentence for sentence in advise(run, recordings_of(run)))


def test_advice_tells_what_merging_saves() -> None:
    run = rows_run(merge="on")
    recordings = recordings_of(run)
    assert any("merging duplicates saves 0.0% of reads; try" in sentence for sentence in advise(run, recordings))
    fewer = [
        dataclasses.replace(
            recording,
            notes=[
                dataclasses.replace(note, counts=(TOKENS, *(n // 2 for n in note.counts[1:])))
                for note in recording.notes
            ],
        )
        for recording in recordings
    ]
    assert any("merging duplicates saves 50.0% of reads." in sentence for sentence in advise(run, fewer))


def reports(tmp_path: Path) -> tuple[Report, Report]:
    first, second = rows_run(), rows_run(dtype="bf16")
    before = make_report(first, recordings_of(first))
    after = make_report(second, recordings_of(second, slow=1))
    for name, report in (("a", before), ("b", after)):
        (tmp_path / name).mkdir()
        save_report(report, tmp_path / name)
    return before, after


def test_comparison_names_settings_and_shows_ratios(tmp_path: Path) -> None:
    before, after = reports(tmp_path)
    assert [*differences(before, after)] == ["train.dtype is float32 in A and bf16 in B"]
    assert [*differences(before, before)] == []
    table = comparison_table(before, after)
    assert "whole step" in table and "1.00x" in table
    said: list[str] = []
    compare(tmp_path / "a", tmp_path / "b" / "report.json", said.append)
    assert any("train.dtype" in line for line in said)
    said.clear()
    compare(tmp_path / "a", tmp_path / "a", said.append)
    assert "settings are the same" in said


def test_comparison_shows_phases_that_one_lacks() -> None:
    run = rows_run()
    whole = make_report(run, recordings_of(run))
    bare = dataclasses.replace(whole, rows=[row for row in whole.rows if row.phase != "values"])
    lines = {line.split()[0]: line.split() for line in comparison_table(whole, bare).splitlines() if line.split()}
    # Time, bytes and ratios of what is there alone are nothing on the other side.
    assert lines["values"][2:] == ["6", "-", "-", "600", "B", "-", "-"]


def test_names_of_a_file_are_no_markup(tmp_path: Path) -> None:
    run = rows_run()
    report = make_report(run, recordings_of(run))
    rows = [dataclasses.replace(row, phase="[/x][red]" if row.phase == "query" else row.phase) for row in report.rows]
    hostile = dataclasses.replace(
        report, rows=rows, run=dataclasses.replace(report.run, config={"[/x]": ["[/x]" * 100]})
    )
    assert "[/x][red]" in summary_table(hostile)
    for name, each in (("a", hostile), ("b", report)):
        (tmp_path / name).mkdir()
        save_report(each, tmp_path / name)
    said: list[str] = []
    compare(tmp_path / "a", tmp_path / "b", said.append)
    assert "[/x][red]" in said[-1]
    (settings,) = [line for line in said if line.startswith("settings that differ")]
    assert "[/x] is ['[/x][/x]" in settings and "[/x]" * 100 not in settings


def test_settings_that_cannot_be_printed_are_written_so_that_they_can(tmp_path: Path) -> None:
    run = rows_run()
    odd = dataclasses.replace(run, data=dataclasses.replace(run.data, paths=("a\nb\udc80",)))
    report = make_report(odd, recordings_of(run))
    assert report.run.config["data"]["paths"] == ["a\\nb\\udc80"]
    save_report(report, tmp_path)
    assert load_report(tmp_path) == report


def test_comparison_of_what_is_not_there_gives_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        compare(tmp_path, tmp_path, print)


def test_bytes_are_shown_in_few_digits() -> None:
    assert [show_bytes(number) for number in (0, 999, 1_500, 2.5e6, 3.25e9)] == [
        *("0 B", "999 B", "1.5 kB"),
        *("2.5 MB", "3.25 GB"),
    ]
