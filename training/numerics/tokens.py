"""From documents to contexts: tokenise them, cut them into pieces of equal length.

Packed (the default): documents are tokenised without special tokens, joined by the tokenizer's EOS, and cut into
contexts of `context_length` tokens, each beginning with BOS when the policy says so. There is no padding. A context may
hold the end of one document and the start of the next; attention is not masked between them (as in SAELens).

Padded: a context holds one document only, from its start; a longer document goes on in further contexts, each beginning
with BOS again. What is missing to `context_length` is padded at the end. Attention is causal, so padding at the end
changes nothing before it, and its activations are never stored.

With the chat template every document is put into the model's own chat format before either: a conversation whole, with
all its turns and no start of another, a text as the message of a user. Conversations can be joined plainly instead.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from saes.numerics.chat import ChatError, chat_text
from training.numerics.documents import Conversation, CorpusError, Document

MAX_CONTEXT_LENGTH = 131_072
_BATCH_CHARS = 200_000  # texts handed to the tokenizer at once


@dataclass(frozen=True)
class TokenPolicy:
    """Which tokens the model sees and which activations are kept.

    context_length: tokens in every context, BOS included.
    prepend_bos: every context starts with the tokenizer's BOS; once, where a chat template wrote it there already.
    store_special: keep the activations of BOS, EOS and other control tokens. Off by default: BOS is an attention sink
        whose norm is tens of times that of ordinary tokens and would dominate every squared error.
    packed: contexts are filled from the stream of documents; else each holds one document and is padded.
    chat_template: every document is put into the model's chat template first: a conversation whole, a text as a user's
        message.
    plain_chats: conversations are joined plainly instead (Conversation.plain). Without either they are refused.
    """

    context_length: int = 128
    prepend_bos: bool = True
    store_special: bool = False
    packed: bool = True
    chat_template: bool = False
    plain_chats: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.context_length <= MAX_CONTEXT_LENGTH:
            raise CorpusError(
                f"The context length is {self.context_length}; choose a whole number from 2 to {MAX_CONTEXT_LENGTH:,}."
            )
        if self.chat_template and self.plain_chats:
            raise CorpusError(
                "Conversations go through the chat template or are joined plainly; choose one of the two."
            )

    def facts(self) -> dict[str, Any]:
        """Its fields, for manifests; one that came later is left out where it is off, so that older captures go on."""
        return {name: value for name, value in asdict(self).items() if value or name != "plain_chats"}


@dataclass(frozen=True)
class Context:
    """One context: `ids` (context_length,) int32, the documents of its first and last text token, and how many of its
    tokens are not padding (None: all)."""

    ids: np.ndarray
    document: int
    last_document: int
    length: int | None = None


# ---------------------------------------------------------------------------------------------------- tokens


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of control tokens (BOS, EOS, padding, chat marks). An unknown-token id stands for real text and is not one,
    unless the tokenizer uses the same id for BOS or EOS."""
    ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return frozenset(ids | ({tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}))


