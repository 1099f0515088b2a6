"""Steps, order, positions and masks against a slow model of SPEC §2 and §4, row by row."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cometlm import CometConfig
from cometlm.core.layout import ChunkLayout, Piece, RowCounts, take
from cometlm.core.plan import plan_full_chunks
from tests.tiny import examples

CPU = torch.device("cpu")
WINDOWS = st.sampled_from([None, 1, 2, 3, 7, 100])


@st.composite
def configs(draw):
    return CometConfig(
        chunk_size=draw(st.integers(1, 11)),
        readout_tokens=draw(st.integers(1, 3)),
        stride=draw(st.integers(1, 6)),
        capacity=draw(st.integers(1, 8)),
        global_memory=draw(st.booleans()),
        temporary_memory=draw(st.booleans()),
    )


@st.composite
def counts(draw, config):
    """A row somewhere in its text."""
    folds, text = draw(st.integers(0, 3)), draw(st.integers(0, config.chunk_size))
    entries = draw(st.integers(1, config.capacity)) if folds and config.temporary_memory else 0
    compressions = text // config.stride if config.temporary_memory else 0
    tokens = folds * config.chunk_size + text
    return RowCounts(folds, entries, text, text + compressions, tokens)


@st.composite
def pieces(draw, config, row):
    """What a step may add to the row: something, or nothing."""
    text = draw(st.integers(0, config.chunk_size - row.text))
    full = row.text + text == config.chunk_size
    return Piece(draw(st.integers(0, 9)), text, full and draw(st.booleans()))


@st.composite
def layouts(draw):
    config = draw(configs())
    batch = draw(st.integers(1, 3))
    if draw(st.booleans()):
        row = draw(counts(config))
        rows, step = (row,) * batch, (draw(pieces(config, row)),) * batch
    else:
        rows = tuple(draw(counts(config)) for _ in range(batch))
        step = tuple(draw(pieces(config, row)) for row in rows)
    assume(any(piece.text or piece.close for piece in step))
    return ChunkLayout(config, rows, step, config.row_length, CPU)


# --- the slow model -------------------------------------------------------------------------


def slow_pieces(row, length, chunk_size, more):
    """One row's pieces, token by token: a full chunk is closed when another token arrives."""
    found, start, open_text = [], 0, row.text
    for token in range(length):
        if open_text == chunk_size:
            found.append(Piece(start, token - start, True))
            start, open_text = token, 0
        open_text += 1
    last = Piece(start, length - start, more and length > 0 and open_text == chunk_size)
    return [*found, last] if last.text or last.close else found


def slow_items(config, row, piece):
    """One row's new items: the whole open chunk after the step, less what it held before."""
    end = row.text + piece.text
    chunk = []
    for first in range(0, end, config.stride):
        group = range(first, min(first + config.stride, end))
        chunk += [("text", i - row.text) for i in group]
        if config.temporary_memory and (len(group) == config.stride or piece.close):
            chunk.append(("C", 0))
    if piece.close and config.global_memory:
        chunk += [("R", j) for j in range(config.readout_tokens)]
    return chunk[row.items :]


def memory_of(config, row):
    """How many G and T one row sees."""
    return config.readout_tokens if config.global_memory and row.folds else 0, row.entries


def per_row(layout):
    """Each row's number in the index tensors, counts, piece and slow items."""
    for b, (row, piece) in enumerate(zip(layout.rows, layout.step, strict=True)):
        place = 0 if layout.order.shape[0] == 1 else b
        yield b, place, row, piece, slow_items(layout.config, row, piece)


# --- steps ----------------------------------------------------------------------------------


@given(st.data(), configs(), st.booleans())
def test_plan_equals_token_by_token(data, config, more):
    rows = data.draw(st.lists(counts(config), min_size=1, max_size=4))
    lengths = [data.draw(st.integers(0, 30)) for _ in rows]
    size = config.chunk_size
    steps = plan_full_chunks(rows, lengths, size, more)
    slow = [slow_pieces(row, n, size, more) for row, n in zip(rows, lengths, strict=True)]
    assert len(steps) == max(len(found) for found in slow)
    for b, found in enumerate(slow):
        nothing = [Piece(lengths[b], 0, False)] * (len(steps) - len(found))
        assert [step[b] for step in steps] == [*found, *nothing]


