"""The ranking of training images by how doubtful their labels are; how they are followed is in test_images."""

import numpy as np
import pyarrow as pa

from raycifar.analysis.suspects import rank_suspects


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
    assert rank_suspects(FILE).to_csv().splitlines() == [
        "index,label,suggested,score,network,copy,copy_label",
        "5,aquarium_fish,apple,1.000000,apple,,",
        "9,aquarium_fish,apple,1.000000,apple,,",
        "3,apple,aquarium_fish,0.333333,apple,,",
    ]


def test_where_nothing_was_seen_unblended_there_is_no_ranking():
    assert rank_suspects(stats_file(index=[1], label=[0], rival=[0], margin=[float("nan")], seen=[0])) is None


def test_near_duplicates_with_different_labels_come_first_and_a_copy_speaks_for_its_label():
    file = stats_file(
        index=[1, 2, 3, 4, 5, 6],
        label=[0, 1, 0, 0, 1, 1],
        rival=[1, 0, 1, 1, 0, 0],
        margin=[3.0, 2.0, -5.0, -4.0, -1.0, 1.0],
        seen=[4] * 6,
    )
    found = rank_suspects(file, np.array([[3, 4], [1, 2], [6, 99]]))
    assert found.index.tolist() == [2, 1, 5, 3, 4, 6]  # 3 and 4 count as undecided
    assert found.copy.tolist() == [1, 2, -1, 4, 3, -1]
    assert found.contradicted().tolist() == [True, True, False, False, False, False]
    assert found.confirmed().tolist() == [False, False, False, True, True, False]
    assert found.suggested.tolist()[:2] == [0, 1]
    assert found.says.tolist() == [1, 0, 0, 1, 1, 1]
    assert (np.diff(found.score) <= 0).all()
    assert found.to_csv().splitlines()[1] == "2,aquarium_fish,apple,1.000000,aquarium_fish,1,apple"
