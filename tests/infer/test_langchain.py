"""LangChain says what nanophi says: the same text, the same passages, and a notebook that runs."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("langchain_core")

from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.vectorstores import InMemoryVectorStore

from examples.langchain_nanophi import (
    ChatNanophi,
    Config,
    GramEmbeddings,
    NanophiRetriever,
    main,
    rag_chain,
    turn_of,
)
from nanophi.cli import UserError
from nanophi.infer.generate import stream
from nanophi.infer.rag import NOT_FOUND, Index, question_with
from nanophi.model.checkpoint import load_with_tokenizer, save
from nanophi.tokenizer.chat import chat_prompt
from tests.conftest import ANSWER, QUESTION, tiny_model

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ("月亮", "月亮本身不发光，它反射的是太阳的光。"),
    ("感冒", "感冒多由病毒引起，要多喝温水，好好休息。"),
    ("黄河", "黄河的水里有许多泥沙。"),
]


@pytest.fixture(scope="module")
def taught(house):
    return load_with_tokenizer(house / "sft")


@pytest.fixture(scope="module")
def chat(taught):
    return ChatNanophi(model=taught, max_new_tokens=40)


@pytest.fixture(scope="module")
def roomy(tok, tmp_path_factory):
    """The directory of a model with room for a passage. What it says has no meaning."""
    directory = tmp_path_factory.mktemp("roomy")
    save(directory, tiny_model(max_position_embeddings=1024), tok)
    return directory


@pytest.fixture
def retriever(tok):
    return NanophiRetriever(index=Index(DOCUMENTS, tok), k=3)


class Heard(BaseCallbackHandler):
    def __init__(self):
        self.pieces = []

    def on_llm_new_token(self, token, **more):
        self.pieces.append(token)


# ---- the chat model


def test_an_answer_is_that_of_stream(chat, taught):
    model, tok = taught
    pieces = list(stream(model, tok, chat_prompt(QUESTION, tok), 40))
    assert "".join(pieces) == ANSWER  # so the comparisons below are of real answers
    assert chat.invoke(QUESTION).text == ANSWER
    assert [chunk.text for chunk in chat.stream(QUESTION)] == [*pieces, ""]

    async def streamed():
        return [chunk.text async for chunk in chat.astream(QUESTION)]

    assert asyncio.run(streamed()) == [*pieces, ""]
    assert asyncio.run(chat.ainvoke(QUESTION)).text == ANSWER


def test_a_batch_is_its_answers_one_by_one(chat):
    questions = [QUESTION, "月亮会发光吗？", "怎样才能睡得好"] * 2
    alone = [chat.invoke(question).text for question in questions]
    assert len(set(alone)) == 3
    assert [message.text for message in chat.batch(questions)] == alone


def test_callbacks_hear_each_piece_once(chat):
    for ask in (chat.invoke, lambda *given, **how: list(chat.stream(*given, **how))):
        heard = Heard()
        ask(QUESTION, config={"callbacks": [heard]})
        assert "".join(heard.pieces) == ANSWER


def test_stop_and_the_longest_answer(chat, house):
    until_comma = ANSWER.split("，")[0]
    assert chat.invoke(QUESTION, stop=["，"]).text == until_comma
    assert chat.bind(stop=["，"]).invoke(QUESTION).text == until_comma
    # An answer may be empty. LangChain takes a stream without any chunk for a failure.
    assert chat.invoke(QUESTION, stop=[ANSWER[0]]).text == ""
    assert "".join(chunk.text for chunk in chat.stream(QUESTION, stop=[ANSWER[0]])) == ""
    short = ChatNanophi(model=str(house / "sft"), max_new_tokens=3)
    assert 0 < len(short.invoke(QUESTION).text) < len(ANSWER)
    assert ANSWER.startswith(short.invoke(QUESTION).text)
    assert short.invoke(QUESTION, max_new_tokens=40).text == ANSWER


def test_sampling_settings_reach_the_model(taught, chat):
    hot = ChatNanophi(model=taught, max_new_tokens=20, temperature=50.0)
    assert len({hot.invoke(QUESTION).text for _ in range(3)}) > 1
    assert chat.invoke(QUESTION, temperature=50.0, top_k=1).text == ANSWER
    with pytest.raises(ValueError, match="no sampling filter is called 'warmth'"):
        chat.invoke(QUESTION, warmth=1)


def test_roles(chat, taught):
    messages = [
        SystemMessage("简短。"),
        HumanMessage("你好"),
        AIMessageChunk("你") + AIMessageChunk("好。"),
        HumanMessage([{"type": "text", "text": "怎样才能"}, {"type": "text", "text": "睡得好"}]),
    ]
    turns = [
        {"role": "system", "content": "简短。"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好。"},
        {"role": "user", "content": "怎样才能睡得好"},
    ]
    assert [turn_of(message) for message in messages] == turns
    model, tok = taught
    expected = "".join(stream(model, tok, chat_prompt(turns, tok), 40))
    assert chat.invoke(messages).text == expected
    assert chat.invoke([("system", "简短。"), *messages[1:]]).text == expected


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([AIMessage("你好")], "take turns, user first"),
        ([HumanMessage("你好"), HumanMessage("在吗")], "take turns, user first"),
        ([HumanMessage("你好"), AIMessage("好。")], "the last message must be the user's"),
        ([SystemMessage("简短。")], "no question"),
        ([ToolMessage("3", tool_call_id="1")], "a tool message: the model knows human, ai, system"),
        ([HumanMessage([{"type": "image", "url": "https://a.b/c"}])], "image: .* reads text only"),
        ([HumanMessage("长" * 200)], "shorten it"),
    ],
)
def test_what_cannot_be_answered_is_said(chat, messages, complaint):
    for ask in (chat.invoke, lambda messages: list(chat.stream(messages))):
        with pytest.raises(ValueError, match=complaint) as error:
            ask(messages)
        assert error.type is UserError


def test_a_directory_without_a_model_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        ChatNanophi(model=tmp_path)


def test_a_cache_tells_models_apart(taught, house, monkeypatch):
    """Settings alone are the same for all models: one would answer with what another has said."""
    cache = InMemoryCache()
    other = load_with_tokenizer(house / "pretrain")
    for model in (taught, other, str(house / "sft"), str(house / "pretrain")):
        ChatNanophi(model=model, max_new_tokens=5, cache=cache).invoke(QUESTION)
    assert len(cache._cache) == 4


def test_tokens_are_counted_by_the_model_s_own_tokenizer(chat, taught):
    """LangChain's own way is GPT-2's tokenizer, which it downloads."""
    assert chat.get_num_tokens(ANSWER) == len(taught[1].encode(ANSWER))
    assert "Phi" not in repr(chat).replace("ChatNanophi", "")  # no weights in logs


# ---- the retriever


def test_documents_are_those_of_the_index(retriever):
    question = "月亮会反射太阳的光吗？"
    hits = retriever.index.search(question, 3)
    found = retriever.invoke(question)
    assert [(d.page_content, d.metadata) for d in found] == [
        (passage.text, {"source": passage.source, "score": score})
        for score, passage in hits
        if score >= 0.21
    ]
    assert [d.metadata["source"] for d in found] == ["月亮"]


def test_nothing_below_the_threshold(tok):
    question = "黄河的水和月亮的光"
    index = Index(DOCUMENTS, tok)
    scores = [score for score, _ in index.search(question, 3)]
    assert len(scores) == 3
    for count, threshold in ((3, 0), (3, scores[2]), (2, scores[1]), (1, scores[0]), (0, 1.0)):
        found = NanophiRetriever(index=index, k=3, threshold=threshold).invoke(question)
        assert len(found) == count
    for wrong in ({"k": 0}, {"threshold": -0.1}, {"threshold": float("nan")}):
        with pytest.raises(ValueError, match="greater than or equal to"):
            NanophiRetriever(index=index, **wrong)


# ---- embeddings


def test_embeddings_are_vectors_of_length_one():
    embeddings = GramEmbeddings(size=64)
    for text in (QUESTION, "水" * 500, "A1b2 C3"):
        vector = embeddings.embed_query(text)
        assert len(vector) == 64
        assert sum(x * x for x in vector) == pytest.approx(1)
    assert embeddings.embed_documents([QUESTION, ANSWER]) == [
        embeddings.embed_query(QUESTION),
        embeddings.embed_query(ANSWER),
    ]
    assert embeddings.embed_query("……！") == [0.0] * 64  # nothing to compare


def test_embeddings_are_the_same_in_every_process():
    """Python's own hash of a string is another one in each process. These places of 月, 亮 and 月亮
    were found by an earlier one.
    """
    vector = GramEmbeddings().embed_query("月亮")
    places = [place for place, number in enumerate(vector) if number]
    assert places == [2483, 2820, 3416]
    assert [vector[place] for place in places] == pytest.approx([3**-0.5] * 3)


def test_the_nearest_neighbour_is_the_right_one():
    store = InMemoryVectorStore(GramEmbeddings())
    store.add_texts([text for _, text in DOCUMENTS])
    for question, right in (("月亮为什么会发光？", 0), ("感冒了怎么办", 1), ("黄河的水黄吗", 2)):
        ((found, score),) = store.similarity_search_with_score(question, k=1)
        assert found.page_content == DOCUMENTS[right][1]
        assert 0 < score < 1


# ---- the chain


def test_an_answer_comes_with_its_sources(tok, roomy):
    model, _ = load_with_tokenizer(roomy)
    retriever = NanophiRetriever(index=Index(DOCUMENTS, tok), k=2, threshold=0)
    chain = rag_chain(retriever, ChatNanophi(model=roomy, max_new_tokens=30))
    question = "月亮{会}反射太阳的光吗？"
    found = chain.invoke(question)
    assert found["question"] == question
    hits = retriever.index.search(question, 2)
    assert [d.page_content for d in found["sources"]] == [passage.text for _, passage in hits]
    assert len(hits) == 2
    prompt = chat_prompt(question_with(hits, question), tok)
    assert found["answer"] == "".join(stream(model, tok, prompt, 30))
    pieces = [part["answer"] for part in chain.stream(question) if "answer" in part]
    assert "".join(pieces) == found["answer"]
    assert len(pieces) > 2


def test_without_sources_the_model_is_not_asked(retriever, roomy):
    chain = rag_chain(retriever, ChatNanophi(model=roomy, max_new_tokens=30))
    heard = Heard()
    for question in ("ABBA XYZZY?", "！？"):
        found = chain.invoke(question, config={"callbacks": [heard]})
        assert found == {"question": question, "sources": [], "answer": NOT_FOUND}
    assert heard.pieces == []


# ---- the files of examples/


def test_the_notebook_runs_from_top_to_bottom(roomy, tmp_path, monkeypatch, capsys):
    """Without Jupyter: its code cells, one after the other, in one namespace."""
    path = ROOT / "examples" / "rag_with_langchain.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert path.read_text(encoding="utf-8") == (
        json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"
    )
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("NANOPHI_MODEL", str(roomy))
    namespace = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    printed = capsys.readouterr().out
    assert printed.count("回答：") == 4
    assert printed.count(f"来源： []\n回答： {NOT_FOUND}\n") == 1
    assert "来源： ['灯塔.txt']" in printed
    assert all(len(namespace["tok"].encode(p.page_content)) <= 96 for p in namespace["passages"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_command_answers_with_sources(roomy, tmp_path, capsys):
    for name, text in DOCUMENTS:
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    for question, sources in (("月亮会反射太阳的光吗？", "月亮.txt #1\n"), ("ABBA XYZZY?", "")):
        main(Config(question=question, documents=[str(tmp_path)], model=str(roomy)))
        printed = capsys.readouterr()
        assert printed.err[7:] == sources
        assert (printed.out == NOT_FOUND + "\n") == (sources == "")