def test_plan_by_hand():
    start, half, full = RowCounts(), RowCounts(text=2, items=2), RowCounts(text=4, items=5)
    assert plan_full_chunks([start], [9], 4) == [
        (Piece(0, 4, True),),
        (Piece(4, 4, True),),
        (Piece(8, 1, False),),
    ]
    assert plan_full_chunks([start], [8], 4)[-1] == (Piece(4, 4, False),)
    assert plan_full_chunks([start], [8], 4, close_last=True)[-1] == (Piece(4, 4, True),)
    assert plan_full_chunks([half], [3], 4) == [(Piece(0, 2, True),), (Piece(2, 1, False),)]
    assert plan_full_chunks([full, start], [1, 1], 4) == [
        (Piece(0, 0, True), Piece(0, 1, False)),
        (Piece(0, 1, False), Piece(1, 0, False)),
    ]
    assert plan_full_chunks([full], [0], 4, close_last=True) == []


# --- order, indices, positions --------------------------------------------------------------


@examples(200)
@given(layouts())
def test_order_and_indices(layout):
    text_end = layout.widest_text
    assert text_end == max(piece.text for piece in layout.step)
    for b, place, _, piece, items in per_row(layout):
        source = {"text": 0, "C": text_end, "R": text_end + 1}
        assert layout.items[b] == len(items)
        order = layout.order[place, : len(items)].tolist()
        assert order == [source[kind] + i for kind, i in items]
        for kind, index in [
            ("text", layout.text_index),
            ("C", layout.compression_index),
            ("R", layout.readout_index),
        ]:
            want = [slot for slot, (found, _) in enumerate(items) if found == kind]
            assert index[place, : len(want)].tolist() == want
            if kind == "text":
                assert len(want) == piece.text
            if kind == "C":
                assert layout.compressions[b] == len(want)
    widest = max(len(items) for *_, items in per_row(layout))
    assert layout.order.shape[1] == widest  # filling in no more than the widest row's slots
    assert layout.closes == any(piece.close for piece in layout.step)


@examples(200)
@given(layouts())
def test_positions(layout):
    for _, place, row, _, items in per_row(layout):
        first = sum(memory_of(layout.config, row)) + row.items
        got = layout.positions[place, : len(items)].tolist()
        assert got == list(range(first, first + len(items)))
    assert (layout.positions < layout.max_positions).all()
    widest = max(sum(memory_of(layout.config, row)) for row in layout.rows)
    assert layout.memory_width >= widest
    if layout.uniform:
        assert layout.memory_width == widest
        count = layout.items[0]
        in_a_row = list(range(layout.first_position, layout.first_position + count))
        assert layout.positions.tolist() == [in_a_row]


@given(configs(), st.lists(st.integers(1, 25), min_size=1, max_size=4), st.booleans())
def test_a_text_fills_the_longest_row_and_no_more(config, lengths, more):
    """Walk whole texts: positions stay below `row_length`, and a full memory reaches its end."""
    rows, longest, closed_full = (RowCounts(),), 0, False
    for length in lengths:
        for step in plan_full_chunks(rows, [length], config.chunk_size, more):
            layout = ChunkLayout(config, rows, step, 10**6, CPU)
            full = layout.memory_width == config.memory_rows
            closed_full |= full and layout.closes and config.readout_tokens > 0
            if layout.items[0]:
                longest = max(longest, int(layout.positions.max()) + 1)
            rows = layout.counts_after()
    assert longest <= config.row_length
    if closed_full and config.global_memory:
        assert longest == config.row_length
    assert rows[0].tokens == sum(lengths)


# --- counts ---------------------------------------------------------------------------------


