"""Bundled data sets: types, level order, names, descriptions, size."""

from pathlib import Path

import pandas as pd
import pytest

import lmmjax.datasets
from lmmjax.datasets import describe_dataset, list_datasets, load_dataset
from lmmjax.datasets._catalog import DATASETS
from lmmjax.errors import DataError

NAMES = [info.name for info in DATASETS]
SYNONYMS = [(synonym, info.name) for info in DATASETS for synonym in info.synonyms]
ORDERED = {("cake", "temperature"), ("InstEval", "studage"), ("InstEval", "lectage")}
ORDERED |= {("Oxboys", "Occasion")}

# Levels as R's levels() prints them, where they are not sorted.
LEVELS = {
    ("Machines", "Worker"): ["6", "2", "4", "1", "3", "5"],
    ("Oats", "Block"): ["VI", "V", "III", "IV", "II", "I"],
    ("Rail", "Rail"): ["2", "5", "1", "6", "3", "4"],
    ("Orthodont", "Sex"): ["Male", "Female"],
    ("MathAchieve", "Sector"): ["Public", "Catholic"],
    ("ratpup", "Treatment"): ["Control", "Low", "High"],
    ("weights", "group"): ["Control", "Low", "High"],
    ("ergoStool", "Subject"): ["8", "5", "4", "9", "6", "3", "7", "1", "2"],
    ("Ovary", "Mare"): ["4", "2", "11", "7", "5", "9", "1", "6", "10", "3", "8"],
    ("cake", "temperature"): ["175", "185", "195", "205", "215", "225"],
    ("InstEval", "dept"): "15 5 10 12 6 7 4 8 9 14 1 3 11 2".split(),
}


@pytest.fixture(scope="module")
def frames() -> dict[str, pd.DataFrame]:
    return {name: load_dataset(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_table_agrees_with_its_description(frames, name):
    info = describe_dataset(name)
    assert len(frames[name]) == info.rows
    assert frames[name].columns.tolist() == list(info.columns)
    assert frames[name].notna().all(axis=None)


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_typed(frames, name):
    for column, values in frames[name].items():
        if isinstance(values.dtype, pd.CategoricalDtype):
            assert values.cat.ordered is ((name, column) in ORDERED)
        else:
            assert str(values.dtype) in ("int64", "float64")


@pytest.mark.parametrize(("name", "column"), LEVELS)
def test_levels_keep_the_order_of_r(frames, name, column):
    assert frames[name][column].cat.categories.tolist() == LEVELS[name, column]


def test_every_level_occurs(frames):
    for frame in frames.values():
        for values in frame.select_dtypes("category").items():
            assert values[1].nunique() == len(values[1].cat.categories), values[0]


def test_first_and_last_row_of_sleepstudy(frames):
    assert frames["sleepstudy"].iloc[0].tolist() == [249.56, 0, "308"]
    assert frames["sleepstudy"].iloc[-1].tolist() == [364.1236, 9, "372"]


def test_integers_stay_integers(frames):
    assert frames["sleepstudy"]["Days"].dtype == "int64"
    assert frames["Penicillin"]["diameter"].dtype == "int64"
    assert frames["Oats"]["nitro"].dtype == "float64"


@pytest.mark.parametrize("info", DATASETS, ids=NAMES)
def test_description_is_complete(info):
    assert info.source and info.citation and info.summary and info.description
    assert all(info.columns.values())
    page = str(info)
    assert info.name in page and "Source: " in page and "Cite: " in page
    assert max(map(len, page.splitlines())) <= 96


def test_list_names_every_data_set():
    table = list_datasets()
    assert table.columns.tolist() == ["name", "rows", "summary"]
    assert table["name"].tolist() == NAMES
    assert {"sleepstudy", "InstEval", "ratpup", "houses", "schools", "weights", "simpson"} <= set(
        NAMES
    )


@pytest.mark.parametrize(("synonym", "name"), SYNONYMS)
def test_synonyms_lead_to_the_same_table(frames, synonym, name):
    pd.testing.assert_frame_equal(load_dataset(synonym), frames[name])


def test_case_of_the_name_is_ignored(frames):
    pd.testing.assert_frame_equal(load_dataset("dyestuff2"), frames["Dyestuff2"])
    assert describe_dataset("SLEEPSTUDY").name == "sleepstudy"


def test_unknown_name_offers_close_ones():
    with pytest.raises(DataError, match=r"named 'slepstudy'.*Did you mean 'sleepstudy'\?"):
        load_dataset("slepstudy")
    with pytest.raises(DataError, match="Expected one of sleepstudy"):
        describe_dataset("qqqqqq")


def test_every_call_returns_a_new_table(frames):
    changed = load_dataset("Rail")
    changed["travel"] = 0
    assert load_dataset("Rail")["travel"].sum() == frames["Rail"]["travel"].sum() > 0


def test_files_are_small():
    folder = Path(lmmjax.datasets.__file__).parent / "data"
    files = list(folder.iterdir())
    assert {path.stem for path in files} == set(NAMES)
    assert sum(path.stat().st_size for path in files) < 1_200_000
