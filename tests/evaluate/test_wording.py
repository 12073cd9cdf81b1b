"""Every wording metric against its reference library, called directly."""

from __future__ import annotations

import numpy as np
import pytest

from med3dvlm.evaluate import wording_scores, wording_table
from med3dvlm.evaluate.wording import (
    DEBIAN_WORDNET,
    LEXNAMES,
    WORDNET_VARIABLE,
    bert_score_f1,
    bleu,
    meteor,
    read_wordnet,
    rouge,
)
from tests.evaluate.tiny import tiny_bert

REFERENCES = [
    "The heart is enlarged. There is a small right pleural effusion.",
    "No pleural effusion. Mild emphysema is seen in both lungs.",
    "A 12 mm nodule is seen in the left upper lobe; the liver is normal.",
    "Sequela fibrotic changes in both lungs, and hiatal hernia.",
]
DRAFTS = [
    "There is cardiomegaly. Small right-sided pleural effusions are present.",
    "No pleural effusion. Mild emphysema is seen in both lungs.",
    "Nodules of 12 mm in the upper lobe of the left lung.",
    "The gallbladder contains stones.",
]
PAIRS = list(zip(REFERENCES, DRAFTS, strict=True))
WITH_WORDNET = pytest.mark.skipif(
    not (DEBIAN_WORDNET / "data.noun").is_file(), reason="needs the Debian package wordnet-base"
)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_is_sacrebleus(order):
    from sacrebleu.metrics import BLEU

    metric = BLEU(max_ngram_order=order, smooth_method="none", effective_order=True)
    expected = [metric.sentence_score(d, [r]).score / 100 for r, d in PAIRS]
    scores = wording_scores(REFERENCES, DRAFTS, [f"BLEU-{order}"])[f"BLEU-{order}"]
    assert scores == pytest.approx(expected, abs=1e-12)
    assert scores[1] == pytest.approx(1) and scores[0] < 1


@pytest.mark.parametrize(("name", "kind"), [("ROUGE-1", "rouge1"), ("ROUGE-L", "rougeL")])
def test_rouge_is_rouge_scores(name, kind):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=False)
    expected = [scorer.score(r, d)[kind].fmeasure for r, d in PAIRS]
    assert wording_scores(REFERENCES, DRAFTS, [name])[name] == pytest.approx(expected, abs=1e-12)


def test_bleu_and_rouge_by_hand():
    assert bleu("the liver is normal", "the liver is big") == pytest.approx(0.75)
    assert bleu("the liver is normal", "the liver is big", order=2) == pytest.approx(
        np.sqrt(3 / 4 * 2 / 3)
    )
    assert bleu("a b c d", "a b") == pytest.approx(np.exp(1 - 4 / 2))  # brevity
    assert bleu("a", "b") == bleu("a", "") == rouge("a", "") == 0
    assert rouge("a b c", "a b d e") == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    in_order = rouge("a b c", "c a b", kind="rougeL")  # two of three keep their order
    assert in_order == pytest.approx(2 / 3) and rouge("a b c", "c a b") == 1


@WITH_WORDNET
def test_meteor_is_nltks_with_wordnet_3():
    from nltk.tokenize import word_tokenize
    from nltk.translate.meteor_score import meteor_score

    reader = read_wordnet()
    pairs = [("the liver is normal", "the hepatic parenchyma is normal"), *PAIRS]

    def words(text):
        sentences = text.replace(". ", ".\n").split("\n")
        return [w for s in sentences for w in word_tokenize(s, preserve_line=True)]

    for reference, draft in pairs:
        expected = meteor_score([words(reference)], words(draft), wordnet=reader)
        assert meteor(reference, draft) == pytest.approx(expected, abs=1e-6)


@WITH_WORDNET
def test_meteor_reproduces_what_nltk_documents():
    # https://www.nltk.org/api/nltk.translate.meteor_score.html
    draft = "It is a guide to action which ensures that the military always obeys the commands of "
    draft += "the party"
    reference = "It is a guide to action that ensures that the military will forever heed Party "
    reference += "commands"
    assert round(meteor(reference, draft), 4) == 0.6944
    assert meteor("this is a cat", "non matching hypothesis") == 0


