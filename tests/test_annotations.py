import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmseg_imbalance.label_files import value_counts


@given(
    st.integers(0, 70),
    st.integers(1, 70),
    st.integers(1, 256),
    st.integers(1, 40),
    st.sampled_from([np.uint8, np.int64, np.uint16, bool]),
    st.integers(0, 2**32 - 1),
)
def test_value_counts_equal_numpy(height, width, values, run, dtype, seed):
    labels = np.random.default_rng(seed).integers(0, values, height * width)
    labels = np.repeat(labels, run)[: height * width].reshape(height, width).astype(dtype)
    for array in (labels, labels.T, labels[::2]):
        got = value_counts(array)
        want = np.unique(array, return_counts=True)
        assert [x.tolist() for x in got] == [x.astype(int).tolist() for x in want]
