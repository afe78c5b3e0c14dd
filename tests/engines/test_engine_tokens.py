"""Tokens: how they are picked, and how they become text."""

from __future__ import annotations

import math

import pytest
import torch
from engine_kit import EOS, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.errors import ConfigError, InternalError
from kvbaton.serving.engine.adjustment import adjustment_of
from kvbaton.serving.engine.request import Request, Sampling
from kvbaton.serving.engine.sampling import Draw, Pick, pick_tokens, uniform
from kvbaton.serving.engine.seed import seed_of
from kvbaton.serving.engine.text import Detokenizer, StopMatcher, TextStream
from kvbaton.serving.server.tokens import ServerTokenizer

TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def draw(position: int = 0, seed: int = 1, **fields: float) -> Draw:
    return Draw(Sampling(**fields), seed, position)  # type: ignore[arg-type]


def test_greedy_takes_the_likeliest_and_its_logprob() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, 0.0]])
    picks = pick_tokens(logits, [draw(temperature=0.0, logprobs=True)] * 2)
    assert [pick.token for pick in picks] == [1, 0]
    assert [pick.logprob for pick in picks] == pytest.approx(logits.log_softmax(-1)[[0, 1], [1, 0]].tolist())


def test_a_draw_is_a_function_of_seed_and_position() -> None:
    logits = torch.randn((1, 50), generator=torch.Generator().manual_seed(1))
    alone = [pick_tokens(logits, [draw(position=p, seed=9)])[0] for p in range(40)]
    assert pick_tokens(logits.repeat(40, 1), [draw(position=p, seed=9) for p in range(40)]) == alone
    assert len({pick.token for pick in alone}) > 10
    assert [pick_tokens(logits, [draw(position=p, seed=8)])[0] for p in range(40)] != alone


def test_the_random_sequence_is_pinned() -> None:
    """Two releases serve one request together during an upgrade: these numbers may never change."""
    assert [uniform(1, 0), uniform(1, 1), uniform(2**64 - 1, 7)] == pytest.approx(
        [0.16090057725, 0.20244255519, 0.37326335360], abs=1e-9
    )


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[math.log(0.6), math.log(0.3), math.log(0.1)]])
    count = 4000
    picks = pick_tokens(logits.repeat(count, 1), [draw(position=p) for p in range(count)])
    shares = [sum(pick.token == token for pick in picks) / count for token in range(3)]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_top_p_keeps_the_fewest_likeliest() -> None:
    logits = torch.tensor([[math.log(0.1), math.log(0.6), math.log(0.3)]]).repeat(300, 1)

    def seen(top_p: float) -> set[int]:
        return {pick.token for pick in pick_tokens(logits, [draw(position=p, top_p=top_p) for p in range(300)])}

    assert seen(0.5) == {1}
    assert seen(0.7) == {1, 2}
    assert seen(1.0) == {0, 1, 2}
    assert seen(1e-9) == {1}


