"""The memory of rooms: both ends of a long trace, the latest rooms, nothing else."""

from kvbaton.protocol.trace import FIRST_LINES, LAST_LINES, MAX_CHARACTERS, MAX_ROOMS, Trace


def test_a_long_trace_keeps_its_beginning_and_its_end():
    trace = Trace()
    for number in range(500):
        trace.record(1, float(number), f"line {number}")
    texts = [line.text for line in trace.of(1)]
    assert texts[:FIRST_LINES] == [f"line {number}" for number in range(FIRST_LINES)]
    assert texts[FIRST_LINES] == f"({500 - FIRST_LINES - LAST_LINES} lines left out)"
    assert texts[-LAST_LINES:] == [f"line {number}" for number in range(500 - LAST_LINES, 500)]
    times = [line.at for line in trace.of(1)]
    assert times == sorted(times)


def test_a_short_trace_is_whole_and_an_unknown_room_has_none():
    trace = Trace()
    for number in range(FIRST_LINES + LAST_LINES):
        trace.record(1, 0.0, str(number))
    assert [line.text for line in trace.of(1)] == [str(number) for number in range(FIRST_LINES + LAST_LINES)]
    assert trace.of(2) == []


def test_only_the_latest_rooms_are_remembered():
    trace = Trace()
    for room in range(MAX_ROOMS + 3):
        trace.record(room, 0.0, "told")
    assert len(trace) == MAX_ROOMS
    assert [room for room in range(5) if trace.of(room)] == [3, 4]


def test_a_line_is_cut_where_it_is_too_long_and_only_there():
    trace = Trace()
    trace.record(1, 0.0, "x" * MAX_CHARACTERS)
    trace.record(1, 0.0, "y" * (MAX_CHARACTERS + 1))
    whole, cut = (line.text for line in trace.of(1))
    assert whole == "x" * MAX_CHARACTERS
    assert cut == "y" * (MAX_CHARACTERS - 1) + "…"
