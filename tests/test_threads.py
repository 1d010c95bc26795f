"""The limit on BLAS threads: set by the first fit inside, lifted by the last one out."""

import threading

from lmmjax.threads import _controller, one_blas_thread


def counts() -> list[int]:
    return [library["num_threads"] for library in _controller().info()]


def test_one_thread_inside_and_the_old_number_after():
    before = counts()
    with one_blas_thread():
        assert set(counts()) == {1}
        with one_blas_thread():
            assert set(counts()) == {1}
        assert set(counts()) == {1}
    assert counts() == before
    with one_blas_thread(False):
        assert counts() == before


def test_overlapping_fits_restore_what_was_there():
    before = counts()
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first():
        with one_blas_thread():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_in.wait(10)
    with one_blas_thread():
        second_in.set()
        first_out.wait(10)
        assert set(counts()) == {1}
    thread.join()
    assert counts() == before
