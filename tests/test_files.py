import csv
import os
import threading

import pytest

from mmseg_imbalance.files import write_atomically


@pytest.mark.parametrize(('mode', 'content'), [('w', 'Straße\nzwei\r\n'), ('wb', b'\x00\xff\n')])
def test_text_and_bytes_are_written_as_given_into_new_folders(tmp_path, mode, content):
    path = tmp_path / 'new' / 'folder' / 'file.txt'
    for written in (content, content * 2):  # the second takes the place of the first
        with write_atomically(path, mode) as file:
            file.write(written)
        assert path.read_bytes() == (written.encode() if mode == 'w' else written)
    assert [p.name for p in path.parent.iterdir()] == ['file.txt']


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('exists', [True, False])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, error, exists):
    path = tmp_path / 'file.txt'
    if exists:
        path.write_text('old')

    def fail(file):
        file.write('half')
        file.flush()
        assert [p.suffix for p in tmp_path.iterdir() if p != path] == ['.tmp']
        raise error

    with pytest.raises(error), write_atomically(path) as file:
        fail(file)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('file.txt', 'old')] * exists


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / 'file.txt'
    path.write_text('old')
    with write_atomically(str(path)) as file:
        file.write('new')
        file.flush()
        assert path.read_text() == 'old'
    assert path.read_text() == 'new'


def test_rows_of_a_csv_have_no_empty_lines_between_them(tmp_path):
    with write_atomically(tmp_path / 'table.csv') as file:
        csv.writer(file).writerows([['a', 1], ['b', 2]])
    assert (tmp_path / 'table.csv').read_bytes() == b'a,1\r\nb,2\r\n'


def test_a_link_stays_a_link_and_a_pipe_is_written_into(tmp_path):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'folder' / 'file.txt')
    with write_atomically(tmp_path / 'link') as file:
        file.write('text')
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'folder' / 'file.txt').read_text() == 'text'

    os.mkfifo(tmp_path / 'pipe')
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / 'pipe').read_text()))
    reader.start()
    with write_atomically(tmp_path / 'pipe') as file:
        file.write('text')
    reader.join(10)
    assert read == ['text']
    assert (tmp_path / 'pipe').is_fifo()


def test_a_folder_and_another_mode_are_refused(tmp_path):
    with pytest.raises(IsADirectoryError), write_atomically(tmp_path):
        pass
    with pytest.raises(ValueError, match="mode='a', allowed are 'w'"), write_atomically(tmp_path / 'a', 'a'):
        pass
    assert not list(tmp_path.iterdir())
