"""From documents to contexts: tokenise them, cut them into pieces of equal length.

Packed (the default): documents are tokenised without special tokens, joined by the tokenizer's EOS, and cut into
contexts of `context_length` tokens, each beginning with BOS when the policy says so. There is no padding. A context may
hold the end of one document and the start of the next; attention is not masked between them (as in SAELens).

Padded: a context holds one document only, from its start; a longer document goes on in further contexts, each beginning
with BOS again. What is missing to `context_length` is padded at the end. Attention is causal, so padding at the end
changes nothing before it, and its activations are never stored.

With the chat template every document is put into the model's own chat format before either: a conversation whole, with
all its turns and no start of another, a text as the message of a user. Conversations can be joined plainly instead.
The model always reads all of it; of conversations the activations of chosen roles' tokens alone may be kept (turns.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from saes.numerics.chat import ChatError, chat_text
from training.numerics.documents import Conversation, CorpusError, Document
from training.numerics.turns import Span, TurnsError, plain_spans, spans_of

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
    roles: of conversations, keep the activations of these roles' tokens only, such as ("assistant",); () for all tokens. A
        token counts that is partly theirs. What joins documents, and a BOS put before a context, is nobody's.
    """

    context_length: int = 128
    prepend_bos: bool = True
    store_special: bool = False
    packed: bool = True
    chat_template: bool = False
    plain_chats: bool = False
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", tuple(self.roles))  # manifests hold lists
        if not 2 <= self.context_length <= MAX_CONTEXT_LENGTH:
            raise CorpusError(
                f"The context length is {self.context_length}; choose a whole number from 2 to {MAX_CONTEXT_LENGTH:,}."
            )
        if self.chat_template and self.plain_chats:
            raise CorpusError(
                "Conversations go through the chat template or are joined plainly; choose one of the two."
            )
        if self.roles and not (self.chat_template or self.plain_chats):
            raise CorpusError("Tokens of chosen roles are those of conversations: choose how these become text.")

    def facts(self) -> dict[str, Any]:
        """Its fields, for manifests; one that came later is left out where it is off, so that older captures go on."""
        later = ("plain_chats", "roles")
        return {name: value for name, value in asdict(self).items() if value or name not in later}


@dataclass(frozen=True)
class Context:
    """One context: `ids` (context_length,) int32, the documents of its first and last text token, how many of its
    tokens are not padding (None: all), and which are of the roles that are kept, (context_length,) bool (None: all)."""

    ids: np.ndarray
    document: int
    last_document: int
    length: int | None = None
    kept: np.ndarray | None = None


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
    contexts: np.ndarray,
    policy: TokenPolicy,
    special: Iterable[int],
    lengths: np.ndarray | None = None,
    kept: np.ndarray | None = None,
) -> np.ndarray:
    """True where the activation of a token is stored; same shape as `contexts` (c, t). `lengths` (c,) without padding;
    `kept` (c, t), False for tokens of roles that are left out."""
    real = np.ones(contexts.shape, dtype=bool) if kept is None else kept.copy()
    if lengths is not None:
        real &= np.arange(contexts.shape[1]) < lengths[:, None]
    return real if policy.store_special else real & ~np.isin(contexts, np.fromiter(special, dtype=np.int64))


@dataclass(frozen=True)
class Written:
    """A document as the text that is tokenised, and which of its characters are kept (None: all)."""

    text: str
    spans: tuple[Span, ...] | None = None


def iter_documents(
    documents: Iterable[Document], tokenizer: Any, policy: TokenPolicy | None = None
) -> Iterator[np.ndarray]:
    """Token ids (m,) int32 of every document, in order, without added special tokens; a text may give an empty array.

    Raises CorpusError as `written`.
    """
    return (tokens[0] for tokens in _tokenised(documents, tokenizer, policy or TokenPolicy()))


def _tokenised(documents: Iterable[Document], tokenizer: Any, policy: TokenPolicy) -> Iterator[np.ndarray]:
    """(2, m) int32 of every document: token ids, and 1 where a token is of a role that is kept."""
    batch: list[Written] = []
    size = 0
    for document in written(documents, tokenizer, policy):
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield from _tokenise(batch, tokenizer)
            batch, size = [], 0
    if batch:
        yield from _tokenise(batch, tokenizer)


def written(documents: Iterable[Document], tokenizer: Any, policy: TokenPolicy) -> Iterator[Written]:
    """Every document as it is tokenised.

    Raises CorpusError when the tokenizer has no chat template, or cannot tell where a token stands in its text though
    roles are chosen; naming the row for a conversation that the template does not take or whose turns it does not let
    tell apart, for a text where roles are chosen, and for conversations under a policy that does not say how they become
    text.
    """
    if policy.chat_template and not tokenizer.chat_template:
        raise CorpusError("This model's tokenizer has no chat template; go without it.")
    if policy.roles and not tokenizer.is_fast:
        raise CorpusError("This model's tokenizer does not tell where its tokens stand; keep the tokens of all roles.")
    for number, document in enumerate(documents, start=1):
        if isinstance(document, str) and policy.roles:
            raise CorpusError(f"Document {number} is a text, which has no roles; keep the tokens of all.")
        if policy.chat_template:
            yield _chat(document, tokenizer, policy.roles)
        elif isinstance(document, str):
            yield Written(document)
        elif policy.plain_chats:
            yield Written(document.plain(), plain_spans(document, policy.roles) if policy.roles else None)
        else:
            raise CorpusError(
                f"{document.where} is a conversation; put it through the model's chat template, or join messages plainly."
            )


