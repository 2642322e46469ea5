import pytest

from sglp_bench.judge.ceiling import decode_ceiling, fraction_of_ceiling, gain_fraction, prefill_ceiling
from sglp_deploy.errors import ConfigError

# Llama-3.2-1B from its published configuration: 16 layers, hidden 2048, 32 heads and 8 key-value heads of 64,
# feed-forward 8192, vocabulary 128256, tied.
LAYER = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048
HEAD = 128256 * 2048


def test_the_shapes_give_the_parameter_counts_of_the_worked_row() -> None:
    assert pytest.approx(60.8e6, rel=1e-3) == LAYER
    assert pytest.approx(262.7e6, rel=1e-3) == HEAD


@pytest.mark.parametrize(
    ("removed", "decode", "prefill"), [(2, 1.109, 1.143), (4, 1.245, 1.333), (6, 1.419, 1.600), (8, 1.649, 2.000)]
)
def test_ceilings_of_llama_3_2_1b(removed: int, decode: float, prefill: float) -> None:
    layers, dropped = [LAYER] * 16, list(range(3, 3 + removed))
    assert decode_ceiling(layers, dropped, HEAD) == pytest.approx(decode, abs=6e-4)
    assert prefill_ceiling(layers, dropped) == pytest.approx(prefill, abs=6e-4)


def test_unequal_layers_count_with_their_own_parameters() -> None:
    assert decode_ceiling([10, 30, 10], [1], 50) == pytest.approx(100 / 70)
    assert prefill_ceiling([10, 30, 10], [1]) == pytest.approx(50 / 20)


def test_nothing_removed_means_nothing_to_gain() -> None:
    assert decode_ceiling([5, 5], [], 1) == prefill_ceiling([5, 5], []) == 1.0
    assert gain_fraction(1.0, 1.0) is None


def test_fractions_of_a_ceiling() -> None:
    assert fraction_of_ceiling(1.2, 1.25) == pytest.approx(0.96)
    assert gain_fraction(1.2, 1.25) == pytest.approx(0.8)
    assert gain_fraction(1.0, 1.25) == 0.0


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dropped=\[1, 1\] repeats an index or leaves 0\.\.1"):
        decode_ceiling([1, 1], [1, 1], 1)
    with pytest.raises(ConfigError, match=r"repeats an index or leaves 0\.\.1; .*; pass the plan of this model"):
        prefill_ceiling([1, 1], [2])
    with pytest.raises(ConfigError, match="a layer without parameters has no ceiling"):
        decode_ceiling([1, 0], [0], 1)
    with pytest.raises(ConfigError, match="head_parameters=-1 is negative"):
        decode_ceiling([1, 1], [0], -1)
    with pytest.raises(ConfigError, match="every layer is dropped and there is no head"):
        prefill_ceiling([1, 1], [0, 1])
