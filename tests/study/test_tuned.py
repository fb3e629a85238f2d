"""Names of tuned models: refused before anything is loaded where a table or a folder would mix them up."""

from __future__ import annotations

import pytest

import rim_lens as rl
from rim_lens.errors import ModelError, StudyFolderError
from rim_lens.folder import ResultFolder
from rim_lens.study.tuned import TAKEN, by_name, same_shape, same_weights
from tests.families import FAMILIES, wrapped

RIGHT_TO_LEFT = "care\N{RIGHT-TO-LEFT OVERRIDE}ful"


@pytest.mark.parametrize(
    "name", [*TAKEN, "", ".", "..", "a/b", "a\\b", "a:b", " a", "_", "a\nb", RIGHT_TO_LEFT]
)
def test_names_that_a_folder_or_table_would_mix_up_are_refused(name):
    with pytest.raises(ValueError, match="called"):
        by_name({name: "toy:careful"})
    with pytest.raises(ValueError, match="called"):
        rl.Study("no such model", tuned={name: "toy:careful"})


@pytest.mark.parametrize(
    "tuned", [["toy:careful", "toy_careful"], {"a": "x", "A": "y"}, ["runs/a", "runs_a/"]]
)
def test_two_models_of_one_name_are_refused(tuned):
    with pytest.raises(ValueError, match="would both be called"):
        by_name(tuned)


def test_names_keep_their_order_and_a_single_one_is_a_list_of_one():
    assert list(by_name({"z": "x", "a": "y"})) == ["z", "a"]
    assert by_name("toy:deviate") == {"toy_deviate": "toy:deviate"}


def test_what_is_no_model_is_told():
    """The second place is that of tuned models; requests put there are easily meant otherwise."""
    requests = rl.load_prompts("harmful", language="toy", split="select")[:2]
    for given in (requests, [wrapped("llama", FAMILIES[0])]):
        with pytest.raises(ModelError, match=r"holds a .*give requests by keyword"):
            rl.Study("toy", given)
    with pytest.raises(ModelError, match="HookedTransformer or TransformerBridge"):
        rl.Study("toy", {"a": requests})


def test_a_model_of_another_shape_is_no_fine_tune():
    with pytest.raises(ModelError, match="not a fine-tune"):
        same_shape(rl.load_model("toy"), wrapped("llama", FAMILIES[0]), "other")


def test_results_stay_with_the_weights_that_gave_them(tmp_path):
    folder = ResultFolder(tmp_path)
    first, second = rl.load_model("toy:careful"), rl.load_model("toy:deviate")
    same_weights(folder, first, "one", ["tuned/one/heads"])
    same_weights(folder, first, "one", ["tuned/one/heads"])
    with pytest.raises(StudyFolderError, match="weights"):
        same_weights(folder, second, "one", ["tuned/one/heads"])
    (tmp_path / "tuned/two/heads").mkdir(parents=True)
    with pytest.raises(StudyFolderError, match=r"is\s+missing"):
        same_weights(folder, second, "two", ["tuned/two/heads"])