def _chat(document: Document, tokenizer: Any, roles: tuple[str, ...]) -> Written:
    chat = Conversation(({"role": "user", "content": document},), "") if isinstance(document, str) else document
    tools = {"tools": list(chat.tools)} if chat.tools else {}

    def write(messages: Sequence[dict[str, Any]], **options: Any) -> str:
        return chat_text(tokenizer, messages, **tools, **options)

    try:
        return Written(*spans_of(chat.messages, roles, write)) if roles else Written(write(chat.messages))
    except (ChatError, TurnsError) as error:
        said = " ".join(str(error).split())
        raise CorpusError(f"{chat.where}: {said[0].lower()}{said[1:]}" if chat.where else said) from error


def _tokenise(batch: list[Written], tokenizer: Any) -> Iterator[np.ndarray]:
    places = any(document.spans is not None for document in batch)
    encoded = tokenizer(
        [document.text for document in batch],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=places,
        verbose=False,
    )
    for number, (document, ids) in enumerate(zip(batch, encoded["input_ids"], strict=True)):
        tokens = np.ones((2, len(ids)), dtype=np.int32)
        tokens[0] = ids
        if document.spans is not None:
            tokens[1] = _within(np.asarray(encoded["offset_mapping"][number]).reshape(-1, 2), document.spans)
        yield tokens


def _within(places: np.ndarray, spans: tuple[Span, ...]) -> np.ndarray:
    """True for tokens, from and to which character (m, 2), that share a character with one of the spans."""
    found = np.zeros(len(places), dtype=bool)
    for start, end in spans:
        found |= (places[:, 0] < end) & (places[:, 1] > start)
    return found


def iter_contexts(texts: Iterable[Document], tokenizer: Any, policy: TokenPolicy) -> Iterator[Context]:
    """Contexts of a stream of documents (see the module's text). When packing, the last partial context is dropped.

    A tokenizer without EOS joins documents with nothing between them. Raises CorpusError when BOS or a chat template is
    asked for and the tokenizer has none, and when the texts do not fill one context.
    """
    documents = _tokenised(texts, tokenizer, policy)
    return (_packed if policy.packed else _padded)(documents, tokenizer, policy)


def _packed(documents: Iterator[np.ndarray], tokenizer: Any, policy: TokenPolicy) -> Iterator[Context]:
    bos = _bos(tokenizer, policy)
    pending = np.empty((3, 0), dtype=np.int32)  # token ids, whether each is kept, its document
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    n_tokens, made = 0, False
    for index, tokens in enumerate(documents):
        if eos and tokens.shape[1]:
            tokens = np.append(tokens, np.array([eos, [0]], dtype=np.int32), axis=1)
        n_tokens += tokens.shape[1]
        numbers = np.full((1, tokens.shape[1]), index, dtype=np.int32)
        pending = np.concatenate([pending, np.concatenate([tokens, numbers])], axis=1)
        start = 0
        context, end = _next(pending[:2], start, bos, policy)
        while context.shape[1] == policy.context_length:
            made = True
            ids, kept = context
            yield Context(ids, int(pending[2, start]), int(pending[2, end - 1]), kept=_kept(kept, policy))
            start = end
            context, end = _next(pending[:2], start, bos, policy)
        pending = pending[:, start:]
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
        while start < document.shape[1]:
            made = True
            real, start = _next(document, start, bos, policy)
            ids, kept = np.array([[padding], [0]], dtype=np.int32).repeat(policy.context_length, axis=1)
            ids[: real.shape[1]], kept[: real.shape[1]] = real
            yield Context(ids, index, index, real.shape[1], _kept(kept, policy))
    if not made:
        raise CorpusError("The texts give no tokens; add text.")


def _kept(kept: np.ndarray, policy: TokenPolicy) -> np.ndarray | None:
    return kept.astype(bool) if policy.roles else None


def _next(stream: np.ndarray, start: int, bos: np.ndarray, policy: TokenPolicy) -> tuple[np.ndarray, int]:
    """The context (2, m) that begins at `start` of a stream (2, n), shorter where the stream ends, and where the one after
    it begins. BOS comes before it, unless it begins with one that a chat template wrote."""
    if policy.chat_template and np.array_equal(stream[0, start : start + 1], bos[0]):
        bos = bos[:, :0]
    end = min(start + policy.context_length - bos.shape[1], stream.shape[1])
    return np.concatenate([bos, stream[:, start:end]], axis=1), end


def _bos(tokenizer: Any, policy: TokenPolicy) -> np.ndarray:
    """(2, 1), or (2, 0) where none is put before contexts."""
    if not policy.prepend_bos:
        return np.empty((2, 0), dtype=np.int32)
    if tokenizer.bos_token_id is None:
        raise CorpusError("This model's tokenizer has no beginning-of-sequence token; turn off prepend_bos.")
    return np.array([[tokenizer.bos_token_id], [0]], dtype=np.int32)
