"""What a trained model says: without DeepSpeed's engine, in one process.

model.py       a model from wherever one is kept, and its tokenizer
evaluation.py  loss and perplexity on a corpus
decoder.py     the next token's logits, with the keys and values of what came before kept
sampling.py    tokens from logits, and a completion token by token
"""
