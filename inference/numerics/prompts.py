"""Many texts or conversations, each read on its own, a few at a time."""

from collections.abc import Iterable, Iterator, Sequence

from concepts.numerics.token_text import token_texts
from inference.numerics.infer import Codes, Reader, check_readers, infer_many, text_ids
from inference.numerics.table import Table
from saes.numerics.lm import LM
from training.numerics.documents import Conversation, Document
from training.numerics.tokens import TokenPolicy, iter_documents, special_ids

BATCH_TOKENS = 2048  # padding included
AHEAD = 256  # texts sorted by length together, so that little of a pass is padding
LONGEST = 8192  # of a model that sets no limit itself
CHARACTERS_A_TOKEN = 16  # no tokenizer takes more on a whole text; what is beyond the context is not tokenised


class PromptReader:
    """Reads documents into a table; a conversation goes through the chat template, as in captures. `n_prompts`, `n_tokens`,
    and `n_cut`: texts longer than the model reads, of which only the beginning was read."""

    def __init__(self, lm: LM, readers: Sequence[Reader], saes: Sequence[int], prepend_bos: bool, top: int) -> None:
        check_readers(lm, readers)
        self.lm, self.readers, self.saes = lm, readers, saes
        self.prepend_bos, self.top = prepend_bos, top
        self.longest = lm.max_context or LONGEST
        self.special = special_ids(lm.tokenizer)
        self.n_prompts = self.n_tokens = self.n_cut = 0

    def read(self, texts: Iterable[Document], table: Table) -> Iterator[int]:
        """Read every text into the table, a few hundred at a time by length; yields how many are done after each pass."""
        waiting: list[list[int]] = []
        for text in texts:
            waiting.append(self._ids(text))
            if len(waiting) == AHEAD:
                yield from self._together(waiting, table)
                waiting = []
        if waiting:
            yield from self._together(waiting, table)

    def _ids(self, document: Document) -> list[int]:
        if not isinstance(document, str):
            ids = self._chat_ids(document)
            self.n_cut += len(ids) > self.longest
            return ids[: self.longest]
        kept = document[: self.longest * CHARACTERS_A_TOKEN]
        ids, _ = text_ids(self.lm, kept, self.prepend_bos)
        self.n_cut += len(ids) > self.longest or len(kept) < len(document)
        return ids[: self.longest]

    def _chat_ids(self, chat: Conversation) -> list[int]:
        bos = self.lm.tokenizer.bos_token_id
        (found,) = iter_documents([chat], self.lm.tokenizer, TokenPolicy(chat_template=True))
        ids: list[int] = found.tolist()
        return [bos, *ids] if self.prepend_bos and bos is not None and ids[:1] != [bos] else ids

    def _together(self, texts: list[list[int]], table: Table) -> Iterator[int]:
        """Written pass by pass, so that what fires on hundreds of texts never has to fit into memory."""
        first = self.n_prompts
        for group in _groups(texts):
            many = infer_many(self.lm, self.readers, [texts[i] for i in group])
            for i, codes in zip(group, many, strict=True):
                self._add(table, first + i, texts[i], codes)
            self.n_prompts += len(group)
            yield self.n_prompts

    def _add(self, table: Table, prompt: int, ids: list[int], codes: Sequence[Codes]) -> None:
        tokens, special = token_texts(self.lm.tokenizer, ids), [token in self.special for token in ids]
        for sae, one in zip(self.saes, codes, strict=True):
            table.add(prompt, sae, ids, tokens, special, one.strongest(self.top) if self.top else one)
        self.n_tokens += len(ids)


def _groups(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Numbers of texts of like length, as many as fit into a pass."""
    group: list[int] = []
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        if group and (len(group) + 1) * len(texts[i]) > BATCH_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