@WITH_WORDNET
def test_meteor_knows_synonyms_and_halves_an_exact_word():
    assert meteor("the physician", "the doctor") > meteor("the physician", "the liver")
    # NLTK looks the stem up, so a synonym whose stem is no word is not found
    assert meteor("automobile", "car") == 0
    assert meteor("right", "right") == 0.5  # one chunk of one match: the highest penalty
    assert meteor("right", "left") == meteor("right", "") == 0
    assert read_wordnet().synsets("liver")[0].lexname() == "noun.body"


def test_lexnames_are_those_of_the_manual():
    assert len(LEXNAMES) == 45
    assert (LEXNAMES[3], LEXNAMES[29], LEXNAMES[44]) == ("noun.Tops", "verb.body", "adj.ppl")


def test_missing_wordnet_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="apt-get install wordnet-base"):
        wording_table(["a"], ["b"], ["METEOR"], wordnet=tmp_path)
    monkeypatch.setenv(WORDNET_VARIABLE, str(tmp_path / "there"))
    with pytest.raises(FileNotFoundError, match="there"):
        meteor("a", "b")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"), REFERENCES + DRAFTS)


def test_bert_score_is_bert_scores(encoder):
    from bert_score import BERTScorer

    scorer = BERTScorer(model_type=str(encoder), num_layers=2)
    scorer._tokenizer.model_max_length = 32
    expected = scorer.score(DRAFTS, REFERENCES)[2].tolist()
    scores = bert_score_f1(REFERENCES, DRAFTS, encoder)
    assert scores == pytest.approx(expected, abs=1e-6)
    assert scores[1] == pytest.approx(1, abs=1e-5) and max(scores[0], scores[2]) < 0.999
    one_layer = bert_score_f1(REFERENCES, DRAFTS, encoder, layers=1)
    assert one_layer[0] != pytest.approx(scores[0], abs=1e-6)


def test_bert_score_of_empty_and_of_long_texts(encoder):
    long = " ".join(REFERENCES * 10)
    empty, cut = bert_score_f1(["the heart", long], [" ", long], encoder)
    assert empty == 0 and cut == pytest.approx(1, abs=1e-5)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        bert_score_f1(["a"], ["b"], encoder / "nowhere")


def test_an_encoder_that_cannot_be_used_is_refused_in_one_sentence(encoder, tmp_path):
    with pytest.raises(ValueError, match=r"cannot use this model .*between 0 and 2"):
        bert_score_f1(["a"], ["b"], encoder, layers=3)
    (tmp_path / "config.json").write_text((encoder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"cannot use this model .*with its tokenizer") as refused:
        bert_score_f1(["a"], ["b"], tmp_path)
    assert "\n" not in str(refused.value)


def test_a_table_has_means_with_intervals(encoder):
    rows = wording_table(["a b", "a b"], ["a b", "c d"], ["BLEU-1", "ROUGE-1"])
    assert [row["metric"] for row in rows] == ["BLEU-1", "ROUGE-1"]
    assert [row["mean"] for row in rows] == pytest.approx([0.5, 0.5])
    assert rows[0]["low"] <= 0.5 <= rows[0]["high"]
    row = wording_table(REFERENCES, DRAFTS, ["BERTScore-F1"], bert=encoder)[0]
    assert row["low"] < row["mean"] < row["high"]
    for arguments in ((["a"], ["b"], ["BLUE"]), (["a"], []), (["a"], ["b"], ["BERTScore-F1"])):
        with pytest.raises(ValueError, match=r"choose from|as many|folder as bert"):
            wording_table(*arguments)


@WITH_WORDNET
def test_all_metrics_that_need_no_model_are_the_default():
    rows = wording_table(REFERENCES, DRAFTS)
    names = [f"BLEU-{n}" for n in (1, 2, 3, 4)] + ["ROUGE-1", "ROUGE-L", "METEOR"]
    assert [row["metric"] for row in rows] == names
    means = [row["mean"] for row in rows]
    assert means[:4] == sorted(means[:4], reverse=True)
