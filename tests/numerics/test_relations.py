"""Losses between a student and its teacher: zero where they agree, and blind to what must not matter."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.relations import (
    Heads,
    attention_relation_loss,
    divergence,
    heads_of,
    matched,
    relative_error,
    self_relation_loss,
)

BATCH, HEADS, TOKENS, SIZE = 2, 3, 7, 4


def heads(seed: int, size: int = SIZE, count: int = HEADS, tokens: int = TOKENS) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    return Heads(*(torch.randn(BATCH, count, tokens, size, generator=generator) for _ in range(3)))


def each(heads: Heads, change) -> Heads:
    return Heads(change(heads.query), change(heads.key), change(heads.value))


def losses(teacher: Heads, student: Heads, tokens=None, causal=False) -> list[torch.Tensor]:
    return [
        attention_relation_loss(teacher, student, tokens, causal),
        self_relation_loss(teacher, student, 2, tokens, causal),
    ]


@pytest.mark.parametrize("causal", [False, True])
def test_a_student_like_its_teacher_loses_nothing(causal):
    assert all(float(loss) == 0 for loss in losses(heads(0), heads(0), causal=causal))
    assert all(float(loss) > 0.01 for loss in losses(heads(0), heads(1), causal=causal))


def test_the_formula_by_hand():
    teacher, student = heads(0), heads(1)

    def attention(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.softmax(one @ other.transpose(-1, -2) / SIZE**0.5, -1).double()

    expected = 0.0
    for side in (("query", "key"), ("value", "value")):
        wanted, given = (attention(*(getattr(one, name) for name in side)) for one in (teacher, student))
        expected += float((wanted * (wanted / given).log()).sum() / (BATCH * HEADS * TOKENS))
    assert float(attention_relation_loss(teacher, student, None, False)) == pytest.approx(expected, rel=1e-5)


def test_channels_within_a_head_have_no_order():
    order = torch.tensor([2, 0, 3, 1])
    permuted = each(heads(1), lambda one: one[..., order])
    wanted = attention_relation_loss(heads(0), heads(1), None, False)
    torch.testing.assert_close(attention_relation_loss(heads(0), permuted, None, False), wanted)


def test_the_student_may_have_any_width():
    """A student of half the width with the same products of tokens has the same relations."""
    teacher = heads(0)
    narrow = heads(1, size=2)
    # Twice the width, and products larger by its root: the same relations.
    padded = each(narrow, lambda one: torch.cat([one, torch.zeros_like(one)], -1) * 2**0.25)
    wide = attention_relation_loss(teacher, padded, None, False)
    torch.testing.assert_close(attention_relation_loss(teacher, narrow, None, False), wide)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(causal):
    tokens = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    tokens[1, -2:] = False
    longer = torch.cat([tokens, torch.zeros(BATCH, 3, dtype=torch.bool)], 1)

    def pad(one: torch.Tensor) -> torch.Tensor:
        return torch.cat([one, 9 * torch.ones(BATCH, HEADS, 3, SIZE)], 2)

    wanted = losses(heads(0), heads(1), tokens, causal)
    given = losses(each(heads(0), pad), each(heads(1), pad), longer, causal)
    torch.testing.assert_close(given, wanted)


def test_causal_rows_do_not_see_what_comes_later():
    changed = each(heads(1), lambda one: one.clone())
    for one in (changed.query, changed.key, changed.value):
        one[:, :, -1] += 5
    tokens = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    tokens[:, -1] = False
    first, second = (losses(heads(0), one, tokens, causal=True) for one in (heads(1), changed))
    torch.testing.assert_close(first, second)


def test_heads_may_differ_where_they_are_cut_again():
    teacher, student = heads(0, size=4, count=3), heads(1, size=2, count=4)
    assert float(self_relation_loss(teacher, student, 4, None, False)) > 0
    with pytest.raises(ValueError, match="the teacher has 3 heads and the student 4"):
        attention_relation_loss(teacher, student, None, False)
    with pytest.raises(ValueError, match="8 features cannot be cut into 3 heads"):
        self_relation_loss(teacher, student, 3, None, False)


def test_shared_keys_are_repeated_beside_one_another():
    features = torch.arange(8.0).reshape(1, 1, 8)
    assert heads_of(features, 2, 2)[0, :, 0].tolist() == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2


def test_the_divergence_is_the_kullback_leibler_one():
    teacher, student = torch.randn(3, 5), torch.randn(3, 5)
    wanted, given = teacher.softmax(-1), student.softmax(-1)
    expected = (wanted * (wanted / given).log()).sum(-1)
    torch.testing.assert_close(divergence(teacher, student), expected.mean())
    rows = torch.tensor([True, False, False])
    torch.testing.assert_close(divergence(teacher, student, rows), expected[0])


def test_gradients_do_not_shrink_with_the_temperature():
    teacher, sizes = torch.randn(4, 6), []
    for temperature in (1.0, 4.0):
        student = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        divergence(teacher, student, temperature=temperature).backward()
        sizes.append(float(student.grad.norm()))
    assert 0.3 < sizes[1] / sizes[0] < 3


def test_the_relative_error_counts_each_row_by_its_own_energy():
    teacher = torch.tensor([[1.0, 0.0], [100.0, 0.0]])
    assert float(relative_error(teacher, 1.5 * teacher)) == pytest.approx(0.25)
    assert float(relative_error(teacher, 2 * teacher, torch.tensor([True, False]))) == pytest.approx(1)
    assert float(relative_error(teacher, teacher)) == 0


def test_blocks_are_matched_evenly_and_last_with_last():
    assert matched(4, 4) == [1, 2, 3, 4]
    assert matched(12, 6) == [2, 4, 6, 8, 10, 12]
    assert matched(12, 10)[-1] == 12
    assert matched(3, 1) == [3]
