"""``mmseg-imbalance cache``, in this process: what is kept is listed, and cleared."""

from pathlib import Path

import numpy as np
import pytest

from mmseg_imbalance.commands import main
from mmseg_imbalance.frequency import ClassFrequency


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('MMSEG_IMBALANCE_CACHE', str(tmp_path))
    return tmp_path


def keep(folder, number, classes, **options):
    counts = np.ones((3, len(classes)))
    frequency = ClassFrequency.from_rows(classes, counts, [0] * 3, ['a', 'b', 'c'], **options)
    frequency.save(folder / f'class_frequency_{number:032x}.npz')
    return frequency


def test_a_line_of_the_list_is_a_file_of_counts(folder, capsys):
    names = ('道路', 'car [old]', 'c', 'd', 'e')
    counted = keep(folder, 1, names, source_names=['Street data/[1]'], dataset_images=2975)
    keep(folder, 2, ('a', 'b'))
    (folder / f'class_frequency_{3:032x}.npz').write_bytes(b'PK')
    (folder / 'notes.txt').touch()
    assert main(['cache']) == 0
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split('│')[1:-1]] for line in text.splitlines() if '│' in line]
    assert len(rows) == 3
    by_name = {row[0]: row[1:] for row in rows}
    listed = by_name[f'class_frequency_{1:032x}.npz']
    assert listed[:4] == ['5: 道路, car [old], c, d, ...', 'Street data/[1]', counted.counted, '3 of 2,975']
    assert by_name[f'class_frequency_{2:032x}.npz'][0] == '2: a, b'
    assert by_name[f'class_frequency_{3:032x}.npz'][0].startswith('damaged: ')
    assert f'3 files of class counts, 0.0 MB, in {folder}' in text


def test_clear_removes_the_counts_and_nothing_else(folder, capsys):
    keep(folder, 1, ('a', 'b'))
    (folder / 'notes.txt').touch()
    assert main(['cache', '--clear']) == 0
    assert f'1 files of class counts removed from {folder}' in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ['notes.txt']
    assert main(['cache', '--cache-dir', str(folder / 'nowhere')]) == 0
    assert '0 files of class counts' in capsys.readouterr().out


def test_without_a_folder_the_command_says_what_to_set(monkeypatch, tmp_path, capsys):
    def nowhere():
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.delenv('MMSEG_IMBALANCE_CACHE', raising=False)
    monkeypatch.setattr(Path, 'home', nowhere)
    with pytest.raises(SystemExit) as end:
        main(['cache'])
    assert end.value.code == 1
    assert 'Set MMSEG_IMBALANCE_CACHE' in capsys.readouterr().err
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit):
        main(['cache', '--cache-dir', str(tmp_path / 'file')])
    assert 'file' in capsys.readouterr().err
