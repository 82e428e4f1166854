"""Pictures are drawn from results alone, without a GPU, and what cannot be drawn is said in one line."""

import json

import pytest

from fulmen.bench.plots import PICTURES, SIDES, _points, _tokens, draw

PARTS = {
    "milliseconds": 600.0,
    "milliseconds in parts": 610.0,
    "lightning attention": 0.6,
    "experts": 0.38,
    "head": 0.02,
}
TABLES = {
    "lightning": {
        "lengths": [
            {"length": n} | {f"{who} {side}": n / 1e4 for who in ("ours", "fla", "floor") for side in SIDES}
            for n in (1024, 2048)
        ]
    },
    "train": {
        "lengths": [
            {"layers": layers, "length": n, "tokens a second": 2e5 if n < 4096 else "out of memory"}
            for layers in ("softmax", "lightning", "hybrid")
            for n in (1024, 2048, 4096)
        ],
        "parts": [{"length": 8192} | PARTS, {"length": 16384, "failed": "out of memory"}],
    },
}
MACHINE = {"cpu": "EPYC", "gpu": "NVIDIA H100", "torch": "2.11.0"}


@pytest.fixture
def results(tmp_path):
    """results("train", lengths=[...]) writes a file with these tables and gives its path."""

    def write(name, **tables):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"machine": MACHINE} | tables))
        return path

    return write


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_written(fulmen, results, tmp_path, name):
    code, out, err = fulmen("bench", name, "--draw", results(name, **TABLES[name]), tmp_path / "images")
    assert (code, err) == (0, "")
    paths = [tmp_path / "images" / f"{name}-{table}.png" for table in TABLES[name]]
    assert out == "".join(f"wrote {path}\n" for path in paths)
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)


def test_one_picture_is_drawn_from_a_file_with_one_table(results, tmp_path):
    path = results("train", parts=TABLES["train"]["parts"])
    assert draw("train", path, tmp_path / "images", only="parts") == [tmp_path / "images" / "train-parts.png"]
    assert [found.name for found in (tmp_path / "images").iterdir()] == ["train-parts.png"]


def test_a_missing_table_is_named_and_nothing_is_drawn(fulmen, results, tmp_path):
    path = results("train", lengths=TABLES["train"]["lengths"])
    code, out, err = fulmen("bench", "train", "--draw", path, tmp_path / "images")
    assert (code, out) == (2, "")
    assert err == f"fulmen: error: {path} has no table 'parts': write it with fulmen bench train --json {path}\n"
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("only", "content", "message"),
    [
        ("lengths", "{", "is not JSON"),
        ("lengths", "[]", "it names no machine"),
        ("lengths", '{"lengths": []}', "it names no machine"),
        ("lengths", '{"machine": {}, "lengths": []}', "has no table 'lengths'"),
        ("lengths", '{"machine": {}, "lengths": [{"tokens": 3}]}', "has another form"),
        ("lengths", '{"machine": {}, "lengths": [3]}', "has another form"),
        ("parts", '{"machine": {}, "parts": [{"length": 8, "failed": "x"}]}', "has another form"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(fulmen, tmp_path, only, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    code, _, err = fulmen("bench", "train", "--only", only, "--draw", path, tmp_path)
    assert code == 2
    assert f"{path}" in err
    assert message in err
    assert err.count("\n") == 1


def test_a_missing_file_and_a_benchmark_without_pictures_are_refused(fulmen, results, tmp_path):
    code, _, err = fulmen("bench", "train", "--draw", tmp_path / "nothing.json", tmp_path)
    assert (code, err) == (2, f"fulmen: error: cannot read {tmp_path / 'nothing.json'}: No such file or directory\n")
    code, _, err = fulmen("bench", "experts", "--draw", results("experts"), tmp_path)
    assert (code, err) == (
        2,
        "fulmen: error: fulmen bench experts has no pictures; there are some of lightning, train\n",
    )
    code, _, err = fulmen("bench", "train", "--only", "memory", "--draw", results("train"), tmp_path)
    assert (code, err) == (
        2,
        "fulmen: error: fulmen bench train has no picture of 'memory'; there are lengths, parts\n",
    )


def test_drawing_and_measuring_exclude_each_other(fulmen, tmp_path):
    code, _, err = fulmen("bench", "train", "--json", tmp_path / "a", "--draw", tmp_path / "b", tmp_path)
    assert code == 2
    assert "not allowed with" in err


def test_what_failed_is_no_point_and_lengths_are_short():
    rows = [{"length": 1, "x": 2.0}, {"length": 2, "x": "out of memory"}, {"length": 3}, {"length": 4, "x": 5}]
    assert _points(rows, "x") == ([1, 4], [2.0, 5])
    assert [_tokens(n) for n in (1000, 1024, 131072, 2**20)] == ["1000", "1K", "128K", "1M"]
