"""Drafted reports by their wording: kept libraries count, per sample, and the mean is given.

These scores reward the usual phrases: a normal report scores high against any other. Read them
beside the findings (`finding_table`).
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.evaluate.statistics import interval
from med3dvlm.evaluate.tables import Row

INSTALL = "the text metrics are not installed: pip install 'med3dvlm[evaluate]'"
WORDNET_VARIABLE = "MED3DVLM_WORDNET"
DEBIAN_WORDNET = Path("/usr/share/wordnet")
WORDNET_FILES = tuple(
    name for pos in ("noun", "verb", "adj", "adv") for name in (f"data.{pos}", f"index.{pos}")
)
# lexnames(5WN): the names of the lexicographer files, by part of speech in the order of their
# numbers 0 to 44. Debian's package leaves the file out.
LEXICOGRAPHER_FILES = """
adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body
noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location
noun.motive noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process
noun.quantity noun.relation noun.shape noun.state noun.substance noun.time verb.body verb.change
verb.cognition verb.communication verb.competition verb.consumption verb.contact verb.creation
verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather
adj.ppl
"""
LEXNAMES = tuple(LEXICOGRAPHER_FILES.split())
CATEGORIES = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def bleu(reference: str, draft: str, *, order: int = 1) -> float:
    """BLEU of one draft with n-grams up to `order`, 0 to 1; sacrebleu counts.

    Tokens as in mteval-v13a, unsmoothed and case-sensitive; a draft that is too short for an
    order is scored by the orders that it has.
    """
    score = _bleu(order).sentence_score(draft, [reference]).score / 100
    return min(1.0, score)  # equal texts have 100.00000000000004


def rouge(reference: str, draft: str, *, kind: str = "rouge1") -> float:
    """ROUGE F1 of one draft, 0 to 1, without stemming; rouge-score counts.

    Args:
        kind: "rouge1", "rouge2" or "rougeL" (longest common subsequence of the whole text).
    """
    return float(_rouge(kind).score(reference, draft)[kind].fmeasure)


def meteor(reference: str, draft: str, *, wordnet: Path | str | None = None) -> float:
    """METEOR of one draft, 0 to 1; NLTK counts, with its weights (Lavie and Agarwal 2007).

    The fragmentation penalty is 0.5·(chunks/matches)³, so an exact answer of one word, one chunk
    of one match, scores 0.5 and not 1.

    Args:
        wordnet: see :func:`read_wordnet`.
    """
    try:
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError as error:
        raise ImportError(INSTALL) from error
    reader = read_wordnet(wordnet)
    return float(single_meteor_score(_words(reference), _words(draft), wordnet=reader))


def bert_score_f1(
    references: Sequence[str],
    drafts: Sequence[str],
    model: Path | str,
    *,
    layers: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> list[float]:
    """BERTScore F1 of every draft, not rescaled, without idf weights; bert-score counts.

    Texts are cut at the length that the model has positions for. An empty text scores 0.

    Args:
        model: folder of a Hugging Face encoder with its tokenizer; nothing is downloaded.
        layers: whose output is compared; all the layers that the model has, if not given. The
            published figures use 17 of `roberta-large`.
        batch_size: texts that are encoded together.
        device: where they are encoded; on a GPU if there is one, if not given.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if BERTScore cannot use the model there, or it has fewer layers.
    """
    if not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(
            f"{model}: no config.json there; give the folder of a saved encoder for BERTScore."
        )
    scores = np.zeros(len(drafts))
    told = [i for i, pair in enumerate(zip(references, drafts, strict=True)) if all(_full(pair))]
    if told:
        _, _, f1 = _bert_scorer(str(model), layers, device).score(
            [drafts[i] for i in told], [references[i] for i in told], batch_size=batch_size
        )
        scores[told] = f1.numpy()
    return scores.tolist()


PAIRWISE: dict[str, Callable[[str, str], float]] = {
    **{f"BLEU-{n}": partial(bleu, order=n) for n in (1, 2, 3, 4)},
    "ROUGE-1": partial(rouge, kind="rouge1"),
    "ROUGE-L": partial(rouge, kind="rougeL"),
    "METEOR": meteor,
}
BERT_SCORE = "BERTScore-F1"


def wording_scores(
    references: Sequence[str],
    drafts: Sequence[str],
    metrics: Sequence[str] | None = None,
    *,
    wordnet: Path | str | None = None,
    bert: Path | str | None = None,
    bert_layers: int | None = None,
) -> dict[str, list[float]]:
    """Every metric's score, 0 to 1, of every draft; see :func:`wording_table`."""
    if len(references) != len(drafts) or not len(drafts):
        raise ValueError(f"{len(references)} references, {len(drafts)} drafts: give as many.")
    if metrics is None:
        metrics = [*PAIRWISE, *([BERT_SCORE] if bert is not None else [])]
    unknown = sorted(set(metrics) - {*PAIRWISE, BERT_SCORE})
    if unknown:
        known = ", ".join([*PAIRWISE, BERT_SCORE])
        raise ValueError(f"metrics: {', '.join(unknown)} is not known; choose from {known}.")
    if BERT_SCORE in metrics and bert is None:
        raise ValueError(f"metrics: {BERT_SCORE} needs an encoder; give its folder as bert.")
    scores = {}
    for name in metrics:
        if name == BERT_SCORE:
            scores[name] = bert_score_f1(references, drafts, bert or "", layers=bert_layers)
            continue
        metric = partial(meteor, wordnet=wordnet) if name == "METEOR" else PAIRWISE[name]
        scores[name] = [metric(*pair) for pair in zip(references, drafts, strict=True)]
    return scores


