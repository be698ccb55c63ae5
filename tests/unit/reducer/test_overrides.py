"""Which scheme a parameter has, by patterns on its name."""

import pytest

from hvd_quant import DQSGD, NUQSGD, QSGD
from hvd_quant.reducer.overrides import Overrides

NAMES = ["embed.weight", "layer.0.weight", "layer.0.bias", "head.bias"]
YAML = """
"*.bias": none
head.*: null
"embed.*": {scheme: qsgd, bits: 8}
layer.?.weight:
  scheme: nuqsgd
  bits: 3
  norm: max
"""
TOML = """
"*.bias" = "none"
"head.*" = "none"
"embed.*" = { scheme = "qsgd", bits = 8 }
["layer.?.weight"]
scheme = "nuqsgd"
bits = 3
norm = "max"
"""


def test_the_first_pattern_that_matches_holds():
    overrides = Overrides(
        {"*.bias": None, "layer.*": QSGD(bits=2), "*.weight": QSGD(bits=8), "head.*": QSGD()}
    )
    assert [overrides.scheme(name, "default") for name in [*NAMES, "norm.scale"]] == [
        QSGD(bits=8),
        QSGD(bits=2),
        None,
        None,
        "default",
    ]
    assert overrides.unused(NAMES) == ["head.*"]
    assert Overrides({"x.*": None, "X": QSGD()}).unused(["x.y", "x"]) == ["X"]
    assert not Overrides()
    assert Overrides({"*": None})


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("b.YML", YAML), ("c.toml", TOML)])
def test_files(tmp_path, name, text):
    if name.endswith("toml"):
        pytest.importorskip("tomllib")
    path = tmp_path / name
    path.write_text(text)
    for given in (path, str(path)):
        assert list(Overrides(given)) == [
            ("*.bias", None),
            ("head.*", None),
            ("embed.*", QSGD(bits=8)),
            ("layer.?.weight", NUQSGD(bits=3, norm="max")),
        ]


def test_schemes_in_files_have_the_compressors_rounding(tmp_path):
    path = tmp_path / "overrides.yaml"
    path.write_text("a: {scheme: qsgd}\nb: {scheme: qsgd, rounding: correlated}\n")
    overrides = Overrides(path, "nearest")
    assert [scheme.rounding for _, scheme in overrides] == ["nearest", "correlated"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "x: {scheme: qsgd, bits: 9}", "'x': bits must be from 2 to 8"),
        ("a.yaml", "x: {scheme: qsgd, bit: 8}", "'x': .*unexpected keyword argument 'bit'"),
        ("a.yaml", "x: {scheme: topk}", "'x' must be none, or a scheme"),
        ("a.yaml", "x: {bits: 4}", "'x' must be none, or a scheme"),
        ("a.yaml", "x: 4", "'x' must be none, or a scheme"),
        ("a.yaml", "x: {scheme: [qsgd]}", "'x' must be none, or a scheme"),
        ("a.yaml", "[x, y]", "must hold a mapping"),
        ("a.yaml", "", "must hold a mapping"),
        ("a.yaml", "x: {", "is no YAML"),
        ("a.yaml", "'*.bias': none\n'*.bias': {scheme: qsgd}", r"more than once what holds for '\*\.bias'"),
        ("a.yaml", "[" * 10_000, "is no YAML"),
        ("a.toml", "x = ", "is no TOML"),
        ("a.json", "{}", r"must be in a \.yaml, \.yml or \.toml file"),
    ],
)
def test_files_that_are_no_overrides(tmp_path, name, text, says):
    if name.endswith("toml"):
        pytest.importorskip("tomllib")
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        Overrides(path)


@pytest.mark.parametrize("name", ["a.yaml", "a.toml"])
def test_files_that_are_not_in_utf_8(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"{name} is not in UTF-8"):
        Overrides(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        Overrides(tmp_path / "none.yaml")


@pytest.mark.parametrize("given", [4, [("a", None)], {"a": "none"}, {"a": 4}, {3: None}, {"a": DQSGD(k=1.0)}])
def test_what_is_no_mapping_to_schemes(given):
    with pytest.raises(TypeError, match="overrides"):
        Overrides(given)
