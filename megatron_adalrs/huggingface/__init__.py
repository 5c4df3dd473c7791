"""Models of Hugging Face's transformers: GPT-2, Llama and Qwen2, read and written as folders of its files.

    config.json                     the shape
    model.safetensors               the weights, or
    model-00001-of-00002.safetensors ... and model.safetensors.index.json
    generation_config.json, tokenizer.json ...   which are copied, or made of a tokenizer of ours

families.py      which of its tensors make one of ours, and how they lie in it
shape.py         config.json to a ModelConfig's fields and back; what our model cannot do is refused
rotary.py        the part of that which says how positions are rotated
tensor_files.py  a folder's tensors, one at a time: read through a map of the file, written in shards
reader.py        a folder as a source of our weights
writer.py        our weights as a folder
companions.py    the files beside the weights
tokenizer_json.py      a tokenizer of ours as one of theirs
sentencepiece_json.py  the same for models of SentencePiece

Nothing in here needs transformers. safetensors is imported where a file is read, for it is an extra.
"""
