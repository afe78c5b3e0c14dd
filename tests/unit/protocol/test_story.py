"""The memory of rooms: both ends of a long story, the latest rooms, nothing else."""

from kvbaton.protocol.story import FIRST_LINES, LAST_LINES, MAX_CHARACTERS, MAX_ROOMS, Story


def test_a_long_story_keeps_its_beginning_and_its_end():
    story = Story()
    for number in range(500):
        story.tell(1, float(number), f"line {number}")
    texts = [line.text for line in story.of(1)]
    assert texts[:FIRST_LINES] == [f"line {number}" for number in range(FIRST_LINES)]
    assert texts[FIRST_LINES] == f"({500 - FIRST_LINES - LAST_LINES} lines left out)"
    assert texts[-LAST_LINES:] == [f"line {number}" for number in range(500 - LAST_LINES, 500)]
    times = [line.at for line in story.of(1)]
    assert times == sorted(times)


def test_a_short_story_is_whole_and_an_unknown_room_has_none():
    story = Story()
    for number in range(FIRST_LINES + LAST_LINES):
        story.tell(1, 0.0, str(number))
    assert [line.text for line in story.of(1)] == [str(number) for number in range(FIRST_LINES + LAST_LINES)]
    assert story.of(2) == []


def test_only_the_latest_rooms_are_remembered():
    story = Story()
    for room in range(MAX_ROOMS + 3):
        story.tell(room, 0.0, "told")
    assert len(story) == MAX_ROOMS
    assert [room for room in range(5) if story.of(room)] == [3, 4]


def test_a_line_is_cut_where_it_is_too_long_and_only_there():
    story = Story()
    story.tell(1, 0.0, "x" * MAX_CHARACTERS)
    story.tell(1, 0.0, "y" * (MAX_CHARACTERS + 1))
    whole, cut = (line.text for line in story.of(1))
    assert whole == "x" * MAX_CHARACTERS
    assert cut == "y" * (MAX_CHARACTERS - 1) + "…"
