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


def test_a_fit_that_ends_inside_another_lifts_nothing():
    before = counts()

    def other():
        with one_blas_thread():
            pass

    with one_blas_thread():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert set(counts()) == {1}
    assert counts() == before
