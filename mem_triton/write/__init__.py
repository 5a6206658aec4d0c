"""Write texts as keys and values: chunks, an encoder that runs the model, and a writer that commits to a bank.

Sparse references are Memory³'s (arXiv 2407.01178, section 3).
"""

from mem_triton.write.chunking import Chunk, Document, DocumentError, chunks_of, read_documents
from mem_triton.write.config import PREFIX_TEXT, WriteConfig, prefix_ids
from mem_triton.write.encoder import EncodedText, Encoder, Tokenizer
from mem_triton.write.report import WriteReport
from mem_triton.write.sparsify import dense, sparsify
from mem_triton.write.spec import bank_spec, config_of
from mem_triton.write.writer import Writer

__all__ = [
    "PREFIX_TEXT",
    "Chunk",
    "Document",
    "DocumentError",
    "EncodedText",
    "Encoder",
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
]