def test_low_temperature_is_greedy_and_small_changes_do_not_matter() -> None:
    logits = torch.randn((64, 1000), generator=torch.Generator().manual_seed(2))
    cold = pick_tokens(logits, [draw(position=p, temperature=1e-30) for p in range(64)])
    assert [pick.token for pick in cold] == logits.argmax(-1).tolist()
    draws = [draw(position=p, top_p=0.9) for p in range(64)]
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)) * 1e-6
    assert [p.token for p in pick_tokens(logits, draws)] == [p.token for p in pick_tokens(logits + noise, draws)]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((200, 4), -math.inf)
    logits[:, 2] = 0.0
    assert {pick.token for pick in pick_tokens(logits, [draw(position=p) for p in range(200)])} == {2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_that_rows_error(temperature: float, value: float) -> None:
    logits = torch.zeros((3, 5))
    logits[1, 3] = value
    picks = pick_tokens(logits, [draw(temperature=temperature)] * 3)
    assert isinstance(picks[1], InternalError)
    assert isinstance(picks[0], Pick)
    assert isinstance(picks[2], Pick)


def test_seeds() -> None:
    def ask(name: str, seed: int | None) -> int:
        return seed_of(Request(request_id=name, prompt_tokens=(1,), sampling=Sampling(seed=seed)))

    assert ask("a", 5) == ask("b", 5) == 5
    assert ask("a", -1) == 2**64 - 1
    assert ask("a", None) == ask("a", None) != ask("b", None)


def pieces(text: str, context: str = "") -> list[str]:
    detokenizer = Detokenizer(TOKENIZER, encode(context))
    return [detokenizer.push(token) for token in encode(text)] + [detokenizer.flush()]


@given(st.text(max_size=40), st.text(max_size=8))
def test_pieces_make_the_text(text: str, context: str) -> None:
    assert "".join(pieces(text, context)) == text


def test_no_piece_has_half_a_character() -> None:
    assert pieces("aé€😀z") == ["a", "", "é", "", "", "€", "", "", "", "😀", "z", ""]


def test_bytes_that_are_no_text_do_not_pile_up() -> None:
    detokenizer = Detokenizer(TOKENIZER, ())
    broken = encode("é")[:1] * 100
    shown = [detokenizer.push(token) for token in broken]
    assert sum(map(len, shown)) > 80
    assert len("".join(shown) + detokenizer.flush()) == 100


def test_without_a_tokenizer_there_is_no_text() -> None:
    detokenizer = Detokenizer(None, (1, 2))
    assert (detokenizer.push(3), detokenizer.flush()) == ("", "")


@given(
    st.text(alphabet="ab", max_size=24),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3),
    st.data(),
)
def test_stop_strings_cut_at_the_first_and_never_leak(text: str, stops: list[str], data: st.DataObject) -> None:
    ends = [at for at in map(text.find, stops) if at >= 0]
    matcher, shown, stopped, rest = StopMatcher(stops), "", False, text
    while rest and not stopped:
        size = data.draw(st.integers(1, len(rest)))
        piece, stopped = matcher.push(rest[:size])
        shown, rest = shown + piece, rest[size:]
    if not ends:
        assert not stopped
        assert shown + matcher.flush() == text
        return
    assert stopped
    seen = text[: len(text) - len(rest)]  # a later piece may hold an earlier match only if it overlaps what was held
    assert shown == seen[: min(at for at in map(seen.find, stops) if at >= 0)]
    assert not any(stop in shown for stop in stops)


def stream(text: str, **fields: object) -> tuple[list[str], str | None]:
    options: dict = {"stops": (), "ends": frozenset([EOS]), "max_tokens": 1000, **fields}
    answer = TextStream(TOKENIZER, encode("prompt"), **options)
    shown = []
    for token in [*encode(text), EOS]:
        piece = answer.push(token)
        shown.append(piece.text)
        if piece.finish_reason:
            return shown, piece.finish_reason
    return shown, None


def test_stream_ends() -> None:
    assert stream("héy") == (["h", "", "é", "y", ""], "stop")
    assert stream("héy", max_tokens=2) == (["h", "\ufffd"], "length")
    assert stream("hello", stops=("ll",)) == (["h", "e", "", ""], "stop")
    assert stream("hell", stops=("lo", "lll")) == (["h", "e", "", "", "ll"], "stop")
    assert stream("hel", stops=("lo",), max_tokens=3) == (["h", "e", "l"], "length")
    assert stream("hel", stops=("l",), max_tokens=3) == (["h", "e", ""], "stop")
    assert stream("a", ends=frozenset(), max_tokens=2)[1] == "length"


def test_what_stops_an_answer_is_named_and_may_stay() -> None:
    def last(text: str, **fields: object) -> tuple[str, object]:
        options: dict = {"stops": (), "ends": frozenset([EOS]), "max_tokens": 1000, **fields}
        answer = TextStream(TOKENIZER, (), **options)
        shown = ""
        for token in [*encode(text), EOS]:
            piece = answer.push(token)
            shown += piece.text
            if piece.finish_reason:
                return shown, piece.matched
        return shown, None

    assert last("hello") == ("hello", EOS)
    assert last("hello", stops=("lo", "ll")) == ("he", "ll")
    assert last("hello", stops=("ll",), include_stop=True) == ("hell", "ll")
    assert last("hello", ends=frozenset(encode("l"))) == ("he", encode("l")[0])
    assert last("hello", ends=frozenset(encode("l")), include_stop=True) == ("hel", encode("l")[0])
    assert last("hello", stops=("e",), min_tokens=3) == ("hello", EOS)
    assert last("hello", stops=("l",), min_tokens=4) == ("hel", "l")
    assert last("hello", max_tokens=5) == ("hello", None)


