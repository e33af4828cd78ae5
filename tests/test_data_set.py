"""What support/data_set.py promises (damaged data sets are in test_bad_input.py)."""

import pytest
from texts import content

from prepare_data import load, prepare
from support.cli import BadInput
from support.data_set import is_data_set


def test_writing_into_loaded_ids_leaves_the_files_as_they_are(tmp_path):
    folder = prepare(data_dir=tmp_path)
    before, (train, val, _) = content(folder), load(folder)
    train[:9], val[:9] = 1, 2
    assert train[:9].tolist() == [1] * 9
    del train, val
    assert content(folder) == before


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_one_file_of_a_data_set_makes_it_one_to_be_looked_at(tmp_path, name):
    assert not is_data_set(tmp_path / "nowhere") and not is_data_set(tmp_path)
    (tmp_path / ".DS_Store").write_bytes(b"")
    assert not is_data_set(tmp_path)
    (tmp_path / "thesis.txt").write_bytes(b"years")
    with pytest.raises(BadInput, match="is not a data set; move it"):
        is_data_set(tmp_path)
    (tmp_path / name).write_bytes(b"")
    assert is_data_set(tmp_path)
    with pytest.raises(BadInput, match="is not a data set; move it"):
        is_data_set(tmp_path / name)
