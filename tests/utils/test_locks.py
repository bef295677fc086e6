"""One process at a time."""

import errno
import fcntl
import multiprocessing
import os
from types import SimpleNamespace

import pytest

from fpn_ablate.utils import locks
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.locks import exclusive, is_free, lock


def _hold(path, held):
    with exclusive(path, "x"):
        held.set()
        multiprocessing.Event().wait()


def test_a_lock_is_gone_with_the_process_that_held_it_and_one_that_waits_says_so(tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    held, path = context.Event(), tmp_path / "deep" / "lock"
    child = context.Process(target=_hold, args=(path, held))
    child.start()
    assert held.wait(10)
    context.Process(target=_kill_soon, args=(child.pid,)).start()
    with exclusive(path, "row fpn"):
        child.join(5)
        assert not child.is_alive()
    assert "row fpn: another row or process is working on it; waiting" in capsys.readouterr().err
    with exclusive(path, "row fpn"):
        pass
    assert not capsys.readouterr().err


def _kill_soon(process):
    import signal
    import time

    time.sleep(0.2)
    os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    """And no file that outlives its process takes the lock's place."""

    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.raises(UserError, match=r"lock: cannot be locked \(.*\); choose an output folder \(out\) on a disk"),
        exclusive(tmp_path / "lock", "x"),
    ):
        pass


def test_a_lock_file_that_may_only_be_read_tells_whether_it_is_held(tmp_path, monkeypatch):
    """As another user's: root may write everything, so that the system's answer is given here."""

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = tmp_path / "a.lock"
    with lock(path):
        monkeypatch.setattr(locks, "lock", denied)
        assert not is_free(path)
    assert is_free(path) and is_free(tmp_path / "none.lock")
    monkeypatch.setattr(locks, "lock", lambda _: SimpleNamespace(acquire=denied))
    with (
        pytest.raises(UserError, match=r"cannot be written \(Permission denied\); make it writable"),
        exclusive(path, "a"),
    ):
        pass
