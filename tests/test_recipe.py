import pytest
import yaml

import bmm
from bmm.errors import BmmError, RecipeError
from bmm.functions import load_function
from bmm.recipe import Recipe


def test_defaults_round_trip_through_yaml(tmp_path):
    recipe = Recipe.from_dict({"anchor": "ties", "knobs": {"density": 0.3}, "rho": [0.8, 1.2], "budget": 12})
    path = tmp_path / "r.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe
    assert "seed" not in yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    ("raw", "message", "hint"),
    [
        ({"ancor": "tsv"}, "unknown key 'ancor'", "anchor"),
        ({"objective": "agreement"}, "unknown key 'objective'", "its name is score_by now"),
        ({"anchor": "tvs"}, "tvs", "tsv"),
        ({"knobs": {"scal": 1.0}}, "scal", "scale"),
        ({"knobs": {"scale": 99.0}}, "scale", ""),
        ({"grams": "datafre"}, "datafre", "datafree"),
        ({"budget": 1}, "at least 2", ""),
        ({"budget": 2.5}, "budget", ""),
        ({"budget": "many"}, "budget", ""),
        ({"gamma": 1.5}, "from 0 to 1", ""),
        ({"rho": [1.2, 0.8]}, "range", "low < high"),
        ({"rho": 3}, "two numbers", ""),
        ({"experts": ["a"]}, "mapping", ""),
        ({"skip": "classifier.*"}, "list", ""),
        ({"weights": {"a": float("nan")}}, "weight of a", "finite"),
        ({"zoo": "vit8", "base": "x"}, "exclude", ""),
        ({"anchor": "path:x", "knobs": {"scale": 1}}, "no knobs", ""),
    ],
)
def test_mistakes_are_named(raw, message, hint):
    with pytest.raises(BmmError) as caught:
        Recipe.from_dict(raw)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("text", ["- a\n- b\n", "anchor: [unclosed", "42"])
def test_files_that_are_no_recipe(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        Recipe.load(path)


@pytest.mark.parametrize(
    "text", ["experts: {a: x, a: y}", "budget: 3\nanchor: ties\nbudget: 4", "knobs:\n  d: 1\n  d: 2"]
)
def test_a_key_that_is_there_twice_is_refused(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"is there twice .*line"):
        Recipe.load(tmp_path / "r.yaml")


def test_a_merged_mapping_may_be_overridden(tmp_path):
    (tmp_path / "r.yaml").write_text("weights: &w {a: 1, b: 2}\nfloor: {<<: *w, b: 0.5}\n")
    assert Recipe.load(tmp_path / "r.yaml").floor == {"a": 1.0, "b": 0.5}


def test_experts_of_one_name_are_not_one_expert():
    with pytest.raises(RecipeError, match=r"expert 'model' is given twice, a/model and b/model"):
        bmm.make_recipe(experts=["a/model", "b/model"])


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="cannot read recipe"):
        Recipe.load(tmp_path / "none.yaml")


def test_paths_are_relative_to_the_recipe_and_overrides_win(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("base: b\nexperts: {x: e/x}\ntasks: t.py:make\nanchor: path:m\nbudget: 9\n")
    recipe = Recipe.load(path, budget=7)
    assert recipe.base == str(tmp_path / "b")
    assert recipe.experts == {"x": str(tmp_path / "e/x")}
    assert recipe.tasks == f"{tmp_path}/t.py:make"
    assert recipe.anchor == f"path:{tmp_path}/m"
    assert recipe.budget == 7


def test_load_function(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def make():\n    return 7\n")
    assert load_function(f"{path}:make", "tasks")() == 7
    with pytest.raises(RecipeError, match="no function 'made'") as caught:
        load_function(f"{path}:made", "tasks")
    assert "make" in caught.value.hint
    with pytest.raises(RecipeError, match="names no function"):
        load_function("mine.py", "tasks")
    with pytest.raises(RecipeError, match="no file"):
        load_function(f"{tmp_path}/other.py:make", "tasks")
    path.write_text("import no_such_module_here\n")
    with pytest.raises(RecipeError, match="ModuleNotFoundError"):
        load_function(f"{path}:make", "tasks")


@pytest.mark.parametrize("given", ["a,b=c+d", ["a", "b=c+d"], ["a,b=c+d"], ("a", "b=c+d")])
def test_objectives_come_as_text_or_list(given):
    recipe = Recipe.from_dict({"objectives": given})
    assert recipe.objectives == ("a", "b=c+d")
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("given", [{"b": "c+d"}, 3])
def test_objectives_come_as_nothing_else(given):
    with pytest.raises(RecipeError, match="a list expected"):
        Recipe.from_dict({"objectives": given})


@pytest.mark.parametrize(("given", "floor"), [(0.9, {"*": 0.9}), (1, {"*": 1.0}), ({"a": 0.5}, {"a": 0.5})])
def test_a_floor_is_one_number_or_one_a_task(given, floor):
    recipe = Recipe.from_dict({"floor": given})
    assert recipe.floor == floor
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("goal", [{"goal": "worst"}, {"floor": 0.9}, {"objectives": "a,b"}])
def test_early_stopping_goes_with_the_mean_alone(goal):
    with pytest.raises(RecipeError, match="early_stopping does not go with"):
        Recipe.from_dict({"early_stopping": 0.05, **goal})
    Recipe.from_dict({"early_stopping": 0.05, "goal": "mean"})


@pytest.mark.parametrize("given", [True, "high", [0.9]])
def test_a_floor_is_nothing_else(given):
    with pytest.raises(RecipeError, match="expected"):
        Recipe.from_dict({"floor": given})


def test_make_recipe_takes_a_file_a_mapping_a_recipe_or_nothing_and_keywords_win(tmp_path):
    (tmp_path / "r.yaml").write_text("anchor: ties\nbudget: 9\n")
    forms = (tmp_path / "r.yaml", str(tmp_path / "r.yaml"), {"anchor": "ties", "budget": 9})
    made = [bmm.make_recipe(form, budget=12) for form in forms]
    assert made == [Recipe.from_dict({"anchor": "ties", "budget": 12})] * 3
    assert bmm.make_recipe(made[0], seed=3) == Recipe.from_dict({"anchor": "ties", "budget": 12, "seed": 3})
    assert bmm.make_recipe() == Recipe()
    assert bmm.make_recipe(experts=["m/cars", "m/dogs.safetensors"]).experts == {
        "cars": "m/cars", "dogs": "m/dogs.safetensors"
    }  # fmt: skip
