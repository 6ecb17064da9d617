"""Tokens that arrive one at a time become the text that the tokenizer gives for all of them."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from zoo.text.decoding import ByteDecoder, TokenDecoder

TEXT = "the cat 日本語 😀😀é  a\n 👩‍👩‍👧 z"


def fallback():
    """A tokenizer like those of Llama 2 and Mistral: spaces belong to the next token, and unknown characters become bytes."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    names = {name: i for i, name in enumerate(["<unk>", "<s>", *bytes_, "▁the", "▁cat", "▁", *"abcdefghijklmnopqrstuvwxyz"])}
    made = Tokenizer(models.BPE(names, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<s>"])
    return made


def byte_level():
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


@pytest.mark.parametrize("made", [fallback(), byte_level()], ids=["fallback", "byte level"])
def test_text_after_a_context_is_the_text_of_both_without_that_of_the_context(made):
    ids = made.encode(TEXT, add_special_tokens=False).ids
    for start in range(len(ids)):
        before = made.decode(ids[:start])
        if not TEXT.startswith(before):
            continue  # the context ends inside a character
        decode = TokenDecoder(made.decode, ids[:start])
        pieces = [decode(token) for token in ids[start:]]
        assert "".join(pieces) == TEXT[len(before) :]
        assert decode.flush() == ""
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_space_is_kept_after_special_tokens():
    made = fallback()
    cat, special = made.token_to_id("▁cat"), made.token_to_id("<s>")
    decode = TokenDecoder(made.decode, [cat, special])
    assert [decode(token) for token in (cat, special, special, cat)] == [" cat", "", "", " cat"]


@pytest.mark.parametrize("made", [fallback(), byte_level()], ids=["fallback", "byte level"])
def test_incomplete_and_invalid_bytes(made):
    whole = made.encode("é😀", add_special_tokens=False).ids[-6:]
    decode = TokenDecoder(made.decode)
    assert [decode(token) for token in whole[:5]] == ["", "é", "", "", ""]
    assert decode.flush().startswith("\ufffd")  # as shown at the end of an answer
    decode = TokenDecoder(made.decode)
    shown = "".join(decode(token) for token in whole[1:2] * 40)  # bytes that only continue a character
    assert len(shown) >= 32
    assert set(shown + decode.flush()) == {"\ufffd"}
    assert decode(made.token_to_id("a")) == "a"


def test_bytes():
    decode = ByteDecoder()
    assert [decode(token) for token in [*"é".encode(), 300, 0xF0]] == ["", "é", "", ""]
    assert decode.flush() == "\ufffd"
