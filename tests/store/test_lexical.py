"""The lexical embedder in many scripts, and banks whose vectors an older version of it has made."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from mem_triton.store.bank import Bank
from mem_triton.store.bank.embedders import FEATURES, LexicalEmbedder, embedder_from, tokens_of
from mem_triton.store.bank.reindexing import outdated, reindex
from mem_triton.store.errors import EmbedderError
from tests.store.bank_case import entry, spec

FACTS = {
    "Chinese": (
        "{n}的储物柜密码是{w}。",
        ["请问{n}的密码是什么？", "我忘了{n}柜子的密码，你记得吗？"],
        "王伟 李娜 张敏 刘洋 陈静 杨帆 赵磊 黄丽 周杰 吴刚",
        "猎鹰 老鹰 知更鸟 苍鹭 乌鸦 鱼鹰 红隼 鹪鹩 雀 鹤",
    ),
    "Korean": (
        "{n}의 사물함 비밀번호는 {w}이다.",
        ["{n} 사물함 비밀번호가 뭐야?", "{n}는 어떤 비밀번호를 쓰나요?"],
        "민수 지영 철수 영희 수진 현우 지훈 서연 도윤 하준",
        "매 독수리 울새 왜가리 까마귀 물수리 황조롱이 굴뚝새 참새 두루미",
    ),
    "Japanese": (
        "{n}さんのロッカーの暗証番号は{w}です。",
        ["{n}さんの暗証番号は何ですか？", "{n}のロッカーの番号を教えてください"],
        "佐藤 鈴木 アリス 田中 ボブ 渡辺 ヘンリー 中村 フランク 加藤",
        "隼 鷲 駒鳥 鷺 烏 鶚 長元坊 鷦鷯 雀 鶴",
    ),
    "Latin": (
        "The locker of {n} is {w}.",
        ["What is the locker of {n}?", "Where does {n} keep things?"],
        "Zürich Müller Renée José Søren Łukasz François Jürgen Öztürk Çelik",
        "falcon eagle robin heron raven osprey kestrel wren finch crane",
    ),
    "Thai": (
        "รหัสล็อกเกอร์ของ{n}คือ{w}",
        ["ล็อกเกอร์ของ{n}รหัสอะไร", "{n}ใช้รหัสอะไร"],
        "สมชาย สมหญิง วิชัย นภา ประเสริฐ กมล อำนาจ สุดา พิมพ์ ชัยวัฒน์",
        "เหยี่ยว นกอินทรี นกเขา นกยูง นกแก้ว กา นกฮูก หงส์ เป็ด ไก่",
    ),
    "Hindi": (
        "{n} का लॉकर {w} है।",
        ["{n} का लॉकर क्या है?"],
        "राम सीता मोहन गीता अर्जुन प्रिया विकास नेहा राहुल पूजा",
        "बाज़ चील कौआ बगुला मोर तोता उल्लू गौरैया हंस कोयल",
    ),
    "Russian": (
        "Шкафчик {n} это {w}.",
        ["Какой шкафчик у {n}?"],
        "Ивана Петра Марии Ольги Сергея Йосифа Анны Дмитрия Елены Фёдора",
        "сокол орёл ворон цапля дрозд скопа пустельга крапивник зяблик журавль",
    ),
}
"""Ten alike facts of each script: the text, questions, whom they are about, and what tells them apart besides."""


def found(embedder: LexicalEmbedder, script: str, question: int, form: str = "NFC", stored: str = "NFC") -> int:
    """How many of ten questions are nearest to their own fact."""
    text, questions, names, words = FACTS[script]
    pairs = list(zip(names.split(), words.split(), strict=True))
    facts = [unicodedata.normalize(stored, text.format(n=n, w=w)) for n, w in pairs]
    asked = [unicodedata.normalize(form, questions[question].format(n=n)) for n, _ in pairs]
    nearest = (embedder.embed(asked) @ embedder.embed(facts).T).argmax(1)
    return int((nearest == np.arange(len(pairs))).sum())


@pytest.mark.parametrize(("form", "stored"), [("NFC", "NFC"), ("NFD", "NFC"), ("NFC", "NFD"), ("NFKD", "NFKC")])
@pytest.mark.parametrize("script", FACTS)
def test_fault23_facts_are_found_in_every_script_composed_or_not(script, form, stored):
    for question in range(len(FACTS[script][1])):
        assert found(LexicalEmbedder(), script, question, form, stored) >= 9, (script, question)


def test_fault23_control_the_first_features_do_not_find_them():
    first = LexicalEmbedder(features=1)
    assert found(first, "Chinese", 0) < 6 and found(first, "Korean", 0) < 6 and found(first, "Latin", 0) == 10


def test_fault23_width_and_case_make_no_difference():
    embedder = LexicalEmbedder()
    for one, other in (("ﾛｯｶｰ", "ロッカー"), ("ＡＢＣ１２", "abc12"), ("Straße", "STRASSE"), ("ﬁsh", "fish")):
        assert float(embedder.embed([one])[0] @ embedder.embed([other])[0]) > 0.999, one
    assert tokens_of("密码是falcon。") == ["密", "码", "是", "密码", "码是", "falcon"]
    assert tokens_of("ジョン・スミス")[:3] == ["ジ", "ョ", "ン"] and "ンス" not in tokens_of("ジョン・スミス")
    for odd in ("", "   ", "🙂", "\ud83d", "bad \ud83d x"):
        assert abs(np.linalg.norm(embedder.embed([odd])[0]) - 1) < 1e-5, "whatever a client sends"


def chinese() -> list[tuple[str, str]]:
    text, questions, names, words = FACTS["Chinese"]
    pairs = zip(names.split(), words.split(), strict=True)
    return [(text.format(n=n, w=w), questions[0].format(n=n)) for n, w in pairs]


def hits(bank: Bank) -> int:
    return sum(bank.search(question, 1)[0].ref == f"f{i}@1" for i, (_, question) in enumerate(chinese()))


@pytest.fixture
def older(tmp_path):
    """A bank as a mem_triton before the second features has written it."""
    path = tmp_path / "bank"
    with Bank.create(path, spec()) as bank:
        with bank.catalogue.write() as db:
            db.execute("DELETE FROM meta WHERE key = 'features'")
        bank.add([entry(f"f{i}", i, text) for i, (text, _) in enumerate(chinese())])
    return path


def test_fault23_an_older_bank_keeps_its_features_until_it_is_reindexed(older, tmp_path):
    text = chinese()[0][0]
    with Bank.open(older) as reader:
        assert reader.embedder.features == 1 and "mem-triton bank reindex" in outdated(reader)
        assert reader.search(text, 1)[0].score > 0.999, "query and vectors are of one kind"
        assert hits(reader) < 6
        with Bank.open(older, writable=True) as writer:
            writer.add([entry("more", 99, "鹰在山上。")])
            assert writer.search("鹰在山上。", 1)[0].score > 0.999
            assert reindex(writer) == 11 and outdated(writer) is None and writer.verify() == []
            assert hits(writer) == 10
        assert hits(reader) == 10 and reader.search(text, 1)[0].score > 0.999, "open readers see the new vectors"


def test_fault23_an_older_bank_is_exported_with_new_vectors(older, tmp_path):
    with Bank.open(older) as bank:
        bank.export(tmp_path / "export")
    with Bank.open(tmp_path / "export") as copy:
        assert outdated(copy) is None and hits(copy) == 10
    with Bank.create(tmp_path / "new", spec()) as new:
        new.import_from(older)
        assert hits(new) == 10 and new.embedder.features == FEATURES


def test_fault23_graphs_follow_a_reindexed_bank(older, monkeypatch):
    monkeypatch.setattr("mem_triton.store.bank.vectors.SMALLEST_GRAPH", 4)
    with Bank.open(older, writable=True) as writer:
        writer.add([entry(f"x{i}", i, f"filler {i}") for i in range(12)])
        before = list((older / "index").iterdir())
        reindex(writer)
        writer.vectors.prune()
        assert writer.verify() == [] and hits(writer) == 10 and len(before) == 1


def test_fault23_features_of_a_newer_version_are_refused(older):
    with Bank.open(older, writable=True) as writer, writer.catalogue.write() as db:
        db.execute("INSERT OR REPLACE INTO meta VALUES ('features', 9)")
    with Bank.open(older) as bank, pytest.raises(EmbedderError, match="version 9; upgrade mem_triton"):
        bank.search("x", 1)
    assert embedder_from("lexical").features == FEATURES
