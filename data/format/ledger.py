"""The ledger of prepared data, or of one input shard: an account of every record and every token."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from .document import EXAMPLES, SPLITS, BadRecords, Split

Rule = Literal["short_document", "remainder", "end_of_input_shard", "near_duplicate"]
"""Reason for which tokens are dropped. short_document: a whole document, shorter than the smallest bucket. remainder:
the end of a longer document, beyond its last piece. end_of_input_shard: tokens that did not fill a last sequence of
concat-and-chunk. near_duplicate: a whole document, near-duplicate of one that is kept."""

Filter = Literal["not_sampled", "too_short", "too_long"]
"""Setting of a source by which a good document is left out before it is counted in a split."""


@dataclass(kw_only=True)
class SplitLedger:
    """Account of one split. Tokens are (input, target) pairs: a document has one per text token and one for its end."""

    documents: int = 0
    """Number of documents that entered."""

    tokens: int = 0
    """Number of tokens that entered."""

    document_lengths: Counter[int] = field(default_factory=Counter)
    """Number of documents by floor(log2(tokens))."""

    length_tokens: Counter[int] = field(default_factory=Counter)
    """Number of tokens of these documents, by the same key."""

    sequences: Counter[int] = field(default_factory=Counter)
    """Number of sequences written, by bucket length."""

    packed_sequences: int = 0
    """Number of these sequences that were packed from several documents or pieces."""

    filler_tokens: int = 0
    """Number of boundary tokens that fill the last packed sequence of an input shard and belong to no document."""

    dropped_documents: Counter[Rule] = field(default_factory=Counter)
    """Number of documents dropped as a whole, by rule."""

    dropped_tokens: Counter[Rule] = field(default_factory=Counter)
    """Number of tokens dropped, by rule."""

    def enter(self, num_pairs: int) -> None:
        """Count a document of `num_pairs` tokens that entered."""
        self.documents += 1
        self.tokens += num_pairs
        self.document_lengths[num_pairs.bit_length() - 1] += 1  # floor(log2)
        self.length_tokens[num_pairs.bit_length() - 1] += num_pairs

    def drop(self, rule: Rule, num_pairs: int, *, whole: bool) -> None:
        """Count `num_pairs` dropped tokens; with `whole` they are a document, else the end of one."""
        self.dropped_tokens[rule] += num_pairs
        self.dropped_documents[rule] += whole

    def sequence_tokens(self) -> int:
        """Return the number of tokens written to all buckets, filler included."""
        return sum(length * count for length, count in self.sequences.items())


def _new_splits() -> dict[Split, SplitLedger]:
    return {split: SplitLedger() for split in SPLITS}


@dataclass(kw_only=True)
class Ledger:
    """Account of records and tokens. Records read = documents entered + documents left out + bad records; in each
    split, tokens entered + filler = tokens written + tokens dropped."""

    records: int = 0
    """Number of records read from the sources."""

    bad: BadRecords = field(default_factory=BadRecords)
    """Bad records, by kind."""

    left_out_documents: Counter[Filter] = field(default_factory=Counter)
    """Number of good documents left out by a setting of their source."""

    left_out_tokens: Counter[Filter] = field(default_factory=Counter)
    """Number of tokens of these documents; a document that is not sampled is not tokenized, and counts none."""

    splits: dict[Split, SplitLedger] = field(default_factory=_new_splits)
    """Account of each split."""

    word_cuts: int = 0
    """Number of cuts inside a word, or a run of white space, too long to be tokenized as a whole. No character is lost
    there; its ids may differ from those of the whole."""

    word_cut_examples: list[str] = field(default_factory=list)
    """Record and byte of its text of the first of these cuts."""

    @property
    def documents(self) -> int:
        """Number of documents that entered."""
        return sum(split.documents for split in self.splits.values())

    @property
    def tokens(self) -> int:
        """Number of tokens that entered."""
        return sum(split.tokens for split in self.splits.values())

    def leave_out(self, rule: Filter, num_pairs: int = 0) -> None:
        """Count a good document of `num_pairs` tokens that a setting of its source leaves out."""
        self.left_out_documents[rule] += 1
        self.left_out_tokens[rule] += num_pairs

    def enter_word_cut(self, name: str, byte: int) -> None:
        """Count a cut inside a word of the record `name`, before byte `byte` of its text."""
        self.word_cuts += 1
        if len(self.word_cut_examples) < EXAMPLES:
            self.word_cut_examples.append(f"{name}, byte {byte:,}")

    def check(self) -> None:
        """Raise AssertionError unless the account adds up, which would be an error of LongRing."""
        left_out = self.left_out_documents.total()
        assert self.records == self.documents + left_out + self.bad.counts.total(), self
        for split in self.splits.values():
            assert split.tokens + split.filler_tokens == split.sequence_tokens() + split.dropped_tokens.total(), split
            assert split.documents == split.document_lengths.total(), split
            assert split.tokens == split.length_tokens.total(), split
            assert split.dropped_documents.total() <= split.documents, split

    def add(self, other: "Ledger") -> None:
        """Add the ledger of another input shard or source to this one."""
        self.records += other.records
        self.left_out_documents.update(other.left_out_documents)
        self.left_out_tokens.update(other.left_out_tokens)
        self.bad.counts.update(other.bad.counts)
        for kind, names in other.bad.examples.items():
            known = self.bad.examples.setdefault(kind, [])
            known += names[: EXAMPLES - len(known)]  # in place: `known` is the list of `self.bad`
        self.word_cuts += other.word_cuts
        self.word_cut_examples += other.word_cut_examples[: EXAMPLES - len(self.word_cut_examples)]
        for split, account in other.splits.items():
            mine = vars(self.splits[split])
            for key, value in vars(account).items():
                if isinstance(value, Counter):
                    mine[key].update(value)  # += would drop the keys whose count is 0
                else:
                    mine[key] += value

    def to_json(self) -> dict[str, Any]:
        """Return the ledger as plain dictionaries for JSON, which turns their integer keys into strings."""
        # dataclasses.asdict would rebuild a Counter from its items, and so count them.
        return {
            "records": self.records,
            "bad": {"counts": dict(self.bad.counts), "examples": self.bad.examples},
            "left_out_documents": dict(self.left_out_documents),
            "left_out_tokens": dict(self.left_out_tokens),
            "splits": {split: dict(vars(account)) for split, account in self.splits.items()},
            "word_cuts": {"count": self.word_cuts, "examples": self.word_cut_examples},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Ledger":
        """Return the ledger from a value of `to_json`, whether JSON has turned its keys into strings or not."""

        def split_ledger(entry: dict[str, Any]) -> SplitLedger:
            by_number = ("sequences", "document_lengths", "length_tokens")
            counters = {key: Counter({int(name): count for name, count in entry[key].items()}) for key in by_number}
            counters |= {key: Counter(entry[key]) for key in ("dropped_documents", "dropped_tokens")}
            return SplitLedger(**{**entry, **counters})

        bad = BadRecords(counts=Counter(value["bad"]["counts"]), examples=value["bad"]["examples"])
        # Data of earlier versions has no word cuts and leaves nothing out.
        cuts = value.get("word_cuts", {"count": 0, "examples": []})
        return cls(
            records=value["records"],
            bad=bad,
            left_out_documents=Counter(value.get("left_out_documents", {})),
            left_out_tokens=Counter(value.get("left_out_tokens", {})),
            splits={split: split_ledger(value["splits"][split]) for split in SPLITS},
            word_cuts=cuts["count"],
            word_cut_examples=cuts["examples"],
        )
