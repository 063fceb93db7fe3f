"""Duplicates are found, verified, joined and dropped; and others are left alone."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanophi.cli import UserError
from nanophi.text import dedup
from nanophi.text.corpus import read_rows, write_rows
from nanophi.text.dedup import (
    Config,
    Restartable,
    band_keys,
    bands_and_rows,
    candidate_pairs,
    find_clusters,
    jaccard,
    letters,
    main,
    near_duplicates,
    shingle_set,
    shingles,
    signatures,
)


def random_text(seed: int, length: int) -> str:
    return "".join(map(chr, np.random.default_rng(seed).integers(0x4E00, 0x9000, length)))


def similar_to(text: str, similarity: float, seed: int) -> str:
    """A text whose set of 5-grams has about this Jaccard similarity to the other's: its end is
    replaced."""
    keep = round(2 * similarity / (1 + similarity) * len(text))
    return text[:keep] + random_text(seed, len(text) - keep)


def test_same_characters_in_another_order_are_another_text():
    """The original compared sets of single characters: 狗咬了人 equalled 人咬了狗."""
    assert jaccard(shingle_set("昨天狗咬了人"), shingle_set("昨天人咬了狗")) == 0.0
    assert near_duplicates(["狗咬了人", "人咬了狗"]) == []


def test_near_duplicates_go_and_the_first_stays():
    a = random_text(1, 300)
    b = random_text(2, 300)
    changed = a[:150] + "改" + a[151:]
    punctuated = "，".join(b[i : i + 20] for i in range(0, 300, 20))
    assert near_duplicates([a, b, changed, a, punctuated]) == [2, 3, 4]


def test_half_the_same_is_not_a_duplicate():
    a = random_text(1, 300)
    assert near_duplicates([a, similar_to(a, 0.5, 3)]) == []


def test_short_and_empty_texts():
    assert near_duplicates([]) == []
    assert near_duplicates(["", "好", "好", "不好", "！"]) == [2, 4]


def test_signs_count_and_punctuation_does_not():
    """2+2=4 and 2*2=4 were once the same, as were any two rows of emoji."""
    assert near_duplicates(
        ["2+2=4", "2*2=4", "x = a + b - c", "x = a - b + c", "😀😀", "！！！", "😀，😀！"]
    ) == [6]


def test_clusters_are_chains():
    """b is similar to a, and c to b, but c is not to a: one cluster, whose first text stays."""
    a = random_text(1, 400)
    b = a[35:] + random_text(2, 10)
    c = a[75:] + random_text(3, 10)
    assert jaccard(shingle_set(a), shingle_set(c)) < 0.8
    assert find_clusters([random_text(9, 400), a, random_text(8, 50), c, b]) == [[1, 3, 4]]


@settings(deadline=None)
@given(
    st.lists(
        st.text(st.sampled_from("天地玄黄宇宙洪荒Aa1，\ud800\U00020000İ"), max_size=12), max_size=8
    )
)
def test_many_texts_at_once_are_each_alone(texts):
    """Shingles and signatures of a batch are those of each text alone, and of the definition."""
    hashes, starts = shingles(*letters(texts))
    assert len(starts) == len(texts) + 1
    for i, text in enumerate(texts):
        codes, _ = letters([text])
        plain = [ord(c.lower()) if len(c.lower()) == 1 else ord(c) for c in text if c.isalnum()]
        assert codes.tolist() == plain
        alone, _ = shingles(codes, np.array([0, len(codes)]))
        assert hashes[starts[i] : starts[i + 1]].tolist() == alone.tolist()
        padded = plain + [0] * (5 - len(plain))
        assert len(alone) == len(padded) - 4
        assert len(set(alone.tolist())) == len(
            {tuple(padded[j : j + 5]) for j in range(len(padded) - 4)}
        )
        assert (
            signatures(alone, np.array([0, len(alone)]))[0] == signatures(hashes, starts)[i]
        ).all()


def test_signatures_estimate_similarity():
    """Two texts agree in a bin with the probability of their Jaccard similarity, whether they are
    long or short."""
    for length, pairs in ((30, 400), (200, 200), (3000, 60)):
        for similarity in (0.3, 0.8):
            texts = [random_text(i, length) for i in range(pairs)]
            texts += [similar_to(text, similarity, 10_000 + i) for i, text in enumerate(texts)]
            signature = signatures(*shingles(*letters(texts)))
            sets = list(map(shingle_set, texts))
            true = np.mean([jaccard(sets[i], sets[i + pairs]) for i in range(pairs)])
            error = (signature[:pairs] == signature[pairs:]).mean() - true
            assert abs(error) < 0.02, (length, similarity, error)


def test_bands_are_chosen_from_the_threshold():
    assert bands_and_rows(0.8) == (16, 8)
    for threshold in (0.4, 0.6, 0.7, 0.9, 0.95, 1.0):
        bands, rows = bands_and_rows(threshold)
        assert bands * rows <= dedup.BINS
        assert 1 - (1 - min(threshold + 0.05, (1 + threshold) / 2) ** rows) ** bands >= 0.99


def test_planted_duplicates_are_found_and_nothing_else():
    """Of the pairs at threshold + 0.05 at least 98 % are found, and none below the threshold."""
    rng = np.random.default_rng(5)
    originals = [random_text(i, int(rng.integers(60, 600))) for i in range(400)]
    planted = [similar_to(text, (0.86, 0.7)[i % 2], 5000 + i) for i, text in enumerate(originals)]
    clusters = {tuple(cluster) for cluster in find_clusters(originals + planted, 0.8)}
    sets = list(map(shingle_set, originals + planted))
    true = [(i, i + 400) for i in range(400) if jaccard(sets[i], sets[i + 400]) >= 0.85]
    assert len(true) > 150
    assert sum(pair in clusters for pair in true) >= 0.98 * len(true)
    assert all(jaccard(sets[i], sets[j]) >= 0.8 for i, j in clusters)


def test_candidates_are_those_of_datasketch():
    """Given the same signatures, its LSH and ours name the same pairs."""
    datasketch = pytest.importorskip("datasketch")
    originals = [random_text(i, 200) for i in range(60)]
    texts = originals + [
        similar_to(t, s, 900 + i) for s in (0.9, 0.7, 0.5) for i, t in enumerate(originals)
    ]
    own = signatures(*shingles(*letters(texts)))
    lsh = datasketch.MinHashLSH(num_perm=128, params=(16, 8))
    pairs = set()
    for i, signature in enumerate(own):
        theirs = datasketch.MinHash(hashvalues=signature, scheme="affine32")
        pairs |= {(j, i) for j in lsh.query(theirs)}
        lsh.insert(i, theirs)
    assert {tuple(pair) for pair in candidate_pairs(band_keys(own, 16, 8)).tolist()} == pairs
    assert len(pairs) > 60


def test_runs_of_many_alike_texts_are_joined():
    """A thousand pages of one template collide all with all. To compare every pair would take half
    a million steps."""
    base = random_text(1, 300)
    texts = [base[:-8] + random_text(i, 8) for i in range(1000)]
    assert len(candidate_pairs(dedup.sketch(texts, 16, 8)[1])) < 16 * 1000 * dedup.RUN / 2
    assert find_clusters(texts) == [list(range(1000))]


def test_texts_do_not_stay_in_memory():
    """Eight million characters are read twice, with less memory than they take."""

    def texts():
        for i in range(2000):
            codes = np.random.default_rng(i if i != 1500 else 3).integers(
                0x4E00, 0x9000, 4000, dtype=np.uint16
            )
            yield codes.tobytes().decode("utf-16-le")

    find_clusters(["好"])  # tables
    tracemalloc.start()
    assert find_clusters(Restartable(texts)) == [[3, 1500]]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15e6
    with pytest.raises(AssertionError, match="read twice"):
        find_clusters(texts())


def test_workers_change_nothing():
    texts = [random_text(i % 70, 4000 + i) for i in range(120)]
    assert find_clusters(texts, workers=2) == find_clusters(texts)


def test_the_command(tmp_path, capsys):
    long = "春天来了，小草从土里探出头来，孩子们在公园里放风筝，风筝越飞越高，大家都很开心。"
    footer = "本文由编辑部整理，转载请注明出处，版权归原作者所有，侵权必究。"
    rows = [
        {"text": long},
        {"text": random_text(1, 90) + "\n" + footer},
        {"text": long + "！", "n": 1},
    ]
    asked = {"messages": [{"role": "user", "content": "问"}]}
    rows += [{"text": f"{random_text(2, 90)}\n{footer}"}, {"text": footer}, asked]
    write_rows(tmp_path / "a.jsonl", rows)
    out = tmp_path / "b.jsonl"
    arguments = {
        "input": [str(tmp_path)],
        "out": str(out),
        "clusters": str(tmp_path / "found" / "same.jsonl"),
    }
    assert main(Config(**arguments)) == {
        "read": 6,
        "lines": 0,
        "repeated": 1,
        "written": 5,
        "skipped": 0,
    }
    assert list(read_rows([out])) == [*rows[:2], *rows[3:]]
    (line,) = read_rows([tmp_path / "found"])
    assert [member["row"] for member in line["cluster"]] == [0, 2]
    (tmp_path / "found" / "same.jsonl").unlink()
    counts = main(Config(input=[str(tmp_path)], out=str(out), paragraphs=True))
    assert counts["lines"] == 3
    assert counts["repeated"] == 0
    assert counts["written"] == 4  # the third row is a line that stood before
    assert list(read_rows([out]))[2] == {"text": random_text(2, 90)}
    assert "wrote 4 to" in capsys.readouterr().out
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="nothing to read"):
        main(Config(input=[str(tmp_path / "a.jsonl")], out=str(out)))
