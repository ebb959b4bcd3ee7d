"""RefGPT grown to long contexts: the true reference of a dialogue hidden among its nearest neighbours.

The recipe of RefGPT-Fact-v2-8x: K ~ Poisson(8) references in random order, one of them the dialogue's own, the others
those most like it; the dialogue follows. Like texts make it a task to find the true one, not a matter of topic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds_longft.errors import DataError
from ds_longft.tools.make_data.extras import needs_extra
from ds_longft.tools.make_data.synth.sources import Dialogue

MEAN_REFERENCES = 8.0
MAX_TERMS = 1 << 18
# Words, and pairs of Chinese characters: short enough to be shared, long enough to mean something.
TERMS = r"(?u)[\u3400-\u9fff]|[^\W\u3400-\u9fff]+"

Vectors = Any  # scipy sparse matrix or array, [texts, dimensions]
Embed = Callable[[Sequence[str]], Vectors]


def hide_references(
    dialogues: Sequence[Dialogue],
    *,
    rows: int,
    seed: int,
    name: str,
    mean_references: float = MEAN_REFERENCES,
    embed: Embed | None = None,
) -> Iterator[dict[str, Any]]:
    """`rows` rows in `messages` form, each a dialogue behind K references; the same seed gives the same rows.

    Args:
        dialogues: all that references may be taken from; languages are never mixed in one row.
        rows: how many dialogues are drawn, none twice.
        name: `source` of the rows.
        mean_references: K is drawn from the Poisson distribution of this mean, and is at least 1.
        embed: texts to vectors; TF-IDF of words and Chinese character pairs when left out.

    Raises:
        DataError: more rows than dialogues.
        LongftError: scikit-learn is missing.
    """
    if rows > len(dialogues):
        raise DataError(f"{rows} rows were asked for, but there are {len(dialogues)} dialogues with a reference")
    rng = np.random.default_rng([seed, 8])
    drawn = rng.choice(len(dialogues), rows, replace=False)
    counts = np.maximum(1, rng.poisson(mean_references, rows))
    by_language: dict[str, list[int]] = defaultdict(list)  # language -> places in `drawn`
    for place, number in enumerate(drawn.tolist()):
        by_language[dialogues[number].language].append(place)
    others: dict[int, list[str]] = {}  # place -> neighbours, nearest first
    for language, places in sorted(by_language.items()):
        texts = list(dict.fromkeys(d.text for d in dialogues if d.language == language))
        row_of = {text: row for row, text in enumerate(texts)}
        wanted = [row_of[dialogues[drawn[place]].text] for place in places]
        for place, near in zip(places, nearest(texts, wanted, int(counts.max()) - 1, embed), strict=True):
            others[place] = [texts[i] for i in near[: counts[place] - 1]]
    for place, number in enumerate(drawn.tolist()):
        dialogue = dialogues[number]
        references = [dialogue.text, *others[place]]
        order = rng.permutation(len(references))
        context = "\n\n".join(references[i] for i in order)
        messages = [{"role": turn.role, "content": turn.content} for turn in dialogue.turns]
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = f"{context}\n\n{first['content']}"
        yield {
            "messages": messages,
            "source": name,
            "language": dialogue.language,
            "id": f"{name}-{seed}-{dialogue.id}",
            "references": len(references),
            "true_reference": int(np.argmin(order)) + 1,  # which of them, from 1
        }


def nearest(texts: Sequence[str], wanted: Sequence[int], count: int, embed: Embed | None) -> NDArray[np.int64]:
    """[wanted, at most count] the texts most like each wanted one by cosine, itself left out, nearest first."""
    count = min(count, len(texts) - 1)
    if count < 1 or not wanted:
        return np.zeros((len(wanted), 0), dtype=np.int64)
    with needs_extra("synth", "finding references that are like each other"):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.neighbors import NearestNeighbors
    tf_idf = TfidfVectorizer(
        token_pattern=TERMS, ngram_range=(1, 2), sublinear_tf=True, max_features=MAX_TERMS, dtype=np.float32
    )
    vectors = tf_idf.fit_transform(texts) if embed is None else embed(texts)
    index = NearestNeighbors(n_neighbors=count + 1, metric="cosine", algorithm="brute").fit(vectors)
    found = index.kneighbors(vectors[np.asarray(wanted)], return_distance=False)
    return np.stack(
        [np.asarray([i for i in near if i != own][:count]) for near, own in zip(found, wanted, strict=True)]
    )


def sentence_embedder(model: str) -> Embed:
    """Texts to vectors by a sentence-transformers model (folder or hub id). Raises `LongftError`: not installed."""
    with needs_extra("embed", "an embedding model"):
        from sentence_transformers import SentenceTransformer
    encoder = SentenceTransformer(model)
    return lambda texts: encoder.encode(list(texts), convert_to_numpy=True, normalize_embeddings=True)
