"""Positional encodings against the formulas of their papers."""

import math

import pytest
import torch

from fastattn.positional import LearnedPositions, RotaryPositions, SinusoidalPositions, make_positions


@pytest.mark.parametrize("embed_dim", [1, 2, 7, 16])
def test_sinusoids_are_the_papers_formula(embed_dim):
    table = SinusoidalPositions(embed_dim, max_length=50)(50)
    for position in (0, 1, 13, 49):
        for i in range(embed_dim):
            angle = position / 10000 ** (2 * (i // 2) / embed_dim)
            expected = math.sin(angle) if i % 2 == 0 else math.cos(angle)
            assert table[position, i].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("positions", [SinusoidalPositions(8, 20), LearnedPositions(8, 20)])
def test_offset_continues_the_sequence(positions):
    assert torch.equal(positions(3, offset=5), positions(8)[5:])
    with pytest.raises(ValueError, match="position 21.*20"):
        positions(6, offset=15)


def test_rotary_turns_pairs_as_complex_numbers():
    head_dim, length, offset = 6, 9, 4
    x = torch.randn(2, 3, length, head_dim, dtype=torch.float64)
    position = torch.arange(offset, offset + length, dtype=torch.float64)
    angle = position[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    actual = RotaryPositions(head_dim)(x, offset)
    assert actual.dtype == x.dtype
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)


def test_rotary_scores_depend_on_the_distance_only():
    rotary = RotaryPositions(16)
    query, key = torch.randn(1, 16), torch.randn(1, 16)
    near = rotary(query, 7) @ rotary(key, 3).T
    far = rotary(query, 107) @ rotary(key, 103).T
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
    assert (near - rotary(query, 8) @ rotary(key, 3).T).abs() > 1e-3


def test_names_and_errors():
    assert make_positions("rotary", 8, 10) is None
    assert isinstance(make_positions("learned", 8, 10), LearnedPositions)
    with pytest.raises(ValueError, match="'spiral'"):
        make_positions("spiral", 8, 10)
    with pytest.raises(ValueError, match="even head_dim, got 5"):
        RotaryPositions(5)
