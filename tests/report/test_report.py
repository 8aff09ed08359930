from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.fake import RESULTS, STAGES, write_run, write_schedule
from vlm_train import report
from vlm_train.errors import ConfigError
from vlm_train.report import results_table, write_report
from vlm_train.report.__main__ import main
from vlm_train.report.charts import controls_of, loss_chart, plotly_script, score_chart, short_names, thin_points
from vlm_train.report.page import MAX_IMAGES, choose_predictions, data_uri, key_settings, render_page
from vlm_train.report.read import (
    Point,
    Prediction,
    active_seconds,
    read_curves,
    read_predictions,
    read_report,
    read_tried,
)
from vlm_train.report.results import Result, read_metrics
from vlm_train.runs.sweep.summary import format_duration

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def page(folder: Path) -> str:
    """The report without plotly's script, which mentions everything."""
    text = write_report(folder).read_text(encoding="utf-8")
    return text.replace(plotly_script(), "")


def test_schedule_report_shows_every_section(tmp_path: Path) -> None:
    text = page(write_schedule(tmp_path / "runs"))
    for index, name in enumerate(STAGES):
        assert f"<h3>{name}</h3>" in text
        assert f'id="loss-{index}"' in text
    assert 'id="score-seconds"' in text
    assert 'id="score-steps"' in text
    for row in RESULTS:
        assert row["name"] in text
    assert "98.4 %" in text
    assert "1,573,248" in text
    assert text.count('src="data:image/png;base64,') == MAX_IMAGES + 1
    assert "http://" not in text.replace("http://www.w3.org/", "")


def test_training_curves_and_sample_predictions(tmp_path: Path) -> None:
    text = page(write_run(tmp_path / "run", "easyvqa_stage2"))
    for title in ("gradient norm", "learning rate", "TFLOP/s of a device", "shares of time and of tokens"):
        assert f"<h3>{title}</h3>" in text
    assert "<h3>left out</h3>" not in text  # nothing was
    assert text.index("red-ish<small>reference: red</small>") < text.index("step 200: blue-ish")
    assert text.count("blue-ish") == 1  # as long as it did not change
    assert "circle<small>reference: circle</small>" in text


def test_damaged_sample_predictions_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "predictions"
    lines(folder / "step-00000001.json", [{"key": "a", "prediction": HOSTILE, "image": "../../secret.png"}, 7])
    lines(folder / "step-00000002.json", '[{"key"')
    lines(folder / "step-last.json", [{"key": "a", "prediction": "x"}])
    (one,) = read_tried(folder)
    assert (one.answers, one.image) == ([(1, HOSTILE)], None)
    lines(tmp_path / "run.json", {"run_id": "r", "recipe": "x", "status": "done"})
    assert "alert(1)" in page(tmp_path) and "<script>alert" not in page(tmp_path)
    assert read_tried(tmp_path / "none") == []


def test_report_shows_no_password(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "easyvqa_stage2")
    lines(folder / "config.yaml", "data:\n  train:\n  - shards: https://me:secret@host/set\n")
    text = page(folder)
    assert "https://host/set" in text and "secret" not in text


def test_run_report_works_without_anything_but_its_record(tmp_path: Path) -> None:
    lines(tmp_path / "run.json", {"run_id": "bare", "recipe": "x", "status": "running"})
    text = page(tmp_path)
    assert "<h1>bare</h1>" in text
    assert "<script>" not in text


def test_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run\.json and no schedule\.json"):
        write_report(tmp_path)


def test_texts_from_files_never_become_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "easyvqa_stage2")
    results = [{"name": HOSTILE, "value": value, "note": HOSTILE} for value in (0.5, 0.4)]
    lines(folder / "run.json", {"run_id": HOSTILE, "recipe": HOSTILE, "status": HOSTILE, "results": results})
    lines(folder / "config.yaml", f"seed: '{HOSTILE}'\n")
    lines(folder / "params.json", [{"name": HOSTILE, "parameters": HOSTILE, "lr": HOSTILE, "weight_decay": HOSTILE}])
    row = {"question": HOSTILE, "reference": HOSTILE, "prediction": HOSTILE, "correct": False, "image": "images/0.png"}
    lines(folder / "eval" / "answers" / "predictions.jsonl", row)
    metrics = [
        {"step": n, "time": n, "split": HOSTILE, f"loss{HOSTILE}": 1.0, f"accuracy{HOSTILE}": 0.5} for n in (1, 2)
    ]
    lines(folder / "metrics.jsonl", *metrics)
    text = page(folder)
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "\\u003cscript" not in text  # plotly reads some tags in names as markup


