"""The ranking of training images by how doubtful their labels are; how they are followed is in test_images."""

import numpy as np
import pyarrow as pa

from raycifar.analysis.suspects import rank_suspects
from raycifar.data import DatasetInfo


def stats_file(**columns):
    return pa.table(columns)


FILE = stats_file(
    index=[3, 5, 8, 9],
    label=[0, 1, 0, 1],
    rival=[1, 0, 1, 0],
    margin=[2.0, -1.0, float("nan"), -1.0],
    seen=[4, 4, 0, 1],
)


def test_the_smallest_margin_comes_first_and_what_was_never_seen_is_left_out():
    found = rank_suspects(FILE)
    assert found.index.tolist() == [5, 9, 3]
    assert found.suggested.tolist() == [0, 0, 1]
    assert np.allclose(found.score, [1, 1, 1 / 3])


def test_the_table_has_the_names_of_the_data_set():
    info = DatasetInfo(("cat", "dog"), ("pet",), 32, (0.5,) * 3, (0.25,) * 3)
    assert rank_suspects(FILE).to_csv(info).splitlines() == [
        "index,label,suggested,score,network,copy,copy_label",
        "5,dog,cat,1.000000,cat,,",
        "9,dog,cat,1.000000,cat,,",
        "3,cat,dog,0.333333,cat,,",
    ]


def test_where_nothing_was_seen_unblended_there_is_no_ranking():
    assert rank_suspects(stats_file(index=[1], label=[0], rival=[0], margin=[float("nan")], seen=[0])) is None
