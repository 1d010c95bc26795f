"""Classical data sets of mixed-model practice, typed and cited.

Every table is a Parquet file that keeps R's level order and ordered flags. ``list_datasets`` names
them, ``describe_dataset`` tells columns, units, source and citation, ``load_dataset`` reads one.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files
from io import BytesIO
from typing import TYPE_CHECKING

from lmmjax.datasets._catalog import DATASETS, DatasetInfo
from lmmjax.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DatasetInfo", "describe_dataset", "list_datasets", "load_dataset"]


def list_datasets() -> pd.DataFrame:
    """List the bundled data sets.

    Returns
    -------
    pandas.DataFrame
        One row per data set, columns ``name rows summary``.

    Examples
    --------
    >>> list_datasets().set_index("name").loc["sleepstudy", "rows"].item()
    180
    """
    import pandas as pd

    rows = [(info.name, info.rows, info.summary) for info in DATASETS]
    return pd.DataFrame(rows, columns=["name", "rows", "summary"])


def describe_dataset(name: str) -> DatasetInfo:
    """Describe a bundled data set: design, columns with units, source and citation.

    Parameters
    ----------
    name : str
        Name or synonym; case is ignored.

    Returns
    -------
    DatasetInfo
        Printing it gives a readable page.

    Raises
    ------
    DataError
        If no data set has this name; the message offers the closest ones.

    Examples
    --------
    >>> describe_dataset("Sleepstudy").columns["Reaction"]
    'average reaction time (ms)'
    """
    names = _names()
    info = names.get(str(name).lower())
    if info is None:
        raise DataError(_unknown(name, names))
    return info


def load_dataset(name: str) -> pd.DataFrame:
    """Load a bundled data set.

    Parameters
    ----------
    name : str
        Name or synonym; case is ignored. ``list_datasets()`` shows all.

    Returns
    -------
    pandas.DataFrame
        Factors are categoricals with R's level order, ``ordered`` where they are ordered in the
        analysis; whole numbers are int64, all others float64. A new table at every call.

    Raises
    ------
    DataError
        If no data set has this name; the message offers the closest ones.

    Notes
    -----
    Factors that nlme orders only for plotting (Subject, Worker ...) are unordered here, with the
    same level order, so that they get treatment contrasts.

    Examples
    --------
    >>> load_dataset("Machines")["Worker"].cat.categories.tolist()
    ['6', '2', '4', '1', '3', '5']
    """
    import pandas as pd

    info = describe_dataset(name)
    content = files(__package__).joinpath("data", f"{info.name}.parquet").read_bytes()
    return pd.read_parquet(BytesIO(content), engine="pyarrow")


def _names() -> dict[str, DatasetInfo]:
    """Map every name and synonym, in lower case, to its data set."""
    return {name.lower(): info for info in DATASETS for name in (info.name, *info.synonyms)}


def _unknown(name: str, names: dict[str, DatasetInfo]) -> str:
    close = get_close_matches(str(name).lower(), names, n=3)
    matches = list(dict.fromkeys(names[key].name for key in close))
    hint = f"Did you mean {' or '.join(map(repr, matches))}? " if matches else ""
    return (
        f"Found no bundled data set named {name!r}. Expected one of "
        f"{', '.join(info.name for info in DATASETS)}. {hint}"
        "See lmmjax.datasets.list_datasets()."
    )
