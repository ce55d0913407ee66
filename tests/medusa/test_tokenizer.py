from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa.tokenizer import ChatTemplateError, ChatTokenizer, Detokenizer

TEXTS = [
    "Hello, how are you doing today?\n\n  def f(x):\n\treturn x\n",
    "你好，世界！今天天气怎么样？我们去公园散步吧。" * 3,
    "👩‍👩‍👧‍👦" * 12 + " family 👩‍👩‍👧‍👦 flags 🇩🇪🇫🇷 and 🎉😀😀 here",
    "naïve café — ﬁn, Ελληνικά, русский, हिन्दी, ไทย, العربية",
    "a literal replacement character \ufffd inside",
]


def sentencepiece_like() -> ChatTokenizer:
    """As Llama-2 has it: spaces as U+2581, one before the text, bytes as <0x..> where no piece fits."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzHU.,?!:", "he", "ll", "▁he", "llo", "▁hello", "▁a", "▁U"]
    merges = [("h", "e"), ("l", "l"), ("▁", "he"), ("ll", "o"), ("▁he", "llo"), ("▁", "a"), ("▁", "U")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    hf.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + 'U: ' + m.content }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    return ChatTokenizer(hf)


def word_level() -> ChatTokenizer:
    words = ["<unk>", "</s>", "the", "tree", "of", "tokens", "grows", "."]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


@pytest.fixture(scope="module")
def chat(chat8m: Path) -> ChatTokenizer:
    return ChatTokenizer.from_pretrained(chat8m)


@pytest.fixture(scope="module")
def small(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> ChatTokenizer:
    return ChatTokenizer(make_tokenizer())


@pytest.fixture(params=["chat-8m", "small", "sentencepiece", "words"])
def tokenizer(request: pytest.FixtureRequest, chat: ChatTokenizer, small: ChatTokenizer) -> ChatTokenizer:
    makers = {"sentencepiece": sentencepiece_like, "words": word_level}
    known = {"chat-8m": chat, "small": small}
    return known[request.param] if request.param in known else makers[request.param]()


def pieces(detokenizer: Detokenizer, ids: Sequence[int], sizes: Iterator[int]) -> list[str]:
    out, start = [], 0
    while start < len(ids):
        end = start + next(sizes)
        out.append(detokenizer.push(ids[start:end]))
        start = end
    return [*out, detokenizer.finish()]


def constant(size: int) -> Iterator[int]:
    while True:
        yield size


# ---- incremental decoding


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("text", TEXTS, ids=["english", "chinese", "emoji", "mixed", "literal"])
def test_pushed_text_is_the_decoded_whole_and_never_half_a_character(
    tokenizer: ChatTokenizer, text: str, size: int
) -> None:
    ids = tokenizer.encode(text)
    deltas = pieces(tokenizer.detokenizer(), ids, constant(size))
    assert "".join(deltas) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("which", ["chat", "small"])
def test_any_sequence_of_tokens_decodes_to_the_same_text(
    which: str, skip: bool, request: pytest.FixtureRequest
) -> None:
    tokenizer: ChatTokenizer = request.getfixturevalue(which)
    rng = random.Random(7)
    everything, single_bytes = range(tokenizer.vocab_size), range(6, 262)
    for _ in range(300):
        pool = rng.choice([everything, single_bytes])
        ids = rng.choices(pool, k=rng.randrange(250))
        sizes = iter(lambda: rng.randint(1, 5), None)
        deltas = pieces(tokenizer.detokenizer(skip_special_tokens=skip), ids, sizes)
        assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_byte_fallback_gives_whole_characters_at_any_rhythm() -> None:
    tokenizer, rng = sentencepiece_like(), random.Random(3)
    for _ in range(200):
        text = "".join(rng.choices("abc he llo你好世界👩😀é हि\n", k=rng.randrange(200)))
        ids = tokenizer.encode(text)
        deltas = pieces(tokenizer.detokenizer(), ids, iter(lambda: rng.randint(1, 5), None))
        assert "".join(deltas) == tokenizer.decode(ids)
        assert not any("\ufffd" in delta for delta in deltas)


def test_a_character_split_over_tokens_is_held_until_it_is_whole(chat: ChatTokenizer) -> None:
    ids = chat.encode("😀")
    assert len(ids) == 4, "the tokenizer has a byte a token here"
    detokenizer = chat.detokenizer()
    assert [detokenizer.push([token]) for token in ids] == ["", "", "", "😀"]
    assert detokenizer.finish() == ""


def test_finish_gives_what_was_held_back(chat: ChatTokenizer) -> None:
    ids = chat.encode("ok 😀")[:-1]
    detokenizer = chat.detokenizer()
    assert detokenizer.push(ids) == "ok "
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_special_tokens_are_skipped_or_shown(chat: ChatTokenizer) -> None:
    ids = [1, *chat.encode("Hi"), 2]
    assert "".join(pieces(chat.detokenizer(), ids, constant(1))) == "Hi"
    assert "".join(pieces(chat.detokenizer(skip_special_tokens=False), ids, constant(1))) == "<s>Hi</s>"


def test_spaces_before_words_survive_the_moving_window() -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer.encode("hello " * 60 + "a.")
    assert "".join(pieces(tokenizer.detokenizer(), ids, constant(1))) == "hello " * 60 + "a."


@pytest.mark.parametrize("kind", ["text", "garbage", "special tokens"])
def test_the_cost_of_a_token_does_not_grow_with_the_text(
    chat: ChatTokenizer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stray = chat.encode("😀")[-1]  # a continuation byte: never a character of its own
    ids = {"text": chat.encode(TEXTS[0] * 80), "garbage": [stray] * 1500, "special tokens": [5] * 1500}[kind]
    decoded = []
    real = ChatTokenizer.decode
    monkeypatch.setattr(
        ChatTokenizer, "decode", lambda self, ids, **kw: (decoded.append(len(ids)), real(self, ids, **kw))[1]
    )
    pieces(chat.detokenizer(), ids, constant(1))
    assert max(decoded) <= 70
    assert sum(decoded) / len(ids) <= 300


def test_ids_beyond_the_vocabulary_decode_to_nothing(chat: ChatTokenizer) -> None:
    detokenizer = chat.detokenizer()
    assert detokenizer.push([*chat.encode("Hi"), chat.vocab_size + 3]) == "Hi"


# ---- prompts


def test_encode_chat_has_one_bos_and_the_templates_own_ids(chat: ChatTokenizer) -> None:
    ids = chat.encode_chat([{"role": "user", "content": "Hi"}])
    assert chat.decode(ids, skip_special_tokens=False) == "<s><|user|>\nHi</s>\n<|assistant|>\n"
    assert ids.count(chat.hf.bos_token_id) == 1


def test_encode_chat_without_generation_prompt_is_a_prefix(chat: ChatTokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    whole = chat.encode_chat(messages)
    without = chat.encode_chat(messages, add_generation_prompt=False)
    assert whole[: len(without)] == without
    assert len(without) < len(whole)


def test_tools_and_other_arguments_reach_the_template(small: ChatTokenizer) -> None:
    hf = PreTrainedTokenizerFast(tokenizer_object=small.hf.backend_tokenizer, eos_token="</s>")
    hf.chat_template = "{{ tools | length }} {{ mood }} {{ messages[0].content }}"
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    tokenizer = ChatTokenizer(hf)
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}], tools=[tool], mood="calm")
    assert tokenizer.decode(ids) == "1 calm Hi"


def llama_like() -> PreTrainedTokenizerFast:
    """SentencePiece's kind: spaces replaced, bytes for what it does not know."""
    vocab = {token: i for i, token in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁▁"])}
    backend = Tokenizer(models.BPE(vocab, [("▁", "▁")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte level", "nfc", "llama"])
def test_no_text_is_said_not_to_fit_into_its_own_tokens(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], kind: str
) -> None:
    hf = llama_like() if kind == "llama" else make_tokenizer()
    if kind == "nfc":
        hf.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer = ChatTokenizer(hf)
    longest = max(hf.get_vocab(), key=len)
    for text in [*TEXTS, longest * 50, " " * 500, "e\u0302\u0301" * 300, "\u1112\u1161\u11ab" * 300, "\u0958" * 300]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.can_fit(text, len(ids))
    assert not tokenizer.can_fit("x" * (10 * len(longest) + 1), 10)
    assert tokenizer.can_fit("x" * (10 * len(longest)), 10)


@pytest.mark.parametrize("change", ["stripping normaliser", "removing splitter", "stripping token", "unknown words"])
def test_where_a_token_may_stand_for_any_length_every_text_may_fit(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], change: str
) -> None:
    hf = make_tokenizer()
    backend = hf.backend_tokenizer
    if change == "stripping normaliser":
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    elif change == "removing splitter":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif change == "stripping token":
        hf.add_tokens([AddedToken("<mask>", lstrip=True)])
    else:
        words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
        hf = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert ChatTokenizer(hf).can_fit(" " * 100_000, 1)


def test_a_missing_chat_template_is_an_error_that_says_what_to_do(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    tokenizer = ChatTokenizer(make_tokenizer(chat_template=None))
    assert tokenizer.encode("Hi")
    with pytest.raises(ChatTemplateError, match=r"no chat template.*chat_template\.jinja"):
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.next_turn([1, 2], "Hi")


def test_a_missing_chat_template_names_the_model_without_its_path(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "some-model")
    tokenizer = ChatTokenizer.from_pretrained(tmp_path / "some-model")
    with pytest.raises(ChatTemplateError, match="the tokenizer of some-model has no chat template") as refused:
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert str(tmp_path) not in str(refused.value)


def test_a_template_that_refuses_the_messages_says_why(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = ChatTokenizer(make_tokenizer(chat_template=template))
    with pytest.raises(ChatTemplateError, match="refuses these messages: roles must alternate"):
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])


# ---- the next turn of a conversation


def other_tokens_of_the_same_text(tokenizer: ChatTokenizer) -> list[int]:
    """A reply in one-byte tokens: text which the tokenizer itself would write with merged tokens."""
    letters = [tokenizer.encode(letter)[0] for letter in "there"]
    assert tokenizer.encode(tokenizer.decode(letters)) != letters
    return letters


@pytest.mark.parametrize("ended", [True, False])
def test_next_turn_keeps_the_replys_own_tokens(chat: ChatTokenizer, ended: bool) -> None:
    prompt = chat.encode_chat([{"role": "user", "content": "Hi"}])
    reply = other_tokens_of_the_same_text(chat) + [2] * ended
    following = chat.next_turn(prompt + reply, "And you?")
    assert following[: len(prompt + reply)] == prompt + reply
    text = "<s><|user|>\nHi</s>\n<|assistant|>\nthere</s>\n<|user|>\nAnd you?</s>\n<|assistant|>\n"
    assert chat.decode(following, skip_special_tokens=False) == text


def test_next_turn_equals_the_rendered_conversation_where_tokens_agree(small: ChatTokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    prompt = small.encode_chat(messages)
    reply = [*small.encode("The capital of France is Paris."), 2]
    messages += [
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "user", "content": "Really?"},
    ]
    assert small.next_turn(prompt + reply, "Really?") == small.encode_chat(messages)


@pytest.mark.parametrize("ended", [True, False])
def test_next_turn_with_a_space_before_the_end_token_and_a_bos_in_every_turn(ended: bool) -> None:
    tokenizer = sentencepiece_like()
    prompt = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    reply = tokenizer.encode("hello") + [2] * ended
    following = tokenizer.next_turn(prompt + reply, "a?")
    assert following[: len(prompt + reply)] == prompt + reply
    assert following.count(2) == 1
    assert following[following.index(2) + 1] == 1
    assert tokenizer.decode(following[-6:], skip_special_tokens=True).endswith("a?")


def test_next_turn_does_not_double_another_of_the_models_end_tokens(chat: ChatTokenizer) -> None:
    tokenizer = ChatTokenizer(chat.hf, eos_token_ids=[0])
    reply = [*tokenizer.encode("Hi"), 0]
    following = tokenizer.next_turn(reply, "More")
    assert following[: len(reply)] == reply
    assert following[len(reply)] == 2, "the template's own end of turn follows"


def test_a_template_that_changes_replies_cannot_be_continued(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    template = "{% for m in messages %}{{ m.content | lower }}{% endfor %}"
    tokenizer = ChatTokenizer(make_tokenizer(chat_template=template))
    with pytest.raises(ChatTemplateError, match="encode the whole conversation"):
        tokenizer.next_turn([7, 2], "Hi")


# ---- identity


def test_end_tokens_are_the_tokenizers_and_the_generation_configs(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
    assert ChatTokenizer.from_pretrained(folder).eos_token_ids == {2, 4}
    (folder / "generation_config.json").unlink()
    assert ChatTokenizer.from_pretrained(folder).eos_token_ids == {2}


def test_the_digest_survives_saving_and_notices_what_matters(chat: ChatTokenizer, chat8m: Path, tmp_path: Path) -> None:
    chat.hf.save_pretrained(tmp_path)
    again = ChatTokenizer.from_pretrained(tmp_path)
    assert again.digest == chat.digest == ChatTokenizer(chat.hf).digest
    assert len(chat.digest) == 64

    again = ChatTokenizer.from_pretrained(tmp_path)
    again.hf.chat_template += " "
    assert again.digest != chat.digest
    definition = json.loads((chat8m / "tokenizer.json").read_text())
    definition["model"]["merges"].pop()
    assert ChatTokenizer(chat.hf, definition=json.dumps(definition)).digest != chat.digest


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no fast tokenizer.*tokenizer\.json"):
        ChatTokenizer(object())


def test_a_tokenizer_class_that_decodes_by_itself_keeps_its_way(small: ChatTokenizer):
    class Shouting(PreTrainedTokenizerFast):
        def _decode(self, token_ids, **more):
            return super()._decode(token_ids, **more).upper()

    ids = small.encode("quick brown fox")
    loud = ChatTokenizer(Shouting(tokenizer_object=small.hf.backend_tokenizer, eos_token="</s>"))
    assert loud.decode(ids) == small.decode(ids).upper()
    assert small.decode(ids) == small.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
