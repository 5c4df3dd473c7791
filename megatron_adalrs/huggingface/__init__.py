"""Models of Hugging Face transformers: GPT-2, Llama and Qwen2, read and written as folders of files.

    config.json                     configuration of the model
    model.safetensors               the weights, or
    model-00001-of-00002.safetensors ... and model.safetensors.index.json
    generation_config.json, tokenizer.json ...   copied, or converted from a tokenizer of ours

This package does not need transformers. safetensors is an optional dependency and is imported only where a
file is read.
"""