def padding_id(tokenizer: Any) -> int:
    """The token with which short contexts are filled: the tokenizer's own, else EOS, BOS or token 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
    return int(next(token for token in known if token is not None))


def stored_mask(
    contexts: np.ndarray, policy: TokenPolicy, special: Iterable[int], lengths: np.ndarray | None = None
) -> np.ndarray:
    """True where the activation of a token is stored; same shape as `contexts` (c, t). `lengths` (c,) without padding."""
    real = np.ones(contexts.shape, dtype=bool)
    if lengths is not None:
        real &= np.arange(contexts.shape[1]) < lengths[:, None]
    return real if policy.store_special else real & ~np.isin(contexts, np.fromiter(special, dtype=np.int64))


def iter_documents(
    documents: Iterable[Document], tokenizer: Any, policy: TokenPolicy | None = None
) -> Iterator[np.ndarray]:
    """Token ids (m,) int32 of every document, in order, without added special tokens; a text may give an empty array.

    Raises CorpusError as `texts_of`.
    """
    batch: list[str] = []
    size = 0
    for text in texts_of(documents, tokenizer, policy or TokenPolicy()):
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARS:
            yield from _tokenise(batch, tokenizer)
            batch, size = [], 0
    if batch:
        yield from _tokenise(batch, tokenizer)


def texts_of(documents: Iterable[Document], tokenizer: Any, policy: TokenPolicy) -> Iterator[str]:
    """The text that is tokenised of every document.

    Raises CorpusError when the tokenizer has no chat template, naming the row for a conversation that the template does
    not take, and for conversations under a policy that does not say how they become text.
    """
    if policy.chat_template and not tokenizer.chat_template:
        raise CorpusError("This model's tokenizer has no chat template; go without it.")
    for document in documents:
        if policy.chat_template:
            yield _chat(document, tokenizer)
        elif isinstance(document, str):
            yield document
        elif policy.plain_chats:
            yield document.plain()
        else:
            raise CorpusError(
                f"{document.where} is a conversation; put it through the model's chat template, or join messages plainly."
            )


def _chat(document: Document, tokenizer: Any) -> str:
    chat = Conversation(({"role": "user", "content": document},), "") if isinstance(document, str) else document
    try:
        return chat_text(tokenizer, chat.messages, **({"tools": list(chat.tools)} if chat.tools else {}))
    except ChatError as error:
        said = " ".join(str(error).split())
        raise CorpusError(f"{chat.where}: {said[0].lower()}{said[1:]}" if chat.where else said) from error


def _tokenise(batch: list[str], tokenizer: Any) -> Iterator[np.ndarray]:
    encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return (np.asarray(ids, dtype=np.int32) for ids in encoded)


def iter_contexts(texts: Iterable[Document], tokenizer: Any, policy: TokenPolicy) -> Iterator[Context]:
    """Contexts of a stream of documents (see the module's text). When packing, the last partial context is dropped.

    A tokenizer without EOS joins documents with nothing between them. Raises CorpusError when BOS or a chat template is
    asked for and the tokenizer has none, and when the texts do not fill one context.
    """
    documents = iter_documents(texts, tokenizer, policy)
    return (_packed if policy.packed else _padded)(documents, tokenizer, policy)


def _packed(documents: Iterator[np.ndarray], tokenizer: Any, policy: TokenPolicy) -> Iterator[Context]:
    bos = _bos(tokenizer, policy)
    pending = np.empty(0, dtype=np.int32)
    pending_documents = np.empty(0, dtype=np.int32)
    n_tokens, made = 0, False
    for index, ids in enumerate(documents):
        if tokenizer.eos_token_id is not None and len(ids):
            ids = np.append(ids, np.int32(tokenizer.eos_token_id))
        n_tokens += len(ids)
        pending = np.concatenate([pending, ids])
        pending_documents = np.concatenate([pending_documents, np.full(len(ids), index, dtype=np.int32)])
        start = 0
        ids, end = _next(pending, start, bos, policy)
        while len(ids) == policy.context_length:
            made = True
            yield Context(ids, int(pending_documents[start]), int(pending_documents[end - 1]))
            start = end
            ids, end = _next(pending, start, bos, policy)
        pending, pending_documents = pending[start:], pending_documents[start:]
    if not made:
        raise CorpusError(
            f"The texts give {n_tokens:,} tokens, fewer than one context of {policy.context_length}; add text or "
            "choose a shorter context length."
        )


def _padded(documents: Iterator[np.ndarray], tokenizer: Any, policy: TokenPolicy) -> Iterator[Context]:
    bos, padding = _bos(tokenizer, policy), padding_id(tokenizer)
    made = False
    for index, document in enumerate(documents):
        start = 0
        while start < len(document):
            made = True
            real, start = _next(document, start, bos, policy)
            ids = np.full(policy.context_length, padding, dtype=np.int32)
            ids[: len(real)] = real
            yield Context(ids, index, index, len(real))
    if not made:
        raise CorpusError("The texts give no tokens; add text.")


def _next(stream: np.ndarray, start: int, bos: np.ndarray, policy: TokenPolicy) -> tuple[np.ndarray, int]:
    """The context that begins at `start`, shorter where the stream ends, and where the one after it begins. BOS comes
    before it, unless it begins with one that a chat template wrote."""
    if policy.chat_template and np.array_equal(stream[start : start + 1], bos):
        bos = bos[:0]
    end = min(start + policy.context_length - len(bos), len(stream))
    return np.concatenate([bos, stream[start:end]]), end


def _bos(tokenizer: Any, policy: TokenPolicy) -> np.ndarray:
    if not policy.prepend_bos:
        return np.empty(0, dtype=np.int32)
    if tokenizer.bos_token_id is None:
        raise CorpusError("This model's tokenizer has no beginning-of-sequence token; turn off prepend_bos.")
    return np.array([tokenizer.bos_token_id], dtype=np.int32)