def test_images_outside_the_evaluation_folder_are_not_embedded(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "easyvqa_stage2")
    evaluation = folder / "eval" / "answers"
    (tmp_path / "secret.png").write_bytes((evaluation / "images" / "0.png").read_bytes())
    (evaluation / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["../../../secret.png", str(tmp_path / "secret.png"), "link.png", "images/0.png"]
    path = lines(evaluation / "predictions.jsonl", *({"question": "?", "image": name} for name in names))
    assert [row.image is not None for row in read_predictions(path)] == [False, False, False, True]


def test_unreadable_image_is_shown_as_missing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG not really")
    assert data_uri(broken) is None


def test_curves_skip_broken_lines_and_count_a_repeated_step_once(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "metrics.jsonl",
        {"step": 1, "time": 100.0, "split": "train", "loss": 3.0},
        {"step": 2, "time": 101.0, "split": "train", "loss": float("nan")},
        {"step": 2, "time": 102.0, "split": "train", "loss": 2.0, "note": "text"},
        {"step": 1, "time": 110.0, "split": "train", "loss": 2.5},
        {"step": 1, "time": 111.0, "split": "val", "loss": 2.6},
        '{"step": 3, "time": 103.0, "spl',
    )
    assert read_curves(path) == {
        ("train", "loss"): [Point(1, 10.0, 2.5), Point(2, 2.0, 2.0)],
        ("val", "loss"): [Point(1, 11.0, 2.6)],
    }


def test_schedule_finds_its_runs_after_the_folder_was_moved(tmp_path: Path) -> None:
    folder = write_schedule(tmp_path / "runs")
    (tmp_path / "runs").rename(tmp_path / "kept")
    report = read_report(tmp_path / "kept" / folder.name)
    assert [stage.name for stage in report.stages] == list(STAGES)
    assert report.status == "done"


def test_schedule_status_is_that_of_its_worst_stage(tmp_path: Path) -> None:
    folder = write_schedule(tmp_path / "runs")
    lines(tmp_path / "runs" / "easyvqa_lm" / "run.json", {"run_id": "easyvqa_lm", "status": "failed"})
    assert read_report(folder).status == "failed"
    lines(tmp_path / "runs" / "easyvqa_lm" / "run.json", {"run_id": "easyvqa_lm", "status": "interrupted"})
    assert read_report(folder).status == "interrupted"


def test_schedule_is_not_done_while_stages_are_missing(tmp_path: Path) -> None:
    folder = write_schedule(tmp_path / "runs")
    (tmp_path / "runs" / "easyvqa_stage2").rename(tmp_path / "elsewhere")
    assert read_report(folder).status == "incomplete"


def test_result_texts() -> None:
    assert Result("a", 0.67, 9673, "").text == "67.0 % ± 0.9"
    assert Result("a", 0.876, None, "").text == "87.6 %"
    assert Result("a", 1.0, 100, "").text == "100.0 %"
    assert Result("perplexity", 12.3456, 10, "").text == "12.35"


def test_results_table_is_aligned_and_empty_without_results(tmp_path: Path) -> None:
    table = results_table(write_schedule(tmp_path / "runs")).splitlines()
    assert len(table) == 1 + len(RESULTS)
    assert len({line.index("%") for line in table[1:3]}) == 1
    assert table[1].startswith("easyvqa (this run)  98.4 % ± 0.3  9,673  generation")
    assert results_table(tmp_path / "runs" / "easyvqa_lm") == ""


def test_choice_takes_wrong_answers_up_to_half_and_rows_with_an_image() -> None:
    rows = [Prediction(str(index), "a", "a", index % 50 != 7, None) for index in range(1000)]
    chosen = choose_predictions(rows, 30)
    assert [row.correct for row in chosen] == [False] * 15 + [True] * 15
    assert int(chosen[14].question) > 900 and int(chosen[29].question) > 900
    assert len({row.question for row in chosen}) == 30
    assert sorted(choose_predictions(rows[:9], 40), key=lambda row: int(row.question)) == rows[:9]
    pictured = [replace(row, image=Path("x.png")) if index < 100 else row for index, row in enumerate(rows)]
    assert {int(row.question) for row in choose_predictions(pictured, 40)} < set(range(100))
    assert sum(row.correct for row in choose_predictions([replace(row, correct=False) for row in rows[:99]], 40)) == 0


def test_pauses_are_not_training_time() -> None:
    """A run that was stopped overnight and resumed; a slow one whose every record takes minutes."""
    times = [100.0, 101.0, 102.0, 9_000.0, 9_001.0]
    assert list(active_seconds(times).values()) == [0, 1, 2, 3, 4]
    assert list(active_seconds([0.0, 300.0, 620.0, 900.0]).values()) == [0, 300, 620, 900]
    assert active_seconds([5.0, 5.0]) == {5.0: 0.0} and active_seconds([]) == {}


def test_training_time_is_what_the_run_counted(tmp_path: Path) -> None:
    """An evaluation of ten minutes is no pause; a night between two starts is one."""
    rows = [(1, 100.0, 5.0), (2, 700.0, 605.0), (3, 90_000.0, 610.0)]
    given = [{"step": s, "time": t, "seconds": n, "split": "train", "loss": 1.0} for s, t, n in rows]
    path = lines(tmp_path / "metrics.jsonl", *given)
    assert read_curves(path) == {("train", "loss"): [Point(s, n, 1.0) for s, _, n in rows]}


def test_one_point_stands_in_a_readable_frame(tmp_path: Path) -> None:
    lines(tmp_path / "metrics.jsonl", {"step": 4, "time": 1.0, "split": "val", "loss": 2.0, "answers/exact_match": 0.5})
    evaluators = {"answers": {"primary": "exact_match", "higher_is_better": {"exact_match": True}}}
    lines(tmp_path / "run.json", {"run_id": "one", "recipe": "one", "status": "done", "evaluators": evaluators})
    report = read_report(tmp_path)
    loss, seconds, steps = (
        loss_chart(report.stages[0], "l"),
        score_chart(report, "seconds", "s"),
        score_chart(report, "steps", "a"),
    )
    assert '"range":[0,4.08]' in loss and '"range":[0.0,2.5]' in loss
    assert '"range":[0,1]' in seconds and '"range":[0,4.08]' in steps and '"range":[0.0,0.625]' in steps
    assert '"one: val answers"' in steps, "a curve is named after its evaluator"


def test_a_loss_that_is_the_total_is_drawn_once(tmp_path: Path) -> None:
    rows = [{"step": n, "time": n, "split": "train", "loss": 1 / n, "lm_loss": 1 / n} for n in (1, 2)]
    lines(tmp_path / "metrics.jsonl", *rows)
    lines(tmp_path / "run.json", {"run_id": "one"})
    assert "lm_loss" not in loss_chart(read_report(tmp_path).stages[0], "l")


def test_results_of_another_evaluation_are_told_apart(tmp_path: Path) -> None:
    own = {"name": "this run", "value": 0.9, "n": 100, "note": "all"}
    published = {"name": "elsewhere", "value": 0.8, "note": "published"}
    few = [{**own, "value": 0.7, "eval": "answers-12ab34cd"}, {**published, "eval": "answers-12ab34cd"}]
    lines(tmp_path / "run.json", {"run_id": "one", "results": [own, published, *few]})
    lines(tmp_path / "metrics.jsonl", {"step": 4, "time": 1.0, "split": "val", "accuracy": 0.5})
    report = read_report(tmp_path)
    assert [row.name for row in report.results] == ["this run", "elsewhere", "this run (answers-12ab34cd)"]
    assert [row.name for row in controls_of(report.results)] == ["elsewhere"]


def test_parameters_that_learn_are_counted(tmp_path: Path) -> None:
    text = page(write_run(tmp_path / "run", "easyvqa_stage2"))
    assert text.count('<td class="number">82,176</td>') == 2, "the connector learns"
    assert text.count('<td class="number">1,204,352</td>') == 1 and '<td class="number">0</td>' in text, "vision not"


def test_thinning_keeps_the_mean_and_the_last_step() -> None:
    points = [Point(step, float(step), float(step)) for step in range(10_000)]
    thinned = thin_points(points, 100)
    assert len(thinned) == 100
    assert thinned[-1].step == 9_999
    assert sum(point.value for point in thinned) / 100 == pytest.approx(4_999.5)
    assert thin_points([]) == []


def test_stage_names_are_shortened_by_what_they_share() -> None:
    assert short_names(list(STAGES)) == ["clip", "lm", "stage1", "stage2"]
    assert short_names(["stage1", "stage2"]) == ["stage1", "stage2"]
    assert short_names(["llava15_stage1"]) == ["llava15_stage1"]
    assert short_names(["a_b", "a_b"]) == ["b", "b"]


def test_settings_keep_interpolations_and_survive_broken_yaml() -> None:
    assert key_settings("seed: 1\noptim: {lr: '${other}'}\nbatch: {samples: null}") == {
        "seed": 1,
        "optim.lr": "${other}",
    }
    assert key_settings("a: [1,") == {}
    assert key_settings("- 1\n- 2") == {}
    assert key_settings("") == {}


@pytest.mark.parametrize(("seconds", "text"), [(42, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_schedule(tmp_path / "runs")
    assert main([str(tmp_path / "runs"), "--latest", "--table"]) == 0
    printed = capsys.readouterr().out
    assert "98.4 %" in printed
    assert printed.endswith(f"report: {folder / 'report.html'}\n")
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("ConfigError: ")


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    folder = tmp_path / "runs"
    write_schedule(folder)
    assert main([str(folder), "--latest", "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!")
    monkeypatch.setattr(report, "atomic_write", refuse)
    assert main([str(folder), "--latest"]) == 1
    assert "the page cannot be made there (Read-only file system); --output FILE" in capsys.readouterr().err


def test_importing_the_report_imports_no_plotly() -> None:
    code = "import sys, vlm_train.report; sys.exit(any(m in sys.modules for m in ('plotly', 'jinja2', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_runs_that_were_interrupted_or_imported_say_so(tmp_path: Path) -> None:
    lines(tmp_path / "run.json", {"run_id": "one", "status": "interrupted"})
    assert "the same command resumes" in render_page(read_report(tmp_path))
    lines(tmp_path / "run.json", {"run_id": "one", "status": "imported", "source": "/models/llava"})
    text = render_page(read_report(tmp_path))
    assert "from <code>/models/llava</code>" in text and "the same command resumes" not in text


def test_metrics_of_both_directions_have_their_place(tmp_path: Path) -> None:
    """The primary one among the scores, others in charts of their own; the table names metrics where names repeat."""
    folder = write_run(tmp_path / "run", "easyvqa_stage2")
    text = page(folder)
    assert "<h3>answers/cer (lower is better)</h3>" in text and "val answers" in text
    assert "Metric</th>" not in text, "every row has its own name"
    record = json.loads((folder / "run.json").read_text())
    both = [row | {"metric": "exact_match", "eval": "answers"} for row in RESULTS[:2]]
    both += [row | {"metric": "cer", "eval": "answers", "value": 0.25} for row in RESULTS[:2]]
    lines(folder / "run.json", record | {"results": both})
    text = page(folder)
    assert "<th>Metric</th>" in text and "<td>cer (lower is better)</td>" in text
    assert text.count("width: 25.0%") == 0, "a bar says how much is right"
    results = read_report(folder).results
    assert [row.text for row in results] == ["98.4 % ± 0.3", "66.8 % ± 0.9", "0.25", "0.25"]
    assert controls_of(results) == results[1:2]
    assert [line.split()[3] for line in results_table(folder).splitlines()[1::2]] == ["exact_match", "cer"]


def test_damaged_descriptions_of_metrics_are_left_out() -> None:
    assert read_metrics(7) == read_metrics({"a": 7}) == read_metrics({"a": {"higher_is_better": ["x"]}}) == {}
    (one,) = read_metrics({"a": {"higher_is_better": {"x": None}}}).values()
    assert one.higher_is_better and not one.primary