def wording_table(
    references: Sequence[str],
    drafts: Sequence[str],
    metrics: Sequence[str] | None = None,
    *,
    wordnet: Path | str | None = None,
    bert: Path | str | None = None,
    bert_layers: int | None = None,
) -> list[Row]:
    """Wording metrics per sample, averaged, with 95% bootstrap intervals.

    Args:
        metrics: names out of `PAIRWISE` and `BERT_SCORE`; all of `PAIRWISE` if not given, and
            BERTScore where `bert` is given.
        wordnet: folder of WordNet 3.0 for METEOR, see :func:`read_wordnet`.
        bert, bert_layers: encoder for BERTScore, see :func:`bert_score_f1`.

    Raises:
        FileNotFoundError: if METEOR is asked for and WordNet is not found.
        ValueError: for an unknown metric, or lists of different lengths.
    """
    scores = wording_scores(
        references, drafts, metrics, wordnet=wordnet, bert=bert, bert_layers=bert_layers
    )
    return [_row(name, np.array(values)) for name, values in scores.items()]


def _row(name: str, values: np.ndarray) -> Row:
    low, high = interval(values)
    mean = float(values.mean())
    return {"metric": name, "reports": len(values), "mean": mean, "low": low, "high": high}


def read_wordnet(folder: Path | str | None = None) -> Any:
    """NLTK's reader of a WordNet 3.0 folder, read once per process.

    Args:
        folder: where WordNet's `data.*` and `index.*` lie; else the environment variable
            MED3DVLM_WORDNET; else where Debian's `wordnet-base` puts them.

    Raises:
        FileNotFoundError: if they are not there.
    """
    folder = Path(folder or os.environ.get(WORDNET_VARIABLE) or DEBIAN_WORDNET).resolve()
    missing = [name for name in WORDNET_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: METEOR needs WordNet 3.0, and {missing[0]} is not there; run "
            f"`apt-get install wordnet-base` or give its folder in {WORDNET_VARIABLE}."
        )
    return _wordnet(folder)


@lru_cache(maxsize=2)
def _wordnet(folder: Path) -> Any:
    try:
        import nltk
        from nltk.corpus.reader.wordnet import WordNetCorpusReader
    except ImportError as error:
        raise ImportError(INSTALL) from error

    class Reader(WordNetCorpusReader):
        def open(self, file: str) -> Any:
            if file == "lexnames" and not (folder / file).is_file():
                return io.StringIO(lexnames())
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> dict:
            return {}  # the data are 3.0 already: nothing to map

    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))  # NLTK reads corpora only below folders named there
    # an empty multilingual reader: None would warn that there is none
    return Reader(str(folder), omw_reader=())


def lexnames() -> str:
    """The file `lexnames` of WordNet 3.0: number, name and syntactic category in every line."""
    return "".join(
        f"{number:02}\t{name}\t{CATEGORIES[name.split('.')[0]]}\n"
        for number, name in enumerate(LEXNAMES)
    )


def _words(text: str) -> list[str]:
    """Treebank tokens, sentence by sentence, as NLTK's `word_tokenize` has them.

    Sentences end at a full stop before a blank: NLTK's own splitter is a model to download.
    """
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    return [w for part in SENTENCE_END.split(text.strip()) for w in tokenizer.tokenize(part)]


def _full(texts: Sequence[str]) -> list[bool]:
    return [bool(text.strip()) for text in texts]


@lru_cache(maxsize=8)
def _bleu(order: int) -> Any:
    try:
        from sacrebleu.metrics import BLEU  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError(INSTALL) from error
    return BLEU(max_ngram_order=order, smooth_method="none", effective_order=True)


@lru_cache(maxsize=8)
def _rouge(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(INSTALL) from error
    return RougeScorer([kind])


@lru_cache(maxsize=1)
def _bert_scorer(folder: str, layers: int | None, device: str | None) -> Any:
    try:
        from bert_score import BERTScorer
    except ImportError as error:
        raise ImportError(INSTALL) from error
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        depth = layers or config.num_hidden_layers
        scorer = BERTScorer(model_type=folder, num_layers=depth, device=device)
    except Exception as error:  # transformers raises many kinds; each means: not to be used
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(
            f"{folder}: BERTScore cannot use this model ({reason}); give the folder of a saved "
            "encoder with its tokenizer, and a layer that it has."
        ) from error
    # RoBERTa's positions begin behind its padding token
    positions = config.max_position_embeddings
    if config.model_type in ("roberta", "xlm-roberta"):
        positions -= config.pad_token_id + 1
    tokenizer = scorer._tokenizer
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return scorer
