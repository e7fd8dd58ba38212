"""Word embeddings by skip-gram with negative sampling, of any text."""

from hogstream.workloads.embedding.corpus import Corpus, read_corpus

__all__ = ["Corpus", "read_corpus"]
