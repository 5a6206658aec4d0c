"""Chunks of documents: never too long, nothing lost, cut where a reader would cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mem_triton.write import Document, DocumentError, chunks_of, read_documents
from mem_triton.write.chunking import join_tokens
from tests.memory3.support import TEXT, tokenizer

PIECES = st.sampled_from(
    [
        "falcon",
        " the",
        ".",
        ". ",
        "!? ",
        "\n",
        "\n\n",
        "  ",
        "é",
        "数据。",
        "x" * 40,
        "<|im_end|>",
        '." ',
        "\t",
        "# a\n",
    ]
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=40).map("".join), st.integers(4, 40), st.booleans())
def test_chunks_cover_the_text_and_none_is_too_long(text, limit, blanks):
    chunks = chunks_of(Document(text, offset=7), tokenizer(), limit, blanks=blanks)
    at = 0
    for chunk in chunks:
        assert 1 <= len(chunk.token_ids) <= limit
        assert text[chunk.start - 7 : chunk.end - 7] == chunk.text == chunk.text.strip() != ""
        assert text[at : chunk.start - 7].strip() == "", "something is lost between chunks"
        at = chunk.end - 7
        if not blanks:
            assert list(chunk.token_ids) == tokenizer().encode(chunk.text, add_special_tokens=False)
    assert text[at:].strip() == ""


def test_sentences_stay_together():
    chunks = chunks_of(Document(TEXT), tokenizer(), 17)
    assert len(chunks) >= 3 and all(chunk.text.endswith(".") for chunk in chunks)
    assert " ".join(chunk.text for chunk in chunks) == TEXT


def test_a_long_sentence_is_cut_between_words():
    words = "the locker of mara stone is falcon and " * 12
    chunks = chunks_of(Document(words), tokenizer(), 16)
    assert len(chunks) > 4 and " ".join(chunk.text for chunk in chunks).split() == words.split()


def test_chunks_with_their_blanks_are_the_documents_tokens():
    chunks = chunks_of(Document(TEXT), tokenizer(), 24, blanks=True)
    assert join_tokens(chunks) == tokenizer().encode(TEXT, add_special_tokens=False)
    assert [chunk.first for chunk in chunks] == [sum(len(c.token_ids) for c in chunks[:i]) for i in range(len(chunks))]


def test_a_character_of_more_tokens_than_a_reference_is_refused():
    with pytest.raises(DocumentError, match=r"alone is \d+ tokens, more than reference_tokens=1"):
        chunks_of(Document("数"), tokenizer(), 1)


def test_text_files(tmp_path):
    path = tmp_path / "my notes!.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    (document,) = read_documents(path)
    assert (document.text, document.source, document.name) == (TEXT, str(path), "my-notes")
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DocumentError, match=r"not UTF-8 text \(byte 3\)"):
        list(read_documents(path))
    with pytest.raises(DocumentError, match="No such file"):
        list(read_documents(tmp_path / "absent.txt"))


def test_jsonl_files(tmp_path):
    path = tmp_path / "facts.jsonl"
    records = [{"body": "One.", "id": "a b", "year": 2024, "tags": ["x"]}, {"body": "Two.", "id": 7}]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    first, second = read_documents(path, field="body", id_field="id")
    assert (first.text, first.name, first.source, first.metadata) == ("One.", "a-b", f"{path}:1", {"year": 2024})
    assert (second.name, second.source) == ("7", f"{path}:2")
    assert [d.name for d in read_documents(path, field="body")] == ["facts.1", "facts.2"]
    with pytest.raises(DocumentError, match=r'facts\.jsonl:1: no text field "text" \(fields with text: body, id\)'):
        list(read_documents(path))
    with pytest.raises(DocumentError, match=r':1: no field "key"'):
        list(read_documents(path, field="body", id_field="key"))
    path.write_text('{"text": "One."}\n{"text": \n')
    with pytest.raises(DocumentError, match=r"facts\.jsonl:2: not JSON"):
        list(read_documents(path))


def test_markdown_files(tmp_path):
    path = tmp_path / "guide.md"
    text = "Before.\n\n# A\n\nAlpha.\n\n## B ##\n\n```\n# no heading\n```\n\n# C\nGamma.\n"
    path.write_text(text)
    documents = list(read_documents(path))
    assert [d.metadata.get("heading") for d in documents] == [None, "A", "A > B", "C"]
    assert "".join(d.text for d in documents) == text
    assert all(text[d.offset : d.offset + len(d.text)] == d.text for d in documents)
    chunk = chunks_of(documents[3], tokenizer(), 32)[0]
    assert text[chunk.start : chunk.end] == chunk.text == "# C\nGamma."
    assert len(list(read_documents(path, format="text"))) == 1
    with pytest.raises(DocumentError, match="format must be one of"):
        list(read_documents(path, format="pdf"))