def test_a_prompt_that_ends_within_a_character_keeps_it() -> None:
    first, second, third = encode("日")
    detokenizer = Detokenizer(TOKENIZER, [*encode("a"), first, second])
    assert detokenizer.push(third) == "日"
    broken = Detokenizer(TOKENIZER, [*encode("a"), first])
    assert [broken.push(token) for token in encode("xy")] == ["x", "y"]


def test_special_tokens_are_text_where_they_are_asked_for() -> None:
    assert Detokenizer(TOKENIZER, ()).push(EOS) == ""
    assert Detokenizer(TOKENIZER, (), skip_special_tokens=False).push(EOS) == "<eos>"


def adjusted(logits: list[float], said: tuple[int, ...] = (), prompt: tuple[int, ...] = (), **fields: object) -> Pick:
    sampling = Sampling(**{"temperature": 0.0, "logprobs": True, **fields})  # type: ignore[arg-type]
    request = Request(request_id="r", prompt_tokens=(*prompt, *said), sampling=sampling, answered=len(said))
    adjustment = adjustment_of(request, frozenset([0]))
    assert adjustment is not None
    picked = pick_tokens(torch.tensor([logits]), [Draw(sampling, 1, 0, adjustment)])[0]
    assert isinstance(picked, Pick)
    return picked


def test_adjustments_change_what_is_picked_and_not_its_logprob() -> None:
    logits = [3.0, 2.0, 1.0]
    plain = torch.tensor(logits).log_softmax(-1).tolist()
    cases: list[tuple[int, Pick]] = [
        (2, adjusted(logits, logit_bias=((2, 5.0),))),
        (1, adjusted(logits, min_tokens=1)),
        (0, adjusted(logits, said=(1,), min_tokens=1)),
        (1, adjusted(logits, said=(0,), presence_penalty=1.5)),
        (0, adjusted(logits, said=(0,), frequency_penalty=0.6)),
        (1, adjusted(logits, said=(0, 0), frequency_penalty=0.6)),
        (1, adjusted(logits, prompt=(0,), repetition_penalty=2.0)),
        (0, adjusted(logits, prompt=(0,), presence_penalty=2.0)),
        (2, adjusted(logits, prompt=(0,), said=(1,), repetition_penalty=4.0)),
    ]
    for expected, pick in cases:
        assert (pick.token, pick.logprob) == (expected, pytest.approx(plain[expected]))
    assert adjusted([-1.0, -1.5, -9.0], said=(0,), repetition_penalty=2.0).token == 1


def test_what_would_leave_nothing_is_not_forbidden() -> None:
    assert adjusted([1.0, -math.inf, -math.inf], min_tokens=1).token == 0


def test_nothing_is_adjusted_for_a_plain_request() -> None:
    for sampling, ends in ((Sampling(top_k=5, min_p=0.1, top_p=0.9), {0}), (Sampling(min_tokens=3), ())):
        assert adjustment_of(Request(request_id="r", prompt_tokens=(1, 2), sampling=sampling), ends) is None


def test_top_k_and_min_p() -> None:
    logits = torch.tensor([[math.log(0.1), math.log(0.5), math.log(0.3), math.log(0.1)]]).repeat(300, 1)

    def seen(**fields: float) -> set[int]:
        picks = pick_tokens(logits, [draw(position=p, **fields) for p in range(300)])
        return {pick.token for pick in picks if isinstance(pick, Pick)}

    assert seen(top_k=1) == {1}
    assert seen(top_k=3) == {0, 1, 2}
    assert seen(top_k=2, top_p=0.6) == {1}
    assert seen(top_k=9) == seen(top_k=0) == {0, 1, 2, 3}
    assert seen(min_p=0.5) == {1, 2}
    assert seen(min_p=1.0) == {1}


def test_a_token_has_its_own_bytes() -> None:
    tokenizer = ServerTokenizer(TOKENIZER)
    for text in ("a", " ", "日", "😀", "\ufffd"):
        assert b"".join(map(tokenizer.token_bytes, encode(text))) == text.encode()
    assert tokenizer.token_bytes(EOS) == b"<eos>"
    for foreign in (-1, 1 << 40):
        with pytest.raises(ConfigError, match="outside the vocabulary"):
            tokenizer.decode([foreign])
