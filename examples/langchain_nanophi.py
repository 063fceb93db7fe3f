"""nanophi in LangChain: a chat model, a retriever, embeddings, and a chain of them with sources.

    pip install langchain-core
    python examples/langchain_nanophi.py --documents documents/ --question 感冒了要怎么办？

    question ─ NanophiRetriever ─> documents ─ rag.QUESTION ─> prompt ─ ChatNanophi ─> answer
                                   none      ───────────────────────────────────────> NOT_FOUND

examples/rag_with_langchain.ipynb shows the parts one by one. Nothing here opens a connection while
the tracing of LangSmith is off, as it is by default.

It is an adapter and no second nanophi. It has no tools, no structured output and no agents: a small
model follows none of them. The answers of a `batch` are computed one by one, in threads.
`generate.py --serve` computes them together, and ChatOpenAI of langchain-openai speaks to it.
"""

import math
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # nanophi need not be installed

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models.chat_models import BaseChatModel, generate_from_stream
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableBranch, RunnableParallel, RunnablePassthrough
from pydantic import Field, PrivateAttr

from nanophi.cli import UserError, flag, run_command
from nanophi.infer.generate import stream
from nanophi.infer.rag import FOUND, NOT_FOUND, QUESTION, Index, build_index, grams
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.model.phi import Phi
from nanophi.tokenizer.chat import chat_prompt
from nanophi.tokenizer.tokenizer import Tokenizer

ROLES = {"human": "user", "ai": "assistant", "system": "system"}  # LangChain's name -> ours


class ChatNanophi(BaseChatModel):
    """A chat model that runs in this process.

    model: the directory of a checkpoint, or (model, tok)

    Settings of one call go beside the messages: `chat.invoke(question, top_p=0.9)` takes every
    filter of nanophi/infer/sampling.py.
    """

    model: str | Path | tuple[Phi, Tokenizer] = Field(repr=False)
    max_new_tokens: int = 256
    temperature: float = 0.0  # greedy
    _phi: Phi = PrivateAttr()
    _tok: Tokenizer = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        pair = self.model if isinstance(self.model, tuple) else load_with_tokenizer(self.model)
        self._phi, self._tok = pair

    @property
    def _llm_type(self) -> str:
        return "nanophi"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """LangChain's cache tells models apart by it."""
        name = id(self._phi) if isinstance(self.model, tuple) else str(self.model)
        how = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        return {"model": name} | how

    def _stream(
        self, messages: list[BaseMessage], stop=None, run_manager=None, **settings: Any
    ) -> Iterator[ChatGenerationChunk]:
        prompt = chat_prompt([turn_of(message) for message in messages], self._tok)
        how = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature} | settings
        for piece in stream(self._phi, self._tok, prompt, stop=stop or (), **how):
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk
        # LangChain takes a stream without any chunk for a failure; an answer may be empty.
        yield ChatGenerationChunk(message=AIMessageChunk(content="", chunk_position="last"))

    def _generate(
        self, messages: list[BaseMessage], stop=None, run_manager=None, **settings: Any
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **settings))

    def get_token_ids(self, text: str) -> list[int]:
        """LangChain counts tokens by it; its own way is to download GPT-2's tokenizer."""
        return self._tok.encode(text)


def turn_of(message: BaseMessage) -> dict[str, str]:
    """A message as nanophi's chat template takes it. Who may follow whom is checked there."""
    kind = message.type.removesuffix("MessageChunk").lower()  # an answer that was streamed is "ai"
    if kind not in ROLES:
        raise UserError(f"a {kind} message: the model knows {', '.join(ROLES)} only")
    other = {block["type"] for block in message.content_blocks} - {"text"}
    if other:
        raise UserError(f"a message holds {', '.join(sorted(other))}: the model reads text only")
    return {"role": ROLES[kind], "content": str(message.text)}


class NanophiRetriever(BaseRetriever):
    """The passages of an index, best first, each with its source and score."""

    index: Index = Field(repr=False)
    k: int = Field(default=2, ge=1)
    threshold: float = Field(default=FOUND, ge=0)  # a passage below it has too little to do with it

    def _get_relevant_documents(self, query: str, *, run_manager) -> list[Document]:
        return [
            Document(passage.text, metadata={"source": passage.source, "score": score})
            for score, passage in self.index.search(query, self.k)
            if score >= self.threshold
        ]


class GramEmbeddings(Embeddings):
    """Texts as vectors of length 1 without any model: texts are close if they share characters and
    pairs of adjacent characters. Each gram adds to one of `size` numbers, which its hash chooses.
    """

    def __init__(self, size: int = 4096):
        self.size = size

    def embed_query(self, text: str) -> list[float]:
        vector = np.zeros(self.size)
        for gram, count in Counter(grams(text)).items():
            # Python's own hash is another one in each process.
            vector[zlib.crc32(gram.encode()) % self.size] += 1 + math.log(count)
        return (vector / (np.linalg.norm(vector) or 1.0)).tolist()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


def rag_chain(retriever: BaseRetriever, chat: BaseChatModel) -> Runnable[str, dict[str, Any]]:
    """A chain from a question to {"question", "sources", "answer"}. sources are the documents that
    the answer was made from. Where there are none the answer is NOT_FOUND, without the model.
    """
    found = RunnableParallel(question=RunnablePassthrough(), sources=retriever)
    background = RunnablePassthrough.assign(background=lambda found: joined(found["sources"]))
    prompt = ChatPromptTemplate.from_template(QUESTION)
    ask = background | prompt | chat | StrOutputParser()
    answer = RunnableBranch((lambda found: not found["sources"], lambda found: NOT_FOUND), ask)
    return found | RunnablePassthrough.assign(answer=answer)


def joined(documents: list[Document]) -> str:
    return "\n".join(document.page_content for document in documents)


@dataclass(kw_only=True)
class Config:
    question: str = flag(help="what to answer")
    documents: list[str] = flag(help="files, directories or globs to answer from")
    model: str = flag("out/demo/dpo", help="the directory of a checkpoint")


def main(cfg: Config) -> None:
    model, tok = load_with_tokenizer(cfg.model)
    retriever = NanophiRetriever(index=build_index(cfg.documents, tok))
    found = rag_chain(retriever, ChatNanophi(model=(model, tok))).invoke(cfg.question)
    print(found["answer"])
    for document in found["sources"]:
        print(f"[{document.metadata['score']:.2f}] {document.metadata['source']}", file=sys.stderr)


if __name__ == "__main__":
    run_command(Config, main)
