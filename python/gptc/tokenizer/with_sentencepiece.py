"""Models of SentencePiece, such as Llama 2's tokenizer.model."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gptc.errors import GptcError
from gptc.files.words import pip_install
from gptc.tokenizer.libraries import called, check_ids, try_out
from gptc.tokenizer.pretrained import SPACE, PretrainedTokenizer, read_sentencepiece
from gptc.tokenizer.scored import Proto, read_proto

if TYPE_CHECKING:
    import sentencepiece

_SILENT = 4  # a level of its log


class SentencePieceTokenizer(PretrainedTokenizer):
    """A SentencePiece model, such as Llama 2's tokenizer.model."""

    kind = "sentencepiece"
    has_template = False

    def __init__(self, model: bytes, start: str | None = None, where: str = "it") -> None:
        """`model` is the content of the file. GptcError when it is none."""
        try:
            import sentencepiece
        except ImportError:
            raise GptcError(f"{where} needs a package: {pip_install('sentencepiece')}") from None
        try_out("sentencepiece", model, where)
        sentencepiece.SetMinLogLevel(_SILENT)
        with called(where, "copy it again"):
            self._model: sentencepiece.SentencePieceProcessor = (
                sentencepiece.SentencePieceProcessor(model_proto=model)
            )
            self.vocab_size: int = check_ids(list(range(self._model.vocab_size())), where)
            self._texts: list[str] = self._model.id_to_piece(list(range(self.vocab_size)))
            first = self._model.encode("a", out_type=str)
        self.proto = model
        end = self._model.eos_id()
        self.end_of_text = end if end >= 0 else None
        self.unknown_id = self._model.unk_id()
        self.start = start or self.start_text()
        self.adds_space = self.strips_space = bool(first) and first[0].startswith(SPACE)

    def _encode(self, text: str) -> Sequence[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    @property
    def named_begin(self) -> int | None:
        known = super().named_begin
        return self.own_bos() if known is None else known

    def own_bos(self) -> int | None:
        """The token that begins a text; those who read such files, as Llama's, put it there."""
        begin = self._model.bos_id()
        return begin if begin >= 0 else None

    def id_of(self, piece: str) -> int | None:
        """The token of that name."""
        return self._texts.index(piece) if piece in self._texts else None

    def scored_pieces(self) -> tuple[list[str], list[float], list[int]]:
        """Texts, scores and sorts of all pieces: the sorts are numbered as in its proto."""
        scores = list(self._model.get_score(list(range(self.vocab_size))))
        return list(self._texts), scores, list(self.facts.types)

    def cut(self, data: bytes | bytearray) -> int:
        if self.facts.is_words:  # the last one may become longer, and another token
            data = data[: max(data.rfind(b" "), data.rfind(b"\n"), 0)]
        return super().cut(data)

    @cached_property
    def facts(self) -> Proto:
        """What its proto says. GptcError when it is damaged."""
        try:
            return read_proto(self.proto)
        except ValueError:
            raise GptcError("this SentencePiece model is damaged: copy it again") from None

    @cached_property
    def pieces(self) -> Sequence[bytes]:
        return [
            piece.encode() if self._model.is_control(i) else read_sentencepiece(piece)
            for i, piece in enumerate(self._texts)
        ]

    @property
    def specials(self) -> frozenset[int]:
        _, _, sorts = self.scored_pieces()
        return super().specials | {id for id, sort in enumerate(sorts) if sort in (2, 3, 5)}

    def mapping(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": base64.b64encode(self.proto).decode()}