@examples(200)
@given(layouts(), st.integers(1, 8))
def test_counts_after(layout, capacity):
    config = layout.config.replace(capacity=capacity)  # of this call; the memory may hold more
    layout = ChunkLayout(config, layout.rows, layout.step, 100, CPU)
    for b, _, row, piece, items in per_row(layout):
        after = layout.counts_after()[b]
        assert after.tokens == row.tokens + piece.text
        assert layout.slots[b] == row.items + len(items)
        added = [kind for kind, _ in items].count("C")
        assert after.compressions == (0 if piece.close else row.compressions + added)
        if piece.close:
            fifo = row.entries + row.compressions + added
            limit = capacity if config.temporary_memory else 0
            assert (after.text, after.items, after.folds) == (0, 0, row.folds + 1)
            assert after.entries == min(fifo, limit)
        else:
            assert (after.folds, after.entries) == (row.folds, row.entries)
            assert (after.text, after.items) == (row.text + piece.text, row.items + len(items))


@given(layouts())
def test_uniform_means_that_rows_do_not_differ(layout):
    seen = {
        (memory_of(layout.config, row), bool(row.folds), row.text, row.items, piece.text,
         piece.close)
        for row, piece in zip(layout.rows, layout.step, strict=True)
    }  # fmt: skip
    assert layout.uniform == (len(seen) == 1)
    axis = 1 if layout.uniform else len(layout.rows)
    for index in (layout.order, layout.text_index, layout.positions, layout.full_mask(None)):
        assert index.shape[0] == axis


# --- masks ----------------------------------------------------------------------------------


def sees(row, i, slot, window):
    """Whether a row's new item i sees a slot of its chunk."""
    distance = row.items + i - slot
    return distance >= 0 and (window is None or distance < window)


@examples(200)
@given(layouts(), WINDOWS)
def test_full_mask(layout, window):
    mask = layout.full_mask(window)
    assert mask.dtype == torch.bool
    memories = [memory_of(layout.config, row) for row in layout.rows]
    global_width, temporary_width = (max(column) for column in zip(*memories, strict=True))
    slots = max(layout.slots)
    axis, items = layout.order.shape
    assert mask.shape == (axis, 1, items, global_width + temporary_width + slots)
    for b, place, row, _, items in per_row(layout):
        global_rows, temporary_rows = memories[b]
        for i in range(len(items)):
            want = [slot < global_rows for slot in range(global_width)]
            want += [slot < temporary_rows for slot in range(temporary_width)]
            want += [sees(row, i, slot, window) for slot in range(slots)]
            assert mask[place, 0, i].tolist() == want


@examples(200)
@given(layouts(), WINDOWS, st.integers(0, 3))
def test_chunk_mask(layout, window, filling):
    """None stands for the causal flag, or for seeing all where there is one new item."""
    assume(layout.uniform)
    row, new, slots = layout.rows[0], layout.items[0], layout.slots[0]
    want = [[sees(row, i, slot, window) for slot in range(slots)] for i in range(new)]
    mask = layout.chunk_mask(window, slots + filling)
    if filling:
        assert mask.tolist() == [line + [False] * filling for line in want]
    elif mask is None and new > 1:
        assert row.items == 0  # the flag is right only for a square
        assert want == torch.ones(new, slots).tril().bool().tolist()
    elif mask is None:
        assert all(all(line) for line in want)
    else:
        assert mask.tolist() == want
    if row.items == 0 and not filling and (window is None or window >= slots):
        assert mask is None  # the flag is enough, and faster


@given(st.integers(1, 3), st.integers(1, 6), st.data())
def test_take(batch, width, data):
    x = torch.randn(batch, width, 2)
    rows = data.draw(st.sampled_from([1, batch]))
    picks = st.lists(st.integers(0, width - 1), min_size=3, max_size=3)
    index = torch.tensor([data.draw(picks) for _ in range(rows)])
    taken = take(x, index)
    for b in range(batch):
        assert torch.equal(taken[b], x[b, index[b if rows > 1 else 0]])
