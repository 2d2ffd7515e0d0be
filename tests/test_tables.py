from paperlib.tables import align_columns


def test_columns_are_aligned_on_their_side():
    rows = [("name", "MACs", "kind"), ("a", "1,000", "conv"), ("total", "2", "")]
    assert align_columns(rows, "<><").splitlines() == [
        "name    MACs  kind",
        "a      1,000  conv",
        "total      2",
    ]
