"""Memory³ (arXiv 2407.01178): texts written once as sparse keys and values, read by attention when they fit."""

from mem_triton.memory3.chunking import Chunk, Document, DocumentError, chunks_of, read_documents
from mem_triton.memory3.config import PREFIX_TEXT, WriteConfig, prefix_ids
from mem_triton.memory3.encoder import EncodedText, Encoder, Tokenizer
from mem_triton.memory3.report import WriteReport
from mem_triton.memory3.retrieval import Retriever
from mem_triton.memory3.sparsify import dense, sparsify
from mem_triton.memory3.spec import bank_spec, config_of
from mem_triton.memory3.training import train_product_codec
from mem_triton.memory3.write import Writer

__all__ = [
    "PREFIX_TEXT",
    "Chunk",
    "Document",
    "DocumentError",
    "EncodedText",
    "Encoder",
    "Retriever",
    "Tokenizer",
    "WriteConfig",
    "WriteReport",
    "Writer",
    "bank_spec",
    "chunks_of",
    "config_of",
    "dense",
    "prefix_ids",
    "read_documents",
    "sparsify",
    "train_product_codec",
]
