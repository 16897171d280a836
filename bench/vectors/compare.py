"""What searches find in codes of mix viva.vectors, beside others' codes of the same vectors.

    python bench/vectors/compare.py embeddings.npy DIR...

Every DIR is read as docs/vectors.md says, with numpy alone. Prints a table in Markdown:
bytes a vector, the share of the ten nearest that are found by codes, and the share when
the hundred best are scored again: by what DIR has for it, by the vectors in f32 for others.
"""

import pathlib
import sys

import faiss
import numpy as np
from safetensors import safe_open
from usearch.index import Index

NEAREST, CANDIDATES, QUERIES, SEED = 10, 100, 1000, 1


class Search:
    def __init__(self, x):
        self.x = x / np.linalg.norm(x, axis=1, keepdims=True)
        self.own = np.random.default_rng(SEED).choice(len(x), QUERIES, replace=False)
        self.queries = self.x[self.own]
        self.exact = self.best(self.queries @ self.x.T, NEAREST)

    def best(self, scores, most):
        scores = scores.copy()
        scores[np.arange(len(scores)), self.own] = -np.inf
        best = np.argpartition(-scores, most, axis=1)[:, :most]
        order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1)
        return np.take_along_axis(best, order, 1)

    def recall(self, found):
        hits = [len(set(a) & set(b)) for a, b in zip(self.exact, found[:, :NEAREST])]
        return np.mean(hits) / NEAREST

    def again(self, found, vectors):
        scores = np.einsum("qd,qkd->qk", self.queries, vectors[found])
        return np.take_along_axis(found, np.argsort(-scores, axis=1), 1)

    def row(self, name, size, scores, vectors):
        found = self.best(scores, CANDIDATES)
        again = "-" if vectors is None else f"{self.recall(self.again(found, vectors)):.4f}"
        print(f"| {name} | {size:g} | {self.recall(found):.4f} | {again} |", flush=True)

    def row_of_index(self, name, size, search):
        # A search finds the query itself.
        found = search(self.queries, CANDIDATES + 1)
        others = [[i for i in row if i != own][:CANDIDATES] for row, own in zip(found, self.own)]
        found = np.array(others)
        again = self.recall(self.again(found, self.x))
        print(f"| {name} | {size:g} | {self.recall(found):.4f} | {again:.4f} |", flush=True)


def signs(bits, dimension):
    """1 and -1, from bits as numpy packs them."""
    return np.unpackbits(bits, axis=1)[:, :dimension].astype(np.float32) * 2 - 1


def sixteen_steps(x):
    low = x.min(1, keepdims=True)
    step = (x.max(1, keepdims=True) - low) / 15
    return low + step * np.round((x - low) / step)


def directory(search, path):
    tensors, said = {}, {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            said = opened.metadata()
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    dimension = int(said["dimension"])
    mean = tensors.get("mean", 0)
    codes = tensors["codes"]
    vectors = None
    if said["rescore"] == "f16":
        vectors = tensors["rescore"].astype(np.float32)
    elif said["rescore"] == "int8":
        vectors = mean + tensors["rescore"] * tensors["rescore_scale"][:, None]
    size = codes.shape[1] + (4 if "scale" in tensors else 0)
    name = f"viva_tensor {said['codes']}, {said['rescore']}"
    if said["codes"] == "binary":
        x = signs(codes, dimension)
        q = np.where(search.queries > mean, 1, -1).astype(np.float32)
        search.row(f"{name}, binary queries", size, q @ x.T, vectors)
        search.row(name, size, sixteen_steps(search.queries) @ x.T, vectors)
        return
    if said["codes"] == "int4":
        halves = np.stack([codes & 15, codes >> 4], axis=2)
        codes = halves.reshape(len(codes), dimension).astype(np.float32) - 8
    x = mean + codes * tensors["scale"][:, None]
    search.row(name, size, search.queries @ x.T, vectors)


def main(path, *directories):
    search = Search(np.load(path))
    n, d = search.x.shape
    print(f"{n} vectors of {d}, {QUERIES} queries\n")
    print("| | bytes a vector | by codes | scored again |")
    print("|---|---|---|---|")
    for directory_ in directories:
        directory(search, pathlib.Path(directory_))
    for name, kind, size in [
        ("faiss SQ8", faiss.ScalarQuantizer.QT_8bit, d),
        ("faiss SQ4", faiss.ScalarQuantizer.QT_4bit, d / 2),
    ]:
        index = faiss.IndexScalarQuantizer(d, kind, faiss.METRIC_INNER_PRODUCT)
        index.train(search.x)
        index.add(search.x)
        search.row_of_index(name, size, lambda q, k: index.search(q, k)[1])
    index = Index(ndim=d, metric="cos", dtype="i8")
    index.add(np.arange(n), search.x)
    exact = lambda q, k: index.search(q, k, exact=True).keys.astype(np.int64)
    search.row_of_index("usearch i8", d, exact)
    x = np.where(search.x > 0, 1, -1).astype(np.float32)
    q = np.where(search.queries > 0, 1, -1).astype(np.float32)
    search.row("signs, as pgvector's binary_quantize", -(-d // 8), q @ x.T, search.x)


main(*sys.argv[1:])
