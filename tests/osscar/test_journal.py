"""Journals: of one sort and one process at a time, gone where nothing is done, never believed."""

import dataclasses

import pytest

from osscar.base.errors import BusyError, JournalError, OutputError
from osscar.base.files import LOCK_FILE
from osscar.preparation.journal import Fingerprint, Journal, JournalManifest


class Things(Journal):
    what = "thing"
    manifest_file = "thing.json"
    done_files = ("done/*.txt",)
    other_files = ("note", "done")
    otherwise = "give another directory (`--out`)"


ASKED = JournalManifest("osscar.thing/1", {"batch_size": 4, "files": ["a"]}, None)
DENSE = Fingerprint({}, "w", "d", "s", {"device": "x"})


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.fixture
def journal(tmp_path):
    """A journal in which three things are done."""
    journal = Things(tmp_path / "deep" / "out")
    with journal.locked():
        journal.begin(ASKED)
        journal.make("done")
        for number in range(3):
            (journal.directory / "done" / f"{number}.txt").write_text("done")
        (journal.directory / "note").write_text("a note")
    return journal


def names(place):
    return {str(path.relative_to(place)) for path in place.rglob("*")}


def test_what_is_done_stays_and_goes_on_only_with_the_same(journal):
    again = Things(journal.directory)
    with again.locked(), again.locked():
        read = dataclasses.replace(ASKED, dense=DENSE)  # which had not been read before
        assert again.begin(ASKED) == again.begin(read) == ASKED
        assert [path.name for path in again.done] == ["0.txt", "1.txt", "2.txt"]
    for change, message in (
        ({"schema": "osscar.thing/2"}, "it is 'osscar.thing/1', and this version"),
        ({"asked": {"files": ["a"]}}, "batch_size was 4 and is None"),
        ({"asked": {**ASKED.asked, "more": 1}}, "more was None and is 1"),
    ):
        expected = rf"holds another thing: {message}.* or give another directory \(`--out`\)$"
        with pytest.raises(JournalError, match=expected):
            again.begin(dataclasses.replace(ASKED, **change))
    assert again.begin(dataclasses.replace(ASKED, asked={}), anew=True).asked == {}


def test_where_nothing_is_done_nothing_stays(tmp_path, journal):
    for path in journal.done:
        path.unlink()
    fresh = Things(tmp_path / "also" / "deep")
    for one in (journal, fresh):
        with one.locked():
            one.begin(ASKED)
            assert (one.directory / LOCK_FILE).exists()
        assert not one.directory.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]  # which was there before


def test_another_process_and_other_files_are_left_alone(tmp_path, journal):
    other = Things(journal.directory)
    with journal.locked():
        before = names(tmp_path)
        for step in (other.remove, other.locked().__enter__):
            with pytest.raises(BusyError, match="is at work in"):
                step()
        assert names(tmp_path) == before
    with pytest.raises(Killed), journal.locked():
        raise Killed
    with journal.locked(), pytest.raises(BusyError):  # locked anew, and by one
        other.locked().__enter__()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0.txt").write_text("mine")
    (tmp_path / "file").touch()
    said = r"holds '0.txt' and no thing; move that away, or give another directory \(`--out`\)$"
    with pytest.raises(JournalError, match=said):
        Things(tmp_path / "mine").locked().__enter__()
    with pytest.raises(OutputError, match=r"cannot write .*: Not a dir"):
        Things(tmp_path / "file" / "deep").make("x")
    (tmp_path / "mine" / "0.txt").rename(tmp_path / "mine" / "thing.json")
    with Things(tmp_path / "mine").locked():
        pass
    assert names(tmp_path / "mine") >= {"thing.json"}
