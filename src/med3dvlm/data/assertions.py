"""What a report says of a finding: present, absent, uncertain, or not mentioned.

Rules in the manner of NegEx (Chapman et al., J Biomed Inform 2001) and ConText (Harkema et al.,
J Biomed Inform 2009): a term names the finding, and cues in the same clause ("no", "cannot be
excluded") say how it is meant, forwards or backwards, as far as their scope goes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Status = Literal["present", "absent", "uncertain", "not mentioned"]
STRONGEST_FIRST: tuple[Status, ...] = ("present", "uncertain", "absent", "not mentioned")


@dataclass(frozen=True)
class Term:
    """How a finding is named; patterns are matched within a clause, whatever the case.

    Attributes:
        mention: names the finding.
        normal: says by itself that the finding is absent ("heart size is normal").
        unlike: what overlaps a mention and means something else ("thyroid nodule").
    """

    mention: str
    normal: str = ""
    unlike: str = ""


BE = r"(?:is|are|was|were|has been|have been)"
SEEN = (
    r"(?:observed|seen|detected|noted|noticed|present|found|identified|visible|visuali[sz]ed|"
    r"evident|demonstrated|appreciated|encountered)"
)
# What was just denied is there after all: "not seen on the right, but it is present on the left".
AFTER_ALL = (
    rf"(?:except (?:in|on|at)|(?:but|(?:but|and|however,?)(?: it| they)? {BE})"
    rf"(?: newly| now| only)? {SEEN}(?! that))\b"
)
SENTENCE_END = re.compile(
    rf"(?!\s?{AFTER_ALL})(?:(?<=[.!?;])\s+|\n+|\b(?:technique|findings|impression):|"
    r"\bbut\b|\bhowever\b)",
    re.IGNORECASE,
)
# A new statement begins: after a finished predicate, or with a subject and verb of its own.
CLAUSE_END = re.compile(
    rf"(?!,?\s?{AFTER_ALL})(?:"
    r"\b(?:although|though|except|whereas|while|apart from|aside from|otherwise)\b"
    r"|(?:(?<=\bseen)|(?<=observed)|(?<=detected)|(?<=present)|(?<=noted)|(?<=found))(?:,| and)\s"
    r"|(?:(?<!however),| and)\s+(?=there (?:is|are|was|were)\b|it\b)"
    r"|,\s+(?=no\b(?! longer)))",
    re.IGNORECASE,
)
ADVERB = r"(?:(?:now|currently|clearly|definitely|completely|entirely|fully|totally|very|most) )*"
WHOLLY = r"(?:completely|entirely|fully|totally)"
GONE = rf"(?:resolved|disappeared|vanished|cleared|regressed {WHOLLY}|{WHOLLY} regressed)"
# Behind a word that closes a statement: "effusion: none", "effusion: none on the right".
CLOSED = r"(?=\s*(?:[.;,)]|$)| (?:in|on|at|bilaterally)\b)"
UNABLE = r"(?:cannot|can not|could not|can't|not possible to|unable to|difficult to)"

# Cues by what they say and where: forward of what follows in the clause, adjacent of the words that
# touch it, backward of what came before in the same statement, near of a subject just before, both
# of either. Longer wordings come first: what one cue has matched no later one reads.
CUES: dict[str, tuple[str, ...]] = {
    # look like a negation and are none
    "none, nowhere": (
        r"not (?:only|certain|without|absent|free of|free from|clear of)",
        r"(?:no|neither)(?: \w+){1,2} (?:is|are) (?:free of|free from|clear of)",
        rf"(?:{BE} )?not {SEEN} (?:before|previously|(?:on|in|at) the (?:previous|prior|last))",
        rf"(?:{BE} )?(?:no|not|without|absent)(?: {SEEN})?(?=\b.*\b{AFTER_ALL})",
        r"(?:no|without)(?: \w+){0,2} "
        r"(?:change|increase|decrease|progression|regression|resolution|doubt)s?",
        r"(?:partially|nearly|almost completely|incompletely|not) (?:resolved|cleared)",
        r"(?:partial|incomplete|near[- ]complete) (?:resolution|clearing|disappearance)",
    ),
    # what follows is not said of this scan
    "elsewhere, forward": (
        r"(?:history|evaluation|evaluated|screening|follow-?up|operated)(?: (?:for|of|on))?",
        r"status[- ]post|s/p",
    ),
    "elsewhere, adjacent": (r"(?<!post[- ])(?:repair|resection|excision|surgery)",),
    "uncertain, backward": (
        rf"{UNABLE} be {ADVERB}(?:excluded|ruled out|confirmed|evaluated|assessed)",
        rf"(?:{BE} )?not {ADVERB}(?:excluded|ruled out)",
        rf"{BE} (?:less |more |most )?"
        r"(?:possible|probable|suspected|questionable|likely|doubtful|equivocal)",
    ),
    "uncertain, forward": (
        rf"{UNABLE} (?:rule out|exclude)",
        rf"(?:(?:do|does|did) )?not {ADVERB}(?:exclude|excluding|rule out|ruling out)",
        r"(?:may|might|could|can)(?: also)? (?:represent|be|reflect|correspond|indicate|suggest)",
        r"suspicious (?:for|of|in terms of)|suspicion (?:for|of)|suspected|suspect",
        r"possib(?:le|ly)|probabl[ey]|questionable|likely|equivocal|doubtful|suggest(?:s|ing|ive)",
        r"differential diagnosis",
    ),
    "absent, backward": (
        rf"{BE} (?:not|no longer|never) (?:clearly )?{SEEN}",
        rf"(?:(?:has|have) )?(?:not|no longer|never) (?:been )?{SEEN}|{UNABLE} be {ADVERB}{SEEN}",
        rf"{BE} {ADVERB}(?:absent|ruled out|excluded|removed|withdrawn|negative(?! for))",
        rf"{BE} {ADVERB}(?:unlikely|improbable)(?! (?:that|to)\b)|unlikely{CLOSED}",
        rf"(?:has|have|had) {ADVERB}{GONE}|(?<=\w ){ADVERB}{GONE}|{ADVERB}{GONE}{CLOSED}",
        r"(?:has|have|do|does|did) not (?:develop|appear|exist)(?:ed)?",
        rf"none of (?:them|which)|(?:none|no|nil|absent|negative){CLOSED}",
    ),
    "absent, both": (rf"(?:{BE} )?(?:free of|free from|clear of|devoid of)",),
    "absent, near": (
        rf"(?:{BE}|appears?) (?:of )?(?:entirely |within )?(?:normal|clear|intact|free|natural)",
        rf"(?:{BE} |appears? )?unremarkable",
    ),
    "absent, adjacent": (r"normal",),
    "absent, forward": (
        r"no(?:thing|(?: findings?| signs?)?) (?:to suggest|suggestive of|suspicious (?:for|of))",
        r"no (?:evidence|signs?|suspicion) (?:of|for)|no|without|absence of|absent",
        r"negative for|neither|nor|rules out|ruled out|unlikely",
        r"(?:lack|lacks|lacking)(?: of)?|fail(?:s|ed)? to (?:show|demonstrate|reveal)",
        r"(?:resolution|clearing|disappearance) of",
        rf"(?:(?:the|an?|interval) )?{ADVERB}resolved",
        rf"(?:do|does|did) not|not {SEEN}|not",
    ),
}


GROUPS = {f"k{i}": tuple(kind.split(", ")) for i, kind in enumerate(CUES)}
ANY_CUE = "|".join(f"(?P<k{i}>{'|'.join(wordings)})" for i, wordings in enumerate(CUES.values()))
CUE = re.compile(rf"\b(?:{ANY_CUE})\b", re.IGNORECASE)
FINITE_VERB = re.compile(  # "which was seen before" is no statement of its own
    r"\b(?:is|are|(?<!which )(?<!that )(?:was|were)|has|have|shows?|contains?)\b", re.IGNORECASE
)
WORD = re.compile(r"\w[\w'-]*")
NORMALITY = (("absent", "near"), ("absent", "adjacent"))
JOINING = ("and", "or", "nor")
EMPTY = ("a", "an", "any", "the", "is", "are", "was", "were", "there", "other", "seen")
NEAR_WORDS = 3  # between a subject and "is normal"


def split_sentences(text: str) -> list[str]:
    """Sentences, and what "but" and "however" part, without the names of sections."""
    return [part.strip() for part in SENTENCE_END.split(text) if part and part.strip()]


def read_assertions(text: str, terms: Mapping[str, Term]) -> dict[str, Status]:
    """The status of every finding in a text.

    Where a text says several things of one finding, present outweighs uncertain, and uncertain
    outweighs absent.
    """
    clauses = [c for s in split_sentences(text) for c in CLAUSE_END.split(s) if c.strip()]
    cued = [(clause, list(CUE.finditer(clause))) for clause in clauses]
    found: dict[str, Status] = {}
    for name, term in terms.items():
        said = {status for clause, cues in cued for status in _statuses(clause, cues, term)}
        found[name] = next((s for s in STRONGEST_FIRST if s in said), "not mentioned")
    return found


def part_text(text: str) -> tuple[str, list[str]]:
    """What a text says is there, and the phrases that it says are not.

    Every word is read as a finding is: "no effusion; nodule in the left lung" gives "nodule in the
    left lung" and ["effusion"]. What is said of something else ("history of …") is in neither;
    "the heart is normal" asserts the words that it has.

    Returns:
        The words that are asserted, a clause a line; and each denied phrase without its articles.
    """
    kept: list[str] = []
    denied: list[str] = []
    for sentence in split_sentences(text):
        for clause in CLAUSE_END.split(sentence):
            cues = [c for c in CUE.finditer(clause) if GROUPS[c.lastgroup or ""] not in NORMALITY]
            free_of = max(
                (c.start() for c in cues if GROUPS[c.lastgroup or ""][1] == "both"), default=0
            )
            words = [  # before "free of" stands where, not what
                word for word in WORD.finditer(clause, free_of) if not _is_cue(word, cues)
            ]
            said = [(word, _status(word, cues)) for word in words]
            asserted = [word.group() for word, status in said if status in ("present", "uncertain")]
            while asserted and asserted[-1].lower() in JOINING:
                asserted.pop()
            kept += [" ".join(asserted)] if asserted else []
            denied += _phrases(clause, [word for word, status in said if status == "absent"])
    return "\n".join(kept), denied


def _is_cue(word: re.Match[str], cues: list[re.Match[str]]) -> bool:
    return any(cue.start() < word.end() and word.start() < cue.end() for cue in cues)


def _phrases(clause: str, words: list[re.Match[str]]) -> list[str]:
    """Words that follow each other, parted by commas and by "or" and the like."""
    phrases: list[list[str]] = [[]]
    end = 0
    for word in words:
        between = clause[end : word.start()]
        if between.strip() or word.group().lower() in JOINING:
            phrases.append([])
        if word.group().lower() not in (*JOINING, *EMPTY):
            phrases[-1].append(word.group())
        end = word.end()
    return [" ".join(phrase) for phrase in phrases if phrase]


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern or r"(?!)", re.IGNORECASE)  # no pattern: matches nothing


def _statuses(clause: str, cues: list[re.Match[str]], term: Term) -> list[Status]:
    normal = [m.span() for m in _compiled(term.normal).finditer(clause)]
    passed_over = normal + [m.span() for m in _compiled(term.unlike).finditer(clause)]
    statuses: list[Status] = ["absent"] if normal else []
    for mention in _compiled(term.mention).finditer(clause):
        if not any(a < mention.end() and mention.start() < b for a, b in passed_over):
            statuses.append(_status(mention, cues))
    return statuses


def _status(mention: re.Match[str], cues: list[re.Match[str]]) -> Status:
    kinds = [GROUPS[cue.lastgroup or ""] for cue in cues]
    said = {
        says for cue, (says, way) in zip(cues, kinds, strict=True) if _reaches(cue, way, mention)
    }
    if "elsewhere" in said:
        return "not mentioned"
    if "uncertain" in said:
        return "uncertain"
    return "absent" if "absent" in said else "present"


def _reaches(cue: re.Match[str], way: str, mention: re.Match[str]) -> bool:
    """Whether a mention lies in the scope of a cue of the same clause."""
    if cue.start() < mention.end() and mention.start() < cue.end():
        return True  # inside the mention: "the coronary arteries are free of calcification"
    precedes = cue.end() <= mention.start()
    start, end = (cue.end(), mention.start()) if precedes else (mention.end(), cue.start())
    between = cue.string[start:end]
    if way == "adjacent":
        return not between.strip()
    if precedes:
        return way in ("forward", "both")
    if way not in ("backward", "near", "both") or FINITE_VERB.search(between):
        return False
    near = len(between.split()) <= NEAR_WORDS and "," not in between
    return near or way == "backward"
