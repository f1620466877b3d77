"""The picture of the speed ratios: what is drawn, and which files are refused."""

import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plot


def line(name: str, rows: int, distinct: int, ratio: float) -> dict[str, Any]:
    return {
        "name": name,
        "rows": rows,
        "distinct": distinct,
        "rank": 1000 if name == "steered" else 0,
        "ratio_median": ratio,
        "ratio_p20": ratio - 0.01,
        "ratio_p80": ratio + 0.02,
        "predicted_ratio": 1.01,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "benchmark": "speed_ratio",
        "machine": {"cpu": "A CPU", "cores": 2, "gpu": None},
        "versions": {"vllm": "0.32.0", "torch": "2.13.0"},
        "date": "2026-11-20T15:27:08+00:00",
        "shape": "gpt2-medium",
        "dtype": "bfloat16",
        "rows": [
            line("unused", 1, 0, 1.0),
            line("steered", 1, 1, 1.02),
            line("steered", 8, 1, 1.01),
            line("steered", 8, 4, 1.03),
            line("guided", 8, 8, 1.05),
        ],
    }


def written(folder: Path, *results: object) -> list[Path]:
    paths = [folder / f"{number}.json" for number in range(len(results))]
    for path, result in zip(paths, results, strict=True):
        path.write_text(json.dumps(result))
    return paths


def test_a_png_of_plausible_size_is_written(result: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "new" / "picture.png"
    plot.main([*map(str, written(tmp_path, result)), "--out", str(out)])
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1650, 720)
    assert len(content) > 20_000


def test_each_number_of_distinct_steers_is_a_line_and_each_other_figure(
    result: dict[str, Any],
) -> None:
    steered, others = plot.draw([result]).axes
    assert labels(steered) == [
        "as the bytes moved predict",
        "1 steer, rank 1000",
        "4 distinct steers",
    ]
    assert labels(others) == ["guided", "unused"]


def labels(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_only_the_panel_that_has_figures_is_drawn(result: dict[str, Any]) -> None:
    result["rows"] = [x for x in result["rows"] if x["name"] == "steered"]
    assert len(plot.draw([result]).axes) == 1


def test_the_line_joins_the_points_of_the_newest_file(result: dict[str, Any]) -> None:
    newer = copy.deepcopy(result)
    newer["date"] = "2026-11-21T00:00:00+00:00"
    newer["rows"] = [line("guided", 8, 8, 1.5)]
    _, others = plot.draw([newer, result]).axes
    joined = {tuple(drawn.get_ydata()) for drawn in others.lines if drawn.get_linestyle() == "-"}
    assert (1.5,) in joined
    assert (1.05,) not in joined


def test_ranks_are_told_apart_where_there_are_several(result: dict[str, Any]) -> None:
    result["rows"].append(line("steered", 8, 4, 1.0) | {"rank": 64})
    assert list(plot.lm_steer_series(result["rows"])) == [
        "4 distinct steers, rank 64",
        "1 steer, rank 1000",
        "4 distinct steers, rank 1000",
    ]


def test_the_title_names_the_model_the_machine_the_versions_and_the_days(
    result: dict[str, Any],
) -> None:
    later = result | {"date": "2026-12-01T00:00:00+00:00"}
    assert plot.title([result, later]) == (
        "gpt2-medium, bfloat16, median and p20 to p80\n"
        "A CPU, 2 cores; vLLM 0.32.0, torch 2.13.0, 2026-11-20 to 2026-12-01"
    )


@pytest.mark.parametrize(
    "changes",
    [{"benchmark": "peers"}, {"shape": "tiny"}, {"dtype": "float32"}],
    ids=lambda changes: next(iter(changes)),
)
def test_results_that_do_not_go_together_are_refused(
    result: dict[str, Any], tmp_path: Path, changes: dict[str, str]
) -> None:
    out, paths = tmp_path / "out.png", written(tmp_path, result, result | changes)
    with pytest.raises(SystemExit, match="speed_ratio of one shape and dtype are wanted"):
        plot.main([*map(str, paths), "--out", str(out)])
    assert not out.exists()
