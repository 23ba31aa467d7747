import numpy
import pytest
import torch

from normlib import testing

NAN, INF = float("nan"), float("inf")


def test_equal_values_agree_in_every_container():
    a = torch.tensor([1.0, NAN, INF])
    assert testing.assert_close([a, (a, 2.0)], [a, (a, 2.0)]) == 0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 2.0], [1.0, 2.001]),
        ([1.0, NAN], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, NAN]),
        ([1.0, INF], [1.0, -INF]),
        ([1.0, INF], [1.0, 5.0]),
        ([NAN], [INF]),
    ],
)
def test_what_differs_is_refused(a, b):
    with pytest.raises(AssertionError, match="largest difference"):
        testing.assert_close(numpy.array(a), numpy.array(b))


def test_shapes_must_be_the_same():
    with pytest.raises(AssertionError, match=r"\(1, 3\).*\(3,\)"):
        testing.assert_close(torch.zeros(1, 3), torch.zeros(3))


def test_the_difference_is_a_share_of_the_expected_magnitude():
    found = testing.assert_close([110.0, 0.0], [100.0, 0.0], tolerance=0.2)
    assert found == pytest.approx(0.1)
    found = testing.assert_close(
        numpy.array([0.2]), 0.1 * numpy.ones(1), tolerance=0.2
    )
    assert found == pytest.approx(0.1)


def test_without_a_floor_small_values_are_compared_as_shares():
    testing.assert_close(1e-6, 2e-6, tolerance=1e-5)
    with pytest.raises(AssertionError):
        testing.assert_close(1e-6, 2e-6, tolerance=1e-5, floor=0.0)
    testing.assert_close(0.0, 0.0, floor=0.0)
    with pytest.raises(AssertionError):
        testing.assert_close(1e-30, 0.0, floor=0.0)


def test_complex_values_are_not_compared():
    with pytest.raises(AssertionError, match="complex"):
        testing.assert_close(torch.tensor([1j]), torch.tensor([1j]))


def test_the_worst_of_a_sequence_is_recorded(monkeypatch):
    monkeypatch.setattr(testing, "comparisons", [])
    exact, coarse = torch.ones(2).double(), torch.ones(2).bfloat16()
    testing.agree("both", [exact, 1.01 * coarse], [exact, coarse])
    (found,) = testing.comparisons
    assert found.dtype == "bfloat16"
    assert 0.005 < found.difference <= found.tolerance == 3e-2


def test_nothing_does_not_agree_with_nothing():
    with pytest.raises(ValueError, match="dx: nothing"):
        testing.agree("dx", [], [])


def test_sequences_must_be_of_one_length():
    with pytest.raises(AssertionError):
        testing.assert_close([1.0], [1.0, 1.0])


def test_the_tolerance_is_that_of_the_coarser_dtype():
    a = torch.ones(3, dtype=torch.float64)
    testing.assert_close(a, (a + 1e-6).float())
    with pytest.raises(AssertionError):
        testing.assert_close(a, a + 1e-6)


def test_agree_leaves_a_trace_and_names_what_differs(monkeypatch):
    monkeypatch.setattr(testing, "comparisons", [])
    testing.agree("dx", torch.ones(2), torch.ones(2) + 1e-6)
    (found,) = testing.comparisons
    assert (found.name, found.device, found.dtype) == ("dx", "cpu", "float32")
    assert 0 < found.difference <= found.tolerance
    with pytest.raises(AssertionError, match=r"^dbias: "):
        testing.agree("dbias", torch.ones(2), torch.zeros(2))
    assert len(testing.comparisons) == 1


def test_devices_can_be_restricted(monkeypatch):
    monkeypatch.setattr(testing, "_devices", None)
    assert testing.devices()[0] == "cpu"
    testing.use_devices("cpu")
    assert testing.devices() == ["cpu"]
    testing.use_devices()
    assert testing._devices is None


def test_source_is_printed_as_it_stands(capsys):
    testing.show_source(testing.devices)
    assert capsys.readouterr().out.startswith("def devices() -> list[str]:")
