"""Recipes: what is read equals what was written, and every mistake gets one line that names the way out."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulmen import config
from fulmen.config import UserError, dump_recipe, find_recipe, load_recipe, recipe_key


@dataclass(frozen=True, kw_only=True)
class Source:
    path: str
    weight: float = 1.0
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate must be positive,\n  got {self.rate}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    steps: int
    name: str = "run"
    dtype: Literal["float32", "bfloat16", 8] = "float32"
    compile: bool = False
    seed: int | None = None
    layers: tuple[int, ...] = ()
    optimizer: Optimizer = field(default_factory=Optimizer)
    sources: tuple[Source, ...] = ()
    held_out: Source | None = None
    options: dict = field(default_factory=dict)


numbers = st.floats(allow_nan=False)
text = st.text(st.characters(exclude_categories=["Cs"]))
sources = st.builds(Source, path=text, weight=numbers, limit=st.none() | st.integers())
recipes = st.builds(
    Recipe,
    steps=st.integers(),
    name=text,
    dtype=st.sampled_from(["float32", "bfloat16", 8]),
    compile=st.booleans(),
    seed=st.none() | st.integers(),
    layers=st.lists(st.integers()).map(tuple),
    optimizer=st.builds(Optimizer, rate=numbers.filter(lambda rate: rate > 0), betas=st.tuples(numbers, numbers)),
    sources=st.lists(sources, max_size=3).map(tuple),
    held_out=st.none() | sources,
    options=st.dictionaries(text, st.booleans() | st.integers() | numbers | text | st.lists(text), max_size=3),
)


@pytest.fixture
def write(tmp_path):
    def write(content, name="recipe.toml"):
        path = tmp_path / name
        path.write_text(content)
        return path

    return write


def message_of(error):
    message = str(error.value)
    assert "\n" not in message
    return message


@given(recipe=recipes)
@settings(max_examples=150, deadline=None)
def test_round_trip_is_exact(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_bytes(dump_recipe(recipe).encode())
    assert load_recipe(path, Recipe) == recipe


def test_none_that_absence_would_not_bring_back_is_a_programmers_error():
    with pytest.raises(AssertionError, match="clip"):
        dump_recipe(Optimizer(clip=None))


def test_integers_become_floats_and_absent_sections_their_defaults(write):
    recipe = load_recipe(write("steps = 3\n[optimizer]\nrate = 2\nbetas = [0, 1]"), Recipe)
    assert recipe == Recipe(steps=3, optimizer=Optimizer(rate=2.0, betas=(0.0, 1.0)))
    assert type(recipe.optimizer.rate) is float
    assert type(recipe.optimizer.betas[1]) is float


def test_section_without_default_is_built_from_its_own_defaults(write):
    schema = dataclasses.make_dataclass("Outer", [("optimizer", Optimizer), ("seed", int | None)])
    assert load_recipe(write(""), schema) == schema(optimizer=Optimizer(), seed=None)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=7", {"steps": 7}),
        ("name=some words", {"name": "some words"}),
        ('name="7"', {"name": "7"}),
        ("name=", {"name": ""}),
        ("name=a=b", {"name": "a=b"}),
        ("name=1\nsteps = 9", {"name": "1\nsteps = 9"}),
        ("compile = true", {"compile": True}),
        ("layers=[1, 2]", {"layers": (1, 2)}),
        ("options.radius=0.2", {"options": {"radius": 0.2}}),
        ("options={radius = 1, names = ['a']}", {"options": {"radius": 1, "names": ["a"]}}),
        ("held_out.path=x", {"held_out": Source(path="x")}),
        ("optimizer.rate=1e-2", {"optimizer": Optimizer(rate=0.01)}),
        ("sources=[{path = 'a', weight = 2}]", {"sources": (Source(path="a", weight=2.0),)}),
    ],
)
def test_overrides(write, override, expected):
    assert load_recipe(write("steps = 1"), Recipe, [override]) == Recipe(**{"steps": 1} | expected)


def test_one_key_is_read_without_a_schema(write):
    path = write('name = "a"\nunknown = 3\n')
    assert recipe_key(path, "name") == "a"
    assert recipe_key(path, "name", ["name=b", "steps=2"]) == "b"
    assert recipe_key(path, "steps", default=7) == 7
    with pytest.raises(UserError, match="does not exist"):
        recipe_key(path.with_name("missing.toml"), "name")


def test_later_overrides_win(write):
    assert load_recipe(write("steps = 1"), Recipe, ["steps=2", "steps=3"]).steps == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("step = 1", "unknown key step; did you mean steps?"),
        ("steps = 1\n[optimizer]\nbeta = 1", "unknown key optimizer.beta; did you mean optimizer.betas?"),
        ("steps = 1\n[optimizer]\nxyz = 1", "unknown key optimizer.xyz; section optimizer knows rate, betas, clip"),
        ("steps = 1\n[[sources]]\npath = 'a'\n[[sources]]\nwidth = 2", "unknown key sources[1].width"),
        ("", "missing key steps: give it an integer"),
        ("steps = 1\n[held_out]\nweight = 2", "missing key held_out.path: give it a string (in quotes)"),
        ("steps = 1.0", "steps must be an integer, got 1.0"),
        ("steps = true", "steps must be an integer, got true"),
        ("steps = 1\nseed = 'x'", "seed must be an integer, got 'x'"),
        ("steps = 1\ncompile = 1", "compile must be true or false, got 1"),
        ("steps = 1\nname = 2024-01-01", "name must be a string (in quotes), got"),
        ("steps = 1\nlayers = 1", "layers must be a list, got 1"),
        ("steps = 1\nlayers = [1, 'x']", "layers[1] must be an integer, got 'x'"),
        ("steps = 1\noptimizer.betas = [1]", "optimizer.betas must be a list of 2, got a list of 1"),
        (f"steps = 1\noptimizer.rate = 1{'0' * 400}", "optimizer.rate must be a number, got 1"),
        ("steps = 1\noptimizer = 1", "optimizer must be a section with rate, betas, clip, got 1"),
        ("steps = 1\noptions = 1", "options must be a table of keys and values, got 1"),
        ("steps = 1\ndtype = 'float16'", "dtype must be one of 'float32', 'bfloat16', 8, got 'float16'"),
        ("steps = 1\ndtype = 8.0", "dtype must be one of"),
        ("steps = 1\n[optimizer]\nrate = -1", "optimizer: rate must be positive, got -1.0"),
        ("steps = 1\nsteps = 2\n", "is not valid TOML: Cannot overwrite a value (at line 2"),
        ("steps =", "is not valid TOML: Invalid value (at"),
    ],
)
def test_mistakes_in_a_recipe(write, content, message):
    path = write(content)
    with pytest.raises(UserError) as error:
        load_recipe(path, Recipe)
    assert message in message_of(error)
    assert str(path) in message_of(error)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "override 'steps' must read section.key=value"),
        ("=3", "override '=3' must read section.key=value"),
        ("optimizer..rate=3", "must read section.key=value"),
        ("steps.x=3", "steps is a value, not a section"),
        ("optimizer.rat=3", "unknown key optimizer.rat; did you mean optimizer.rate?"),
        ("optimizer.rate=fast", "optimizer.rate must be a number, got 'fast'"),
    ],
)
def test_mistakes_in_an_override(write, override, message):
    with pytest.raises(UserError) as error:
        load_recipe(write("steps = 1"), Recipe, [override])
    assert message in message_of(error)


def test_unreadable_recipes(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes(b"name = '\xe9'")
    with pytest.raises(UserError, match=r"latin.toml is not UTF-8 \(byte 8\)"):
        load_recipe(path, Recipe)
    with pytest.raises(UserError, match="is a folder, not a recipe"):
        load_recipe(tmp_path, Recipe)


def test_recipe_that_the_system_refuses_to_read(write, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    path = write("steps = 1")
    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read recipe .*: Permission denied"):
        load_recipe(path, Recipe)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    (folder / "marl").mkdir(parents=True)
    for name in ("quickstart", "ladder-70m", "marl/sparse"):
        (folder / f"{name}.toml").write_text("steps = 5")
    monkeypatch.setattr(config, "RECIPES", folder)
    return folder


def test_shipped_recipes_go_by_their_bare_name(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("quickstart") == find_recipe("quickstart.toml") == shipped / "quickstart.toml"
    assert load_recipe("quickstart", Recipe) == Recipe(steps=5)
    (tmp_path / "quickstart").mkdir()
    assert find_recipe("quickstart") == shipped / "quickstart.toml"
    (tmp_path / "quickstart.toml").write_text("steps = 6")
    assert find_recipe("quickstart.toml").resolve() == tmp_path / "quickstart.toml"


def test_shipped_recipes_of_a_room_go_by_their_folder_and_name(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("marl/sparse", "marl/sparse.toml", "recipes/marl/sparse", "recipes/marl/sparse.toml")
    assert {find_recipe(name) for name in names} == {shipped / "marl" / "sparse.toml"}
    assert find_recipe("recipes/quickstart.toml") == shipped / "quickstart.toml"
    for wrong in ("sparse", "other/sparse", "marl/recipes/sparse"):
        with pytest.raises(UserError, match="does not exist"):
            find_recipe(wrong)
    # A file of that path wins.
    (tmp_path / "recipes" / "marl").mkdir(parents=True)
    (tmp_path / "recipes" / "marl" / "sparse.toml").write_text("steps = 6")
    assert load_recipe("recipes/marl/sparse.toml", Recipe).steps == 6


def test_missing_recipe_suggests_similar_names(shipped, write):
    beside = write("", "experiment.toml")
    with pytest.raises(UserError) as error:
        find_recipe(beside.with_name("experimnt.toml"))
    assert f"did you mean {beside}?" in message_of(error)
    for wrong in ("quikstart", "quikstart.toml"):
        with pytest.raises(UserError) as error:
            find_recipe(wrong)
        assert "did you mean quickstart? (shipped recipes: ladder-70m, marl/sparse, quickstart)" in message_of(error)
    for wrong in ("marl/sprse", "recipes/marl/sprse.toml", "sparse"):
        with pytest.raises(UserError, match=r"did you mean (recipes/)?marl/sparse(\.toml)?\?"):
            find_recipe(wrong)
    with pytest.raises(UserError) as error:
        find_recipe("nowhere/zzz.toml")
    assert (
        message_of(error)
        == "recipe nowhere/zzz.toml does not exist (shipped recipes: ladder-70m, marl/sparse, quickstart)"
    )
